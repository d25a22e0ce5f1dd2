"""Options with a few values that no table has as keys: their types, a ``Literal`` each."""

from __future__ import annotations

from typing import Literal

VerifyLevel = Literal["none", "sample", "full"]
ProofLevel = Literal["structure", "sample", "full"]
OutputDtype = Literal["bfloat16", "float16", "float32"]
OutputStorage = Literal["dense", "mixed", "base"]
RoundingMethod = Literal["nearest", "adapter", "stochastic"]
BaseIs = Literal["original", "residual"]
ExpertLayout = Literal["out-in", "in-out", "unsloth"]
Engine = Literal["vllm"]
"""Engines that `verify` can run."""

Shell = Literal["bash", "zsh", "fish"]
"""Shells in which the command completes."""

Link = Literal["copy", "reflink", "hard"]
Copies = Literal["auto", "store", "stream"]
UploadWay = Literal["spool", "stream"]
Visibility = Literal["private", "public"]
Naming = Literal["v4", "v5"]
"""Major versions of transformers whose names modules can have."""

ExpertForm = Literal["split", "fuse"]
AdapterFormat = Literal["peft", "gguf", "mlx"]
