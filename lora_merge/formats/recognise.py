"""What a folder really is when it is not the base or adapter that it was named as, told by its files' names.

Names alone decide, so that the listing of a repo is enough. Each answer is the end of a sentence about the folder, and what
to do; what nothing is known of has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from lora_merge.errors import CheckpointError
from lora_merge.formats.trainer_files import LOAD_AFTER, SHARDED_STATES
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

Role = Literal["base", "adapter"]

_MODEL_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"

_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model*.safetensors.index.json")
_ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapter_model*.bin", "adapters.safetensors")

_SHARD = re.compile(r"(?P<stem>model|pytorch_model)-\d{5}-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")

_MOST_NAMES = 2000
"""The most names of a folder that are looked at: it may be any folder, such as a home directory."""


class Fault(NamedTuple):
    """What a folder really is, and what to do about it."""

    sentence: str
    """The rest of a sentence that begins with the folder's path."""

    hint: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of folder that people name as a base or an adapter."""

    patterns: tuple[str, ...]
    """Patterns of file names; one match is enough."""

    sentence: str
    hint: str
    roles: tuple[Role, ...] = ("base", "adapter")


_KINDS = (
    *(
        _Kind(
            state.patterns,
            f"has a sharded training state of {state.trainer} ({{found}}), and no weights",
            f"{state.tool}; then {LOAD_AFTER}",
        )
        # The same table as for adapters (`trainer_files`), so that both say the same about a trainer.
        for state in SHARDED_STATES
    ),
    _Kind(
        ("*.nemo", "mp_rank_*/*", "*/mp_rank_*", "model_optim_rng.pt"),
        "is a checkpoint of NeMo or Megatron ({found})",
        "export it to Hugging Face's format with the trainer's own converter",
    ),
    _Kind(
        ("manifest.ocdbt", "*/manifest.ocdbt", "_CHECKPOINT_METADATA", "*/_METADATA"),
        "is a checkpoint of JAX (Orbax: {found})",
        "export it as safetensors with the trainer's own tool",
    ),
    _Kind(
        ("pytorch_lora_weights.*",),
        "is a LoRA for diffusers ({found}); image models are not supported",
        "use diffusers: pipe.load_lora_weights(FOLDER), pipe.fuse_lora(), pipe.save_pretrained(OUTPUT)",
    ),
    _Kind(
        ("model_index.json",),
        "is a diffusers pipeline ({found}); image models are not supported",
        "pass the folder of one transformers model in it, for example text_encoder",
    ),
    _Kind(
        (
            "pytorch_adapter.bin",
            "adapter.safetensors",
            "head_config.json",
            "pytorch_model_head.bin",
            "model_head.safetensors",
        ),
        "is an adapter of AdapterHub's library adapters ({found}), not of PEFT",
        "if it is a LoRA, merge it there: model.load_adapter(FOLDER), model.merge_adapter(NAME), model.save_pretrained(OUTPUT)",
        ("adapter",),
    ),
    _Kind(
        ("adapters.npz", "[0-9]*_adapters.safetensors"),
        "has an adapter of mlx-lm under another name ({found})",
        "save it as adapters.safetensors, next to its adapter_config.json",
        ("adapter",),
    ),
    _Kind(
        ("lora.safetensors",),
        "is a LoRA of mistral-finetune ({found})",
        "merge it there: python -m utils.merge_lora, or train with PEFT",
        ("adapter",),
    ),
    _Kind(
        ("lit_model*", "lit_config.json"),
        "is a checkpoint of LitGPT ({found})",
        "use LitGPT's own commands: litgpt merge_lora, then litgpt convert_from_litgpt",
    ),
    _Kind(
        ("adapter_[0-9]*.pt", "recipe_state.pt", "recipe_state/*"),
        "is a checkpoint of torchtune ({found})",
        (
            "save it with torchtune's checkpointer for Hugging Face, which writes PEFT's adapter_config.json and "
            "adapter_model.safetensors"
        ),
    ),
    _Kind(
        ("consolidated*.safetensors", "consolidated*.pth", "consolidated*.pt"),
        "has the model in Mistral's or Meta's own format ({found})",
        (
            "download config.json and model*.safetensors (the transformers format) too, or pass a folder or repo "
            "that has them"
        ),
        ("base",),
    ),
    _Kind(
        ("*.gguf",),
        "has the model as GGUF ({found}), the format of llama.cpp",
        "pass the Hugging Face folder or repo that it was converted from",
    ),
    _Kind(
        (
            "tf_model*.h5",
            "flax_model*.msgpack",
            "*.onnx",
            "onnx/*",
            "model.ckpt*",
            "*.tflite",
            "openvino_model.*",
            "rust_model.ot",
        ),
        "has weights for another framework than PyTorch ({found})",
        "load it in transformers with PyTorch once, and save it with save_pretrained()",
        ("base",),
    ),
    _Kind(
        ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"),
        "contains an archive ({found})",
        "unpack it, and pass the folder that was unpacked",
    ),
    _Kind(
        ("*.incomplete", "*.part", "*.crdownload", "*.aria2", "*.download"),
        "contains an incomplete download ({found})",
        "download it again",
    ),
)
"""Asked in this order, the most specific first."""

_STATES = (
    _Kind(
        (
            "optimizer.pt",
            "optimizer.bin",
            "trainer_state.json",
            "training_args.bin",
            "rng_state*.pth",
            "scheduler.pt",
        ),
        "has a training state ({found}) and no weights",
        "look for the weights in another folder, or train with saving switched on",
    ),
)
"""Asked last, where nothing else was recognised."""


def names_in(root: Path) -> tuple[str, ...]:
    """Return relative names of a folder's files and of the files in its subfolders, at most `_MOST_NAMES`."""
    found = []
    for path in sorted(root.iterdir(), key=lambda path: in_order(path.name)):
        inside = sorted(path.iterdir()) if _is_open(path) else [path]
        found += [one.relative_to(root).as_posix() for one in inside]
        if len(found) > _MOST_NAMES:
            break
    return tuple(found[:_MOST_NAMES])


def broken_link(root: Path) -> CheckpointError | None:
    """Return an error for the first dangling link that looks like a needed file; None where there is none."""
    for path in sorted(root.iterdir()):
        # The Hub's cache consists of links: after it was cleared they lead to nothing.
        if path.is_symlink() and not path.exists() and path.suffix in {".json", ".safetensors", ".bin"}:
            return CheckpointError(
                str(path),
                "",
                f"is a link to {path.readlink()}, which does not exist",
                hint="download it again (the cache was cleared), or mount the missing disk",
            )
    return None


def _is_open(path: Path) -> bool:
    import os

    return path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``checkpoint-9`` before ``checkpoint-10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def fault_of(names: Collection[str], role: Role, place: str = "") -> Fault | None:
    """Return what a folder really is; None where its names do not tell.

    Args:
        names: its files, those of the folders in it as ``folder/file``.
        role: what it was named as.
        place: how its own folders are named, with a slash at the end: ``runs/style/``.

    Example:
        >>> fault_of(["config.json", "model.safetensors"], "adapter").sentence
        'is a whole model, not an adapter (it has config.json and model.safetensors)'
    """
    if not names:
        return Fault("is an empty folder", "check the path, or download the files again")
    if role == "adapter":
        return (
            _whole_model(names) or _known(names, role) or _half_adapter(names) or _known(names, role, _STATES)
        )
    return (
        _adapter(names)
        or _lost_index(names)
        or _known(names, role)
        or _deeper(names, place)
        or _half_model(names)
        or _known(names, role, _STATES)
    )


def _known(names: Collection[str], role: Role, kinds: Iterable[_Kind] = _KINDS) -> Fault | None:
    """Return the fault of the first kind that one of the names matches, for this role."""
    for kind in kinds:
        found = [name for name in names if _matches(name, kind.patterns)]
        if role in kind.roles and found:
            return Fault(kind.sentence.format(found=listing(found, 2)), kind.hint)
    return None


def _whole_model(names: Collection[str]) -> Fault | None:
    weights = _first(names, _MODEL_WEIGHTS)
    if _MODEL_CONFIG not in names or _ADAPTER_CONFIG in names or not weights:
        return None
    return Fault(
        f"is a whole model, not an adapter (it has {_MODEL_CONFIG} and {weights})",
        "pass it as --base; an adapter is a folder with adapter_config.json",
    )


def _adapter(names: Collection[str]) -> Fault | None:
    if _ADAPTER_CONFIG not in names or (_MODEL_CONFIG in names and _first(names, _MODEL_WEIGHTS)):
        return None
    return Fault(
        f"is an adapter, not a model (it has {_ADAPTER_CONFIG})",
        "pass the model that it was trained on as --base; to merge two adapters, pass both with --adapter",
    )


def _lost_index(names: Collection[str]) -> Fault | None:
    """Return the fault of shards without their index, or of an incomplete set."""
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards or _MODEL_CONFIG not in names:
        return None
    first = shards[0]
    index = f"{first['stem']}.{first['suffix']}.index.json"
    if index in names:
        return None
    there = (
        f"{len(shards)} of {int(first['count'])} weight files ({listing([shard[0] for shard in shards], 1)})"
    )
    return Fault(
        f"has {there}, and their index {index} is missing",
        f"download {index} from the same place as the weights"
        + ("" if len(shards) == int(first["count"]) else ", and the other files"),
    )


def _deeper(names: Collection[str], place: str) -> Fault | None:
    """Return the fault of a folder whose subfolders hold models; it names the last of them."""
    folders = [name.removesuffix(f"/{_MODEL_CONFIG}") for name in names if name.endswith(f"/{_MODEL_CONFIG}")]
    folders = [folder for folder in folders if "/" not in folder]
    if not folders or _MODEL_CONFIG in names:
        return None
    last = max(folders, key=in_order)
    return Fault(
        f"has no model at its top level; {counted(len(folders), 'folder')} in it may have one: "
        f"{listing(sorted(folders, key=in_order))}",
        f"pass one of them: {place}{last}",
    )


def _half_adapter(names: Collection[str]) -> Fault | None:
    weights = _first(names, _ADAPTER_WEIGHTS)
    if _ADAPTER_CONFIG in names and not weights:
        return Fault(
            f"has {_ADAPTER_CONFIG} and no weights: adapter_model.safetensors or adapter_model.bin is missing",
            "download or save the weights too: the download or the training did not finish",
        )
    if weights and _ADAPTER_CONFIG not in names:
        return Fault(
            f"has {weights} and no {_ADAPTER_CONFIG}, which contains lora_alpha and the target modules",
            f"download {_ADAPTER_CONFIG} from the same place as the weights",
        )
    return None


def _half_model(names: Collection[str]) -> Fault | None:
    weights = _first(names, _MODEL_WEIGHTS)
    if weights and _MODEL_CONFIG not in names:
        return Fault(
            f"has {weights} and no {_MODEL_CONFIG}",
            f"download {_MODEL_CONFIG} from the same place as the weights",
        )
    if _MODEL_CONFIG in names and not weights:
        return Fault(
            f"has {_MODEL_CONFIG} and no weights: model.safetensors, or shards with their index, is missing",
            "download the weights too: the download did not finish, or skipped large files",
        )
    return None


def _first(names: Iterable[str], patterns: tuple[str, ...]) -> str:
    """Return the first name that matches a pattern; empty where none does."""
    return next((name for name in names if _matches(name, patterns)), "")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
