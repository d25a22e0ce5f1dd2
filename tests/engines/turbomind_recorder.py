"""Stands where TurboMind's compiled half would be, which needs a GPU: keeps the parameters that it is handed."""

from __future__ import annotations

import copy
import enum
import math
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

N_BITS = {
    "FP32": 32, "FP16": 16, "BF16": 16, "INT64": 64, "INT32": 32, "INT8": 8, "UINT8": 8,
    "FP8_E4M3": 8, "UINT4": 4, "FP4_E2M1": 4,
}  # fmt: skip
"""Of a number. TurboMind's Python side names other types, and hands none of them over."""

NAMED = ("INVALID", "UINT32", "GENERIC_FLOAT")

DataType = enum.IntEnum("DataType", {f"TYPE_{name}": n for n, name in enumerate((*N_BITS, *NAMED))})
NormType = enum.IntEnum("NormType", {"RMS_NORM": 0, "LAYER_NORM": 1})
ActivationType = enum.IntEnum("ActivationType", {"kSilu": 0, "kSiluGptOss": 1})


class Settings:
    """Has any attribute: what has not been set is settings again."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Settings()
        object.__setattr__(self, name, found)
        return found

    def clone(self) -> Settings:
        return copy.deepcopy(self)


class Slot:
    """The place of one parameter."""

    def __init__(self, parameters: dict[str, torch.Tensor], name: str) -> None:
        self.parameters, self.name = parameters, name

    def alloc(self, shape: list[int], dtype: Any) -> Slot:
        self.type = dtype
        self.byte_size = math.prod(shape) * N_BITS[dtype.name.removeprefix("TYPE_")] // 8
        return self

    def copy_from(self, tensor: torch.Tensor, *_: Any) -> None:
        self.parameters[self.name] = tensor.detach().clone()


class Module:
    """A module: its parameters, and the modules in it."""

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings
        self.parameters: dict[str, torch.Tensor] = {}
        self.children: dict[str, Module] = {}

    def param(self, name: str) -> Slot:
        return Slot(self.parameters, name)

    def add_child_raw(self, name: str, child: Module) -> None:
        self.children[name] = child

    def set_plan(self, *_: Any) -> None:
        pass

    def prepare(self, *_: Any) -> None:
        pass

    def walk(self, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter by its path."""
        for name, tensor in self.parameters.items():
            yield f"{prefix}{name}", tensor
        for name, child in self.children.items():
            yield from child.walk(f"{prefix}{name}.")


def module() -> types.ModuleType:
    """Return what stands where the compiled module would; a name that it lacks is a class of settings."""
    found = types.ModuleType("lmdeploy.turbomind._turbomind")
    found.__dict__.update(
        DataType=DataType,
        NormType=NormType,
        ActivationType=ActivationType,
        create_module=Module,
        LinearWeight=Module,
        multimodal=Settings(),
        LinkLinearExperts=lambda *_, **__: None,
    )

    def missing(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        found.__dict__[name] = type(name, (Settings,), {})
        return found.__dict__[name]

    found.__dict__["__getattr__"] = missing
    return found
