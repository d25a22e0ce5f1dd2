"""Layouts: where a module's weight lies on disk. One function per layout; `LAYOUTS` is the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_merge.core.tensor import TensorRef

Layout = Callable[[str, Mapping[str, TensorRef]], str | None]
"""Parameter name, tensors by stored name → the name of the one that holds it, or None."""


def identity(parameter: str, tensors: Mapping[str, TensorRef]) -> str | None:
    """Return the parameter's own name, if a tensor is stored under it."""
    return parameter if parameter in tensors else None


LAYOUTS: Mapping[str, Layout] = {"identity": identity}


def locate(parameter: str, tensors: Mapping[str, TensorRef]) -> str | None:
    """Return the name of the tensor that holds a parameter, by the first layout that knows."""
    found = (layout(parameter, tensors) for layout in LAYOUTS.values())
    return next((name for name in found if name is not None), None)
