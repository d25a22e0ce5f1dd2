"""What llm-compressor and transformers make of the weights in `tests.storages.quantising`. Runs in the oracles' environment.

    .venv-oracles/bin/python -m tests.storages.making.quantisers [--write]

It prints digests of every tensor as one line of JSON, with the configurations; ``--write`` records them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.storages.digesting import digest
from tests.storages.making import oracles
from tests.storages.making.encoders import compressed_tensors, read, write
from tests.storages.quantising import FITTING, MODELS, RECORDED, digest_of, weights_of


def _groups(size: int, *, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, "symmetric": symmetric}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


RECIPES: dict[str, dict[str, Any]] = {
    "fp8-block": {"targets": "Linear", "scheme": "FP8_BLOCK"},
    "fp8-channel": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
    "int8": {"targets": "Linear", "scheme": "W8A8"},
    "int4": {"targets": "Linear", "scheme": "W4A16"},
    "int4-asym": {"targets": "Linear", "scheme": "W4A16_ASYM"},
    "int4-g32": _groups(32, symmetric=True),
    "int4-asym-g32": _groups(32, symmetric=False),
    "mxfp4": {"targets": "Linear", "scheme": "MXFP4A16"},
    "mxfp8": {"targets": "Linear", "scheme": "MXFP8A16"},
    "nvfp4": {"targets": "Linear", "scheme": "NVFP4A16"},
}
"""Scheme → what llm-compressor's `QuantizationModifier` is told."""


def build(kind: str, root: Path) -> None:
    """Write a model with the known weights, in bfloat16."""
    import transformers as t

    from tests.storages.making.models import SMALL, write_tokenizer

    shape = MODELS[kind]
    fields = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **fields})).to(torch.bfloat16)
    with torch.no_grad():
        for module, weight in weights_of(kind).items():
            model.get_submodule(module).weight.copy_(weight)
    model.save_pretrained(root)
    write_tokenizer(root)


def of_transformers(kind: str) -> dict[str, torch.Tensor]:
    """Return what ``Fp8Quantize`` makes. Weights that its blocks do not fit are filled with zeros for it, and cut again."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=[128, 128])
    encoder = Fp8Quantize(SimpleNamespace(quantization_config=config))
    found = {}
    for module, weight in weights_of(kind).items():
        rows, columns = weight.shape
        filled = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
        for name, tensor in encoder.convert({f"{module}.weight": filled}).items():
            found[name] = tensor[:rows, :columns] if name.endswith(".weight") else tensor
    return found


def made(scheme: str, kind: str, work: Path) -> dict[str, Any]:
    """Return digests of the tensors of the linear layers, of their values as a library decodes them, and the configuration."""
    base, out = work / kind, work / f"{kind}-{scheme}"
    if not base.exists():
        build(kind, base)
    if scheme == "fp8":
        write(base, out, of_transformers(kind), {})
        values = oracles.fp8_blocks(out)
    else:
        compressed_tensors(base, out, **RECIPES[scheme])
        values = oracles.compressed_tensors(out)
    modules = tuple(f"{module}." for module in weights_of(kind))
    tensors = {name: one for name, one in sorted(read(out).items()) if name.startswith(modules)}
    found = {
        "tensors": {name: digest_of(one) for name, one in tensors.items()},
        "values": {name: digest(one.float32)[:20] for name, one in values.items()},
    }
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    return {**found, "config": settings} if settings else found


def main(arguments: list[str]) -> None:
    packages = ("llmcompressor", "compressed-tensors", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "made_by": ", ".join(f"{package} {oracles.version(package)}" for package in packages),
            "outputs": {f"{scheme} {kind}": made(scheme, kind, Path(folder)) for scheme, kind in FITTING},
        }
    if "--write" in arguments:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + json.dumps(found))  # noqa: T201 - libraries print as well; this is the last line


if __name__ == "__main__":
    main(sys.argv[1:])
