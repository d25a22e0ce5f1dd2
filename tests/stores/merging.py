"""Merges for tests of stores: small bases, adapters for them, and what a merge on a disk makes of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.faults.trial import content

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.storage.objects import Store, StoreUrl


class Merge(NamedTuple):
    """A base with an adapter, and options of the merge."""

    base: Path
    adapter: Path
    options: dict[str, Any]

    def arguments(self, out: object, *more: str, base: object = "") -> list[str]:
        """Return the arguments of the command."""
        found = ["--base", str(base or self.base), "--adapter", str(self.adapter), "--out", str(out), *more]
        for name, value in self.options.items():
            found += [f"--{name.replace('_', '-')}", str(value)]
        return found


def bytes_of(store: Store) -> dict[str, bytes]:
    """Return every object below a folder of a store."""
    return {name: store.get(name) for name in store.entries()}


def on_disk(merge: Merge, root: Path, name: str) -> dict[str, bytes]:
    """Return what a merge on a disk makes, under an output's name."""
    from lora_merge import api

    root = root / "on disk"
    root.mkdir()
    api.merge(base=str(merge.base), adapter=str(merge.adapter), out=root / name, **merge.options)
    assert content(root / name)
    return {
        path.relative_to(root / name).as_posix(): path.read_bytes()
        for path in (root / name).rglob("*")
        if path.is_file()
    }


def name_of(url: StoreUrl) -> str:
    """Return the last step of a URL: the card of an output has it."""
    return url.prefix.rpartition("/")[2]
