"""What the settings around a directory say of its quantisation: sizes of blocks and groups, and modules that are left dense."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.errors import CheckpointError
from lora_merge.peft_rules.matcher import Matcher, MatcherError
from lora_merge.peft_rules.patterns import LIMIT_SECONDS
from lora_merge.quantised.tables import KEYS
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from lora_merge.formats.written_checkpoint import Output

FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that say it too: those of GPTQ, AWQ and ModelOpt."""

_LISTS = (
    "ignore",
    "modules_to_not_convert",
    "ignored_layers",
    "exclude_modules",
    "llm_int8_skip_modules",
)
"""Keys of lists of modules that are left dense."""

_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Engines' names for modules that they load as one."""

_PREFIXES = ("re:", "-:")
"""Of regular expressions: those of compressed-tensors, and of GPTQ's modules that are left dense."""


@dataclass(slots=True)
class Scheme:
    """The settings of all sources together. Where they differ from module to module, every size that occurs is known."""

    tables: list[Mapping[str, Any]] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)
    """Values that share a scale, along a row; 0 for a whole row."""

    bits: set[int] = field(default_factory=set)
    blocks: set[tuple[int, int]] = field(default_factory=set)
    """Rows and columns that share a scale."""

    methods: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    """Names and patterns of modules that are left dense."""

    targets: list[list[str]] = field(default_factory=list)
    """Names, patterns and classes of modules that are quantised; a list for each group of compressed-tensors."""

    @classmethod
    def of(cls, output: Output) -> Scheme:
        """Return what a directory says."""
        found = cls()
        levels = config_levels(output.config or {})
        for table in [
            *(level.get(key) for _, level in levels for key in KEYS),
            *side_files(output).values(),
        ]:
            if isinstance(table, dict) and table:
                found.tables.append(table)
                for key, value in _pairs(table):
                    found._take(key, value)
        return found

    def _take(self, key: str, value: Any) -> None:
        if key == "group_size" and (value is None or isinstance(value, int)):
            # Null and -1 mean a whole row.
            self.groups.add(max(value or 0, 0))
        elif key in {"bits", "num_bits", "w_bit"} and isinstance(value, int) and value > 0:
            self.bits.add(value)
        elif key in {"weight_block_size", "block_structure"}:
            if isinstance(value, list) and len(value) == 2 and all(_is_size(size) for size in value):
                self.blocks.add((value[0], value[1]))
        elif key == "quant_method" and isinstance(value, str):
            self.methods.add(value.lower())
        # ModelOpt's name for FP8 in blocks, whose size it does not state.
        elif key == "quant_algo" and isinstance(value, str) and value.lower() == "fp8_pb_wo":
            self.blocks.add((128, 128))
        elif key == "targets" and isinstance(value, list):
            self.targets.append([one for one in value if isinstance(one, str)])
        elif key in _LISTS and isinstance(value, list):
            self.left += [one for one in value if isinstance(one, str)]
        elif key == "quantized_layers" and isinstance(value, dict):
            self.targets.append(list(value))
        elif _leaves_dense(key, value):
            self.left.append(key)

    def excepts(self, module: str) -> bool:
        """Return True where a module may be left dense: engines read these lists in different ways, and any will do."""
        if _mean(self.left, module):
            return True
        named = [target for group in self.targets for target in group]
        # A class ("Linear") may be anything; without one, what no group names is dense.
        is_by_name = bool(named) and not any(target[:1].isupper() for target in named)
        return is_by_name and not _mean(named, module)


def _leaves_dense(key: str, value: Any) -> bool:
    """Return True where a key is a module in full precision, or a pattern of such modules.

    MLX has module → false, GPTQ ``"-:pattern"`` → a table, AutoRound module → a table with 16 bits.
    """
    if value is False:
        return "." in key or key == "lm_head"
    return key.startswith("-:") or (isinstance(value, dict) and value.get("bits") == 16)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0


def side_files(output: Output) -> dict[str, Mapping[str, Any]]:
    """Return those of `FILES` that a directory has and that can be read, parsed."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in FILES:
        if name in output.names:
            with contextlib.suppress(CheckpointError):
                found[name] = read_json(Path(output.root, name))
    return found


def _pairs(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of a table and of the tables in it."""
    waiting = [table]
    while waiting:
        current = waiting.pop()
        for key, value in current.items():
            yield str(key), value
            if isinstance(value, dict):
                waiting.append(value)


def _mean(patterns: Sequence[str], module: str) -> bool:
    """Return True where one of some names, parts of names, wildcards and regular expressions may mean a module."""
    path, _, last = module.rpartition(".")
    spellings = [module, *(f"{path}.{name}" for name, parts in _JOINED.items() if last in parts)]
    patterns = [pattern.removesuffix(".weight") for pattern in patterns]
    expressions = []
    for pattern in patterns:
        prefix = next((one for one in _PREFIXES if pattern.startswith(one)), "")
        if not prefix and any(_is_named(pattern, name) for name in spellings):
            return True
        expression = pattern.removeprefix(prefix)
        if prefix or re.escape(expression) != expression:
            expressions.append(expression)
    # All of them together, and only where no name does: they are a stranger's, and run in a process with limits.
    try:
        return any(Matcher(expressions, "match", LIMIT_SECONDS).find(spellings)) if expressions else False
    except MatcherError:
        return False


def _is_named(pattern: str, name: str) -> bool:
    """Return True where a part of a module's path has this name, or matches this wildcard."""
    # "language_model.model.layers.3.mlp" or "model.language_model.layers.3.mlp": what follows is the same.
    tail = pattern[at:] if (at := pattern.find("layers.")) > 0 else pattern
    return bool(tail) and (f".{tail.rstrip('.*')}." in f".{name}." or fnmatch.fnmatchcase(name, f"*{tail}*"))
