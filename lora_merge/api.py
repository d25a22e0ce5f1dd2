"""The public verbs: merge, plan, verify, inspect, convert and extract.

Each checks its arguments and calls the room that does the work. `run`, `prove` and `explain` take requests instead,
for the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from lora_merge.core.report import Observer, Silence
from lora_merge.merging.run import run
from lora_merge.planning.run import explain, plan_request
from lora_merge.requests.parsing import parse_keywords
from lora_merge.requests.request import (
    ConvertRequest,
    ExtractRequest,
    InspectRequest,
    Request,
    VerifyRequest,
)
from lora_merge.verification.verify_existing import prove

if TYPE_CHECKING:
    from os import PathLike
    from typing import Unpack

    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Proof, Report
    from lora_merge.diagnosis.facts import Diagnosis
    from lora_merge.inspection.facts import Inspection
    from lora_merge.reporting.page_file import PageFile
    from lora_merge.requests.inputs import AdapterPaths
    from lora_merge.requests.keywords import (
        ConvertOptions,
        ExtractOptions,
        InspectOptions,
        MergeOptions,
        PlanOptions,
        VerifyOptions,
    )
    from lora_merge.requests.option import Verb

__all__ = [
    "convert",
    "diagnose",
    "explain",
    "extract",
    "inspect",
    "merge",
    "plan",
    "prove",
    "run",
    "verify",
]

Placed = TypeVar("Placed", Request, ConvertRequest, ExtractRequest)


def merge(
    *,
    adapter: AdapterPaths,
    out: str | PathLike[str] | None = None,
    observer: Observer | None = None,
    **options: Unpack[MergeOptions],
) -> Report:
    """Merge adapters into a base, and write a checkpoint that loads without LoRA support.

    Args:
        adapter: adapter directory, repo (``org/name``, ``org/name/folder@revision``, ``ms://org/name``) or URL
            (``s3://bucket/folder``), or several. Each may end in ``:WEIGHT``. A mapping gives weights too: ``{"style": 0.7, "facts": 1}``.
        out: directory to create. It may be left out with ``push_to_hub``.
        observer: hears of phases and bytes.
        **options: those of ``lora-merge merge``, with underscores: ``base``, ``dtype``, ``combine``, ``workers``,
            ``overwrite`` … `MergeOptions` has all of them.

    Raises:
        LoraMergeError: with a sentence and a ``hint``. ``out`` is then as it was before.
    """
    request = _with_place(Request, "merge", {"adapter": adapter, "out": out, **options})
    with _page_file("merge", request) as page:
        return page.show(run(request, observer=observer))


def plan(*, adapter: AdapterPaths, **options: Unpack[PlanOptions]) -> MergePlan:
    """Return what `merge` would read, compute and write. Writes nothing.

    Args:
        adapter: as for `merge`.
        **options: those of `merge` that shape the plan; `PlanOptions` has all of them.

    Raises:
        ResolveError: base or adapter cannot be found or read.
        PlanError: they do not fit.
    """
    request = parse_keywords(Request, "plan", {"adapter": adapter, **options}, {"out": ""})
    return plan_request(request, Silence()).plan


def verify(
    out: str | PathLike[str], *, observer: Observer | None = None, **options: Unpack[VerifyOptions]
) -> Proof:
    """Verify a merged checkpoint, now or years later. `Proof.ok` says whether it passed.

    Args:
        out: its directory.
        observer: hears of phases.
        **options: those of ``lora-merge verify``, with underscores: ``base``, ``adapter``, ``level``, ``forward`` …
            `VerifyOptions` has all of them.

    Raises:
        ResolveError: there is no such output, or a base or adapter named here cannot be read.
        PlanError: a base and adapter named here do not fit, or the model cannot be run.
    """
    request = parse_keywords(VerifyRequest, "verify", {"out": out, **options})
    with _page_file("verify", request) as page:
        return page.show(prove(request, observer=observer))


def inspect(
    adapter: str | PathLike[str], *, observer: Observer | None = None, **options: Unpack[InspectOptions]
) -> Inspection:
    """Describe an adapter from its headers: every module, its origin, and which engines serve it.

    Args:
        adapter: directory, repo or URL.
        observer: hears of phases.
        **options: those of ``lora-merge inspect``, with underscores: ``base`` (then ‖Δ‖ and ‖W‖ of every module are
            measured), ``engine``, ``plot`` … `InspectOptions` has all of them.

    Raises:
        ResolveError: it cannot be found or read.
    """
    from lora_merge.inspection.run import inspect_adapter

    request = parse_keywords(InspectRequest, "inspect", {"adapter": adapter, **options})
    with _page_file("inspect", request) as page:
        return page.show(inspect_adapter(request, observer=observer))


def _page_file(verb: Verb, request: Request | VerifyRequest | InspectRequest) -> PageFile:
    """Return the file of ``report``, which writes a page if the request has one."""
    from dataclasses import fields

    from lora_merge.reporting.command import command_text
    from lora_merge.reporting.page_file import PageFile
    from lora_merge.reporting.subject import subject_of

    values = {field.name: getattr(request, field.name) for field in fields(request)}
    command = command_text(verb, values) if request.report else ""
    return PageFile(request.report, subject_of(verb, request, command))


def _with_place(kind: type[Placed], verb: Verb, keywords: dict[str, Any]) -> Placed:
    """Return the request of a call that needs a directory or a repo.

    Raises:
        RequestError: it has neither, or a value does not parse.
    """
    # Without both, the parser of `out` says what is missing.
    if keywords["out"] is None and keywords.get("push_to_hub"):
        del keywords["out"]
        return parse_keywords(kind, verb, keywords, {"out": ""})
    return parse_keywords(kind, verb, keywords)


def convert(
    adapter: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    observer: Observer | None = None,
    **options: Unpack[ConvertOptions],
) -> ConvertReport:
    """Rewrite an adapter: for an engine, in another format, with another rank.

    Args:
        adapter: directory, repo or URL.
        out: directory to create. It may be left out with ``push_to_hub``.
        observer: hears of phases and bytes.
        **options: those of ``lora-merge convert``, with underscores: ``base``, ``engine`` (``--for``), ``format``,
            ``rank``, ``to_lora`` … `ConvertOptions` has all of them.

    Raises:
        LoraMergeError: with a sentence and a ``hint``. ``out`` is then as it was before.
    """
    from lora_merge.conversion.run import convert_adapter

    request = _with_place(ConvertRequest, "convert", {"adapter": adapter, "out": out, **options})
    return convert_adapter(request, observer=observer)


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    observer: Observer | None = None,
    **options: Unpack[ExtractOptions],
) -> ConvertReport:
    """Write a PEFT LoRA of what a full fine-tune changed in its base.

    Args:
        base: the model before the training: directory, repo or URL.
        tuned: the model after it.
        out: directory to create. It may be left out with ``push_to_hub``.
        observer: hears of phases and bytes.
        **options: those of ``lora-merge extract``, with underscores; ``rank`` or ``energy`` has to be given.
            `ExtractOptions` has all of them.

    Raises:
        LoraMergeError: with a sentence and a ``hint``. ``out`` is then as it was before.
    """
    from lora_merge.conversion.extraction import extract_adapter

    keywords = {"base": base, "tuned": tuned, "out": out, **options}
    return extract_adapter(_with_place(ExtractRequest, "extract", keywords), observer=observer)


def diagnose() -> Diagnosis:
    """Look at this machine, as ``lora-merge doctor`` does: versions, devices, memory, disks, caches and engines.

    Imports torch, and uses no network. What cannot be found out is left out; nothing is raised for it.
    """
    from lora_merge.diagnosis.run import diagnose as look

    return look()
