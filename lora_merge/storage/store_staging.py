"""Staging of an output in a store: whose run it is, and the evidence of each finished file. It is beside the output.

``run.json`` is the lock, and is made only where there is none. ``files/NAME.json`` comes after the file NAME has its name.
``sealed.json`` comes when only ``config.json`` is left to write. A store frees no lock when a process ends, so a run
that finds one says whose it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_merge.errors import WriteError
from lora_merge.storage.at_once import of_each
from lora_merge.storage.evidence import evidence_of, evidence_text
from lora_merge.storage.objects import store_at
from lora_merge.storage.objects.store import AlreadyThereError
from lora_merge.storage.objects.urls import StoreUrl
from lora_merge.storage.replaceable import SUFFIX
from lora_merge.words import duration_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from contextlib import AbstractContextManager

    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.evidence import Finished
    from lora_merge.storage.objects.store import FileSink, Receipt, Store

RUN, SEALED, FILES = "run.json", "sealed.json", "files/"
"""Names in staging: the lock, the mark of an output that lacks its configuration only, and the folder of evidence."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Run:
    """Whose staging it is: the content of ``run.json``."""

    merge: str
    """The fingerprint of the merge."""

    process: int
    host: str
    time: float
    """When it was begun, in seconds since 1970."""

    old: tuple[str, ...] = ()
    """Files that had the output's prefix when it began, and go when it is complete."""

    is_ended: bool = False
    """True where the run says that it has ended: it failed or was interrupted, and left what it had finished."""

    told: Mapping[str, str] = field(default_factory=dict)
    """What the merge is, in words (`Wish.told`)."""

    @classmethod
    def here(cls, merge: str, told: Mapping[str, str], old: Collection[str] = ()) -> Run:
        """Return the run of this process."""
        return cls(merge, os.getpid(), os.uname().nodename, time.time(), tuple(sorted(old)), told=told)

    def text(self) -> bytes:
        """Return it as ``run.json`` has it."""
        table = {
            "staging": _VERSION,
            "merge": self.merge,
            "process": self.process,
            "host": self.host,
            "time": self.time,
            "old": list(self.old),
            "ended": self.is_ended,
            "told": dict(self.told),
        }
        return json.dumps(table).encode()

    @classmethod
    def parsed(cls, content: bytes) -> Run | None:
        """Return the run that a ``run.json`` names; None where it is of another release, or broken."""
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            table = json.loads(content)
            if table["staging"] == _VERSION:
                return cls(
                    str(table["merge"]),
                    int(table["process"]),
                    str(table["host"]),
                    float(table["time"]),
                    tuple(map(str, table["old"])),
                    table["ended"] is True,
                    {str(key): str(value) for key, value in table.get("told", {}).items()},
                )
        return None

    @property
    def who(self) -> str:
        """Process, host and age, in words."""
        gone = ", which does not run any more" if self.is_gone else ""
        age = duration_text(max(time.time() - self.time, 0))
        return f"process {self.process} on {self.host}{gone}, begun {age} ago"

    @property
    def is_gone(self) -> bool:
        """True where it was a process of this machine, and there is none of this number now."""
        if self.host != os.uname().nodename:
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def other_than(self, told: Mapping[str, str]) -> str:
        """Return how its merge differs from another one, in words.

        Args:
            told: the other merge.

        Example:
            >>> Run("", 1, "a", 0, told={"base": "x", "--dtype": "float32"}).other_than({"base": "y"})
            'its base is x, here y; its --dtype is float32, here not given'
        """
        if not self.told:
            return "it has other inputs, options or versions"
        here = {key: told.get(key, "not given") for key in {**told, **self.told}}
        there = {key: self.told.get(key, "not given") for key in here}
        found = [f"its {key} is {there[key]}, here {here[key]}" for key in here if there[key] != here[key]]
        return "; ".join(found) or "its inputs had another content"


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """Where whole files of an output in a store go, as workers see it (`storage.destination.FilePlace`)."""

    url: StoreUrl
    """Of the output."""

    merge: str
    """The fingerprint of the run."""

    def file(self, name: str, nbytes: int) -> AbstractContextManager[FileSink]:
        """Begin a file; it appears when the block ends without an error.

        Raises:
            WriteError: the store refused it.
        """
        return store_at(self.url).file(name, nbytes)

    def note(self, file: str, receipt: Receipt, records: Sequence[TensorRecord]) -> None:
        """Put the evidence of a file into staging.

        Raises:
            WriteError: the store refused it.
        """
        store_at(beside(self.url)).put(f"{FILES}{file}.json", evidence_text(self.merge, receipt, records))


def beside(url: StoreUrl) -> StoreUrl:
    """Return the URL of an output's staging."""
    return StoreUrl(url.scheme, url.bucket, url.prefix + SUFFIX)


class StoreStaging:
    """The staging of one output.

    Args:
        url: of the output.
    """

    def __init__(self, url: StoreUrl) -> None:
        self._url = beside(url)

    @property
    def _store(self) -> Store:
        return store_at(self._url)

    def __str__(self) -> str:
        return str(self._url)

    def run(self) -> Run | None:
        """Return whose staging it is; None where there is none.

        Raises:
            WriteError: it cannot be read, or is of another release.
        """
        if self._store.entry(RUN) is None:
            return None
        found = Run.parsed(self._store.get(RUN))
        if found is None:
            raise WriteError(
                f"{self._url}/{RUN}: was not written by this release of lora-merge",
                hint=f"delete {self._url}/ if no run uses it, or choose another --out",
            )
        return found

    def lock(self, run: Run) -> bool:
        """Begin staging for a run; return False where there is one already.

        Raises:
            WriteError: the store refused it.
        """
        try:
            self._store.put(RUN, run.text(), create=True)
        except AlreadyThereError:
            return False
        return True

    def take_over(self, run: Run) -> None:
        """Write another run into ``run.json``.

        Raises:
            WriteError: the store refused it.
        """
        self._store.put(RUN, run.text())

    def seal(self, old: Collection[str]) -> None:
        """Mark that only the configuration is left to write.

        Args:
            old: files of an older output that go after it.

        Raises:
            WriteError: the store refused it.
        """
        self._store.put(SEALED, json.dumps(sorted(old)).encode())

    def unseal(self) -> None:
        """Remove that mark.

        Raises:
            WriteError: the store refused it.
        """
        self._store.delete([SEALED])

    def sealed(self) -> list[str] | None:
        """Return the files that go after the configuration is written; None where the mark is not there.

        Raises:
            WriteError: the store cannot be asked.
        """
        if self._store.entry(SEALED) is None:
            return None
        try:
            return list(map(str, json.loads(self._store.get(SEALED))))
        except ValueError:
            return None

    def finished(self, merge: str) -> list[Finished]:
        """Return the evidence of the files that runs of a merge have finished.

        Raises:
            WriteError: it cannot be read.
        """
        entries = self._store.entries()
        names = sorted(name for name in entries if name.startswith(FILES) and name.endswith(".json"))
        # All at once: each answer takes as long as the way to the store and back.
        found = zip(names, of_each(self._store.get, names), strict=True)
        read = [evidence_of(_file_of(name), content, merge) for name, content in found]
        return [one for one in read if one is not None]

    def n_finished(self) -> int:
        """Return the number of files that have evidence.

        Raises:
            WriteError: the store cannot be asked.
        """
        return sum(name.startswith(FILES) for name in self._store.entries())

    def forget(self, files: Iterable[str]) -> None:
        """Remove the evidence of some files.

        Raises:
            WriteError: the store refused it.
        """
        self._store.delete([f"{FILES}{file}.json" for file in files])

    def clear(self) -> None:
        """Remove everything in staging: the evidence, then the lock, then the mark.

        Raises:
            WriteError: the store refused it.
        """
        names = self._store.entries().keys()
        # Without the mark, a configuration beside a lock would be taken for that of an older output.
        for some in (names - {RUN, SEALED}, names & {RUN}, names & {SEALED}):
            self._store.delete(sorted(some))
        self._store.remove_folder()


def _file_of(name: str) -> str:
    """Return the file that a piece of evidence in staging is about."""
    return name.removeprefix(FILES).removesuffix(".json")
