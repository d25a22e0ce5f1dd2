"""How many scales some codes have: ⌈size / block⌉ along each axis, for the sizes of blocks that the settings know."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING

from lora_merge.quantised.refused import KNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lora_merge.checks.gate.parts import Module
    from lora_merge.checks.gate.scheme import Scheme
    from lora_merge.core.tensor import TensorRef

Shape = tuple[int, ...]

_KNOWN = frozenset(KNOWN) - {"mlx"}
"""Values of ``quant_method`` whose scales are counted here."""

_FLOAT8 = "F8_E4M3"
_FLOATS = frozenset({_FLOAT8, "F8_E8M0", "U8"})
"""Dtypes of the scales of floats of four bits."""

_MX = 32
"""Values that share a scale in the formats of the Open Compute Project: MXFP4, MXFP8."""

_NV = 16
"""In NVFP4."""

_AWQ_WORD = 8


def wanted_grids(module: Module, scheme: Scheme) -> set[Shape]:
    """Return the shapes that the scales of a module may have, axes of size 1 left out; empty where nothing is known."""
    codes, scales = module.codes, module.scales
    if codes is None or scales is None or (scheme.methods and not scheme.methods & _KNOWN):
        return set()
    found = _rule(module)(codes, scales, module, scheme)
    return {_squeezed(shape) for shape in found}


def grid_of(scales: TensorRef) -> Shape:
    """Return the shape of some scales, axes of size 1 left out."""
    return _squeezed(scales.shape)


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _rule(module: Module) -> Callable[[TensorRef, TensorRef, Module, Scheme], Iterable[Shape]]:
    """Return how the scales of a module are counted, by the names and dtypes of its parts."""
    assert module.codes is not None
    assert module.scales is not None
    codes, scales = module.codes, module.scales
    if scales.name.endswith(".absmax"):
        return _bitsandbytes
    if codes.name.endswith("_blocks"):
        return _blocks
    if codes.name.endswith(".qweight"):
        return _gptq_or_awq
    is_fp4 = scales.dtype in _FLOATS and codes.dtype == "U8"
    if is_fp4 or module.shared is not None or (_is_packed(codes) and codes.dtype == "I8"):
        return _fp4
    return {"I32": _packed, "U32": _mlx, "U8": _modelopt_awq}.get(codes.dtype, _bytes)


def _is_packed(codes: TensorRef) -> bool:
    return codes.name.endswith(".weight_packed")


def _up(size: int, block: int) -> int:
    """Return ⌈size / block⌉; one block where it has no size."""
    return -(-size // block) if block else 1


def _blocks(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield the shape of the blocks themselves, each of which is the last axis: experts in MXFP4."""
    del scales, module, scheme
    yield codes.shape[:-1]


def _bitsandbytes(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield the numbers of blocks of 32 to 4096 values, two values in a byte."""
    del scales, module, scheme
    for power in range(5, 13):
        yield (_up(2 * codes.nbytes, 1 << power),)


def _gptq_or_awq(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield ``[groups, out]``. GPTQ packs along the inputs, AWQ along the outputs."""
    del module
    if len(codes.shape) != 2:
        return
    high, wide = codes.shape
    is_awq = scales.shape[-1:] == (_AWQ_WORD * wide,)
    inputs = {high} if is_awq else {high * 32 // bits for bits in scheme.bits}
    for size, group in product(inputs, scheme.groups):
        yield _up(size, group), _AWQ_WORD * wide if is_awq else wide


def _packed(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield ``[…, out, groups]`` of compressed-tensors. The last word of a row may be partly used."""
    del scales, module
    *outer, words = codes.shape
    for bits, group in product(scheme.bits, {*scheme.groups, 0}):
        for inputs in {(words - 1) * 32 // bits + 1, words * 32 // bits}:
            yield *outer, _up(inputs, group)


def _mlx(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield ``[…, out, groups]`` of MLX, whose modules have separate numbers of bits and groups."""
    del scales, module
    *outer, words = codes.shape
    # The modes mxfp4, mxfp8 and nvfp4 have fixed sizes, which the settings may leave out.
    for bits, group in product({*scheme.bits, 4, 8}, {*scheme.groups, _NV, _MX} - {0}):
        if words * 32 % (bits * group) == 0:
            yield *outer, words * 32 // (bits * group)


def _fp4(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield ``[…, out, in / group]``: NVFP4 has scales of eight bits with a fraction, MXFP4 powers of two."""
    del scheme
    *outer, n_bytes = codes.shape
    group = _NV if scales.dtype == _FLOAT8 or module.shared is not None else _MX
    yield *outer, _up(2 * n_bytes, group)


def _modelopt_awq(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield ``[out, in / group]``: a byte has two outputs."""
    del scales, module
    *outer, high, wide = codes.shape
    for group in scheme.groups or {128}:
        yield *outer, 2 * high, _up(wide, group)


def _bytes(codes: TensorRef, scales: TensorRef, module: Module, scheme: Scheme) -> Iterable[Shape]:
    """Yield the grids of codes of eight bits: blocks where the settings know their size, else a scale for all, for each
    row or for each group.
    """
    del module
    *outer, high, wide = codes.shape
    is_power = scales.dtype in {"U8", "F8_E8M0"}
    # DeepSeek stores experts of four bits, two in a byte, among layers of eight.
    if codes.dtype == "I8" and is_power:
        yield *outer, high, _up(2 * wide, _MX)
    for block in scheme.blocks:
        yield *outer, _up(high, block[0]), _up(wide, block[1])
    # With a size of blocks, every layer of ``fp8`` is read in blocks.
    if scheme.blocks and "fp8" in scheme.methods:
        return
    yield from ((), (prod(outer),), (*outer, high), (*outer, wide))
    for group in {*scheme.groups, _MX} if is_power else scheme.groups:
        yield *outer, high, _up(wide, group)
