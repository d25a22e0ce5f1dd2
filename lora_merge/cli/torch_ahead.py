"""Whether a command will need torch, guessed before its imports: then torch's library is loaded beside them.

A wrong guess costs a quarter of a second. Most merges are of one LoRA into a bfloat16 base, and need none; nor do most of those
into codes that keep their scales.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.native.library import library
from lora_merge.runtime.libtorch import load_beside

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLAIN = {
    "dtype": {"bfloat16"},
    "out_storage": {"base", "dense"},
    "quantize": (),
    "device": {"auto", "cpu"},
}
"""Option → the values with which the compiled loops may be enough."""

_METHODS = frozenset({"fp8", "modelopt", "compressed-tensors"})
"""Of quantising, whose codes mostly have four or eight bits and positive scales."""

_MOST_BYTES = 1 << 20
"""Of a file that is read for a guess."""

_PLAIN_DTYPES = frozenset({"bfloat16", None})


def load_for_merge(flags: Mapping[str, Any]) -> None:
    """Begin to load torch's library, if a merge with these options needs it."""
    adapters = flags.get("adapter") or ()
    if (
        library() is None
        or len(adapters) > 1
        or not _is_host_merge(flags, _read(flags.get("base"), "config.json"))
        or any(not _is_plain_adapter(_read(text, "adapter_config.json")) for text in adapters)
    ):
        load_beside()


def _is_host_merge(flags: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether the compiled loops may be enough for a base and the options of a merge."""
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    is_kept = flags.get("out_storage") == "base" and str(method) in _METHODS
    rounding = {"nearest", "adapter"} if is_kept else {"nearest"}
    allowed = {**_PLAIN, "rounding": rounding}
    return (is_kept or _is_plain_base(config)) and all(
        flags.get(name) in {None, *values} for name, values in allowed.items()
    )


def load_for_verify(flags: Mapping[str, Any]) -> None:
    """Begin to load torch's library, if the verification of an output needs it."""
    if flags["level"] == "structure":
        return
    if (
        library() is None
        or flags["forward"]
        or flags["engine"]
        or not (_is_plain_base(_read(flags["out"], "config.json")) or _has_kept_scales(flags["out"]))
    ):
        load_beside()


def load_for_inspect(flags: Mapping[str, Any]) -> None:
    """Begin to load torch's library, if a change is to be measured against a base."""
    if flags.get("base"):
        load_beside()


def _has_kept_scales(out: object) -> bool:
    """Return whether the weights of an output have the storage of its base, and its scales."""
    # Most outputs are not asked, and what is imported here delays the guess.
    from lora_merge.formats.side_files import MANIFEST_FILE

    options = _read(out, MANIFEST_FILE).get("options")
    return isinstance(options, dict) and options.get("out_storage") == "base"


def _is_plain_base(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    levels = [config, text if isinstance(text, dict) else {}]
    return "quantization_config" not in config and all(
        level.get(key) in _PLAIN_DTYPES for level in levels for key in ("dtype", "torch_dtype")
    )


def _is_plain_adapter(config: Mapping[str, Any]) -> bool:
    if not config:
        return True
    # For whole modules and stacked parameters the plan looks at a model without values.
    return config.get("peft_type", "LORA") == "LORA" and not any(
        config.get(key) for key in ("use_dora", "modules_to_save", "target_parameters")
    )


def _read(place: object, name: str) -> dict[str, Any]:
    """Return what a file of a local directory says; an empty dictionary where there is none that can be read."""
    path = Path(str(place or ""), name)
    try:
        is_there = place and path.is_file() and path.stat().st_size <= _MOST_BYTES
        found = json.loads(path.read_bytes()) if is_there else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
