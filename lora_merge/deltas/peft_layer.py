"""Every other PEFT method: PEFT's own layer, made, filled and merged one module at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.core.injection import Injection, InjectionError
from lora_merge.core.kinds import PREFIX
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.deltas.algebra import RowWise

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Reach

_FLOAT32 = "F32"


class PeftLayer(RowWise):
    """W ← what PEFT's layer makes of W when it merges.

    The module is whole in memory, and modules take turns. The work is done in the dtype of the weight, as PEFT
    does it, or in float32 where the output has another dtype or other adapters come before or after.

    Tensors:
        ``adapter:NAME``: a tensor of the adapter, of this module or of the whole model; ``base:NAME``: another
        parameter of the module.

    Options:
        model_config, adapter_config: JSON texts; digest: of the adapter; module, parameter: what is changed;
        shape, dtype: of the parameter; changed: every parameter of the module for which a delta is planned.

    Reference:
        ``peft.tuners.tuners_utils.BaseTuner.merge_and_unload`` (PEFT 0.21.2), layer by layer.
    """

    scaled: ClassVar[bool] = False

    def __init__(self, spec: DeltaSpec, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        self._options = spec.options
        exact = spec.rounded and stored == spec.options["dtype"]
        self._dtype = TORCH_NAMES[stored if exact else _FLOAT32]
        self._tensors = _of(factors, "adapter:")
        self._others = _of(factors, "base:")

    @staticmethod
    def reach(spec: DeltaSpec) -> Reach:
        """Return ``"tensor"``: some methods rotate, some decompose."""
        del spec
        return "tensor"

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Let PEFT merge the whole module, and take the one parameter."""
        import torch

        del base, start, end
        dtype: torch.dtype = getattr(torch, self._dtype)
        parameter = self._options["parameter"]
        whole = weight.cpu().to(dtype).view(self._options["shape"])
        module = {parameter: whole} | {name: tensor.to(dtype) for name, tensor in self._others.items()}
        shared = {name: tensor for name, tensor in self._tensors.items() if not name.startswith(PREFIX)}
        own = {name: tensor for name, tensor in self._tensors.items() if name.startswith(PREFIX)}
        with _BUILDING:
            injection = _injection(
                _Key(
                    self._options["model_config"],
                    self._options["adapter_config"],
                    self._options["digest"],
                    shared,
                )
            )
        merged = injection.merge(self._options["module"], module, own)
        self._check_others(module, merged)
        weight.copy_(merged[parameter].view(weight.shape))

    def _check_others(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
        """Raise when PEFT changed a parameter for which nothing is planned."""
        import torch

        for name in before.keys() - set(self._options["changed"]):
            if not torch.equal(after[name], before[name]):
                sentence = "is changed by PEFT's layer, and nothing was planned for it"
                raise InjectionError(f"{self._options['module']}.{name}", sentence)


@dataclass(frozen=True, slots=True)
class _Key:
    """What an injection depends on; the digest stands for the shared tensors."""

    model_config: str
    adapter_config: str
    digest: str
    shared: Mapping[str, Any] = field(compare=False)


_BUILDING = threading.Lock()


@lru_cache(maxsize=2)
def _injection(key: _Key) -> Injection:
    """Return an injection, built once for all modules of an adapter."""
    return Injection(json.loads(key.model_config), json.loads(key.adapter_config), key.shared)


def _of(factors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {role.removeprefix(prefix): factors[role].cpu() for role in factors if role.startswith(prefix)}
