"""What each library decodes from a fixture, by its own code. Runs in the oracles' environment.

``python -m tests.storages.making.oracles FOLDER…`` prints a JSON line for each: library, function, dtype and, by weight,
the digests of what the library decodes in float32 and in the dtype that it decodes to by itself.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tests.storages.digesting import digest
from tests.storages.making.encoders import read
from tests.storages.making.models import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

BF16, F32 = torch.bfloat16, torch.float32


class Values(NamedTuple):
    """One weight as a library decodes it."""

    float32: torch.Tensor
    own: torch.Tensor
    """In the library's own dtype."""


class Oracle(NamedTuple):
    """A library that decodes."""

    package: str
    function: str
    decode: Callable[[Path], dict[str, Values]]


def config_of(root: Path) -> dict[str, Any]:
    """Return ``config.json``."""
    return json.loads((root / "config.json").read_text())


def modules(tensors: dict[str, torch.Tensor], marker: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the parts of each module that has a part of some name: module → part → tensor."""
    names = [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]
    return {
        name: {
            key[len(name) + 1 :]: value for key, value in tensors.items() if key.rpartition(".")[0] == name
        }
        for name in sorted(names)
    }


def compressed_tensors(root: Path) -> dict[str, Values]:
    """Decompress with the scheme that the configuration has for each module."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.utils.match import match_name

    settings = config_of(root)["quantization_config"]
    groups = settings["config_groups"].values()
    found = {}
    for name, parts in modules(read(root), "weight_scale").items():
        group = next(
            group
            for group in groups
            if any(target == "Linear" or match_name(name, target) for target in group["targets"])
        )
        weights = {key: value for key, value in group["weights"].items() if key != "actorder"}
        scheme = QuantizationScheme(targets=group["targets"], weights=weights)
        compressor = BaseCompressor.get_value_from_registry(group.get("format") or settings["format"])
        index = parts.pop("weight_g_idx", None)
        if index is not None:
            parts["weight_packed"] = _by_groups(parts, index)
        own = compressor.decompress(dict(parts), scheme)["weight"]
        wide = _in_float32(parts, scheme) if own.dtype == BF16 and scheme.weights.num_bits == 4 else None
        if wide is None:
            if parts["weight_scale"].dtype == BF16:
                parts["weight_scale"] = parts["weight_scale"].float()
            wide = compressor.decompress(dict(parts), scheme)["weight"].float()
        if index is not None:
            back = index.long().argsort(stable=True).argsort()
            own, wide = own[:, back], wide[:, back]
        found[f"{name}.weight"] = Values(wide, own)
    return found


def _in_float32(parts: dict[str, torch.Tensor], scheme: Any) -> torch.Tensor | None:
    """Call what `decompress` calls for FP4, which has bfloat16 written in it; None for integers."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = parts["weight_packed"], parts["weight_scale"]
    if packed.dtype != torch.uint8:
        return None
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=F32)
    wide = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
    shared = parts.get("weight_global_scale")
    return dequantize(x_q=codes, scale=wide, args=scheme.weights, global_scale=shared, dtype=F32)


def _by_groups(parts: dict[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Pack codes again with the columns of each group together, which is all that the release decompresses."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(parts["weight_packed"], 4, torch.Size(parts["weight_shape"].tolist()))
    return pack_to_int32(codes[:, index.long().argsort(stable=True)], 4)


def fp8_blocks(root: Path) -> dict[str, Values]:
    """compressed-tensors decodes blocks that are cut off; transformers does not."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    found = {}
    for name, parts in modules(read(root), "weight_scale_inv").items():
        values = [
            FP8BlockDequantizer(targets=["re:.*"], weight_block_size=(128, 128), dtype=dtype).process(
                {f"m.{key}": value for key, value in parts.items()}
            )["m.weight"]
            for dtype in (F32, BF16)
        ]
        found[f"{name}.weight"] = Values(*values)
    return found


def fp8_whole_blocks(root: Path) -> dict[str, Values]:
    """transformers' own, where blocks fit; what compressed-tensors makes of them is the same."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    decode = Fp8Dequantize(None)._dequantize_one
    found = {}
    for name, parts in modules(read(root), "weight_scale_inv").items():
        pair = parts["weight"], parts["weight_scale_inv"]
        found[f"{name}.weight"] = Values(decode(*pair, F32), decode(*pair, BF16))
    other = fp8_blocks(root)
    assert all(torch.equal(values.float32, other[name].float32) for name, values in found.items())
    return found


def gpt_oss(root: Path) -> dict[str, Values]:
    """bfloat16 holds every value."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = read(root)
    found = {}
    for name in sorted(name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        own = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        found[name] = Values(own.float(), own)
    return found


def bitsandbytes_4bit(root: Path) -> dict[str, Values]:
    """The decoding kernel for a CPU."""
    import bitsandbytes.functional as bnb

    tensors = read(root)
    found = {}
    for name in sorted(name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")):
        parts = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device="cpu")
        values = []
        for dtype in (F32, BF16):
            state.dtype = dtype
            values.append(bnb.dequantize_4bit(tensors[name], state))
        found[name] = Values(*values)
    return found


def bitsandbytes_8bit(root: Path) -> dict[str, Values]:
    """Float32, which transformers rounds."""
    import bitsandbytes.functional as bnb

    found = {}
    for name, parts in modules(read(root), "SCB").items():
        wide = bnb.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        found[f"{name}.weight"] = Values(wide, wide.to(BF16))
    return found


def torchao(root: Path) -> dict[str, Values]:
    """The tensors that transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root, dtype=BF16)
    quantised = {
        name: module.weight
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "qdata")
    }
    return {f"{name}.weight": Values(w.dequantize(F32), w.dequantize()) for name, w in quantised.items()}


def modelopt(root: Path) -> dict[str, Values]:
    """Each of its quantised tensors. A scale of FP8 is rounded before it is multiplied; float32 has nothing to round."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    algorithm = config_of(root)["quantization_config"]["quant_algo"]
    found = {}
    for name, parts in modules(read(root), "weight_scale").items():
        codes, scale = parts["weight"], parts["weight_scale"]
        if algorithm == "NVFP4":
            tensor = NVFP4QTensor((codes.shape[0], codes.shape[1] * 2), BF16, codes)
            more = {"scale": scale, "double_scale": parts["weight_scale_2"], "block_sizes": {-1: 16}}
        elif algorithm == "MXFP8":
            tensor, more = MXFP8QTensor(codes.shape, BF16, codes), {"scale": scale, "block_sizes": {-1: 32}}
        elif algorithm == "fp8_pb_wo":
            tensor = FP8QTensor(codes.shape, BF16, codes)
            more = {"scale": scale.reshape(-(-codes.shape[0] // 128), -1), "block_sizes": {-1: 128, -2: 128}}
        else:
            tensor, more = FP8QTensor(codes.shape, BF16, codes), {"scale": scale, "block_sizes": None}
        found[f"{name}.weight"] = Values(tensor.dequantize(F32, **more), tensor.dequantize(BF16, **more))
    return found


def modelopt_awq(root: Path) -> dict[str, Values]:
    """ModelOpt packs and does not unpack: what its packing makes of these values are the stored bytes.

    A column of the weight is multiplied by the scale that the layer multiplies its inputs by.
    """
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    found = {}
    for name, parts in modules(read(root), "weight_scale").items():
        packed, scale = parts["weight"], parts["weight_scale"]
        codes = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1).to(torch.int8)
        codes = torch.where(codes > 7, codes - 16, codes)
        block = codes.shape[1] // scale.shape[1]
        values = codes.float() * scale.repeat_interleave(block, 1)
        assert torch.equal(pack_int4_in_uint8(values, scale, block), packed)
        if "pre_quant_scale" in parts:
            values = values * parts["pre_quant_scale"].float()
        found[f"{name}.weight"] = Values(values, values.to(BF16))
    return found


def gptqmodel_of(root: Path, dtype: torch.dtype) -> Any:
    """Return a model as GPTQModel loads it, on its kernels in plain torch. It asks for a tokenizer as well."""
    os.cpu_count = lambda: 8  # it asks for three cores, and starts its threads with fewer as well
    from gptqmodel import BACKEND, GPTQModel

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True)
        write_tokenizer(Path(folder))
        is_awq = config_of(root)["quantization_config"]["quant_method"] == "awq"
        backend = BACKEND.AUTO if is_awq else BACKEND.TORCH
        return GPTQModel.load(folder, device="cpu", dtype=dtype, backend=backend).model.eval()


def gptqmodel(root: Path) -> dict[str, Values]:
    """The kernels in plain torch."""
    found = {}
    parts = modules(read(root), "qweight")
    model = gptqmodel_of(root, next(iter(parts.values()))["scales"].dtype)
    for name, module in model.named_modules():
        if name in parts:
            own = module.dequantize_weight().T
            module.scales = module.scales.float()
            found[f"{name}.weight"] = Values(module.dequantize_weight().T, own)
    return found


def gptqmodel_awq(root: Path) -> dict[str, Values]:
    """Its packing's own decoding, which is AutoAWQ's."""
    os.cpu_count = lambda: 8
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    found = {}
    for name, part in modules(read(root), "qweight").items():
        group = part["qweight"].shape[0] // part["scales"].shape[0]
        own, wide = (
            dequantize_gemm(part["qweight"], part["qzeros"], scales, 4, group).T
            for scales in (part["scales"], part["scales"].float())
        )
        found[f"{name}.weight"] = Values(wide, own)
    return found


def mlx(root: Path) -> dict[str, Values]:
    """MLX on a CPU. In bfloat16 it rounds the product and then the sum."""
    import mlx.core as mx
    import numpy as np

    tensors = mx.load(str(root / "model.safetensors"))
    settings = config_of(root)["quantization"]
    found = {}
    for name in sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales")):
        about = {key: settings[key] for key in ("group_size", "bits", "mode")}
        about |= settings.get(name, {})
        parts = [tensors.get(f"{name}.{part}") for part in ("weight", "scales", "biases")]
        wide = [
            parts[0],
            *(None if p is None or p.dtype == mx.uint8 else p.astype(mx.float32) for p in parts[1:]),
        ]
        wide[1] = parts[1] if wide[1] is None else wide[1]
        decoded = [
            mx.dequantize(*given, dtype=dtype, **about)
            for given, dtype in ((wide, mx.float32), (parts, mx.bfloat16))
        ]
        arrays = [torch.from_numpy(np.array(one.astype(mx.float32))) for one in decoded]
        found[f"{name}.weight"] = Values(arrays[0], arrays[1].to(BF16))
    return found


ORACLES: dict[str, Oracle] = {
    "ct-": Oracle("compressed-tensors", "BaseCompressor.decompress", compressed_tensors),
    "fp8-ragged": Oracle("compressed-tensors", "FP8BlockDequantizer", fp8_blocks),
    "fp8-": Oracle("transformers", "Fp8Dequantize", fp8_whole_blocks),
    "gptoss-": Oracle("transformers", "convert_moe_packed_tensors", gpt_oss),
    "bnb-int8": Oracle("bitsandbytes", "int8_vectorwise_dequant", bitsandbytes_8bit),
    "bnb-": Oracle("bitsandbytes", "dequantize_4bit", bitsandbytes_4bit),
    "torchao-": Oracle("torchao", "TorchAOBaseTensor.dequantize", torchao),
    "modelopt-int4-awq": Oracle("nvidia-modelopt", "pack_int4_in_uint8", modelopt_awq),
    "modelopt-": Oracle("nvidia-modelopt", "QTensor.dequantize", modelopt),
    "gptq-": Oracle("gptqmodel", "TorchLinear.dequantize_weight", gptqmodel),
    "awq-": Oracle("gptqmodel", "dequantize_gemm", gptqmodel_awq),
    "mlx-": Oracle("mlx", "dequantize", mlx),
}
"""By the beginning of a fixture's name; the first that fits."""


def oracle_of(name: str) -> Oracle:
    """Return the oracle of a fixture."""
    return next(oracle for start, oracle in ORACLES.items() if name.startswith(start))


@functools.cache
def version(package: str) -> str:
    """Return the release of a distribution that is installed here."""
    return importlib.metadata.version(package)


def ask(root: Path) -> dict[str, Any]:
    """Return what the oracle of a fixture says about it."""
    oracle = oracle_of(root.name)
    values = oracle.decode(root)
    assert values, f"{root.name}: the oracle found nothing to decode"
    own = next(iter(values.values())).own.dtype
    return {
        "oracle": f"{oracle.package} {version(oracle.package)}, {oracle.function}",
        "dtype": str(own).removeprefix("torch."),
        "weights": {
            name: {
                "shape": list(found.float32.shape),
                "float32": digest(found.float32),
                str(own).removeprefix("torch."): digest(found.own),
                "rounds once": torch.equal(found.float32.to(own), found.own),
            }
            for name, found in sorted(values.items())
        },
    }


if __name__ == "__main__":
    said = {Path(folder).name: ask(Path(folder)) for folder in sys.argv[1:]}
    print("\n" + json.dumps(said))  # noqa: T201 - libraries print as well; this is the last line
