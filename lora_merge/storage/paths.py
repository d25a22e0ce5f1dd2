"""Paths that do not exist: what the user may have meant."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_merge.storage.objects.urls import OTHER_SCHEMES, SHAPES
from lora_merge.storage.user_paths import is_directory
from lora_merge.words import choice

_URL = re.compile(
    r"(?:https?://)?(?P<host>huggingface\.co|hf\.co|(?:www\.)?modelscope\.(?:cn|ai)/models)/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<folder>.+))?)?/?"
)
"""Of a page of a repo: ``https://huggingface.co/org/name/tree/main/folder``."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

_READ_SCHEMES = (*SHAPES, "hf", "ms")

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def file_hint(path: Path) -> str:
    """Return what to do where a file was named and a folder is expected."""
    if path.suffix in _ARCHIVES:
        return "unpack it, and pass the unpacked folder"
    if path.suffix == ".gguf":
        return (
            "pass the Hugging Face folder or repo that it was converted from: GGUF is the format of llama.cpp"
        )
    return f"pass its folder: {path.parent}"


def missing_hint(text: str, role: str) -> str:
    """Return what the user may have meant by a path that does not exist, or else what is expected.

    Args:
        text: as the user wrote it.
        role: the option that it was given to, without ``--``.
    """
    return (
        _spelling_hint(text, role)
        or _near_hint(text)
        or "pass a directory, or a repo: org/name, org/name@revision, hf://name, ms://org/name; or a URL: s3://bucket/folder"
    )


def _spelling_hint(text: str, role: str) -> str:
    """Return what is wrong with how a path is written; empty where nothing is."""
    plain = text.strip()
    if plain != text:
        return f"remove the space at the start or end of the path: --{role} {plain!r}"
    spelt = next((hint for pattern, hint in _SPELLINGS if pattern.search(text)), "")
    # Pages first: their addresses begin with https://, which is a spelling too.
    return _page_hint(text, role) or spelt or _weight_hint(text)


_SPELLINGS = (
    (re.compile(r"^['\"\u201c\u2018]"), "remove the quotes: they are part of the path here"),
    (
        re.compile(rf"^({'|'.join(OTHER_SCHEMES)})://"),
        f"download it, and pass its folder; URLs that work begin with {choice([f'{one}://' for one in _READ_SCHEMES])}",
    ),
    (
        re.compile(rf"^({'|'.join(_READ_SCHEMES)})(:/?(?![/\d.+-])|//)"),
        "write :// behind the scheme; in Python pass a string, since pathlib removes one",
    ),
    (re.compile(r"\$\w|\$\{|%\w+%"), "write the whole path: shell variables are not expanded here"),
    (
        re.compile(r"^[A-Za-z]:[\\/]|\\"),
        "use / in paths; this is a Windows path (in WSL, C:\\x is /mnt/c/x)",
    ),
    (re.compile(r"[*?\[]"), "pass one folder: wildcards work in batch files only"),
    (re.compile(r"[/=]~"), "write ~ only at the start of a path, where it means the home directory"),
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
    return f"pass the repo instead of the web page: --{role} {scheme}{page['repo']}{folder}{at}"


def _weight_hint(text: str) -> str:
    """Return what is wrong with the weight behind an adapter's path (``path:0.5``); empty where the path is not a
    directory.
    """
    place, colon, weight = text.rpartition(":")
    return weight_hint(place, weight) if colon and is_directory(Path(place).expanduser()) else ""


def weight_hint(place: str, weight: str) -> str:
    """Return what is wrong with a weight.

    Args:
        place: the path or the URL before it.
        weight: the text behind the colon.

    Example:
        >>> weight_hint("my-lora", "0,5")
        'write the weight with a point: my-lora:0.5'
    """
    if _NUMBER.fullmatch(weight):
        return f"leave out :{weight}; only a merge takes weights of adapters"
    if re.fullmatch(r"[-+]?\d+,\d+", weight):
        return f"write the weight with a point: {place}:{weight.replace(',', '.')}"
    return f"write a number as the weight, such as {place}:0.5; {weight!r} is not a number"


def _near_hint(text: str) -> str:
    """Return folders with nearly the same name, or how far the path exists."""
    path = Path(text).expanduser()
    parent = path.parent
    try:
        if path.is_symlink():
            return f"repair the link: its target {path.readlink()} does not exist"
        names = [one.name for one in parent.iterdir() if is_directory(one)]
    except OSError:
        there = next((one for one in parent.parents if is_directory(one)), None)
        return f"check the path: only {there} exists" if there is not None and path.is_absolute() else ""
    near = difflib.get_close_matches(path.name, names, 3)
    return f"did you mean {choice([str(parent / name) for name in near])}?" if near else ""
