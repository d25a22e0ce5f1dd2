"""Layouts: where a module's weight lies on disk. One function per layout; `LAYOUTS` is the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_merge.core.tensor import TensorRef

Layout = Callable[[str, Mapping[str, TensorRef]], TensorRef | None]
"""Parameter name, tensors by stored name → the tensor that holds it, or None."""


def identity(parameter: str, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    """Return the tensor that is stored under the parameter's own name."""
    return tensors.get(parameter)


LAYOUTS: Mapping[str, Layout] = {"identity": identity}


def locate(parameter: str, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    """Return the tensor that holds a parameter, by the first layout that knows."""
    found = (layout(parameter, tensors) for layout in LAYOUTS.values())
    return next((ref for ref in found if ref is not None), None)
