"""What a codec is: a way to store the values of a weight in one tensor, or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Survey, Tile


class Codec(Protocol):
    """A way to store floating-point numbers, as it is read. It has no state: one object serves all threads and all weights.

    A *part* is one of the tensors that store a weight; its *role* says which one. A part that is the same for every row
    (a scale for the whole tensor) belongs to every tile, with the same bytes. So does a part whose rows lie across those of
    the weight: it is read once, and each tile takes its share.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the multiples of rows and of columns at which a tile may begin, counted within each matrix of a
        stack.

        Args:
            shape: of the whole weight.
            n_rows: that it is divided into, see `Tile`.
            storage: with the settings of the codec.
        """

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return, by role, the byte ranges of each part that a tile needs, with the dtype and shape in which `decode`
        gets them. Parts that say nothing about the values are left out.
        """

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Decode the stored parts of a tile into float32.

        Shapes:
            parts: as `ranges` says; out: float32 ``[rows, columns]``.
        """


class Encoder(Codec, Protocol):
    """A codec that also writes."""

    def survey(self, storage: Storage) -> Survey:
        """Return what `grid` has to know of all values where it makes scales: ``"tensor"`` where one depends on all of
        them, else ``"none"``.
        """

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return role → ``(dtype, shape)`` of each part of a weight of this shape, the main part first. Dtypes are
        safetensors codes.
        """

    def fresh_alignment(self, shape: tuple[int, ...], storage: Storage) -> int:
        """Return the multiple of rows of a matrix at which a tile has to begin where `grid` makes scales."""

    def look(self, values: torch.Tensor, found: torch.Tensor | None, storage: Storage) -> torch.Tensor:
        """Return what is known of all values after one more tile. Called only where `survey` is ``"tensor"``.

        Args:
            values: float32 ``[rows, columns]``.
            found: what this returned for the tiles before; None at the first.
            storage: with the settings of the codec.
        """

    def grid(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> Grid:
        """Return the grid of a tile, whose `Grid.keep` fills ``out``.

        Args:
            tile: which rows.
            values: float32 ``[rows, columns]``.
            out: the parts to fill, shaped as `ranges` says.
            storage: with the settings of the codec.
            survey: what `look` has returned at last; None where `survey` is ``"none"``, or nothing has to be known.
            stored: the parts that the values were decoded from, whose scales are kept: then only the main part is in ``out``.
                None where scales are made from the values; they are written into ``out`` at once.
        """

    def bound(
        self, tile: Tile, values: torch.Tensor, parts: Mapping[str, torch.Tensor], storage: Storage
    ) -> torch.Tensor:
        """Return the largest error that one encoding to the nearest and decoding may have, for each value.

        Args:
            tile: which rows.
            values: as they were given to `grid`.
            parts: as `Grid.keep` filled them.
            storage: with the settings of the codec.

        Returns:
            Float32, broadcast to ``[rows, columns]``; infinite where a value is beyond what the storage can hold.
        """


@runtime_checkable
class Naming(Protocol):
    """What an encoder also has that names its parts itself, after the parameter alone. How the others are named depends on
    the method that a checkpoint is quantised with.
    """

    def names(self, name: str, storage: Storage) -> Mapping[str, str]:
        """Return role → name of the stored tensor, for a parameter's name."""
