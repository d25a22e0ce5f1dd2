"""Every other PEFT method: PEFT's own layer, made, filled and merged one module at a time."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lora_merge.codecs.in_memory import decoded
from lora_merge.core.facts import Facts
from lora_merge.core.report import error
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, UNIT_ROUNDOFF
from lora_merge.deltas.algebra import Unsurveyed
from lora_merge.errors import PlanError
from lora_merge.peft_rules.base_factors import PLAIN, Coded, parts_of
from lora_merge.peft_rules.injection import Injection, InjectionError
from lora_merge.peft_rules.kinds import DECOMPOSING, PREFIX, mutating_init

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.report import Issue

_FLOAT32 = "F32"

_STEADY_MARGIN = 16
"""How many times the expected error of a decomposition is allowed."""

_STEADY_SHARE = 2.0**-9
"""The part of the adapter's change by which two merges may differ: as much as factors in bfloat16 are rounded by."""

_ELSEWHERE = "merge it with PEFT on the machine that trained it, and compare the outputs"


@dataclass(frozen=True, slots=True)
class PeftLayerFacts(Facts):
    """Of one parameter of a module that PEFT's own layer merges."""

    model_config: str
    """JSON text, of the model that was trained."""

    adapter_config: str
    """JSON text."""

    digest: str
    """Of the adapter."""

    method: str
    """Its PEFT type, for messages."""

    module: str
    parameter: str
    """Of the module: what is changed."""

    shape: tuple[int, ...]
    """Of the parameter."""

    dtype: str
    """Of the parameter's values as the base stores them, a safetensors code; of a quantised one ``"F32"``."""

    changed: tuple[str, ...]
    """Every parameter of the module for which a delta is planned."""

    coded: tuple[Coded, ...] = ()
    """Those of the module's other parameters that are stored quantised; their parts are among the factors."""

    algebra: Literal["peft_layer"] = "peft_layer"

    by_peft: ClassVar[bool] = True


class PeftLayer(Unsurveyed):
    """W ← what PEFT's layer makes of W when it merges.

    The module is whole in memory, and modules take turns. The work is done in the dtype of the weight, as PEFT
    does it, or in float32 where the output has another dtype or other adapters come before or after.

    Tensors:
        ``adapter:NAME``: a tensor of the adapter, of this module or of the whole model; ``base:NAME``: another
        parameter of the module; ``part:NAME:ROLE``: a part of another one that is stored quantised.

    Reference:
        ``peft.tuners.tuners_utils.BaseTuner.merge_and_unload`` (PEFT 0.21.2), layer by layer.
    """

    facts: ClassVar[type[Facts]] = PeftLayerFacts

    def __init__(self, delta: PlacedDelta, factors: Mapping[str, torch.Tensor], stored: str) -> None:
        facts = self._facts = cast("PeftLayerFacts", delta.facts)
        # PEFT's bits need PEFT's dtype, which is the base's; they are the promise only where the output has it too.
        exact = delta.rounded and stored == facts.dtype
        self._dtype = TORCH_NAMES[stored if exact else _FLOAT32]
        self._tensors = _of(factors, "adapter:")
        self._others = _of(factors, PLAIN) | {
            name: decoded(shape, storage, {role: one.cpu() for role, one in parts_of(name, factors).items()})
            for name, shape, storage in facts.coded
        }

    def apply(self, weight: torch.Tensor, base: torch.Tensor, start: int, end: int) -> None:
        """Let PEFT merge the whole module, and take the one parameter that this delta is about.

        Raises:
            PlanError: PEFT does not merge it.
        """
        del base, start, end
        try:
            weight.copy_(self._merged(weight).view(weight.shape))
        except InjectionError as exc:
            raise PlanError([self._issue(exc)]) from exc

    def _issue(self, exc: InjectionError) -> Issue:
        """Return what PEFT refuses as an issue that names the module and the kind of adapter."""
        module, kind = self._facts.module, self._facts.method
        sentence = f"{kind}: {exc.sentence}"
        if module not in exc.subject:
            sentence += f", while {module} was merged"
        if kind not in DECOMPOSING:
            return error("injection", exc.subject, sentence)
        sentence += (
            f"; {DECOMPOSING[kind]} decomposes the base's weights when it is loaded, and the result can "
            "differ between machines"
        )
        return error("injection", exc.subject, sentence, _ELSEWHERE)

    def _merged(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, self._dtype)
        parameter = self._facts.parameter
        whole = weight.cpu().to(dtype).view(self._facts.shape)
        module = {parameter: whole} | {name: tensor.to(dtype) for name, tensor in self._others.items()}
        # What belongs to the whole model (VeRA's projections) goes in once, with the injection.
        shared = {name: tensor for name, tensor in self._tensors.items() if not name.startswith(PREFIX)}
        own = {name: tensor for name, tensor in self._tensors.items() if name.startswith(PREFIX)}
        # ``lru_cache`` holds no lock while it calls: two workers would both build the injection.
        with _BUILDING:
            facts = self._facts
            injection = _injection(_Key(facts.model_config, facts.adapter_config, facts.digest, shared))
        merged = injection.merge(self._facts.module, module, own)
        self._check_others(module, merged)
        # A decomposition may come out otherwise on another machine. A second one, with other threads and the weight
        # off by one rounding, shows by how much.
        if _decomposes(injection.config):
            with _all_threads():
                again = injection.merge(self._facts.module, _nudged(module), own)
            self._check_steady(module, merged, again)
        return merged[parameter]

    def _check_others(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
        """Raise when PEFT changed a parameter for which nothing is planned."""
        import torch

        for name in before.keys() - set(self._facts.changed):
            if not torch.equal(after[name], before[name]):
                sentence = "PEFT's layer changes it, and the plan does not"
                raise InjectionError(f"{self._facts.module}.{name}", sentence)

    def _check_steady(
        self,
        before: Mapping[str, torch.Tensor],
        merged: Mapping[str, torch.Tensor],
        again: Mapping[str, torch.Tensor],
    ) -> None:
        """Raise when a second decomposition, off by rounding alone, gives another merged weight."""
        for name in self._facts.changed:
            one, other = merged[name].float(), again[name].float()
            n = max(one.shape, default=1)
            roundoff = UNIT_ROUNDOFF[DTYPE_CODES[self._dtype]]
            off, change = float((one - other).norm()), float((one - before[name].float()).norm())
            # A singular vector of a matrix that is off by u σ₁ is off by about u σ₁ / gap. n singular values are
            # about σ₁ / n apart, which makes it n u.
            bound = (_STEADY_MARGIN * n * UNIT_ROUNDOFF[_FLOAT32] + roundoff) * float(before[name].norm())
            bound = max(bound, _STEADY_SHARE * change)
            if not off <= bound:  # negated, so that NaN is wrong
                sentence = (
                    f"the decomposition of this weight is not reproducible: with {_n_threads()} threads "
                    f"instead of 1 the merged weight differs by {off:.2g}, and rounding explains only "
                    f"{bound:.2g} (the adapter changes it by {change:.2g})"
                )
                raise InjectionError(f"{self._facts.module}.{name}", sentence)


@dataclass(frozen=True, slots=True)
class _Key:
    """What an injection depends on. Shared tensors are not compared: the digest is, in their place."""

    model_config: str
    adapter_config: str
    digest: str
    shared: Mapping[str, Any] = field(compare=False)


_BUILDING = threading.Lock()


@lru_cache(maxsize=2)
def _injection(key: _Key) -> Injection:
    """Return an injection; it is built once for all modules of an adapter."""
    return Injection(json.loads(key.model_config), json.loads(key.adapter_config), key.shared)


def _decomposes(config: Any) -> bool:
    """Return True when PEFT decomposes the base's weights as it loads an adapter of this configuration."""
    fields = {**vars(config), "peft_type": config.peft_type.value}
    again = mutating_init(fields) is not None
    return fields["peft_type"] in DECOMPOSING or again or bool(fields.get("kasa_config"))


def _n_threads() -> int:
    """Return how many threads torch has in a script of the user's; at least two, unlike the merge's one."""
    # macOS and Windows have no ``sched_getaffinity``.
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """Give torch as many threads as PEFT has in a script, for as long as the block runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_n_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nudged(module: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameters off by one rounding of float32: what another machine's arithmetic may make of them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def off(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(tensor.shape, generator=generator).mul_(2).sub_(1)
        return (tensor.float() * (1 + noise * UNIT_ROUNDOFF[_FLOAT32])).to(tensor.dtype)

    return {name: off(tensor) for name, tensor in module.items()}


def _of(factors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {role.removeprefix(prefix): factors[role].cpu() for role in factors if role.startswith(prefix)}
