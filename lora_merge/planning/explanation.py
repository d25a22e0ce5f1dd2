"""How one module of an adapter was matched: by which rule, to which stored tensor, to which part of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.core.tensor import shape_text
from lora_merge.layouts import LAYOUTS
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.words import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import MergePlan, Step

_WITHOUT_LAYOUT = {
    "tied": "it is one of the tied embeddings",
    "replaced": "the adapter replaces it as a whole",
    "": "the adapter does not name it",
}
"""What is said of a parameter that no layout had to find."""


@dataclass(frozen=True, slots=True)
class Match:
    """One change to one stored tensor."""

    parameter: str
    """As the adapter names it."""

    rule: str
    tensor: str
    """As it is stored."""

    shape: tuple[int, ...]
    file: str
    """Of the base (or the adapter, for a parameter that it carries whole)."""

    part: str
    """Which part of the stored tensor, as Python would index it; empty for all of it."""

    of_adapter: str
    """Which part of the adapter's weight; empty for all of it."""

    transposed: bool
    change: str
    """What is done: the algebra's name, or ``copied``."""

    rank: int
    scale: float
    adapter: str
    """Root of the adapter."""

    def text(self) -> str:
        """Return the match as lines for a reader, fit to be printed."""
        across = ", stored transposed" if self.transposed else ""
        rows = [
            ("rule", _in_words(self.rule)),
            (
                "tensor",
                f"{self.tensor}{self.part} of {shape_text(self.shape)}{across}, in {PurePath(self.file).name}",
            ),
        ]
        if self.of_adapter:
            rows.append(("part", f"{self.of_adapter} of the adapter's weight"))
        rank = f", rank {self.rank}, scale {self.scale:g}" if self.rank else ""
        rows.append(("change", f"{self.change}{rank}"))
        if self.adapter:
            rows.append(("adapter", self.adapter))
        lines = [self.parameter, *(f"  {key:<8} {value}" for key, value in rows)]
        return "\n".join(map(printable, lines))


def _in_words(rule: str) -> str:
    """Return a rule's name and what it says of a parameter."""
    says = _WITHOUT_LAYOUT[rule] if rule in _WITHOUT_LAYOUT else LAYOUTS[rule].says
    return f"{rule}: {says}" if rule else says


def matches_of(plan: MergePlan, name: str) -> tuple[Match, ...]:
    """Return what a plan does to a module or parameter, named as in the adapter or on disk; empty for an unknown
    name.
    """
    return tuple(match for step in plan.steps for match in _matches(plan, step, name))


def nearest(plan: MergePlan, name: str) -> list[str]:
    """Return up to three known names that are most like an unknown one. It may be the end of a name: ``q_prj``."""
    known = {step.name for step in plan.steps}
    known |= {
        delta.target
        for step in plan.steps
        if isinstance(step.op, Merge)
        for delta in step.op.deltas
        if delta.target
    }
    modules = sorted({parameter.removesuffix(".weight") for parameter in known})
    if near := difflib.get_close_matches(name, modules, n=3):
        return near
    # Of the modules whose names have the same end, the first one.
    n_parts = name.count(".") + 1
    ends: dict[str, str] = {}
    for module in modules:
        ends.setdefault(".".join(module.split(".")[-n_parts:]), module)
    return [ends[end] for end in difflib.get_close_matches(name, ends, n=3)]


def example_name(plan: MergePlan) -> str:
    """Return the name of a module that the adapter changes, or of any weight."""
    merged = (step.name for step in plan.steps if isinstance(step.op, Merge))
    return next(merged, plan.steps[0].name).removesuffix(".weight")


def _matches(plan: MergePlan, step: Step, name: str) -> Iterator[Match]:
    deltas = step.op.deltas if isinstance(step.op, Merge) else ()
    # A weight may have parts in several files; the first one's is shown.
    source = next(iter(step.reads.values()))
    stored = name in _names(step.name)
    for delta in deltas:
        if stored or name in _names(delta.target):
            yield _match(plan, delta, step.shape, source.file)
    if step.replaced and (stored or name in _names(source.name.removeprefix(PREFIX))):
        yield Match(
            step.name, "replaced", step.name, step.shape, source.file, "", "", False, "replaced", 0, 1.0, ""
        )
    elif stored and not deltas:
        yield Match(step.name, "", step.name, step.shape, source.file, "", "", False, step.action, 0, 1.0, "")


def _match(plan: MergePlan, delta: PlacedDelta, shape: tuple[int, ...], file: str) -> Match:
    return Match(
        parameter=delta.target,
        rule=delta.rule or "identity",
        tensor=delta.tensor,
        shape=shape,
        file=file,
        part=_indexed(delta.region.box),
        of_adapter=_indexed(delta.part),
        transposed=delta.region.transposed,
        change=delta.algebra,
        rank=delta.rank,
        scale=delta.effective_scale,
        adapter=plan.adapters[delta.adapter],
    )


def _names(parameter: str) -> tuple[str, str]:
    """Return a parameter's name and that of its module: a user may give either."""
    return parameter, parameter.rpartition(".")[0]


def _indexed(box: tuple[tuple[int, int], ...]) -> str:
    """Return a box as Python would index it."""
    if not box:
        return ""
    return f"[{', '.join(str(start) if end == start + 1 else f'{start}:{end}' for start, end in box)}]"
