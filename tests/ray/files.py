"""A base of many files, each of which takes a moment, an adapter for it, and what one process makes of both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

SIDE, N_FILES, RANK = 2048, 16, 16
MATRICES = 2
"""In each file."""


class Large(NamedTuple):
    """A merge."""

    base: Path
    adapter: Path
    expected: Path
    """The output of one process."""

    def arguments(self, out: object, *more: object) -> list[str]:
        """Return the arguments of the command."""
        found = ["--base", self.base, "--adapter", self.adapter, "--out", out, *more]
        return list(map(str, found))


def build(root: Path) -> Large:
    """Write both, and merge them."""
    import torch
    from safetensors.torch import save_file

    from lora_merge import api

    generator = torch.Generator().manual_seed(3)
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    factors, places, modules = {}, {}, []
    for n in range(N_FILES):
        name, tensors = f"model-{n + 1:05}-of-{N_FILES:05}.safetensors", {}
        for k in range(MATRICES):
            module = f"layers.{n}.proj{k}"
            modules.append(module)
            # For float16 each process loads torch, so that its files take a moment.
            tensors[f"{module}.weight"] = torch.randn(SIDE, SIDE, generator=generator).to(torch.float16)
            places[f"{module}.weight"] = name
            for side in "AB":
                shape = (RANK, SIDE) if side == "A" else (SIDE, RANK)
                factors[f"base_model.model.{module}.lora_{side}.weight"] = torch.randn(
                    *shape, generator=generator
                )
        save_file(tensors, base / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    api.merge(base=base, adapter=adapter, out=root / "expected" / "out", executor="serial")
    return Large(base, adapter, root / "expected" / "out")
