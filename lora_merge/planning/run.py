"""Texts → base and adapters, joined → a plan; and how one module was matched."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_merge.adapters.mlx_spelling import in_names_of
from lora_merge.adapters.unread import beside_base
from lora_merge.core.adapter import AdapterUse
from lora_merge.core.checkpoint import CONFIG_FILE, Checkpoint, MergedBefore
from lora_merge.core.identity import Inputs
from lora_merge.core.plan import MergePlan
from lora_merge.core.report import Issue, Observer, Silence, warning
from lora_merge.errors import PlanError, RequestError
from lora_merge.formats.front_matter import CardFacts, card_facts, card_issues
from lora_merge.formats.model_config import read_config
from lora_merge.formats.stored_weights import settings_files
from lora_merge.planning import (
    Joined,
    Policy,
    Reading,
    join,
    make_plan,
    raise_errors,
    touches_embeddings,
)
from lora_merge.planning.base_names import moved_base, other_base
from lora_merge.planning.explanation import Match, example_name, matches_of, nearest
from lora_merge.planning.locate import (
    Place,
    check_ignored,
    check_not_swapped,
    find,
    locate_adapter,
    locate_base,
    locate_named_base,
)
from lora_merge.planning.other_storage import storage_doubts
from lora_merge.planning.resolve import (
    differing_copies,
    displaced_side_files,
    equal_embeddings,
    is_idle,
    own_side_files,
    resolve_adapter,
    resolve_base,
    unchanged_parameters,
)
from lora_merge.quantised import refusals
from lora_merge.requests.request import Request
from lora_merge.requests.table import default_of
from lora_merge.requests.values import parse_adapter
from lora_merge.storage.hub import Access
from lora_merge.storage.input_files import watching
from lora_merge.storage.local_copies import without_copies
from lora_merge.storage.objects.urls import is_store_url, path_here
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.sources import is_local
from lora_merge.storage.user_paths import is_directory, user_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import Adapter

Settings = TypeVar("Settings", Reading, Policy)


@dataclass(frozen=True, slots=True)
class InputTexts:
    """Which base and which adapters, as texts that name them, and how a hub may be asked for them."""

    adapters: tuple[tuple[str, float], ...]
    """The text of each, and how much of it is wanted."""

    base: str | None
    """None for the one that the first adapter names."""

    ignore_file: tuple[str, ...] = ()
    """Files in the adapters' folders that are not read though they may hold weights."""

    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True)
class JoinedInputs:
    """A base and its adapters, joined, and where they came from."""

    joined: Joined
    base: Place
    adapters: tuple[Place, ...]

    located: tuple[Issue, ...]
    """Issues that finding the inputs showed: files that are missing in the cache, for example."""

    doubts: tuple[Issue, ...]
    """Warnings that the adapters may have been trained on another base, or another revision of it."""

    inputs: Inputs = field(default_factory=Inputs)
    """The files that were read, and what was found in them."""

    @property
    def issues(self) -> tuple[Issue, ...]:
        """Everything that is wrong, or worth knowing, in the order in which it is printed."""
        return (*self.located, *self.doubts, *self.joined.issues)


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a merge, and what it was made from."""

    request: Request
    plan: MergePlan
    joined: Joined
    base: Place
    adapters: tuple[Place, ...]
    inputs: Inputs
    """The files that planning read, and what it found in them."""

    cards: tuple[CardFacts, ...]
    """What the model cards say: the base's, then each adapter's."""

    @property
    def uses(self) -> tuple[AdapterUse, ...]:
        """The adapters, read from headers and small files."""
        return self.joined.uses

    @property
    def checkpoint(self) -> Checkpoint:
        """The base, read from headers and small files."""
        return self.joined.base

    @property
    def merged_before(self) -> tuple[MergedBefore, ...]:
        """What the base's manifest says is merged into it."""
        return self.checkpoint.merged

    def read_files(self) -> tuple[Path, ...]:
        """Return the directories and weight files of this machine that the output is made of."""
        roots = (self.plan.base, *self.plan.adapters)
        own = {ref.file for ref in self.checkpoint.tensors()}
        own.update(*(use.adapter.files for use in self.uses))
        # The output may neither be in one of them nor replace one, whatever text names it.
        texts = [text for text in (*roots, *sorted(own)) if is_local(text) or is_store_url(text)]
        return tuple(path for path in map(path_here, texts) if path is not None)

    def stored_files(self) -> tuple[str, ...]:
        """Return the weight files of base and adapters that are in another storage."""
        own = {ref.file for ref in self.checkpoint.tensors()}
        own.update(*(use.adapter.files for use in self.uses))
        return tuple(sorted(file for file in own if not is_local(file)))


def plan_request(request: Request, watch: Observer) -> Planned:
    """Locate and resolve base and adapters, and plan their merge.

    Raises:
        ChangedError: a file changed while it was read.
        LoraMergeError: there is no plan.
    """
    texts = InputTexts(
        tuple(map(chosen_adapter, request.adapter)),
        request.base,
        request.ignore_file,
        Access(request.token, request.offline, request.stream_base),
    )
    found = join_inputs(texts, _settings(Reading, request), watch)
    policy = _settings(Policy, request)
    plan = make_plan(found.joined, policy)
    doubts = (*found.doubts, *storage_doubts(found.base, found.adapters, found.joined))
    # Prose that may be edited meanwhile, so it is not among the watched inputs.
    cards = tuple(card_facts(place.root) for place in (found.base, *found.adapters))
    issues = (*found.located, *_unused(policy), *doubts, *plan.issues, *card_issues(cards[0], cards[1:]))
    plan = replace(plan, issues=issues)
    return Planned(request, plan, found.joined, found.base, found.adapters, found.inputs, cards)


def _settings(kind: type[Settings], request: Request) -> Settings:
    """Return the fields of a request that a `Reading` or a `Policy` has."""
    return kind(**{field.name: getattr(request, field.name) for field in fields(kind)})


def join_inputs(texts: InputTexts, reading: Reading, watch: Observer) -> JoinedInputs:
    """Locate and read a base and adapters, and join them. What does not fit is among the issues of the join.

    What small files alone show is refused before anything large is fetched.

    Raises:
        ChangedError: a file changed while it was read.
        LoraMergeError: one of them cannot be found or read.
    """
    with watching() as seen, errors_by_url():
        found = _join_inputs(texts, reading, watch)
    return replace(found, inputs=without_copies(seen.inputs()))


def _join_inputs(texts: InputTexts, reading: Reading, watch: Observer) -> JoinedInputs:
    access = texts.access
    named_base = None if texts.base is None else (find(texts.base, "base"), texts.base)
    found = [(find(text, "adapter"), text) for text, _ in texts.adapters]
    if named_base is not None:
        # Swapped inputs would otherwise fail with an error about files that are missing.
        for adapter_found, _ in found:
            check_not_swapped(named_base[0], adapter_found)
    places = tuple(locate_adapter(*one, access, watch, texts.ignore_file) for one in found)
    check_ignored(places, texts.ignore_file)
    if named_base is not None:
        base_place = locate_base(*named_base, access, watch)
    else:
        base_place = locate_named_base(places[0], access, watch)
    is_remote = base_place.is_remote
    # What small files show is refused before anything large is fetched.
    if is_remote:
        raise_errors(refusals(read_config(base_place.root / CONFIG_FILE), settings_files(base_place.root)))
    apart = [place for place in places if place.root != base_place.root]  # else its weights are the base's
    raise_errors([issue for place in apart for issue in place.issues])
    adapters = [by_url(resolve_adapter(place.whole(), place.ignored)) for place in places]
    if is_remote and len(apart) == len(places):
        raise_errors([issue for adapter in adapters for issue in adapter.issues])
    base = resolve_base(base_place.whole(), base_place.prefix)
    # Both need the base: whose files are in the folder, and what its family is called in mlx-lm.
    adapters = [in_names_of(beside_base(adapter, base), base.config) for adapter in adapters]
    weights = [weight for _, weight in texts.adapters]
    uses = tuple(
        by_url(_use(adapter, weight, base)) for adapter, weight in zip(adapters, weights, strict=True)
    )
    # Reads whole embeddings, so only where a tie may matter.
    twins = equal_embeddings(base, adapters) if any(map(touches_embeddings, uses)) else frozenset()
    other = other_base(base_place, places, [adapter.config for adapter in adapters])
    return JoinedInputs(
        joined=join(base, uses, reading, twins),
        base=base_place,
        adapters=places,
        located=tuple(issue for place in (base_place, *places) for issue in place.issues),
        doubts=other or moved_base(base_place, places),
    )


def _unused(policy: Policy) -> list[Issue]:
    """Return a warning for each option that another one leaves without use."""
    found = []
    keeps_all = policy.combine not in {"ties", "dare_linear", "dare_ties"}
    if policy.density != default_of("merge", "density") and keeps_all:
        sentence = (
            f"is {policy.density:g}, and --combine {policy.combine} does not use it: it keeps all of each "
            "change"
        )
        hint = "use --combine ties, dare_linear or dare_ties, or leave --density out"
        found.append(warning("unused-option", "density", sentence, hint))
    if policy.ignore and policy.quantize is None:
        sentence = "lists modules to keep dense, and nothing is quantised"
        found.append(
            warning("unused-option", "ignore", sentence, "add --quantize SCHEME, or leave --ignore out")
        )
    return found


def _use(adapter: Adapter, weight: float, base: Checkpoint) -> AdapterUse:
    """Return an adapter of a merge, with what its files show only beside the base's."""
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


def chosen_adapter(text: str) -> tuple[str, float]:
    """Return the text and the weight of ``PATH:WEIGHT``."""
    # A directory may have a colon and a number in its name.
    return (text, 1.0) if is_directory(user_path(text)) else parse_adapter(text)


def check_strict(issues: Sequence[Issue], *, strict: bool) -> None:
    """Raise the warnings among some issues where ``--strict`` makes them errors.

    Raises:
        PlanError: ``strict`` is set, and there are warnings.
    """
    warnings = [issue for issue in issues if issue.severity == "warning"]
    if strict and warnings:
        raise PlanError(warnings)


def explain(request: Request, names: Sequence[str], *, observer: Observer | None = None) -> tuple[Match, ...]:
    """Return how some modules or parameters were matched, by their names in the adapter or on disk.

    Raises:
        RequestError: a name is unknown.
        LoraMergeError: as for `run`, when there is no plan.
    """
    plan = plan_request(request, observer or Silence()).plan
    check_strict(plan.issues, strict=request.strict)
    matches: list[Match] = []
    for name in names:
        found = matches_of(plan, name)
        if not found:
            near = nearest(plan, name)
            hint = f"did you mean {', '.join(near)}?" if near else f"names are like {example_name(plan)}"
            sentence = f"the adapter and the base have no module or parameter {name}"
            raise RequestError("", 0, "explain", sentence, hint=hint)
        matches += found
    return tuple(matches)
