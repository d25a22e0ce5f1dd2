"""Is an output what its own manifest says it was? Asked without base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.report import error, warning
from lora_merge.core.tensor import shape_text
from lora_merge.errors import CheckpointError
from lora_merge.formats.side_files import MAX_SIDE_BYTES
from lora_merge.storage.digests import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.manifest import Manifest
    from lora_merge.formats.written_checkpoint import Output


def recorded(output: Output, manifest: Manifest, digest: Callable[[TensorRef], str]) -> Iterator[Issue]:
    """Yield an issue for each tensor, and each file around the weights, that is not as the manifest recorded it.

    Args:
        output: the directory as it is now.
        manifest: of the output when it was made.
        digest: returns the digest of a tensor's bytes on the disk.
    """
    places = {ref.name: name for name, file in output.files.items() for ref in file.tensors}
    tensors = output.tensors()
    for name, then in manifest.tensors.items():
        ref = tensors.get(name)
        if ref is None:
            yield error("missing-tensor", name, f"is missing, expected in {then.file}")
        elif (ref.dtype, ref.shape) != (then.dtype, then.shape):
            got, wanted = f"{ref.dtype} {shape_text(ref.shape)}", f"{then.dtype} {shape_text(then.shape)}"
            yield error("wrong-tensor", name, f"is {got}, expected {wanted}")
        elif places[name] != then.file:
            yield warning("moved-tensor", name, f"is in {places[name]}, expected in {then.file}")
        elif (found := digest(ref)) != then.digest:
            yield error(
                "wrong-digest",
                name,
                f"has changed since it was written: digest {found}, expected {then.digest}",
            )
    for name in tensors.keys() - manifest.tensors.keys():
        yield error("extra-tensor", name, f"is in {places[name]}, but the manifest does not list it")
    yield from _files(output, manifest)


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
