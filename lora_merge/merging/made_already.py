"""Is a complete output what a merge would make? By its manifest and its listing: of its weights nothing is read."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INDEX_FILE
from lora_merge.core.plan import Copy
from lora_merge.errors import CheckpointError, WriteError
from lora_merge.formats.manifest import parse_manifest
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.formats.stored_versions import versions_of
from lora_merge.merging.hf_checkpoint import side_digest
from lora_merge.requests.recording import record_of
from lora_merge.storage.digests import is_of_file, text_digest
from lora_merge.storage.signs import newer_here

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.manifest import Manifest
    from lora_merge.planning.run import Planned
    from lora_merge.storage.destination import Published, Storage, Wish
    from lora_merge.storage.source import Origin


def finds_whole(wish: Wish, storage: Storage) -> bool:
    """Return True when a run that may continue another one finds a complete output.

    Raises:
        LoraMergeError: the storage cannot be asked.
    """
    return wish.resume and not wish.overwrite and storage.is_complete(wish)


def is_made_already(planned: Planned, wish: Wish, storage: Storage) -> bool:
    """Return True when a run that may continue another one finds the whole output, made from the same.

    Raises:
        WriteError: the output is complete, and made from something else.
        LoraMergeError: the storage cannot be asked.
    """
    if not finds_whole(wish, storage):
        return False
    fault = other_than(planned, storage.published(wish))
    if fault:
        sentence = (
            f"{wish.out}: already exists and is complete, but this run may make something else: {fault}"
        )
        hint = (
            f"choose another --out, or pass --overwrite to replace it; `lora-merge verify {shlex.quote(wish.out)}` "
            "checks what is there"
        )
        raise WriteError(sentence, hint=hint)
    return True


def other_than(planned: Planned, found: Published) -> str:
    """Return how a complete output differs from what a merge would make now; empty where nothing tells that it does.

    Args:
        planned: the merge.
        found: the output.
    """
    try:
        table = json.loads(found.manifest)
        manifest = parse_manifest(table)
        return next(_differences(planned, manifest, table, found), "")
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{MANIFEST_FILE} is damaged"
    except CheckpointError as exc:
        return str(exc)


def _differences(
    planned: Planned, manifest: Manifest, table: Mapping[str, Any], found: Published
) -> Iterator[str]:
    yield from other_merge(planned, manifest, table)
    yield from _other_files(planned.plan, manifest, found)
    yield from _other_base(planned, manifest, found.made)


def other_merge(planned: Planned, manifest: Manifest, table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between a merge and the one that a manifest records.

    Args:
        planned: the merge.
        manifest: the manifest.
        table: the same as JSON, for fields that `Manifest` does not have.
    """
    base = manifest.base
    if base.path not in {planned.base.text, planned.plan.base}:
        yield f"it was made from the base {base.path}"
    if base.commit != _commit(planned.base.origin):
        yield f"it was made from the base at commit {base.commit}"
    wanted = [
        (use.adapter.digest, dict(use.adapter.config), use.weight, _commit(place.origin))
        for use, place in zip(planned.uses, planned.adapters, strict=True)
    ]
    found = [
        (one.get("digest"), one.get("config"), one.get("weight"), one.get("commit"))
        for one in table["adapters"]
    ]
    if found != wanted:
        yield "it was made from other adapters, or the adapters have changed"
    options, then = record_of(planned.request), manifest.options
    if then != options:
        names = sorted(name for name in {*then, *options} if then.get(name) != options.get(name))
        yield f"it was made with other options ({', '.join(names)})"
    slots = {
        slot.name: (step.action, slot.file, slot.dtype, slot.shape)
        for step in planned.plan.steps
        for slot in step.slots
    }
    recorded = {name: (one.action, one.file, one.dtype, one.shape) for name, one in manifest.tensors.items()}
    if recorded != slots:
        yield "base and adapters would now give other tensors (names, dtypes or shapes)"


def side_digests(plan: MergePlan) -> dict[str, str]:
    """Return the digest that each file has that the plan puts beside the weights, by its name.

    Raises:
        CheckpointError: one cannot be read.
    """
    wanted = {side.name: side_digest(plan, side) for side in plan.side_files}
    return wanted | ({INDEX_FILE: text_digest(plan.index)} if plan.index else {})


def _other_files(plan: MergePlan, manifest: Manifest, found: Published) -> Iterator[str]:
    """Yield files that are missing or have another size, and small ones that would have another content."""
    for file in plan.files:
        nbytes = found.sizes.get(file.name)
        if nbytes != file.nbytes:
            what = "is missing" if nbytes is None else f"has {nbytes} bytes, expected {file.nbytes}"
            yield f"{file.name} {what}"
    for name, digest in side_digests(plan).items():
        recorded = manifest.side_files.get(name)
        if recorded is None or recorded.digest != digest:
            yield f"{name} would have another content now"
        if name not in found.sizes:
            yield f"{name} is missing"


def _other_base(planned: Planned, manifest: Manifest, made: int) -> Iterator[str]:
    """Yield weight files of the base that have changed since, by their versions, or by their times and a small tensor."""
    then, now = manifest.base.versions, versions_of(planned.checkpoint, planned.inputs)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"the base has changed: {name} has another version in its store"
    # Of a repo the commit says it.
    if now or planned.base.origin is not None:
        return
    for file in newer_here((ref.file for step in planned.plan.steps for ref in step.reads.values()), made):
        yield f"{file}, of the base, is newer than the output"
    for ref, digest in _smallest_copies(planned.plan, manifest):
        if tensor_digest(ref) != digest:
            yield f"the base has changed: {ref.name} in {ref.file} differs from what was merged"


def _smallest_copies(plan: MergePlan, manifest: Manifest) -> list[tuple[TensorRef, str]]:
    """Return the smallest tensor of each file of the base that was copied as it is, with the digest that was recorded."""
    found: dict[str, tuple[TensorRef, str]] = {}
    for step in plan.steps:
        if not isinstance(step.op, Copy):
            continue
        source, digest = step.op.source, manifest.tensors[step.main.name].digest
        if not is_of_file(digest) and (
            source.file not in found or source.nbytes < found[source.file][0].nbytes
        ):
            found[source.file] = source, digest
    return list(found.values())


def _commit(origin: Origin | None) -> str | None:
    return origin.commit if origin is not None else None
