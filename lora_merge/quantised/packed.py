"""Parts of a weight in the storages that several methods share: bytes with scales, four bits with scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.quantised.draft import Wanted, codes_of, grid, storage

if TYPE_CHECKING:
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Storage
    from lora_merge.quantised.draft import Draft

ONE = ((), (1,), (1, 1))
"""The shapes of a single number."""


def scaled_storage(ref: TensorRef, block: tuple[int, int], scale: str) -> Storage:
    """Return the storage of codes of eight bits with a scale for each block.

    Args:
        ref: the codes.
        block: rows and columns that share a scale; 0 for the whole axis.
        scale: dtype of the scales.
    """
    rows, columns = block
    return storage("scaled", ref.dtype, codes=ref.dtype, block_rows=rows, block_columns=columns, scale=scale)


def add_scaled(
    draft: Draft,
    ref: TensorRef,
    scale: str,
    block: tuple[int, int],
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...] = (),
) -> bool:
    """Add a weight of codes of eight bits with a scale for each block.

    Args:
        draft: to add it to.
        ref: the codes.
        scale: name of the tensor of scales.
        block: rows and columns that share a scale; 0 for the whole axis.
        dtypes: that the scales may have.
        shapes: that they may have; none for that of the grid.
    """
    found = draft.tensors.get(scale)
    # Without scales `Draft.add` refuses the weight, and their dtype does not matter.
    how = scaled_storage(ref, block, found.dtype if found is not None else dtypes[0])
    wanted = Wanted("scale", scale, dtypes, shapes or (grid(ref.shape, *block),))
    return draft.add(ref.name, ref.shape, how, [codes_of(ref.name, ref.dtype, ref.shape), wanted])


def add_fp4(
    draft: Draft, name: str, ref: TensorRef, scale: str, overall: tuple[str, str] | None = None
) -> bool:
    """Add a weight of codes of four bits: MXFP4, or NVFP4 where a scale for the whole tensor is named.

    Args:
        draft: to add it to.
        name: of the weight.
        ref: the codes, two in a byte.
        scale: name of the tensor of scales.
        overall: name of the scale of the whole tensor, and ``"divide"`` or ``"multiply"``.
    """
    shape = (*ref.shape[:-1], ref.shape[-1] * 2)
    group, kind, dtypes = (32, "E8M0", ("U8", "F8_E8M0")) if overall is None else (16, "E4M3", ("F8_E4M3",))
    use = "none" if overall is None else overall[1]
    how = storage("fp4", ref.dtype, group=group, scale=kind, **{"global": use})
    wanted = [
        codes_of(ref.name, ref.dtype, ref.shape),
        Wanted("scale", scale, dtypes, (grid(shape, 1, group),)),
    ]
    if overall is not None:
        wanted.append(Wanted("global", overall[0], ("F32",), ONE))
    return draft.add(name, shape, how, wanted)
