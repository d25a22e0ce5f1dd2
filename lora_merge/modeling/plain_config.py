"""An untrusted configuration, reduced to data: nothing in it names what a library would fetch, import or run.

transformers and PEFT take a configuration for a recipe: a backbone is downloaded, an attention implementation is loaded as
code, a module is imported by its name. A model without weights needs none of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NOT_DATA = frozenset(
    {
        "_attn_implementation_autoset",
        "_auto_class",
        "_commit_hash",
        "_from_auto",
        "_name_or_path",
        "attribute_map",
        "auto_map",
        "base_config_key",
        "custom_pipelines",
        "feature_extractor_class",
        "image_processor_class",
        "kernel_config",
        "name_or_path",
        "processor_class",
        "quantization_config",
        "sub_configs",
        "sub_configs_defaults",
        "tokenizer_class",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
        "use_pretrained_backbone",
    }
)
"""Fields by which transformers (5.23) finds files, code or other names for fields; no shape depends on them."""

_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$")
"""How attention or experts are computed: ``org/name`` is a repo of code there."""

_DTYPES = re.compile(r"(torch\.)?(float\w*|bfloat16|half|double|auto)")
"""Of ``dtype``, which transformers looks up in torch by its name."""

_OF_TIMM = re.compile(r"\w+(\.\w+)*")
"""A model that timm defines itself. ``hf-hub:…`` and ``local-dir:…`` are files from somewhere else."""

_FILES_OF_TIMM = re.compile(r"pretrained|checkpoint|path|cache|file|url")
"""Arguments by which ``timm.create_model`` loads files."""

_NOT_DATA_OF_PEFT = frozenset(
    {
        "auto_mapping",
        "base_model_class",
        "base_model_name_or_path",
        "megatron_config",
        "parent_library",
        "revision",
        "runtime_config",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""Fields by which PEFT (0.21) finds other models or imports modules; no weight depends on them."""


class FetchError(ValueError):
    """A model cannot be built without a part that its configuration names and does not describe.

    Args:
        field: where it is named: ``backbone_config.backbone``.
        name: what is named: ``org/backbone``.
    """

    def __init__(self, field: str, name: str) -> None:
        self.field, self.name = field, name
        super().__init__(f"{field}: names {name}, which would have to be downloaded")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` reduced to data at every level, without instructions to fetch, import or run.

    Example:
        >>> plain_config({"hidden_size": 8, "text_config": {"_attn_implementation": "org/kernel"}})
        {'hidden_size': 8, 'text_config': {}}

    Raises:
        FetchError: a part of the model is only named, and would have to be fetched.
    """
    return _level(config, "")


def plain_adapter_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ``adapter_config.json`` without the fields that name other models or modules to import."""
    return {key: value for key, value in config.items() if key not in _NOT_DATA_OF_PEFT}


def fetched_part(config: Mapping[str, Any]) -> FetchError | None:
    """Return what would have to be fetched to build the model of a configuration; None where it is all there."""
    try:
        plain_config(config)
    except FetchError as exc:
        return exc
    return None


def _level(level: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return one table of a configuration, and the tables in it, reduced; ``path`` is its own, with a dot at the end.

    Raises:
        FetchError: a part of the model is only named.
    """
    named = level.get("backbone")
    is_described = isinstance(level.get("backbone_config"), Mapping)
    # A plain name is one of timm's own models, unless the configuration says that it is not.
    is_repo = isinstance(named, str) and (
        _OF_TIMM.fullmatch(named) is None or level.get("use_timm_backbone") is False
    )
    if is_repo and not is_described:
        raise FetchError(f"{path}backbone", str(named))
    wrapped = level.get("architecture") if level.get("model_type") == "timm_wrapper" else None
    if isinstance(wrapped, str) and not _OF_TIMM.fullmatch(wrapped):
        raise FetchError(f"{path}architecture", wrapped)
    plain = {key: _value(value, f"{path}{key}.") for key, value in level.items() if _is_data(key, value)}
    if is_described:
        # The description is enough to build it; the name would be fetched.
        plain.pop("backbone", None)
    # They are handed on to ``timm.create_model``.
    for key in ("backbone_kwargs", "model_args"):
        if isinstance(plain.get(key), dict):
            plain[key] = {
                name: one for name, one in plain[key].items() if not _FILES_OF_TIMM.search(str(name))
            }
    return plain


def _value(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return _level(value, path)
    if isinstance(value, list):
        return [_value(item, path) for item in value]
    return value


def _is_data(key: object, value: Any) -> bool:
    if not isinstance(key, str):  # of a configuration that is not JSON: {0: "label"}
        return True
    if key in {"dtype", "torch_dtype"} and isinstance(value, str):
        return _DTYPES.fullmatch(value) is not None
    return key not in _NOT_DATA and not _IMPLEMENTATION.search(key)
