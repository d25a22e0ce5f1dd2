"""An adapter in a model without weights, by PEFT itself: each layer is made, merged and dropped when asked for."""

# ruff: noqa: SLF001 - PEFT has no public door through which one module of a model fits

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.injection.ingredients import meta_model, peft_config, tuner_class_of
from lora_merge.peft_rules.injection.layer import answer_of, empty, example_for, filled, merged, seeing_only
from lora_merge.peft_rules.injection.rehearsal import ADAPTER, rehearsal_of, root_of
from lora_merge.peft_rules.injection.targets import InjectionError, Site, Target
from lora_merge.peft_rules.injection.turns import one_at_a_time, translated

if TYPE_CHECKING:
    import torch


class Injection:
    """PEFT's injection of one adapter into one model, with every layer put off.

    Holds the model without weights, and what the adapter shares between its layers.

    Args:
        model_config: a ``config.json``; code that a checkpoint carries is never run.
        adapter_config: an ``adapter_config.json``. Fields that PEFT does not know are ignored, as PEFT does.
        shared: the adapter's tensors of the whole model: ``base_model.`` without ``model.`` after it.

    Raises:
        InjectionError: here and in every method, when PEFT refuses, or would use a random value.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        adapter_config: Mapping[str, Any],
        shared: Mapping[str, torch.Tensor],
    ) -> None:
        sites: list[Site] = []
        self._shared = dict(shared)
        with one_at_a_time(), translated("adapter_config.json"):
            self._class = tuner_class_of(adapter_config.get("peft_type"))
            self._config = peft_config(adapter_config)
            model = meta_model(model_config)
            rehearsal = rehearsal_of(self._class, self._config, sites, self._shared)
            self._tuner: Any = rehearsal(model, {ADAPTER: self._config}, ADAPTER)
            # From now on layers are really made, by PEFT's own method.
            self._tuner.__class__ = self._class
            self._root = root_of(self._tuner)
        self._sites = {site.module: site for site in sites}

    @property
    def config(self) -> Any:
        """PEFT's configuration object of the adapter."""
        return self._config

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that PEFT's configuration of this type has."""
        return frozenset(field.name for field in dataclasses.fields(self._config))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every module that the adapter changes, in the model's order."""
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
            parameters = dict(merged(layer).named_parameters())
            return {name: parameters[name].detach().contiguous() for name in base}

    def example(self, module: str) -> torch.Tensor:
        """Return an input for a module: random, but always the same. See `example_for` for shapes."""
        return example_for(self._site(module).base)

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
            plain = filled(self._sites[module], base)
            for name, buffer in plain.named_buffers():
                if buffer.is_meta:
                    raise InjectionError(f"{module}.{name}", "its value is not in the base's files")
            return answer_of(layer, plain, x), answer_of(plain, plain, x)

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

    def _site(self, module: str) -> Site:
        """Return where the layer of a target will be put.

        Raises:
            InjectionError: the module is not a target.
        """
        if module not in self._sites:
            raise InjectionError(module, "is not a target of the adapter")
        return self._sites[module]

    @contextlib.contextmanager
    def _layer(
        self, module: str, base: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[Any]:
        """Put PEFT's layer into the model, with all its values, for as long as the block runs.

        Raises:
            InjectionError: PEFT refuses, or a tensor has no place or is missing.
        """
        site = self._site(module)
        with one_at_a_time(), translated(module):
            fresh = filled(site, base)
            stands = getattr(site.parent, site.name)
            setattr(site.parent, site.name, fresh)
            try:
                config = self._config_for(module)
                self._class._create_and_replace(
                    self._tuner,
                    config,
                    ADAPTER,
                    fresh,
                    site.name,
                    site.parent,
                    current_key=module,
                    **site.options,
                )
                layer = getattr(site.parent, site.name)
                # PEFT left the module as it was, without an error.
                if layer is fresh:
                    raise InjectionError(module, f"PEFT cannot put this adapter on a {type(fresh).__name__}")
                if "unilora_hands" in vars(self._tuner):
                    self._tuner.unilora_hands[module].give(layer)
                self._load(site, layer, config, tensors)
                yield layer.eval()
                # Hooks and caches of PEFT may keep the layer alive; without its tensors that costs nothing.
                empty(layer)
            finally:
                setattr(site.parent, site.name, stands)

    def _config_for(self, module: str) -> Any:
        """Return the adapter's config for one module. It is a copy, since PEFT writes into it."""
        config = copy.copy(self._config)
        # AdaLoRA's table lists every module, and the model that PEFT sees here has one.
        if config.peft_type == "ADALORA" and config.rank_pattern:
            ranks = config.rank_pattern.items()
            config.rank_pattern = {name: kept for name, kept in ranks if name.startswith(f"{module}.")}
        return config

    def _load(self, site: Site, layer: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give a layer the adapter's values, in the steps of ``PeftModel.from_pretrained``."""
        given = {**tensors, **self._shared}
        with seeing_only(self._tuner, site.module, layer):
            # PEFT casts a float16 or bfloat16 adapter to float32 twice, before its values are loaded and after.
            self._tuner._cast_adapter_dtype(adapter_name=ADAPTER, autocast_adapter_dtype=True)
            self._check_complete(config, given)
            state = self._class._remap_adapter_state_dict_for_load(
                model=self._root, config=config, adapter_name=ADAPTER, state_dict=dict(given)
            )
            places = self._root.state_dict()
            for key, value in state.items():
                self._check_home(key, value, places)
            self._root.load_state_dict(state, strict=False)
            self._tuner._cast_adapter_dtype(adapter_name=ADAPTER, autocast_adapter_dtype=True)

    def _check_home(self, key: str, value: torch.Tensor, places: Mapping[str, torch.Tensor]) -> None:
        """Raise `InjectionError` for a tensor of the adapter that no parameter takes, or none of its shape."""
        name = self._class._remove_adapter_name_from_key(key, ADAPTER)
        if key not in places:
            raise InjectionError(name, f"{self._config.peft_type.value} does not use it in this module")
        if places[key].shape != value.shape:
            found, expected = list(value.shape), list(places[key].shape)
            raise InjectionError(name, f"shape {found}, expected {expected}")

    def _check_complete(self, config: Any, given: Mapping[str, torch.Tensor]) -> None:
        """Raise `InjectionError` for a tensor that PEFT would have saved with this adapter and that is not given."""
        saved = self._class._get_adapter_state_dict(
            model=self._root,
            config=copy.copy(config),
            adapter_name=ADAPTER,
            state_dict=self._root.state_dict(),
            unwanted_adapter_names=[],
        )
        storages = {
            self._class._remove_adapter_name_from_key(key, ADAPTER): value.data_ptr()
            for key, value in saved.items()
        }
        # A projection that layers share is saved under several names (RandLoRA); one of them is enough. A tensor
        # without storage has the address 0.
        filled = {storage for name, storage in storages.items() if name in given} - {0}
        for name, storage in storages.items():
            if name not in given and storage not in filled:
                raise InjectionError(name, "is not in the adapter; PEFT would use a random value")
