"""Adapters that presuppose something about the base: an initialisation that changed it, or a decomposition of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, note
from lora_merge.peft_rules.kinds import DECOMPOSING, PEFT_LAYERS, mutating_init
from lora_merge.words import quoted

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter
    from lora_merge.planning.settings import Reading

_RECOMPUTABLE = frozenset({"pissa", "olora"})
"""Values of ``init_lora_weights`` whose change of the base depends on nothing but the base, so that it can be repeated."""

_NOT_REPRODUCIBLE = {
    "PiSSA": "its decomposition used random numbers (pissa_niter)",
    "CorDA": "it depends on the calibration data",
    "LoftQ": "it depends on how the base was quantised",
    "LoRA-GA": "it depends on gradients of the first training steps",
}
"""Name of an initialisation → why it cannot be repeated."""


def uses_peft_layers(adapter: Adapter, reading: Reading) -> bool:
    """Return True when PEFT's own layers merge an adapter, and no formula of ours does."""
    # On the original base the initialisation's change is computed again, and only PEFT's own code
    # gives PEFT's bits. KaSA changes the base whenever it is loaded.
    again = mutating_init(adapter.config) is not None and reading.base_is == "original"
    return adapter.kind in PEFT_LAYERS or bool(adapter.config.get("kasa_config")) or again


def mutating_init_issues(adapter: Adapter, reading: Reading) -> list[Issue]:
    """Return what an adapter presupposes about the base, where the user has not stated it.

    Reference:
        ``peft.tuners.lora.layer.LoraLayer.pissa_init`` and its siblings (PEFT 0.21.2): each puts W - s·BA of the
        first A and B in the place of W.
    """
    if adapter.kind in DECOMPOSING and not reading.allow_svd:
        sentence = (
            f"{DECOMPOSING[adapter.kind]} decomposes the base's weights when it is loaded, and the result "
            "can differ between machines"
        )
        hint = "pass --allow-svd to merge it on this machine, and compare the outputs"
        return [error("decomposes", "peft_type", sentence, hint)]
    name = mutating_init(adapter.config)
    if name is not None:
        return [_mutated(name, str(adapter.config["init_lora_weights"]), reading)]
    if reading.base_is is not None:
        sentence = "its initialisation did not change the base, so --base-is has no effect"
        return [note("base-is", adapter.root, sentence)]
    return []


def _mutated(name: str, init: str, reading: Reading) -> Issue:
    """Return the issue of an initialisation that changed the base: an error, unless the user's word settles it."""
    subject = "init_lora_weights"
    if reading.base_is is None:
        sentence = f"is {quoted(init)}: {name} changed the base's weights before training"
        hint = (
            "pass --base-is residual if this base was saved after that change, or --base-is original if it "
            "is the published model"
        )
        return error("base-is", subject, sentence, hint)
    if reading.base_is == "residual":
        return note(
            "base-is", subject, f"is {quoted(init)}; the base is used as {name} left it (--base-is residual)"
        )
    if init.lower() in _RECOMPUTABLE:
        return note("base-is", subject, f"is {quoted(init)}; {name}'s change of the base is computed again")
    why = _NOT_REPRODUCIBLE[name]
    sentence = f"is {quoted(init)}, and {name}'s change of the original base cannot be computed again: {why}"
    hint = (
        "save the base after the initialisation and pass --base-is residual, or convert the adapter with "
        "save_pretrained(path_initial_model_for_weight_conversion=…)"
    )
    return error("base-is", subject, sentence, hint)
