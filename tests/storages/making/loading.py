"""Loads outputs by the libraries that quantise. Runs in the oracles' environment.

``python -m tests.storages.making.loading KIND=FOLDER…`` prints a JSON line: by folder, what the model computes of the prompt,
and the digest of each linear layer's weight that it holds dense; or the ``error`` with which it is not loaded.

The kind is a method, or ``plain``: as ``from_pretrained`` loads it and computes with it, if nothing more is said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.storages.digesting import digest
from tests.storages.making.oracles import gptqmodel_of
from tests.storages.reference import PROMPT


def load(root: Path, kind: str) -> Any:
    """Return a model as its library loads it on a CPU."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if kind in ("gptq", "awq"):
        return gptqmodel_of(root, torch.bfloat16)
    more = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if kind == "ct" else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **more
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def ask(root: Path, kind: str) -> dict[str, Any]:
    """Return what a model computes, and what it holds."""
    model = load(root, kind)
    weights = {
        name: getattr(module, "weight", None)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
    }
    dense = {
        name: digest(weight.detach())
        for name, weight in weights.items()
        # Of what stays packed there is none, or one of codes.
        if weight is not None and type(weight.data) is torch.Tensor and weight.dtype == torch.bfloat16
    }
    if kind == "bnb":
        model = model.dequantize()
    if kind not in (
        "torchao",
        "gptq",
        "awq",
        "plain",
    ):  # whose layers compute in the dtype that they decode to
        model = model.float()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPT)).logits
    return {"dense": dense, "logits": logits.float().tolist()}


def tried(root: Path, kind: str) -> dict[str, Any]:
    """Return the same, or an error."""
    try:
        return ask(root, kind)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test says whether it is expected
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    said = {
        folder: tried(Path(folder), kind) for kind, folder in (text.split("=", 1) for text in sys.argv[1:])
    }
    print("\n" + json.dumps(said))  # noqa: T201 - libraries print as well; this is the last line
