"""locate → resolve → plan → merge → verify → publish, on one page. The composition root.

Only this module knows every stage; the stages do not know each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.adapter import AdapterUse
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.explanation import Match, matches_of, nearest
from lora_merge.core.plan import Copy, MergePlan, Step
from lora_merge.core.provenance import Provenance
from lora_merge.core.report import (
    NOT_VERIFIED,
    Issue,
    Observer,
    Report,
    Silence,
    Verdict,
    survival_issues,
    warning,
)
from lora_merge.core.request import Request, parse_adapter, parse_fields
from lora_merge.errors import PlanError, RequestError, VerifyError, WriteError
from lora_merge.io import staging
from lora_merge.io.files import read_json
from lora_merge.io.hub import Access
from lora_merge.locate import Place, find, locate_adapter, locate_base, locate_named_base, moved_base
from lora_merge.merge import Merger, one_torch_thread, pick_device, torch_loading
from lora_merge.plan import make_plan, quantised_config, raise_errors, touches_embeddings
from lora_merge.resolve import (
    equal_embeddings,
    own_side_files,
    resolve_adapter,
    resolve_base,
    unchanged_parameters,
)
from lora_merge.verify import verify as check_output
from lora_merge.writers import HfCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Summary
    from lora_merge.core.request import BaseIs, CombineMethod, OutputDtype, VerifyLevel
    from lora_merge.core.tensor import Survival, TensorRecord

AdapterPaths = str | PathLike[str] | Sequence[str | PathLike[str]]
"""One adapter or several, as `merge` takes them."""


def merge(  # noqa: PLR0913 - the options of the command, each by its name
    *,
    adapter: AdapterPaths,
    out: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
    dtype: OutputDtype | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    verify: VerifyLevel = "sample",
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Merge an adapter into a base and write a checkpoint that loads without LoRA support.

    Args:
        adapter: adapter directory or repo (``org/name``, ``org/name/folder@revision``, ``ms://org/name``), or
            several; each may have ``:WEIGHT`` behind it.
        out: directory to create.
        base: base checkpoint directory or repo; default: the adapter's ``base_model_name_or_path``.
        base_is: what the base is to an adapter whose initialisation changed it (PiSSA, OLoRA, CorDA, LoftQ,
            LoRA-GA): the model as published, or what that left of it.
        expert_layout: what cannot be seen of stacked experts: ``out-in`` or ``in-out``, how the base stores a
            square one in the adapter's terms; ``unsloth``, B packed expert by expert.
        combine: how the changes of several adapters become one.
        density: share of the values that ``ties`` and ``dare`` keep, above 0 and at most 1.
        seed: of what ``dare`` drops at random.
        allow_untie: untie the embeddings even of a family that engines tie whatever its config says.
        allow_svd: merge methods that decompose the base anew (OSF, PSOFT, AdaMSS).
        dtype: storage of the output; default: the base's, tensor by tensor.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: worker threads; default: the number of usable cores.
        max_shard_size: for example ``"5GB"``; default: the base's own shards.
        overwrite: replace an existing output, once the new one is whole.
        verify: how much of the output to check before it gets its name.
        strict: treat warnings as errors.
        token: for private and gated repos of the Hub; default: ``HF_TOKEN``, or the login.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: with a sentence and a ``hint``; nothing stands under ``out`` then, but what stood
            there before.
    """
    request = _request(
        adapter=adapter, out=str(out), base=base, base_is=base_is, expert_layout=expert_layout, combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, dtype=dtype, device=device,
        workers=workers, max_shard_size=max_shard_size, overwrite=overwrite, verify=verify, strict=strict,
        token=token, offline=offline,
    )  # fmt: skip
    return run(request, observer=observer)


def plan(  # noqa: PLR0913 - as `merge`
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
    dtype: OutputDtype | None = None,
    max_shard_size: str | int | None = None,
    token: str | None = None,
    offline: bool = False,
) -> MergePlan:
    """Return what `merge` would read, compute and write; writes nothing. The arguments are those of `merge`.

    Raises:
        ResolveError: base or adapter cannot be found or read.
        PlanError: they do not fit.
    """
    request = _request(
        adapter=adapter, out="", base=base, base_is=base_is, expert_layout=expert_layout, combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, dtype=dtype,
        max_shard_size=max_shard_size, token=token, offline=offline,
    )  # fmt: skip
    return _plan(request, Silence()).plan


def run(request: Request, *, dry_run: bool = False, observer: Observer | None = None) -> Report:
    """Carry out one request.

    Args:
        request: what to merge.
        dry_run: stop after planning; nothing is written, and no output needs to be named.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: see `lora_merge.errors`. Nothing stands under the output's name then, but what
            stood there before.
    """
    clock = _Clock()
    n_workers = request.workers or usable_cores()
    out = _absolute(request.out)
    watch = observer or Silence()
    with clock("plan"):
        planned = _plan(request, watch)
        plan = planned.plan
        _check_strict(request, plan.issues)
        inputs = (Path(plan.base), *(Path(root) for root in plan.adapters))
        if request.out or not dry_run:
            staging.check_replaceable(out, overwrite=request.overwrite, inputs=inputs)
        summary = plan.summary(n_workers, _free_bytes(out))
        shortage = _shortage(out, summary)
    if shortage and not dry_run:
        raise WriteError(str(shortage))
    verdict = NOT_VERIFIED
    survival: dict[str, Survival] = {}
    drowned: tuple[Issue, ...] = ()
    if not dry_run:
        work = _Work(request, planned, n_workers, watch, clock)
        with staging.staging(out) as staged:
            verdict, survival = work.write(staged)
            drowned = survival_issues(survival)
            _check_strict(request, drowned)
            with clock("publish"):
                work.watch.phase("flushing", 0)
                staging.publish(staged, out)
    issues = (*plan.issues, *([shortage] if shortage else []), *verdict.notes, *drowned)
    return Report(
        plan.base,
        request.adapter,
        str(out) if request.out else "",
        dry_run,
        summary,
        issues,
        verdict,
        survival,
        clock.seconds,
    )


def explain(request: Request, names: Sequence[str], *, observer: Observer | None = None) -> tuple[Match, ...]:
    """Return how some modules or parameters were matched, by their names in the adapter or on disk.

    Raises:
        RequestError: nothing answers to a name.
        LoraMergeError: as for `run`, when there is no plan.
    """
    plan = _plan(request, observer or Silence()).plan
    _check_strict(request, plan.issues)
    matches: list[Match] = []
    for name in names:
        found = matches_of(plan, name)
        if not found:
            near = ", ".join(nearest(plan, name))
            sentence = f"{name} is no module or parameter of the adapter or the base"
            raise RequestError("", 0, "explain", sentence, hint=f"nearest: {near}" if near else "")
        matches += found
    return tuple(matches)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan, and what it was made from."""

    plan: MergePlan
    uses: tuple[AdapterUse, ...]
    base: Place
    adapters: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """The part of a run that writes."""

    request: Request
    planned: _Planned
    n_workers: int
    watch: Observer
    clock: _Clock

    @property
    def plan(self) -> MergePlan:
        """Return the plan."""
        return self.planned.plan

    def write(self, staged: Path) -> tuple[Verdict, dict[str, Survival]]:
        """Fill the staging directory; return what its verification says, and what became of each delta.

        Raises:
            VerifyError: it says no.
        """
        writer = HfCheckpoint(staged)
        records = self._fill(writer)
        writer.seal(self.plan, records, _provenance(self.request, self.planned))
        survival = {record.name: record.survival for record in records if record.survival}
        if self.request.verify == "none":
            return NOT_VERIFIED, survival
        with self.clock("verify"), one_torch_thread():
            self.watch.phase("verifying", 0)
            verdict = check_output(self.plan, staged, records, self.request.verify)
        if not verdict.ok:
            raise VerifyError(verdict)
        return verdict, survival

    def _fill(self, writer: HfCheckpoint) -> list[TensorRecord]:
        """Carry out every step and return the records: copies while torch loads, then the rest."""
        do = Merger(writer, _device(self.request.device))
        copies = [step for step in self.plan.steps if isinstance(step.op, Copy)]
        others = [step for step in self.plan.steps if not isinstance(step.op, Copy)]
        with self.clock("copy"), torch_loading():
            writer.reserve(self.plan)
            records = self._run("copying", do, copies)
        with self.clock("merge"), one_torch_thread():
            return records + self._run("merging", do, others)

    def _run(self, phase: str, do: Merger, steps: list[Step]) -> list[TensorRecord]:
        """Carry out steps and return their records."""
        self.watch.phase(phase, sum(step.nbytes for step in steps))
        records = []
        for record in executors.pick(self.n_workers)(do, steps, self.n_workers):
            records.append(record)
            self.watch.advance(record.nbytes)
            self.watch.done(record.name)
        return records


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(request: Request, watch: Observer) -> _Planned:
    """Locate and resolve base and adapters, and plan their merge.

    What small files alone show is refused before anything large is fetched.
    """
    access = Access(request.token, request.offline)
    chosen = [_chosen(text) for text in request.adapter]
    named_base = None if request.base is None else (find(request.base, "base"), request.base)
    found = [(find(text, "adapter"), text) for text, _ in chosen]
    places = tuple(locate_adapter(*one, access, watch) for one in found)
    if named_base is not None:
        base_place = locate_base(*named_base, access, watch)
    else:
        base_place = locate_named_base(places[0], access, watch)
    is_remote = base_place.repo is not None
    if is_remote:
        raise_errors(quantised_config(read_json(base_place.root / CONFIG_FILE)))
    adapters = [resolve_adapter(place.whole()) for place in places]
    if is_remote:
        raise_errors([issue for adapter in adapters for issue in adapter.issues])
    base = resolve_base(base_place.whole())
    uses = tuple(
        AdapterUse(
            adapter,
            weight,
            own_side_files=frozenset(own_side_files(adapter, base)),
            unchanged=unchanged_parameters(adapter, base),
        )
        for adapter, (_, weight) in zip(adapters, chosen, strict=True)
    )
    twins = equal_embeddings(base, adapters) if any(map(touches_embeddings, uses)) else frozenset()
    plan = make_plan(base, uses, request, twins)
    located = [issue for place in (base_place, *places) for issue in place.issues]
    issues = (*located, *moved_base(base_place, places), *plan.issues)
    return _Planned(replace(plan, issues=issues), uses, base_place, places)


def _chosen(text: str) -> tuple[str, float]:
    """Return the place and the weight of an adapter; a directory of the whole name wins."""
    return (text, 1.0) if Path(text).expanduser().is_dir() else parse_adapter(text)


def _request(
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None,
    expert_layout: str | Sequence[str],
    **fields: Any,
) -> Request:
    """Return the request of a call, its values parsed."""
    words = (expert_layout,) if isinstance(expert_layout, str) else tuple(expert_layout)
    given = {
        "adapter": _texts(adapter), "base": None if base is None else str(base), "expert_layout": words, **fields
    }  # fmt: skip
    return Request(**parse_fields(given))


def _texts(adapter: AdapterPaths) -> list[str]:
    """Return the adapters of a call as a command line would name them."""
    return [str(adapter)] if isinstance(adapter, str | PathLike) else [str(path) for path in adapter]


def _absolute(out: str) -> Path:
    """Return the absolute path of an output; a link under its own name stays one."""
    path = Path(out).expanduser().absolute()
    return path.parent.resolve() / path.name


def _check_strict(request: Request, issues: Sequence[Issue]) -> None:
    warnings = [issue for issue in issues if issue.severity == "warning"]
    if request.strict and warnings:
        raise PlanError(warnings)


def _device(wanted: str) -> str:
    try:
        return pick_device(wanted)
    except ValueError as exc:
        raise RequestError("", 0, "device", str(exc), hint="use --device cpu") from exc


def _provenance(request: Request, planned: _Planned) -> Provenance:
    import platform

    import numpy as np
    import torch

    return Provenance(
        base=planned.base.text if request.base or planned.base.origin else planned.plan.base,
        adapters=tuple(use.adapter for use in planned.uses),
        adapter_paths=tuple(place.text for place in planned.adapters),
        base_origin=planned.base.origin,
        adapter_origins=tuple(place.origin for place in planned.adapters),
        out_name=Path(request.out).name,
        options=_options(request),
        versions={
            "lora-merge": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def _options(request: Request) -> dict[str, object]:
    """Return the options that shape the output, for its manifest."""
    options: dict[str, object] = {
        "dtype": request.dtype,
        "max_shard_size": request.max_shard_size,
        "device": request.device,
        "base_is": request.base_is,
    }
    if request.expert_layout:
        options["expert_layout"] = list(request.expert_layout)
    if request.combine != "linear":
        options |= {"combine": request.combine, "density": request.density, "seed": request.seed}
    return options


def _free_bytes(out: Path) -> int:
    """Return the free bytes of the filesystem that the output will be on, stale staging counted free."""
    import shutil

    existing = next(path for path in (out, *out.parents) if path.exists())
    return shutil.disk_usage(existing).free + staging.stale_bytes(out)


def _shortage(out: Path, summary: Summary) -> Issue | None:
    """Return an issue when the disk is too small for the output."""
    needed, free = summary.disk_needed_bytes, summary.disk_free_bytes
    if needed <= free:
        return None
    sentence = f"needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk"
    return warning("disk", str(out), sentence, "free some, or choose another --out")


class _Clock:
    """Wall seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.perf_counter() - start, 4)
