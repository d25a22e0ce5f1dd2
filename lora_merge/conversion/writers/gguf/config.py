"""Numbers of a base's ``config.json`` that decide where llama.cpp puts rows, checked as they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from lora_merge.core.report import error
from lora_merge.errors import ConvertError
from lora_merge.peft_rules.scaling import is_number
from lora_merge.words import choice, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST = 1 << 16
"""Upper limit for numbers of heads, experts and layers. No model has as many."""


def whole(config: Mapping[str, Any], *keys: str, most: int = MOST) -> int:
    """Return a positive whole number: the first of some keys that is set.

    Raises:
        ConvertError: none of the keys is set, or the value is not a whole number from 1 to ``most``.
    """
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        _refuse(choice(keys), "is missing", f"a whole number from 1 to {most}")
    value = config[key]
    # In Python True is an int.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        _refuse(key, f"is {quoted(value)}", f"a whole number from 1 to {most}")
    return value


def multiplier(config: Mapping[str, Any], key: str) -> float:
    """Return a number by which a weight is multiplied; 1 if the key is missing.

    Raises:
        ConvertError: it is something else.
    """
    value = config.get(key, 1.0)
    if not is_number(value):
        _refuse(key, f"is {quoted(value)}", "a number")
    return float(value)


def multipliers(config: Mapping[str, Any], key: str, n: int) -> tuple[float, ...]:
    """Return n numbers; ones if the key is missing.

    Raises:
        ConvertError: they are something else, or of another count.
    """
    values = config.get(key) or (1.0,) * n
    if not isinstance(values, list | tuple) or len(values) != n or not all(map(is_number, values)):
        _refuse(key, f"is {quoted(values)}", f"a list of {n} numbers")
    return tuple(map(float, values))


def check_divides(config_key: str, n_parts: int, n_rows: int, path: str) -> None:
    """Check that the rows of a weight divide into parts of equal size.

    Raises:
        ConvertError: they cannot.
    """
    if n_rows % n_parts:
        _refuse(config_key, f"makes {n_parts} parts of the {n_rows} rows of {path}", "parts of one size")


def _refuse(key: str, got: str, wanted: str) -> NoReturn:
    raise ConvertError([error("bad-field", f"config.json: {key}", f"{got}, expected {wanted}")])
