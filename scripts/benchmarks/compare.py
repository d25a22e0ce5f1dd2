"""How far another tool's checkpoint is from ours, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True, slots=True)
class Difference:
    """What was found when two checkpoints were compared."""

    n_tensors: int
    """In ours."""

    missing: tuple[str, ...]
    """Tensors of ours that the other lacks."""

    extra: tuple[str, ...]
    """Tensors of the other that ours lacks."""

    changed: tuple[str, ...]
    """Tensors of another shape or dtype; their values are not compared."""

    n_values: int
    """Compared."""

    n_different_values: int
    max_difference: float
    max_steps: float
    """The largest difference in steps of our dtype: the distance of two neighbours at the larger of the two values,
    or at the tensor's root mean square where that is larger."""

    dtype: str
    """Ours, whose steps these are."""

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors, bit for bit but for the sign of zeros."""
        return not (self.missing or self.extra or self.changed or self.n_different_values)

    def __str__(self) -> str:
        parts = []
        for names, what in (
            (self.missing, "missing"),
            (self.extra, "extra"),
            (self.changed, "of another shape or dtype"),
        ):
            if names:
                more = ", …" if len(names) > 1 else ""
                parts.append(f"{len(names)} of {self.n_tensors} tensors {what} ({names[0]}{more})")
        if self.n_different_values:
            share = 100 * self.n_different_values / self.n_values
            parts.append(
                f"{share:.2g} % of the values differ, by at most {self.max_steps:.3g} × the step of {self.dtype}"
                f" ({self.max_difference:.2g})"
            )
        elif not parts:
            return f"the same {self.n_tensors} tensors, value for value"
        else:
            parts.append("all other values are the same")
        return "; ".join(parts)


def difference(ours: Path, other: Path) -> Difference:
    """Return how two checkpoints differ; imports torch, holds one tensor of each at a time."""
    import torch
    from safetensors import safe_open

    our_files, other_files = tensor_files(ours), tensor_files(other)
    changed: list[str] = []
    n_values = n_different = 0
    largest, steps, dtype = 0.0, 0.0, ""
    for name in sorted(our_files.keys() & other_files.keys()):
        with safe_open(our_files[name], "pt") as first, safe_open(other_files[name], "pt") as second:
            a, b = first.get_tensor(name), second.get_tensor(name)
        dtype = dtype or str(a.dtype).removeprefix("torch.")
        if a.dtype != b.dtype or a.shape != b.shape:
            changed.append(name)
            continue
        n_values += a.numel()
        if not torch.equal(a, b):
            n_different += int((a != b).sum())
            gap = (a.float() - b.float()).abs()
            largest = max(largest, float(gap.max()))
            steps = max(steps, float((gap / step_at(a, b)).max()))
    return Difference(
        len(our_files),
        tuple(sorted(our_files.keys() - other_files.keys())),
        tuple(sorted(other_files.keys() - our_files.keys())),
        tuple(changed),
        n_values,
        n_different,
        largest,
        steps,
        dtype,
    )


def step_at(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the distance between neighbours of a dtype, at the largest of a, b and their usual size.

    A value that is nearly zero is the difference of two that are not: what was rounded is their size, not its.
    """
    import torch

    size = torch.maximum(a.float().abs(), b.float().abs())
    size = size.clamp_min(float(a.float().square().mean().sqrt()))
    _, exponent = torch.frexp(size)  # size = m · 2**exponent, 0.5 <= m < 1
    return torch.ldexp(torch.full_like(size, torch.finfo(a.dtype).eps), exponent - 1)


def tensor_files(root: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in sorted(root.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    return places
