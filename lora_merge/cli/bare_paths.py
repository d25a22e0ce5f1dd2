"""Paths without options: which is the base, which the adapter, and the command that was probably meant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from lora_merge.cli.advice import Advice, Reading
from lora_merge.cli.arguments import command_line
from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.formats.repo_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS, MLX_WEIGHTS
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.user_paths import is_directory, is_file

if TYPE_CHECKING:
    from collections.abc import Sequence

Sort = Literal["base", "adapter", "merged", "batch", "config", "folder", "repo", "url", "nothing"]

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_ADAPTER_FILES: Final = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE, MLX_WEIGHTS)

_SAID: Final[dict[Sort, str]] = {
    "base": "a base model",
    "adapter": "an adapter",
    "merged": "a merged checkpoint",
    "batch": "a batch file",
    "config": "a file of options",
    "folder": "a directory without a model",
    "url": "a place in an object store",
    "repo": "a Hub repo or a path that does not exist",
    "nothing": "a path that does not exist",
}


@dataclass(frozen=True, slots=True)
class _Bare:
    text: str
    sort: Sort


def about_bare_paths(texts: Sequence[str], read: Reading) -> Advice:
    """Return the answer to texts without an option: what each seems to be, and the command with options.

    Args:
        texts: the texts, in their order.
        read: the command line that they are in.
    """
    found = [_Bare(_folder(text), _sort(text)) for text in texts]
    listed = ", ".join(f"`{one.text}` looks like {_SAID[one.sort]}" for one in found)
    is_alone = len(found) == 1 and not any(word.name for word in read.words)
    hints = (_single(found[0]) if is_alone else ()) or (_meant(found, read),)
    return Advice(f"paths need an option here: {listed}", hints)


def looks_like_path(text: str) -> bool:
    """Return True for a text that is a path or a repo rather than a command."""
    return any(sign in text for sign in "/.~\\") or _sort(text) != "nothing"


def _meant(found: list[_Bare], read: Reading) -> str:
    """Return the command that was probably meant."""
    sorts = [one.sort for one in found]
    options = [text for word in read.words if word.name for text in word.tokens]
    given = {word.name for word in read.words}
    base, adapters, out = _roles(found, has_base="--base" in given, has_adapter="--adapter" in given)
    tokens = list(options)
    if base:
        tokens += ["--base", base]
    for adapter in adapters:
        tokens += ["--adapter", adapter]
    if not {"--adapter", "--config"} & {*given, *tokens}:
        tokens += ["--adapter", "ADAPTER"]
    if "config" in sorts:
        tokens = ["--config", next(one.text for one in found if one.sort == "config"), *options]
    if read.verb != "plan" and not {"-o", "--out"} & given and "config" not in sorts:
        tokens += ["-o", out or "merged"]
    return read.line(tokens)


def _single(one: _Bare) -> tuple[str, ...]:
    """Return what to do with one path alone; empty where only a merge makes sense."""
    match one.sort:
        case "adapter":
            merge, look = ["--adapter", one.text, "-o", "merged"], [one.text]
            return (
                f"{command_line('', merge)}  (to merge it)",
                f"{command_line('inspect', look)}  (to look at it)",
            )
        case "merged":
            return (command_line("verify", [one.text]),)
        case "batch":
            return (command_line("batch", [one.text]),)
        case "config":
            return (command_line("", ["--config", one.text]),)
    return ()


def _roles(found: list[_Bare], *, has_base: bool, has_adapter: bool) -> tuple[str, list[str], str]:
    """Return base, adapters and output among the paths: by what is there, then by their order."""
    base = "" if has_base else next((one.text for one in found if one.sort in {"base", "merged"}), "")
    adapters = [one.text for one in found if one.sort == "adapter"]
    left = [one.text for one in found if one.text not in {base, *adapters} and one.sort != "config"]
    needs_adapter = not (has_adapter or adapters)
    # Nothing that exists was recognised: the order of BASE ADAPTER OUT decides.
    if left and not base and not has_base and len(left) > needs_adapter:
        base = left.pop(0) if needs_adapter or _REPO.fullmatch(left[0]) or is_store_url(left[0]) else ""
    if left and needs_adapter:
        adapters = [left.pop(0)]
    return base, adapters, left[-1] if left else ""


def _folder(text: str) -> str:
    """Return the folder of a file of weights or of a configuration; any other text as it is."""
    path = Path(text)
    is_part = path.name in {*_ADAPTER_FILES, CONFIG_FILE} or path.suffix in {".safetensors", ".bin"}
    return str(path.parent) if is_part and "\0" not in text and is_file(path) else text


def _sort(text: str) -> Sort:
    """Return what is at a path, by the names of its files."""
    if "\0" in text or not text:
        return "nothing"
    if is_store_url(text):
        return "url"
    try:
        path = Path(_folder(text)).expanduser()
    except RuntimeError:  # ~name of a user who does not exist
        return "nothing"
    if is_directory(path):
        return _sort_of_folder(path)
    if is_file(path) and path.suffix in {".yaml", ".yml"}:
        return "batch" if _has_jobs(path) else "config"
    return "repo" if _REPO.fullmatch(text) and not text.startswith(".") else "nothing"


def _sort_of_folder(path: Path) -> Sort:
    """Return what is in a folder."""
    if any(is_file(path / name) for name in _ADAPTER_FILES):
        return "adapter"
    if is_file(path / MANIFEST_FILE):
        return "merged"
    if is_file(path / CONFIG_FILE):
        return "base"
    return "adapter" if any(is_file(one / ADAPTER_CONFIG) for one in _children(path)) else "folder"


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())[:100]
    except OSError:
        return []


def _has_jobs(path: Path) -> bool:
    """Return True for a YAML file with a key ``jobs`` at the beginning of a line."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(line.startswith("jobs:") for line in file.readlines(1 << 20))
    except OSError:
        return False
