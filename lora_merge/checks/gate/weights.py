"""Do the weight files and their index agree?"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, SAFETENSORS_FILE
from lora_merge.core.report import error, warning
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output

_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.bin.index.json", "consolidated*.pth", "consolidated*.pt")
"""Weights that some engines would read instead of safetensors, or in addition."""


def weights(output: Output) -> Iterator[Issue]:
    """Yield an issue for each fault of the weight files, of their index, and for other weights beside them."""
    if not output.files and not output.broken:
        hint = "the output is incomplete; merge again"
        yield error("no-weights", output.root, "holds no safetensors file", hint)
        return
    for name, sentence in output.broken.items():
        if name != CONFIG_FILE:  # reported by the rule for that file
            yield error("broken-file", name, sentence, "merge again, or restore the file from a copy")
    for name, place in output.outside.items():
        sentence = f"is a link to {place}, outside the directory: a copy of the directory would lack the file"
        yield warning("outside", name, sentence, "replace the link by the file: cp -L")
    if INDEX_FILE in output.names:
        yield from _indexed(output)
    else:
        yield from _alone(output)
    for name in sorted(output.names):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OTHER_WEIGHTS):
            yield _stale(name, "the model is in safetensors")


def _alone(output: Output) -> Iterator[Issue]:
    """Yield an issue for each fault of weights without an index."""
    for name in sorted(output.files):
        if name == SAFETENSORS_FILE or "/" in name:
            continue
        if SAFETENSORS_FILE in output.names:
            yield _stale(name, f"without an index, the model is in {SAFETENSORS_FILE} alone")
        else:
            sentence = f"is not named by an index, expected {INDEX_FILE}, or a single {SAFETENSORS_FILE}"
            yield error("no-index", name, sentence, "the output is incomplete; merge again")


def _indexed(output: Output) -> Iterator[Issue]:
    """Yield an issue for each fault of weights with an index."""
    if output.index is None:
        return
    listed = output.index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        yield error("wrong-index", INDEX_FILE, f"weight_map is {quoted(listed)}, expected tensor → file")
        return
    for name, file in listed.items():
        if not isinstance(file, str):
            yield error("wrong-index", name, f"is mapped to {quoted(file)}, expected a file name")
    listed = {name: file for name, file in listed.items() if isinstance(file, str)}
    files = set(listed.values())
    for name in sorted(files - output.names):
        yield error("missing-file", name, "is named by the index, but is missing")
    # Engines differ in whether they read a file that the index does not name.
    for name in sorted(set(output.files) - files):
        yield _stale(name, "the index does not name it")
    stored: dict[str, str] = {}
    for name, file in output.files.items():
        for ref in file.tensors if name in files else ():
            if ref.name in stored:
                yield error(
                    "stored-twice", ref.name, f"is in {stored[ref.name]} and in {name}, expected once"
                )
            stored[ref.name] = name
    yield from _disagreements(output, listed, stored)


def _disagreements(output: Output, listed: dict[str, str], stored: dict[str, str]) -> Iterator[Issue]:
    """Yield an issue for each tensor that the index and the files disagree about, and for a wrong total."""
    for name, file in listed.items():
        if file not in output.files:
            continue  # missing or broken, which is reported for the file
        if name not in stored:
            yield error("missing-tensor", name, f"is in no file; the index names {file}")
        elif stored[name] != file:
            yield error("wrong-index", name, f"is in {stored[name]}, but the index names {file}")
    for name in stored.keys() - listed.keys():
        yield error("unlisted-tensor", name, f"is in {stored[name]}, but the index does not name it")
    metadata = (output.index or {}).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(
        ref.nbytes for name, file in output.files.items() if name in stored.values() for ref in file.tensors
    )
    if size is not None and size != total and set(listed.values()) <= output.files.keys():
        yield error(
            "wrong-index", INDEX_FILE, f"total_size is {size}, expected {total}, the sum of the tensors"
        )


def _stale(name: str, why: str) -> Issue:
    what = "is not part of the model" if name != SAFETENSORS_FILE else "is not the file that the index names"
    sentence = f"{what}: {why}; engines differ in which files they read"
    return error("stale-shard", name, sentence, "remove it if it belongs to an older model")
