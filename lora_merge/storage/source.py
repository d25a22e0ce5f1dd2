"""Texts that name a repo on a hub, such as ``org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Host = Literal["hf", "ms"]

HOST_NAMES: dict[Host, str] = {"hf": "Hugging Face", "ms": "ModelScope"}

_DEFAULT_BRANCH: dict[Host, str] = {"hf": "main", "ms": "master"}

_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_NAME}", re.ASCII)

_UNREAD = re.compile(
    r"(?P<parent>.+?)[-_.](?:(?:I?Q\d\w*-)?(?P<gguf>GGUF)"
    r"|(?P<kind>HQQ|AQLM|EXL[23]|VPTQ|SpQR|HIGGS|EETQ|SINQ|Quanto|QuIP#?|FP-?Quant)(?:[-_.].+)?)",
    re.IGNORECASE,
)
"""How repos of weights are called that are quantised in a way that is not read: ``…-GGUF``, ``…-Q4_K_M-GGUF``,
``…-HQQ-4bit``, ``…-exl2``. Other names say nothing: a repo's configuration does."""


_FILE = re.compile(r"hf://(?P<repo>[^@]+)@(?P<commit>[0-9a-f]{40})/(?P<name>.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of a repo at a revision, as the user asked for it."""

    host: Host
    repo: str
    """``org/name``; old repos of the Hub are only ``name``."""

    folder: str = ""
    """Inside the repo, without slashes at its ends; empty for the repo itself."""

    revision: str | None = None
    """Branch, tag or commit as asked for; None for the default branch."""

    explicit: bool = True
    """False for a text without ``hf://`` or ``ms://``, which may also be meant as a local path."""

    def __str__(self) -> str:
        """Return the text that parses to this source."""
        # Without an owner only the scheme tells a repo from a path, and without a scheme the host is the Hub.
        scheme = f"{self.host}://" if self.host != "hf" or "/" not in self.repo else ""
        place = f"{self.repo}/{self.folder}" if self.folder else self.repo
        return f"{scheme}{place}@{self.revision}" if self.revision else f"{scheme}{place}"

    @property
    def wanted(self) -> str:
        """The revision, or the name of the host's default branch."""
        return self.revision or _DEFAULT_BRANCH[self.host]


@dataclass(frozen=True, slots=True)
class Origin:
    """A source with the commit that its revision meant when it was fetched."""

    source: Source

    commit: str = ""
    """Empty for ModelScope, which does not tell."""

    def to_json(self) -> dict[str, object]:
        """Return the table that the manifest has for it."""
        source = self.source
        table: dict[str, object] = {"hub": HOST_NAMES[source.host], "id": source.repo}
        if source.folder:
            table["folder"] = source.folder
        return table | {"revision": source.revision, "commit": self.commit or None}


def parse_source(text: str) -> Source | None:
    """Return the repo that a text names; None when the text can only be a local path.

    Example:
        >>> parse_source("org/name/checkpoint-9@v1")
        Source(host='hf', repo='org/name', folder='checkpoint-9', revision='v1', explicit=False)
        >>> str(parse_source("ms://org/name")), str(parse_source("hf://gpt2"))
        ('ms://org/name', 'hf://gpt2')
        >>> parse_source("./name"), parse_source("/models/name"), parse_source("name"), parse_source("a/../b")
        (None, None, None, None)
    """
    scheme, found, rest = text.partition("://")
    host: Host = "hf"
    if not found:
        rest = text
    elif scheme in HOST_NAMES:
        host = "ms" if scheme == "ms" else "hf"
    else:
        return None
    place, at, revision = rest.partition("@")
    parts = place.split("/")
    # ``hf://gpt2``: only with a scheme may a repo have no owner; a bare name is a path.
    owners = 1 if found and host == "hf" and len(parts) == 1 else 2
    repo, folder = parts[:owners], parts[owners:]
    if len(repo) < owners or (at and not _is_revision(revision)):
        return None
    if not all(_REPO.fullmatch(part) for part in repo) or any(part in {"", ".", ".."} for part in folder):
        return None
    return Source(host, "/".join(repo), "/".join(folder), revision or None, bool(found))


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repo of the Hugging Face Hub at a commit, which is read by ranges: what `TensorRef.file` has of it."""

    repo: str
    commit: str
    name: str
    """In the repo, with slashes."""

    def __str__(self) -> str:
        """Return the text that parses to this file."""
        return f"hf://{self.repo}@{self.commit}/{self.name}"


def parse_hub_file(text: str) -> HubFile | None:
    """Return the file that a text names; None for any other text.

    Example:
        >>> parse_hub_file("hf://org/name@" + "a" * 40 + "/model.safetensors").name, parse_hub_file("hf://org/name")
        ('model.safetensors', None)
    """
    found = _FILE.fullmatch(text)
    return None if found is None else HubFile(found["repo"], found["commit"], found["name"])


def is_hub_text(text: str) -> bool:
    """Return True for the text of a file, or a folder, of a repo at a commit."""
    return _FILE.match(f"{text}/.") is not None


def unread_kind(repo: str) -> tuple[str, str] | None:
    """Return how a repo is quantised whose weights are not read, and its probable full-precision parent, by its name.

    Example:
        >>> unread_kind("ggml-org/Qwen3-8B-Q4_K_M-GGUF"), unread_kind("org/Llama-3-8B-HQQ-4bit")
        (('GGUF', 'ggml-org/Qwen3-8B'), ('HQQ', 'org/Llama-3-8B'))
        >>> unread_kind("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit"), unread_kind("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4")
        (None, None)
    """
    owner, slash, name = repo.rpartition("/")
    match = _UNREAD.fullmatch(name)
    return None if match is None else (match["gguf"] or match["kind"], f"{owner}{slash}{match['parent']}")


def _is_revision(text: str) -> bool:
    """Return True for a text that Git allows as a branch, a tag or a commit."""
    return bool(re.fullmatch(r"[\w.+/-]+", text)) and ".." not in text and text[0] not in "/-."
