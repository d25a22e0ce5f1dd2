"""What engines need to know of an adapter and its base: the family, and traits that only the base's files show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.conversion import MERGE
from lora_merge.core.checkpoint import CONFIG_FILE, config_levels
from lora_merge.core.report import Issue, error
from lora_merge.errors import ResolveError
from lora_merge.formats.model_config import read_config
from lora_merge.serving import ENGINES, family_issues, obstacles, report
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.traits import Trait, traits_of
from lora_merge.storage.local_copies import local_path
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.small_files import read_json
from lora_merge.storage.user_paths import file_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.planning import Joined
    from lora_merge.serving.engine_report import EngineReport

ADDED_TOKENS = "added_tokens.json"
"""File with the tokens that an adapter's tokenizer adds to its vocabulary, and their ids."""


def base_config(given: str | None, adapter: Adapter) -> Mapping[str, Any]:
    """Return a base's ``config.json``: of the base that is given, otherwise of the one that the adapter names.

    Repos are not asked, and no URL that only the adapter names. Empty if there is none: a name alone does not tell
    the family.
    """
    named = given or adapter.config.get("base_model_name_or_path")
    if not named or (not given and is_store_url(str(named))):
        return {}
    try:
        return read_config(file_in(str(named), CONFIG_FILE))
    except ResolveError:
        return {}


def family_of(config: Mapping[str, Any], adapter: Adapter) -> BaseFamily:
    """Return the family of a base: by its config, otherwise by the class that PEFT wrote into the adapter's config."""
    return BaseFamily.of_config(config) or BaseFamily.of_adapter(adapter.config)


def added_tokens(adapter: Adapter, config: Mapping[str, Any]) -> int:
    """Return how many entries of an adapter's ``added_tokens.json`` have ids beyond the base's vocabulary.

    All of them count where the base's ``vocab_size`` is not known. 0 if the file is missing or broken.
    """
    path = local_path(adapter.root) / ADDED_TOKENS
    if not path.is_file():
        return 0
    sizes = [level.get("vocab_size") for _, level in config_levels(config)]
    # A model with several parts has a vocabulary at several levels of its config.
    known = max((size for size in sizes if isinstance(size, int)), default=0)
    try:
        ids = read_json(path).values()
    except ResolveError:
        return 0
    return sum(isinstance(number, int) and number >= known for number in ids)


def seen_by_engines(adapter: Adapter, joined: Joined | None) -> tuple[tuple[Trait, ...], BaseFamily]:
    """Return an adapter's traits, with those that only the base shows, and the family of the base."""
    config = joined.base.config if joined else base_config(None, adapter)
    added = added_tokens(adapter, config)
    family = family_of(config, adapter)
    if joined is None:
        return traits_of(adapter, added_tokens=added), family
    return traits_of(adapter, joined.modules, joined.unchanged, added), family


def serving_issues(serving: str, adapter: Adapter, joined: Joined | None) -> list[Issue]:
    """Return an error for each trait that no conversion cures for an engine, and the issues of the family."""
    traits, family = seen_by_engines(adapter, joined)
    engine = ENGINES[serving]
    incurable = [
        error("unsupported", trait.name, f"{trait.detail}: {engine.name} {rule.sentence}", MERGE)
        for trait, rule in obstacles(engine, traits, family)
        # An option of the engine is the user's to set, and a rule that may not hold for this family is no
        # reason to refuse.
        if not rule.needs and rule.effect != "option" and not rule.is_open(family)
    ]
    return [*family_issues(serving, traits, family), *incurable]


def left_for(
    serving: str, made: Adapter, base: Checkpoint | None, adapter: Adapter, source: str
) -> EngineReport:
    """Return what an engine would still find in an adapter that was converted for it.

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
