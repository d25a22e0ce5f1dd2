"""Files in an adapter's folder that no reader reads, and adapters that their trainer left in shards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.tensor import shape_text
from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.formats.safetensors import same_values
from lora_merge.formats.trainer_files import LOAD_AFTER, described, sharded_state, unread_files
from lora_merge.formats.weight_files import adapter_entries, read_adapter
from lora_merge.storage.sources import is_local

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.tensor import TensorRef


def unread_issues(adapter: Adapter, names: Collection[str], ignored: Collection[str]) -> list[Issue]:
    """Return an issue for each file in an adapter's folder that may hold weights and was not read.

    A second copy of the adapter (``adapter_model.bin`` beside ``adapter_model.safetensors``) is compared with what was
    read, and may stay where it holds the same tensors.

    Args:
        adapter: as it was read.
        names: the files of its folder.
        ignored: those that the user wants left out.
    """
    root = Path(adapter.root)
    ignored = frozenset(ignored)
    read = {os.path.relpath(file, root) for file in adapter.files}
    # An mlx-lm adapter has one file and no second form.
    entries = adapter_entries(names) if adapter.format != "mlx" else {}
    own = next((entry for entry, files in entries.items() if read & {entry, *files}), None)
    issues = [
        note("ignored-file", name, "was left out, because of --ignore-file") for name in sorted(ignored)
    ]
    compared: set[str] = set()
    for entry, files in entries.items():
        if own is not None and entry != own and not (ignored & {entry, *files}):
            compared |= {entry, *files}
            issues.append(_copy_issue(root, own, entry))
    said = {issue.subject for issue in adapter.issues if issue.code == "unread-file"}
    # Side files go into the output, so they are not lost.
    copied = {file.name for file in adapter.side_files}
    left = unread_files(names, read | compared | said, ignored, copied)
    return issues + [error("unread-file", name, *described(name)) for name in left]


def beside_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter without issues about the base's own weights, where both are in one folder."""
    unread = {issue.subject for issue in adapter.issues if issue.code == "unread-file"}
    if not unread or not _is_one_place(adapter.root, base.root):
        return adapter
    read = {os.path.relpath(file, base.root) for file in {ref.file for ref in base.tensors()}}
    issues = [one for one in adapter.issues if one.code != "unread-file" or one.subject not in read]
    return replace(adapter, issues=tuple(issues))


def _is_one_place(one: str, other: str) -> bool:
    """Return True where two texts name one folder; that of a store has one text."""
    if is_local(one) and is_local(other):
        return Path(one).resolve().samefile(other)
    return one == other


def _copy_issue(root: Path, own: str, other: str) -> Issue:
    """Return the issue of a second form of an adapter (``.bin`` beside safetensors): a note where both are the same."""
    hint = f"remove the older of the two files, or leave this one out with --ignore-file {other}"
    try:
        (mine, _), (theirs, _) = read_adapter(root, own), read_adapter(root, other)
    except CheckpointError as exc:
        return warning(
            "adapter-copy",
            other,
            f"was left out: {own} is used, and the two cannot be compared ({exc})",
            hint,
        )
    if _same(mine, theirs):
        return note("adapter-copy", other, f"has the same tensors as {own}, which was used")
    return error("unread-file", other, f"has different tensors from {own}, which was used", hint)


def _same(mine: tuple[TensorRef, ...], theirs: tuple[TensorRef, ...]) -> bool:
    """Return True when two files hold the same tensors, by names, dtypes and values."""
    others = {ref.name: ref for ref in theirs}
    return {ref.name for ref in mine} == others.keys() and all(
        ref.dtype == others[ref.name].dtype and same_values(ref, others[ref.name]) for ref in mine
    )


def shard_issues(refs: tuple[TensorRef, ...], config: Mapping[str, Any], file: str) -> list[Issue]:
    """Return an issue when a file holds one process's part of the adapter's tensors, not the tensors.

    Args:
        refs: every tensor of the file.
        config: PEFT's.
        file: its name.
    """
    if config.get("peft_type") == "ADALORA":
        return []  # a module that was pruned to rank 0 has empty tensors
    # DeepSpeed ZeRO-3 leaves tensors without values, FSDP flat pieces of them.
    empty = [ref for ref in refs if ref.shape == (0,)]
    flat = [
        ref
        for ref in refs
        if ref.name.endswith("_flat_param") or (len(ref.shape) == 1 and ref.name.endswith(_MATRICES))
    ]
    found = empty or flat
    if not found:
        return []
    many = f"{len(found)} of its {len(refs)} tensors"
    first = f"the first is {found[0].name}, {shape_text(found[0].shape)}"
    if empty:
        sentence = (
            f"{many} have no values ({first}): DeepSpeed ZeRO-3 or FSDP saved only one process's part of them"
        )
    else:
        sentence = f"{many} are flat pieces of matrices ({first}): FSDP saved only one process's part of them"
    hint = (
        "gather them with the trainer's own tool: python zero_to_fp32.py FOLDER OUTPUT (DeepSpeed), "
        "accelerate merge-weights FOLDER OUTPUT (FSDP), python -m verl.model_merger merge (verl); "
        f"{LOAD_AFTER}. To avoid it, train with stage3_gather_16bit_weights_on_model_save, or with a full "
        "state dict for FSDP"
    )
    return [error("sharded-state", file, sentence, hint)]


_MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
"""Ends of names of tensors that have two axes or more in every LoRA."""


def sharded_error(root: Path, names: Collection[str]) -> ResolveError | None:
    """Return the error of a folder whose adapter is there only as a distributed trainer's shards; None for others.

    Args:
        root: the folder.
        names: the files in it, and in the folders in it.
    """
    state = sharded_state(names)
    if state is None:
        return None
    sentence = f"{root}: has no adapter file, only a sharded training state of {state.trainer}"
    return ResolveError(sentence, hint=f"{state.tool}; then {LOAD_AFTER}")
