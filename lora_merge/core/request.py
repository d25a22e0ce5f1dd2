"""One merge as the user asked for it, and how its values are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from lora_merge.core.shards import parse_size
from lora_merge.errors import RequestError

VerifyLevel = Literal["none", "sample", "full"]
OutputDtype = Literal["bfloat16", "float16", "float32"]

_SHORT_DTYPES: Mapping[str, OutputDtype] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Request:
    """What to merge, into what, and how: the command's options, and the keys of a request file."""

    adapter: str
    """Adapter directory."""

    out: str
    """Directory to create."""

    base: str | None = None
    """Base checkpoint directory; default: the adapter's ``base_model_name_or_path``."""

    dtype: OutputDtype | None = None
    """Storage of the output; default: the base's, tensor by tensor."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""

    workers: int | None = None
    """Worker threads; default: the number of usable cores."""

    max_shard_size: str | int | None = None
    """For example ``5GB``; default: the base's own shards."""

    overwrite: bool = False
    """Replace an existing output, once the new one is whole."""

    verify: VerifyLevel = "sample"
    """How much of the output to check before it gets its name."""

    strict: bool = False
    """Treat warnings as errors."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


def parse_dtype(text: str) -> OutputDtype:
    """Return a dtype as torch spells it.

    Example:
        >>> parse_dtype("bf16")
        'bfloat16'

    Raises:
        ValueError: it is no dtype that an output can have.
    """
    for short, full in _SHORT_DTYPES.items():
        if str(text).lower() in {short, full}:
            return full
    known = ", ".join(f"{full} ({short})" for short, full in _SHORT_DTYPES.items())
    raise ValueError(f"{text!r} is no dtype, expected one of {known}")


def parse_device(text: str) -> str:
    """Return a device name as it is.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise ValueError(f"{text!r} is no device, expected auto, cpu, cuda or cuda:N")
    return str(text)


def parse_shard_size(text: str | int) -> str | int:
    """Return a size as it is written, once it is known to parse.

    Raises:
        ValueError: it is no size.
    """
    parse_size(text)
    return text


def parse_workers(text: str | int) -> int:
    """Return a number of workers.

    Raises:
        ValueError: it is no whole number, or less than one.
    """
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of workers, expected 1 or more")
    return int(text)


def parse_verify(text: str) -> VerifyLevel:
    """Return a level of verification.

    Raises:
        ValueError: it is none.
    """
    for level in get_args(VerifyLevel):
        if text == level:
            return cast("VerifyLevel", level)
    raise ValueError(f"{text!r} is no level of verification, expected {', '.join(get_args(VerifyLevel))}")


PARSERS: Mapping[str, Callable[..., object]] = {
    "dtype": parse_dtype,
    "device": parse_device,
    "max_shard_size": parse_shard_size,
    "verify": parse_verify,
    "workers": parse_workers,
}
"""How the values that a type cannot describe are checked, wherever they come from."""


def parse_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with their values parsed; None stays None.

    Raises:
        RequestError: a value does not parse; it names the key.
    """
    parsed = dict(values)
    for key, parse in PARSERS.items():
        if parsed.get(key) is not None:
            try:
                parsed[key] = parse(parsed[key])
            except ValueError as exc:
                raise RequestError("", 0, key, str(exc)) from exc
    return parsed
