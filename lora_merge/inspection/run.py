"""Inspects an adapter: reads its headers and, with a base, measures how large each change is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING

from lora_merge.conversion import Maker, draft
from lora_merge.conversion.families import added_tokens, base_config, family_of
from lora_merge.conversion.lora import Given, Recipe
from lora_merge.core.plan import Merge, Step
from lora_merge.core.report import Observer, Silence
from lora_merge.core.work import Plain, largest_first
from lora_merge.errors import PlanError, RequestError
from lora_merge.executors import pick
from lora_merge.formats.repo_files import CONVERSION_MANIFEST, TRAINING_ARGUMENTS
from lora_merge.formats.side_files import CARD_FILE
from lora_merge.formats.weights import weight_norms
from lora_merge.inspection import plots
from lora_merge.inspection.describe import Measured, Surroundings, inspection
from lora_merge.merging.changes import change_of, norms_of
from lora_merge.peft_rules.loose_ends import without_base
from lora_merge.planning import Reading, check_fit
from lora_merge.planning.locate import check_ignored, find, locate_adapter
from lora_merge.planning.other_storage import storage_doubts
from lora_merge.planning.resolve import resolve_adapter
from lora_merge.planning.run import InputTexts, check_strict, join_inputs
from lora_merge.quantised import describe
from lora_merge.requests.request import InspectRequest
from lora_merge.runtime.machine import usable_cores
from lora_merge.runtime.shortage import MORE, translate_out_of_memory
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.serving import ENGINES
from lora_merge.storage.hub import Access
from lora_merge.storage.local_copies import local_path
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.small_files import read_json, read_text
from lora_merge.storage.user_paths import user_path

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.report import Issue
    from lora_merge.inspection.facts import Inspection
    from lora_merge.planning import Joined
    from lora_merge.requests.request import InspectRequest

_TAGS = re.compile(r"^(?:tags:\n|- |library_name: )(?P<tag>[\w.-]+)$", re.MULTILINE)
"""Tags in the front matter of a model card, and its library."""


def inspect_adapter(request: InspectRequest, *, observer: Observer | None = None) -> Inspection:
    """Describe an adapter. Writes nothing except a plot, if one is asked for.

    Raises:
        ResolveError: it cannot be found or read.
        RequestError: the plot cannot be drawn.
        WriteError: the plot cannot be written.
    """
    watch = observer or Silence()
    drawing = None if request.plot is None else user_path(request.plot)
    if drawing is not None:
        # A missing package is reported before everything is measured, not after.
        plots.check(drawing)
    if request.stream_base and request.base is None:
        sentence = "needs --base, which names the repo on the Hub"
        raise RequestError("", 0, "stream_base", sentence, hint="add --base ORG/NAME")
    with translate_out_of_memory("inspecting", MORE), errors_by_url():
        access = Access(request.token, request.offline)
        found = find(request.adapter, "adapter")
        place = locate_adapter(found, request.adapter, access, watch, request.ignore_file)
        check_ignored([place], request.ignore_file)
        adapter = by_url(resolve_adapter(place.whole(), place.ignored))
        around = _surroundings(request, adapter)
        issues: tuple[Issue, ...] = (*place.issues, *adapter.issues)
        measured = None
        if request.base is None:
            issues += tuple(without_base(adapter))
        else:
            adapter, measured, issues = _held_against_base(request, adapter, watch)
        check_strict(issues, strict=request.strict)
        engines = tuple(ENGINES) if request.serving is None else (request.serving,)
        inspected = inspection(adapter, around, issues, measured, engines)
    if drawing is not None:
        plots.draw(inspected, drawing)
    return inspected


def _surroundings(request: InspectRequest, adapter: Adapter) -> Surroundings:
    """Read the files around an adapter's tensors: model card, training arguments, manifest of a conversion."""
    root = local_path(adapter.root)
    arguments = next(
        (
            read_json(folder / TRAINING_ARGUMENTS)
            for folder in (root, root.parent)
            if (folder / TRAINING_ARGUMENTS).is_file()
        ),
        {},
    )
    manifest, card = root / CONVERSION_MANIFEST, root / CARD_FILE
    config = base_config(request.base, adapter)
    # The front matter ends at the second line of dashes.
    front = read_text(card).split("\n---", 1)[0] if card.is_file() else ""
    return Surroundings(
        named=request.adapter,
        files=tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())),
        tags=tuple(match["tag"] for match in _TAGS.finditer(front)),
        arguments=arguments,
        manifest=read_json(manifest) if manifest.is_file() else {},
        base=request.base or "",
        options=_options(request),
        family=family_of(config, adapter),
        added_tokens=added_tokens(adapter, config),
    )


def _options(request: InspectRequest) -> str:
    """Return the request's options about the base as a command line has them, quoted for a shell."""
    given = [("--base", request.base), ("--base-is", request.base_is)]
    given += [("--expert-layout", layout) for layout in request.expert_layout]
    given += [("--ignore-file", name) for name in request.ignore_file]
    return "".join(f" {option} {quote(value)}" for option, value in given if value)


def _held_against_base(
    request: InspectRequest, adapter: Adapter, watch: Observer
) -> tuple[Adapter, Measured | None, tuple[Issue, ...]]:
    """Join an adapter with its base and measure its changes. If it does not fit, return the reasons as issues."""
    texts = InputTexts(
        ((request.adapter, 1.0),),
        request.base,
        request.ignore_file,
        Access(request.token, request.offline, request.stream_base),
    )
    reading = Reading(request.base_is, request.expert_layout, allow_svd=True)
    try:
        found = join_inputs(texts, reading, watch)
        check_fit(found.joined)
    except PlanError as exc:
        return adapter, None, exc.issues
    joined = found.joined
    issues = (*found.issues, *storage_doubts(found.base, found.adapters, joined))
    adapter = joined.uses[0].adapter
    return adapter, _Measuring(adapter, joined, watch).run(), issues


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stored tensor to measure, with its size for the progress."""

    step: Step
    nbytes: int


class _Measuring:
    """Measures the norms of an adapter's changes and of the weights.

    For a sum of factors, ‖Δ‖ follows from the factors, and only ‖W‖ has to be read. Any other change is computed tile
    by tile and compared with the weight.
    """

    def __init__(self, adapter: Adapter, joined: Joined, watch: Observer) -> None:
        self._joined, self._watch = joined, watch
        found = draft(adapter, Recipe(), joined)
        changed = {
            _path(delta.target, ())
            for delta in joined.deltas
            if not (delta.facts.has_factors and delta.facts.is_sum)
        }
        self._factored = {
            module.path: module for module in found.modules if not module.kept and module.path not in changed
        }
        self._stacked = tuple(
            module.origin.delta
            for module in found.modules
            if module.form == "experts" and isinstance(module.origin, Given)
        )
        self._weights: dict[str, float] = {}
        self._deltas: dict[str, float] = {}

    def run(self) -> Measured:
        """Return the norms of all modules, with other facts that need the base."""
        maker = Maker(change_of, Recipe(), (), "F32")
        with one_torch_thread():
            for path, module in self._factored.items():
                pair, _ = maker(module)
                self._deltas[path] = pair.norm() ** 2
        pieces = [_Piece(step, step.nbytes) for step in self._joined.steps]
        self._watch.phase("measuring", sum(piece.nbytes for piece in pieces))
        n_workers = min(usable_cores(), 8)
        for found in pick(n_workers)(Plain(self._measure), largest_first(pieces), n_workers):
            for path, weight, delta in found:
                # Squares add up over the tensors in which a module is stored.
                self._weights[path] = self._weights.get(path, 0.0) + weight
                if path not in self._factored:
                    self._deltas[path] = self._deltas.get(path, 0.0) + delta
        norms = {
            path: (self._deltas[path] ** 0.5, self._weights[path] ** 0.5)
            for path in self._weights.keys() & self._deltas.keys()
        }
        return Measured(
            self._joined.modules,
            self._joined.unchanged,
            norms,
            self._shapes(),
            self._storages(),
            _counts(self._joined.base),
            self._stacked,
        )

    def _measure(self, piece: _Piece) -> list[tuple[str, float, float]]:
        """Return ``(path, ‖W‖², ‖Δ‖²)`` for each module that is stored in a tensor, or in a part of it."""
        # Each worker has a core: more threads in each would only wait for each other.
        with one_torch_thread():
            found = self._norms(piece.step)
        self._watch.advance(piece.nbytes)
        return found

    def _norms(self, step: Step) -> list[tuple[str, float, float]]:
        deltas = step.op.deltas if isinstance(step.op, Merge) else ()
        before = self._joined.before(step.name) or (None if step.replaced else step.source)
        targets = dict.fromkeys(_path(delta.target, self._factored) for delta in deltas)
        if before is None or step.replaced or any(path not in self._factored for path in targets):
            is_comparable = before is not None and before.shape == step.shape
            weight, delta = norms_of(step, before) if before and is_comparable else (0.0, 0.0)
            return [(path, weight**2, delta**2) for path in targets or (step.name,)]
        # ‖Δ‖ is known from the factors. Only the weight is read, each part of it once.
        boxes = list({(_path(delta.target, self._factored), delta.region.box) for delta in deltas})
        lengths = weight_norms(before, [at for _, at in boxes])
        return [(path, length**2, 0.0) for (path, _), length in zip(boxes, lengths, strict=True)]

    def _storages(self) -> dict[str, str]:
        """Return path → how the base stores the weight, in words."""
        found: dict[str, str] = {}
        for step in self._joined.steps:
            before = self._joined.before(step.name)
            deltas = step.op.deltas if isinstance(step.op, Merge) else ()
            for target in [delta.target for delta in deltas] or [step.name]:
                if before is not None:
                    found.setdefault(target.removesuffix(".weight"), describe(before.storage))
        return found

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            _path(delta.target, self._factored): step.shape
            for step in self._joined.steps
            if isinstance(step.op, Merge)
            for delta in step.op.deltas
        }


def _counts(base: Checkpoint) -> dict[str, int]:
    """Return how a base stores its weights, in words → how many weights are stored so, quantised ones first."""
    weights = base.weights.values()
    counts = Counter(weight.storage for weight in sorted(weights, key=lambda weight: weight.storage.is_dense))
    found: dict[str, int] = {}
    for storage, count in counts.items():
        words = describe(storage)
        found[words] = found.get(words, 0) + count
    return found


def _path(target: str, factored: Collection[str]) -> str:
    """Return the path under which a parameter is described: the module's, or the parameter's own for stacked experts."""
    return target if target in factored else target.removesuffix(".weight")
