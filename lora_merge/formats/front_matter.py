"""The front matter of model cards: what those of base and adapter say, and what the output's card takes over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, note, warning
from lora_merge.errors import LoraMergeError
from lora_merge.formats.side_files import CARD_FILE
from lora_merge.storage.json_values import MOST_LEVELS
from lora_merge.storage.small_files import read_text
from lora_merge.words import printable

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = re.compile(r"\A\s*---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
_MOST_CHARACTERS = 100_000
"""Of front matter that is parsed; published ones have some thousand, mostly results of evaluations."""
_LONGEST, _MOST_ENTRIES = 200, 100
"""Characters of a value and entries of a list that are taken over."""

_UNSTATED = frozenset({"", "unknown"})
_PLACEHOLDER = "other"
"""LLaMA-Factory writes this licence into each card. It says something only with a ``license_name``."""

_OF_ADAPTERS = re.compile(
    r"(?:peft|.*(?<![a-z])q?lora|adapters?|base_model:.*|license:.*|dataset:.*|region:.*|.*_compatible"
    r"|(?:awq|gptq|gguf|mlx|bitsandbytes|bnb|exl[23]|fp8|[2348]-?bit)|lora-merge|merged)",
    re.IGNORECASE,
)
"""Tags that are not true of a merged model, or that the Hub derives itself."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the front matter of a model card says, as far as a merged model takes it over."""

    license: str = ""
    license_name: str = ""
    """Where the licence is not one of the Hub's list."""

    license_link: str = ""
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str = ""
    loaded_by: str = ""
    """The library that loads the model: ``library_name``."""

    problem: str = ""
    """Why the front matter could not be read, as the end of a sentence; empty where it could."""

    @property
    def licence(self) -> str:
        """The licence as people call it; empty where none is stated."""
        if self.license == _PLACEHOLDER:
            return self.license_name
        return "" if self.license.lower() in _UNSTATED else self.license


NO_CARD = CardFacts()


def card_facts(root: Path) -> CardFacts:
    """Return what the model card in a directory says; nothing where there is none.

    A card is prose by strangers: a damaged one costs its facts, never the merge.
    """
    path = root / CARD_FILE
    if not path.is_file():
        return NO_CARD
    try:
        return parse_card(read_text(path))
    except LoraMergeError as exc:
        return CardFacts(problem=f"cannot be read ({exc})")


def parse_card(text: str) -> CardFacts:
    """Return what the front matter of a card says. What is not a text, or a list of texts, is left out.

    Example:
        >>> parse_card("---\\nlicense: mit\\ntags: [chat, lora]\\n---\\n# x").tags
        ('chat', 'lora')
    """
    block = _BLOCK.match(text.removeprefix("\ufeff"))
    if block is None or not block[1]:
        return NO_CARD
    try:
        data = _card_data(_table(block[1]))
    except ValueError as exc:
        return CardFacts(problem=f"has front matter that cannot be read: {printable(str(exc))[:_LONGEST]}")
    texts = {key: _text(data.get(key)) for key in ("license", "license_name", "license_link")}
    # A list with one licence is common, and the Hub takes it.
    texts["license"] = texts["license"] or next(iter(_texts(data.get("license"))), "")
    return CardFacts(
        **texts,
        language=_languages(data.get("language")),
        datasets=_texts(data.get("datasets")),
        tags=_texts(data.get("tags")),
        pipeline_tag=_text(data.get("pipeline_tag")),
        loaded_by=_text(data.get("library_name")),
    )


def _table(text: str) -> dict[str, Any]:
    """Return the table in front matter.

    Raises:
        ValueError: it is too long or nested too deeply, is not YAML, holds no table, or has aliases, which can stand for
            any amount of data.
    """
    import yaml

    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, expected at most {_MOST_CHARACTERS}")
    try:
        level = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            match event:
                case yaml.AliasEvent():
                    raise ValueError("it has YAML aliases")
                case yaml.CollectionStartEvent():
                    level += 1
                case yaml.CollectionEndEvent():
                    level -= 1
            # The time that the parser takes grows with the square of the levels.
            if level > MOST_LEVELS:
                raise ValueError(f"it has tables and lists nested more than {MOST_LEVELS} deep")
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as exc:
        raise ValueError(" ".join(str(exc).split())) from exc
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError("it is not a table of names")
    return table


def _card_data(table: Mapping[str, Any]) -> Any:
    """Return huggingface_hub's own form of front matter.

    Raises:
        ValueError: it refuses the table.
    """
    from huggingface_hub.repocard_data import ModelCardData

    # Results of evaluations belong to the model that they were measured on, so they are not even parsed.
    wanted = {key: value for key, value in table.items() if key not in {"model-index", "eval_results"}}
    try:
        return ModelCardData(**wanted, ignore_metadata_errors=True)
    except Exception as exc:  # the class takes any table, and fails on odd ones in many ways
        raise ValueError(f"huggingface_hub refuses it ({type(exc).__name__}: {exc})") from exc


def _text(value: object) -> str:
    """Return a text on one line; empty for anything else, and for one that is too long to be meant."""
    if not isinstance(value, str) or len(value) > _LONGEST:
        return ""
    return printable(value.strip())


def _texts(value: object) -> tuple[str, ...]:
    """Return the texts in a list, each once; one text is a list of one."""
    entries = value if isinstance(value, list) else [value]
    return tuple(filter(None, dict.fromkeys(map(_text, entries[:_MOST_ENTRIES]))))


def _languages(value: object) -> tuple[str, ...]:
    """Return languages; YAML 1.1 reads Norwegian (``no``) as false."""
    entries = value if isinstance(value, list) else [value]
    return _texts(["no" if entry is False else entry for entry in entries])


def card_issues(base: CardFacts, adapters: Iterable[CardFacts]) -> list[Issue]:
    """Return a note for each card that cannot be read, and a warning where licences differ."""
    cards = [("base", base), *(("adapter", card) for card in adapters)]
    found = [
        note("card-unread", CARD_FILE, f"that of the {role} {card.problem}; nothing of it was taken over")
        for role, card in cards
        if card.problem
    ]
    stated = licences([card for _, card in cards])
    if len(stated) > 1:
        said = " and ".join(f"the {role} says {card.licence}" for role, card in cards if card.licence)
        sentence = f"{said}, so the output's model card names no licence"
        hint = "read both, and write the licence of the output into its README.md before you publish it"
        found.append(warning("licences-differ", "license", sentence, hint))
    return found


def licences(cards: Iterable[CardFacts]) -> tuple[CardFacts, ...]:
    """Return the cards that state a licence, one for each licence."""
    return tuple({card.licence.lower(): card for card in reversed(list(cards)) if card.licence}.values())


def front_matter(
    names: Mapping[str, object], base: CardFacts, adapters: Iterable[CardFacts], tags: Iterable[str] = ()
) -> str:
    """Return the front matter of a merged model, without its fences, as huggingface_hub writes it.

    Args:
        names: further fields, and the order that they have: ``base_model`` and so on.
        base: the base's card.
        adapters: the adapters' cards.
        tags: those that come before the ones that are taken over.
    """
    import yaml

    cards = [base, *adapters]
    stated = licences(cards)
    licence = stated[0] if len(stated) == 1 else NO_CARD
    library = next((card.loaded_by for card in cards if card.loaded_by not in {"", "peft"}), "transformers")
    kept = [tag for card in cards for tag in card.tags if not _OF_ADAPTERS.fullmatch(tag)]
    fields = {
        **names,
        "license": licence.license,
        "license_name": licence.license_name,
        "license_link": licence.license_link,
        "language": _union(card.language for card in cards),
        "library_name": library,
        "pipeline_tag": next((card.pipeline_tag for card in cards if card.pipeline_tag), ""),
        "datasets": _union(card.datasets for card in cards),
        "tags": [*dict.fromkeys([*tags, *kept])],
    }
    given = {key: value for key, value in fields.items() if value}
    # As `ModelCardData.to_yaml` does. To import its module takes longer than all else that is written around the weights.
    text: str = yaml.dump(given, sort_keys=False, allow_unicode=True, line_break="\n")
    return text.strip()


def _union(lists: Iterable[tuple[str, ...]]) -> list[str]:
    return [*dict.fromkeys(entry for entries in lists for entry in entries)]
