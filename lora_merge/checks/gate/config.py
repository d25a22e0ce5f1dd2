"""Does ``config.json`` describe the weights as they are now?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.checks.gate.parts import grouped
from lora_merge.checks.gate.scheme import FILES
from lora_merge.core.checkpoint import CONFIG_FILE, config_levels
from lora_merge.core.report import error, warning
from lora_merge.quantised.tables import KEYS
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def config(output: Output) -> Iterator[Issue]:
    """Yield an issue for each field that engines need and do not find, or that would mislead them."""
    table = output.config
    if table is None:
        yield error("no-config", CONFIG_FILE, output.broken.get(CONFIG_FILE, "is missing"))
        return
    named = table.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        hint = "engines choose the model's class by it; take it from the config.json of the original model"
        yield error(
            "no-architectures",
            CONFIG_FILE,
            f"architectures is {quoted(named)}, expected a class's name",
            hint,
        )
    if not isinstance(table.get("model_type"), str):
        yield error(
            "no-model-type", CONFIG_FILE, f"model_type is {table.get('model_type')!r}, expected a name"
        )
    yield from _leftovers(output, table)
    yield from _layers(output, table)


def _leftovers(output: Output, table: Mapping[str, object]) -> Iterator[Issue]:
    """Yield an issue for each setting of a quantisation, where no tensor is quantised any more."""
    found: list[tuple[str, str]] = []
    for path, level in config_levels(table):
        for field in KEYS:
            # Only a table is MLX's: the word may be a parameter of any model.
            if level.get(field) and (field != "quantization" or isinstance(level[field], dict)):
                sentence = f"{CONFIG_FILE} has it, and no tensor is quantised: engines would look for scales"
                found.append((f"{path}.{field}".lstrip("."), sentence))
    sentence = "says how the weights are quantised, and no tensor is"
    found += [(name, sentence) for name in FILES if name in output.names]
    # Really quantised: the settings are right.
    if found and not any(module.is_quantised for module in grouped(output.tensors()).values()):
        hint = "the weights are stored in full precision: remove it"
        for subject, sentence in found:
            yield error("leftover-quantisation", subject, sentence, hint)


def _layers(output: Output, table: Mapping[str, object]) -> Iterator[Issue]:
    """Yield a warning when fewer layers are stored than the configuration counts.

    Several stacks (towers, encoder and decoder) have counts of their own; the longest must reach the largest count.
    """
    counts = [
        count
        for _, level in config_levels(table)
        for count in map(level.get, _COUNTS)
        if isinstance(count, int)
    ]
    found = [
        int(match[1])
        for file in output.files.values()
        for ref in file.tensors
        for match in [_NUMBER.search(ref.name)]
        if match
    ]
    if counts and found and max(found) + 1 < max(counts):
        sentence = f"counts {max(counts)} layers, and the last one that is stored is {max(found)}"
        hint = "the rest would be left at random by some engines, and refused by others"
        yield warning("missing-layers", CONFIG_FILE, sentence, hint)
