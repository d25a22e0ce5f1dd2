"""The module tree of a model that transformers knows, without weights: classes, output embedding, ties.

Most plans never need it: names and shapes on disk decide. It is built, on torch's meta device, only where
they cannot: a square weight that may be a ``Conv1D``, ``"all-linear"``, a targeted module without tensors. Of the most common families it
is written down (`lora_merge.modeling.dense_families`).
Code that a checkpoint carries is never run, and nothing that it names is fetched.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.modeling.counts import excess_of
from lora_merge.modeling.cut_off import cut_off
from lora_merge.modeling.dense_families import modules_of
from lora_merge.modeling.plain_config import FetchError, plain_config
from lora_merge.runtime.packages import require
from lora_merge.runtime.shortage import raise_if_out_of_memory

CONV1D_MODEL_TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "clvp_encoder"}
)
"""Families of transformers 5.23 with ``Conv1D`` layers, whose weights are stored ``[in, out]``."""

SHARING_MODEL_TYPES = frozenset(
    {
        "bark",
        "csm",
        "d_fine",
        "dab-detr",
        "deformable_detr",
        "deimv2",
        "diffusion_gemma",
        "flava",
        "granite_speech5_ctc",
        "grounding-dino",
        "idefics",
        "luke",
        "mm-grounding-dino",
        "neomme",
        "pe_audio_video",
        "pp_doclayout_v3",
        "qwen3_omni_moe",
        "rt_detr_v2",
        "sam",
        "sam_hq",
        "t5gemma2",
        "udop",
        "zamba",
        "zamba2",
    }
)
"""Families that use one stored weight in several modules, beyond input and output embeddings: those whose
``_tied_weights_keys`` say so (transformers 5.23)."""

TASK_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""PEFT's task types with their own head, and transformers' tables of the classes that have it (5.23)."""

_LINEAR = frozenset({"Linear", "Conv1D"})
_ADAPTABLE = _LINEAR | {"Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention"}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a model is made of."""

    classes: Mapping[str, str]
    """Module path → class name; a subclass of ``nn.Linear`` says ``Linear``."""

    parameters: Mapping[str, tuple[str, ...]]
    """Module path → its own parameters, in the order of their registration."""

    input_embedding: str | None
    """Path of the input embedding (``model.embed_tokens``), if the model has one."""

    output_embedding: str | None
    """Path of the output embedding (``lm_head``), if the model has one."""

    transposed: frozenset[str]
    """Modules whose stacked experts are ``[experts, in, out]``."""

    tied: Mapping[str, str]
    """Parameter → the parameter whose storage it shares."""

    def ends(self) -> dict[str, str]:
        """Return parameter → the other end of its tie, for either end."""
        return {**self.tied, **{source: end for end, source in self.tied.items()}}

    def is_linear(self, module: str) -> bool:
        """Return True for a linear layer, ``Conv1D`` included; False for a path that the model does not have."""
        return self.classes.get(module) in _LINEAR

    def is_adaptable(self, module: str) -> bool:
        """Return True for a layer that PEFT's LoRA can adapt."""
        return self.classes.get(module) in _ADAPTABLE

    def all_linear(self) -> frozenset[str]:
        """Return the modules that PEFT's ``"all-linear"`` means.

        Reference:
            ``peft.tuners.tuners_utils._maybe_include_all_linear_layers`` (PEFT 0.21.2).
        """
        linear = {module for module in self.classes if self.is_linear(module)}
        # PEFT leaves the output embedding out.
        return frozenset(linear - {self.output_embedding})


def may_hold_conv1d(config: Mapping[str, Any]) -> bool:
    """Return True when a family in the config, at any level, has ``Conv1D`` layers."""
    return any(level.get("model_type") in CONV1D_MODEL_TYPES for _, level in config_levels(config))


def may_share(config: Mapping[str, Any]) -> bool:
    """Return True when a family in the config, at any level, uses one stored weight in several modules."""
    return any(level.get("model_type") in SHARING_MODEL_TYPES for _, level in config_levels(config))


def build_skeleton(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton of a ``config.json``, or None when transformers has no class for it.

    Imports transformers (seconds), but for the most common families; allocates no weights.
    """
    known = None if excess_of(config) else _known(config)
    if known is not None:
        return known
    model = meta_model(config)
    return None if model is None else _describe(model)


def _known(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton of a model that `lora_merge.modeling.dense_families` knows."""
    modules, is_tied = modules_of(config), config.get("tie_word_embeddings")
    # A configuration that leaves it out means the default of its class.
    if modules is None or not isinstance(is_tied, bool):
        return None
    embedding, head = "model.embed_tokens", "lm_head"
    return Skeleton(
        classes={path: kind for path, (kind, _) in modules.items()},
        parameters={path: own for path, (_, own) in modules.items()},
        input_embedding=embedding,
        output_embedding=head,
        transposed=frozenset(),
        tied={f"{head}.weight": f"{embedding}.weight"} if is_tied else {},
    )


def need_transformers(config: Mapping[str, Any]) -> Any:
    """Return the module transformers, which is to tell how the model of a ``config.json`` is built.

    Raises:
        PackageError: it cannot be used here.
    """
    family = config.get("model_type")
    named = f"a {family}" if isinstance(family, str) and family else "this"
    return require("transformers", f"looking up the modules of {named} model")


def parse_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' own form of what is data in a ``config.json``, or None when it does not know the model type.

    Raises:
        FetchError: what the model is made of would have to be fetched.
        PackageError: transformers cannot be used here.

    Reference:
        ``transformers.AutoConfig``, whose table of model types it asks (transformers 5.23).
    """
    need_transformers(config)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    # A configuration with absurd counts is unknown: its class might build a module for each.
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or excess_of(config):
        return None
    with cut_off():
        return CONFIG_MAPPING[model_type].from_dict(_with_floats(plain_config(config)))


def _with_floats(value: Any) -> Any:
    """Return a JSON value with ``{"__float__": "Infinity"}`` decoded.

    Reference:
        ``transformers.PreTrainedConfig._decode_special_floats`` (transformers 5.23).
    """
    match value:
        case {"__float__": str(text)} if len(value) == 1:
            return float(text)
        case dict():
            return {key: _with_floats(item) for key, item in value.items()}
        case list():
            return [_with_floats(item) for item in value]
    return value


def derived_lists(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, list[Any]]:
    """Return the lists of a config under some keys, those included that transformers derives from other fields."""
    found = dict(config)
    try:
        parsed = parse_config(config)
    except FetchError:
        parsed = None
    if parsed is not None:
        # What the file says itself wins.
        found = {key: getattr(parsed, key, None) for key in keys} | found
    return {key: list(found[key]) for key in keys if isinstance(found.get(key), list | tuple)}


def same_layers(
    config: Mapping[str, Any], other: Mapping[str, Any], stem: str, layers: Sequence[int]
) -> bool:
    """Return True when layer j of another config is the same as layer ``layers[j]`` of a config.

    Compared are the classes of all modules in a layer, their parameters' shapes, and every plain attribute.

    Args:
        config: of the base.
        other: of the model with repeated layers.
        stem: path of the list of layers in both.
        layers: for each layer of ``other``, the number of one of ``config``.
    """
    models = meta_model(config), meta_model(other)
    if models[0] is None or models[1] is None:
        return False
    try:
        before, after = (list(model.get_submodule(stem)) for model in models)
    except (AttributeError, TypeError):
        return False
    return len(after) == len(layers) and all(
        _signature(after[new]) == _signature(before[old]) for new, old in enumerate(layers)
    )


def _signature(layer: Any) -> list[object]:
    """Return classes, shapes and plain attributes of a layer's modules, but not the layer's number (``layer_idx``)."""
    return [
        (
            path,
            type(module).__name__,
            [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False)],
            sorted(
                (name, repr(value))
                for name, value in vars(module).items()
                if isinstance(value, bool | int | float | str | type(None)) and "idx" not in name
            ),
        )
        for path, module in layer.named_modules()
    ]


def model_class(config: Mapping[str, Any]) -> Any:
    """Return transformers' class for a ``config.json``, or None when it has none.

    Raises:
        PackageError: transformers cannot be used here.
    """
    transformers = need_transformers(config)

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    with cut_off():  # a module of transformers may load kernels when it is imported (Bark)
        found = getattr(transformers, name, None) if isinstance(name, str) else None
    # An untrusted config may name anything in transformers; only a class of models is called.
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def language_model_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the language model that transformers makes of a multimodal checkpoint; None where it does not.

    Reference:
        ``transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained`` (transformers 5.23).
    """
    transformers = need_transformers(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    with cut_off():
        known = getattr(transformers, str(name), None)
    wanted = getattr(getattr(known, "config_class", None), "model_type", None)
    # Nothing is to be made where the checkpoint is a language model itself.
    if known is None or name in (config.get("architectures") or ()) or wanted == config.get("model_type"):
        return None
    own = next(
        (level for path, level in config_levels(config) if path and level.get("model_type") == wanted), None
    )
    return None if own is None else {**own, "architectures": [name]}


def parts_of_model(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of the models inside a model: its towers, and the language model."""
    model = meta_model(config)
    if model is None:
        return ()
    from transformers import PreTrainedModel

    return tuple(
        path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)
    )


def class_for_task(model_type: str, task: str) -> str | None:
    """Return the name of transformers' class with the head for a task; None when it has none.

    Args:
        model_type: of the base.
        task: PEFT's ``task_type``.
    """
    require("transformers", f"finding the {model_type} model that has a head for {task}")
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, TASK_MAPPINGS[task]) if task in TASK_MAPPINGS else {}
    found = table.get(model_type)
    return str(found) if found else None


def meta_model(config: Mapping[str, Any]) -> Any:
    """Return the model of a ``config.json`` on the meta device, or None when transformers has no class for it.

    It is kept and shared: callers must not change it.
    """
    # Text can be a key of the cache, and sorted keys make equal configs equal texts.
    return None if excess_of(config) else _built(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=2)
def _built(text: str) -> Any:
    import torch

    config = json.loads(text)
    known = model_class(config)
    if known is None:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"), cut_off():
            warnings.simplefilter("ignore")
            parsed = parse_config(config)
            return None if parsed is None else known(parsed)
    except Exception as exc:  # noqa: BLE001 - a config that its own class rejects is as good as unknown
        raise_if_out_of_memory(exc)
        return None


def _describe(model: Any) -> Skeleton:
    import torch
    from transformers.pytorch_utils import Conv1D

    # PEFT asks ``isinstance``, so a subclass counts as the class that it is derived from.
    known = {Conv1D: "Conv1D"} | {getattr(torch.nn, name): name for name in _ADAPTABLE - {"Conv1D"}}

    def class_name(module: torch.nn.Module) -> str:
        bases = (name for base, name in known.items() if isinstance(module, base))
        return next(bases, type(module).__name__)

    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    return Skeleton(
        classes={path: class_name(module) for path, module in modules.items()},
        parameters={
            path: tuple(name for name, _ in module.named_parameters(recurse=False))
            for path, module in modules.items()
        },
        input_embedding=paths.get(id(embedding(model, "get_input_embeddings"))),
        output_embedding=paths.get(id(embedding(model, "get_output_embeddings"))),
        transposed=frozenset(
            path for path, module in modules.items() if getattr(module, "is_transposed", False)
        ),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )


def embedding(model: Any, getter: str) -> Any:
    """Return what a model's getter (``"get_input_embeddings"``) gives; None where it has none, or does not implement
    it.
    """
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
