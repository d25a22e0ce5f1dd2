"""Which file it is: what its storage says of it, which changes when the file does or when another takes its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when it was read, taken from the descriptor that it was read through.

    The time of change (ctime) belongs to the kernel: no program sets it back, as ``cp -p``, ``rsync -t`` and archives do
    with the time of modification. Another file under the same name has another inode.
    """

    device: int
    """``st_dev``. Some filesystems choose another at every mount: compare it within one run only."""

    inode: int
    """``st_ino``."""

    size: int
    """In bytes."""

    modified: int
    """``st_mtime_ns``: when its bytes were written last, in nanoseconds, or any value that a program has set."""

    changed: int
    """``st_ctime_ns``: when its bytes, name or mode changed last, in nanoseconds."""

    tag: str = ""
    """What a storage without inodes calls this version (an ETag, a generation); all but `size` is 0 there."""


Range = tuple[int, int]
"""``(first, end)``: bytes of a file, the one at ``end`` not included."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that a run reads, as it was when it was first opened."""

    identity: FileIdentity

    unsure: tuple[Range, ...] = ()
    """Bytes that may change later without a trace in the file's times, in order."""

    is_known: bool = True
    """False where the kernel does not say which bytes those are: then they are the ones that it has in memory."""

    is_local: bool = True
    """False for a filesystem that nothing is known about: it may give a file another inode when it is opened again."""

    def may_be(self, now: FileIdentity) -> bool:
        """Return True where a file may still be this one: same size and time of modification, and the same inode.

        The time of change is not compared: new links and modes change it, and the bytes stay the same.

        Example:
            >>> file = InputFile(FileIdentity(1, 2, 3, 4, 5))
            >>> file.may_be(FileIdentity(1, 2, 3, 4, 6)), file.may_be(FileIdentity(1, 7, 3, 4, 5))
            (True, False)
        """
        then = self.identity
        is_inode = (then.device, then.inode) == (now.device, now.inode)
        is_same = (then.size, then.modified, then.tag) == (now.size, now.modified, now.tag)
        # A filesystem that nothing is known of may give a file another inode at each opening.
        return is_same and (is_inode or not self.is_local)


@dataclass(frozen=True, slots=True)
class Place:
    """Some bytes of a file."""

    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run has read: which files, and the digests of what was found in them."""

    files: Mapping[str, InputFile] = field(default_factory=dict)
    """By path."""

    readings: Mapping[Place, str] = field(default_factory=dict)
    """The digest of the bytes of each place that was read."""

    def renewed(self, path: str, before: FileIdentity, after: FileIdentity) -> Inputs:
        """Return the inputs with a new identity for one file, if its old one is ``before``; else unchanged."""
        # The run's own hard links move the base's times of change; without this, its files would be read again.
        known = self.files.get(path)
        if known is None or known.identity != before:
            return self
        return replace(self, files={**self.files, path: replace(known, identity=after)})

    def with_readings(self, others: Mapping[Place, str]) -> Inputs:
        """Return the inputs with more digests; those of files that are not among `files` are left out."""
        own = {place: digest for place, digest in others.items() if place.file in self.files}
        return replace(self, readings={**self.readings, **own})
