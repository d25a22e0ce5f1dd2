"""Writes an adapter of mlx-lm: ``adapter_config.json`` and ``adapters.safetensors``."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx_names import family_of, is_expert, mlx_name
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import error
from lora_merge.core.shards import place
from lora_merge.core.tensor import TensorRef
from lora_merge.errors import ConvertError
from lora_merge.formats.repo_files import MLX_WEIGHTS
from lora_merge.storage.output_files import reserve
from lora_merge.storage.writing import tensor_bytes, write_from

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.lora import Lora, Made
    from lora_merge.conversion.writers.lora_writer import LoadFactors
    from lora_merge.storage.folder import Folder

_LISTED = re.compile(r"\.experts\.\w+_projs\.\d+$")
_LAYER = re.compile(r"(?:.+?\.)?\d+\.(?P<key>.+)")


def write_mlx(folder: Folder, lora: Lora, factors: LoadFactors) -> tuple[str, ...]:
    """Write a LoRA as mlx-lm saves one; return the names of the files. All modules have one rank, and the scale 1.

    Modules have mlx-lm's names (`lora_merge.adapters.mlx_names`). Experts are stacked as in mlx-lm, so the LoRA needs
    factors for all experts of a layer.

    Raises:
        ConvertError: a module has no place in the format.
        WriteError: the disk is full or cannot be written.

    Reference:
        ``mlx_lm.tuner.utils.load_adapters``, ``mlx_lm.tuner.lora`` (mlx-lm 0.32.2).
    """
    groups: dict[str, list[Made]] = {}
    family = family_of(lora.base_config)
    assert family is not None  # else the draft was refused
    for made in lora.made:
        if made.module.form not in {"linear", "embedding"}:
            sentence = f"is LoRA on {made.module.form}, which mlx-lm does not support"
            raise ConvertError([error("unsupported", made.module.path, sentence, "add --split-experts")])
        if _LISTED.search(made.module.path):
            sentence = (
                "is an expert of a copy for 4-bit training; mlx-lm does not have a module with this name"
            )
            raise ConvertError([error("unsupported", made.module.path, sentence, "merge it")])
        groups.setdefault(mlx_name(made.module.path, family), []).append(made)
    refs = [ref for path, members in groups.items() for ref in _slots(path, members)]
    file = place(MLX_WEIGHTS, sorted(refs, key=lambda ref: ref.name), {"format": "mlx"})
    path = folder.path / MLX_WEIGHTS
    reserve(folder, file)
    slots = {slot.name: slot for slot in file.slots}
    with folder.writing(MLX_WEIGHTS) as fd:
        for name, members in groups.items():
            for leaf, tensor in _tensors(members, factors).items():
                write_from(fd, tensor_bytes(tensor), slots[f"{name}.{leaf}"].start, path)
    folder.write_text(ADAPTER_CONFIG, json.dumps(_config(lora, groups), indent=2) + "\n")
    return ADAPTER_CONFIG, MLX_WEIGHTS


def _is_stack(members: list[Made]) -> bool:
    return is_expert(members[0].module.path)


def _slots(path: str, members: list[Made]) -> list[TensorRef]:
    """Return name, dtype and shape of ``lora_a`` and ``lora_b`` of one module of mlx-lm, without places."""
    rank, (n_out, n_in) = members[0].rank, members[0].module.shape
    n = len(members)
    a, b = ((n, rank, n_in), (n, n_out, rank)) if _is_stack(members) else ((n_in, rank), (rank, n_out))
    dtypes = {one.dtype for made in members for one in (made.a, made.b)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    return [TensorRef(f"{path}.lora_a", dtype, a, "", 0, 0), TensorRef(f"{path}.lora_b", dtype, b, "", 0, 0)]


def _tensors(members: list[Made], factors: LoadFactors) -> dict[str, torch.Tensor]:
    """Return ``lora_a`` and ``lora_b`` of one module of mlx-lm: transposed, or stacked for experts."""
    import torch

    loaded = [factors(made) for made in members]
    if len({tensor.dtype for pair in loaded for tensor in pair}) > 1:
        loaded = [(a.float(), b.float()) for a, b in loaded]
    if _is_stack(members):
        return {"lora_a": torch.stack([a for a, _ in loaded]), "lora_b": torch.stack([b for _, b in loaded])}
    ((a, b),) = loaded
    # mlx-lm computes x @ lora_a @ lora_b, so its factors are ``[in, r]`` and ``[r, out]``.
    return {"lora_a": a.T, "lora_b": b.T}


def _config(lora: Lora, groups: dict[str, list[Made]]) -> dict[str, object]:
    # mlx-lm wraps modules by their path inside a layer, in all layers.
    keys = {match["key"] if (match := _LAYER.fullmatch(path)) else path for path in groups}
    # mlx-lm's loader demands a dropout, though only training uses it.
    parameters = {"rank": lora.made[0].rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": parameters,
        "model": lora.config.get("base_model_name_or_path"),
        # -1: all layers.
        "num_layers": -1,
    }
