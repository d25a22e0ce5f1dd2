"""The reference: what base and adapter compute without merging, and how much rounding may change it.

The reference is PEFT's forward pass, if PEFT loads every tensor of the adapter as it was meant. Otherwise (it drops
names of other releases of transformers, with a warning at most) it is the model with the merged weights before
rounding to the output's dtype.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import DTYPE_CODES, UNIT_ROUNDOFF
from lora_merge.modeling.conversion import Conversion
from lora_merge.peft_rules.bypassed import is_bypassed
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.verification.engines.hf import Loader, answer, scores
from lora_merge.verification.engines.isolated_modules import Alone, Listener, modules_of
from lora_merge.verification.engines.peft_reference import (
    Ingredients,
    adapted_modules,
    obstacle,
    with_adapter,
)
from lora_merge.verification.forward_comparison import LEAST_TOLERANCE, NOISE_MARGIN, Answer, Prompt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

PEFT = "PEFT, unmerged"
UNROUNDED = "the merged weights before rounding"

_N_REHEARSALS = 2
_OTHER_SEED = 1


@dataclass(frozen=True, slots=True)
class Reference:
    """The answers of base and adapter, and how exactly they can be compared."""

    how: str
    """`PEFT` or `UNROUNDED`."""

    why: str
    """Why it is not PEFT; otherwise empty."""

    answers: tuple[Answer, ...]
    tolerance: float
    """The largest difference of two scores that rounding explains."""

    alone: tuple[Alone, ...]
    """Modules that no prompt reached, run alone."""

    silent: tuple[str, ...]
    """Paths of modules that no prompt reached and that cannot be run alone."""

    unsteady: float = 0.0
    """Largest difference between its own answers to a prompt, computed twice with the same seed; 0 if arithmetic explains
    it. Nothing can be compared with a reference that changes each time."""

    draws: bool = False
    """True if its answers depend on the seed."""


def refer(
    made_of: Ingredients, prompts: tuple[Prompt, ...], n_tokens: int, dtype: str, *, trust_remote_code: bool
) -> Reference:
    """Return the answers of base and adapter to some prompts.

    Raises:
        UnsupportedError: transformers has no class for the model.
    """
    base = Loader(made_of.base_config, made_of.base, dtype, trust_remote_code=trust_remote_code)
    why = obstacle(made_of)
    if not why:
        # Never a library's quantised layers: the adapter was trained on the values that they stand for.
        loaded = (
            base.tensors(made_of.decoded()) if made_of.decoded is not None else base.directory(made_of.base)
        )
        with loaded as (model, _):
            adapted, why = with_adapter(model, made_of)
            if adapted is not None:
                tree = adapted.get_base_model()
                touched = {**modules_of(_parameters(made_of), tree), **adapted_modules(tree)}
                return _measured(made_of, adapted, touched, prompts, n_tokens, dtype)
    merged = Loader(made_of.merged_config, made_of.base, dtype, trust_remote_code=trust_remote_code)
    with merged.tensors(made_of.unrounded()) as (model, _):
        touched = modules_of(_parameters(made_of), model)
        found = _measured(made_of, model, touched, prompts, n_tokens, dtype)
        return replace(found, how=UNROUNDED, why=why)


def _parameters(made_of: Ingredients) -> Collection[str]:
    """Return the names in transformers' model of the stored tensors that changed."""
    conversion = Conversion.of(made_of.merged_config)
    if conversion is None:
        return made_of.touched
    return {conversion.canonical(name)[0] for name in made_of.touched}


def _measured(
    made_of: Ingredients,
    model: Any,
    touched: dict[str, Any],
    prompts: tuple[Prompt, ...],
    n_tokens: int,
    dtype: str,
) -> Reference:
    """Return a model's answers, and how much of a difference rounding may make."""
    touched = {path: module for path, module in touched.items() if not is_bypassed(path, made_of.base_config)}
    with Listener(touched) as listener:
        answers = tuple(found for prompt in prompts for found in _answers(model, prompt, n_tokens))
    noise = made_of.roundoff + _arithmetic(dtype, made_of.longest)
    least = LEAST_TOLERANCE * _largest(answers)
    unsteady = _apart(model, answers)
    # Negated, so that NaN counts as unsteady. The measurements below would then mean nothing.
    if not unsteady <= least:
        return Reference(PEFT, "", answers, least, (), (), unsteady)
    tolerance = max(least, NOISE_MARGIN * _rehearsed(model, touched, answers, noise))
    unreached = {path: module for path, module in touched.items() if path not in listener.heard}
    asked = {path: Alone.ask(path, module, noise) for path, module in unreached.items()}
    alone = tuple(found for found in asked.values() if found is not None)
    silent = tuple(path for path, found in asked.items() if found is None)
    # Another seed changes the answers only if the model draws random numbers.
    draws = not _apart(model, answers, seed=_OTHER_SEED) <= least
    return Reference(PEFT, "", answers, tolerance, alone, silent, draws=draws)


def _apart(model: Any, answers: tuple[Answer, ...], **seed: int) -> float:
    """Return the largest difference between a model's answers and its earlier ones; optionally with another seed."""
    return max((_difference(model, one, **seed) for one in answers), default=0.0)


def _difference(model: Any, before: Answer, **seed: int) -> float:
    """Return the largest difference of two scores; infinity for other shapes, NaN if a score is NaN."""
    again = scores(model, before.prompt, before.tokens[:-1], **seed)
    if again.shape != before.scores.shape:
        return math.inf
    return float(abs(again - before.scores).max()) if again.size else 0.0


def _answers(model: Any, prompt: Prompt, n_tokens: int) -> Iterator[Answer]:
    """Yield a model's answer to a prompt; nothing if random input does not suit it."""
    try:
        yield answer(model, prompt, n_tokens)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as exc:
        raise_if_out_of_memory(exc)
        # Without tokens the input was a guess. Modules are then run alone.
        if prompt.ids:
            raise


def _arithmetic(dtype: str, longest: int) -> float:
    """Return the relative error of the arithmetic in a dtype, for sums of up to ``longest`` terms."""
    code = DTYPE_CODES[dtype]
    # A sum of n float32 terms is off by about √n roundings. In a half dtype a sum is rounded once.
    return UNIT_ROUNDOFF[code] * (math.sqrt(longest) if code == "F32" else 1.0)


def _largest(answers: tuple[Answer, ...]) -> float:
    return max((float(abs(found.scores).max()) for found in answers), default=0.0)


def _rehearsed(model: Any, touched: Mapping[str, Any], answers: tuple[Answer, ...], noise: float) -> float:
    """Return the largest difference that noise of the size of rounding makes in the outputs of merged modules."""
    largest = 0.0
    for n in range(_N_REHEARSALS):
        # A rounding error is anywhere between -u and u of a value: a standard deviation of at most u/√3. So
        # is the error of a matrix's output, relative to that output.
        with _noisy(touched.values(), noise / math.sqrt(3), seed=n):
            for one in answers:
                largest = max(largest, _difference(model, one))
    return largest


@contextlib.contextmanager
def _noisy(modules: Collection[Any], noise: float, seed: int) -> Iterator[None]:
    """Add noise to the outputs of some modules inside the context, relative to the size of each output."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: Any, _inputs: Any, output: Any) -> Any:
        return tuple(map(off, output)) if isinstance(output, tuple) else off(output)

    def off(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        random = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        size = value.float().square().mean(-1, keepdim=True).sqrt().to(value.dtype)
        return value + noise * size * random

    handles = [module.register_forward_hook(disturb) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
