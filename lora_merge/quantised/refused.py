"""Ways to quantise that are known and not read, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, error
from lora_merge.quantised.tables import settings_of, tables_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lora_merge.quantised.tables import Table

CODE = "unsupported"

_REFUSED = {
    "hqq": "HQQ, which has no single layout of its tensors",
    "aqlm": "AQLM, whose weights are sums of learned codebooks",
    "vptq": "VPTQ, whose weights are vectors of learned codebooks",
    "spqr": "SpQR, which keeps outliers in sparse tensors",
    "higgs": "HIGGS, whose weights are rotated by a Hadamard transform",
    "eetq": "EETQ, whose weights are laid out for one kernel",
    "bitnet": "BitNet, which was trained with three values for each weight",
    "fp_quant": "FP-Quant, whose weights are rotated by a Hadamard transform",
    "sinq": "SINQ, which has two scales for each value",
    "quark": "Quark",
    "quanto": "quanto",
    "gguf": "GGUF",
    "auto-round": "AutoRound, which packs its weights in several ways",
    "metal": "Metal kernels of transformers",
    "fouroversix": "Four Over Six",
    "nvfp4": "NVFP4 of transformers, whose layout is not stable",
}
_NAMES = {
    "fp-quant": "fp_quant",
    "fpquant": "fp_quant",
    "intel/auto-round": "auto-round",
    "auto_round": "auto-round",
}
"""Other spellings of `_REFUSED`."""

KNOWN = (
    "fp8",
    "mxfp8",
    "fbgemm_fp8",
    "compressed-tensors",
    "modelopt",
    "mxfp4",
    "gptq",
    "awq",
    "bitsandbytes",
    "torchao",
    "mlx",
)
"""The methods that are read, as `tables` calls them."""

_DENSE_STATES = frozenset({"compressed", "", "None"})


def refusals(
    config: Mapping[str, Any], side: Mapping[str, Mapping[str, Any]], known: tuple[str, ...] = KNOWN
) -> list[Issue]:
    """Return an error for each way of quantising that is not read, as far as small files show it.

    Args:
        config: ``config.json``.
        side: the files `tables.SIDE_FILES` that are there, parsed.
        known: the methods that are read.
    """
    issues: list[Issue] = []
    hint = parent_hint(config)
    for table in tables_of(settings_of(config, side)):
        why = next(_reasons(table, known), None)
        # Two tables that say the same are one reason.
        if why is not None and all(why != issue.sentence for issue in issues):
            issues.append(error(CODE, table.place, why, hint))
    return issues


def parent_hint(config: Mapping[str, Any]) -> str:
    """Return what to do about a base that cannot be read as it is stored."""
    parent = config.get("_name_or_path")
    text = f" (perhaps {parent})" if isinstance(parent, str) and parent else ""
    return f"merge into its full-precision parent: --base PARENT{text}"


def _reasons(table: Table, known: tuple[str, ...]) -> Iterator[str]:
    name = _NAMES.get(table.method, table.method)
    if name in _REFUSED:
        yield f"the base is stored quantised with {_REFUSED[name]}: this is not supported"
    elif not name:
        yield "the base is stored quantised, but this table does not name a method (quant_method)"
    elif name not in known:
        yield f"the base is stored quantised ({quoted(table.method)[1:-1]}), an unknown method"
    elif name in _DETAILS:
        yield from _DETAILS[name](table.values)


def _compressed(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("transform_config"):
        yield "transform_config is set: the weights are rotated, which is not supported"
    groups = values.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = [values.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))]
    sparse = next((one for one in formats if "sparse" in str(one) or str(one).startswith("marlin")), None)
    if sparse:
        yield f"format is {quoted(sparse)}: sparse and marlin layouts are not supported"
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, dict) and str(sparsity.get("format", "dense")) not in {"dense", "None"}:
        yield f"sparsity_config has the format {quoted(sparsity['format'])}: sparse weights are not supported"
    state = values.get("quantization_status")
    if str(state or "") not in _DENSE_STATES:
        yield (
            f"quantization_status is {quoted(state)}, expected 'compressed': "
            "the model was not saved in its compressed form"
        )


def _gptq(values: Mapping[str, Any]) -> Iterator[str]:
    # GPTQModel writes `format` and `checkpoint_format` with one value; AutoGPTQ had a flag.
    layouts = [str(values[key]).lower() for key in ("checkpoint_format", "format") if values.get(key)]
    if values.get("is_marlin_format"):
        layouts.insert(0, "marlin")
    odd = next((one for one in layouts if one not in {"gptq", "gptq_v2"}), None)
    if odd:
        yield f"checkpoint_format is {quoted(odd)}: only gptq and gptq_v2 are supported"
    packed = values.get("pack_dtype")
    if packed and str(packed).lower().removeprefix("torch.") != "int32":
        yield f"pack_dtype is {quoted(packed)}, expected int32"
    bits = values.get("bits", 4)
    if bits not in (2, 3, 4, 8):
        yield f"bits is {quoted(bits)}, expected 2, 3, 4 or 8"


def _awq(values: Mapping[str, Any]) -> Iterator[str]:
    version = str(values.get("version") or values.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        yield f"version is {quoted(version)}: the only supported layout of AWQ is gemm"
    bits = values.get("bits", values.get("w_bit", 4))
    if bits != 4:
        yield f"bits is {quoted(bits)}, expected 4"


_DETAILS: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
