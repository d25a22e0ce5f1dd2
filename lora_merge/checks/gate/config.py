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
        hint = "copy it from the config.json of the original model: engines choose the model's class by it"
        yield error(
            "no-architectures",
            CONFIG_FILE,
            f"architectures is {quoted(named)}, expected the names of classes",
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
                sentence = f"{CONFIG_FILE} has this setting, but no tensor is quantised: engines would look for scales"
                found.append((f"{path}.{field}".lstrip("."), sentence))
    sentence = "describes how the weights are quantised, but no tensor is quantised"
    found += [(name, sentence) for name in FILES if name in output.names]
    # Really quantised: the settings are right.
    if found and not any(module.is_quantised for module in grouped(output.tensors()).values()):
        hint = "remove it: the weights are stored in full precision"
        for subject, sentence in found:
            yield error("leftover-quantisation", subject, sentence, hint)


def _layers(output: Output, table: Mapping[str, object]) -> Iterator[Issue]:
    """Yield a warning when fewer layers are stored than the configuration counts.

    Several stacks (towers, encoder and decoder) have separate counts; the longest must reach the largest count.
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
        sentence = f"gives {max(counts)} layers, but the last stored layer has the number {max(found)}"
        hint = "check the base: some engines fill missing layers with random numbers, others refuse the model"
        yield warning("missing-layers", CONFIG_FILE, sentence, hint)
