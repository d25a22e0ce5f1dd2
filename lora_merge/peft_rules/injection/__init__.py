"""PEFT's own layers, one module at a time: the merge of every kind of adapter that has no formula here.

PEFT injects the adapter into a model without weights (torch's meta device), so that all it does once for the
whole model is done: matching the targets, sizing and drawing what layers share. Only the layers themselves
are put off. Each is made, filled, merged and dropped again when its weights are loaded.
"""

from lora_merge.peft_rules.injection.ingredients import need_peft
from lora_merge.peft_rules.injection.injection import Injection
from lora_merge.peft_rules.injection.targets import (
    BIAS_TYPES,
    InjectionError,
    Target,
    parents,
    sort_by_module,
)

__all__ = ["BIAS_TYPES", "Injection", "InjectionError", "Target", "need_peft", "parents", "sort_by_module"]
