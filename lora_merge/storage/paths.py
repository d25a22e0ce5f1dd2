"""Paths that lead nowhere: what the user may have meant."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_merge.storage.user_paths import is_directory
from lora_merge.words import choice

_URL = re.compile(
    r"(?:https?://)?(?P<host>huggingface\.co|hf\.co|(?:www\.)?modelscope\.(?:cn|ai)/models)/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<folder>.+))?)?/?"
)
"""Of a page of a repo: ``https://huggingface.co/org/name/tree/main/folder``."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def file_hint(path: Path) -> str:
    """Return what to do where a file was named and a folder is expected."""
    if path.suffix in _ARCHIVES:
        return "unpack it, and name the folder that comes out"
    if path.suffix == ".gguf":
        return (
            "GGUF is the format of llama.cpp; name the Hugging Face folder or repo that it was converted from"
        )
    return f"name the folder that it is in: {path.parent}"


def missing_hint(text: str, role: str) -> str:
    """Return what a path that leads nowhere may have been meant for, or else what is expected.

    Args:
        text: as the user wrote it.
        role: the option that it was given to, without ``--``.
    """
    return (
        _spelling_hint(text, role)
        or _near_hint(text)
        or ("name a directory, or a repo: org/name, org/name@revision, hf://name, ms://org/name")
    )


def _spelling_hint(text: str, role: str) -> str:
    """Return what is wrong with how a path is written; empty where nothing is."""
    plain = text.strip()
    if plain != text:
        return f"the path begins or ends with a space: --{role} {plain!r} has none"
    spelt = next((hint for pattern, hint in _SPELLINGS if pattern.search(text)), "")
    return _page_hint(text, role) or spelt or _weight_hint(text)


_SPELLINGS = (
    (re.compile(r"^['\"\u201c\u2018]"), "the quotes are part of the path: leave them out"),
    (
        re.compile(r"^(https?|s3|gs|file|oss)://"),
        "download it, and name its folder; of addresses only hf:// and ms:// are known",
    ),
    (re.compile(r"\$\w|\$\{|%\w+%"), "variables are not filled in here: write the path out"),
    (
        re.compile(r"^[A-Za-z]:[\\/]|\\"),
        "this is a path of Windows; here a path has / (in WSL, C:\\x is /mnt/c/x)",
    ),
    (re.compile(r"[*?\[]"), "wildcards are known in batch files only: name one folder"),
    (re.compile(r"[/=]~"), "~ is the home directory only where the path begins with it"),
)
"""Texts that are written for another program or shell, each with what to do."""


def _page_hint(text: str, role: str) -> str:
    """Return the repo of a web page's address, as a text for the option; empty for any other text."""
    page = _URL.fullmatch(text)
    if page is None:
        return ""
    scheme = "ms://" if "modelscope" in page["host"] else ""
    folder = f"/{page['folder']}" if page["folder"] else ""
    at = f"@{page['revision']}" if page["revision"] else ""
    return f"this is the address of a page; write the repo: --{role} {scheme}{page['repo']}{folder}{at}"


def _weight_hint(text: str) -> str:
    """Return what is wrong with the weight behind an adapter's path (``path:0.5``); empty where the path is not a
    directory.
    """
    place, colon, weight = text.rpartition(":")
    if not colon or not is_directory(Path(place).expanduser()):
        return ""
    if _NUMBER.fullmatch(weight):
        return f"only a merge weighs adapters: leave :{weight} out"
    if re.fullmatch(r"[-+]?\d+,\d+", weight):
        return f"a weight has a point: {place}:{weight.replace(',', '.')}"
    return f"{weight!r} is not a weight; write a number, such as {place}:0.5"


def _near_hint(text: str) -> str:
    """Return folders with nearly the same name, or how far the path exists."""
    path = Path(text).expanduser()
    parent = path.parent
    try:
        if path.is_symlink():
            return f"it is a link to {path.readlink()}, which is not there"
        names = [one.name for one in parent.iterdir() if is_directory(one)]
    except OSError:
        there = next((one for one in parent.parents if is_directory(one)), None)
        return f"the path leads as far as {there}" if there is not None and path.is_absolute() else ""
    near = difflib.get_close_matches(path.name, names, 3)
    return f"did you mean {choice([str(parent / name) for name in near])}?" if near else ""
