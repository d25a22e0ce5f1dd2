"""Headers of quantised checkpoints, one for each storage: two layers of one module, a norm and a head that is dense.

They have no bytes but those that the methods read.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from lora_merge.core.tensor import TensorRef, nbytes_of
from lora_merge.quantised import Found, Surroundings, identify

MODULES = tuple(f"model.layers.{n}.mlp.down_proj" for n in range(2))
SHAPE = (256, 384)
"""Of each weight, ``[out, in]``."""

EXPERTS = tuple(f"model.layers.{n}.mlp.experts.down_proj" for n in range(2))


@dataclass
class Headers:
    """A checkpoint without its bytes: what it says, and its tensors."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    codec: str
    settings: dict[str, Any]
    side: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    """Suffix of a name → what is read."""

    names: tuple[str, ...] = tuple(f"{module}.weight" for module in MODULES)
    shape: tuple[int, ...] = SHAPE

    def refs(self) -> list[TensorRef]:
        return [
            TensorRef(name, dtype, shape, "model.safetensors", 0, nbytes_of(dtype, shape))
            for name, (dtype, shape) in self.tensors.items()
        ]

    def read(self, ref: TensorRef) -> bytes:
        return next(
            (data for suffix, data in self.contents.items() if ref.name.endswith(suffix)), bytes(ref.nbytes)
        )

    def found(self) -> Found:
        return identify(self.refs(), Surroundings(self.config, self.read, self.side, self.metadata))


def of(
    method: dict[str, Any],
    parts: dict[str, tuple[str, tuple[int, ...]]],
    codec: str,
    settings: dict[str, Any],
    **more: Any,
) -> Headers:
    """Return a checkpoint whose two modules have some parts: suffix → dtype and shape."""
    key = more.pop("key", "quantization_config")
    modules = more.pop("modules", MODULES)
    rest = {"model.norm.weight": ("BF16", (256,)), "lm_head.weight": ("BF16", (512, 256))}
    tensors = {f"{module}{suffix}": part for module in modules for suffix, part in parts.items()}
    config = {key: method} if method else {}
    return Headers(config, {**tensors, **rest}, codec, settings, **more)


def blocks(rows: int, columns: int, scale: str, codes: str = "F8_E4M3") -> dict[str, Any]:
    return {"codes": codes, "block_rows": rows, "block_columns": columns, "scale": scale}


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, **more,
    }  # fmt: skip


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
CODES = ("F8_E4M3", SHAPE)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
PACKED = {
    ".weight_packed": ("I32", (256, 48)),
    ".weight_scale": ("BF16", (256, 3)),
    ".weight_shape": ("I64", (2,)),
}
NVFP4 = {".weight_scale": ("F8_E4M3", (256, 24))}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq", "sym": True}
GPTQ_PARTS = {
    ".qweight": ("I32", (48, 256)), ".qzeros": ("I32", (6, 32)), ".scales": ("F16", (6, 256)), ".g_idx": ("I32", (384,)),
}  # fmt: skip
AWQ_PARTS = {".qweight": ("I32", (384, 32)), ".qzeros": ("I32", (6, 32)), ".scales": ("F16", (6, 256))}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(SHAPE)}
NESTED = {**STATE, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}


def bnb4(
    state: dict[str, Any], parts: dict[str, tuple[str, tuple[int, ...]]], settings: dict[str, Any]
) -> Headers:
    text = json.dumps(state).encode()
    suffix = ".weight.quant_state.bitsandbytes__nf4"
    parts = {".weight": ("U8", (math.prod(SHAPE) // 2, 1)), ".weight.quant_map": ("F32", (16,)), **parts}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
    return of(
        config, {**parts, suffix: ("U8", (len(text),))}, "bnb4", {"block": 64, "type": "nf4", **settings}, contents={suffix: text}
    )  # fmt: skip


def torchao(
    kind: str, parts: dict[str, tuple[str, tuple[int, ...]]], names: list[str], codes: str
) -> Headers:
    stated = {"_type": kind, "_data": {"block_size": [1, 384]}, "_tensor_data_names": names}
    metadata = {f"{module}.weight": json.dumps(stated) for module in MODULES}
    return of({"quant_method": "torchao"}, parts, "scaled", blocks(1, 0, "F32", codes), metadata=metadata)


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


def mlx(bits: int, group: int, mode: str) -> dict[str, Any]:
    return {"group_size": group, "bits": bits, "mode": mode}


EVERY = {
    "fp8 blocks": of(FP8, {".weight": CODES, ".weight_scale_inv": ("F32", (2, 3))}, "scaled", blocks(128, 128, "F32")),
    "fp8 blocks, ragged": of(
        {**FP8, "weight_block_size": [100, 100]}, {".weight": CODES, ".weight_scale_inv": ("BF16", (3, 4))}, "scaled", blocks(100, 100, "BF16")
    ),
    "fp8 blocks, powers of two": of(
        FP8, {".weight": CODES, ".weight_scale_inv": ("F8_E8M0", (2, 3))}, "scaled", blocks(128, 128, "F8_E8M0")
    ),
    "fp8 of DeepSeek-V4": of(FP8, {".weight": CODES, ".scale": ("F8_E8M0", (2, 3))}, "scaled", blocks(128, 128, "F8_E8M0")),
    "fp8 of DeepSeek-V4, experts": of(
        {**FP8, "expert_dtype": "fp4"}, {".weight": ("I8", (256, 192)), ".scale": ("F8_E8M0", (256, 12))}, "fp4",
        {"group": 32, "scale": "E8M0", "global": "none"},
    ),
    "fp8 of Mistral": of(
        {"quant_method": "fp8"}, {".weight": CODES, ".qscale_weight": ("BF16", ()), ".qscale_act": ("BF16", ())}, "scaled", blocks(0, 0, "BF16")
    ),
    "fp8, one scale": of({"quant_method": "fp8"}, {".weight": CODES, ".weight_scale": ("F32", ())}, "scaled", blocks(0, 0, "F32")),
    "fp8, rows": of({"quant_method": "fp8"}, {".weight": CODES, ".weight_scale": ("F32", (256, 1))}, "scaled", blocks(1, 0, "F32")),
    "mxfp8": of({"quant_method": "mxfp8"}, {".weight": CODES, ".weight_scale": ("U8", (256, 12))}, "scaled", blocks(1, 32, "U8")),
    "fp8, stacked": of(
        FP8, {"": ("F8_E4M3", (4, *SHAPE)), "_scale_inv": ("F32", (4, 2, 3))}, "scaled", blocks(128, 128, "F32"),
        modules=EXPERTS, names=EXPERTS, shape=(4, *SHAPE),
    ),
    "fbgemm": of(
        {"quant_method": "fbgemm_fp8"}, {".weight": CODES, ".weight_scale": ("F32", (256, 1)), ".input_scale_ub": ("F32", (1,))}, "scaled",
        blocks(1, 0, "F32"),
    ),
    "fbgemm, stacked": of(
        {"quant_method": "fbgemm_fp8"}, {"": ("F8_E4M3", (4, *SHAPE)), "_scale": ("F32", (4, 1, 384))}, "scaled", blocks(0, 1, "F32"),
        modules=EXPERTS, names=EXPERTS, shape=(4, *SHAPE),
    ),
    "ct FP8 blocks": of(
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
        {".weight": CODES, ".weight_scale": ("BF16", (2, 3))}, "scaled", blocks(128, 128, "BF16"),
    ),
    "ct FP8 rows": of(
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        {".weight": CODES, ".weight_scale": ("BF16", (256, 1))}, "scaled", blocks(1, 0, "BF16"),
    ),
    "ct FP8, one scale": of(
        compressed("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        {".weight": CODES, ".weight_scale": ("BF16", (1,)), ".input_scale": ("BF16", (1,))}, "scaled", blocks(0, 0, "BF16"),
    ),
    "ct INT8": of(
        compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
        {".weight": ("I8", SHAPE), ".weight_scale": ("BF16", (256, 1))}, "scaled", blocks(1, 0, "BF16", "I8"),
    ),
    "ct MXFP8": of(
        compressed("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
        {".weight": CODES, ".weight_scale": ("U8", (256, 12))}, "scaled", blocks(1, 32, "U8"),
    ),
    "ct INT4": of(
        compressed("pack-quantized", INT4), PACKED, "packed_int",
        {"bits": 4, "group": 128, "scale": "BF16", "zero": False, "g_idx": False}, contents={"weight_shape": struct.pack("<qq", *SHAPE)},
    ),
    "ct INT4, asymmetric": of(
        compressed("pack-quantized", {**INT4, "symmetric": False}), {**PACKED, ".weight_zero_point": ("I32", (32, 3))}, "packed_int",
        {"bits": 4, "group": 128, "scale": "BF16", "zero": True, "g_idx": False}, contents={"weight_shape": struct.pack("<qq", *SHAPE)},
    ),
    "ct INT4, ordered": of(
        compressed("pack-quantized", {**INT4, "actorder": "group"}), {**PACKED, ".weight_g_idx": ("I32", (384,))}, "packed_int",
        {"bits": 4, "group": 128, "scale": "BF16", "zero": False, "g_idx": True}, contents={"weight_shape": struct.pack("<qq", *SHAPE)},
    ),
    "ct INT3, ragged rows": of(
        compressed("pack-quantized", {**INT4, "num_bits": 3, "strategy": "channel", "group_size": None}),
        {".weight_packed": ("I32", (256, 36)), ".weight_scale": ("BF16", (256, 1)), ".weight_shape": ("I64", (2,))}, "packed_int",
        {"bits": 3, "group": 0, "scale": "BF16", "zero": False, "g_idx": False},
        contents={"weight_shape": struct.pack("<qq", 256, 380)}, shape=(256, 380),
    ),
    "ct NVFP4": of(
        compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        {".weight_packed": ("U8", (256, 192)), **NVFP4, ".weight_global_scale": ("F32", (1,)), ".input_global_scale": ("F32", (1,))}, "fp4",
        {"group": 16, "scale": "E4M3", "global": "divide"},
    ),
    "ct MXFP4": of(
        compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
        {".weight_packed": ("U8", (256, 192)), ".weight_scale": ("U8", (256, 12))}, "fp4", {"group": 32, "scale": "E8M0", "global": "none"},
    ),
    "ct of old": of(
        compressed("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        {".weight": CODES, ".weight_scale": ("F32", (1,))}, "scaled", blocks(0, 0, "F32"), key="compression_config",
    ),
    "modelopt FP8": of(
        modelopt("FP8"), {".weight": CODES, ".weight_scale": ("F32", ()), ".input_scale": ("F32", ())}, "scaled", blocks(0, 0, "F32")
    ),
    "modelopt FP8 rows": of(
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"), {".weight": CODES, ".weight_scale": ("F32", (256,))}, "scaled", blocks(1, 0, "F32")
    ),
    "modelopt FP8 blocks": of(
        modelopt("fp8_pb_wo"), {".weight": CODES, ".weight_scale": ("F32", (2, 1, 3, 1))}, "scaled", blocks(128, 128, "F32")
    ),
    "modelopt MXFP8": of(modelopt("MXFP8"), {".weight": CODES, ".weight_scale": ("U8", (256, 12))}, "scaled", blocks(1, 32, "U8")),
    "modelopt NVFP4": of(
        modelopt("NVFP4"), {".weight": ("U8", (256, 192)), **NVFP4, ".weight_scale_2": ("F32", ()), ".input_scale": ("F32", ())}, "fp4",
        {"group": 16, "scale": "E4M3", "global": "multiply"},
    ),
    "modelopt AWQ, in its file alone": of(
        {}, {".weight": ("U8", (128, 384)), ".weight_scale": ("F32", (256, 3)), ".pre_quant_scale": ("BF16", (384,))}, "modelopt_awq",
        {"group": 128, "scale": "F32", "pre": "BF16"},
        side={"hf_quant_config.json": {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128, "exclude_modules": ["lm_head"]}}},
    ),
    "modelopt, mixed": of(
        modelopt("MIXED_PRECISION", quantized_layers={module: {"quant_algo": "FP8"} for module in MODULES}),
        {".weight": CODES, ".weight_scale": ("F32", ())}, "scaled", blocks(0, 0, "F32"),
    ),
    "mxfp4": of(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        {"_blocks": ("U8", (4, 256, 12, 16)), "_scales": ("U8", (4, 256, 12)), "_bias": ("BF16", (4, 256))}, "mxfp4_experts", {},
        modules=EXPERTS, names=EXPERTS, shape=(4, 384, 256),
    ),
    "gptq": of(GPTQ, GPTQ_PARTS, "gptq", {"bits": 4, "group": 64, "groups": 6, "scale": "F16", "version": 1}),
    "gptq v2, in its file alone": of(
        {}, GPTQ_PARTS, "gptq", {"bits": 4, "group": 64, "groups": 6, "scale": "F16", "version": 2},
        side={"quantize_config.json": {"bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}},
    ),
    "gptq, one group": of(
        {**GPTQ, "group_size": -1}, {**GPTQ_PARTS, ".qzeros": ("I32", (1, 32)), ".scales": ("F16", (1, 256))}, "gptq",
        {"bits": 4, "group": 0, "groups": 1, "scale": "F16", "version": 1},
    ),
    "gptq, other bits by a rule": of(
        {**GPTQ, "dynamic": {r"+:.*\.mlp\..*": {"bits": 8, "group_size": 128}}},
        {
            ".qweight": ("I32", (96, 256)), ".qzeros": ("I32", (3, 64)), ".scales": ("BF16", (3, 256)), ".g_idx": ("I32", (384,)),
        }, "gptq", {"bits": 8, "group": 128, "groups": 3, "scale": "BF16", "version": 1},
    ),
    "awq": of(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "modules_to_not_convert": None}, AWQ_PARTS, "awq",
        {"group": 64, "scale": "F16"},
    ),
    "awq, in its file alone": of(
        {}, AWQ_PARTS, "awq", {"group": 64, "scale": "F16"},
        side={"quant_config.json": {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}},
    ),
    "bnb NF4": bnb4(STATE, {".weight.absmax": ("F32", (1536,))}, {"nested": 0, "offset": 0.0}),
    "bnb NF4, nested": bnb4(
        NESTED, {
            ".weight.absmax": ("U8", (1536,)), ".weight.nested_absmax": ("F32", (6,)), ".weight.nested_quant_map": ("F32", (256,)),
        }, {"nested": 256, "offset": 0.0625},
    ),
    "bnb INT8": of(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, {".weight": ("I8", SHAPE), ".SCB": ("F32", (256,)), ".weight_format": ("U8", ())},
        "llm_int8", {},
    ),
    "torchao FP8": torchao(
        "Float8Tensor", {"._weight_qdata": CODES, "._weight_scale": ("F32", (256, 1))}, ["qdata", "scale"], "F8_E4M3"
    ),
    "torchao INT8": torchao(
        "Int8Tensor", {"._weight_qdata": ("I8", SHAPE), "._weight_scale": ("F32", (256, 1)), "._weight_zero_point": ("I8", (256, 1))},
        ["qdata", "scale", "zero_point"], "I8",
    ),
    **{
        f"mlx, {bits} bits": of(
            mlx(bits, 64, "affine"),
            {".weight": ("U32", (256, 12 * bits)), ".scales": ("BF16", (256, 6)), ".biases": ("BF16", (256, 6))}, "mlx_affine",
            {"bits": bits, "group": 64, "scale": "BF16"}, key="quantization",
        )
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "mlx MXFP4": of(
        mlx(4, 32, "mxfp4"), {".weight": ("U32", (256, 48)), ".scales": ("U8", (256, 12))}, "fp4",
        {"group": 32, "scale": "E8M0", "global": "none"}, key="quantization",
    ),
    "mlx NVFP4": of(
        mlx(4, 16, "nvfp4"), {".weight": ("U32", (256, 48)), ".scales": ("U8", (256, 24))}, "fp4",
        {"group": 16, "scale": "E4M3", "global": "none"}, key="quantization",
    ),
    "mlx MXFP8": of(
        mlx(8, 32, "mxfp8"), {".weight": ("U32", (256, 96)), ".scales": ("U8", (256, 12))}, "scaled", blocks(1, 32, "U8"), key="quantization",
    ),
}  # fmt: skip
"""Name → a checkpoint of each storage."""
