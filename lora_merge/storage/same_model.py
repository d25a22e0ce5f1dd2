"""Do two names mean the same model? Judged by the names alone: repos, paths from training, local folders.

Copies in another storage are the same model (``unsloth/…-bnb-4bit``), a base and its instruct version are two. A name that
tells nothing (``./base``, ``checkpoint-500``) is never held against another.
"""

from __future__ import annotations

import re

_CACHED = re.compile(r"(?:^|/)models--(?P<repo>[^/]+)(?:/snapshots/(?P<commit>[^/]+))?")
"""A directory in the cache of huggingface_hub: ``models--org--name/snapshots/COMMIT``."""

_PASSED_OVER = re.compile(
    r"(checkpoint|epoch|step|global_step)[-_]?\d+|[0-9a-f]{32,}|snapshots|main|master|hf|original|safetensors"
)
"""Folders that hold a model without being named after it."""

_TELLS_NOTHING = frozenset(
    {
        "base",
        "model",
        "models",
        "base_model",
        "basemodel",
        "checkpoint",
        "checkpoints",
        "ckpt",
        "weights",
        "merged",
        "output",
        "outputs",
        "out",
        "final",
        "final_model",
        "best",
        "last",
        "latest",
        "pretrained",
        "tmp",
        "sft",
        "data",
        "llm",
        "local",
        "parent",
    }
)

_FOLDERS = _TELLS_NOTHING | {
    "cache",
    "runs",
    "results",
    "saves",
    "saved_models",
    "base_models",
    "llms",
    "work",
    "home",
}
"""First parts of paths such as ``models/llama``, which is not a repo of an owner."""

_QUANTISED = frozenset(
    {
        "bnb",
        "4bit",
        "8bit",
        "6bit",
        "5bit",
        "3bit",
        "2bit",
        "awq",
        "gptq",
        "gguf",
        "exl2",
        "int4",
        "int8",
        "fp4",
        "fp8",
        "nf4",
        "nvfp4",
        "mxfp4",
        "mxfp8",
        "w4a16",
        "w8a8",
        "w8a16",
        "quantized",
        "marlin",
    }
)
"""Words that say that a copy is stored quantised."""

_STORAGES = _QUANTISED | {
    "hf",
    "unsloth",
    "mlx",
    "bit",
    "fp16",
    "fp32",
    "bf16",
    "float16",
    "float32",
    "bfloat16",
    "g128",
    "dynamic",
    "dequantized",
    "safetensors",
    "sharded",
}
"""Words that say how a copy is stored, not which model it is."""

_SIZE = re.compile(r"\d+(x\d+)?[bm]")


def same_model(one: str, other: str) -> bool | None:
    """Return True when two names mean the same model, False when they mean two models, None when they do not tell.

    Example:
        >>> same_model("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "/home/me/models/Llama-3.2-1B")
        True
        >>> same_model("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"), same_model("./base", "Qwen/Qwen3-8B")
        (False, None)
    """
    mine, yours = _words(one), _words(other)
    if not mine or not yours:
        return None
    if mine == yours:
        return True
    shorter, longer = sorted((mine, yours), key=len)
    rest = longer[len(shorter) :]
    # ``mistral-7b`` and ``mistral-7b-v0.1`` may be the same or not.
    if longer[: len(shorter)] == shorter and rest[0] == "v" and all(word.isdecimal() for word in rest[1:]):
        return None  # one of the two leaves the version out
    return False if _tells(one) and _tells(other) else None


def same_copy(one: str, other: str) -> bool:
    """Return True when two names mean the same copy of a model, stored in the same way.

    Example:
        >>> same_copy("Qwen/Qwen3-8B-AWQ", "/models/Qwen3-8B-AWQ"), same_copy("Qwen/Qwen3-8B-AWQ", "acme/Qwen3-8B-AWQ")
        (True, False)
        >>> same_copy("Qwen/Qwen3-8B-AWQ", "/models/Qwen3-8B"), same_copy("./base", "/models/base")
        (False, False)
    """
    # Each owner of a repo may have quantised the model anew.
    repos = [found[0] if (found := cached_repo(name)) else name for name in (one, other)]
    if all(map(is_repo, repos)) and repos[0].lower() != repos[1].lower():
        return False
    mine, yours = _last(one), _last(other)
    return bool(mine) and mine == yours


def quantised_words(name: str) -> tuple[str, ...]:
    """Return the words of a model's name that say how it is quantised.

    Example:
        >>> quantised_words("unsloth/Qwen3-8B-unsloth-bnb-4bit"), quantised_words("Qwen/Qwen3-8B")
        (('bnb', '4bit'), ())
    """
    return tuple(word for word in re.split(r"[-_. ]+", _last(name)) if word in _QUANTISED)


def cached_repo(path: str) -> tuple[str, str] | None:
    """Return (repo, commit) of a directory in the Hub's cache; None for any other path.

    Example:
        >>> cached_repo("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0a1b")
        ('Qwen/Qwen3-8B', '0a1b')
    """
    match = _CACHED.search(path)
    return (match["repo"].replace("--", "/"), match["commit"] or "") if match else None


def is_repo(name: str) -> bool:
    """Return True for a text that is probably ``owner/name`` on a hub, not a path.

    Example:
        >>> [is_repo(name) for name in ("Qwen/Qwen3-8B", "models/llama", "./a", "/a/b", "gpt2")]
        [True, False, False, False, False]
    """
    owner, slash, rest = name.partition("/")
    return (
        bool(slash and owner and rest)
        and "/" not in rest
        and owner[0] not in ".~"
        and owner.lower() not in _FOLDERS
    )


def _last(name: str) -> str:
    """Return the last part of a name that is not just a folder around a model; empty where none is left."""
    cached = cached_repo(name)
    if cached is not None:
        name = cached[0]
    # Schemes, revisions and Windows' backslashes are spelling. ModelScope's cache writes ``___`` for a dot.
    name = re.sub(r"^\w+://", "", name.strip().replace("\\", "/")).partition("@")[0]
    parts = [part for part in name.lower().replace("___", ".").split("/") if part not in {"", ".", ".."}]
    while len(parts) > 1 and _PASSED_OVER.fullmatch(parts[-1]):
        parts.pop()
    last = parts[-1] if parts else ""
    return "" if last in _TELLS_NOTHING or _PASSED_OVER.fullmatch(last) else last


def _words(name: str) -> tuple[str, ...]:
    """Return the words of a model's name, in lower case, without those that say how it is stored.

    Example:
        >>> _words("meta-llama/Meta-Llama-3-8B"), _words("llama3-8b-hf"), _words("./out/checkpoint-500")
        (('llama', '3', '8b'), ('llama', '3', '8b'), ())
    """
    words = [word for word in re.split(r"[-_. ]+", _last(name)) if word and word not in _STORAGES]
    # Meta's own repos have the maker in the name, and copies mostly have not.
    if len(words) > 1 and words[0] == "meta" and words[1].startswith("llama"):
        words = words[1:]
    return tuple(part for word in words for part in re.findall(r"\d\w*|[^\W\d]+", word))


def _tells(name: str) -> bool:
    """Return True when a name says which model it is: a repo, or a folder with a size in its name."""
    cached = cached_repo(name)
    return cached is not None or is_repo(name) or "://" in name or any(map(_SIZE.fullmatch, _words(name)))
