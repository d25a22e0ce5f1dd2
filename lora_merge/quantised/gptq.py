"""GPTQ: integer codes in columns of words, a scale and a zero for each group of inputs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.core.report import error, note
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft, Wanted, codes_of, number, storage
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.indices import add_indexed
from lora_merge.quantised.matching import matching
from lora_merge.quantised.method import PatternError
from lora_merge.quantised.tables import settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Weight
    from lora_merge.quantised.method import Found, Surroundings
    from lora_merge.quantised.tables import Table

_CODES = ".qweight"
_ORPHANS = re.compile(r"\.(qzeros|scales|g_idx)$")
_BITS = (2, 3, 4, 8)
_FIELD = "dynamic"

_MOST_ZEROS = 64 << 20
"""Bytes of zeros that are read in search of a field of ones. Most checkpoints that have one, have many."""

_ONES = {2: b"\x55", 3: b"\x49\x92\x24", 4: b"\x11", 8: b"\x01"}
"""Bits → the lowest bit of every field, as bytes that repeat."""


class _Scheme(NamedTuple):
    bits: int
    group: int
    """Inputs that share a scale; 0 for all of them."""


class Gptq:
    """``quant_method`` gptq. Source: GPTQModel 7.7 ``QuantizeConfig.dynamic_get`` and ``TorchQuantLinear``."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "gptq")
        if table is None:
            return NOTHING
        draft = Draft(tensors, table)
        version = 2 if _layout(table.values) == "gptq_v2" else 1
        modules = [name.removesuffix(_CODES) for name in tensors if name.endswith(_CODES)]
        left_dense = []
        for module, scheme in zip(modules, _schemes(table.values, modules, around), strict=True):
            if scheme is None:
                left_dense.append(module)
                scheme = _default(table.values)  # noqa: PLW2901 - so that the tensors are still understood
            _add(draft, module, scheme, version, around)
        # GPTQModel leaves the head dense unless this flag is set.
        if not table.values.get("lm_head"):
            left_dense += [module for module in modules if module.rpartition(".")[2] == "lm_head"]
        dense = [entry.removeprefix("-:") for entry in _rules(table.values) if entry.startswith("-:")]
        found = draft.done(_Dynamic(dense, left_dense, around), _ORPHANS, "qweight")
        weights = found.weights.values()
        asked = [_ones(weights, around) if version == 1 else None, _other_version(weights, table, around)]
        return replace(found, issues=(*found.issues, *filter(None, asked)))


class _Dynamic(Exceptions):
    """The exceptions of ``dynamic``, of which is known which modules with codes they except."""

    def __init__(self, entries: Sequence[str], surely: Sequence[str], around: Surroundings) -> None:
        super().__init__(_FIELD, [f"re:{entry}" for entry in entries], "targets", around)
        self._surely = frozenset(surely)

    def surely(self, modules: Sequence[str]) -> list[str]:
        return [module for module in modules if module in self._surely]


def _schemes(values: Mapping[str, Any], modules: Sequence[str], around: Surroundings) -> list[_Scheme | None]:
    """Return how each module is quantised; None for one that ``dynamic`` leaves dense. The first rule that matches counts."""
    rules = list(_rules(values).items())
    default = _default(values)
    if not rules:
        return [default] * len(modules)
    expressions = [entry.removeprefix("-:").removeprefix("+:") for entry, _ in rules]
    try:
        hits = matching(expressions, modules, around.match)
    except PatternError as exc:
        raise PatternError(exc.at, f"{_FIELD} has {quoted(rules[exc.at][0])}, which {exc}") from exc
    return [_ruled(rules[min(found)], default) if found else default for found in hits]


def _ruled(rule: tuple[str, Any], default: _Scheme) -> _Scheme | None:
    entry, changed = rule
    if entry.startswith("-:"):
        return None
    values = changed if isinstance(changed, dict) else {}
    bits, group = number(values, "bits"), number(values, "group_size")
    return _Scheme(default.bits if bits is None else bits, default.group if group is None else max(group, 0))


def _default(values: Mapping[str, Any]) -> _Scheme:
    bits, group = number(values, "bits"), number(values, "group_size")
    # GPTQModel's defaults; a group of -1 is one for all inputs.
    return _Scheme(4 if bits is None else bits, 128 if group is None else max(group, 0))


def _rules(values: Mapping[str, Any]) -> Mapping[str, Any]:
    rules = values.get(_FIELD)
    return rules if isinstance(rules, dict) else {}


def _layout(values: Mapping[str, Any]) -> str:
    return str(values.get("checkpoint_format") or values.get("format") or "gptq").lower()


def _add(draft: Draft, module: str, scheme: _Scheme, version: int, around: Surroundings) -> None:
    codes = draft.tensors[module + _CODES]
    bits, group = scheme
    if bits not in _BITS or len(codes.shape) != 2 or codes.shape[0] * 32 % bits:
        sentence = f"has the shape {codes.shape} and {bits} bits, expected two axes, and 2, 3, 4 or 8 bits"
        draft.refuse(error(CODE, codes.name, sentence, AGAIN), [codes])
        return
    n_in, n_out = codes.shape[0] * 32 // bits, codes.shape[1]
    groups = -(-n_in // group) if group else 1
    scale = draft.tensors.get(f"{module}.scales")
    how = storage(
        "gptq",
        codes.dtype,
        bits=bits,
        group=group,
        groups=groups,
        scale=scale.dtype if scale is not None else "F16",
        version=version,
    )
    wanted = [
        codes_of(codes.name, "I32", codes.shape),
        Wanted("scale", f"{module}.scales", ("F16", "BF16", "F32"), ((groups, n_out),)),
        Wanted("zero", f"{module}.qzeros", ("I32",), ((groups, -(-n_out * bits // 32)),)),
        Wanted("g_idx", f"{module}.g_idx", ("I32",), ((n_in,),)),
    ]
    add_indexed(draft, f"{module}.weight", (n_out, n_in), how, wanted, groups, around)


def _other_version(weights: Iterable[Weight], table: Table, around: Surroundings) -> Issue | None:
    """Return an error where the first weight of a symmetric model has the zeros of the other layout: all its values would be
    decoded one step off.
    """
    first = next(iter(weights), None)
    if first is None or table.values.get("sym") is not True or _rules(table.values):
        return None
    settings, ref = dict(first.storage.settings), first.parts["zero"]
    bits, version, zeros = int(settings["bits"]), int(settings["version"]), around.read(ref)
    own, other = (2 ** (bits - 1) - (2 - one) for one in (version, 3 - version))
    ones = _ONES[bits] * (len(zeros) // len(_ONES[bits]) + 1)
    field = int.from_bytes(ones[: len(zeros)], "little")
    if int.from_bytes(zeros, "little") != field * other:
        return None
    layouts = "gptq", "gptq_v2"
    sentence = (
        f"stores {other} as every zero point, as {layouts[2 - version]} does, but the layout is "
        f"{layouts[version - 1]} by {table.place}, which stores {own} for a symmetric model"
    )
    hint = f"set checkpoint_format to {layouts[2 - version]}, or download the checkpoint again"
    return error(CODE, ref.name, sentence, hint)


def _ones(weights: Iterable[Weight], around: Surroundings) -> Issue | None:
    """Return a warning for zeros with a field of ones: kernels disagree whether it means 0 or a zero beyond the codes."""
    left = _MOST_ZEROS
    for weight in weights:
        zeros, settings = weight.parts["zero"], dict(weight.storage.settings)
        left -= zeros.nbytes
        if left < 0:
            return None
        if has_ones(around.read(zeros), int(settings["bits"])):
            sentence = (
                "has an ambiguous zero point (all bits of its field are set); it is read as GPTQModel reads it, but "
                "some kernels read it differently"
            )
            return note("ambiguous-zeros", zeros.name, sentence)
    return None


def has_ones(data: bytes, bits: int) -> bool:
    """Return True where all bits of some field are set.

    Example:
        >>> has_ones(bytes([0x12, 0x3F]), 4), has_ones(bytes([0x12, 0x37]), 4), has_ones(bytes([0, 0b111]), 3)
        (True, False, False)
    """
    repeated = _ONES[bits] * (len(data) // len(_ONES[bits]) + 1)
    value, found = int.from_bytes(data, "little"), int.from_bytes(repeated[: len(data)], "little")
    for shift in range(bits):
        # In the end the lowest bit of a field is left only where all its bits are set.
        found &= value >> shift
    return found != 0
