"""One module of a model, with its weights and PEFT's layer around it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.injection.targets import InjectionError

if TYPE_CHECKING:
    import torch

    from lora_merge.peft_rules.injection.targets import Site


_N_EXAMPLES = 8
"""Rows of an example input."""


def example_for(module: Any) -> torch.Tensor:
    """Return an input for a module: random, but always the same.

    Shapes:
        ``[8, in]``; ``[8]`` tokens of an embedding; ``[1, 8, in]`` for attention; ``[2, channels, …]`` for a convolution.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    kernel = getattr(module, "kernel_size", ())
    if isinstance(module, torch.nn.Embedding):
        return torch.randint(module.num_embeddings, (_N_EXAMPLES,), generator=generator)
    if kernel:
        # Larger than the kernel, so that it fits without padding.
        sizes = [2 * size for size in kernel]
        return torch.randn(2, module.in_channels, *sizes, generator=generator)
    if isinstance(module, torch.nn.MultiheadAttention):
        return torch.randn(1, _N_EXAMPLES, module.embed_dim, generator=generator)
    # transformers' ``Conv1D`` has no such attribute, and its weight is ``[in, out]``.
    n_in = getattr(module, "in_features", None) or module.weight.shape[0]
    return torch.randn(_N_EXAMPLES, n_in, generator=generator)


@contextlib.contextmanager
def seeing_only(tuner: Any, module: str, layer: Any) -> Iterator[None]:
    """Let a tuner see a model that consists of one layer only, so that its loops over all modules are short."""
    import torch

    *path, last = module.split(".")
    model = at = torch.nn.Module()
    for part in path:
        at.add_module(part, torch.nn.Module())
        at = at.get_submodule(part)
    at.add_module(last, layer)
    whole, tuner.model = tuner.model, model
    try:
        yield
    finally:
        tuner.model = whole


def filled(site: Site, base: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a copy of a target with the given weights, cloned.

    Raises:
        InjectionError: the weights are not exactly those of the module, by name and shape.
    """
    import torch

    module: torch.nn.Module = copy.deepcopy(site.base)
    parameters = dict(module.named_parameters())
    for name in base.keys() ^ parameters.keys():
        kind = type(module).__name__
        raise InjectionError(
            f"{site.module}.{name}", f"is not a parameter of {kind}" if name in base else "is missing"
        )
    for name, tensor in base.items():
        if tensor.shape != parameters[name].shape:
            found, expected = list(tensor.shape), list(parameters[name].shape)
            raise InjectionError(f"{site.module}.{name}", f"shape {found}, expected {expected}")
        owner, _, last = name.rpartition(".")
        setattr(
            module.get_submodule(owner),
            last,
            torch.nn.Parameter(tensor.detach().clone(), requires_grad=False),
        )
    return module


def empty(layer: Any) -> None:
    """Take every tensor out of a layer."""
    import torch

    # PEFT's hooks (OSF) and caches (SHiRA) may keep the layer itself.
    for value in vars(layer).values():
        held = value.values() if isinstance(value, dict) else ()
        if any(isinstance(item, torch.Tensor | torch.nn.Module) for item in held):
            value.clear()


def merged(layer: Any) -> Any:
    """Return the base module after PEFT has merged its layer into it."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge(safe_merge=False)
    return layer.get_base_layer()


def answer_of(module: Any, plain: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a module's output for ``x``; attention gets it as query, key and value."""
    import torch

    if isinstance(plain, torch.nn.MultiheadAttention):
        attended: torch.Tensor = module(x, x, x)[0]
        return attended
    answer: torch.Tensor = module(x)
    return answer
