"""Three storages of nobody, each of two parts: int8 with one scale for each row, int8 with one for the whole tensor, and packed
nibbles, which are only read.

Scales are powers of two, so that what a scale was made from can be told from what is stored.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from lora_merge.checks.decoding import DECODERS, Decoder, Levels, integers
from lora_merge.codecs import CODECS, ENCODERS, WRITTEN_BY_DEFAULT
from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import Integers
from lora_merge.core.weight import WEIGHT, PartRange, Storage, Weight
from lora_merge.quantised import METHODS, Found

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST = 127.0


def scale_for(largest: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that makes codes of all values up to the largest; 1 where all are zero."""
    mantissa, exponent = torch.frexp(largest / MOST)
    exponent = exponent - (mantissa == 0.5).int()
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), torch.ones_like(largest))


class RowScaled:
    """``weight`` I8 ``[…, n]`` and ``scaling`` F32 ``[…, 1]``: value = code · scale. A scale that is large enough is kept."""

    surveyed: Any = "none"
    key = "row_scaled"
    suffix = "_row_scaling"

    def scale_shape(self, shape):
        return (*shape[:-1], 1)

    def recognise(self, tensors):
        for name, ref in tensors.items():
            scale = tensors.get(name + self.suffix)
            if scale is not None and ref.dtype == "I8" and scale.shape == self.scale_shape(ref.shape):
                parts = {WEIGHT: ref, "scaling": scale}
                yield Weight(name, ref.shape, Storage(self.key, "I8"), parts)

    def names(self, name, storage):
        del storage
        return {WEIGHT: name, "scaling": name + self.suffix}

    def parts(self, shape, storage):
        del storage
        return {WEIGHT: ("I8", shape), "scaling": ("F32", self.scale_shape(shape))}

    def alignment(self, shape, n_rows, storage):
        del shape, n_rows, storage
        return 4, 1  # none is needed; `ranges` holds tiles to it

    def ranges(self, tile, storage):
        del storage
        n_values = _prod(tile.shape)
        columns, inner = n_values // max(tile.n_rows, 1), tile.shape[-1]
        rows, scales = tile.end - tile.start, columns // inner
        matrix = tile.shape[-2] if tile.n_rows == n_values // inner else tile.n_rows
        assert tile.start % matrix % 4 == 0
        assert tile.end % matrix % 4 == 0 or tile.end % matrix == 0
        codes = PartRange("I8", (rows, columns), ((tile.start * columns, rows * columns),))
        span = (tile.start * scales * 4, rows * scales * 4)
        return {WEIGHT: codes, "scaling": PartRange("F32", (rows, scales), (span,))}

    def _spread(self, scale, codes):
        return scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)

    def decode(self, tile, parts, out, storage):
        del tile, storage
        torch.mul(parts[WEIGHT], self._spread(parts["scaling"], parts[WEIGHT]), out=out)

    def survey(self, storage):
        del storage
        return self.surveyed

    def fresh_alignment(self, shape, storage):
        del shape, storage
        return 1

    def look(self, values, found, storage):
        raise AssertionError("nothing is asked of all values")

    def grid(self, tile, values, out, storage, survey, stored):
        assert survey is None
        del storage
        rows, columns = values.shape
        inner = tile.shape[-1]
        scale = scale_for(values.view(rows, columns // inner, inner).abs().amax(2))
        if stored is not None:
            scale = torch.maximum(scale, stored["scaling"])
        out["scaling"].copy_(scale)
        return self._grid(scale.view(-1, 1), out[WEIGHT])

    def _grid(self, scale, codes):
        levels = Integers(-int(MOST), int(MOST))
        return Grid(levels, lambda found: codes.copy_(found.view(codes.shape)), scale)

    def bound(self, tile, values, parts, storage):
        del tile, storage
        scale = self._spread(parts["scaling"], values)
        return (scale / 2).masked_fill(values.abs() > scale * MOST, float("inf"))


class TensorScaled(RowScaled):
    """``weight`` I8 and ``scaling`` F32 ``[1]``: it depends on all values, and so they are looked at before."""

    surveyed = "tensor"
    key = "tensor_scaled"
    suffix = "_tensor_scaling"

    def scale_shape(self, shape):
        del shape
        return (1,)

    def ranges(self, tile, storage):
        return {**super().ranges(tile, storage), "scaling": PartRange("F32", (1,), ((0, 4),))}

    def _spread(self, scale, codes):
        del codes
        return scale

    def look(self, values, found, storage):
        del storage
        largest = values.abs().max()
        return largest if found is None else torch.maximum(found, largest)

    def grid(self, tile, values, out, storage, survey, stored):
        del storage, stored
        scale = scale_for(survey)
        out["scaling"].fill_(scale)
        return self._grid(scale.expand(values.numel() // tile.shape[-1], 1), out[WEIGHT])


class Nibbles:
    """``weight`` U8 ``[out, in / 2]``, low nibble first, and ``scaling`` F32 ``[out, 1]``: value = (nibble - 8) · scale. It is
    only read: a merge makes such weights dense, or copies both parts.
    """

    key = "nibbles"
    suffix = "_nibble_scaling"

    def recognise(self, tensors):
        for name, ref in tensors.items():
            scale = tensors.get(name + self.suffix)
            if scale is not None and ref.dtype == "U8":
                shape = (ref.shape[0], 2 * ref.shape[1])
                yield Weight(name, shape, Storage(self.key, "U8"), {WEIGHT: ref, "scaling": scale})

    def alignment(self, shape, n_rows, storage):
        del shape, n_rows, storage
        return 4, 1  # none is needed

    def ranges(self, tile, storage):
        del storage
        rows, n_bytes = tile.end - tile.start, tile.shape[1] // 2
        assert tile.start % 4 == 0
        codes = PartRange("U8", (rows, n_bytes), ((tile.start * n_bytes, rows * n_bytes),))
        return {WEIGHT: codes, "scaling": PartRange("F32", (rows, 1), ((tile.start * 4, rows * 4),))}

    def decode(self, tile, parts, out, storage):
        del tile, storage
        codes = parts[WEIGHT]
        out[:, 0::2].copy_(codes & 15)
        out[:, 1::2].copy_(codes >> 4)
        out.sub_(8).mul_(parts["scaling"])


def _prod(shape):
    n = 1
    for size in shape:
        n *= size
    return n


def _by_row(stored):
    codes, scale = stored.share(WEIGHT), stored.share("scaling")
    return Levels(codes, _CODES, scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1))


def _by_tensor(stored):
    return Levels(stored.share(WEIGHT), _CODES, stored.whole("scaling"))


_CODES = integers(-int(MOST), int(MOST))
BY_ROW, BY_TENSOR = Decoder(_by_row), Decoder(_by_tensor)


def _nibbles(stored):
    codes = stored.share(WEIGHT).int()
    values = torch.stack((codes & 15, codes >> 4), 2).flatten(1)
    return Levels(values.double(), integers(0, 15), stored.share("scaling"), 8.0)


class Toy:
    """The method of a toy: its weights are known by their parts alone, whatever the configuration says."""

    def __init__(self, codec):
        self._codec = codec

    def identify(self, tensors, around):
        del around
        return Found({weight.name: weight for weight in self._codec.recognise(tensors)})


TOYS = {"row_scaled": (RowScaled(), BY_ROW), "tensor_scaled": (TensorScaled(), BY_TENSOR)}
"""Those that are written too."""

ALL = {**TOYS, "nibbles": (Nibbles(), Decoder(_nibbles))}


@contextlib.contextmanager
def known(*names: str, recomputed: bool = True) -> Iterator[None]:
    """Have the product know some of them: one line in the table of codecs, and one in that of the recomputation."""
    for name in names:
        CODECS[name], decoder = ALL[name]
        METHODS[name] = Toy(CODECS[name])
        if name in TOYS:
            ENCODERS[name] = CODECS[name]
            WRITTEN_BY_DEFAULT.add(name)
        if recomputed:
            DECODERS[name] = decoder
    try:
        yield
    finally:
        for name in names:
            del CODECS[name], METHODS[name]
            ENCODERS.pop(name, None)
            WRITTEN_BY_DEFAULT.discard(name)
            DECODERS.pop(name, None)


def encode(codec, storage, tile, values, out, survey=None, stored=None) -> None:
    """Encode a tile to the nearest codes."""
    lines = lines_of(tile)
    grid = codec.grid(tile, values, out, storage, survey, stored)
    grid.keep(grid.nearest(values.view(lines.n, lines.width)))


def stored_as(name: str, parameter: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that store some values, by their names in a file."""
    if name == "nibbles":
        scale = scale_for(values.float().abs().amax(1, keepdim=True) * MOST / 7)
        codes = (values / scale).round_().clamp_(-7, 7).add_(8).to(torch.uint8)
        return {parameter: codes[:, 0::2] | codes[:, 1::2] << 4, parameter + Nibbles.suffix: scale}
    codec, storage = TOYS[name][0], Storage(name, "I8")
    rows = values.shape[0]
    from lora_merge.core.weight import Tile

    tile = Tile(tuple(values.shape), rows, 0, rows)
    flat = values.float().reshape(rows, -1)
    types = {"I8": torch.int8, "F32": torch.float32}
    out = {
        role: torch.empty(one.shape, dtype=types[one.dtype])
        for role, one in codec.ranges(tile, storage).items()
    }
    encode(codec, storage, tile, flat, out, flat.abs().max() if codec.surveyed == "tensor" else None)
    names, parts = codec.names(parameter, storage), codec.parts(tuple(values.shape), storage)
    return {names[role]: tensor.reshape(parts[role][1]) for role, tensor in out.items()}


def values_in(name: str, parameter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what some tensors of a file hold."""
    if name == "nibbles":
        codes = tensors[parameter]
        values = torch.stack((codes & 15, codes >> 4), 2).flatten(1).float() - 8
        return values * tensors[parameter + Nibbles.suffix]
    names = TOYS[name][0].names(parameter, Storage(name, "I8"))
    return tensors[names[WEIGHT]].float() * tensors[names["scaling"]]
