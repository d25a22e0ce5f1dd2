"""What stored weights hold, in float64, by code that shares nothing with the codecs that the merge uses."""

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
    """Some rows of a stored weight, part by part."""

    @property
    def rows(self) -> Sequence[int]:
        """Return which rows."""

    @property
    def n_rows(self) -> int:
        """Return how many the whole weight is divided into."""

    @property
    def weight(self) -> Weight:
        """Return the weight: its shape, its storage, its parts."""

    def share(self, role: str) -> torch.Tensor:
        """Return what a part has for these rows, one row for each, where it is divided as the weight is: float64."""

    def whole(self, role: str) -> torch.Tensor:
        """Return a whole part, flat: float64."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """How the values of a storage are read, and how far they may be from what was to be stored.

    Shapes:
        values: float64 ``[len(rows), columns]``; off: the same, or broadcast to it.
    """

    values: Callable[[StoredRows], torch.Tensor]

    off: Callable[[StoredRows], torch.Tensor] | None = None
    """What is stored → half the gap to the next value; None where single values are rounded to the stored dtype."""


def _dense(stored: StoredRows) -> torch.Tensor:
    return stored.share(WEIGHT)


DECODERS: dict[str, Decoder] = {DENSE: Decoder(_dense)}
"""By codec. What has none here is not recomputed, and a note says so."""
