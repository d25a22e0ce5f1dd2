"""Computes the factors of one module after the other, and what they lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from lora_merge.conversion.lora import Changed, Difference, Gathered, Given, LoraModule, Loss, Placed, Recipe
from lora_merge.conversion.transforms import Pair, factorised, rounded, stacked
from lora_merge.core.report import error
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.view import View
from lora_merge.deltas import Factors, plain_pair
from lora_merge.errors import ConvertError
from lora_merge.formats.safetensors import load
from lora_merge.formats.weights import values_in_blocks
from lora_merge.runtime.shortage import translate_out_of_memory

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.transforms import Transform
    from lora_merge.core.adapter import Delta
    from lora_merge.core.plan import Step
    from lora_merge.core.weight import Weight
    from lora_merge.deltas import FactorFacts

ChangeOf = Callable[["Step"], "torch.Tensor"]
"""A step of a merge → W′ - W, float32, in the shape of the stored weight."""


_TOO_LARGE = "bfloat16 and float32 hold larger ones; where they do not, the training diverged"


class Maker:
    """Makes the factors of one module after the other, so that memory holds one module at a time.

    Args:
        change_of: computes what a merge would change.
        recipe: says how much of a change without factors is kept, and the dtype of the output.
        transforms: applied in this order.
        own_dtype: dtype code in which most of the adapter is stored.
    """

    def __init__(
        self, change_of: ChangeOf, recipe: Recipe, transforms: Sequence[Transform], own_dtype: str
    ) -> None:
        self._change_of, self._recipe, self._transforms = change_of, recipe, transforms
        self._own_dtype = own_dtype
        self._factors = Factors(load)

    def __call__(self, module: LoraModule) -> tuple[Pair, Loss | None]:
        """Return a module's factors in the dtype in which they are stored, and the loss; None if nothing was lost.

        Raises:
            CheckpointError: a source cannot be read.
            ConvertError: a value is NaN or infinite, or the dtype cannot hold it.
            OutOfMemoryError: memory does not suffice.
        """
        with translate_out_of_memory(f"converting {module.path}"):
            made, loss = self._factored(module) if module.is_exact else self._taken_apart(module)
            dtype = TORCH_NAMES[self._recipe.dtype or "F32"]
            _check_finite(module.path, f"has factors that {dtype} cannot hold", made.a, made.b)
            return made, loss

    def _factored(self, module: LoraModule) -> tuple[Pair, Loss | None]:
        pair = self._pair(module)
        made = self._transformed(module.path, pair)
        # Scaling and padding lose nothing; a lower rank or a dtype that the user chose may.
        lost = made.rank < pair.rank or self._recipe.dtype not in {None, "F32"}
        return made, Loss(pair.norm(), pair.distance(made)) if lost else None

    def _transformed(self, path: str, pair: Pair, *, is_truncated: bool = False) -> Pair:
        """Return factors after the transforms, in the dtype in which they are stored.

        Raises:
            ConvertError: a value is infinite.
        """
        import torch

        try:
            for transform in self._transforms:
                # A decomposed change has the wanted rank already; truncating again could only lose more.
                if transform.exact or not is_truncated:
                    pair = transform(pair)
        except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]  # infinity was among the values
            sentence = "changes by values that float32 cannot hold"
            raise ConvertError([error("non-finite", path, sentence, _TOO_LARGE)]) from exc
        return rounded(pair, self._recipe.dtype, self._own_dtype)

    def _pair(self, module: LoraModule) -> Pair:
        """Return the factors that a module starts from, in float32; zeros if the adapter does not change it."""
        import torch

        match module.origin:
            case Given(delta, turned, part):
                a, b = self._given(delta, part)
                if turned:
                    # (B A)ᵀ = Aᵀ Bᵀ.
                    a, b = b.mT.contiguous(), a.mT.contiguous()
                return Pair(a, b, delta.effective_scale)
            case Gathered(parts):
                return self._gathered(module, parts)
            case _:
                n_out, n_in = module.shape
                return Pair(torch.zeros(module.rank, n_in), torch.zeros(n_out, module.rank), module.scale)

    def _given(
        self, delta: Delta, part: tuple[tuple[int, int], ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B in float32, with the kernel of a convolution flattened into A's inputs."""
        factors = self._factors.of(delta, part)
        if delta.facts.is_stacked:
            return factors["A"].float(), factors["B"].float()
        return plain_pair(cast("FactorFacts", delta.facts), factors)

    def _gathered(self, module: LoraModule, parts: Sequence[Placed]) -> Pair:
        """Return the factors of a stack: those of each expert's parts side by side, with their scales in B."""
        import torch

        n_experts, n_out, n_in = module.shape
        a, b = torch.zeros(n_experts, module.rank, n_in), torch.zeros(n_experts, n_out, module.rank)
        used = [0] * n_experts
        for part in parts:
            own_a, own_b = self._given(part.delta)
            first = used[part.expert]
            last = used[part.expert] = first + len(own_a)
            a[part.expert, first:last] = own_a
            # Parts may have different scales, and a stack has one for all.
            b[part.expert, slice(*part.rows), first:last] = own_b * part.delta.effective_scale
        return Pair(a, b)

    def _taken_apart(self, module: LoraModule) -> tuple[Pair, Loss]:
        """Decompose a change that has no factors; return its factors and their distance from it."""
        change = self._change(module)
        _check_finite(module.path, "changes by values that are NaN or infinite", change)
        keep = self._recipe.keep
        assert keep is not None
        if module.form == "experts" and change.dim() == 3:
            pair = stacked([factorised(one, keep) for one in change])
        else:
            pair = factorised(change, keep)
        made = self._transformed(module.path, pair, is_truncated=True)
        # Measured on the stored factors, so that the truncation and the rounding are both in it.
        residual = change.sub(made.b.float() @ made.a.float())
        return made, Loss(float(change.double().norm()), float(residual.double().norm()))

    def _change(self, module: LoraModule) -> torch.Tensor:
        """Return ΔW in float32, ``[…, out, in]``, with the kernel of a convolution flattened."""
        match module.origin:
            case Changed(step, turned):
                change = self._change_of(step)
            case Difference(before, after, turned):
                change = _difference(before, after)
            case _:
                raise AssertionError(module.origin)
        if module.form == "convolution":
            change = change.flatten(1)
        return change.mT if turned else change


def _difference(before: Weight, after: Weight) -> torch.Tensor:
    """Return W′ - W in float32, in the shape of the weight. Beside it, memory holds a block of rows at a time."""
    import torch

    change = torch.empty(after.shape)
    rows = change.view(View.of(after.shape, stacked=True).n_rows, -1)
    for start, (one, two) in values_in_blocks(before, after):
        torch.sub(two, one, out=rows[start : start + len(one)])
    return change


def _check_finite(path: str, sentence: str, *tensors: torch.Tensor) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        ConvertError: one is.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ConvertError([error("non-finite", path, sentence, _TOO_LARGE)])
