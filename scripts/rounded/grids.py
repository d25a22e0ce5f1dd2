"""Grids and sizes of the change: one matrix of random weights, and a change of rank 16."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import torch

from rounded import merging
from rounded.measuring import arrived

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Row = dict[str, Any]

OUT, IN, RANK = 1024, 4096, 16
MODULE: Final = "model.layers.0.mlp.down_proj"
WEIGHT_STD: Final = 0.02

CASES: Final = (
    ("bf16", 1e-5),
    ("bf16", 3e-5),
    ("bf16", 1e-4),
    ("fp8", 1e-4),
    ("fp8", 3e-4),
    ("int4-g32", 3e-4),
    ("int4-g32", 1e-3),
    ("mxfp4", 3e-4),
    ("nvfp4", 3e-4),
)
"""Grid (``bf16``, or a scheme of ``--quantize``), and the standard deviation of the change."""

ON_WRITE: Final = (("fp8", 3e-4), ("int4-g32", 3e-4), ("mxfp4", 3e-4), ("nvfp4", 3e-4))
"""Scheme of ``--quantize``, and the standard deviation of the change."""


def rows(work: Path, cases: tuple[tuple[str, float], ...] = CASES) -> Iterator[Row]:
    """Yield what each rounding keeps, for every grid and size of the change."""
    full = write_base(work / "base")
    tiny = write_lora(work / "tiny", merging.TINY)[0]
    original = _matrix(work / "base-float32")
    for grid in dict.fromkeys(grid for grid, _ in cases):
        base = full if grid == "bf16" else merging.quantised(full, work / grid, grid, tiny)
        before = _values(base, work, tiny)
        own = float((before - original).norm())
        for delta_std in [size for name, size in cases if name == grid]:
            yield from _case(work, base, tiny, before, own, grid, delta_std)


def rows_on_write(work: Path, cases: tuple[tuple[str, float], ...] = ON_WRITE) -> Iterator[Row]:
    """Yield what each rounding keeps where a merge into a plain base is quantised as it is written."""
    base = write_base(work / "base")
    tiny = write_lora(work / "tiny", merging.TINY)[0]
    before = _matrix(base)
    for scheme, delta_std in cases:
        lora, a, b = write_lora(work / "lora", delta_std)
        nearest = 0.0
        for rounding in merging.ROUNDINGS:
            out = merging.merged(base, lora, work / "merged", rounding, scheme=scheme)
            found = arrived(before, _values(out, work, tiny), b @ a, a)
            nearest = nearest or found.noise
            yield {
                "grid": scheme,
                "delta": delta_std,
                "rounding": rounding,
                "kept": found.kept,
                "in_span": found.in_span,
                "noise": found.noise / nearest,
            }


def _case(
    work: Path, base: Path, tiny: Path, before: torch.Tensor, own: float, grid: str, delta_std: float
) -> Iterator[Row]:
    lora, a, b = write_lora(work / "lora", delta_std)
    nearest = 0.0
    for rounding in merging.ROUNDINGS:
        out = merging.merged(base, lora, work / "merged", rounding)
        found = arrived(before, _values(out, work, tiny), b @ a, a)
        nearest = nearest or found.noise
        yield {
            "grid": grid,
            "delta": delta_std,
            "rounding": rounding,
            "kept": found.kept,
            "in_span": found.in_span,
            "noise": found.noise / nearest,
            "noise_of_base": found.noise / own,
        }


def write_base(folder: Path) -> Path:
    """Write a Llama of one layer with random weights in BF16, and return its folder.

    The matrix that is measured is also written before it is rounded to BF16, to a folder beside.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    vocabulary, key_values, layer = 64, 128, "model.layers.0"
    shapes = {
        MODULE: (OUT, IN),
        f"{layer}.mlp.gate_proj": (IN, OUT),
        f"{layer}.mlp.up_proj": (IN, OUT),
        f"{layer}.self_attn.q_proj": (OUT, OUT),
        f"{layer}.self_attn.k_proj": (key_values, OUT),
        f"{layer}.self_attn.v_proj": (key_values, OUT),
        f"{layer}.self_attn.o_proj": (OUT, OUT),
        "model.embed_tokens": (vocabulary, OUT),
        "lm_head": (vocabulary, OUT),
    }
    drawn = {f"{name}.weight": torch.randn(shape) * WEIGHT_STD for name, shape in shapes.items()}
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        drawn[f"{name}.weight"] = torch.ones(OUT)
    beside = folder.with_name(f"{folder.name}-float32")
    beside.mkdir(exist_ok=True)
    save_file({f"{MODULE}.weight": drawn[f"{MODULE}.weight"]}, beside / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in drawn.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": OUT,
        "intermediate_size": IN,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_lora(folder: Path, delta_std: float) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Write a LoRA on the matrix with a change BA of this standard deviation; return its folder, A and B."""
    torch.manual_seed(1)
    a, b = torch.randn(RANK, IN) / IN**0.5, torch.randn(OUT, RANK)
    b *= delta_std / float((b @ a).std())
    return merging.write_adapter(folder, {MODULE: (a, b)}), a, b


def _values(base: Path, work: Path, tiny: Path) -> torch.Tensor:
    """Return the values of the matrix, as they are decoded."""
    return _matrix(merging.decoded(base, work / "decoded", tiny))


def _matrix(folder: Path) -> torch.Tensor:
    return merging.tensors_of(folder)[f"{MODULE}.weight"]
