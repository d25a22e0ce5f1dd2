"""Decodes stored weights to float64, by code that shares nothing with the codecs of the merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.weight import DENSE, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.core.weight import Weight


class StoredRows(Protocol):
    """Some rows of a stored weight, part by part: what a `Decoder` reads."""

    @property
    def rows(self) -> Sequence[int]:
        """Their numbers."""

    @property
    def n_rows(self) -> int:
        """The number of rows that the whole weight is divided into."""

    @property
    def weight(self) -> Weight:
        """The weight: shape, storage, parts."""

    def share(self, role: str) -> torch.Tensor:
        """Return the rows of a part that is divided as the weight is, float64, one row each."""

    def whole(self, role: str) -> torch.Tensor:
        """Return a whole part, float64, one-dimensional."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """How stored values are decoded, and how far they may be from the values that were encoded.

    Shapes:
        values: float64 ``[len(rows), columns]``; off: the same, or broadcast to it.
    """

    values: Callable[[StoredRows], torch.Tensor]

    off: Callable[[StoredRows], torch.Tensor] | None = None
    """Half the gap to the next storable value; None where values are rounded one by one to the stored dtype."""


def _dense(stored: StoredRows) -> torch.Tensor:
    return stored.share(WEIGHT)


DECODERS: dict[str, Decoder] = {DENSE: Decoder(_dense)}
"""By codec. A weight of another codec is not recomputed, and a note says so."""
