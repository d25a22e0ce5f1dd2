"""A Hugging Face checkpoint in a directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, patched_config
from lora_merge.core.provenance import Provenance, card_text, manifest_text
from lora_merge.core.stretches import whole_copies
from lora_merge.errors import CheckpointError, WriteError
from lora_merge.io.safetensors import has_header, reserve
from lora_merge.io.side_files import CARD_FILE, MANIFEST_FILE
from lora_merge.io.small_files import read_json
from lora_merge.storage.copying import CopyTarget
from lora_merge.storage.digests import file_digest, text_digest
from lora_merge.storage.local import LocalSource
from lora_merge.storage.sources import open_source
from lora_merge.storage.writing import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from lora_merge.core.checkpoint import SideFile
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.stretches import Stretch
    from lora_merge.core.tensor import TensorRecord, TensorRef
    from lora_merge.io.folder import Folder
    from lora_merge.storage.sources import Source


class HfCheckpoint:
    """A Hugging Face checkpoint in a directory: reserve it, fill its slots in any order, seal it.

    Slots may be filled from several threads. It holds names only, so it travels to a worker as it is.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._linked: frozenset[str] = frozenset()
        self._kept: frozenset[str] = frozenset()

    def keep(self, plan: MergePlan, names: Collection[str]) -> frozenset[str]:
        """Keep those of some files that are the plan's by size and header; remove everything else.

        A link, a file with a second name and another user's file are not kept: nothing may be written to them.

        Raises:
            WriteError: something cannot be removed.
        """
        kept = {file.name for file in plan.files if file.name in names and self._is_begun(file)}
        self._folder.clear(kept)
        self._kept = frozenset(kept)
        return self._kept

    def _is_begun(self, file: OutputFile) -> bool:
        """Return True where a file of the plan is there, a plain one with its header."""
        try:
            with self._folder.writing(file.name) as fd:
                return has_header(LocalSource(str(self._folder.path / file.name), fd), file)
        except (WriteError, CheckpointError):
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
            with open_source(sources[file.name]) as source:
                if source.fd is None or not has_header(source, file):
                    continue
            try:
                self._folder.link(Path(sources[file.name]), file.name, how)
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
                reserve(self._folder, file)

    @contextlib.contextmanager
    def copying(self, stretch: Stretch, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes the next bytes of a stretch, unless their file is linked and has them.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        start, slot = stretch.sources[0].start, stretch.slots[0]
        if slot.file in self._linked:
            yield lambda _: None
            return
        with self._folder.writing(slot.file) as fd:
            label = str(self._folder.path / slot.file)
            yield CopyTarget(source, start, stretch.nbytes, fd, slot.start, label).write

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that writes the next bytes of the slot.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        with self._folder.writing(slot.file) as fd:
            stream = Stream(fd, slot.start, self._folder.path / slot.file)
            yield stream.write
            stream.finish()

    def seal(
        self, plan: MergePlan, records: Sequence[TensorRecord], provenance: Provenance
    ) -> dict[str, str]:
        """Write what goes around the weights: index, config, side files, card and manifest.

        Returns:
            The digest of each file, taken of what it is made from: a text, or the file that is copied. Whether the disk
            holds that is for verification to say.

        Raises:
            CheckpointError: a side file cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        digests: dict[str, str] = {}
        for side_file in plan.side_files:
            text = _patched(plan, side_file)
            if text is not None:
                digests[side_file.name] = self._write(side_file.name, text)
            else:
                digests[side_file.name] = self._folder.copy_in(Path(side_file.source), side_file.name)
        if plan.index:
            digests[INDEX_FILE] = self._write(INDEX_FILE, plan.index)
        manifest = manifest_text(provenance, plan, records, digests)
        around = {CARD_FILE: card_text(provenance, plan), MANIFEST_FILE: manifest}
        return digests | {name: self._write(name, text) for name, text in around.items()}

    def _write(self, name: str, text: str) -> str:
        """Write a file, and return the digest of what it should hold."""
        self._folder.write_text(name, text)
        return text_digest(text)


def side_digest(plan: MergePlan, side_file: SideFile) -> str:
    """Return the digest of a side file as the output has it.

    Raises:
        CheckpointError: its source cannot be read.
    """
    text = _patched(plan, side_file)
    return file_digest(Path(side_file.source)) if text is None else text_digest(text)


def _patched(plan: MergePlan, side_file: SideFile) -> str | None:
    """Return the text of a configuration that the output changes; None for a file that is copied as it is.

    Raises:
        CheckpointError: its source cannot be read.
    """
    if side_file.name != CONFIG_FILE or not plan.config_patch:
        return None
    config = patched_config(read_json(Path(side_file.source)), plan.config_patch)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
