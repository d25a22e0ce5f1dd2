"""A checkpoint as an index: which tensors are in which file. Their values are not read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge.core.report import Issue
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import Weight

SAFETENSORS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG_FILE, ADAPTER_CONFIG = "config.json", "adapter_config.json"

OUTPUT_NAMES = frozenset({"lm_head", "embed_out", "proj_out", "decoder"})
INPUT_NAMES = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "shared", "tok_embeddings"})
"""Last parts of the paths of output embeddings (`OUTPUT_NAMES`) and input embeddings, in the families known."""

SCALED_WHEN_TIED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano"})
"""Model types that scale the decoder's output where the config says that embeddings are tied (``scale_decoder_outputs``
in transformers), so that clearing the flag changes the forward pass."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights: its tensors in the order of their bytes. In a ``.bin`` file tensors may share bytes."""

    name: str
    """What the output calls it; for safetensors its own name, relative to the checkpoint's root."""

    metadata: Mapping[str, str]
    """The header's ``__metadata__``; empty for a ``.bin`` file."""

    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that goes with the weights: configuration, tokenizer, template, custom code."""

    name: str
    """Relative to the output, for example ``tokenizer.json``."""

    source: str
    """Path of the file to copy."""

    nbytes: int

    origin: str
    """``"base"`` or ``"adapter"``."""


@dataclass(frozen=True, slots=True)
class MergedBefore:
    """An adapter that a checkpoint has merged into it, as its manifest says."""

    path: str
    """As the user named it then."""

    digest: str
    """Of the file that holds its tensors."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An index of tensors over files, and the small files around them."""

    root: str

    config: Mapping[str, Any]
    """``config.json``, parsed."""

    files: tuple[WeightFile, ...]
    """In shard order."""

    sharded: bool
    """True when an index file names the shards, even if there is only one."""

    index_metadata: Mapping[str, Any]
    """``metadata`` of the index file; empty for a single file."""

    side_files: tuple[SideFile, ...]

    weights: Mapping[str, Weight]
    """The parameters by name, as `lora_merge.quantised` identifies them."""

    others: tuple[TensorRef, ...] = ()
    """The tensors that belong to no parameter: integers, buffers, what belongs to a quantised storage and stores no parameter."""

    notes: tuple[str, ...] = ()
    """What was seen and left out on purpose, one sentence each."""

    quantisation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What says how weights are quantised, as it was found: the dotted key in ``config.json``, or the name of a side file,
    → its settings."""

    issues: tuple[Issue, ...] = ()
    """What is wrong with how its weights are stored."""

    merged: tuple[MergedBefore, ...] = ()
    """Adapters that are merged into it already, as its manifest says."""

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor, file by file, in the order of their bytes."""
        for file in self.files:
            yield from file.tensors

    def by_name(self) -> dict[str, TensorRef]:
        """Return every tensor by its stored name, in the order of the files' bytes."""
        return {ref.name: ref for ref in self.tensors()}

    def parameters(self) -> dict[str, Weight]:
        """Return everything that may be asked for by name, in the order of the files' bytes.

        A tensor that belongs to no parameter counts as a dense weight with its dtype.
        """
        # A weight of several parts is listed once, where its first part is: the dict keeps the first place of a name.
        owners = {ref.name: weight for weight in self.weights.values() for ref in weight.parts.values()}
        found = (owners.get(ref.name) or Weight.dense(ref) for ref in self.tensors())
        return {weight.name: weight for weight in found}

    def matrices(self) -> frozenset[str]:
        """Return the path of every module whose weight has two axes or more: linear layers, embeddings, convolutions."""
        return frozenset(
            name.removesuffix(".weight")
            for name, weight in self.parameters().items()
            if name.endswith(".weight") and len(weight.shape) > 1
        )


def owner_name(parameter: str) -> str:
    """Return the last part of the path of the module that owns a parameter.

    Example:
        >>> owner_name("model.embed_tokens.weight")
        'embed_tokens'
    """
    return parameter.rpartition(".")[0].rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class ConfigPatch:
    """What changes in a ``config.json``. Keys are dotted paths, such as ``text_config.vocab_size``."""

    set: Mapping[str, Any] = field(default_factory=dict)
    """Key → new value."""

    delete: tuple[str, ...] = ()
    """Keys to remove; a key that is missing already is ignored."""

    files: Mapping[str, Any] = field(default_factory=dict)
    """Side file → its new content, as JSON."""

    def changes(self, file: str) -> bool:
        """Return True where anything in a file changes."""
        return bool(self.set or self.delete) if file == CONFIG_FILE else file in self.files


def patched_config(config: Mapping[str, Any], patch: ConfigPatch) -> dict[str, Any]:
    """Return a config with some values replaced and some keys removed, in its own order.

    Example:
        >>> config = {"text_config": {"vocab_size": 8, "quantization_config": {}}}
        >>> patched_config(config, ConfigPatch({"text_config.vocab_size": 9}, ("text_config.quantization_config",)))
        {'text_config': {'vocab_size': 9}}
    """
    # A copy: the config that is given is the base's own, which other rooms still read.
    table: dict[str, Any] = copy.deepcopy(dict(config))
    for dotted, value in patch.set.items():
        *parents, key = dotted.split(".")
        level = table
        for parent in parents:
            level = level.setdefault(parent, {})
        level[key] = value
    for dotted in patch.delete:
        *parents, key = dotted.split(".")
        # A level that is missing, or is not a table, does not have the key: nothing to delete.
        found: Any = table
        for parent in parents:
            found = found.get(parent) if isinstance(found, dict) else None
        if isinstance(found, dict):
            found.pop(key, None)
    return table


def config_levels(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``(dotted path, mapping)`` for a model config and every sub-config in it.

    A sub-config is a nested mapping that names a ``model_type`` or ends in ``_config``.

    Example:
        >>> [path for path, _ in config_levels({"text_config": {"hidden_size": 8}, "rope": {}})]
        ['', 'text_config']
    """
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            yield from config_levels(value, f"{prefix}.{key}" if prefix else key)
