"""Texts → a plan: locate, resolve, plan; and how one module was matched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx_spelling import in_names_of
from lora_merge.adapters.unread import beside_base
from lora_merge.core.adapter import AdapterUse
from lora_merge.core.checkpoint import CONFIG_FILE, Checkpoint, MergedBefore
from lora_merge.core.identity import Inputs
from lora_merge.core.plan import MergePlan
from lora_merge.core.report import Observer, Silence, warning
from lora_merge.errors import PlanError, RequestError
from lora_merge.io.files import is_directory, user_path
from lora_merge.io.hub import Access
from lora_merge.io.input_files import watching
from lora_merge.io.model_config import read_config
from lora_merge.locate import (
    Place,
    check_ignored,
    check_not_swapped,
    find,
    locate_adapter,
    locate_base,
    locate_named_base,
    moved_base,
    other_base,
)
from lora_merge.plan import make_plan, quantised_config, raise_errors, touches_embeddings
from lora_merge.plan.explanation import Match, matches_of, nearest
from lora_merge.requests.request import Request
from lora_merge.requests.table import default_of
from lora_merge.requests.values import parse_adapter
from lora_merge.resolve import (
    differing_copies,
    displaced_side_files,
    equal_embeddings,
    is_idle,
    own_side_files,
    resolve_adapter,
    resolve_base,
    unchanged_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.report import Issue


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was made from."""

    request: Request
    plan: MergePlan
    uses: tuple[AdapterUse, ...]
    base: Place
    adapters: tuple[Place, ...]
    checkpoint: Checkpoint
    """The base, from its headers."""

    inputs: Inputs = field(default_factory=Inputs)
    """The files that planning read, and what it found in them."""

    @property
    def merged_before(self) -> tuple[MergedBefore, ...]:
        """Return what the base has merged into it already."""
        return self.checkpoint.merged

    def read_files(self) -> tuple[Path, ...]:
        """Return the directories and the weight files that the output is made of."""
        roots = (self.plan.base, *self.plan.adapters)
        own = {ref.file for ref in self.checkpoint.tensors()}
        own.update(*(use.adapter.files for use in self.uses))
        return tuple(map(Path, (*roots, *sorted(own))))


def plan_request(request: Request, watch: Observer) -> Planned:
    """Locate and resolve base and adapters, and plan their merge.

    What small files alone show is refused before anything large is fetched.

    Raises:
        ChangedError: a file changed while it was read.
        LoraMergeError: there is no plan.
    """
    with watching() as seen:
        planned = _plan(request, watch)
    return replace(planned, inputs=seen.inputs())


def _plan(request: Request, watch: Observer) -> Planned:
    """Locate and resolve base and adapters, and plan their merge."""
    access = Access(request.token, request.offline)
    chosen = [_chosen(text) for text in request.adapter]
    named_base = None if request.base is None else (find(request.base, "base"), request.base)
    found = [(find(text, "adapter"), text) for text, _ in chosen]
    if named_base is not None:
        for adapter_found, _ in found:
            check_not_swapped(named_base[0], adapter_found)
    places = tuple(locate_adapter(*one, access, watch, request.ignore_file) for one in found)
    check_ignored(places, request.ignore_file)
    if named_base is not None:
        base_place = locate_base(*named_base, access, watch)
    else:
        base_place = locate_named_base(places[0], access, watch)
    is_remote = base_place.repo is not None
    if is_remote:
        raise_errors(quantised_config(read_config(base_place.root / CONFIG_FILE)))
    apart = [place for place in places if place.root != base_place.root]  # else its weights are the base's
    raise_errors([issue for place in apart for issue in place.issues])
    adapters = [resolve_adapter(place.whole(), place.ignored) for place in places]
    if is_remote and len(apart) == len(places):
        raise_errors([issue for adapter in adapters for issue in adapter.issues])
    base = resolve_base(base_place.whole())
    adapters = [in_names_of(beside_base(adapter, base), base.config) for adapter in adapters]
    weights = [weight for _, weight in chosen]
    uses = tuple(_use(adapter, weight, base) for adapter, weight in zip(adapters, weights, strict=True))
    twins = equal_embeddings(base, adapters) if any(map(touches_embeddings, uses)) else frozenset()
    plan = make_plan(base, uses, request, twins)
    located = [issue for place in (base_place, *places) for issue in place.issues]
    other = other_base(base_place, places, [adapter.config for adapter in adapters])
    issues = (*located, *_unused(request), *(other or moved_base(base_place, places)), *plan.issues)
    return Planned(request, replace(plan, issues=issues), uses, base_place, places, base)


def _unused(request: Request) -> list[Issue]:
    """Return a warning for a density that the way of combining does not look at."""
    if request.density == default_of("merge", "density") or request.combine in {
        "ties",
        "dare_linear",
        "dare_ties",
    }:
        return []
    sentence = f"is {request.density:g}, and --combine {request.combine} keeps all of each change"
    return [warning("unused-option", "density", sentence, "--combine ties, dare_linear or dare_ties uses it")]


def _use(adapter: Adapter, weight: float, base: Checkpoint) -> AdapterUse:
    """Return an adapter of a merge, with what only its files and the base's together tell."""
    unchanged = unchanged_parameters(adapter, base)
    own = frozenset(own_side_files(adapter, base))
    displaced, issues = displaced_side_files(adapter, base)
    return AdapterUse(
        adapter,
        weight,
        own_side_files=own,
        unchanged=unchanged,
        differing=differing_copies(adapter, base),
        is_idle=is_idle(adapter, unchanged),
        displaced=displaced,
        issues=issues,
    )


def _chosen(text: str) -> tuple[str, float]:
    """Return the place and the weight of an adapter; a directory of the whole name wins."""
    return (text, 1.0) if is_directory(user_path(text)) else parse_adapter(text)


def check_strict(issues: Sequence[Issue], *, strict: bool) -> None:
    """Raise the warnings among some issues, where they count as errors.

    Raises:
        PlanError: there are some, and they do.
    """
    warnings = [issue for issue in issues if issue.severity == "warning"]
    if strict and warnings:
        raise PlanError(warnings)


def explain(request: Request, names: Sequence[str], *, observer: Observer | None = None) -> tuple[Match, ...]:
    """Return how some modules or parameters were matched, by their names in the adapter or on disk.

    Raises:
        RequestError: nothing answers to a name.
        LoraMergeError: as for `run`, when there is no plan.
    """
    plan = plan_request(request, observer or Silence()).plan
    check_strict(plan.issues, strict=request.strict)
    matches: list[Match] = []
    for name in names:
        found = matches_of(plan, name)
        if not found:
            near = ", ".join(nearest(plan, name))
            sentence = f"{name} is no module or parameter of the adapter or the base"
            raise RequestError("", 0, "explain", sentence, hint=f"nearest: {near}" if near else "")
        matches += found
    return tuple(matches)
