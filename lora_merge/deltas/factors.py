"""The factors of a delta as its algebra wants them: loaded, unpacked, cut to the part that is meant."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.tensor import TensorRef

Load = Callable[["TensorRef"], "torch.Tensor"]

_KEPT_STACKS = 2
"""Stacks of experts that are kept: the next tensor is often another expert of the same."""


class Factors:
    """Loads factors, and keeps the last stacks of them. It may be called from several threads.

    Args:
        load: returns a whole tensor in its stored dtype.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._stacks: OrderedDict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, spec: DeltaSpec) -> dict[str, torch.Tensor]:
        """Return the tensors of a delta by role.

        Options:
            turned: True where the factors are stored the other way round, A ``[in, r]`` and B ``[r, out]`` (MLX).
            experts: how many are stacked; packing: ``"expert-major"`` where B has their columns one after the other,
                ``"by-expert"`` where it has them whole, one after the other.

        Shapes:
            A: ``[r, in]``, B: ``[out, r]``, magnitude: ``[out]``, cut to the part; of several experts
            A: ``[experts, r, in]``, B: ``[experts, out, r]``.
        """
        if "experts" not in spec.options:
            factors = {role: self._load(ref) for role, ref in spec.tensors.items()}
            if spec.options.get("turned"):
                factors |= {role: factors[role].T.contiguous() for role in ("A", "B")}
            return _cut(factors, spec.part) if spec.part else factors
        a, b = self._stack(spec)
        if spec.part:
            experts, outputs, inputs = (slice(*limits) for limits in spec.part)
            a, b = a[experts, :, inputs], b[experts, outputs]
        if spec.kind == "stacked":
            return {"A": a, "B": b}
        return {"A": a[0], "B": b[0]}

    def _stack(self, spec: DeltaSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A ``[experts, r, in]`` and B ``[experts, out, r]`` of all experts, float32."""
        a, b = spec.tensors["A"], spec.tensors["B"]
        key = (a.file, a.start, b.start)
        with self._lock:
            if key not in self._stacks:
                self._stacks[key] = self._unpacked(spec)
                while len(self._stacks) > _KEPT_STACKS:
                    self._stacks.popitem(last=False)
            self._stacks.move_to_end(key)
            return self._stacks[key]

    def _unpacked(self, spec: DeltaSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of stacked experts, taken apart.

        PEFT packs A expert by expert, and B with the expert running fastest (`ParamWrapper.get_delta_weight`, PEFT
        0.21.2); Unsloth packs both expert by expert (unslothai/unsloth#6930). NeMo Automodel keeps B ``[experts, out, r]``.
        """
        n = int(spec.options["experts"])
        a, b = (self._load(spec.tensors[role]).float() for role in ("A", "B"))
        a = a.view(n, -1, a.shape[1])
        if spec.options.get("packing") == "by-expert":
            return a, b.view(n, len(b), -1)
        if spec.options.get("packing") == "expert-major":
            return a, b.view(len(b), n, -1).permute(1, 0, 2).contiguous()
        return a, b.view(len(b), -1, n).permute(2, 0, 1).contiguous()


def _cut(factors: dict[str, torch.Tensor], part: tuple[tuple[int, int], ...]) -> dict[str, torch.Tensor]:
    """Return factors of the rows and columns that a part of ``[out, in]`` has."""
    outputs = slice(*part[0])
    cut = dict(factors)
    for role in ("B", "addend"):
        if role in factors:
            cut[role] = factors[role][outputs]
    if "magnitude" in factors:
        cut["magnitude"] = factors["magnitude"].flatten()[outputs]
    if "A" in factors and len(part) > 1:
        cut["A"] = factors["A"][:, slice(*part[1])]
    return cut
