"""Runs modules that no prompt reaches (a tower without an image) with random input, each by itself."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

_N_ROWS = 4
_ROUNDINGS = 8.0
"""Factor on the noise of one rounding: weight, input and sum are all rounded."""


class Listener:
    """A context that records which of some modules are run.

    Args:
        modules: path → module.
    """

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._modules = modules
        self.heard: set[str] = set()
        """Paths of the modules that were run."""

        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Register hooks on all modules."""
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(lambda *_, path=path: self.heard.add(path)))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Alone:
    """The output of one module of base and adapter for random input."""

    path: str
    output: Any = field(repr=False)
    noise: float
    """Unit roundoff of the merged weight, plus that of the arithmetic."""

    @classmethod
    def ask(cls, path: str, module: Any, noise: float) -> Alone | None:
        """Return a module's output; None if its input is not known."""
        output = _output(path, module)
        return None if output is None else cls(path, output, noise)

    def difference(self, module: Any) -> tuple[float, float]:
        """Return how far the merged module's output is off, and how much rounding explains; both as norms."""
        output = _output(self.path, module)
        if output is None or output.shape != self.output.shape:
            return float("inf"), 0.0
        return float((output - self.output).norm()), _ROUNDINGS * self.noise * float(self.output.norm())


def modules_of(parameters: Collection[str], model: Any) -> dict[str, Any]:
    """Return path → module for the modules of a model that own some parameters."""
    modules = dict(model.named_modules())
    paths = {parameter.rpartition(".")[0] for parameter in parameters}
    return {path: modules[path] for path in sorted(paths & modules.keys())}


def _output(path: str, module: Any) -> torch.Tensor | None:
    """Return a module's output for random input that depends on its path alone; None if its input is not known."""
    import torch

    # A checksum, since Python's own hash of a text differs in every process.
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    plain = module
    # PEFT wraps the original layer, which tells the sizes of the input.
    while hasattr(plain, "base_layer"):
        plain = plain.base_layer
    if isinstance(plain, torch.nn.Embedding):
        given = torch.randint(plain.num_embeddings, (_N_ROWS,), generator=generator)
    elif isinstance(plain, torch.nn.Linear):
        given = torch.randn(_N_ROWS, plain.in_features, generator=generator)
    elif isinstance(plain, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        # Twice the kernel, so that it has positions to slide over.
        sizes = [2 * size for size in plain.kernel_size]
        given = torch.randn(1, plain.in_channels, *sizes, generator=generator)
    else:
        return None
    device = weight.device if weight.device.type != "meta" else torch.device("cpu")
    given = given.to(device)
    if given.is_floating_point():
        given = given.to(weight.dtype)
    with torch.no_grad():
        found: torch.Tensor = module(given)
    return found.detach().float().cpu()
