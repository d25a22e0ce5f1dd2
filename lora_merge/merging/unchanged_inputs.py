"""Are the inputs still what was read of them? By identity, and by their bytes where times cannot tell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.core.identity import Place
from lora_merge.core.plan import Copy
from lora_merge.storage.at_once import of_each
from lora_merge.storage.digests import file_digest, is_of_file, range_digest
from lora_merge.storage.input_files import changed
from lora_merge.storage.sources import identity_at, is_local, open_source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from lora_merge.core.identity import FileIdentity, InputFile, Inputs, Range
    from lora_merge.core.plan import MergePlan, Step
    from lora_merge.core.tensor import TensorRecord, TensorRef


_COMMIT = re.compile(r"/snapshots/[0-9a-f]{40}/")
"""In the path of a file in the Hub's cache."""


def check_names(inputs: Inputs) -> None:
    """Check that each input's name is still that of the file that was read: inode, size and time of modification are
    equal.

    Raises:
        ChangedError: a file has changed, or is gone.
    """
    for path, now in _identities(inputs.files).items():
        if not inputs.files[path].may_be(now):
            raise changed(path)


def _identities(paths: Iterable[str]) -> dict[str, FileIdentity]:
    """Return the version that each name means now. Another storage is asked for many at once.

    Raises:
        ChangedError: none has a name any more.
    """
    names = list(paths)
    far = [path for path in names if not is_local(path)]
    found = dict(zip(far, of_each(identity_at, far), strict=True)) if far else {}
    return {path: found.get(path) or identity_at(path) for path in names}


def check(inputs: Inputs, used: Mapping[Place, str], *, all_bytes: bool = False) -> None:
    """Check that the inputs still hold the bytes that were read.

    Bytes are read again only where their change could have left no trace: where a file's time of change has moved and
    nothing else (a new link, `chmod`, a backup; or a write whose time was set back), and where the file was unsure from the
    beginning (`storage.page_cache`). Where the kernel could not say which bytes are unsure, those are read again that it has
    in memory.

    Args:
        inputs: what was read, as it was noted.
        used: what else was read: the digest of each place.
        all_bytes: read everything again.

    Raises:
        ChangedError: one has changed, or is gone.
    """
    unsure = {
        path: _unsure(path, inputs.files[path], now, all_bytes=all_bytes)
        for path, now in _identities(inputs.files).items()
    }
    places: dict[str, list[tuple[Place, str]]] = {path: [] for path in inputs.files}
    for place, digest in (*inputs.readings.items(), *used.items()):
        if place.file in places:
            places[place.file].append((place, digest))
    for path, file in inputs.files.items():
        # Where the kernel cannot say which pages are dirty, only pages in memory can hold a change that no
        # time shows, so the disk is not read for it.
        cached_only = not (unsure[path] or file.is_known)
        ranges = ((0, file.identity.size),) if cached_only else unsure[path]
        wanted = [one for one in places[path] if _meet(one[0], ranges)]
        if wanted:
            _compare(path, wanted, cached_only=cached_only)
    check_names(inputs)


def _unsure(path: str, file: InputFile, now: FileIdentity, *, all_bytes: bool) -> tuple[Range, ...]:
    """Return the byte ranges of a file that have to be read again.

    Raises:
        ChangedError: another file has the name.
    """
    if not file.may_be(now):
        raise changed(path)
    return ((0, now.size),) if now != file.identity or all_bytes else file.unsure


def _meet(place: Place, ranges: Iterable[Range]) -> bool:
    return any(start < place.start + place.nbytes and place.start < end for start, end in ranges)


def _compare(path: str, places: Sequence[tuple[Place, str]], *, cached_only: bool) -> None:
    """Read places of a file again, and compare their digests.

    Raises:
        ChangedError: one has other bytes.
    """
    with open_source(path) as source:
        for place, digest in sorted(places, key=lambda one: one[0].start):
            found = range_digest(source, place.start, place.nbytes, cached_only=cached_only)
            if found is not None and found != digest:
                raise changed(path)


def used_by(steps: Iterable[Step], records: Iterable[TensorRecord]) -> dict[Place, str]:
    """Return the places of the inputs that some steps have read, each with the digest of the bytes found there."""
    by_name = {record.name: record for record in records}
    found = {}
    for step in steps:
        record = by_name.get(step.main.name)
        if record is not None:
            for source, digest in sources_of(step, record):
                found[Place(source.file, source.start, source.nbytes)] = digest
    return found


def sources_of(step: Step, record: TensorRecord) -> list[tuple[TensorRef, str]]:
    """Return the stored tensors that a step read, each with the digest of its bytes as they were read."""
    # A copy's record has one digest, which is that of its source.
    if is_of_file(record.digest):
        return []
    digests = dict.fromkeys(step.reads, record.digest) if isinstance(step.op, Copy) else record.source
    return [(ref, digests.get(role, "")) for role, ref in step.reads.items()]


def check_copied(inputs: Inputs, plan: MergePlan, root: Path) -> None:
    """Check that side files which planning has read are copied with the same bytes. The config is skipped where it is
    patched.

    Args:
        inputs: what was read.
        plan: of the merge.
        root: the directory of the copies.

    Raises:
        ChangedError: a copy has other bytes.
    """
    for file in plan.side_files:
        known = inputs.readings.get(Place(file.source, 0, file.nbytes))
        is_patched = plan.config_patch.changes(file.name)
        if known is not None and not is_patched and file_digest(root / file.name) != known:
            raise changed(file.source)


def changed_times(inputs: Inputs) -> dict[str, int]:
    """Return the ctime of each input, in nanoseconds, of those where every later change must show in it."""
    return {
        path: file.identity.changed
        for path, file in inputs.files.items()
        if file.is_known and not file.unsure
    }


def lasting(inputs: Inputs) -> list[tuple[object, ...]]:
    """Return what of the inputs has to be equal for a run to resume another, perhaps on another day.

    Devices get other numbers with a restart, inodes with a mount of what is not local, and the time of change moves with
    each link: none of these is asked for.
    """
    whole = {place.file: digest for place, digest in inputs.readings.items() if _is_whole(place, inputs)}
    return sorted(
        (
            path,
            # Inodes of what is not local change with each mount.
            file.identity.inode if file.is_local else 0,
            file.identity.size,
            file.identity.modified,
            file.identity.tag,
            whole.get(path, ""),
        )
        for path, file in inputs.files.items()
    )


def portable(inputs: Inputs, adapters: Collection[str]) -> list[tuple[object, ...]]:
    """Return what of the inputs has to be equal for a run on another machine to go on: names, sizes and versions.

    A file that was read whole is known by its digest, and one of the Hub's cache by the commit in its path. Of other local files
    the time of modification counts, as ``cp -p`` and shared filesystems keep it.

    Args:
        inputs: of the run.
        adapters: the adapters' files, whose digests count.
    """
    whole = {place.file: digest for place, digest in inputs.readings.items() if _is_whole(place, inputs)}
    found: list[tuple[object, ...]] = []
    for path, file in sorted(inputs.files.items()):
        if path in adapters:
            continue
        known = whole.get(path) or file.identity.tag
        modified = 0 if known or _COMMIT.search(path) else file.identity.modified
        found.append((path, file.identity.size, modified, known))
    return found


def _is_whole(place: Place, inputs: Inputs) -> bool:
    file = inputs.files.get(place.file)
    return file is not None and (place.start, place.nbytes) == (0, file.identity.size)
