"""What trainers leave in an adapter's folder beside its own file: weights, training state, states in shards.

Told by the names of files alone, so that the listing of a repo is enough.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

_SUFFIXES = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".npz",
        ".distcp",
        ".h5",
        ".msgpack",
        ".pdparams",
        ".nemo",
    }
)
"""Suffixes of files that may hold weights. GGUF and ONNX are left out: they are conversions, nothing trains them."""

_STATE = (
    "optim*",
    "scheduler*",
    "lr_scheduler*",
    "scaler*.pt",
    "scaler*.bin",
    "rng_state*",
    "random_states*",
    "training_args*",
    "trainer_state*",
    "training_state*",
    "train_state*",
    "training_progress*",
    "data.pt",
    "dataloader*",
    "dl_state_dict*",
    "sampler*",
    "custom_checkpoint_*",
    "extra_state_world_size_*",
    "recipe_state*",
    "*_optim_states.pt",
    "args.bin",
    "config.bin",
)
"""Training state, which the Trainer, accelerate, DeepSpeed, verl and torchtune write to resume."""

_CONVERTED = ("ggml-*",)
"""Output of llama.cpp's first converter of adapters."""

_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "spiece*", "sentencepiece*", "special_tokens*", "*tiktoken*")

_OLD_STEPS = re.compile(r"\d+_adapters\.safetensors")
"""Snapshots that mlx-lm saves during training (mlx-lm 0.20 to 0.29); ``adapters.safetensors`` is the last."""

_FOLDERS = (
    ".*",
    "checkpoint-*",
    "checkpoint_*",
    "global_step*",
    "runs",
    "wandb",
    "mlruns",
    "tensorboard*",
    "lightning_logs",
    "logs",
    "__pycache__",
    "original",
    "onnx",
    "openvino",
    "coreml",
    "gguf",
    "optimizer*",
)
"""Folders that do not belong to this adapter: other steps of the training, its state, logs, conversions."""

TRAINED_BESIDE = (
    "*non_lora*",
    "*nonlora*",
    "*trainables*",
    "trainable_params*",
    "*projector*",
    "*merger*",
    "*connector*",
    "*aligner*",
    "*resampler*",
    "*vision_tower*",
    "*visual*",
    "embed_tokens*",
    "lm_head*",
    "modules_to_save*",
)
"""Whole parameters that were trained beside the LoRA, by the names that trainers give such files: LLaVA and those made
after it (``non_lora_trainables.bin``, ``mm_projector.bin``), the fine-tuning repos of Qwen-VL and Phi-3-Vision
(``non_lora_state_dict.bin``), LongLoRA (``trainable_params.bin``)."""

_READABLE = (".safetensors", ".bin", ".pt", ".pth")

_KNOWN: Mapping[str, tuple[str, str]] = {
    "new_embeddings*": (
        "has rows for new tokens (in vLLM's format), and the base has no tensors with their names",
        "resize the base's embeddings in transformers, append these rows to them, and merge into that; ",
    ),
    "value_head*": (
        "has the value head of a reward model or of PPO (TRL, LLaMA-Factory), and the base has no such head",
        "",
    ),
    "v_head*": (
        "has the value head of a reward model or of PPO (TRL, LLaMA-Factory), and the base has no such head",
        "",
    ),
    "adapters.safetensors": ("has an adapter of mlx-lm, and adapter_config.json is not mlx-lm's", ""),
    "adapters.npz": ("has an adapter of an old mlx-lm, and adapter_config.json is not mlx-lm's", ""),
    "adapter_model*": ("has an adapter, and another file was used as the adapter", ""),
    "adapter_*": ("has an adapter, and another file was used as the adapter", ""),
    "model*": ("has the weights of a model, not of the adapter", ""),
    "pytorch_model*": ("has the weights of a model, not of the adapter", ""),
    "consolidated*": ("has the weights of a model, not of the adapter", ""),
}
"""File name → what is known to be in it, and what to do."""


@dataclass(frozen=True, slots=True)
class ShardedState:
    """A state that a distributed trainer saved in shards, recognised by its files' names."""

    trainer: str
    patterns: tuple[str, ...]
    tool: str
    """How the trainer's own tool puts the shards together."""


SHARDED_STATES = (
    ShardedState(
        "verl (FSDP)",
        (
            "model_world_size_*_rank_*.pt",
            "*/model_world_size_*_rank_*.pt",
            "global_step_*/actor*",
            "global_step_*/critic*",
        ),
        "run: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUTPUT",
    ),
    ShardedState(
        "DeepSpeed ZeRO",
        ("*zero_pp_rank_*", "*mp_rank_*_model_states.pt", "zero_to_fp32.py", "global_step*/*_states.pt"),
        "run the folder's own script: python zero_to_fp32.py FOLDER OUTPUT",
    ),
    ShardedState(
        "Megatron",
        ("latest_checkpointed_iteration.txt", "iter_*/*", "mp_rank_*/model_optim_rng.pt", "common.pt"),
        "export the adapter with its trainer: AutoBridge.export_adapter_ckpt of Megatron-Bridge, or "
        "megatron export --to_hf true --merge_lora false of ms-swift",
    ),
    ShardedState(
        "FSDP",
        ("*.distcp", "pytorch_model_fsdp*", "pytorch_model_fsdp*/*", "*_fsdp_*/*"),
        "run: accelerate merge-weights FOLDER OUTPUT",
    ),
)
"""In the order in which they are asked: Megatron and FSDP write ``.distcp`` files both, verl and Megatron
``latest_checkpointed_iteration.txt``, verl and DeepSpeed ``global_step`` folders.

References:
    ``deepspeed.runtime.engine`` (DeepSpeed 0.17), ``verl.model_merger`` (verl 0.5), ``accelerate.utils.fsdp_utils``
    (accelerate 1.10), ``megatron.core.dist_checkpointing`` (Megatron-Core 0.13).
"""

LOAD_AFTER = "load the result into the model in PEFT, save it with save_pretrained(), and merge that"


def sharded_state(names: Iterable[str]) -> ShardedState | None:
    """Return the trainer that saved a state in shards in a folder; None where no name tells.

    Example:
        >>> sharded_state(["model_world_size_2_rank_0.pt"]).trainer
        'verl (FSDP)'
    """
    listed = tuple(names)
    return next(
        (state for state in SHARDED_STATES if any(_matches(name, state.patterns) for name in listed)), None
    )


def in_shards(name: str) -> bool:
    """Return True for a file of a state in shards. It is not read: the adapter's own file was made from it."""
    return any(_matches(name, state.patterns) for state in SHARDED_STATES)


def trained_beside(names: Iterable[str], ignored: Collection[str] = ()) -> tuple[str, ...]:
    """Return the files of an adapter's folder with whole parameters that were trained beside the LoRA.

    Example:
        >>> trained_beside(["adapter_model.safetensors", "non_lora_trainables.bin"])
        ('non_lora_trainables.bin',)
    """
    return tuple(
        sorted(
            name
            for name in names
            if "/" not in name
            and name not in ignored
            and may_hold_weights(name)
            and name.endswith(_READABLE)
            and _matches(name, TRAINED_BESIDE)
        )
    )


def may_hold_weights(name: str) -> bool:
    """Return True for a name of a file in an adapter's folder that may hold weights of this adapter.

    Example:
        >>> [may_hold_weights(name) for name in ("projector.pt", "optimizer.pt", "checkpoint-5/optimizer.pt")]
        [True, False, False]
    """
    path = PurePosixPath(name)
    if path.suffix not in _SUFFIXES or any(_matches(folder, _FOLDERS) for folder in path.parts[:-1]):
        return False
    return not (
        _matches(path.name, _STATE + _TOKENIZER + _CONVERTED)
        or _OLD_STEPS.fullmatch(path.name)
        or in_shards(name)
    )


def unread_files(
    names: Collection[str],
    read: Collection[str],
    ignored: Collection[str],
    copied: Collection[str] | None = None,
) -> list[str]:
    """Return the files of an adapter's folder that may hold its weights, and that nothing reads.

    Folders with their own adapter are skipped.

    Args:
        names: every file of the folder and of those in it.
        read: the files that are read.
        ignored: the files that the user wants left out.
        copied: the files that are copied into the output, such as a trained Dense layer of sentence-transformers;
            None where only a listing is known, and every folder that looks like such a module is taken for one.
    """
    # Their weights are theirs: checkpoints beside each other, or several adapters in one folder.
    others = {
        name.removesuffix("adapter_config.json") for name in names if name.endswith("/adapter_config.json")
    }
    if copied is None:
        others |= {name.removesuffix("config.json") for name in names if _MODULE.fullmatch(name)}
    return sorted(
        name
        for name in names
        if may_hold_weights(name)
        and name not in read
        and name not in ignored
        and name not in (copied or ())
        and not any(name.startswith(folder) for folder in others)
    )


_MODULE = re.compile(r"\d+_[A-Z]\w*/config\.json")
"""A module of sentence-transformers: ``1_Pooling/``, ``2_Dense/``."""


def file_names(root: Path) -> frozenset[str]:
    """Return the relative names of all files below a folder, without logs and other steps of the training."""
    found = []
    for directory, folders, names in os.walk(root):
        here = Path(directory)
        # In place: os.walk enters only what is left. ``global_step`` folders are kept, since shards of states
        # are in them.
        folders[:] = [
            name for name in folders if not _matches(name, _FOLDERS) or name.startswith("global_step")
        ]
        found += [(here / name).relative_to(root).as_posix() for name in names]
    return frozenset(found)


def chosen(names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the files that ``--ignore-file`` means: by name, by pattern, or everything in a folder.

    A name that is not in the folder itself may be in one of those in it.

    Example:
        >>> sorted(chosen({"a.bin", "merged/x.bin", "merged/y.bin"}, ["merged"]))
        ['merged/x.bin', 'merged/y.bin']
    """
    found: set[str] = set()
    for pattern in (text.rstrip("/") for text in patterns):
        direct = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")}
        # Only where nothing at the top has the name: a plain name means one file where it can.
        found |= direct or {name for name in names if fnmatchcase(name, f"*/{pattern}")}
    return frozenset(found)


def described(name: str) -> tuple[str, str]:
    """Return what to say about a file that nothing reads, and what to do."""
    file = PurePosixPath(name).name
    what, cure = next((said for pattern, said in _KNOWN.items() if fnmatchcase(file, pattern)), ("", ""))
    sentence = what or "may have weights that were trained with the adapter, and lora-merge cannot read it"
    return sentence, f"{cure}leave it out with --ignore-file {name} if the merge does not need it"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
