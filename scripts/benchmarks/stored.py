"""A base in FP8 against one in BF16: decoded and merged, and carried; all take turns in one run."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hollows.tensors import Stored, random_values, write

from benchmarks import turns
from benchmarks.cases import TARGETS, Case
from benchmarks.inputs import (
    MAX_SHARD_BYTES,
    VERSION,
    Place,
    Shape,
    base_place,
    build_base,
    factors,
    shape_for,
)
from benchmarks.machine import lora_merge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.measure import Sample

BLOCK = 128
RANK = 16
HEAD = ("lm_head",)
"""The one linear layer that quantised checkpoints keep dense: an adapter of it touches nothing that is quantised."""

_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}


@dataclass(frozen=True, slots=True)
class Side:
    """One merge of those that take turns."""

    name: str
    base: Place
    adapter: Place

    def command(self, out: Path) -> list[str]:
        """Return the command that makes an output."""
        return merging(self.base, self.adapter, out)


def merging(base: Place, adapter: Place, out: Path) -> list[str]:
    """Return the command that merges an adapter, and reports in JSON."""
    places = ["--base", str(base.directory), "--adapter", str(adapter.directory), "--out", str(out)]
    return [*lora_merge(), *places, "--json", "--quiet"]


def sides(cache: Path, size_gb: float) -> list[Side]:
    """Return the four merges: a BF16 base and an FP8 one, each of about this size on the disk; all linear layers, and the
    head alone.
    """
    plain = base_place(cache, Case(size_gb, "bfloat16", "all", RANK))
    coded, shape = fp8_place(cache, size_gb), shape_for(2 * size_gb, "bfloat16")
    shapes = {"bf16": (plain, shape_for(size_gb, "bfloat16")), "fp8": (coded, shape)}
    return [
        Side(f"{name}, {targets}", base, adapter_place(cache, f"{size_gb:g}GB-{name}", base, shape, modules))
        for targets, modules in (("all", TARGETS["all"]), ("head", HEAD))
        for name, (base, shape) in shapes.items()
    ]


def fp8_place(cache: Path, size_gb: float) -> Place:
    """Return the place of a base in FP8, of about this size on the disk."""
    shape = shape_for(2 * size_gb, "bfloat16")
    about = {"shape": asdict(shape), "dtype": "fp8", "version": VERSION}
    return Place(cache / f"base-{size_gb:g}GB-fp8", about, build_fp8, (shape,))


def adapter_place(
    cache: Path, name: str, base: Place, shape: Shape, modules: tuple[str, ...] = TARGETS["all"]
) -> Place:
    """Return the place of an adapter of some modules of a base."""
    about = {"modules": modules, "base": str(base.directory), "rank": RANK}
    kind = "head" if modules == HEAD else "all"
    place = cache / f"adapter-stored-{name}-{kind}"
    return Place(place, base.parameters | about, build_adapter, (shape, modules, str(base.directory)))


def build_adapter(directory: Path, shape: Shape, modules: tuple[str, ...], base: str) -> None:
    """Write a LoRA on some modules, the head among them or not."""
    import torch
    from safetensors.torch import save_file

    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(modules)}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    for name, dims in shape.tensor_shapes():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            made = factors("lora", RANK, dims[0], dims[1])
            tensors |= {f"base_model.model.{module}.{role}": tensor for role, tensor in made.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def build_fp8(directory: Path, shape: Shape) -> None:
    """Write a checkpoint whose layers are FP8 in blocks, with random codes and scales."""
    import torch

    tiny = Shape(128, 352, 8, 8, 1, 1024)
    build_base(directory, tiny, "bfloat16")  # for its small files
    for file in directory.glob("*.safetensors"):
        file.unlink()
    config = json.loads((directory / "config.json").read_text())
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.hidden // shape.n_heads,
        "vocab_size": shape.vocab,
        "quantization_config": _SETTINGS,
    }
    (directory / "config.json").write_text(json.dumps(config | sizes))
    files: list[list[Stored]] = [[]]
    filled = 0
    for one in _stored(shape):
        if files[-1] and filled + one.nbytes > MAX_SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(one)
        filled += one.nbytes
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        torch.manual_seed(sum(name.encode()))
        write(directory / name, tensors, random_values)
    weight_map = {one.name: name for name, tensors in zip(names, files, strict=True) for one in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _stored(shape: Shape) -> Iterator[Stored]:
    """Yield every stored tensor."""
    for name, dims in shape.tensor_shapes():
        if ".layers." in name and len(dims) == 2:
            yield Stored(name, "F8_E4M3", dims)
            yield Stored(f"{name}_scale_inv", "F32", tuple(-(-size // BLOCK) for size in dims))
        else:
            yield Stored(name, "BF16", dims)


def rounds_of(cache: Path, size_gb: float, n_rounds: int, kept: str, settle_s: float) -> Iterator[str]:
    """Yield a line about each round, and the ratios over all; every command is a fresh process.

    Raises:
        RunError: a command fails.
    """
    found = []
    for n, one in enumerate(
        turns.rounds_of(sides(cache, size_gb), cache / "stored", n_rounds, kept, settle_s), 1
    ):
        found.append(one)
        told = (
            f"{name} {sample.wall_s:.2f} s for {nbytes / 1e9:.2f} GB ({sample.peak_rss_bytes / 1e6:.0f} MB)"
            for name, (sample, nbytes) in one.items()
        )
        yield f"round {n}: {'; '.join(told)}"
    for words, over, under in (
        ("FP8 decoded and merged, per written byte, against BF16 merged", "fp8, all", "bf16, all"),
        ("FP8 carried, per written byte, against BF16 that touches as little", "fp8, head", "bf16, head"),
    ):
        ratios = [_rate(one[over]) / _rate(one[under]) for one in found]
        yield f"{words}: {statistics.median(ratios):.2f} × (from {min(ratios):.2f} to {max(ratios):.2f})"


def _rate(taken: tuple[Sample, int]) -> float:
    """Return seconds per written byte."""
    sample, nbytes = taken
    return sample.wall_s / nbytes
