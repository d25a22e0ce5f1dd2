"""Serving engines, and what each makes of an adapter as it is. One file per engine; `ENGINES` is the table.

Rules are data, each with the release and the source that it was taken from. A rule that a conversion cures names what
the conversion has to do, so that ``--for ENGINE`` is made of the same rules.
"""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from lora_merge.core.inspection import EngineReport, Obstacle
from lora_merge.serving.llamacpp import LLAMACPP
from lora_merge.serving.lmdeploy import LMDEPLOY
from lora_merge.serving.lorax import LORAX
from lora_merge.serving.rules import Engine, Need, Ranks, Rule
from lora_merge.serving.sglang import SGLANG
from lora_merge.serving.tgi import TGI
from lora_merge.serving.vllm import VLLM

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.core.request import ServingEngine
    from lora_merge.core.traits import Trait

ENGINES: Mapping[ServingEngine, Engine] = {
    "vllm": VLLM,
    "lmdeploy": LMDEPLOY,
    "lorax": LORAX,
    "sglang": SGLANG,
    "tgi": TGI,
    "llamacpp": LLAMACPP,
}

__all__ = ["ENGINES", "Engine", "Need", "Ranks", "Rule", "needs_of", "obstacles", "report"]


def report(
    name: ServingEngine, traits: Sequence[Trait], adapter: str, options: str = "", model_type: str = ""
) -> EngineReport:
    """Return what an engine makes of an adapter, with the commands that help.

    Args:
        name: of the engine.
        traits: of the adapter.
        adapter: as the user named it.
        options: that say which base it belongs to, as they were given: `` --base DIR``.
        model_type: of the base, if it is known.
    """
    engine = ENGINES[name]
    commands = _Commands(name, engine, adapter, options, traits)
    found = []
    for trait, rule in obstacles(engine, traits, model_type):
        sentence = f"{trait.detail}: {engine.name} {rule.sentence}"
        cures = commands.of(rule.needs)
        depends = rule.depends and not model_type
        found.append(
            Obstacle(trait.name, "depends" if depends else rule.effect, sentence, cures, rule.source)
        )
    if engine.format == "gguf":
        sentence = (
            "it is no GGUF file; llama.cpp's own converter makes one, and loses rsLoRA and alpha_pattern"
        )
        found.insert(
            0, Obstacle("format", "refused", sentence, commands.of(("rewrite",)), engine.ranks.source)
        )
    rank = next((trait for trait in traits if trait.name == "rank"), None)
    if rank is not None:
        found += _rank_obstacles(engine, rank, commands)
    return EngineReport(engine.name, engine.version, tuple(found))


def obstacles(engine: Engine, traits: Iterable[Trait], model_type: str) -> list[tuple[Trait, Rule]]:
    """Return the traits that an engine stumbles over, with its rules."""
    rules = engine.by_trait
    return [
        (trait, rules[trait.name])
        for trait in traits
        if trait.name in rules and rules[trait.name].applies(model_type)
    ]


def needs_of(name: ServingEngine, traits: Sequence[Trait], model_type: str = "") -> frozenset[Need]:
    """Return what a conversion has to do so that an engine serves what comes of it."""
    engine = ENGINES[name]
    needs = {need for _, rule in obstacles(engine, traits, model_type) for need in rule.needs} | {
        *engine.always
    }
    rank = next((trait.value for trait in traits if trait.name == "rank"), 0)
    if engine.ranks.by_padding and rank not in engine.ranks.allowed:
        needs.add("pad-rank")
    return frozenset(needs)


class _Commands:
    """The commands that help with one adapter and one engine."""

    def __init__(
        self, name: ServingEngine, engine: Engine, adapter: str, options: str, traits: Sequence[Trait]
    ) -> None:
        named = adapter.rstrip("/").rpartition("/")[2].partition("@")[0]
        plain = named if named.strip(".") else "adapter"
        self.merge = f"lora-merge{options} --adapter {quote(adapter)} --out {quote(f'{plain}-merged')}"
        self._convert = f"lora-merge convert {quote(adapter)} --for {name}{options}"
        self._out = f" --out {quote(f'{plain}-{name}')}"
        self._is_lossy = any(
            "to-lora" in rule.needs and (trait.name, trait.detail) != ("kind", "ADALORA")
            for trait, rule in obstacles(engine, traits, "")
        )
        self._rank = engine.ranks.default or "N"

    def of(self, needs: Sequence[Need]) -> tuple[str, ...]:
        """Return the commands that cure a trait: a conversion, if one does, and a merge."""
        if not needs:
            return (self.merge,)
        return (self.convert(self._rank if self._is_lossy else None), self.merge)

    def convert(self, rank: object = None) -> str:
        """Return the command of a conversion."""
        return f"{self._convert}{f' --rank {rank}' if rank else ''}{self._out}"


def _rank_obstacles(engine: Engine, rank: Trait, commands: _Commands) -> list[Obstacle]:
    """Return what the largest rank stumbles over."""
    ranks = engine.ranks
    if ranks.most and rank.value > ranks.most:
        sentence = f"{rank.detail}: {engine.name} serves up to {ranks.most}"
        cures = (commands.convert(ranks.most), commands.merge)
        return [Obstacle("rank", "refused", sentence, cures, ranks.source)]
    if ranks.by_padding and rank.value not in ranks.allowed:
        sentence = f"{rank.detail}: {engine.name} {ranks.otherwise}"
        return [Obstacle("rank", ranks.effect, sentence, commands.of(("pad-rank",)), ranks.source)]
    if ranks.default and rank.value > ranks.default:
        value = next(value for value in ranks.allowed if value >= rank.value)
        sentence = f"{rank.detail}: {engine.name} serves up to {ranks.default} unless it is told"
        told = (f"{engine.name}'s {ranks.option} {value}", commands.convert(ranks.default), commands.merge)
        return [Obstacle("rank", "option", sentence, told, ranks.source)]
    return []
