"""A vocabulary of another size: all embeddings get it, and the configuration says so."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.tensor import TensorRef
from lora_merge.modeling.plain_config import fetched_part
from lora_merge.modeling.skeleton import parse_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.planning.model import Model
    from lora_merge.planning.outline import Outline

_TEXT_LEVELS = frozenset(
    {"", "text_config", "decoder", "generator", "text_encoder", "llm_config", "language_config"}
)
"""Last parts of the paths of the levels of a config that count the rows of an embedding (transformers 5.23)."""


@dataclass(slots=True)
class Resized:
    """What an adapter's vocabulary changes beside the embeddings that it brings."""

    patch: dict[str, int] = field(default_factory=dict)
    """Of ``config.json``."""

    cut: dict[str, TensorRef] = field(default_factory=dict)
    """The first rows of embeddings that the adapter does not bring, where the vocabulary shrinks."""

    issues: list[Issue] = field(default_factory=list)


def resized(model: Model, outline: Outline, shapes: Mapping[str, tuple[int, ...]]) -> Resized:
    """Return what another number of embedding rows changes: the config, other embeddings, and what is wrong with it.

    Args:
        model: the base.
        outline: of the output, where embeddings may have been untied.
        shapes: of the parameters that are the adapters' own tensors.

    Reference:
        ``transformers.PreTrainedModel.resize_token_embeddings`` (transformers 5.23): all embeddings get the size, and a
        smaller one keeps the first rows.
    """
    found, config = Resized(), model.config
    sizes = {
        name: (model.source(name).shape[0], shape[0])
        for name, shape in shapes.items()
        if shape != model.source(name).shape
    }
    for name, (before, rows) in sizes.items():
        verb = "grows" if rows > before else "shrinks"
        found.issues.append(note("resized", name, f"{verb} from {before} to {rows} rows"))
        patch = vocabulary_patch(config, before, rows)
        found.patch |= patch
        if not patch:
            sentence = f"{verb} from {before} to {rows} rows, and no vocab_size in config.json is {before}"
            hint = "resize the base in transformers first, and save it"
            found.issues.append(error("resized", name, sentence, hint))
    first = next(iter(sizes), "")
    # Two embeddings of different sizes cannot share a vocabulary.
    odd = next((name for name in sizes if sizes[name] != sizes[first]), None)
    if odd is not None:
        sentence = f"would get {sizes[odd][1]} rows, and {first} {sizes[first][1]} rows"
        found.issues.append(
            error("resized", odd, sentence, "save the adapter again: its file mixes two vocabularies")
        )
    elif sizes:
        _resize_others(found, model, outline, shapes, first)
        before, rows = sizes[first]
        found.issues += _tokens_beyond(config, rows) if rows < before else ()
    return found


def _resize_others(
    found: Resized,
    model: Model,
    outline: Outline,
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
) -> None:
    """Cut the embeddings that the adapter does not bring; where the vocabulary grows, their rows are missing."""
    before, rows = model.source(name).shape[0], shapes[name][0]
    for other, weight in outline.sources.items():
        if other in shapes or weight.shape[:1] != (before,) or not model.is_embedding(other):
            continue
        ref = weight.plain
        if rows < before and ref is None:
            sentence = (
                f"is stored quantised ({weight.storage.codec}), so it cannot be cut to the {rows} rows of "
                f"{name}"
            )
            found.issues.append(error("resized", other, sentence, "resize the base in transformers first"))
            continue
        if rows < before and ref is not None:
            # The first rows are the first bytes, so the cut is a shorter reference.
            shape = (rows, *ref.shape[1:])
            n_bytes = ref.nbytes // before * rows
            found.cut[other] = replace(ref, shape=shape, nbytes=n_bytes)
            found.issues.append(
                note("resized", other, f"shrinks from {before} to {rows} rows, as {name} does")
            )
            continue
        sentence = (
            f"has {before} rows, {name} grows to {rows}, and the adapter does not have the {rows - before} "
            "new rows"
        )
        hint = (
            "merge into the base that was resized before the training (--base), or save the adapter again "
            "with save_pretrained(…, save_embedding_layers=True)"
        )
        found.issues.append(error("resized", other, sentence, hint))


def _tokens_beyond(config: Mapping[str, Any], rows: int) -> Iterator[Issue]:
    """Yield an issue for each token id in the configuration that has no row any more."""
    for path, level in config_levels(config):
        for key, value in level.items():
            if not key.endswith(("_token_id", "_token_index")):
                continue
            ids = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
            if not ids or max(ids) < rows:
                continue
            subject = f"{path}.{key}".lstrip(".")
            sentence = f"is {value} in config.json, and the vocabulary shrinks to {rows} rows"
            hint = "set it to a token id below the new size in the base's config.json"
            make = (
                error if key == "pad_token_id" else warning
            )  # transformers does not build an embedding with that
            yield make("token-beyond", subject, sentence, hint)


def vocabulary_patch(config: Mapping[str, Any], before: int, after: int) -> dict[str, int]:
    """Return what another number of embedding rows changes in ``config.json``, at every level that counts them.

    A level may leave out what is the default of its class; transformers knows that.

    Example:
        >>> vocabulary_patch({"text_config": {"vocab_size": 96}}, 96, 100)
        {'text_config.vocab_size': 100}
    """
    said = {path: level.get("vocab_size") for path, level in config_levels(config)}
    paths = [path for path, size in said.items() if size == before]
    if not paths or len(said) > 1:
        # A level may leave out the default of its class, which only transformers knows.
        parsed = None if fetched_part(config) else parse_config(config)
        implied = dict(config_levels(parsed.to_dict())) if parsed is not None else {}
        paths += [
            path
            for path, level in implied.items()
            if said.get(path) is None
            and level.get("vocab_size") == before
            and path.rpartition(".")[2] in _TEXT_LEVELS
        ]
    return {f"{path}.vocab_size".lstrip("."): after for path in dict.fromkeys(paths)}
