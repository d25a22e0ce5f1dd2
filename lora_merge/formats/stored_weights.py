"""The weights of a checkpoint: its tensors, grouped by what says how they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.formats.safetensors import blocks
from lora_merge.peft_rules.matcher import Matcher, MatcherError
from lora_merge.peft_rules.patterns import LIMIT_SECONDS
from lora_merge.quantised import SETTINGS_FILES, PatternError, Surroundings, identify
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from lora_merge.core.checkpoint import WeightFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised import Found


def weights_in(root: Path, config: Mapping[str, Any], files: Collection[WeightFile]) -> Found:
    """Return the weights of a checkpoint, and what is wrong with how they are stored.

    Args:
        root: its directory.
        config: ``config.json``.
        files: of its weights.

    Raises:
        CheckpointError: a file of settings, or a small tensor, cannot be read.
    """
    tensors = (ref for file in files for ref in file.tensors)
    return identify(tensors, _surroundings(root, config, files))


def settings_files(root: Path) -> dict[str, dict[str, Any]]:
    """Return the small files beside ``config.json`` that say how weights are quantised: name → table.

    Raises:
        CheckpointError: one is there and cannot be read.
    """
    return {name: read_json(root / name) for name in SETTINGS_FILES if (root / name).is_file()}


def _surroundings(root: Path, config: Mapping[str, Any], files: Collection[WeightFile]) -> Surroundings:
    """Return what says how the weights of a checkpoint are stored.

    Raises:
        CheckpointError: a file of settings cannot be read.
    """
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    return Surroundings(config, _bytes_of, settings_files(root), metadata, _matches)


def _matches(expressions: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Return for each name the places of the expressions that match it, within limits: they may be untrusted.

    Raises:
        PatternError: an expression cannot be used, or not within the limits.
    """
    try:
        found = Matcher(expressions, "match", LIMIT_SECONDS).find(names)
    except MatcherError as exc:
        raise PatternError(exc.at, str(exc)) from exc
    return [[at for at, _ in hits] for hits in found]


def _bytes_of(ref: TensorRef) -> bytes:
    """Return all bytes of a small tensor.

    Raises:
        CheckpointError: the file ends too soon, or cannot be read.
    """
    return b"".join(map(bytes, blocks(ref)))
