"""DoRA: a low-rank sum, after which each output of the weight gets the length that was trained for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_merge.deltas.factors import FactorFacts
from lora_merge.deltas.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.facts import Division, Facts, Reach
    from lora_merge.deltas.algebra import Look, Panels, Product


@dataclass(frozen=True, slots=True)
class DoraFacts(FactorFacts):
    """Of a low-rank change after which every output gets a trained length; it depends on the weight."""

    algebra: Literal["dora"] = "dora"

    is_scaled: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    sees_by_factor: ClassVar[bool] = True
    method_key: ClassVar[str] = "DORA"
    serving_trait: ClassVar[tuple[str, str] | None] = ("dora", "use_dora is set")

    @property
    def division(self) -> Division:
        """``"rows"``, since a length is that of a whole row; ``"none"`` with block-diagonal factors."""
        return "none" if self.has_blocks else "rows"

    def reach(self, *, transposed: bool) -> Reach:
        """Return ``"columns"`` where the norms run down the columns of the stored weight, else ``"rows"``."""
        return "columns" if transposed else "rows"


class Dora:
    """W ← m · V / ‖V‖ with V = W + s · B A, the norm taken over the inputs of each output.

    Where the weight is stored ``[in, out]`` (``Conv1D``, an embedding) the norms run down its columns, so they
    are taken first, panel by panel.

    Shapes:
        A, B: as for `LowRank`; magnitude: as many values as the weight has outputs.

    Reference:
        Liu et al., 2024, https://arxiv.org/abs/2402.09353; ``peft.tuners.lora.variants.DoraLinearVariant``,
        ``DoraEmbeddingVariant`` and ``DoraConv2dVariant``, ``merge_unsafe`` (PEFT 0.21.2).
    """

    facts: ClassVar[type[Facts]] = DoraFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        self._sum = LowRank(delta, factors, stored)
        # PEFT stores it ``[out]``, and ``[1, out, 1, …]`` for a convolution.
        self._magnitude = factors["magnitude"].float().flatten()
        self._transposed = delta.region.transposed
        self._factor: torch.Tensor | None = None

    def survey(self, panels: Panels) -> None:
        """Take the norm of every column of V, panel by panel."""
        import torch

        norms = []
        for start, end, panel in panels:
            # The panel may be changed (`Panels`), so it becomes V in place.
            self._sum.apply_columns(panel, start, end)
            norms.append(torch.linalg.norm(panel.T, dim=1))
        self._factor = self._magnitude / torch.cat(norms)

    def product(self, start: int, end: int) -> Product | None:
        """Return nothing: rows are scaled after the sum."""
        del start, end
        return None

    def looks(self) -> Sequence[Look]:
        """Return A for all outputs. The lengths change what they see of other inputs, too."""
        return tuple(replace(look, other=None) for look in self._sum.looks())

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Add the rows' part of the delta, and scale what came of it."""
        import torch

        lengths = None
        # After other deltas the lengths are still those of the base plus this delta, as in PEFT's forward pass. The
        # first delta gets the same tensor twice, and takes them from V itself.
        if self._factor is None and base is not weight:
            alone = base.clone()
            self._sum.apply(alone, alone, start, end)
            lengths = torch.linalg.norm(alone, dim=1)
        self._sum.apply(weight, weight, start, end)
        if self._factor is not None:
            weight.mul_(self._factor)
            return
        if lengths is None:
            lengths = torch.linalg.norm(weight, dim=1)
        weight.mul_((self._magnitude[start:end] / lengths).view(-1, 1))
