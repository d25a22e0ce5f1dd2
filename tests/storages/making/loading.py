"""Loads mixed outputs by the libraries that quantise. Runs in the oracles' environment.

``python -m tests.storages.making.loading FOLDER…`` prints a JSON line: by folder, what the model computes of the prompt,
and the digest of each linear layer's weight that it holds dense.
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
    dense = {
        name: digest(module.weight.detach())
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and type(module.weight.data) is torch.Tensor
    }
    if kind == "bnb":
        model = model.dequantize()
    if kind not in ("torchao", "gptq", "awq"):  # whose layers compute in the dtype that they decode to
        model = model.float()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPT)).logits
    return {"dense": dense, "logits": logits.float().tolist()}


if __name__ == "__main__":
    said = {folder: ask(Path(folder), kind) for kind, folder in (text.split("=", 1) for text in sys.argv[1:])}
    print("\n" + json.dumps(said))  # noqa: T201 - libraries print as well; this is the last line
