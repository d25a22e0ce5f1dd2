"""Does the directory hold exactly the files and tensors that the plan promised?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import INDEX_FILE
from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE
from lora_merge.storage.digests import same_bytes
from lora_merge.storage.output_files import has_header
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue
    from lora_merge.core.shards import OutputFile
    from lora_merge.formats.written_checkpoint import Output


def structure(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each file or tensor that is missing, unplanned, or different from the plan."""
    plan, root, output = evidence.plan, evidence.root, evidence.output
    wanted = {file.name for file in plan.files} | {file.name for file in plan.side_files}
    wanted |= {CARD_FILE, MANIFEST_FILE} | ({INDEX_FILE} if plan.index else set())
    found = output.names
    for name in sorted(wanted - found):
        yield error("missing-file", name, "is missing, but the plan has it")
    for name in sorted(found - wanted):
        yield error("extra-file", name, "exists, but the plan does not have it")
    for file in plan.files:
        if file.name in found:
            yield from _compare_file(output, file, evidence.file_of(file.name))
    for side_file in plan.side_files:
        patched = plan.config_patch.changes(side_file.name)
        if side_file.name in found and not patched:
            target = root / side_file.name
            if not same_bytes(side_file.source, target):
                yield error("side-file", side_file.name, f"differs from {side_file.source}")
    if plan.index and INDEX_FILE in found:
        yield from _compare_index(output, plan.files)


def _compare_file(output: Output, file: OutputFile, place: str) -> Iterator[Issue]:
    """Yield an issue for each tensor of a file that is not as planned: name, dtype, shape, place. The header must be
    equal byte by byte.

    Args:
        output: what was found.
        file: as planned.
        place: the text that names it.
    """
    if file.name not in output.files:
        yield error("broken-file", file.name, output.broken.get(file.name, "is not a weight file"))
        return
    found = {ref.name: ref for ref in output.files[file.name].tensors}
    for slot in file.slots:
        ref = found.pop(slot.name, None)
        if ref is None:
            yield error("missing-tensor", slot.name, f"is missing, expected in {file.name}")
        elif (ref.dtype, ref.shape, ref.start) != (slot.dtype, slot.shape, slot.start):
            got = f"{ref.dtype} {shape_text(ref.shape)} at byte {ref.start}"
            wanted = f"{slot.dtype} {shape_text(slot.shape)} at byte {slot.start}"
            yield error("wrong-tensor", slot.name, f"is {got}, expected {wanted}")
    for name in found:
        yield error("extra-tensor", name, f"is in {file.name}, but the plan does not have it")
    # Equal tensors do not suffice: metadata and padding of the header are promised, too.
    with open_source(place) as source:
        has_its_header = has_header(source, file)
    if not has_its_header:
        yield error("wrong-header", file.name, "its header is not byte for byte as planned")


def _compare_index(output: Output, files: tuple[OutputFile, ...]) -> Iterator[Issue]:
    """Yield an issue where the index does not list the tensors as planned, or counts their bytes wrongly."""
    index = output.index
    if index is None:
        yield error("wrong-index", INDEX_FILE, output.broken[INDEX_FILE])
        return
    wanted = {slot.name: file.name for file in files for slot in file.slots}
    total = sum(slot.nbytes for file in files for slot in file.slots)
    if index.get("weight_map") != wanted:
        yield error("wrong-index", INDEX_FILE, "does not map every tensor to its file")
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if size != total:
        yield error("wrong-index", INDEX_FILE, f"total_size is {size}, expected {total}")
