"""Storages in the words of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.weight import Storage

_CODES = {"F8_E4M3": "FP8", "F8_E5M2": "FP8 (E5M2)", "I8": "INT8"}
_POWERS = frozenset({"U8", "F8_E8M0"})
"""Dtypes of scales that are powers of two."""


def describe(storage: Storage) -> str:
    """Return how a weight is stored, for people.

    Example:
        >>> from lora_merge.core.weight import Storage
        >>> describe(Storage("gptq", "I32", (("bits", 4), ("group", 64))))
        'GPTQ, 4 bits, groups of 64'
        >>> describe(Storage("dense", "BF16"))
        'BF16'
    """
    words = _WORDS.get(storage.codec)
    if words is not None:
        return words(dict(storage.settings))
    return storage.dtype if storage.is_dense else f"{storage.codec} ({storage.dtype})"


def _scaled(settings: Mapping[str, Any]) -> str:
    name, rows, columns = (
        _CODES.get(settings["codes"], settings["codes"]),
        settings["block_rows"],
        settings["block_columns"],
    )
    if (rows, columns) == (1, 32) and settings["scale"] in _POWERS and name == "FP8":
        return "MXFP8"
    if not rows and not columns:
        return f"{name}, one scale"
    if not columns:
        return f"{name}, a scale for each row" if rows == 1 else f"{name}, a scale for every {rows} rows"
    if not rows:
        return (
            f"{name}, a scale for each column"
            if columns == 1
            else f"{name}, a scale for every {columns} columns"
        )
    return f"{name}, groups of {columns}" if rows == 1 else f"{name}, blocks of {rows} x {columns}"


def _groups(size: int) -> str:
    return f"groups of {size}" if size else "a scale for each row"


def _fp4(settings: Mapping[str, Any]) -> str:
    return "MXFP4" if settings["scale"] == "E8M0" else f"NVFP4, {_groups(settings['group'])}"


def _packed(settings: Mapping[str, Any]) -> str:
    zero = ", asymmetric" if settings["zero"] else ""
    return f"INT{settings['bits']}, {_groups(settings['group'])}{zero}"


def _gptq(settings: Mapping[str, Any]) -> str:
    return f"GPTQ, {settings['bits']} bits, {_groups(settings['group'])}"


def _bnb4(settings: Mapping[str, Any]) -> str:
    name = str(settings["type"]).upper()
    return f"{name}, double-quantised" if settings["nested"] else name


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "scaled": _scaled,
    "fp4": _fp4,
    "mxfp4_experts": lambda _: "MXFP4",
    "packed_int": _packed,
    "mlx_affine": lambda settings: f"MLX, {settings['bits']} bits, groups of {settings['group']}",
    "gptq": _gptq,
    "awq": lambda settings: f"AWQ, 4 bits, {_groups(settings['group'])}",
    "bnb4": _bnb4,
    "llm_int8": lambda _: "LLM.int8",
    "modelopt_awq": lambda settings: f"ModelOpt AWQ, 4 bits, {_groups(settings['group'])}",
}
