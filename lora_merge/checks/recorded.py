"""Is an output what its own manifest says it was? Asked without base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.report import error, warning
from lora_merge.core.tensor import shape_text
from lora_merge.errors import CheckpointError
from lora_merge.executors.crew import ALONE
from lora_merge.formats.side_files import MAX_SIDE_BYTES
from lora_merge.storage.digests import file_digest, is_of_file
from lora_merge.storage.objects.checksums import file_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.executors.crew import Crew
    from lora_merge.formats.manifest import Manifest, RecordedTensor
    from lora_merge.formats.written_checkpoint import Output


def recorded(
    output: Output, manifest: Manifest, digest: Callable[[TensorRef], str], crew: Crew = ALONE
) -> Iterator[Issue]:
    """Yield an issue for each tensor, and each file around the weights, that is not as the manifest recorded it.

    Args:
        output: the directory as it is now.
        manifest: of the output when it was made.
        digest: returns the digest of a tensor's bytes on the disk.
        crew: the threads that take digests.
    """
    places = {ref.name: name for name, file in output.files.items() for ref in file.tensors}
    tensors = output.tensors()

    def compared(item: tuple[str, RecordedTensor]) -> Iterator[Issue]:
        name, then = item
        ref = tensors.get(name)
        if ref is None:
            yield error("missing-tensor", name, f"is missing, expected in {then.file}")
        elif (ref.dtype, ref.shape) != (then.dtype, then.shape):
            got, wanted = f"{ref.dtype} {shape_text(ref.shape)}", f"{then.dtype} {shape_text(then.shape)}"
            yield error("wrong-tensor", name, f"is {got}, expected {wanted}")
        elif places[name] != then.file:
            yield warning("moved-tensor", name, f"is in {places[name]}, expected in {then.file}")
        # Its whole file is compared below.
        elif is_of_file(then.digest):
            return
        elif (found := digest(ref)) != then.digest:
            yield error(
                "wrong-digest",
                name,
                f"has changed since it was written: digest {found}, expected {then.digest}",
            )

    yield from crew.each(compared, manifest.tensors.items())
    for name in tensors.keys() - manifest.tensors.keys():
        yield error("extra-tensor", name, f"is in {places[name]}, but the manifest does not list it")
    yield from _copied_by_store(output, manifest)
    yield from _files(output, manifest)


def _copied_by_store(output: Output, manifest: Manifest) -> Iterator[Issue]:
    """Yield an issue for each weight file that does not have the checksum that a store has stated of it."""
    stated = {then.file: then.digest for then in manifest.tensors.values() if is_of_file(then.digest)}
    for name, wanted in sorted(stated.items()):
        if name not in output.files:
            continue
        found = file_checksum(output.file_of(name))
        if found is None:
            sentence = "was not compared: the package awscrt, which computes its checksum, is not installed"
            yield warning("not-compared", name, sentence, 'pip install "lora-merge[s3]"')
        elif found != wanted:
            sentence = f"has changed since it was written: checksum {found}, expected {wanted}"
            yield error("wrong-digest", name, sentence)


def _files(output: Output, manifest: Manifest) -> Iterator[Issue]:
    for name, file in manifest.side_files.items():
        if name not in output.names:
            yield error("missing-file", name, "is missing, but the manifest lists it")
            continue
        path = Path(output.root, name)
        try:
            found = file_digest(path, MAX_SIDE_BYTES)
        except CheckpointError as exc:
            yield error("broken-file", name, str(exc))
            continue
        if found != file.digest:
            sentence = f"has changed since it was written: digest {found}, expected {file.digest}"
            yield error("wrong-digest", name, sentence, "ignore this if you changed the file on purpose")
