"""What PEFT 0.21 knows: its types and configuration fields, and what each of them means for a merge."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, error, warning
from lora_merge.errors import CheckpointError
from lora_merge.peft_rules.hints import NEWER, SERVE_UNMERGED
from lora_merge.words import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

PREFIX = "base_model.model."
"""What the name of an adapter's tensor begins with when it belongs to one module."""

TRAINER_FIELDS = frozenset({"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"})
"""Fields that ms-swift writes for its trainer."""

IGNORED_FIELDS = TRAINER_FIELDS | frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "monteclora_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
        # AdaLoRA's schedule; what came of it is in the tensors
        "beta1",
        "beta2",
        "deltaT",
        "orth_reg_weight",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
    }
)
"""Fields of a LoRA or AdaLoRA configuration that do not change what it computes (PEFT 0.21.2).

VeLoRA compresses activations in training; MonteCLoRA's samples are left out when it is evaluated. With
``merge_weights`` PEFT 0.2 merged in ``eval()``, which computes the same; later releases have no such field.
"""

READ_FIELDS = frozenset(
    {
        "peft_type",
        "r",
        "init_r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "bias",
        "lora_bias",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_B_layout",
        "use_bdlora",
        "kasa_config",
        "ensure_weight_tying",
        "layer_replication",
        "token_indices",
        "init_weights",
    }
)
"""Fields that are read here: they decide which weights change, by how much, or whether a merge is possible."""

_SWITCH, _TEXT = (bool, int, type(None)), (str, type(None))
_NAMES = (list, type(None))

FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "peft_type": _TEXT,
    "bias": _TEXT,
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "task_type": _TEXT,
    "revision": _TEXT,
    "lora_B_layout": _TEXT,
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "lora_bias": _SWITCH,
    "fan_in_fan_out": _SWITCH,
    "ensure_weight_tying": _SWITCH,
    "init_lora_weights": (bool, str, type(None)),
    "init_weights": (bool, str, type(None)),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "feedforward_modules": (list, str, type(None)),
    "kasa_config": (dict, bool, type(None)),
    "use_bdlora": (dict, bool, type(None)),
}
"""Field → the types, as JSON has them, that those who read it rely on."""

_OF_TEXTS = frozenset({"modules_to_save", "target_parameters", "feedforward_modules"})

_CALLED = {bool: "true or false", str: "a string", list: "a list", dict: "a table", type(None): "null"}

UNMERGEABLE_FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens",
    "arrow_config": "Arrow routes each token to one of several adapters",
    "use_qalora": "a QA-LoRA delta belongs to a quantised weight",
}
"""Fields of kinds of adapters that have no merged form → why."""

RETIRED_FIELDS: Mapping[str, str] = {
    "enable_lora": "each LoRA changes only parts of a fused projection, and no PEFT since 0.3 can read that",
}
"""Fields of a kind of adapter that PEFT dropped, and why (``peft.tuners.lora.MergedLinear``, PEFT 0.2.0)."""

REQUANTISED_FIELDS: Mapping[str, tuple[str, str]] = {
    "nvfp4_merge_aware": (
        "Axolotl trained it for weights that are rounded to NVFP4 after the merge; unrounded, it may be worse than none",
        "merge it with axolotl merge-lora, which writes a plain NVFP4 checkpoint",
    ),
}
"""Fields of adapters whose trainer quantises again after its own merge → why, and what to do. Axolotl 0.18 trains
Q(decode(W) + s · B A) with new scales, and refuses a BF16 merge itself (``docs/nvfp4_lora.qmd``, axolotl#3822).
"""

_REFUSED_FIELDS = UNMERGEABLE_FIELDS.keys() | RETIRED_FIELDS.keys() | REQUANTISED_FIELDS.keys()

KNOWN_FIELDS = IGNORED_FIELDS | READ_FIELDS | _REFUSED_FIELDS
"""Every field that a LoRA, AdaLoRA or TRAINABLE_TOKENS configuration may have."""

PEFT_0_14_FIELDS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
"""Fields of a LoRA configuration that PEFT 0.14 reads; that release raises TypeError for any other."""

NOT_IN_WEIGHTS: Mapping[str, str] = {
    "PROMPT_TUNING": "it learns prompt vectors",
    "MULTITASK_PROMPT_TUNING": "it learns prompt vectors",
    "P_TUNING": "it learns prompt vectors",
    "PREFIX_TUNING": "it learns keys and values",
    "CPT": "it learns prompt vectors",
    "CARTRIDGE": "it learns keys and values",
    "ADAPTION_PROMPT": "it learns prompts inside the attention",
    "XLORA": "a router mixes its experts for each token",
    "POLY": "a router mixes its experts for each task",
    "LILY": "a router mixes its experts for each token",
    "SHADOW": "it runs a second network next to the model",
}
"""PEFT types that no change of weights can express, and why."""

NATIVE = frozenset({"LORA", "ADALORA", "TRAINABLE_TOKENS"})
"""PEFT types whose formulas are written out in `lora_merge.deltas`."""

PEFT_LAYERS = frozenset(
    {
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
"""PEFT types that PEFT's own layers merge, one module at a time."""

DECOMPOSING: Mapping[str, str] = {
    "OSF": "OSF",
    "PSOFT": "PSOFT",
    "ADAMSS": "AdaMSS",
}
"""PEFT types that decompose the base's weights when they are loaded, and their names."""

MUTATING_INITS: Mapping[str, str] = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
"""Values of ``init_lora_weights`` that change the base's weights before training, by how they begin."""

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base alone."""


def check_types(config: Mapping[str, Any], label: str) -> None:
    """Check that the fields of a configuration hold values of the types that PEFT writes.

    Args:
        config: as parsed.
        label: what to call its file.

    Raises:
        CheckpointError: one does not.
    """
    for field, types in FIELD_TYPES.items():
        value = config.get(field)
        if not isinstance(value, types):
            wanted = " or ".join(_CALLED[kind] for kind in types if kind in _CALLED)
            raise CheckpointError(label, field, f"is {quoted(value)}", wanted)
        items = value if field in _OF_TEXTS and isinstance(value, list) else ()
        if not all(isinstance(item, str) for item in items):
            raise CheckpointError(label, field, f"is {quoted(value)}", "a list of strings")


def kind_issues(config: Mapping[str, Any]) -> list[Issue]:
    """Return errors for what has no merged form: the type, a field that asks for such a kind, an unknown init."""
    if not config.get("peft_type"):
        return [_foreign(config)]
    kind = str(config["peft_type"])
    if kind in NOT_IN_WEIGHTS:
        sentence = f"a {kind} adapter cannot be merged: {NOT_IN_WEIGHTS[kind]}, which weights cannot express"
        return [error("unsupported", "peft_type", sentence, SERVE_UNMERGED)]
    if kind == "BONE":
        hint = "load it in PEFT 0.17 and save it again as MISS"
        return [error("unsupported", "peft_type", "'BONE' was renamed, and PEFT 0.21 cannot read it", hint)]
    if kind not in NATIVE | PEFT_LAYERS:
        sentence = f"is {quoted(kind)}, which is not a type of PEFT 0.21"
        # PEFT writes its types in capitals, and compares them as they are.
        near = next((one for one in sorted(NATIVE | PEFT_LAYERS) if one == kind.upper()), None)
        hint = f"write {near}, as PEFT does" if near else NEWER
        return [error("unsupported", "peft_type", sentence, hint)]
    issues = [
        error("unsupported", field, f"{why}, so it cannot be merged", SERVE_UNMERGED)
        for field, why in UNMERGEABLE_FIELDS.items()
        if config.get(field)
    ]
    issues += [
        error("unsupported", field, why, "merge it with PEFT 0.2")
        for field, why in RETIRED_FIELDS.items()
        if config.get(field)
    ]
    requantised = [(field, *said) for field, said in REQUANTISED_FIELDS.items() if config.get(field)]
    issues += [error("unsupported", *one) for one in requantised]
    init = config.get("init_lora_weights", True)
    # An unknown init may have changed the base before training, as PiSSA does.
    if kind == "LORA" and init not in PLAIN_INITS and mutating_init(config) is None:
        sentence = f"is {quoted(init)}, which PEFT 0.21 does not know"
        issues.append(error("unsupported", "init_lora_weights", sentence, NEWER))
    return issues


def _foreign(config: Mapping[str, Any]) -> Issue:
    """Return the issue of a configuration without ``peft_type``: whose it is, by its fields, and what to do."""
    fields = {*map(str, config), str(config.get("framework")).lower()}
    maker, way = next((said for marks, *said in _FOREIGN if marks <= fields), ("", _MINIMUM))
    # Names of fields are untrusted, and may be of any length.
    named = f"the fields {listing([str(field)[:40] for field in config], 5)}" if config else "no fields"
    sentence = f"is missing, so adapter_config.json is not PEFT's (it has {named})"
    if maker:
        sentence += f"; it looks like {maker}"
    return error("unsupported", "peft_type", sentence, way)


_MINIMUM = (
    "download PEFT's adapter_config.json too, if these weights are PEFT's: it has peft_type, r, lora_alpha, "
    "target_modules and so on"
)
_IN_ADAPTERS = (
    "merge it there: model.load_adapter(FOLDER), model.merge_adapter(NAME), model.save_pretrained(OUTPUT)"
)
_AS_MLX = "name the weights adapters.safetensors, as mlx-lm does"

_FOREIGN: tuple[tuple[frozenset[str], str, str], ...] = (
    (
        frozenset({"jax-tunix-qwix"}),
        "one of tunix, whose factors have other names and shapes",
        "export the adapter from tunix in PEFT's format, or merge it there and save the model",
    ),
    (frozenset({"config", "model_name"}), "one of AdapterHub's library adapters", _IN_ADAPTERS),
    (frozenset({"config", "hidden_size", "name"}), "one of AdapterHub's library adapters", _IN_ADAPTERS),
    (frozenset({"lora_parameters"}), "one of mlx-lm", _AS_MLX),
    (frozenset({"fine_tune_type"}), "one of mlx-lm", _AS_MLX),
    (
        frozenset({"adapter_layers", "adapter_len"}),
        "one of LLaMA-Adapter, which learns prompts that weights cannot express",
        "run it with its own code",
    ),
    (
        frozenset({"model_type", "hidden_size"}),
        "the config.json of a whole model",
        "replace it with the adapter's own adapter_config.json",
    ),
)
"""Configurations that others call adapter_config.json: fields that identify them, their origin, and what to do."""


def mutating_init(config: Mapping[str, Any]) -> str | None:
    """Return the name of an init that changed the base before training (``"PiSSA"``), or None for any other."""
    init = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA" or not isinstance(init, str):
        return None
    # By its beginning: ``pissa_niter_16`` is PiSSA.
    return next((name for start, name in MUTATING_INITS.items() if init.lower().startswith(start)), None)


def field_issues(config: Mapping[str, Any], known: Collection[str] = KNOWN_FIELDS) -> list[Issue]:
    """Return an issue for each unknown field: an error where it has a value, else a warning. PEFT drops all of them.

    Args:
        config: as parsed.
        known: fields that are known.
    """
    issues = []
    for field, value in config.items():
        if field in known:
            continue
        sentence = f"is {quoted(value)}, and PEFT 0.21 does not know this field"
        if value:
            hint = "remove it from adapter_config.json if it does not change what the adapter computes"
            issues.append(error("unknown-field", field, sentence, hint))
        else:
            issues.append(warning("unknown-field", field, sentence))
    return issues


def peft_version(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the release of PEFT that wrote an adapter, as three numbers; None where its configuration does not say.

    Example:
        >>> peft_version({"peft_version": "0.18.1.dev0"}), peft_version({})
        ((0, 18, 1), None)
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return tuple(map(int, found.groups())) if found else None
