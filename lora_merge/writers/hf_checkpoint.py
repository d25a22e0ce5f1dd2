"""A Hugging Face checkpoint in a directory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, patched_config
from lora_merge.core.provenance import Provenance, card_text, manifest_text
from lora_merge.core.stretches import whole_copies
from lora_merge.errors import CheckpointError
from lora_merge.io import files
from lora_merge.io.safetensors import has_header, reserve
from lora_merge.io.side_files import CARD_FILE, MANIFEST_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.stretches import Stretch
    from lora_merge.core.tensor import TensorRecord, TensorRef


class HfCheckpoint:
    """A Hugging Face checkpoint in a directory: reserve it, fill its slots in any order, seal it.

    Slots may be filled from several threads. It holds names only, so it travels to a worker as it is.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._linked: frozenset[str] = frozenset()
        self._kept: frozenset[str] = frozenset()

    def keep(self, plan: MergePlan, names: Collection[str]) -> frozenset[str]:
        """Keep those of some files that are the plan's by size and header; remove everything else.

        A file with a second name is not kept: it is the base's own, and nothing may be written to it.

        Raises:
            WriteError: something cannot be removed.
        """
        kept = {file.name for file in plan.files if file.name in names and self._is_begun(file)}
        try:
            for directory, folders, found in os.walk(self._root, topdown=False):
                for path in (Path(directory, name) for name in (*found, *folders)):
                    if path.is_dir() and not path.is_symlink():
                        if not any(path.iterdir()):
                            path.rmdir()
                    elif path.relative_to(self._root).as_posix() not in kept:
                        path.unlink()
        except OSError as exc:
            raise files.write_error(self._root, exc) from exc
        self._kept = frozenset(kept)
        return self._kept

    def _is_begun(self, file: OutputFile) -> bool:
        """Return True where a file of the plan is there, a plain one with its header."""
        path = self._root / file.name
        try:
            status = path.lstat()
            return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and has_header(path, file)
        except (OSError, CheckpointError):
            return False

    def link(self, plan: MergePlan, how: Literal["reflink", "hard"]) -> dict[str, str]:
        """Let files that nothing changes share their bytes with the base's; they are full from then on.

        Args:
            how: ``reflink``, where the filesystem can share blocks until one of the two files changes; ``hard``,
                a second name of the same file.

        Returns:
            The files of which the disk makes no such link, each with the reason; they are filled as others are.

        Raises:
            CheckpointError: a file of the base cannot be read.
            WriteError: a directory cannot be made.
        """
        linked, refused = [], {}
        sources = whole_copies(plan)
        for file in plan.files:
            if file.name in self._kept or file.name not in sources:
                continue
            if not has_header(Path(sources[file.name]), file):
                continue
            try:
                files.link(Path(sources[file.name]), self._placed(file.name), how)
            except OSError as exc:
                refused[file.name] = exc.strerror or str(exc)
            else:
                linked.append(file.name)
        self._linked = frozenset(linked)
        return refused

    def reserve(self, plan: MergePlan) -> None:
        """Create every weight file that is neither linked nor kept, at its full size.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        for file in plan.files:
            if file.name not in self._linked | self._kept:
                reserve(self._placed(file.name), file)

    def _placed(self, name: str) -> Path:
        """Return the path of a file, its directory made."""
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise files.write_error(path, exc) from exc
        return path

    def copy(self, stretch: Stretch) -> None:
        """Fill the slots of a stretch with the bytes of its sources, unless their file is linked.

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        source, slot = stretch.sources[0], stretch.slots[0]
        if slot.file in self._linked:
            return
        target = self._root / slot.file
        labels = (source.file, str(target))
        with files.open_for_reading(source.file) as source_fd, files.open_for_writing(target) as fd:
            files.copy_range(source_fd, source.start, stretch.nbytes, fd, slot.start, labels)

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes the next bytes of the slot.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        target = self._root / slot.file
        with files.open_for_writing(target) as fd:
            stream = files.Stream(fd, slot.start, target)
            yield stream.write
            stream.finish()

    def seal(self, plan: MergePlan, records: Sequence[TensorRecord], provenance: Provenance) -> None:
        """Write what goes around the weights: index, config, side files, card and manifest.

        Raises:
            CheckpointError: a side file cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        for side_file in plan.side_files:
            target = self._root / side_file.name
            if side_file.name == CONFIG_FILE and plan.config_patch:
                config = patched_config(files.read_json(Path(side_file.source)), plan.config_patch)
                files.write_text(target, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            else:
                files.copy_file(Path(side_file.source), target)
        if plan.index:
            files.write_text(self._root / INDEX_FILE, plan.index)
        files.write_text(self._root / CARD_FILE, card_text(provenance, plan))
        names = [file.name for file in plan.side_files] + ([INDEX_FILE] if plan.index else [])
        digests = {name: files.file_digest(self._root / name) for name in names}
        files.write_text(self._root / MANIFEST_FILE, manifest_text(provenance, plan, records, digests))
