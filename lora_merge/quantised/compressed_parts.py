"""The parts of a module of compressed-tensors, by the format of its group."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.quantised.draft import AGAIN, CODE, Draft, Wanted, codes_of, grid, number, storage
from lora_merge.quantised.fp8 import block_size, row_shapes
from lora_merge.quantised.indices import add_indexed
from lora_merge.quantised.packed import ONE, add_fp4, add_scaled
from lora_merge.quantised.refused import parent_hint
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Surroundings

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_FLOATS = ("BF16", "F32", "F16")


class Group(NamedTuple):
    """One entry of ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]
    """The arguments: num_bits, type, strategy, group_size, …"""


class Module(NamedTuple):
    """One module to be added: what its group says, and what it is stored as."""

    draft: Draft
    path: str
    codes: TensorRef
    group: Group
    around: Surroundings
    shapes: dict[object, tuple[int, ...]]
    """The logical shapes that were read, by what they depend on."""

    def refuse(self, sentence: str, hint: str = AGAIN) -> None:
        """Note what is wrong with it."""
        self.draft.refuse(error(CODE, self.codes.name, sentence, hint), [self.codes])


def add_module(
    draft: Draft,
    path: str,
    codes: TensorRef,
    group: Group,
    around: Surroundings,
    shapes: dict[object, tuple[int, ...]],
) -> None:
    """Add the weight of a module, or note what is wrong with it."""
    module = Module(draft, path, codes, group, around, shapes)
    known = _FORMATS.get(group.format)
    if known is None:
        sentence = (
            f"the format of {group.name} is {quoted(group.format)}, expected one of {', '.join(_FORMATS)}"
        )
        hint = parent_hint(around.config)
        draft.refuse(error("unsupported", draft.table.place, sentence, hint), [codes])
        return
    suffix, add = known
    if not codes.name.endswith(f".{suffix}"):
        module.refuse(f"is not called {suffix}, but the format of {group.name} is {group.format}")
        return
    add(module)


def _strategy(weights: Mapping[str, Any]) -> str:
    """Return how scales are shared; where nothing says it, the group tells (``QuantizationArgs``)."""
    stated = weights.get("strategy")
    if stated:
        return str(stated)
    size = number(weights, "group_size")
    return "tensor" if size is None else "group" if size > 0 else "channel"


def _bytes(module: Module) -> None:
    """Codes of eight bits, as they are: float-quantized, int-quantized, naive-quantized."""
    draft, path, codes, group, around, _ = module
    weights = group.weights
    kind, bits = weights.get("type", "int"), number(weights, "num_bits")
    dtype = "F8_E4M3" if kind == "float" else "I8"
    if bits != 8:
        module.refuse(f"has {quoted(bits)} bits in the format {group.format}, expected 8")
    elif codes.dtype != dtype:
        module.refuse(
            f"is stored as {codes.dtype}, expected {dtype}: the type of {group.name} is {quoted(kind)}"
        )
    elif weights.get("symmetric") is False or draft.has(f"{path}.weight_zero_point"):
        module.refuse(
            "has a zero point, which is not supported for codes of eight bits", parent_hint(around.config)
        )
    else:
        _scaled(module, _strategy(weights))


def _scaled(module: Module, strategy: str) -> None:
    draft, path, codes, group, _, _ = module
    scale = f"{path}.weight_scale"
    size, blocks = number(group.weights, "group_size"), block_size(group.weights.get("block_structure"))
    if strategy == "tensor":
        add_scaled(draft, codes, scale, (0, 0), _FLOATS, ONE)
    elif strategy == "channel":
        add_scaled(draft, codes, scale, (1, 0), _FLOATS, row_shapes(codes.shape))
    elif strategy == "block" and blocks is not None:
        add_scaled(draft, codes, scale, blocks, _FLOATS)
    elif strategy == "group" and size is not None and size > 0:
        add_scaled(draft, codes, scale, (1, size), _FLOATS)
    else:
        _refuse_strategy(module, strategy)


def _refuse_strategy(module: Module, strategy: str) -> None:
    group = module.group
    module.refuse(
        f"the strategy of {group.name} is {quoted(strategy)} with group_size {quoted(group.weights.get('group_size'))} "
        f"and block_structure {quoted(group.weights.get('block_structure'))}, which is not supported for {group.format}",
        parent_hint(module.around.config),
    )


def _mxfp8(module: Module) -> None:
    if module.codes.dtype != "F8_E4M3":
        module.refuse(f"is stored as {module.codes.dtype}, expected F8_E4M3")
        return
    add_scaled(module.draft, module.codes, f"{module.path}.weight_scale", (1, 32), ("U8", "F8_E8M0"))


def _mxfp4(module: Module) -> None:
    if _is_packed(module, "U8", 4):
        add_fp4(module.draft, f"{module.path}.weight", module.codes, f"{module.path}.weight_scale")


def _nvfp4(module: Module) -> None:
    if _is_packed(module, "U8", 4):
        overall = (f"{module.path}.weight_global_scale", "divide")
        add_fp4(module.draft, f"{module.path}.weight", module.codes, f"{module.path}.weight_scale", overall)


def _is_packed(module: Module, dtype: str, bits: int) -> bool:
    codes, stated = module.codes, number(module.group.weights, "num_bits")
    if codes.dtype != dtype or len(codes.shape) < 2:
        module.refuse(
            f"is stored as {codes.dtype} of shape {shape_text(codes.shape)}, expected {dtype} of two axes"
        )
        return False
    if stated not in (None, bits):
        module.refuse(f"has {stated} bits in the format {module.group.format}, expected {bits}")
        return False
    return True


def _integers(module: Module) -> None:
    """Integers of one to eight bits in words along the inputs: pack-quantized."""
    draft, path, codes, group, around, _ = module
    weights, strategy = group.weights, _strategy(group.weights)
    bits, size = number(weights, "num_bits"), number(weights, "group_size")
    if weights.get("type", "int") != "int" or bits is None or not 1 <= bits <= 8:
        module.refuse(
            f"has {quoted(bits)} bits of type {quoted(weights.get('type'))}, expected int of 1 to 8 bits"
        )
        return
    if not _is_packed(module, "I32", bits):
        return
    if strategy == "channel":
        size = 0
    elif strategy != "group" or size is None or size < 1:
        _refuse_strategy(module, strategy)
        return
    shape = _logical(module, bits)
    if -(-shape[-1] * bits // 32) != codes.shape[-1] or shape[:-1] != codes.shape[:-1]:
        sentence = f"has shape {shape_text(codes.shape)}, which does not hold {shape_text(shape)} in {bits} bits (weight_shape)"
        module.refuse(sentence)
        return
    scale = draft.tensors.get(f"{path}.weight_scale")
    groups = grid(shape, 1, size)
    wanted = [
        codes_of(codes.name, "I32", codes.shape),
        Wanted("scale", f"{path}.weight_scale", _FLOATS, (groups,)),
        Wanted("weight_shape", f"{path}.weight_shape", ("I64", "I32"), ((len(shape),),)),
    ]
    is_asymmetric = weights.get("symmetric") is False
    if is_asymmetric:
        zeros = (*shape[:-2], -(-shape[-2] * bits // 32), groups[-1])
        wanted.append(Wanted("zero", f"{path}.weight_zero_point", ("I32",), (zeros,)))
    elif draft.has(f"{path}.weight_zero_point"):
        module.refuse(f"has a weight_zero_point, but {group.name} says that it is symmetric")
        return
    # Without it the groups of reordered inputs would be taken for runs of neighbours.
    is_ordered = weights.get("actorder") == "group" or draft.has(f"{path}.weight_g_idx")
    if is_ordered:
        wanted.append(Wanted("g_idx", f"{path}.weight_g_idx", ("I32",), ((shape[-1],),)))
    how = storage(
        "packed_int",
        codes.dtype,
        bits=bits,
        group=size,
        scale=scale.dtype if scale is not None else "BF16",
        zero=is_asymmetric,
        g_idx=is_ordered,
    )
    add_indexed(draft, f"{path}.weight", shape, how, wanted, groups[-1], around)


def _logical(module: Module, bits: int) -> tuple[int, ...]:
    """Return the shape of the values: the last word of a row may be partly used, so ``weight_shape`` is asked.

    It is read once for all experts of a layer: a read of some bytes for each of ten thousand takes longer than all the
    rest.
    """
    draft, path, codes, _, around, shapes = module
    full = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    ref, scale = draft.tensors.get(f"{path}.weight_shape"), draft.tensors.get(f"{path}.weight_scale")
    if ref is None or ref.dtype not in ("I64", "I32") or ref.shape != (len(full),):
        return full  # `Draft.add` notes it
    # Experts of one layer are one stack in every engine. Other modules may differ within the last word.
    key = (_EXPERT.sub("", path), bits, codes.shape, scale.shape if scale is not None else None)
    if key not in shapes:
        shapes[key] = struct.unpack(f"<{len(full)}{'q' if ref.dtype == 'I64' else 'i'}", around.read(ref))
    return shapes[key]


_FORMATS: dict[str, tuple[str, Callable[[Module], None]]] = {
    "float-quantized": ("weight", _bytes),
    "int-quantized": ("weight", _bytes),
    "naive-quantized": ("weight", _bytes),
    "pack-quantized": ("weight_packed", _integers),
    "nvfp4-pack-quantized": ("weight_packed", _nvfp4),
    "mxfp4-pack-quantized": ("weight_packed", _mxfp4),
    "mxfp8-quantized": ("weight", _mxfp8),
}
"""Format → the name of its codes, and what adds a module."""
