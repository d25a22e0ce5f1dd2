"""Checks whether an existing output is up to date: by its manifest, its own bytes and its inputs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge import executors
from lora_merge.batches.remerging import Nowhere, Remerging
from lora_merge.core.checkpoint import INDEX_FILE
from lora_merge.core.identity import Inputs
from lora_merge.core.plan import Copy, Merge, Step
from lora_merge.core.report import Issue, warning
from lora_merge.core.work import Plain, largest_first
from lora_merge.errors import CheckpointError
from lora_merge.formats.manifest import Manifest, parse_manifest
from lora_merge.formats.model_card import card_text
from lora_merge.formats.repo_files import CONVERSION_MANIFEST
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE
from lora_merge.formats.stored_versions import versions_of
from lora_merge.merging.device_choice import chosen
from lora_merge.merging.made_already import other_merge, side_digests
from lora_merge.merging.made_from import provenance_of
from lora_merge.merging.worker import MergeSpec, NoDeviceError
from lora_merge.runtime import machine
from lora_merge.storage.digests import file_digest, text_digest
from lora_merge.storage.objects.urls import path_here
from lora_merge.storage.output_files import has_header
from lora_merge.storage.signs import changed_at, has_hole, modified_at, newer_here, pages, sampled
from lora_merge.storage.small_files import read_json, read_text
from lora_merge.storage.source import is_hub_text
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lora_merge.conversion.job import Conversion
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.work import WorkerSpec
    from lora_merge.planning.run import Planned


WORTH_A_NOTE_BYTES = 64 << 20
"""If at least this much was read or recomputed, the manifest's time is set, so that the next check is quick."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether an output exists, and whether it is up to date."""

    is_there: bool
    """True if the output's path has a manifest."""

    fault: str = ""
    """Why it is not up to date: the file, and what is wrong with it. Empty if it is."""

    notes: tuple[Issue, ...] = ()
    """Notes about an output that is up to date."""

    @property
    def is_current(self) -> bool:
        """True if the output exists and is up to date."""
        return self.is_there and not self.fault


def standing(planned: Planned, out: Path, *, remember: bool = True) -> Standing:
    """Return whether an output is what a merge would make now.

    Small files and adapters are compared by digests; weight files by their sizes, headers and some of their pages. A
    weight file is read as a whole if its time or a hole in it makes it doubtful, or at the level ``full``. If files of
    the base may have changed, everything made from them is computed again, without writing it. So times decide what is
    looked at, and content decides the result.

    Args:
        planned: the merge.
        out: the output's path.
        remember: set the manifest's time if much was read, so that the same times cause no doubt again.
    """
    try:
        table = _table(out / MANIFEST_FILE)
        if table is None:
            return Standing(is_there=False)
        manifest = parse_manifest(table)
    except OSError:
        # Not readable, or a name that is too long: writing will report that.
        return Standing(is_there=False)
    except (CheckpointError, ValueError, RecursionError):
        return Standing(is_there=True, fault=f"{MANIFEST_FILE}: is damaged")
    looked = _Looked(planned, out, manifest, table)
    try:
        fault = next(looked.faults(), "")
    except (CheckpointError, OSError) as exc:
        fault = str(exc)
    if remember and not fault:
        looked.remember()
    return Standing(is_there=True, fault=fault, notes=() if fault else tuple(looked.notes()))


class _Looked:
    """The check of one output.

    Args:
        planned: the merge that would make it.
        out: where it is.
        manifest: the parsed manifest.
        table: the manifest as JSON, for fields that `Manifest` does not have.
    """

    def __init__(self, planned: Planned, out: Path, manifest: Manifest, table: Mapping[str, Any]) -> None:
        self._planned, self._plan, self._out = planned, planned.plan, out
        self._manifest, self._table = manifest, table
        self._made = changed = modified_at(out / MANIFEST_FILE)
        self._newest = changed
        self._read_bytes = 0

    def faults(self) -> Iterator[str]:
        """Yield the reasons why the output is not up to date, the cheapest to find first."""
        yield from other_merge(self._planned, self._manifest, self._table)
        yield from self._missing()
        yield from self._small_files()
        yield from self._headers()
        yield from self._weights()
        yield from self._inputs()

    def _missing(self) -> Iterator[str]:
        """Yield files that are missing."""
        plan = self._plan
        names = [file.name for file in plan.files] + [file.name for file in plan.side_files]
        for name in (*names, *([INDEX_FILE] if plan.index else []), CARD_FILE):
            if not (self._out / name).is_file():
                yield f"{name}: is missing"

    def _small_files(self) -> Iterator[str]:
        """Yield files beside the weights that are damaged, or would differ now."""
        recorded, wanted = self._manifest.side_files, side_digests(self._plan)
        for name, digest in wanted.items():
            if name not in recorded or recorded[name].digest != digest:
                yield f"{name}: would have another content now"
            if file_digest(self._out / name) != digest:
                yield f"{name}: has changed since it was written"
        for name in recorded.keys() - wanted.keys() - {CARD_FILE}:
            yield f"{name}: is no longer part of the output"
        # A card may be edited. One that is empty, has zero bytes or is cut short is damaged.
        text = read_text(self._out / CARD_FILE)
        if not text.strip() or "\0" in text or (text != self._card() and self._card().startswith(text)):
            yield f"{CARD_FILE}: is damaged"

    def notes(self) -> Iterator[Issue]:
        """Yield notes about an output that is up to date. Its owner may have edited the card."""
        text = read_text(self._out / CARD_FILE)
        is_of_this_version = self._manifest.versions.get("lora-merge") == self._provenance().versions.get(
            "lora-merge"
        )
        recorded = self._manifest.side_files.get(CARD_FILE)
        same = text == self._card() if recorded is None else text_digest(text) == recorded.digest
        if not same and (recorded is not None or is_of_this_version):
            yield warning("edited-card", CARD_FILE, "was edited; the edited file is kept")

    def _provenance(self) -> Any:
        """Return what this merge would be made from and with. Paths are those that the manifest recorded."""
        return replace(
            provenance_of(self._planned, self._manifest.versions),
            base=self._manifest.base.path,
            adapter_paths=tuple(one.path for one in self._manifest.adapters),
            out_name=self._out.name,
        )

    def _card(self) -> str:
        return card_text(self._provenance(), self._plan, self._manifest.deltas())

    def _headers(self) -> Iterator[str]:
        """Yield weight files whose size or header differs from the plan."""
        for file in self._plan.files:
            nbytes = (self._out / file.name).stat().st_size
            if nbytes != file.nbytes:
                yield f"{file.name}: has {nbytes} bytes, expected {file.nbytes}"
            with open_source(self._out / file.name) as source:
                has_its_header = has_header(source, file)
            if not has_its_header:
                yield f"{file.name}: its header has changed since it was written"

    def _weights(self) -> Iterator[str]:
        """Yield tensors that differ from what was written, among those in doubt."""
        is_full = self._planned.request.verify == "full"
        doubtful = {file.name for file in self._plan.files if is_full or self._is_doubtful(file.name)}
        sources = {
            slot.name: step.op.source
            for step in self._plan.steps
            if isinstance(step.op, Copy)
            for slot in step.slots
        }
        slots = [slot for file in self._plan.files for slot in file.slots]
        looked_at = set(sampled(slots))
        # In doubtful files every tensor is read; elsewhere only those whose sampled pages look wrong.
        refs = [
            here
            for slot in slots
            for here in [replace(slot, file=str(self._out / slot.file))]
            if slot.file in doubtful or (slot in looked_at and _looks_wrong(here, sources.get(slot.name)))
        ]
        for ref in self._others(Plain(_digested), refs, lambda ref: self._manifest.tensors[ref.name].digest):
            yield f"{Path(ref.file).relative_to(self._out)}: {ref.name} has changed since it was written"

    def _is_doubtful(self, name: str) -> bool:
        """Return True if a weight file is newer than the output, or has a hole where data should be."""
        return self._is_newer(self._out / name) or has_hole(self._out / name)

    def _is_newer(self, path: str | Path) -> bool:
        """Return True for a file that may have changed since the output was made."""
        changed = changed_at(path_here(str(path)) or path)
        self._newest = max(self._newest, changed)
        # By the kernel's own time of change, which programs cannot set.
        return changed >= self._made

    def _inputs(self) -> Iterator[str]:
        """Yield tensors that would differ now, among those made from base files that may have changed."""
        of_base = {ref.file for ref in self._planned.checkpoint.tensors()}
        then_stored = self._manifest.base.versions
        now_stored = versions_of(self._planned.checkpoint, self._planned.inputs)
        # A version is of some bytes, so what has the recorded one needs no time.
        same = {name for name, version in now_stored.items() if then_stored.get(name) == version}
        kept = {
            ref.file for file in self._planned.checkpoint.files if file.name in same for ref in file.tensors
        }
        # Files at a commit never change, and another commit was found before.
        newer = {name for name in of_base - kept if not is_hub_text(name) and self._is_newer(name)}
        steps = [step for step in self._plan.steps if newer & _sources(step)]
        then = self._manifest.tensors
        # Copies are compared by the digest of their source. Merged tensors have to be computed again.
        copies = {step.op.source: step for step in steps if isinstance(step.op, Copy)}
        for ref in self._others(
            Plain(_digested), list(copies), lambda ref: then[copies[ref].main.name].digest
        ):
            yield f"the base has changed: {ref.file}: {ref.name} differs from what was merged"
        merges = {step.main: step for step in steps if isinstance(step.op, Merge)}
        if not merges:
            return
        try:
            device = chosen(self._planned.request, self._plan).device
        except NoDeviceError as exc:
            yield f"the base may have changed, which cannot be checked: {exc}"
            return
        remerging = Remerging(MergeSpec((Nowhere(),), Inputs(), device, is_checked=False), merges)
        for slot in self._others(
            remerging,
            list(merges),
            lambda slot: " ".join(then[one.name].digest for one in merges[slot].slots),
        ):
            yield f"the base has changed: {slot.name} would have other values now"

    def _others(
        self,
        spec: WorkerSpec[TensorRef, tuple[TensorRef, str]],
        refs: Sequence[TensorRef],
        wanted: Callable[[TensorRef], str],
    ) -> Iterator[TensorRef]:
        """Yield the tensors whose digest differs from the recorded one."""
        if not refs:
            return
        self._read_bytes += sum(ref.nbytes for ref in refs)
        n = min(2, machine.usable_cores()) if len(refs) > 1 else 1
        for ref, found in executors.pick(n)(spec, largest_first(refs), n):
            if found != wanted(ref):
                yield ref

    def remember(self) -> None:
        """Set the manifest's time after all times that were seen, if the check read much."""
        if self._newest > self._made and self._read_bytes >= WORTH_A_NOTE_BYTES:
            # Without permission to write there, the next check takes as long again.
            with contextlib.suppress(OSError):
                os.utime(self._out / MANIFEST_FILE, ns=(self._newest + 1, self._newest + 1))


def _digested(ref: TensorRef) -> tuple[TensorRef, str]:
    return ref, tensor_digest(ref)


def _looks_wrong(ref: TensorRef, source: TensorRef | None) -> bool:
    """Return True if sampled pages of a tensor differ from its source's or, for a merged one, if a page is all zeros."""
    if source is None or source.nbytes != ref.nbytes:
        return any(page and not any(page) for page in pages(ref))
    return any(one != other for one, other in zip(pages(ref), pages(source), strict=True))


def _sources(step: Step) -> set[str]:
    """Return the files from which a step reads."""
    return {ref.file for ref in step.reads.values()}


def adapter_standing(conversion: Conversion) -> Standing:
    """Return whether an output is what a conversion would make now, by digests of its files and its inputs."""
    try:
        manifest = _table(conversion.out / CONVERSION_MANIFEST)
        fault = "" if manifest is None else next(_conversion_faults(conversion, manifest), "")
    except OSError:
        return Standing(is_there=False)
    except (CheckpointError, ValueError, RecursionError) as exc:
        return Standing(is_there=True, fault=str(exc))
    return Standing(is_there=manifest is not None, fault=fault)


def _conversion_faults(conversion: Conversion, manifest: Mapping[str, Any]) -> Iterator[str]:
    # Through JSON, so that tuples become lists as in the manifest.
    own = json.loads(json.dumps(conversion.provenance))
    for key in own:
        if manifest.get(key) != own[key]:
            yield f"it was made from another {key}" if key != "options" else "it was made with other options"
    recorded = manifest.get("files")
    if not isinstance(recorded, dict):
        yield f"{CONVERSION_MANIFEST}: has no digests of the other files"
        return
    for side in conversion.adapter.side_files:
        if recorded.get(side.name) != file_digest(side.source):
            yield f"{side.name}: would have another content now"
    for name, digest in recorded.items():
        path = conversion.out / name
        if not path.is_file():
            yield f"{name}: is missing"
        elif file_digest(path) != digest:
            yield f"{name}: has changed since it was written"
    # The manifest has a digest of some pages of the base only, so a base file that was written later counts
    # as changed.
    made = modified_at(conversion.out / CONVERSION_MANIFEST)
    of_base = {ref.file for ref in conversion.base.tensors()} if conversion.base is not None else set()
    # Versions of what is in a store were compared above.
    for name in newer_here(of_base, made):
        yield f"the base has changed: {name} is newer than the output"


def _table(path: Path) -> dict[str, Any] | None:
    """Return the content of a manifest; None if there is no such file.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_json(path) if path.exists() else None
