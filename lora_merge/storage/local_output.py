"""Outputs on a local disk: staged beside their name, journalled, flushed, renamed in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from lora_merge.errors import CheckpointError, ResolveError, WriteError
from lora_merge.storage import dirs, journal, staging
from lora_merge.storage.copying import CopyTarget
from lora_merge.storage.destination import Left, Published
from lora_merge.storage.flushing import Flushing
from lora_merge.storage.folder import Folder
from lora_merge.storage.local import LocalSource
from lora_merge.storage.output_files import has_header, reserve
from lora_merge.storage.sources import open_source
from lora_merge.storage.user_paths import local_output_path, nearest_existing
from lora_merge.storage.writing import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRecord, TensorRef
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.destination import Wish
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.sources import Source


_UNKNOWN_BYTES = 1 << 60
"""Free bytes of a filesystem that does not say: treated as unlimited."""


@dataclass(frozen=True, slots=True)
class FolderSink:
    """Writes into the reserved files of a directory, in any order and from any number of workers.

    It knows the directory by path and inode, so that what a worker writes cannot land in another one.
    """

    folder: Folder
    linked: frozenset[str] = frozenset()
    """Files that are links of the base's, and need no bytes."""

    @contextlib.contextmanager
    def copying(self, run: CopyRun, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes the next bytes of a run; of a linked file it ignores them.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        start, slot = run.sources[0].start, run.slots[0]
        if slot.file in self.linked:
            yield lambda _: None
            return
        with self.folder.writing(slot.file) as fd:
            label = str(self.folder.path / slot.file)
            yield CopyTarget(source, start, run.nbytes, fd, slot.start, label).write

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes the next bytes of a slot.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        with self.folder.writing(slot.file) as fd:
            stream = Stream(fd, slot.start, self.folder.path / slot.file)
            yield stream.write
            # Not after an error in the block: the slot is not whole then, whatever is written.
            stream.finish()


class LocalDestination:
    """The place of one output on a local disk: a staging directory beside the output's name.

    Args:
        stage: the directory, which this run holds locked.
        held: what is left when the place is: the stage is in it already.
    """

    takes_files = False
    files = None
    """Workers write to any place of a file."""

    def __init__(self, stage: staging.Stage, held: contextlib.ExitStack) -> None:
        self._stage, self._held = stage, held
        self._kept: frozenset[str] = frozenset()
        self._linked: frozenset[str] = frozenset()
        self._flushing = Flushing(stage.folder)
        self._journal: journal.Journal | None = None

    @classmethod
    def open(cls, wish: Wish) -> Self:
        """Lock the staging directory of an output.

        Raises:
            WriteError: another run or another user holds it, it cannot be made, or the output's name is taken.
        """
        with contextlib.ExitStack() as stack:
            stage = stack.enter_context(
                staging.staging(
                    Path(wish.out),
                    resume=wish.resume,
                    overwrite=wish.overwrite,
                    marks=wish.marks,
                    inputs=wish.inputs,
                )
            )
            return cls(stage, stack.pop_all())

    @staticmethod
    def path(text: str) -> str:
        """Return the absolute path of an output.

        Raises:
            ResolveError: it cannot be a path, or holds a shell variable that was not filled in.
        """
        return str(local_output_path(text))

    @staticmethod
    def is_complete(wish: Wish) -> bool:
        """Return True when there is a manifest: an output gets its name only when it is complete."""
        # Unlike a method of Path, this raises no error for a name that is too long or may not be looked at.
        return os.path.isfile(Path(wish.out, wish.marks[-1]))  # noqa: PTH113

    @staticmethod
    def published(wish: Wish) -> Published:
        """Return the manifest of an output, and the sizes of its files.

        Raises:
            ResolveError: it cannot be read.
        """
        manifest = Path(wish.out, wish.marks[-1])
        try:
            fd = dirs.open_directory(wish.out)
            try:
                sizes = {name: seen[1] for name, seen in dirs.listing(fd).items()}
            finally:
                os.close(fd)
            return Published(manifest.read_bytes(), sizes, manifest.stat().st_mtime_ns)
        except OSError as exc:
            raise ResolveError(f"{wish.out}: cannot be read ({exc.strerror or exc})") from exc

    @staticmethod
    def clear_spent(wish: Wish) -> None:
        """Remove what a killed run left in staging beside its finished output."""
        staging.clear_spent(Path(wish.out), wish.marks, resumes=True)

    @staticmethod
    def can_copy(out: str) -> bool:
        """Return False: links and reflinks are what a disk has (`link`)."""
        del out
        return False

    @staticmethod
    def check_replaceable(wish: Wish) -> None:
        """Check that nothing irreplaceable has the output's name, and that no input is inside it.

        Raises:
            WriteError: something has.
        """
        staging.check_replaceable(
            Path(wish.out), overwrite=wish.overwrite, inputs=wish.inputs, marks=wish.marks
        )

    @staticmethod
    def check_writable(wish: Wish) -> None:
        """Check that the output's directory can be made and written.

        Raises:
            WriteError: it cannot.
        """
        staging.check_writable(Path(wish.out))

    @staticmethod
    def free_bytes(out: str) -> int:
        """Return the free bytes of the filesystem that the output goes to; staging that the next run will clear
        counts as free.
        """
        try:
            usage = shutil.disk_usage(nearest_existing(Path(out)))
        except OSError:
            return _UNKNOWN_BYTES
        # Some filesystems (in FUSE) do not say how large they are: they count as having room, and writing will tell.
        return usage.free + staging.stale_bytes(Path(out)) if usage.total else _UNKNOWN_BYTES

    @property
    def root(self) -> Path:
        """The staged directory that will be the output."""
        return self._stage.output

    @property
    def seen_at(self) -> str:
        """Empty: people see the output under its name."""
        return ""

    @property
    def weights(self) -> str:
        """Empty: weight files are in `root`."""
        return ""

    @property
    def sink(self) -> FolderSink:
        """The sink that is sent to workers: the directory's path and inode, and which files are links."""
        return FolderSink(self._stage.folder, self._linked)

    def left(self, merge: str) -> Left:
        """Return what the journal of an interrupted run lists, for the merge with this fingerprint."""
        home = self._stage.home
        # `has_journal` tells a journal of another merge from none: only the first is worth a note.
        return Left(journal.read(home, merge), journal.changed(home), self._stage.journal.exists())

    def keep(self, files: Iterable[OutputFile], names: Collection[str]) -> frozenset[str]:
        """Keep files of an interrupted run that have this run's size and header; remove everything else.

        A link, a file with a second name and another user's file are not kept: nothing may be written to them.

        Raises:
            WriteError: something cannot be removed.
        """
        kept = {file.name for file in files if file.name in names and self._is_begun(file)}
        self._stage.folder.clear(kept)
        self._kept = frozenset(kept)
        return self._kept

    def _is_begun(self, file: OutputFile) -> bool:
        """Return True when a staged file is a regular one with this run's size and header."""
        try:
            with self._stage.folder.writing(file.name) as fd:
                return has_header(LocalSource(str(self._stage.folder.path / file.name), fd), file)
        except (WriteError, CheckpointError):
            return False

    def link(
        self, files: Iterable[OutputFile], sources: Mapping[str, str], how: Literal["reflink", "hard"]
    ) -> dict[str, str]:
        """Make files that are copies throughout as links of the base's, where the two headers are the same bytes.

        Returns:
            The files that the filesystem cannot link, each with the reason.

        Raises:
            CheckpointError: a file of the base cannot be read.
            WriteError: a directory cannot be made.
        """
        linked, refused = [], {}
        for file in files:
            # A kept file has tensors of the interrupted run in it.
            if file.name in self._kept or file.name not in sources:
                continue
            with open_source(sources[file.name]) as source:
                if source.fd is None or not has_header(source, file):
                    continue
            try:
                self._stage.folder.link(Path(sources[file.name]), file.name, how)
            except OSError as exc:
                refused[file.name] = exc.strerror or str(exc)
            else:
                linked.append(file.name)
        self._linked = frozenset(linked)
        return refused

    def begin(
        self,
        files: Sequence[OutputFile],
        merge: str,
        records: Sequence[TensorRecord],
        changed: Mapping[str, int],
    ) -> None:
        """Begin the journal, and create every file that is neither linked nor kept, at its full size.

        From here on what is written is sent to the disk in the background.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        # Flushing begins before the first byte is written, and ends before the staging directory is cleared.
        self._held.enter_context(self._flushing)
        written = journal.Journal(self._stage.home, merge, records, changed)
        self._journal = self._held.enter_context(written)
        for file in files:
            if file.name not in self._linked | self._kept:
                reserve(self._stage.folder, file)

    def note(self, records: Sequence[TensorRecord]) -> None:
        """Add tensors to the journal.

        Raises:
            WriteError: it cannot be written.
        """
        assert self._journal is not None
        self._journal.add(records)

    def finish_file(self, name: str) -> None:
        """Flush a full file in the background."""
        self._flushing.add(name)

    def rest(self) -> None:
        """Flush only full files from here on (`Flushing.rest`)."""
        self._flushing.rest()

    def write_text(self, name: str, text: str) -> None:
        """Write a new small file.

        Raises:
            WriteError: it cannot be written.
        """
        self._stage.folder.write_text(name, text)

    def copy_in(self, source: str, name: str) -> str:
        """Copy a file of an input; return the digest of the bytes that were read.

        Raises:
            CheckpointError: it cannot be read.
            WriteError: it cannot be written.
        """
        return self._stage.folder.copy_in(source, name)

    def flush(self) -> None:
        """Wait until the disk has every staged file.

        Raises:
            WriteError: the disk does not take it.
        """
        self._flushing.wait()

    def compared(self) -> frozenset[str]:
        """Return nothing: a disk takes no checksums."""
        return frozenset()

    def listing(self) -> Listing:
        """Return every staged file as it is now (`dirs.Listing`)."""
        return self._stage.folder.listing()

    def commit(self) -> None:
        """Rename the staged directory to the output's name, and remove the rest of staging.

        Raises:
            WriteError: a flush or the rename failed, or something has come under the output's name.
        """
        staging.publish(self._stage)
        self._held.close()

    def release(self) -> None:
        """Do nothing: one run makes all of an output here."""

    def abort(self, exc: BaseException) -> None:
        """Leave the place after an error. Whole files stay after an interrupt or a fault of the disk
        (`staging.staging`).
        """
        if self._stage.is_published():
            with contextlib.suppress(WriteError):
                self._stage.home.remove(journal.FILE)  # nobody is to go on from there
        with contextlib.suppress(type(exc)):
            self._held.__exit__(type(exc), exc, exc.__traceback__)
