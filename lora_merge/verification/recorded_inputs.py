"""Inputs of a merge as its manifest names them: where they probably are, and which are looked for at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.errors import ResolveError
from lora_merge.formats.trainer_files import chosen, file_names
from lora_merge.requests.values import parse_adapter
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.user_paths import is_directory, user_path
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from lora_merge.core.adapter import AdapterUse
    from lora_merge.core.report import Issue
    from lora_merge.formats.manifest import Manifest, RecordedInput


def check_asked(recorded: Iterable[RecordedInput]) -> None:
    """Check that no store would be asked only because a manifest names it: with the user's credentials.

    Raises:
        ResolveError: one would be.
    """
    for one in recorded:
        if is_store_url(one.path) and not one.path.startswith("file:"):
            raise ResolveError(f"{one.path}: is in an object store that only the manifest names")


def place_text(recorded: RecordedInput, near: Path) -> str:
    """Return where an input probably is: at the recorded path, from here or from beside the output; or its repo."""
    source = recorded.source()
    if source is not None:
        return str(source)
    beside = near / recorded.path
    return (
        str(beside) if not is_directory(user_path(recorded.path)) and is_directory(beside) else recorded.path
    )


def is_there(name: str, adapters: Sequence[str]) -> bool:
    """Return False for a recorded file that is gone. Files in repos are not looked for, and count as present."""
    roots = [user_path(parse_adapter(text)[0]) for text in adapters]
    return not all(map(is_directory, roots)) or any(chosen(file_names(root), [name]) for root in roots)


def weighted(text: str, weight: float) -> str:
    """Return an adapter as requests name it: with its weight, unless that is 1."""
    return text if weight == 1 else f"{text}:{weight!r}"


def other_adapters(manifest: Manifest | None, uses: Sequence[AdapterUse], *, named: bool) -> Iterable[Issue]:
    """Yield an error for each adapter whose digest differs from the recorded one."""
    if manifest is None:
        return
    then, now = manifest.adapters, uses
    if len(then) != len(now):
        sentence = f"{counted(len(now), 'adapter')} given, expected {len(then)} as in the manifest"
        yield error("other-adapter", "", sentence)
        return
    for recorded_one, use in zip(then, now, strict=True):
        if recorded_one.digest != use.adapter.digest:
            sentence = f"is not the adapter that was merged: its digest is {use.adapter.digest}, expected {recorded_one.digest}"
            hint = "" if named else "pass the adapter that was merged with --adapter"
            yield error("other-adapter", use.adapter.root, sentence, hint)
