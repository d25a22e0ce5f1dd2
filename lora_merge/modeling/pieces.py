"""Splitting and joining tensors, as shapes: which box of the whole is which box of the part.

An `Assembly` takes the place of a tensor: torch's own ``stack``, ``cat``, ``chunk``, ``split`` and ``transpose``
work on it and keep account of where everything went. So code that was written for tensors (transformers'
conversions) says, run on assemblies, how a checkpoint maps to a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Box = tuple[tuple[int, int], ...]
"""A range per axis."""


class UnknownOperationError(TypeError):
    """An operation that has no meaning for assemblies: it mixes or reorders elements."""


class Span(NamedTuple):
    """A range of one axis of the whole, and what it is in the part."""

    start: int
    end: int

    axis: int | None
    """Of the part; None where the part is at one index of the whole: an expert in a stack."""

    at: int = 0
    """Index on that axis at which the range begins."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the whole that is a box of a part."""

    part: str
    spans: tuple[Span, ...]
    """One per axis of the whole."""

    def box(self) -> Box:
        """Return the range that the piece has on each axis of the whole."""
        return tuple((span.start, span.end) for span in self.spans)

    def part_axes(self) -> tuple[int, ...]:
        """Return the axes of the part, in the order in which the whole has them."""
        return tuple(span.axis for span in self.spans if span.axis is not None)

    def part_box(self, box: Box) -> Box | None:
        """Return what a box of the whole is in the part, in the order of the part's axes; None if they do not meet."""
        found: dict[int, tuple[int, int]] = {}
        for span, (start, end) in zip(self.spans, box, strict=True):
            low, high = max(span.start, start), min(span.end, end)
            if low >= high:
                return None
            if span.axis is not None:
                found[span.axis] = (span.at + low - span.start, span.at + high - span.start)
        return tuple(found[axis] for axis in sorted(found))


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor as the pieces that it consists of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, part: str, shape: tuple[int, ...]) -> Assembly:
        """Return a part as it is.

        Example:
            >>> Assembly.whole("w", (2, 3)).transposed(0, 1).pieces[0].spans
            (Span(start=0, end=3, axis=1, at=0), Span(start=0, end=2, axis=0, at=0))
        """
        spans = tuple(Span(0, size, axis) for axis, size in enumerate(shape))
        return cls(shape, (Piece(part, spans),))

    @property
    def ndim(self) -> int:
        """Number of axes; transformers' conversions ask for it as they would ask a tensor."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """Return the length of one axis, as ``torch.Tensor.size`` does."""
        return self.shape[dim]

    def contiguous(self) -> Assembly:
        """Return the assembly itself: it has no order in memory."""
        return self

    def transposed(self, one: int, other: int) -> Assembly:
        """Return the assembly with two axes exchanged."""
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        pieces = (Piece(piece.part, tuple(piece.spans[axis] for axis in order)) for piece in self.pieces)
        return Assembly(tuple(self.shape[axis] for axis in order), tuple(pieces))

    def cut(self, dim: int, start: int, end: int) -> Assembly:
        """Return the range ``start`` to ``end`` of one axis; pieces outside of it are dropped."""
        pieces = []
        for piece in self.pieces:
            span = piece.spans[dim]
            low, high = max(span.start, start), min(span.end, end)
            if low < high:
                inner = Span(low - start, high - start, span.axis, span.at + low - span.start)
                pieces.append(replace(piece, spans=(*piece.spans[:dim], inner, *piece.spans[dim + 1 :])))
        return Assembly((*self.shape[:dim], end - start, *self.shape[dim + 1 :]), tuple(pieces))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # copy and pickle look for special methods, and expect this error where there is none.
            raise AttributeError(name)
        # A method that is not written above may mix or reorder elements, and no account of boxes could say so.
        raise UnknownOperationError(f"{name} is not known")

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let torch's own functions work on assemblies: those of `_FUNCTIONS`.

        Raises:
            UnknownOperationError: for any other function.
        """
        work = _FUNCTIONS.get(getattr(function, "__name__", ""))
        if work is None:
            raise UnknownOperationError(f"{getattr(function, '__name__', function)} is not known")
        return work(*args, **(kwargs or {}))


def stack(parts: Sequence[Assembly], dim: int = 0) -> Assembly:
    """Return assemblies of one shape stacked along a new axis, as ``torch.stack`` does."""
    _check_alike(parts, None)
    pieces = tuple(
        # The new axis has no counterpart in a part.
        Piece(piece.part, (*piece.spans[:dim], Span(n, n + 1, None), *piece.spans[dim:]))
        for n, part in enumerate(parts)
        for piece in part.pieces
    )
    shape = parts[0].shape
    return Assembly((*shape[:dim], len(parts), *shape[dim:]), pieces)


def concatenate(parts: Sequence[Assembly], dim: int = 0) -> Assembly:
    """Return assemblies joined along an axis that they have, as ``torch.cat`` does."""
    _check_alike(parts, dim)
    offsets = list(accumulate((part.shape[dim] for part in parts), initial=0))
    pieces = tuple(
        Piece(piece.part, _moved(piece.spans, dim, offset))
        # The last offset is the length of the whole.
        for part, offset in zip(parts, offsets, strict=False)
        for piece in part.pieces
    )
    shape = parts[0].shape
    return Assembly((*shape[:dim], offsets[-1], *shape[dim + 1 :]), pieces)


def split(whole: Assembly, sizes: int | Sequence[int], dim: int = 0) -> tuple[Assembly, ...]:
    """Return ranges of an axis, as ``torch.split`` does: of the sizes given, or of one size but for a shorter last
    one.

    Raises:
        ValueError: the sizes do not add up to the length of the axis.
    """
    total = whole.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, max(sizes, 1))]
    if sum(sizes) != total:
        raise ValueError(f"split of {total} into {list(sizes)}")
    return tuple(whole.cut(dim, start, end) for start, end in pairwise(accumulate(sizes, initial=0)))


def chunk(whole: Assembly, chunks: int, dim: int = 0) -> tuple[Assembly, ...]:
    """Return ``chunks`` ranges of an axis, or fewer: torch rounds their size up."""
    return split(whole, max(1, -(-whole.shape[dim] // chunks)), dim)


def transpose(whole: Assembly, dim0: int, dim1: int) -> Assembly:
    """Return an assembly with two axes exchanged, as ``torch.transpose`` does."""
    return whole.transposed(dim0, dim1)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "stack": stack,
    "cat": concatenate,
    "split": split,
    "chunk": chunk,
    "transpose": transpose,
}
"""Name of torch's function → what it does to assemblies."""


def _moved(spans: tuple[Span, ...], dim: int, by: int) -> tuple[Span, ...]:
    span = spans[dim]
    return (*spans[:dim], span._replace(start=span.start + by, end=span.end + by), *spans[dim + 1 :])


def _without(values: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _check_alike(parts: Sequence[Assembly], dim: int | None) -> None:
    """Raise ValueError when shapes differ, apart from the axis ``dim``."""
    shapes = {part.shape if dim is None else _without(part.shape, dim) for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"parts of different shapes: {sorted(shapes)}")
