"""Serving engines, and which adapters each can serve. One file per engine; `ENGINES` is the table.

Rules are data. Each names the release and the source that it was taken from, and what a conversion has to do about it.
So ``inspect`` and ``convert --for ENGINE`` follow the same rules.
"""

from __future__ import annotations

import re
from shlex import quote
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, note
from lora_merge.serving.engine_report import EngineReport, Obstacle
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.llamacpp import LLAMACPP
from lora_merge.serving.lmdeploy import LMDEPLOY
from lora_merge.serving.lorax import LORAX
from lora_merge.serving.rules import Engine, Need, Ranks, Rule
from lora_merge.serving.sglang import SGLANG
from lora_merge.serving.tgi import TGI
from lora_merge.serving.vllm import VLLM
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.serving.traits import Trait

UNSTATED = BaseFamily()
"""The family of an unknown base."""

MERGE = "merge it: lora-merge --base BASE --adapter ADAPTER --out OUT"

ENGINES: Mapping[str, Engine] = {
    "vllm": VLLM,
    "lmdeploy": LMDEPLOY,
    "lorax": LORAX,
    "sglang": SGLANG,
    "tgi": TGI,
    "llamacpp": LLAMACPP,
}

__all__ = ["ENGINES", "Engine", "Need", "Ranks", "Rule", "family_issues", "needs_of", "obstacles", "report"]


def report(
    name: str,
    traits: Sequence[Trait],
    adapter: str,
    options: str = "",
    family: BaseFamily = UNSTATED,
) -> EngineReport:
    """Return whether an engine serves an adapter, every reason against it, and commands that help.

    Args:
        name: the engine.
        traits: those of the adapter.
        adapter: as the user named it; used in commands.
        options: options about the base, as they were given: `` --base DIR``; used in commands.
        family: that of the base, if it is known.
    """
    engine = ENGINES[name]
    commands = _Commands(name, engine, adapter, options, traits)
    found = _family_obstacles(engine, traits, family, commands)
    for trait, rule in obstacles(engine, traits, family):
        sentence = f"{trait.detail}: {engine.name} {rule.sentence}"
        cures = (rule.option, commands.merge) if rule.option else commands.of(rule.needs)
        effect = "depends" if rule.is_open(family) else rule.effect
        found.append(Obstacle(trait.name, effect, sentence, cures, rule.source))
    # A statement about the file comes before those about its content.
    if engine.format == "gguf":
        sentence = (
            "it is not a GGUF file; llama.cpp's own converter writes one, but loses rsLoRA and alpha_pattern"
        )
        found.insert(
            0, Obstacle("format", "refused", sentence, commands.of(("rewrite",)), engine.ranks.source)
        )
    rank = next((trait for trait in traits if trait.name == "rank"), None)
    if rank is not None:
        found += _rank_obstacles(engine, rank, commands)
    return EngineReport(engine.name, engine.version, tuple(found), engine.families.standing(family))


def obstacles(engine: Engine, traits: Iterable[Trait], family: BaseFamily) -> list[tuple[Trait, Rule]]:
    """Return each trait that an engine cannot serve as it is, with the rule. A rule that may apply counts."""
    rules = engine.by_trait
    return [
        (trait, rules[trait.name])
        for trait in traits
        if trait.name in rules and rules[trait.name].applies(family)
    ]


def family_issues(name: str, traits: Sequence[Trait], family: BaseFamily) -> list[Issue]:
    """Return what a conversion says about the base's family: an error for a refusal, a note if nothing is known."""
    engine = ENGINES[name]
    standing = engine.families.standing(family)
    if standing == "refused":
        return [error("unsupported", str(family), _refusal(engine, family), MERGE)]
    others = _other_modules(engine, traits, family)
    if others:
        return [error("unsupported", others[0], _without_lora(engine, others), MERGE)]
    if standing == "unknown":
        return [note("unknown-family", str(family), _not_known(engine, family))]
    if standing == "unstated":
        sentence = f"not checked whether {engine.name} serves LoRA for its family: pass --base"
        return [note("unknown-family", "base", sentence)]
    return []


def _family_obstacles(
    engine: Engine, traits: Sequence[Trait], family: BaseFamily, commands: _Commands
) -> list[Obstacle]:
    """Return what speaks against the family of the base, or against modules that the engine has no LoRA for."""
    families = engine.families
    standing = families.standing(family)
    if standing == "refused":
        return [Obstacle("family", "refused", _refusal(engine, family), (commands.merge,), families.source)]
    if standing == "unknown":
        sentence = _not_known(engine, family)
        return [Obstacle("family", "unknown", sentence, (commands.merge,), families.source)]
    others = _other_modules(engine, traits, family)
    if not others:
        return []
    sentence = _without_lora(engine, others)
    return [Obstacle("modules", families.effect, sentence, (commands.merge,), families.source)]


def _refusal(engine: Engine, family: BaseFamily) -> str:
    return f"{engine.name} {engine.version} does not serve LoRA for {family}"


def _not_known(engine: Engine, family: BaseFamily) -> str:
    return f"whether {engine.name} {engine.version} serves LoRA for {family or 'this family'} is not known"


def _without_lora(engine: Engine, others: Sequence[str]) -> str:
    last = listing(dict.fromkeys(path.rpartition(".")[2] for path in others))
    return f"{engine.name} {engine.families.lacking} {last} of this family"


def _other_modules(engine: Engine, traits: Iterable[Trait], family: BaseFamily) -> list[str]:
    """Return modules that an engine has no LoRA for. Heads, embeddings and experts have separate rules."""
    pattern = engine.families.pattern(family)
    paths = next((trait.paths for trait in traits if trait.name == "modules"), ())
    return [path for path in paths if pattern and not re.fullmatch(pattern, path)]


def needs_of(name: str, traits: Sequence[Trait], family: BaseFamily = UNSTATED) -> frozenset[Need]:
    """Return what a conversion has to do so that an engine serves its output."""
    engine = ENGINES[name]
    needs = {need for _, rule in obstacles(engine, traits, family) for need in rule.needs} | {*engine.always}
    rank = next((trait.value for trait in traits if trait.name == "rank"), 0)
    # These engines have no option for the rank; the adapter itself needs an allowed one.
    if engine.ranks.by_padding and rank not in engine.ranks.allowed:
        needs.add("pad-rank")
    return frozenset(needs)


class _Commands:
    """Builds the commands that help with one adapter and one engine."""

    def __init__(
        self, name: str, engine: Engine, adapter: str, options: str, traits: Sequence[Trait]
    ) -> None:
        # The last part of a path or a repo, without its revision.
        named = adapter.rstrip("/").rpartition("/")[2].partition("@")[0]
        # A name such as ``..`` cannot be part of a new directory's name.
        plain = named if named.strip(".") else "adapter"
        self.merge = f"lora-merge{options} --adapter {quote(adapter)} --out {quote(f'{plain}-merged')}"
        self._convert = f"lora-merge convert {quote(adapter)} --for {name}{options}"
        self._out = f" --out {quote(f'{plain}-{name}')}"
        # A conversion to LoRA needs a rank. AdaLoRA alone has factors, so nothing is truncated.
        self._is_lossy = any(
            "to-lora" in rule.needs and (trait.name, trait.detail) != ("kind", "ADALORA")
            for trait, rule in obstacles(engine, traits, UNSTATED)
        )
        self._rank = engine.ranks.default or "N"

    def of(self, needs: Sequence[Need]) -> tuple[str, ...]:
        """Return the commands that cure a trait: a conversion if one does, and always a merge."""
        if not needs:
            return (self.merge,)
        return (self.convert(self._rank if self._is_lossy else None), self.merge)

    def convert(self, rank: object = None) -> str:
        """Return the command of a conversion, with ``--rank`` if one is given."""
        return f"{self._convert}{f' --rank {rank}' if rank else ''}{self._out}"


def _rank_obstacles(engine: Engine, rank: Trait, commands: _Commands) -> list[Obstacle]:
    """Return what speaks against the largest rank: a limit, a rank without a kernel, or an option to raise."""
    ranks = engine.ranks
    if ranks.most and rank.value > ranks.most:
        sentence = f"{rank.detail}: {engine.name} serves up to {ranks.most}"
        cures = (commands.convert(ranks.most), commands.merge)
        return [Obstacle("rank", "refused", sentence, cures, ranks.source)]
    if ranks.by_padding and rank.value not in ranks.allowed:
        sentence = f"{rank.detail}: {engine.name} {ranks.otherwise}"
        return [Obstacle("rank", ranks.effect, sentence, commands.of(("pad-rank",)), ranks.source)]
    if ranks.default and rank.value > ranks.default:
        # The smallest value of the option that suffices.
        value = next(value for value in ranks.allowed if value >= rank.value)
        sentence = f"{rank.detail}: {engine.name} serves up to {ranks.default} by default"
        told = (f"{engine.name}'s {ranks.option} {value}", commands.convert(ranks.default), commands.merge)
        return [Obstacle("rank", "option", sentence, told, ranks.source)]
    return []
