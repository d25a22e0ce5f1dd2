"""What a run asks of the place that its output goes to, whatever kind of storage that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lora_merge.core.tensor import TensorRecord

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Collection, Iterable, Sequence

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.copy_runs import Stretch
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.sources import Source


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run wants of the place of its output."""

    out: Path
    resume: bool
    """Keep what an interrupted run left."""

    overwrite: bool
    """What has the output's name now may be replaced."""

    marks: tuple[str, ...]
    """Files of which one shows that a directory is an output of this kind."""

    inputs: tuple[Path, ...]
    """Directories and files that are read: who may not read one of them may not read the output."""


@dataclass(frozen=True, slots=True)
class Left:
    """What an interrupted run has left in the place of an output."""

    records: list[TensorRecord] | None
    """What its journal lists; None where there is none, or it is of another merge."""

    changed: Mapping[str, int]
    """When each of its inputs had changed last, of those that it could rely on."""

    has_journal: bool


class Sink(Protocol):
    """Where the bytes of one output go, as its workers see it. Frozen and picklable: it holds names, no open files."""

    def copying(
        self, stretch: Stretch, source: Source
    ) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open the slots of a stretch; the result takes the next bytes of its sources, which `source` holds.

        Raises:
            WriteError: the disk is full or cannot be written.
        """

    def open(self, slot: TensorRef) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open a slot; the result writes its next bytes, and the buffer may be reused afterwards.

        Raises:
            WriteError: the disk is full or cannot be written.
        """


class Destination(Protocol):
    """The place of one output, which the driver of a run has for itself from the beginning.

    The order is: perhaps `left` and `keep`, perhaps `link`, then `begin`. Workers fill files through `sink`; the driver calls
    `note` for their tensors, and `finish_file` for each file that is full. Then come `write_text` and `copy_in` for what
    lies around the weights, `flush` and `commit`. `abort` ends it at any moment.
    """

    @property
    def root(self) -> Path:
        """Where what was written can be read, until `commit`."""

    @property
    def sink(self) -> Sink:
        """Where workers write; to be asked for after `begin`."""

    def left(self, merge: str) -> Left:
        """Return what an interrupted run has left here.

        Args:
            merge: the fingerprint of this run.
        """

    def keep(self, files: Iterable[OutputFile], names: Collection[str]) -> frozenset[str]:
        """Keep those of some files that are this run's by size and header, and remove everything else.

        Args:
            files: of this run.
            names: of those that may be kept.

        Raises:
            WriteError: something cannot be removed.
        """

    def link(
        self, files: Iterable[OutputFile], sources: Mapping[str, str], how: Literal["reflink", "hard"]
    ) -> dict[str, str]:
        """Let files that nothing changes share their bytes with files of the base; they are full from then on.

        Args:
            files: of this run.
            sources: the name of a file → the file of the base that has all of its tensors, at the same places.
            how: ``reflink``, where the filesystem can share blocks until one of the two files changes; ``hard``,
                a second name of the same file.

        Returns:
            The files of which there can be no such link, each with the reason; they are filled as others are.

        Raises:
            CheckpointError: a file of the base cannot be read.
            WriteError: a directory cannot be made.
        """

    def begin(
        self,
        files: Sequence[OutputFile],
        merge: str,
        records: Sequence[TensorRecord],
        changed: Mapping[str, int],
    ) -> None:
        """Make every file that is neither kept nor linked, and begin to keep evidence for a run that goes on from here.

        Args:
            files: of this run, with their sizes and headers.
            merge: the fingerprint of this run.
            records: of what is written already.
            changed: when each input changed last (ctime, nanoseconds), of those that can be relied on.

        Raises:
            WriteError: the disk is full or cannot be written.
        """

    def note(self, records: Sequence[TensorRecord]) -> None:
        """Keep the evidence of tensors that are written.

        Raises:
            WriteError: it cannot be written.
        """

    def finish_file(self, name: str) -> None:
        """Take note that all tensors of a file are written: it may go to where it is to last."""

    def rest(self) -> None:
        """Take note that workers copy nothing any more: from here on they merge, and send what they write to the disk themselves."""

    def write_text(self, name: str, text: str) -> None:
        """Write a small file.

        Raises:
            WriteError: it cannot be written.
        """

    def copy_in(self, source: Path, name: str) -> str:
        """Copy a file of an input; return the digest of what was read.

        Raises:
            CheckpointError: it cannot be read.
            WriteError: it cannot be written.
        """

    def flush(self) -> None:
        """Wait until all of it is where it is to last; nothing may be written any more.

        Raises:
            WriteError: it cannot be.
        """

    def listing(self) -> Listing:
        """Return every file as it is now, to see whether anything else writes there."""

    def commit(self) -> None:
        """Give the output its name, and free the place.

        Raises:
            WriteError: it cannot be named.
        """

    def abort(self, exc: BaseException) -> None:
        """Free the place as a fault demands: what is whole stays after some, and the error has a note about it."""


class Storage(Protocol):
    """A kind of storage that outputs may go to."""

    def path(self, text: str) -> Path:
        """Return what an output is called, however the user writes it.

        Raises:
            ResolveError: it is no name.
        """

    def check_replaceable(self, wish: Wish) -> None:
        """Check that an output may have its name, before anything is read for it.

        Raises:
            WriteError: it may not.
        """

    def check_writable(self, out: Path) -> None:
        """Check that an output can be written.

        Raises:
            WriteError: it cannot.
        """

    def free_bytes(self, out: Path) -> int:
        """Return how much room there is; a large number where nobody knows."""

    def open(self, wish: Wish) -> Destination:
        """Take the place of an output.

        Raises:
            WriteError: another run or another user holds it, it cannot be made, or the output's name is taken.
        """
