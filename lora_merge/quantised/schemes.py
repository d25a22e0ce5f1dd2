"""The schemes that a merge can quantise its output with: one entry of `SCHEMES` for each value of ``--quantize``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.core.weight import WEIGHT, Storage
from lora_merge.quantised.draft import storage

_SCALE, _ZERO, _GLOBAL, _SHAPE = "scale", "zero", "global", "weight_shape"

_MX_GROUP = 32
"""Values that share a power of two."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantise linear layers, without data: each value to the nearest code, with a scale for each group of them.

    The arithmetic is in `lora_merge.codecs`, which asks the storage alone.
    """

    name: str

    words: str
    """For people: what is stored, on one line."""

    engines: str
    """For people: who loads it."""

    storage: Storage
    """As `lora_merge.quantised.identify` finds it in such a checkpoint."""

    suffixes: Mapping[str, str]
    """Role → last part of the name of the tensor, below the module; the codes first."""

    group: int
    """Columns that share a scale have to fill a row: ``in`` is a multiple of it. 1 where any number of columns will do."""

    block: int
    """Rows that share a scale; 1 where each has its own."""

    is_even: bool
    """True where whole blocks have to cover the matrix, so that ``out`` is a multiple of `block` as well."""

    template: Mapping[str, Any]
    """``quantization_config`` without the modules that are left dense."""

    left_dense: str
    """The key of these modules."""

    is_of_stacks: bool = False
    """True where the weights are stacks of experts ``[experts, in, out]``, and linear layers stay dense."""

    @property
    def is_surveyed(self) -> bool:
        """True where all values of fused weights have to be looked at first: they share one scale."""
        return _GLOBAL in self.suffixes

    def config(self, dense: Sequence[str]) -> dict[str, Any]:
        """Return the ``quantization_config``.

        Args:
            dense: full names of the linear layers that are not quantised.
        """
        # A deep copy: all outputs share the tables of the template.
        return {**copy.deepcopy(dict(self.template)), self.left_dense: list(dense)}

    def names(self, module: str) -> dict[str, str]:
        """Return role → name of each tensor that stores a weight, the codes first.

        Args:
            module: path of its module; of a stack, the parameter's own name.
        """
        joint = "_" if self.is_of_stacks else "."
        return {role: f"{module}{joint}{suffix}" for role, suffix in self.suffixes.items()}

    def misfit(self, shape: tuple[int, ...], *, is_fused: bool) -> str:
        """Return why a weight cannot be stored so; empty where it can.

        Args:
            shape: ``[out, in]``.
            is_fused: True where an engine loads it as one with others.
        """
        rows, columns = shape
        if columns % self.group:
            return f"has {columns} input features, which is not a multiple of {self.group}"
        # The block at the edge of two fused weights would belong to both (vLLM 0.32, `validate_fp8_block_shape`).
        if rows % self.block and (self.is_even or is_fused):
            return f"has {rows} output features, which is not a multiple of {self.block}"
        return ""


def _scaled(codes: str, scale: str, rows: int, columns: int) -> Storage:
    return storage("scaled", codes, codes=codes, block_rows=rows, block_columns=columns, scale=scale)


def _compressed(
    form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the configuration of compressed-tensors for one group, of all linear layers.

    Args:
        form: name of the format.
        weights: the arguments of the weights that differ from scheme to scheme.
        activations: those of the inputs; None leaves them as they are.
    """
    always = {"symmetric": True, "dynamic": False, "group_size": None}
    group = {
        "targets": ["Linear"],
        "format": form,
        "weights": {**always, **weights},
        "input_activations": activations and {"symmetric": True, "dynamic": True, **activations},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_E4M3 = {"num_bits": 8, "type": "float"}
_MOST_ENGINES = "vLLM, SGLang and transformers"


def _bytes(
    name: str,
    words: str,
    how: Storage,
    template: Mapping[str, Any],
    *,
    group: int = 1,
    engines: str = _MOST_ENGINES,
) -> Scheme:
    """Return a scheme of codes of eight bits."""
    is_fp8 = template["quant_method"] == "fp8"
    suffixes = {WEIGHT: "weight", _SCALE: "weight_scale_inv" if is_fp8 else "weight_scale"}
    block = int(dict(how.settings)["block_rows"])
    key = "modules_to_not_convert" if is_fp8 else "ignore"
    return Scheme(name, words, engines, how, suffixes, group, block, is_fp8, template, key)


def _integers(name: str, group: int, *, symmetric: bool) -> Scheme:
    """Return a scheme of integers of four bits."""
    how = storage("packed_int", "I32", bits=4, group=group, scale="BF16", zero=not symmetric, g_idx=False)
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": symmetric,
    }
    words = (
        f"INT4 in groups of {group}{'' if symmetric else ', with zero points'}; activations are not quantised"
    )
    suffixes = {WEIGHT: "weight_packed", _SCALE: "weight_scale", _SHAPE: "weight_shape"}
    if not symmetric:
        suffixes[_ZERO] = "weight_zero_point"
    template = _compressed("pack-quantized", weights)
    # transformers 5.23 takes packed zeros for a tensor of the wrong shape.
    engines = _MOST_ENGINES if symmetric else "vLLM and SGLang"
    return Scheme(name, words, engines, how, suffixes, group, 1, False, template, "ignore")


def _fours(
    name: str, words: str, group: int, scale: str, overall: str, template: Mapping[str, Any]
) -> Scheme:
    """Return a scheme of floats of four bits."""
    how = storage("fp4", "U8", group=group, scale=scale, **{"global": overall})
    suffixes = {WEIGHT: "weight_packed", _SCALE: "weight_scale"}
    if overall != "none":
        suffixes[_GLOBAL] = "weight_global_scale"
    return Scheme(name, words, _MOST_ENGINES, how, suffixes, group, 1, False, template, "ignore")


_ALL = (
    # In the whole matrix or not at all: transformers' decoder divides the shape of a matrix by that of its scales.
    _bytes(
        "fp8",
        "FP8 in blocks of 128 x 128, as DeepSeek and Qwen publish it; activations in FP8",
        _scaled("F8_E4M3", "F32", 128, 128),
        _FP8,
        group=128,
        engines="vLLM, LMDeploy, SGLang and transformers",
    ),
    _bytes(
        "fp8-block",
        "FP8 in blocks of 128 x 128 (compressed-tensors); activations in FP8, in groups of 128",
        _scaled("F8_E4M3", "BF16", 128, 128),
        _compressed(
            "float-quantized",
            {**_E4M3, "strategy": "block", "block_structure": [128, 128]},
            {**_E4M3, "strategy": "group", "group_size": 128},
        ),
    ),
    _bytes(
        "fp8-channel",
        "FP8 with a scale for each row; activations in FP8, with a scale for each token",
        _scaled("F8_E4M3", "BF16", 1, 0),
        _compressed(
            "float-quantized",
            {**_E4M3, "strategy": "channel"},
            {**_E4M3, "strategy": "token", "group_size": None},
        ),
    ),
    _bytes(
        "int8",
        "INT8 with a scale for each row; activations in INT8, with a scale for each token",
        _scaled("I8", "BF16", 1, 0),
        _compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "token", "group_size": None},
        ),
    ),
    _integers("int4", 128, symmetric=True),
    _integers("int4-g32", 32, symmetric=True),
    _integers("int4-asym", 128, symmetric=False),
    _integers("int4-asym-g32", 32, symmetric=False),
    _fours(
        "mxfp4",
        "MXFP4: groups of 32 whose scale is a power of two; activations are not quantised",
        32,
        "E8M0",
        "none",
        _compressed(
            "mxfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
            },
        ),
    ),
    _bytes(
        "mxfp8",
        "MXFP8: FP8 in groups of 32 whose scale is a power of two; activations are not quantised",
        _scaled("F8_E4M3", "U8", 1, 32),
        _compressed(
            "mxfp8-quantized",
            {**_E4M3, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        ),
        group=32,
    ),
    _fours(
        "nvfp4",
        "NVFP4: groups of 16 with FP8 scales, and one scale for all; activations are not quantised",
        16,
        "E4M3",
        "divide",
        _compressed(
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            },
        ),
    ),
)

SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in _ALL}
"""The schemes by name, the suggestion first."""

OF_GPT_OSS: Mapping[str, Scheme] = {
    "mxfp4": Scheme(
        "mxfp4",
        "MXFP4 as gpt-oss is published: the experts in groups of 32 whose scale is a power of two, all else as it is",
        _MOST_ENGINES,
        storage("mxfp4_experts", "U8"),
        {WEIGHT: "blocks", _SCALE: "scales"},
        _MX_GROUP,
        1,
        False,
        {"quant_method": "mxfp4"},
        "modules_to_not_convert",
        is_of_stacks=True,
    )
}
"""The separate schemes of gpt-oss, by the name of the one that they take the place of: what engines load as
``quant_method`` mxfp4.
"""
