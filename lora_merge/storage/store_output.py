"""Outputs in a store: files get their final names at once, and ``config.json`` comes last of all.

A store renames nothing, and an object appears whole or not at all. So a prefix without ``config.json`` is not a checkpoint
yet, whatever else is there.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE
from lora_merge.errors import ChangedError, ResolveError, WriteError
from lora_merge.storage import store_published
from lora_merge.storage.destination import Left
from lora_merge.storage.objects import store_at
from lora_merge.storage.objects.settings import PROBE
from lora_merge.storage.owners import close_folder
from lora_merge.storage.shadow import RESUMABLE, ShadowedDestination, listing_of
from lora_merge.storage.store_names import check_apart, check_free, check_may_write, locked, output_url
from lora_merge.storage.store_staging import Run, StoreFiles, StoreStaging
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.destination import Published, Wish
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.objects.urls import StoreUrl


class StoreDestination(ShadowedDestination):
    """The place of one output in a store.

    Args:
        url: of the output.
        wish: what the run wants of it.
    """

    def __init__(self, url: StoreUrl, wish: Wish) -> None:
        # First: where the store cannot be reached, nothing is made here.
        self._store, self._staging = store_at(url), StoreStaging(url)
        super().__init__()
        self._url, self._wish = url, wish
        self._run: Run | None = None
        """This run, once it has the lock."""

    @classmethod
    def open(cls, wish: Wish) -> StoreDestination:
        """Look at the place of an output. It is locked by `left` or `begin`, which know the fingerprint of the run.

        Raises:
            WriteError: the output's name is taken, or the store cannot be asked.
        """
        cls.check_replaceable(wish)
        return cls(output_url(wish.out), wish)

    @staticmethod
    def path(text: str) -> str:
        """Return the URL of an output.

        Raises:
            ResolveError: it is not one.
        """
        return str(output_url(text))

    @staticmethod
    def is_complete(wish: Wish) -> bool:
        """Return True when the output has its ``config.json``.

        Raises:
            LoraMergeError: the store cannot be asked.
        """
        return store_published.is_complete(output_url(wish.out))

    @staticmethod
    def published(wish: Wish) -> Published:
        """Return the manifest of an output, and the sizes of its files.

        Raises:
            LoraMergeError: the store cannot be asked.
        """
        return store_published.published(output_url(wish.out), wish.marks[-1])

    @staticmethod
    def clear_spent(wish: Wish) -> None:
        """Remove files of an older output, and staging, where a killed run has left nothing to do but this."""
        store_published.clear_spent(output_url(wish.out))

    @staticmethod
    def can_copy(out: str) -> bool:
        """Return True where the store copies ranges by itself, and states checksums.

        Raises:
            LoraMergeError: it cannot be asked.
        """
        return store_at(output_url(out)).can_copy

    @staticmethod
    def check_replaceable(wish: Wish) -> None:
        """Check that nothing irreplaceable has the output's prefix, and that no input is inside it or around it.

        Raises:
            WriteError: something has, or the store cannot be asked.
        """
        url = output_url(wish.out)
        check_apart(url, wish)
        check_free(url, wish, store_at(url).entries(), StoreStaging(url).run())

    @staticmethod
    def check_writable(wish: Wish) -> None:
        """Check that files can be made and deleted in the output's prefix, and in staging beside it.

        Raises:
            WriteError: they cannot.
        """
        check_may_write(output_url(wish.out))

    @property
    def weights(self) -> str:
        """The URL of the output, below which weight files can be read."""
        return str(self._url)

    @property
    def seen_at(self) -> str:
        """Empty: people see the output under its name."""
        return ""

    @property
    def files(self) -> StoreFiles:
        """What is sent to workers: the URL of the output, and the fingerprint of the run."""
        return StoreFiles(self._url, self._merge)

    def left(self, merge: str) -> Left:
        """Take the lock over from an interrupted run of the same merge, and return what it has finished.

        Raises:
            WriteError: the lock is of another merge, or the store refused something.
        """
        run = self._staging.run()
        if run is None:
            return Left(None, {}, has_journal=False)
        if run.merge != merge:
            if not run.is_ended:
                raise locked(self._url, run, merge, self._wish.told)
            return Left(None, {}, has_journal=True)
        # Parts leave the lock as it is. A run that goes on alone puts its own name into it.
        self._run = (
            run if self._wish.shared and not run.is_ended else Run.here(merge, self._wish.told, run.old)
        )
        if self._run is not run:
            self._staging.take_over(self._run)
        # The evidence first: where several write, a file may be written again meanwhile.
        found, entries = self._staging.finished(merge), self._store.entries()
        self._finished = {one.file: one for one in found if one.is_there(entries)}
        return Left(
            [record for one in self._finished.values() for record in one.records], {}, has_journal=True
        )

    def begin(
        self,
        files: Sequence[OutputFile],
        merge: str,
        records: Sequence[TensorRecord],
        changed: Mapping[str, int],
    ) -> None:
        """Take the lock, unless `left` has it already; then remove the configuration of an older output.

        Raises:
            WriteError: another run has the lock, the prefix is taken, or the store refused something.
        """
        del records, changed
        self._merge, self._planned = merge, frozenset(file.name for file in files)
        is_first = self._run is None and self._lock(merge)
        close_folder(str(self._url), self._wish.inputs)
        # From here on this is not a checkpoint, until its own configuration is there.
        if is_first or not self._wish.shared:
            self._staging.unseal()
        # With the mark it is this output's own: another process is completing it.
        if self._store.entry(CONFIG_FILE) is not None and self._staging.sealed() is None:
            self._store.delete([CONFIG_FILE])

    def _lock(self, merge: str) -> bool:
        """Take the lock; return False where another process of the same merge has it, and the two share the output.

        Raises:
            WriteError: another run has it, the prefix is taken, or the store refused something.
        """
        run = Run.here(merge, self._wish.told, self._store.entries().keys())
        if self._staging.lock(run):
            try:
                # Something may have come there after the first look.
                check_free(self._url, self._wish, self._store.entries(), None)
            except WriteError:
                self._staging.clear()
                raise
        else:
            other = self._staging.run()
            if other is not None and not other.is_ended:
                if self._wish.shared and other.merge == merge:
                    self._run = other
                    return False
                raise locked(self._url, other, merge, self._wish.told)
            # Whatever it left goes when this run is complete, or is written again.
            self._staging.take_over(run)
            self._staging.forget(one.file for one in self._staging.finished(merge))
        self._run = run
        return True

    def finish_file(self, name: str) -> None:
        """Do nothing: a file is durable when it has its name."""

    def compared(self) -> frozenset[str]:
        """Return the files of which the store has stated the checksum of what was sent, and that have not changed since.

        Raises:
            LoraMergeError: the store cannot be asked.
        """
        found, entries = self._staging.finished(self._merge), self._store.entries()
        return frozenset(one.file for one in found if one.receipt.checksum and one.is_there(entries))

    def listing(self) -> Listing:
        """Return every file of the output that is in the store, with its version. Files of an older output that this run
        does not replace are left out: they go when it is complete.

        Raises:
            WriteError: the store cannot be asked.
        """
        old = frozenset(self._run.old if self._run is not None else ()) - self._planned
        every = self._store.entries().items()
        return listing_of({name: entry for name, entry in every if name not in old and name != PROBE})

    def commit(self) -> None:
        """Put the small files into the store: the index after all others, ``config.json`` last. Then remove the files of an
        older output, and staging.

        Raises:
            WriteError: the store refused something, or a file is not the one that was written.
        """
        assert self._run is not None
        # Parts of uploads that were killed are billed, and in no listing. Without the right to abort them, the bucket's
        # lifecycle rule removes them.
        with contextlib.suppress(WriteError):
            self._store.abort_uploads(self._planned)
        self._check_written()
        old = set(self._run.old) - self._planned - self._shadow.listing().keys()
        names = sorted(
            self._shadow.listing(), key=lambda name: (name == CONFIG_FILE, name == INDEX_FILE, name)
        )
        for name in names:
            if name == CONFIG_FILE:
                self._staging.seal(old)
            self._store.put(name, self._shadow.read(name))
        self._is_published = True
        store_published.finish(self._url, self._staging, old)
        self._held.close()

    def _check_written(self) -> None:
        """Check that each weight file is the one that a worker has written: one that was thought dead may still write.

        Raises:
            WriteError: one is not.
        """
        entries = self._store.entries()
        finished = {one.file: one for one in self._staging.finished(self._merge)}
        for name in sorted(self._planned):
            if name not in finished or not finished[name].is_there(entries):
                sentence = f"{self._url}/{name}: is not the file that this run has written"
                raise WriteError(sentence, hint="run again with --resume while nothing else writes there")

    def release(self) -> None:
        """Leave the lock and what is made to the other processes that share the output."""
        self._run = None
        self._held.close()

    def abort(self, exc: BaseException) -> None:
        """Leave the place after an error. Whole files stay after an interrupt or a fault of the store; after any other
        error what this run has written is removed, as far as the store lets it.
        """
        run, self._run = self._run, None
        # The store may be what is at fault: then everything stays, and a later run is told of it.
        with contextlib.suppress(WriteError, ResolveError):
            if run is not None and self._is_published:
                store_published.finish(self._url, self._staging, self._staging.sealed() or ())
            elif run is not None:
                self._leave(run, exc)
        self._held.close()

    def _leave(self, run: Run, exc: BaseException) -> None:
        is_fault = isinstance(exc, RESUMABLE) and not isinstance(exc, ChangedError)
        # Other processes may be at work, or their files are not at fault.
        if self._wish.shared == "part":
            exc.add_note(
                f"files that are finished are kept in {self._url}; run the same command again to continue"
            )
            return
        if self._wish.shared and is_fault:
            return
        n_kept = self._staging.n_finished() if is_fault else 0
        if n_kept:
            self._staging.take_over(replace(run, is_ended=True))
            exc.add_note(
                f"run again with --resume to continue: {counted(n_kept, 'finished file')} kept in {self._url}; "
                "without --resume the run starts over"
            )
            return
        # A file that was there before is this run's only where there is evidence of it.
        own = self._planned - set(run.old) | {one.file for one in self._staging.finished(run.merge)}
        self._store.delete(sorted(own & self._store.entries().keys()))
        self._staging.clear()
