"""Modules that PEFT adapts in a family when ``target_modules`` is null, from PEFT's own lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.runtime.packages import require

if TYPE_CHECKING:
    from lora_merge.peft_rules.targets import Names


def family_targets(kind: str, model_type: str) -> Names:
    """Return PEFT's own targets for a family: names, or a regex; None where it has none.

    Imports PEFT (seconds).

    Args:
        kind: the PEFT type, ``"LORA"`` for example.
        model_type: of the base's ``config.json``, at its top level.

    Raises:
        PackageError: PEFT cannot be used here.

    Reference:
        ``peft.tuners.tuners_utils.BaseTuner._prepare_adapter_config`` (PEFT 0.21.2).
    """
    require("peft", f"looking up the default target_modules of a {model_type} model")
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind))
    found = (getattr(tuner, "target_module_mapping", None) or {}).get(model_type)
    if found is None or isinstance(found, str):
        return found
    # PEFT has sets; sorted, the result is the same in every process.
    return tuple(sorted(found))


def is_rewritten(model_type: str) -> bool:
    """Return True for a family whose experts PEFT finds among modules and moves to ``target_parameters``.

    Raises:
        PackageError: PEFT cannot be used here.

    Reference:
        ``peft.utils.transformers_weight_conversion._convert_peft_config_moe`` (PEFT 0.21.2).
    """
    require("peft", f"looking up which experts of a {model_type} model PEFT adapts")
    try:
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
        from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING as REWRITTEN
    except ImportError:
        return True  # another PEFT: do not take the absence of tensors for its doing
    return PATTERNS.get(model_type) in REWRITTEN
