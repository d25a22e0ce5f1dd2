"""Options with a few values: their types, a ``Literal`` each."""

from __future__ import annotations

from typing import Literal

VerifyLevel = Literal["none", "sample", "full"]
ProofLevel = Literal["structure", "sample", "full"]
OutputDtype = Literal["bfloat16", "float16", "float32"]
BaseIs = Literal["original", "residual"]
CombineMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "svd"]
ExpertLayout = Literal["out-in", "in-out", "unsloth"]
Engine = Literal["vllm"]
"""Engines that `verify` can run."""

ServingEngine = Literal["vllm", "lmdeploy", "lorax", "sglang", "tgi", "llamacpp"]
"""Engines whose rules for adapters are known."""

Link = Literal["copy", "reflink", "hard"]
Naming = Literal["v4", "v5"]
"""Major versions of transformers whose names modules can have."""

ExpertForm = Literal["split", "fuse"]
AdapterFormat = Literal["peft", "gguf", "mlx"]
