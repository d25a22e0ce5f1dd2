"""What keeps a delta from being merged into the tensor that was found for it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, cast

from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import shape_text
from lora_merge.deltas import LowRankFacts
from lora_merge.peft_rules.hints import OTHER_MODEL
from lora_merge.planning.model import SAVE_ANEW

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_merge.core.adapter import Adapter, Delta
    from lora_merge.deltas import FactorFacts, RowsFacts
    from lora_merge.layouts import Located, Place
    from lora_merge.planning.model import Model


class Misfits:
    """The shapes and dtypes of one adapter's deltas, checked against those of a base.

    Args:
        adapter: the adapter.
        model: the base.
        shape: name in the output → the shape that it has there.
    """

    def __init__(self, adapter: Adapter, model: Model, shape: Callable[[str], tuple[int, ...]]) -> None:
        self._adapter, self._model, self._shape = adapter, model, shape

    def of(self, delta: Delta, place: Place, found: Located) -> Issue | None:
        """Return what keeps a delta from being merged into the tensor at a place; None where nothing does."""
        name = place.tensor
        source, shape = self._model.source(name), self._shape(name)
        if not source.holds_floats:
            sentence = f"is stored as {source.dtype}, expected BF16, F16 or F32"
            return error("unsupported", name, sentence, "merge into the full-precision model")
        # Places by boxes already give a tensor's orientation, so shapes are compared with the whole weight's.
        if found.by_boxes:
            return _part_misfit(delta, place, found)
        if delta.facts.has_factors:
            return self._product_misfit(delta, name, shape)
        if delta.facts.replaces_rows:
            return _rows_misfit(delta, name, shape)
        wanted = delta.weight_shape()
        if wanted is not None and wanted != shape:
            ref = next(iter(delta.factors.values()))
            sentence = f"has the shape {shape_text(wanted)}, the base's {name} has {shape_text(shape)}"
            return error("shape-mismatch", ref.name, sentence)
        return None

    def _product_misfit(self, delta: Delta, name: str, shape: tuple[int, ...]) -> Issue | None:
        """Return what keeps a product of two factors from being added to a weight; None where nothing does."""
        a, b = factor_shapes(delta)
        product = (b[0], *a[1:])
        if delta.transposed or (len(a) == 2 and self.is_transposed(delta, shape)):
            product = product[::-1]
        # AdaLoRA has the kernel of a convolution in the inputs.
        if isinstance(delta.facts, LowRankFacts) and delta.facts.has_flat_kernel and len(shape) > 2:
            shape = (shape[0], prod(shape[1:]))
        magnitude = delta.factors.get("magnitude")
        if magnitude is not None and prod(magnitude.shape) != b[0]:
            sentence = f"has {prod(magnitude.shape)} values, expected {b[0]}, one per output"
            return error("bad-shape", magnitude.name, sentence)
        if shape == product:
            return None
        if len(shape) != len(product):
            wanted = "a linear weight [out, in]" if len(product) == 2 else "a convolution"
            sentence = f"has the shape {shape_text(shape)} in the base, expected {wanted}"
            return error("shape-mismatch", name, sentence)
        # Same outputs and kernel, fewer inputs per output.
        if len(shape) > 2 and shape[0] == product[0] and shape[2:] == product[2:]:
            sentence = (
                f"is a grouped convolution, {shape_text(shape)}, which a LoRA cannot express; its adapter is "
                f"{shape_text(product)}"
            )
            return error(
                "unsupported",
                name,
                sentence,
                "serve the adapter in the library that trained it; PEFT cannot merge it either",
            )
        return self._shape_issue(delta, shape)

    def _shape_issue(self, delta: Delta, shape: tuple[int, ...]) -> Issue:
        """Return the issue of factors of another size than the weight: which of the two is wrong, and by how much."""
        a, b = delta.shape("A"), delta.shape("B")
        transposed = delta.transposed or self.is_transposed(delta, shape)
        n_out, n_in = (shape[-1], shape[:-1]) if transposed else (shape[0], shape[1:])
        parts = []
        full_a, full_b = factor_shapes(delta)
        if full_b[0] != n_out:
            parts.append(f"lora_B is {shape_text(b)}, the base needs {shape_text((n_out, *b[1:]))}")
        if full_a[1:] != n_in:
            parts.append(f"lora_A is {shape_text(a)}, the base needs {shape_text((a[0], *n_in))}")
        hint = "check --base: the adapter was trained on another model, perhaps a pruned one"
        return error("shape-mismatch", delta.module, "; ".join(parts), hint)

    def is_transposed(self, delta: Delta, shape: tuple[int, ...]) -> bool:
        """Return True when a weight is stored ``[in, out]``: by the module's class where that is known, else by
        shape.
        """
        a, b = factor_shapes(delta)
        product = (b[0], *a[1:])
        # PEFT sets this field module by module and saves the last value, so it counts only where nothing else tells.
        says_so = bool(self._adapter.config.get("fan_in_fan_out"))
        odd = shape != product and shape == product[::-1]
        # Nearly always: then transformers need not be loaded.
        if not (odd or says_so or self._model.may_hold_conv1d):
            return False
        known = self._model.skeleton
        kind = known.classes.get(self._model.module(delta.module)) if known else None
        if kind is not None:
            return kind == "Conv1D"
        return odd if product[0] != product[-1] else says_so


def _part_misfit(delta: Delta, place: Place, found: Located) -> Issue | None:
    """Return what keeps a delta from being merged into a part of a tensor, or in parts; None where nothing does."""
    wanted = delta.weight_shape()
    if wanted is not None and wanted != found.shape:
        shape = shape_text(found.shape or ())
        sentence = f"lora_B @ lora_A is {shape_text(wanted)}, the base's weight is {shape}"
        return error("shape-mismatch", delta.module, sentence, OTHER_MODEL)
    # A change that goes by rows (DoRA's lengths) can be divided between rows, not within one.
    whole_rows = not place.part or (len(place.part) == 2 and place.part[1] == (0, wanted[1] if wanted else 0))
    division = delta.facts.division
    if delta.transposed or division == "none" or (division == "rows" and not whole_rows):
        sentence = (
            f"the base stores it in several parts ({place.tensor} is one), and this kind of change needs the "
            "whole weight"
        )
        return error("unsupported", delta.module, sentence, SAVE_ANEW)
    return None


def factor_shapes(delta: Delta) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B with blocks laid out on their diagonals; see `FactorFacts.factor_shapes`."""
    return cast("FactorFacts", delta.facts).factor_shapes(delta.factors)


def _rows_misfit(delta: Delta, name: str, shape: tuple[int, ...]) -> Issue | None:
    """Return what keeps trained rows from being put into an embedding; None where nothing does."""
    ref, indices = delta.factors["rows"], cast("RowsFacts", delta.facts).indices
    if len(shape) != 2 or ref.shape[1:] != shape[1:]:
        sentence = f"has the shape {shape_text(ref.shape)}, the base's {name} has {shape_text(shape)}"
        return error("shape-mismatch", ref.name, sentence, OTHER_MODEL)
    outside = [index for index in indices if not 0 <= index < shape[0]]
    if outside:
        sentence = f"has a row for token {outside[0]}, and the base's {name} has only {shape[0]} rows"
        hint = (
            "merge into the base that was resized before the training (--base): the adapter does not contain "
            "the resized embedding"
        )
        return error("token-mismatch", ref.name, sentence, hint)
    return None
