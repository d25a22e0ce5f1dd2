"""PEFT's injection with every layer put off: work on the whole model is done, and where layers go is noted."""

# ruff: noqa: SLF001 - PEFT has no public door through which one module of a model fits

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.injection.targets import InjectionError, Site

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
_PROJECTIONS = ("frod_V", "frod_s_indices", "frod_s_size")


def rehearsal_of(
    tuner_class: Any, config: Any, sites: list[Site], shared: Mapping[str, torch.Tensor]
) -> Callable[..., Any]:
    """Return a subclass of a tuner that appends each layer it should make to ``sites`` instead of making it.

    Args:
        tuner_class: PEFT's, for the type of the adapter.
        config: PEFT's configuration of the adapter.
        sites: where layers go is added here.
        shared: the adapter's tensors of the whole model.

    Raises:
        InjectionError: from the tuner, for a target that is a parameter, or for projections that are not in the
            adapter.
    """

    def note(
        _tuner: Any,
        _config: Any,
        _name: str,
        base: Any,
        name: str,
        parent: Any,
        current_key: str,
        **options: Any,
    ) -> None:
        if options.get("parameter_name"):
            # PEFT wraps a parameter by its module and its name; here a site is a module.
            raise InjectionError("target_parameters", f"{current_key} is a parameter, not a module")
        sites.append(Site(current_key, base, parent, name, options))

    # A few types compute something from all targets at once, which must happen before the first layer.
    special = _SPECIAL.get(config.peft_type.value)
    methods = {"_create_and_replace": note}
    if special is not None:
        methods |= special(tuner_class, note, sites, shared)
    rehearsal: Callable[..., Any] = type(tuner_class.__name__, (tuner_class,), methods)
    return rehearsal


def _frod(
    _tuner_class: Any, note: Callable[..., None], _sites: list[Site], shared: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """FRoD derives its projections from all weights of a category at once: take those it saved."""
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.frod.model import _category_from_key
    from torch.nn import ModuleDict

    def take(tuner: Any, config: Any, _name: str) -> None:
        if not config.save_projection:
            raise InjectionError(
                "save_projection",
                "is false, and computing FRoD's projections again needs all weights at once",
            )
        for part in _PROJECTIONS:
            prefix = f"base_model.{part}."
            saved = {name.removeprefix(prefix): shared[name] for name in shared if name.startswith(prefix)}
            entries = {
                kind: BufferDict({ADAPTER: value.clone()}, persistent=True) for kind, value in saved.items()
            }
            setattr(tuner, part, ModuleDict(entries))

    def create(*arguments: Any, current_key: str) -> None:
        for part in _PROJECTIONS:
            name = f"base_model.{part}.{_category_from_key(current_key)}"
            if name not in shared:
                raise InjectionError(name, f"is not in the adapter; {current_key} needs it")
        note(*arguments, current_key=current_key)

    return {"_init_frod_projections": take, "_create_and_replace": create}


def _tinylora(
    tuner_class: Any, note: Callable[..., None], _sites: list[Site], _shared: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """TinyLoRA makes the vector of a group with the group's first layer: make them all now."""

    def create(*arguments: Any, current_key: str) -> None:
        note(*arguments, current_key=current_key)
        tuner_class._create_and_replace(*arguments, current_key=current_key)

    def same(_config: Any, _vectors: Any, _group: str, _name: str, target: Any, **_options: Any) -> Any:
        return target

    return {
        "_create_and_replace": create,
        "_create_new_module": staticmethod(same),
        "_replace_module": lambda *_arguments: None,
    }


def _unilora(
    _tuner_class: Any, _note: Callable[..., None], sites: list[Site], _shared: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """UniLoRA deals shuffled indices to all layers at once: deal them now, and keep each layer's share."""

    def hands(tuner: Any) -> Iterator[_Hand]:
        config = tuner.peft_config[ADAPTER]
        tuner.unilora_hands = {site.module: _Hand(config.r, site.base) for site in sites}
        return iter(tuner.unilora_hands.values())

    return {"_iter_unilora_layers": hands}


_SPECIAL: Mapping[str, Callable[..., dict[str, Any]]] = {
    "FROD": _frod,
    "TINYLORA": _tinylora,
    "UNILORA": _unilora,
}
"""PEFT types that need all targets at once, and what their rehearsal does for it."""


class _Hand:
    """Takes the indices that PEFT deals to a layer of UniLoRA, until that layer is made.

    Shapes:
        A: ``[r, in]``; B: ``[out, r]``.
    """

    def __init__(self, rank: int, base: torch.nn.Module) -> None:
        import torch
        from peft.tuners.tuners_utils import _get_in_out_features

        n_in, n_out = _get_in_out_features(base)
        self.unilora_indices_A = {ADAPTER: torch.empty(rank, n_in, device="meta")}
        self.unilora_indices_B = {ADAPTER: torch.empty(n_out, rank, device="meta")}

    def update_scaling(self, _name: str, scales_a: torch.Tensor, scales_b: torch.Tensor) -> None:
        """Keep the scales that PEFT derives from the indices."""
        self._scales = scales_a, scales_b

    def give(self, layer: Any) -> None:
        """Copy indices and scales into the layer."""
        layer.unilora_indices_A[ADAPTER] = self.unilora_indices_A[ADAPTER].clone()
        layer.unilora_indices_B[ADAPTER] = self.unilora_indices_B[ADAPTER].clone()
        layer.update_scaling(ADAPTER, *(scales.clone() for scales in self._scales))


def root_of(tuner: Any) -> Any:
    """Return a module that takes the place of the ``PeftModel`` around a tuner: its names begin with ``base_model.``."""
    import torch

    class Root(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                # As ``PeftModel`` does: what it lacks, the tuner may have.
                return getattr(super().__getattr__("base_model"), name)

    root = Root()
    root.add_module("base_model", tuner)
    return root
