"""Every storage, written by the library that writes it. Runs in the oracles' environment.

The functions take the model in bfloat16 and the folder to write into. `ENCODERS` lists them by fixture.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tests.storages.making.models import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Encoder(NamedTuple):
    """How a fixture is made."""

    model: str
    """A key that `models.build` takes."""

    packages: tuple[str, ...]
    """The distributions whose code wrote it."""

    encode: Callable[[Path, Path], None]


def load(base: Path, **arguments: Any) -> Any:
    """Return a model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **arguments)


def read(root: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, by name."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(root.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write(base: Path, out: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors beside the model's configuration with ``quantization_config`` in it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )


def compressed_tensors(base: Path, out: Path, **recipe: Any) -> None:
    """llm-compressor's `QuantizationModifier`, which needs no data."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(base)
    oneshot(model=model, recipe=QuantizationModifier(**{"ignore": ["lm_head"], **recipe}))
    model.save_pretrained(out, save_compressed=True)


def scheme(name: str) -> Encoder:
    """Return the encoder of one of llm-compressor's schemes."""
    encode = functools.partial(compressed_tensors, targets="Linear", scheme=name)
    model = "blocks" if "BLOCK" in name else "narrow" if "8" in name and name != "W8A16" else "llama"
    return Encoder(model, _CT, encode)


def _group(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": {"dynamic": False, "symmetric": True, **weights}}


def act_order(base: Path, out: Path) -> None:
    """compressed-tensors with ``weight_g_idx``, as releases before 0.20 wrote it for ``actorder: group``.

    The columns of a group lie together while its compressor scales and rounds them, and are packed by its own packing
    in the order of the model.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read(base).items():
        module, _, last = name.rpartition(".")
        if module.rpartition(".")[2] not in LINEAR or last != "weight":
            tensors[name] = tensor
            continue
        columns = tensor.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(len(tensors)))
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = torch.arange(columns, dtype=torch.int32) // 32
        groups = tensor[:, order].unflatten(1, (-1, 32))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        found = compressor.compress({"weight": tensor[:, order], "weight_scale": scale}, scheme)
        codes = unpack_from_int32(found["weight_packed"], 4, tensor.shape)
        found["weight_packed"] = pack_to_int32(codes[:, order.argsort()], 4)
        tensors |= {f"{module}.{part}": value for part, value in {**found, "weight_g_idx": index}.items()}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**args, "actorder": "group"}}},
    }
    write(base, out, tensors, settings)


def fp8(base: Path, out: Path, scale_format: str | None = None) -> None:
    """transformers' `Fp8Quantize`. Weights that its blocks do not fit are filled with zeros for it, and cut again."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    named = {"scale_fmt": scale_format} if scale_format else {}
    config = FineGrainedFP8Config(weight_block_size=[128, 128], **named)
    encoder = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read(base).items():
        if name.split(".")[-2] not in LINEAR:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        filled = torch.nn.functional.pad(tensor, (0, -columns % 128, 0, -rows % 128))
        for stored, value in encoder.convert({name: filled}).items():
            tensors[stored] = value[:rows, :columns] if stored == name else value
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *_routers(base)],
        **named,
    }
    write(base, out, tensors, settings)


def _routers(base: Path) -> list[str]:
    return sorted(name.removesuffix(".weight") for name in read(base) if name.endswith("mlp.gate.weight"))


def bitsandbytes(base: Path, out: Path, **settings: Any) -> None:
    """bitsandbytes' kernels for a CPU, called by transformers."""
    from transformers import BitsAndBytesConfig

    load(base, quantization_config=BitsAndBytesConfig(**settings)).save_pretrained(out)


def torchao(base: Path, out: Path, kind: str) -> None:
    """torchao, called by transformers."""
    import torchao.quantization as q
    from transformers import TorchAoConfig

    config = q.Int8WeightOnlyConfig(version=2) if kind == "int8" else q.Float8WeightOnlyConfig()
    load(base, quantization_config=TorchAoConfig(config), device_map="cpu").save_pretrained(out)


def modelopt(base: Path, out: Path, name: str) -> None:
    """ModelOpt's `quantize`, calibrated on random tokens, and its export."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    tokens = torch.randint(4, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(2))
    model = mtq.quantize(load(base), copy.deepcopy(getattr(mtq, name)), lambda model: model(input_ids=tokens))
    export_hf_checkpoint(model, export_dir=str(out))


def mlx(base: Path, out: Path, **settings: Any) -> None:
    """mlx-lm's converter. It asks for fields that transformers 5 has renamed."""
    from mlx_lm import convert

    source = out.with_name(f"{out.name}-source")
    shutil.copytree(base, source)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "num_experts": config.get("num_local_experts", 0),
    }
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), str(out), quantize=True, **settings)
    shutil.rmtree(source)


def _mixed_bits(path: str, module: Any) -> bool | dict[str, Any]:
    """Tell mlx-lm which modules have other settings, and which none."""
    if not hasattr(module, "to_quantized") or path.endswith("o_proj"):
        return False
    return {"group_size": 32, "bits": 8} if path.endswith(("v_proj", "down_proj")) else True


def gptqmodel(base: Path, out: Path, **settings: Any) -> None:
    """GPTQModel, calibrated on random tokens."""
    os.cpu_count = lambda: 8  # it asks for three cores, and starts its threads with fewer as well
    from gptqmodel import GPTQModel, QuantizeConfig

    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(4, VOCABULARY, (48,), generator=generator).tolist() for _ in range(32)]
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model = GPTQModel.load(
        str(base), QuantizeConfig(device="cpu", **{"group_size": 64, "desc_act": False, **settings})
    )
    model.quantize(data, batch_size=1)
    model.save(str(out))
    for name in ("config.json", "quantize_config.json"):
        # It notes where it kept layers meanwhile.
        text = re.sub(r'("offload_to_disk_path": )"[^"]*"', r'\1"scratch"', (out / name).read_text())
        (out / name).write_text(text)


def awq(base: Path, out: Path) -> None:
    """GPTQModel again, for AWQ."""
    from gptqmodel.quantization import FORMAT, METHOD

    gptqmodel(base, out, bits=4, sym=False, quant_method=METHOD.AWQ, format=FORMAT.GEMM)


def gptq_2(base: Path, out: Path) -> None:
    """GPTQModel with the second version of its format, which stores zeros as they are."""
    from gptqmodel.quantization import FORMAT

    gptqmodel(base, out, bits=4, sym=False, format=FORMAT.GPTQ_V2)


def gpt_oss(base: Path, out: Path) -> None:
    """torchao's `to_mx`, rounding scales up as gpt-oss' own encoder does, in the tensors of gpt-oss."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read(base).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        rows = tensor.transpose(-1, -2).contiguous()
        scales, codes = to_mx(rows, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
        experts, out_features, columns = rows.shape
        tensors[f"{name}_blocks"] = codes.view(torch.uint8).reshape(experts, out_features, columns // 32, 16)
        tensors[f"{name}_scales"] = scales.view(torch.uint8).reshape(experts, out_features, columns // 32)
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write(base, out, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": dense})


def clear(out: Path) -> None:
    """Remove what a library writes beside weights and settings: the tokenizer of the base, a README."""
    for pattern in ("tokenizer*", "special_tokens*", "README.md", "chat_template*", "quant_log.csv"):
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


_CT = ("llmcompressor", "compressed-tensors")
_FP8 = {"num_bits": 8, "type": "float"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
_GPTQ = ("gptqmodel",)


def _recipe(model: str, *groups: Mapping[str, Any], **more: Any) -> Encoder:
    named = {f"group_{n}": group for n, group in enumerate(groups)}
    return Encoder(model, _CT, functools.partial(compressed_tensors, config_groups=named, **more))


def _made(model: str, packages: tuple[str, ...], encode: Callable[..., None], **settings: Any) -> Encoder:
    return Encoder(model, packages, functools.partial(encode, **settings))


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
_MLX = ("mlx", "mlx-lm")
_BNB = ("bitsandbytes", "transformers")
_AO = ("torchao", "transformers")
_MO = ("nvidia-modelopt",)
_TF = ("transformers",)

ENCODERS: dict[str, Encoder] = {
    "ct-fp8-channel": scheme("FP8_DYNAMIC"),
    "ct-fp8-block": scheme("FP8_BLOCK"),
    "ct-fp8-tensor": _recipe("narrow", _group(["Linear"], **_FP8, strategy="tensor")),
    "ct-int8": scheme("W8A8"),
    "ct-int8-packed": scheme("W8A16"),
    "ct-int4": scheme("W4A16"),
    "ct-int4-asymmetric": scheme("W4A16_ASYM"),
    "ct-int3-asymmetric": _recipe(
        "llama", _group(["Linear"], **{**_INT4, "num_bits": 3, "group_size": 32, "symmetric": False})
    ),
    "ct-int4-act-order": _made("llama", ("compressed-tensors",), act_order),
    "ct-nvfp4": scheme("NVFP4A16"),
    "ct-mxfp4": scheme("MXFP4A16"),
    "ct-mxfp8": scheme("MXFP8A16"),
    "ct-two-schemes": _recipe(
        "llama",
        _group(["re:.*self_attn.*"], **_FP8, strategy="channel"),
        _group(["re:.*mlp.*"], **_INT4),
        ignore=["lm_head", "re:.*o_proj$"],
    ),
    "fp8-block": _made("blocks", _TF, fp8),
    "fp8-ue8m0": _made("blocks", _TF, fp8, scale_format="ue8m0"),
    "fp8-ragged": _made("ragged", _TF, fp8),
    "fp8-ragged-evenly": _made("ragged evenly", _TF, fp8),
    "fp8-experts": _made("qwen3_moe", _TF, fp8),
    "gptoss-mxfp4": _made("gpt_oss", ("torchao",), gpt_oss),
    "bnb-nf4": _made("llama", _BNB, bitsandbytes, **_NF4),
    "bnb-nf4-double": _made("nested", _BNB, bitsandbytes, **_NF4, bnb_4bit_use_double_quant=True),
    "bnb-fp4": _made("llama", _BNB, bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": _made("narrow", _BNB, bitsandbytes, load_in_8bit=True),
    "torchao-int8": _made("narrow", _AO, torchao, kind="int8"),
    "torchao-fp8": _made("narrow", _AO, torchao, kind="fp8"),
    "modelopt-fp8": _made("narrow", _MO, modelopt, name="FP8_DEFAULT_CFG"),
    "modelopt-fp8-block": _made("blocks", _MO, modelopt, name="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-mxfp8": _made("narrow", _MO, modelopt, name="MXFP8_DEFAULT_CFG"),
    "modelopt-nvfp4": _made("llama", _MO, modelopt, name="NVFP4_DEFAULT_CFG"),
    "modelopt-int4-awq": _made("llama", _MO, modelopt, name="INT4_AWQ_CFG"),
    "gptq-2bit": _made("llama", _GPTQ, gptqmodel, bits=2, sym=True),
    "gptq-3bit": _made("llama", _GPTQ, gptqmodel, bits=3, sym=True),
    "gptq-4bit": _made("qwen2", _GPTQ, gptqmodel, bits=4, sym=True),
    "gptq-4bit-asymmetric": _made("llama", _GPTQ, gptqmodel, bits=4, sym=False),
    "gptq-4bit-act-order": _made("llama", _GPTQ, gptqmodel, bits=4, sym=True, desc_act=True),
    "gptq-4bit-channel": _made(
        "llama", _GPTQ, gptqmodel, bits=4, sym=True, group_size=-1, act_group_aware=False
    ),
    "gptq-4bit-v2": Encoder("llama", _GPTQ, gptq_2),
    "gptq-8bit": _made("narrow", _GPTQ, gptqmodel, bits=8, sym=True, group_size=32),
    "gptq-dynamic": _made(
        "llama",
        _GPTQ,
        gptqmodel,
        bits=4,
        sym=True,
        dynamic={r"-:.*o_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": 32}},
    ),
    "awq-gemm": Encoder("llama", _GPTQ, awq),
    **{f"mlx-{bits}bit": _made("llama", _MLX, mlx, q_bits=bits, q_group_size=64) for bits in (2, 3, 4, 5, 6)},
    "mlx-8bit": _made("narrow", _MLX, mlx, q_bits=8, q_group_size=32),
    **{f"mlx-{mode}": _made("narrow", _MLX, mlx, q_mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "mlx-mixed-bits": _made("llama", _MLX, mlx, q_bits=4, q_group_size=64, quant_predicate=_mixed_bits),
    "mlx-experts": _made("qwen3_moe", _MLX, mlx, q_bits=4, q_group_size=64),
}
