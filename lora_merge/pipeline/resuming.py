"""Going on where an interrupted run stopped: is it the same merge, what of it is there, and do its inputs still stand?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge import executors
from lora_merge._version import __version__
from lora_merge.core.plan import Copy, Merge, MergePlan
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.errors import ChangedError, CheckpointError
from lora_merge.io import journal
from lora_merge.io.files import digest_text, new_digest
from lora_merge.io.safetensors import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_merge.core.plan import Step
    from lora_merge.core.report import Observer
    from lora_merge.io.staging import Stage
    from lora_merge.writers import HfCheckpoint


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that a plan reads, as they were when it was made."""

    seen: Mapping[str, tuple[int, int]]
    """Path → size and time of the last change, in bytes and nanoseconds."""

    @classmethod
    def of(cls, plan: MergePlan) -> Inputs:
        """Return the files of a plan as they are now.

        Raises:
            CheckpointError: one is gone.
        """
        names = {ref.file for ref in _read(plan.steps)} | {file.source for file in plan.side_files}
        return cls({name: _seen(name) for name in names})

    def check(self) -> None:
        """Raise where a file is not what it was: what was read of it may be of both, and fit together nowhere.

        Raises:
            ChangedError: one has changed, or is gone.
        """
        hint = "run again when nothing else writes to it"
        for name, seen in self.seen.items():
            try:
                is_same = _seen(name) == seen
            except CheckpointError as exc:
                raise ChangedError(name, "", "went away while it was read", hint=hint) from exc
            if not is_same:
                raise ChangedError(name, "", "changed while it was read", hint=hint)


def fingerprint(plan: MergePlan, inputs: Inputs, options: Mapping[str, object]) -> str:
    """Return what two runs must have in common for one to go on where the other stopped.

    That is the plan, its inputs as they are, the options, and the versions that decide how it is carried out.
    """
    from importlib import metadata

    digest = new_digest()
    versions = (__version__, metadata.version("torch"))
    for part in (plan, sorted(inputs.seen.items()), sorted(options.items()), versions):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest_text(digest)


def finished(
    plan: MergePlan, stage: Stage, writer: HfCheckpoint, merge: str, n_workers: int, watch: Observer
) -> list[TensorRecord] | None:
    """Return the records of what an interrupted run has written, or None where it was another merge.

    What the journal lists counts if it is still there, to the byte. What else is staged is removed.

    Args:
        plan: of this run.
        stage: what the other one left.
        writer: of this run; it keeps the files that are kept here.
        merge: the `fingerprint` of this run.
        n_workers: threads to read with.
        watch: hears of the bytes.
    """
    listed = journal.read(stage.home, merge)
    kept = writer.keep(plan, [] if listed is None else [record.file for record in listed])
    if listed is None:
        return None
    slots = {slot.name: slot for step in plan.steps for slot in step.slots}
    there = [
        _Written(record, replace(slots[record.name], file=str(stage.output / record.file)))
        for record in {record.name: record for record in listed}.values()
        if record.file in kept and _is_of(record, slots.get(record.name))
    ]
    watch.phase("checking", sum(piece.nbytes for piece in there))
    found = []
    for piece, is_whole in executors.pick(n_workers)(
        lambda piece: (piece, piece.is_whole()), there, n_workers
    ):
        watch.advance(piece.nbytes)
        if is_whole:
            found.append(piece.record)
    return found


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor that a journal lists, and the place where it should be."""

    record: TensorRecord
    ref: TensorRef

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return self.ref.nbytes

    def is_whole(self) -> bool:
        """Return True when it has the bytes that were written."""
        return tensor_digest(self.ref) == self.record.digest


def _is_of(record: TensorRecord, slot: TensorRef | None) -> bool:
    return slot is not None and (record.file, record.nbytes) == (slot.file, slot.nbytes)


def _read(steps: Iterable[Step]) -> Iterator[TensorRef]:
    """Yield every tensor that some steps read."""
    for step in steps:
        match step.op:
            case Copy() as op:
                yield op.source
            case Merge() as op:
                yield from op.parts
                for delta in op.deltas:
                    yield from delta.tensors.values()


def _seen(name: str) -> tuple[int, int]:
    try:
        status = Path(name).stat()
    except OSError as exc:
        raise CheckpointError(name, "", f"cannot be read ({exc.strerror})") from exc
    return status.st_size, status.st_mtime_ns
