"""The fixtures, what their libraries decode from them, and models that compute with it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.storages.digesting import digest

if TYPE_CHECKING:
    import torch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
NAMES = tuple(sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
ONE_OF_EACH = (
    "awq-gemm", "bnb-fp4", "bnb-int8", "bnb-nf4-double", "ct-fp8-block", "ct-fp8-tensor", "ct-int3-asymmetric",
    "ct-int4-act-order", "ct-mxfp4", "ct-mxfp8", "ct-nvfp4", "ct-two-schemes", "fp8-experts", "fp8-ragged", "fp8-ue8m0",
    "gptoss-mxfp4", "gptq-2bit", "gptq-3bit", "gptq-4bit-act-order", "gptq-dynamic", "mlx-experts", "mlx-mxfp8", "mlx-nvfp4",
    "modelopt-fp8", "modelopt-fp8-block", "modelopt-int4-awq", "modelopt-mxfp8", "modelopt-nvfp4", "torchao-fp8",
    "torchao-int8",
)  # fmt: skip
"""Fixtures that together run every line and branch that all of them run: each codec of each method is among them."""

ONE_OF_EACH_METHOD = (
    "awq-gemm", "bnb-fp4", "bnb-int8", "ct-int4-act-order", "ct-mxfp8", "ct-nvfp4", "fp8-experts", "fp8-ragged", "gptoss-mxfp4",
    "gptq-3bit", "gptq-4bit-act-order", "mlx-experts", "mlx-mxfp8", "modelopt-fp8", "modelopt-int4-awq", "torchao-int8",
)  # fmt: skip
"""Fixtures for tests of whole merges, where codecs have tests of their own."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEAR[:4]
EXPERTS = ("fp8-experts", "mlx-experts")
"""Their experts are modules in the files, and one stack in transformers."""

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SETTINGS = ("quantization_config", "quantization", "compression_config")
PROMPT = [[1, 4, 7, 13, 20, 30, 17, 9, 25, 31]]
RANK = 4


def said(name: str) -> dict[str, Any]:
    """Return what the libraries said of a fixture: who made it, who decoded it, and the digests of what they decoded."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def weights_of(root: Path) -> dict[str, Any]:
    """Return the parameters of a checkpoint, as they are identified."""
    from lora_merge.planning.resolve import resolve_base

    base = resolve_base(root)
    wrong = [issue for issue in base.issues if issue.severity == "error"]
    assert not wrong, wrong
    return dict(base.weights)


def quantised_of(root: Path) -> dict[str, Any]:
    """Return the parameters that are stored quantised."""
    return {name: weight for name, weight in weights_of(root).items() if not weight.storage.is_dense}


def decoded(root: Path) -> dict[str, torch.Tensor]:
    """Return every parameter of a checkpoint in float32."""
    from lora_merge.formats.weights import values_of

    return {name: values_of(weight) for name, weight in weights_of(root).items()}


@functools.cache
def by_library(name: str) -> dict[str, torch.Tensor]:
    """Return every parameter of a fixture in float32, the quantised ones as its library decodes them.

    The library is not asked: what we decode has the digest of what it decoded.
    """
    values, expected = decoded(FIXTURES / name), said(name)["weights"]
    for weight, about in expected.items():
        assert digest(values[weight]) == about["float32"], weight
    return values


def plain_config(root: Path) -> dict[str, Any]:
    """Return ``config.json`` without what it says of quantisation."""
    config = json.loads((root / "config.json").read_text())
    for key in SETTINGS:
        config.pop(key, None)
    return config


def loadable(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under names that transformers knows: MLX stacks experts, the files of others do not."""
    found = {}
    for name, tensor in values.items():
        stack, is_stack, last = name.partition(".switch_mlp.")
        if is_stack:
            found |= {f"{stack}.experts.{n}.{last}": one.contiguous() for n, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def model_of(values: dict[str, torch.Tensor], root: Path, work: Path) -> Any:
    """Return a model in float32 with some values, and the configuration of a checkpoint."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps({**plain_config(root), "dtype": "float32"}))
    tensors = {name: value.float().contiguous() for name, value in loadable(values).items()}
    save_file(tensors, work / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        work, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    """Return what a model computes of the prompt."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(PROMPT)).logits


def adapted(model: Any, adapter: Path, **config: Any) -> torch.Tensor:
    """Write an adapter whose deltas are about 2 % of the weights, and return the logits with it, not merged."""
    import torch
    from peft import LoraConfig, get_peft_model

    alpha = 2 * RANK
    with_adapter = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=alpha, **config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_A" in name:
                spread = parameter.shape[1] ** -0.5
            elif "lora_B" in name:
                # Of a weight with entries of about 0.07.
                spread = 0.02 * 0.07 * parameter.shape[1] ** -0.5 * 8
            else:
                continue
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    with_adapter.save_pretrained(adapter)
    return logits_of(with_adapter.eval())


def everywhere(name: str) -> dict[str, Any]:
    """Return the fields of an adapter on every quantised layer that PEFT can name."""
    if name == "gptoss-mxfp4":
        return {"target_modules": ["q_proj", "o_proj"], "target_parameters": list(STACKS)}
    return {"target_modules": list(ATTENTION if name in EXPERTS else LINEAR)}


def beside(name: str) -> dict[str, Any]:
    """Return the fields of an adapter on layers that are not quantised; empty where all of them are."""
    if name == "gptoss-mxfp4":
        return {"target_modules": ["q_proj", "o_proj"]}
    return {} if name.startswith("mlx") else {"target_modules": ["lm_head"]}


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(root.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True where dtype, shape and all bytes are equal, NaN and the sign of zero included."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )
