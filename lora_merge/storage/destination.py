"""What a run asks of the place that its output goes to, whatever the kind of storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lora_merge.core.tensor import TensorRecord
from lora_merge.storage.hub.uploads.push import Push

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Collection, Iterable, Sequence

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.objects.store import FileSink, Receipt
    from lora_merge.storage.sources import Source


UNKNOWN_BYTES = 1 << 60
"""What a storage that does not say how much is free returns (`Storage.free_bytes`)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run wants of the place of its output, before it takes it."""

    out: str
    """As `Storage.path` returned it."""

    resume: bool
    """Keep what an interrupted run left."""

    overwrite: bool
    """What has the output's name now may be replaced."""

    marks: tuple[str, ...]
    """File names. A directory that has one of them is an output of this kind, and may be replaced. The last one is that of
    a file that lora-merge alone writes.
    """

    inputs: tuple[Path, ...]
    """What is read on this machine. The output gets no permission that one of them does not have."""

    stored_inputs: tuple[str, ...] = ()
    """Weight files that are read in other storages."""

    shared: Literal["", "part", "seal"] = ""
    """How this run has a share in an output that several make: it makes some files, or completes what is made. Empty for a run that
    makes all of it.
    """

    push: Push | None = None
    """Of an output on the Hub: the repo, and how it is written to."""

    card: str = ""
    """The model card as far as it is known before the merge: its front matter is complete. Empty where it is not known."""

    told: Mapping[str, str] = field(default_factory=dict)
    """What the merge is, for another run that finds this one's lock: ``base``, ``adapters``, ``--dtype``, versions."""


@dataclass(frozen=True, slots=True)
class Left:
    """What an interrupted run left in the place of an output."""

    records: list[TensorRecord] | None
    """What its journal lists; None where there is none, or it is of another merge."""

    changed: Mapping[str, int]
    """Path → ctime in nanoseconds, of the inputs that the run could rely on."""

    has_journal: bool


@dataclass(frozen=True, slots=True)
class Published:
    """An output that is complete, as far as a listing and its manifest tell."""

    manifest: bytes

    sizes: Mapping[str, int]
    """File, relative to the output → bytes."""

    made: int
    """When the manifest was written, in nanoseconds since 1970."""


class Sink(Protocol):
    """Where the bytes of one output go, as workers see it. Frozen and picklable: it holds names, no open files."""

    def copying(
        self, run: CopyRun, source: Source
    ) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open the slots of a run; the result takes the next bytes of its sources, which are read from
        ``source``.

        Raises:
            WriteError: the disk is full or cannot be written.
        """

    def open(self, slot: TensorRef) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open a slot; the result writes its next bytes, and the buffer may be reused afterwards.

        Raises:
            WriteError: the disk is full or cannot be written.
        """


class FilePlace(Protocol):
    """Where whole files of one output go, as workers see it. Frozen and picklable: it holds names, no connection and no
    secret.
    """

    def file(self, name: str, nbytes: int) -> contextlib.AbstractContextManager[FileSink]:
        """Begin a file of a known size; it gets its name when the block ends, and never after an error in the block.

        Raises:
            WriteError: the storage refused it.
        """

    def note(self, file: str, receipt: Receipt, records: Sequence[TensorRecord]) -> None:
        """Keep the evidence of a file that has its name, for a run that resumes this one.

        Raises:
            WriteError: the storage refused it.
        """


class Destination(Protocol):
    """The place of one output. The driver of a run has it for itself from the beginning to the end.

    The order of calls is: perhaps `left` and `keep`, perhaps `link`, then `begin`. Workers fill files through `sink`;
    the driver calls `note` for their tensors, and `finish_file` for each file that is full. Then come `write_text`
    and `copy_in` for the files around the weights, `flush` and `commit`. `abort` may come at any moment.
    """

    @property
    def root(self) -> Path:
        """The directory where written files can be read, until `commit`."""

    @property
    def weights(self) -> str:
        """Where weight files can be read, if not in `root` (``scheme://…/folder``); else empty."""

    @property
    def seen_at(self) -> str:
        """Where people see the output after `commit`, if that is not its name; else empty."""

    @property
    def files(self) -> FilePlace | None:
        """Where workers make whole files; None where they write to any place of a file through `sink`."""

    @property
    def sink(self) -> Sink:
        """Where workers write; to be asked for after `link` and `begin`, which decide what is left to write."""

    def left(self, merge: str) -> Left:
        """Return what an interrupted run left here; nothing counts before its bytes were read again.

        Args:
            merge: the fingerprint of this run.
        """

    def keep(self, files: Iterable[OutputFile], names: Collection[str]) -> frozenset[str]:
        """Keep files of an interrupted run that have the size and header of this run's; remove everything else.

        Args:
            files: of this run.
            names: of those that may be kept.

        Raises:
            WriteError: something cannot be removed.
        """

    def link(
        self, files: Iterable[OutputFile], sources: Mapping[str, str], how: Literal["reflink", "hard"]
    ) -> dict[str, str]:
        """Make files whose tensors are all copies as links of the base's files. A linked file is full from then on.

        Args:
            files: of this run.
            sources: output file → the base's file that has all of its tensors, at the same places.
            how: ``reflink``: blocks are shared until one of the two files changes; ``hard``: a second name of the
                same file.

        Returns:
            The files that cannot be linked, each with the reason. They are filled as others are.

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
        """Create every file that is neither kept nor linked, at full size, and begin to keep evidence for a later
        --resume.

        Args:
            files: of this run, with their sizes and headers.
            merge: the fingerprint of this run.
            records: of what is written already.
            changed: when each input changed last (ctime, nanoseconds), of those that can be relied on.

        Raises:
            WriteError: the disk is full or cannot be written.
        """

    def note(self, records: Sequence[TensorRecord]) -> None:
        """Keep the records of written tensors, for a run that resumes this one.

        Raises:
            WriteError: it cannot be written.
        """

    def finish_file(self, name: str) -> None:
        """A file is full: it may be made durable. Called once for each file."""

    def rest(self) -> None:
        """No more copies: from here on workers only merge, and send what they write to the disk themselves."""

    def write_text(self, name: str, text: str) -> None:
        """Write a new small file, in UTF-8.

        Raises:
            WriteError: it cannot be written.
        """

    def copy_in(self, source: str, name: str) -> str:
        """Copy the file of an input that a text names; return the digest of the bytes that were read.

        Raises:
            CheckpointError: it cannot be read.
            WriteError: it cannot be written.
        """

    def flush(self) -> None:
        """Wait until everything is durable. Nothing may be written afterwards.

        Raises:
            WriteError: the storage refused something.
        """

    def compared(self) -> frozenset[str]:
        """Return the files whose bytes the storage itself has compared with those that were sent, and that are still there."""

    def listing(self) -> Listing:
        """Return every file as it is now. Two listings that differ show that something else writes there."""

    def commit(self) -> None:
        """Give the output its name, and free the place. Readers see the whole output, or none.

        Raises:
            WriteError: it cannot be named.
        """

    def release(self) -> None:
        """Leave the place to the other runs of an output that several make (`Wish.shared`)."""

    def abort(self, exc: BaseException) -> None:
        """Free the place after an error. After an interrupt or a fault of the disk whole files stay, and a note on
        the error says so.
        """


class Storage(Protocol):
    """A kind of storage that outputs may go to: a row of `lora_merge.storage.destinations.STORAGES`."""

    takes_files: bool
    """True where a file is written from its first byte to its last (`Destination.files`)."""

    def path(self, text: str) -> str:
        """Return the output's absolute path or URL, from the text that the user wrote.

        Raises:
            ResolveError: the text cannot be one.
        """

    def is_complete(self, wish: Wish) -> bool:
        """Return True when an output with this name is whole, so that there is nothing to resume.

        Raises:
            LoraMergeError: the storage cannot be asked.
        """

    def published(self, wish: Wish) -> Published:
        """Return what is known of an output that is complete, without its weights.

        Raises:
            LoraMergeError: it cannot be read.
        """

    def clear_spent(self, wish: Wish) -> None:
        """Remove what a killed run left in staging beside an output that is complete, as far as possible."""

    def can_copy(self, out: str) -> bool:
        """Return True where the storage copies ranges of other files of its kind by itself, and states checksums of the result.

        Raises:
            LoraMergeError: the storage cannot be asked.
        """

    def check_replaceable(self, wish: Wish) -> None:
        """Check that the output may have its name. Called before anything is read, and again when the place is taken.

        Raises:
            WriteError: it may not.
        """

    def check_writable(self, wish: Wish) -> None:
        """Check that an output can be written: permissions, and a disk that is not read-only.

        Raises:
            WriteError: it cannot.
        """

    def free_bytes(self, out: str) -> int:
        """Return the bytes that are free for an output; `UNKNOWN_BYTES` where the storage does not say."""

    def open(self, wish: Wish) -> Destination:
        """Take the place of an output, until `Destination.commit` or `abort`.

        Raises:
            WriteError: another run or another user holds it, it cannot be made, or the output's name is taken.
        """
