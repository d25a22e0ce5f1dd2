"""Directories of checkpoints and adapters: hollow ones, or with random values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.inputs import build_tokenizer

from hollows.tensors import Fill, Piece, Stored, hole, random_values, write

if TYPE_CHECKING:
    from pathlib import Path

    from hollows.models import Model, Module, Targets

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"


def make_base(model: Model, directory: Path, *, is_hollow: bool = True) -> int:
    """Write a checkpoint; return the bytes of its tensors. A hollow one takes the room of its headers."""

    def filled(tensor: Stored) -> Iterable[Piece]:
        return list(model.small(tensor)) or (() if is_hollow else random_values(tensor))

    directory.mkdir(parents=True)
    stored = list(model.tensors())
    total = sum(tensor.nbytes for tensor in stored)
    weight_map: dict[str, str] = {}
    for file, held in _shared_out(stored, model.files, total):
        if not is_hollow:
            _seed(file)
        write(directory / file, held, filled)
        weight_map |= dict.fromkeys((tensor.name for tensor in held), file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    config = model.config()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for named in config.get("auto_map", {}).values():
        # Copied with the weights, and never run.
        (directory / f"{named.partition('.')[0]}.py").write_text("# The model's own code.\n")
    build_tokenizer(directory)
    return total


def _shared_out(
    stored: list[Stored], files: tuple[str, ...], total: int
) -> Iterator[tuple[str, list[Stored]]]:
    """Yield each file with its tensors: as many bytes in each as tensors allow, in the order of the layers."""
    held: list[list[Stored]] = [[] for _ in files]
    before = 0
    for tensor in stored:
        held[before * len(files) // total].append(tensor)
        before += tensor.nbytes
    yield from zip(files, held, strict=True)


def make_adapter(
    model: Model, targets: Targets, rank: int, directory: Path, *, is_hollow: bool = True
) -> int:
    """Write an adapter as PEFT stores it, in BF16; return the bytes of its factors.

    The first module of a hollow one has values: an adapter of zeros alone is refused.
    """
    directory.mkdir(parents=True)
    modules = list(model.modules(targets))
    first = {tensor.name for tensor in _factors(modules[0], rank)}
    fill: Fill = _random_factor
    if is_hollow:

        def fill(tensor: Stored) -> Iterable[Piece]:
            return _random_factor(tensor) if tensor.name in first else hole(tensor)

    _seed(model.name)
    factors = (tensor for module in modules for tensor in _factors(module, rank))
    nbytes = write(directory / WEIGHTS, factors, fill)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "peft_version": "0.21.2", **model.adapter_fields(targets),
    }  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(config, indent=2))
    return nbytes


def _factors(module: Module, rank: int) -> Iterator[Stored]:
    n_out, n_in = module.shape
    width = rank * module.n_experts
    yield Stored(f"base_model.model.{module.name}.lora_A.weight", "BF16", (width, n_in))
    yield Stored(f"base_model.model.{module.name}.lora_B.weight", "BF16", (n_out, width))


def _random_factor(tensor: Stored) -> Iterator[Piece]:
    """Yield random values that change weights by some hundredths."""
    import torch

    rows, columns = tensor.shape
    spread = columns**-0.5 if ".lora_A." in tensor.name else 0.004
    values = (torch.randn(rows, columns) * spread).bfloat16()
    yield values.view(torch.uint8).numpy().data


def _seed(name: str) -> None:
    import torch

    torch.manual_seed(sum(name.encode()))
