"""What engines have to be told of an adapter and its base: the family, and traits that only the base's files show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.conversion import MERGE
from lora_merge.core.checkpoint import CONFIG_FILE, config_levels
from lora_merge.core.report import Issue, error
from lora_merge.errors import ResolveError
from lora_merge.formats.model_config import read_config
from lora_merge.serving import ENGINES, family_issues, obstacles, report
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.traits import Trait, traits_of
from lora_merge.storage.small_files import read_json
from lora_merge.storage.user_paths import user_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.planning import Joined
    from lora_merge.serving.engine_report import EngineReport

ADDED_TOKENS = "added_tokens.json"
"""Tokens that an adapter's tokenizer has beside its vocabulary, with their ids."""


def base_config(given: str | None, adapter: Adapter) -> Mapping[str, Any]:
    """Return the ``config.json`` of a base: of the one that is given, else of one that the adapter names, if it is here.

    Only directories are looked at: a name alone says nothing about the family.
    """
    named = given or adapter.config.get("base_model_name_or_path")
    if not named:
        return {}
    try:
        return read_config(user_path(str(named)) / CONFIG_FILE)
    except ResolveError:
        return {}


def family_of(config: Mapping[str, Any], adapter: Adapter) -> BaseFamily:
    """Return the family of a base, by its config, else by the class that PEFT wrote down."""
    return BaseFamily.of_config(config) or BaseFamily.of_adapter(adapter.config)


def added_tokens(adapter: Adapter, config: Mapping[str, Any]) -> int:
    """Return how many entries of an adapter's ``added_tokens.json`` have ids that the base does not have.

    Without the base's vocabulary, all of them count.
    """
    path = Path(adapter.root) / ADDED_TOKENS
    if not path.is_file():
        return 0
    sizes = [level.get("vocab_size") for _, level in config_levels(config)]
    known = max((size for size in sizes if isinstance(size, int)), default=0)
    try:
        ids = read_json(path).values()
    except ResolveError:
        return 0
    return sum(isinstance(number, int) and number >= known for number in ids)


def seen_by_engines(adapter: Adapter, joined: Joined | None) -> tuple[tuple[Trait, ...], BaseFamily]:
    """Return an adapter's traits, with what the base shows of them, and the family of the base."""
    config = joined.base.config if joined else base_config(None, adapter)
    added = added_tokens(adapter, config)
    family = family_of(config, adapter)
    if joined is None:
        return traits_of(adapter, added_tokens=added), family
    return traits_of(adapter, joined.modules, joined.unchanged, added), family


def serving_issues(serving: str, adapter: Adapter, joined: Joined | None) -> list[Issue]:
    """Return an issue for each trait that an engine stumbles over and that no conversion takes away; and the family's."""
    traits, family = seen_by_engines(adapter, joined)
    engine = ENGINES[serving]
    incurable = [
        error("unsupported", trait.name, f"{trait.detail}: {engine.name} {rule.sentence}", MERGE)
        for trait, rule in obstacles(engine, traits, family)
        if not rule.needs and rule.effect != "option" and not rule.is_open(family)
    ]
    return [*family_issues(serving, traits, family), *incurable]


def left_for(
    serving: str, made: Adapter, base: Checkpoint | None, adapter: Adapter, source: str
) -> EngineReport:
    """Return what an engine makes of an adapter that was converted for it.

    Args:
        serving: the engine.
        made: what was written, from its headers.
        base: where it is at hand.
        adapter: what was converted.
        source: as the user named it.
    """
    config = base.config if base else base_config(None, adapter)
    traits = traits_of(made, base.matrices() if base else (), added_tokens=added_tokens(made, config))
    return report(serving, traits, source, family=family_of(config, adapter))
