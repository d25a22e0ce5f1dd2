"""Adapters for engines that serve them beside the base: trained, inspected and converted by the real command.

The reference is PEFT's forward pass with the adapter as it was trained, unmerged, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import Result

from lora_merge.peft_rules.kinds import PEFT_0_14_FIELDS
from tests.engines.adapters import VLLM_RANKS, Adapted, Server
from tests.engines.building import (
    RANK,
    TOLERANCE,
    Answer,
    Command,
    adapted,
    answers,
    base,
    log_probabilities,
    train,
)
from tests.tampering import edit_json, edit_tensors, to_pickles

SERVED_TOLERANCE = 2 * TOLERANCE
"""How far a log-probability may be off where an adapter is computed beside the weights, in float32, by other factors.

Beside each sum of up to 192 products come two more, through A and through B, of 192 and of up to 128 products. Factors
that are taken apart and put together, or that are a difference of weights, are rounded as another such sum is. Errors
that are independent add up as squares do: √(1 + (192 + 128)/192 + 1) is 1.9 times those of a merged weight.
"""


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter as it is, what it became for each engine, and what it has to compute."""

    base: Path
    original: Path
    converted: Mapping[Server, Path]
    conversions: Mapping[Server, Result]
    """What the command said; where it failed, there is nothing converted."""

    wanted: list[Answer]
    without: list[list[float]]
    """The base's own log-probabilities of the same tokens."""

    wanted_of_converted: Mapping[Server, list[Answer]]


def prepare_served(root: Path, about: Adapted, command: Command) -> Served:
    """Train an adapter in the sense of this suite, convert it for every engine, and compute what is right."""
    import peft

    directory = base(root, about.model)
    original = root / about.name.replace(" ", "-").replace(",", "")
    fields = {**(RANK if about.config == "LoraConfig" else {}), **about.lora}
    config = getattr(peft, about.config)(**fields)
    train(directory, about.model, config, original, lambda model: _lower_ranks(model, about.true_rank))
    _rewrite(original, about)
    model = adapted(directory, about.model, original)
    wanted = answers(model)
    with model.disable_adapter():
        without = log_probabilities(model, wanted)
    places = {server: original.with_name(f"{original.name}-for-{server}") for server in about.asked}
    options = (*about.options, *about.base_is)
    conversions = {
        server: command("convert", original, "--for", server, "--base", directory, "--out", out, *options)
        for server, out in places.items()
    }
    converted = {server: out for server, out in places.items() if conversions[server].exit_code == 0}
    of_converted = {
        server: answers(adapted(directory, about.model, out)) if about.is_lossy else wanted
        for server, out in converted.items()
    }
    return Served(directory, original, converted, conversions, wanted, without, of_converted)


def _rewrite(original: Path, about: Adapted) -> None:
    """Write an adapter's files as another release of PEFT does, or as nobody should."""
    config = original / "adapter_config.json"
    newer = json.loads(config.read_text()).keys() - PEFT_0_14_FIELDS if about.saved_by == "0.14" else ()
    edit_json(config, **dict.fromkeys(newer, ...), **about.edit)
    if about.is_rounded:
        edit_tensors(original / "adapter_model.safetensors", _round)
    if about.is_pickle:
        to_pickles(original)


def _round(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def _lower_ranks(model: Any, rank: int) -> None:
    """Make every row of A after the first few a mixture of those."""
    if not rank:
        return
    for module in model.modules():
        for linear in getattr(module, "lora_A", {}).values():
            kept, others = linear.weight[:rank], linear.weight[rank:]
            others.copy_(torch.randn(len(others), len(kept)) / rank**0.5 @ kept)


def needed_rank(adapter: Path) -> int:
    """Return what vLLM's ``max_lora_rank`` has to be at least."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    largest = max(config.get("r", 1), *(config.get("rank_pattern") or {"": 1}).values())
    return next(rank for rank in VLLM_RANKS if rank >= largest)
