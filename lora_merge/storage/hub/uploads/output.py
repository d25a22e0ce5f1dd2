"""Outputs on the Hub: weight files go into a pull request while they are made, and its merge publishes all of them at once."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Never

from lora_merge.errors import ChangedError, LoraMergeError, RequestError, WriteError
from lora_merge.storage.destination import Left, Published
from lora_merge.storage.evidence import evidence_text
from lora_merge.storage.hub.remote_file import use_token
from lora_merge.storage.hub.uploads.bars import quiet_bars
from lora_merge.storage.hub.uploads.failures import UnansweredError
from lora_merge.storage.hub.uploads.folder import check_branch, seen_at
from lora_merge.storage.hub.uploads.pull_request import FOLDER, PullRequest
from lora_merge.storage.hub.uploads.push import SCHEME, Push, parse_target
from lora_merge.storage.hub.uploads.remote_repo import RemoteRepo
from lora_merge.storage.hub.uploads.replacing import check_apart, is_whole, replaced
from lora_merge.storage.hub.uploads.sinks import Spool, Stream, check_streams, spool_place
from lora_merge.storage.objects.store import Entry
from lora_merge.storage.shadow import RESUMABLE, ShadowedDestination, listing_of
from lora_merge.words import counted, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.destination import Wish
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.hub.uploads.sinks import Sink, Way
    from lora_merge.storage.objects.store import Receipt


class HubFiles:
    """Where whole files of an output go (a `storage.destination.FilePlace`). It stays in one process, where commits are made."""

    def __init__(self, pull: PullRequest | None, way: Way | None, merge: str) -> None:
        self._pull, self._way, self._merge = pull, way, merge

    def file(self, name: str, nbytes: int) -> AbstractContextManager[Sink]:
        """Begin a file; the Hub has it when the block ends without an error, and a commit follows.

        Raises:
            WriteError: the disk or the Hub refused it.
        """
        assert self._way is not None
        return self._way.file(name, nbytes)

    def note(self, file: str, receipt: Receipt, records: Sequence[TensorRecord]) -> None:
        """Have the next commit take a file, with its evidence.

        Raises:
            WriteError: the Hub refused it.
        """
        assert self._pull is not None
        self._pull.add(file, evidence_text(self._merge, receipt, records))


class HubDestination(ShadowedDestination):
    """The place of one output on the Hub.

    Args:
        push: where.
        wish: what the run wants of it.
    """

    def __init__(self, push: Push, wish: Wish) -> None:
        super().__init__()
        self._push, self._wish, self._repo = push, wish, RemoteRepo(push)
        self._held.enter_context(quiet_bars())
        self._pull: PullRequest | None = None
        self._way: Way | None = None
        self._full: set[str] = set()
        use_token(push.repo, push.token)

    @classmethod
    def open(cls, wish: Wish) -> HubDestination:
        """Look at the place of an output. Nothing is written before `begin`.

        Raises:
            LoraMergeError: the branch is taken, or the Hub refuses something.
        """
        cls.check_replaceable(wish)
        return cls(_push_of(wish), wish)

    @staticmethod
    def path(text: str) -> str:
        """Return the text of a repo and its branch as ``hf://org/name@branch``.

        Raises:
            RequestError: it names no repo.
        """
        return str(Push(*parse_target(text, "out")))

    @staticmethod
    def is_complete(wish: Wish) -> bool:
        """Return True when the branch has an output with configuration and manifest.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        return is_whole(RemoteRepo(_push_of(wish)).branch(), wish.marks[-1])

    @staticmethod
    def published(wish: Wish) -> Published:
        """Return the manifest of a complete output, and the sizes of its files.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        repo = RemoteRepo(_push_of(wish))
        branch, manifest = repo.branch(), wish.marks[-1]
        with quiet_bars():
            content = repo.small_files(branch.head, [manifest])[manifest]
        sizes = {name: entry.nbytes for name, entry in branch.entries.items()}
        return Published(content, sizes, int(branch.modified * 10**9))

    @staticmethod
    def clear_spent(wish: Wish) -> None:
        """Do nothing: a pull request that was merged is closed."""

    @staticmethod
    def can_copy(out: str) -> bool:
        """Return False: the Hub copies whole files only."""
        del out
        return False

    @staticmethod
    def check_replaceable(wish: Wish) -> None:
        """Check that the output may have the branch, and that the Hub takes its model card.

        Raises:
            LoraMergeError: it may not, or the Hub cannot be asked.
        """
        push = _push_of(wish)
        check_apart(wish, push)
        if push.way == "stream":
            check_streams()
        check_branch(RemoteRepo(push), wish.marks, wish.card, overwrite=wish.overwrite)

    @staticmethod
    def check_writable(wish: Wish) -> None:
        """Check that the token may write to the repo, or create it.

        Raises:
            WriteError: it may not.
        """
        RemoteRepo(_push_of(wish)).check_may_write()

    @property
    def weights(self) -> str:
        """The text below which the weight files can be read: the pull request at its last commit."""
        return f"{SCHEME}://{self._push.repo}@{self._opened.head}"

    @property
    def files(self) -> HubFiles:
        """Where workers, which are threads of this process, make whole files; usable after `begin`."""
        return HubFiles(self._pull, self._way, self._merge)

    @property
    def seen_at(self) -> str:
        """Where people see the output: the branch, or the pull request that is left open."""
        return self._opened.url if self._push.is_left_open else seen_at(self._repo)

    @property
    def _opened(self) -> PullRequest:
        assert self._pull is not None
        return self._pull

    def left(self, merge: str) -> Left:
        """Return what an interrupted run of the same merge has finished, in a pull request that is open.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        if not self._repo.exists:
            return Left(None, {}, has_journal=False)
        found = PullRequest.find(self._repo, merge)
        if found is None:
            return Left(None, {}, has_journal=bool(self._repo.open_requests()))
        self._pull, finished = found
        self._finished = {one.file: one for one in finished}
        return Left([record for one in finished for record in one.records], {}, has_journal=True)

    def begin(
        self,
        files: Sequence[OutputFile],
        merge: str,
        records: Sequence[TensorRecord],
        changed: Mapping[str, int],
    ) -> None:
        """Create the repo where there is none, and open the pull request, unless `left` has found it.

        Raises:
            WriteError: the disk has no room for the spool, or the Hub refused something.
        """
        del records, changed
        self._merge, self._planned = merge, frozenset(file.name for file in files)
        if self._push.way == "spool":
            _check_room(min(self._push.spool_bytes, sum(file.nbytes for file in files)))
        if self._pull is None:
            self._repo.create()
            base = self._repo.head(self._push.branch or None)
            self._pull = PullRequest.open(self._repo, merge, base, self._push.message)
        self._repo.is_begun = True
        endpoint = str(self._repo.api.endpoint)
        is_stream = self._push.way == "stream"
        self._way = Stream(self._pull, self._push, endpoint) if is_stream else Spool(self._pull)

    def finish_file(self, name: str) -> None:
        """Count a full file. After the last one, everything is committed, so that it can be read.

        Raises:
            WriteError: the Hub refused the commit.
        """
        self._full.add(name)
        if self._full >= self._planned:
            self._opened.send()

    def compared(self) -> frozenset[str]:
        """Return the files whose SHA-256 on the Hub is that of the bytes that were written.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        return frozenset(self._planned - self._unlike())

    def _unlike(self) -> set[str]:
        """Return the planned files that the pull request does not have as they were written."""
        kept = {one.file: Entry(one.receipt.nbytes, one.receipt.version) for one in self._finished.values()}
        written, entries = kept | self._opened.sent, self._repo.entries(self._opened.reference)
        return {name for name in self._planned if name not in written or entries.get(name) != written[name]}

    def listing(self) -> Listing:
        """Return every weight file of the pull request, with its version. Files of an older output are left out: the last
        commit removes them.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        entries = self._repo.entries(self._opened.reference)
        return listing_of({name: entry for name, entry in entries.items() if name in self._planned})

    def commit(self) -> None:
        """Commit the small files, and merge the pull request; leave it open where that was asked for.

        Raises:
            WriteError: the Hub refused something, or a file is not the one that was written.
        """
        pull, unlike = self._opened, self._unlike()
        if unlike:
            sentence = f"{pull.url}: {min(unlike)} is not the file that this run has written"
            raise WriteError(sentence, hint="run again with --resume while nothing else writes there")
        names = self._shadow.listing().keys()
        branch = self._repo.branch()
        removed = [name for name in replaced(branch, {*self._planned, *names}) if not name.startswith(FOLDER)]
        small = {name: self._shadow.path / name for name in names}
        pull.complete(small, self._planned, removed, self._push.message)
        if not self._push.is_left_open:
            pull.merge("The output is complete and verified.")
        self._is_published = True
        self._held.close()

    def release(self) -> Never:
        """There is nothing to leave: an output on the Hub is made by one process."""
        raise NotImplementedError

    def abort(self, exc: BaseException) -> None:
        """Leave the place after an error. Whole files stay in the pull request after an interrupt or a fault of the Hub; after
        any other error it is closed.
        """
        pull, self._pull = self._pull, None
        if pull is not None and not self._is_published:
            # The Hub may be what is at fault: then everything stays as it is.
            with contextlib.suppress(LoraMergeError):
                self._leave(pull, exc)
        self._held.close()

    def _leave(self, pull: PullRequest, exc: BaseException) -> None:
        if isinstance(exc, RESUMABLE) and not isinstance(exc, ChangedError):
            with contextlib.suppress(LoraMergeError):
                if not isinstance(exc, UnansweredError):
                    pull.send(is_last_try=True)
            n_kept = len({*self._finished, *pull.sent})
            if n_kept:
                exc.add_note(
                    f"run again with --resume to continue: {counted(n_kept, 'finished file')} kept in {pull.url}; "
                    "without --resume the run starts over"
                )
                return
        pull.close("The run failed, and nothing of it was merged.")


def _push_of(wish: Wish) -> Push:
    assert wish.push is not None
    return wish.push


def _check_room(nbytes: int) -> None:
    """Check that the disk of the spool has room.

    Raises:
        RequestError: it has not.
    """
    place = spool_place()
    free = shutil.disk_usage(place).free
    if free < nbytes:
        sentence = f"needs up to {size_text(nbytes)} in {place}, which has only {size_text(free)} free"
        hint = (
            "set TMPDIR to another disk, pass a smaller --spool-limit or --max-shard-size, or --upload stream"
        )
        raise RequestError("", 0, "spool_limit", sentence, hint=hint)
