"""PEFT's own layers, one module at a time: the merge of every kind of adapter that has no formula here.

PEFT injects the adapter into a model without weights (torch's meta device), so that all it does once for the
whole model is done: matching the targets, sizing and drawing what layers share. Only the layers themselves
are put off. Each is made, filled, merged and dropped again when its weights are at hand.
"""

# ruff: noqa: SLF001 - PEFT has no public door through which one module of a model fits

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.core.cut_off import cut_off
from lora_merge.core.kinds import PREFIX
from lora_merge.core.plain_config import plain_adapter_config
from lora_merge.core.shortage import not_for_want_of_memory
from lora_merge.core.skeleton import model_class, parse_config

if TYPE_CHECKING:
    import torch

BIAS_TYPES = frozenset({"BEFT", "GLORA", "IA3", "LN_TUNING", "ROAD"})
"""PEFT types whose merge changes the module's bias, where it has one, by themselves (PEFT 0.21.2).

``BEFT`` changes nothing else. Any type may change it when its config says so (``bias``, ``lora_bias``).
"""

_UNMERGEABLE: Mapping[str, str] = {
    "LILY": "a router mixes its factors, token by token",
    "POLY": "a router mixes its factors, task by task",
    "SHADOW": "it is a network beside the model",
    "XLORA": "a router mixes its adapters, token by token",
}
"""PEFT types with a tuner, but no merge; PEFT merges ``XLORA`` all the same, without its router."""

_ADAPTER = "default"
_SEED = 0
_PROJECTIONS = ("frod_V", "frod_s_indices", "frod_s_size")

_N_EXAMPLES = 8
"""Rows of an example input."""

_LOCK = threading.RLock()
"""Warning filters and torch's random state belong to the process, so injections take turns."""


class InjectionError(ValueError):
    """PEFT cannot inject this adapter into this model.

    Args:
        subject: the module, tensor or field at fault.
        sentence: what is wrong with it.
    """

    def __init__(self, subject: str, sentence: str) -> None:
        self.subject, self.sentence = subject, sentence
        super().__init__(f"{subject}: {sentence}")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A module of the model that the adapter changes."""

    module: str
    """Its path in the model, as transformers names it."""

    parameters: tuple[str, ...]
    """The base module's own parameters, by their names in it, in order: ``("weight", "bias")``."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """Where a layer will stand: what PEFT said when it asked for it."""

    module: str
    base: Any
    """The module it wraps, on the meta device."""

    parent: Any
    name: str
    """Its attribute in the parent."""

    options: Mapping[str, Any]


class Injection:
    """PEFT's injection of one adapter into one model, with every layer put off.

    Holds the model without weights, and what the adapter shares between its layers.

    Args:
        model_config: a ``config.json``; code that a checkpoint carries is never run.
        adapter_config: an ``adapter_config.json``. Fields that PEFT does not know are ignored, as PEFT does.
        shared: the adapter's tensors of the whole model: ``base_model.`` without ``model.`` after it.

    Raises:
        InjectionError: here and in every method, when PEFT refuses, or would go on with a random value.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        adapter_config: Mapping[str, Any],
        shared: Mapping[str, torch.Tensor],
    ) -> None:
        sites: list[_Site] = []
        self._shared = dict(shared)
        with _alone(), _translated("adapter_config.json"):
            self._class = _tuner_class(adapter_config.get("peft_type"))
            self._config = _peft_config(adapter_config)
            model = _meta_model(model_config)
            rehearsal = _rehearsal(self._class, self._config, sites, self._shared)
            self._tuner: Any = rehearsal(model, {_ADAPTER: self._config}, _ADAPTER)
            self._tuner.__class__ = self._class
            self._root = _root(self._tuner)
        self._sites = {site.module: site for site in sites}

    @property
    def config(self) -> Any:
        """Return PEFT's configuration of the adapter."""
        return self._config

    @property
    def fields(self) -> frozenset[str]:
        """Return the fields that PEFT's configuration of this type has."""
        return frozenset(field.name for field in dataclasses.fields(self._config))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Return every module that the adapter changes, in the model's order."""
        return tuple(
            Target(site.module, tuple(name for name, _ in site.base.named_parameters()))
            for site in self._sites.values()
        )

    def merge(
        self, module: str, base: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return every parameter of a module after PEFT's ``merge(safe_merge=False)``.

        The bits are those of ``PeftModel.from_pretrained(…).merge_and_unload()``; what is given stays as it is.

        Args:
            module: path of a target.
            base: all its parameters by their names in it, in the dtype of the merge.
            tensors: all the adapter's tensors of this module, by their full names.
        """
        with self._layer(module, base, tensors) as layer:
            parameters = dict(_merged(layer).named_parameters())
            return {name: parameters[name].detach().contiguous() for name in base}

    def example(self, module: str) -> torch.Tensor:
        """Return an input that a module answers to, random and always the same."""
        import torch

        base = self._site(module).base
        generator = torch.Generator().manual_seed(0)
        kernel = getattr(base, "kernel_size", ())
        if isinstance(base, torch.nn.Embedding):
            return torch.randint(base.num_embeddings, (_N_EXAMPLES,), generator=generator)
        if kernel:
            sizes = [2 * size for size in kernel]
            return torch.randn(2, base.in_channels, *sizes, generator=generator)
        if isinstance(base, torch.nn.MultiheadAttention):
            return torch.randn(1, _N_EXAMPLES, base.embed_dim, generator=generator)
        n_in = getattr(base, "in_features", None) or base.weight.shape[0]
        return torch.randn(_N_EXAMPLES, n_in, generator=generator)

    def forward(
        self,
        module: str,
        base: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the adapted, unmerged module answers to ``x``, and what it answers without the adapter.

        Args:
            module: path of a target.
            base: as for `merge`.
            tensors: as for `merge`.
            x: input of the module; attention gets it as query, key and value.
        """
        with self._layer(module, base, tensors) as layer:
            plain = _filled(self._sites[module], base)
            for name, buffer in plain.named_buffers():
                if buffer.is_meta:
                    raise InjectionError(f"{module}.{name}", "is no weight: its value is not at hand")
            return _answer(layer, plain, x), _answer(plain, plain, x)

    def rehearse(
        self, module: str, base: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Make and fill a module's layer, and drop it again: what PEFT complains of comes out.

        Args:
            module: path of a target.
            base: as for `merge`; values do not matter, but to AdaMSS, whose shapes come from clustering them.
            tensors: as for `merge`; values do not matter.
        """
        with self._layer(module, base, tensors):
            pass

    def _site(self, module: str) -> _Site:
        """Return where the layer of a target will stand."""
        if module not in self._sites:
            raise InjectionError(module, "is no target of the adapter")
        return self._sites[module]

    @contextlib.contextmanager
    def _layer(
        self, module: str, base: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[Any]:
        """Put PEFT's layer into the model, with all its values, for as long as the block runs."""
        site = self._site(module)
        with _alone(), _translated(module):
            fresh = _filled(site, base)
            stands = getattr(site.parent, site.name)
            setattr(site.parent, site.name, fresh)
            try:
                config = self._config_for(module)
                self._class._create_and_replace(
                    self._tuner,
                    config,
                    _ADAPTER,
                    fresh,
                    site.name,
                    site.parent,
                    current_key=module,
                    **site.options,
                )
                layer = getattr(site.parent, site.name)
                if layer is fresh:
                    raise InjectionError(module, f"PEFT puts no adapter on a {type(fresh).__name__}")
                if "unilora_hands" in vars(self._tuner):
                    self._tuner.unilora_hands[module].give(layer)
                self._load(site, layer, config, tensors)
                yield layer.eval()
                _empty(layer)
            finally:
                setattr(site.parent, site.name, stands)

    def _config_for(self, module: str) -> Any:
        """Return the adapter's config for one module: PEFT writes into it, and AdaLoRA lists every module."""
        config = copy.copy(self._config)
        if config.peft_type == "ADALORA" and config.rank_pattern:
            ranks = config.rank_pattern.items()
            config.rank_pattern = {name: kept for name, kept in ranks if name.startswith(f"{module}.")}
        return config

    def _load(self, site: _Site, layer: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give a layer the adapter's values, in the steps of ``PeftModel.from_pretrained``."""
        given = {**tensors, **self._shared}
        with _seeing_only(self._tuner, site.module, layer):
            self._tuner._cast_adapter_dtype(adapter_name=_ADAPTER, autocast_adapter_dtype=True)
            self._check_complete(config, given)
            state = self._class._remap_adapter_state_dict_for_load(
                model=self._root, config=config, adapter_name=_ADAPTER, state_dict=dict(given)
            )
            places = self._root.state_dict()
            for key, value in state.items():
                self._check_home(key, value, places)
            self._root.load_state_dict(state, strict=False)
            self._tuner._cast_adapter_dtype(adapter_name=_ADAPTER, autocast_adapter_dtype=True)

    def _check_home(self, key: str, value: torch.Tensor, places: Mapping[str, torch.Tensor]) -> None:
        """Raise for a tensor of the adapter that no parameter takes."""
        name = self._class._remove_adapter_name_from_key(key, _ADAPTER)
        if key not in places:
            raise InjectionError(name, f"{self._config.peft_type.value} has no place for it in this module")
        if places[key].shape != value.shape:
            found, expected = list(value.shape), list(places[key].shape)
            raise InjectionError(name, f"shape {found}, expected {expected}")

    def _check_complete(self, config: Any, given: Mapping[str, torch.Tensor]) -> None:
        """Raise for what PEFT would have saved with this adapter and is not given.

        Shared projections are saved under several names (RandLoRA); one of them is enough.
        """
        saved = self._class._get_adapter_state_dict(
            model=self._root,
            config=copy.copy(config),
            adapter_name=_ADAPTER,
            state_dict=self._root.state_dict(),
            unwanted_adapter_names=[],
        )
        storages = {
            self._class._remove_adapter_name_from_key(key, _ADAPTER): value.data_ptr()
            for key, value in saved.items()
        }
        filled = {storage for name, storage in storages.items() if name in given} - {0}
        for name, storage in storages.items():
            if name not in given and storage not in filled:
                raise InjectionError(name, "is not in the adapter; PEFT would go on with a random value")


def sort_by_module(
    names: Iterable[str], targets: Iterable[Target]
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Return the names of an adapter's tensors by the module they belong to, the shared, and the orphans.

    A tensor belongs to the deepest target that its name leads to.
    """
    modules = {target.module for target in targets}
    by_module: dict[str, list[str]] = {}
    shared: list[str] = []
    orphans: list[str] = []
    for name in names:
        if not name.startswith(PREFIX):
            (shared if name.startswith("base_model.") else orphans).append(name)
            continue
        owner = next((path for path in parents(name.removeprefix(PREFIX)) if path in modules), None)
        if owner is None:
            orphans.append(name)
        else:
            by_module.setdefault(owner, []).append(name)
    return by_module, shared, orphans


def parents(path: str) -> Iterator[str]:
    """Yield the paths above a dotted path, the deepest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Run one injection at a time, cut off, without warnings, gradients or traces in torch's random state (CPU).

    What layers draw at random is overwritten by the adapter's values, or refused.
    """
    import torch

    with _LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), cut_off():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(_SEED)
        yield


@contextlib.contextmanager
def _translated(subject: str, speaker: str = "PEFT") -> Iterator[None]:
    """Turn whatever a library raises into an `InjectionError` with its first line."""
    try:
        yield
    except InjectionError:
        raise
    except Exception as exc:
        not_for_want_of_memory(exc)
        line = next(iter(str(exc).strip().splitlines()), "")
        raise InjectionError(subject, f"{speaker} raises {type(exc).__name__}: {line}") from exc


def _tuner_class(peft_type: Any) -> Any:
    """Return PEFT's tuner of a type that can be merged."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise InjectionError("peft_type", f"{peft_type} is unknown to the installed PEFT")
    if peft_type in _UNMERGEABLE:
        raise InjectionError("peft_type", f"{peft_type} cannot be merged: {_UNMERGEABLE[peft_type]}")
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    if not issubclass(tuner_class, BaseTuner):
        raise InjectionError("peft_type", f"{peft_type} cannot be merged: it changes no weights")
    return tuner_class


def _peft_config(adapter_config: Mapping[str, Any]) -> Any:
    """Return PEFT's config of an adapter, as ``PeftConfig.from_pretrained`` makes it."""
    from peft import PeftConfig

    plain = copy.deepcopy(plain_adapter_config(adapter_config))
    config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**plain))
    config.inference_mode = True
    if getattr(config, "layer_replication", None):
        raise InjectionError("layer_replication", "PEFT would merge all copies of a layer into one weight")
    return config


def _meta_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """Return the model of a ``config.json`` without weights."""
    import torch

    model_type, names = config.get("model_type"), config.get("architectures")
    known = model_class(config)
    if known is None:
        named = names[0] if isinstance(names, list) and names else "none"
        raise InjectionError("architectures", f"{named} is unknown to the installed transformers")
    with _translated("config.json", "transformers"), torch.device("meta"):
        parsed = parse_config(config)
        if parsed is None:
            raise InjectionError("model_type", f"{model_type} is unknown to the installed transformers")
        model: torch.nn.Module = known(parsed)
    return model.eval()


def _rehearsal(
    tuner_class: Any, config: Any, sites: list[_Site], shared: Mapping[str, torch.Tensor]
) -> Callable[..., Any]:
    """Return a subclass of a tuner that notes each layer it should make in ``sites`` instead of making it."""

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
            raise InjectionError("target_parameters", f"{current_key} is a parameter, not a module")
        sites.append(_Site(current_key, base, parent, name, options))

    special = _SPECIAL.get(config.peft_type.value)
    methods = {"_create_and_replace": note}
    if special is not None:
        methods |= special(tuner_class, note, sites, shared)
    rehearsal: Callable[..., Any] = type(tuner_class.__name__, (tuner_class,), methods)
    return rehearsal


def _frod(
    _tuner_class: Any, note: Callable[..., None], _sites: list[_Site], shared: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """FRoD derives its projections from all weights of a category at once: take those it saved."""
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.frod.model import _category_from_key
    from torch.nn import ModuleDict

    def take(tuner: Any, config: Any, _name: str) -> None:
        if not config.save_projection:
            raise InjectionError(
                "save_projection", "is false, and deriving FRoD's projections anew takes all weights at once"
            )
        for part in _PROJECTIONS:
            prefix = f"base_model.{part}."
            saved = {name.removeprefix(prefix): shared[name] for name in shared if name.startswith(prefix)}
            entries = {
                kind: BufferDict({_ADAPTER: value.clone()}, persistent=True) for kind, value in saved.items()
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
    tuner_class: Any, note: Callable[..., None], _sites: list[_Site], _shared: Mapping[str, torch.Tensor]
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
    _tuner_class: Any, _note: Callable[..., None], sites: list[_Site], _shared: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """UniLoRA deals one shuffled deck of indices to all layers: deal it now, and keep each layer's hand."""

    def hands(tuner: Any) -> Iterator[_Hand]:
        config = tuner.peft_config[_ADAPTER]
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
    """Stands where a layer of UniLoRA will be while PEFT deals the indices.

    Shapes:
        A: ``[r, in]``; B: ``[out, r]``.
    """

    def __init__(self, rank: int, base: torch.nn.Module) -> None:
        import torch
        from peft.tuners.tuners_utils import _get_in_out_features

        n_in, n_out = _get_in_out_features(base)
        self.unilora_indices_A = {_ADAPTER: torch.empty(rank, n_in, device="meta")}
        self.unilora_indices_B = {_ADAPTER: torch.empty(n_out, rank, device="meta")}

    def update_scaling(self, _name: str, scales_a: torch.Tensor, scales_b: torch.Tensor) -> None:
        """Keep the scales that PEFT derives from the indices."""
        self._scales = scales_a, scales_b

    def give(self, layer: Any) -> None:
        """Hand everything over to the layer."""
        layer.unilora_indices_A[_ADAPTER] = self.unilora_indices_A[_ADAPTER].clone()
        layer.unilora_indices_B[_ADAPTER] = self.unilora_indices_B[_ADAPTER].clone()
        layer.update_scaling(_ADAPTER, *(scales.clone() for scales in self._scales))


def _root(tuner: Any) -> Any:
    """Return what stands for the ``PeftModel`` around a tuner: names begin with ``base_model.``."""
    import torch

    class Root(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base_model"), name)

    root = Root()
    root.add_module("base_model", tuner)
    return root


@contextlib.contextmanager
def _seeing_only(tuner: Any, module: str, layer: Any) -> Iterator[None]:
    """Let a tuner see a model that is nothing but one layer, so that its loops end soon."""
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


def _filled(site: _Site, base: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a copy of a target with its weights, cloned."""
    import torch

    module: torch.nn.Module = copy.deepcopy(site.base)
    parameters = dict(module.named_parameters())
    for name in base.keys() ^ parameters.keys():
        kind = type(module).__name__
        raise InjectionError(
            f"{site.module}.{name}", f"is no parameter of {kind}" if name in base else "is missing"
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


def _empty(layer: Any) -> None:
    """Take every tensor out of a layer: PEFT's hooks (OSF) and caches (SHiRA) may keep the rest of it."""
    import torch

    for value in vars(layer).values():
        held = value.values() if isinstance(value, dict) else ()
        if any(isinstance(item, torch.Tensor | torch.nn.Module) for item in held):
            value.clear()


def _merged(layer: Any) -> Any:
    """Return the module that PEFT's layer merges into."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge(safe_merge=False)
    return layer.get_base_layer()


def _answer(module: Any, plain: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a module, adapted or not, whose plain form is ``plain``."""
    import torch

    if isinstance(plain, torch.nn.MultiheadAttention):
        attended: torch.Tensor = module(x, x, x)[0]
        return attended
    answer: torch.Tensor = module(x)
    return answer
