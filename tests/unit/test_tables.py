"""Tables of facts about PEFT and transformers, held against the installed versions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lora_merge import adapters
from lora_merge.core.skeleton import CONV1D_MODEL_TYPES, build_skeleton, may_hold_conv1d


def test_every_field_of_pefts_lora_config_is_known():
    from peft import LoraConfig

    known = adapters.IGNORED_FIELDS | adapters.READ_FIELDS
    known |= adapters.UNSUPPORTED_FIELDS.keys() | adapters.UNMERGEABLE_FIELDS.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


def test_every_type_that_is_called_unmergeable_is_one_of_pefts():
    from peft import PeftType

    assert set(adapters.NOT_IN_WEIGHTS) <= {kind.value for kind in PeftType}


def test_every_family_of_transformers_with_conv1d_layers_is_known():
    """Found by reading the modelling files, which is what the table was made from."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    models = Path(transformers.__file__).parent / "models"
    folders = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if re.search(r"=\s*Conv1D\(", file.read_text(encoding="utf-8"))
    }
    assert len(folders) >= 4
    types = {model_type for model_type in CONFIG_MAPPING_NAMES if model_type.replace("-", "_") in folders}
    types |= {"openai-gpt"}  # lives in the folder "openai"
    assert types <= CONV1D_MODEL_TYPES


def test_a_nested_family_with_conv1d_layers_is_seen():
    assert may_hold_conv1d({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}})
    assert not may_hold_conv1d({"model_type": "llama"})


def test_a_skeleton_tells_classes_ties_and_the_output_embedding(pico):
    import json

    skeleton = build_skeleton(json.loads((pico("gpt2") / "config.json").read_text()))

    assert skeleton is not None
    assert skeleton.classes["transformer.h.0.attn.c_proj"] == "Conv1D"
    assert skeleton.classes["lm_head"] == "Linear"
    assert skeleton.output_embedding == "lm_head"
    assert skeleton.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_a_model_that_transformers_does_not_know_has_no_skeleton():
    unknown = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    half_known = {"model_type": "llama", "architectures": ["SomebodysLlama"]}
    broken = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}

    assert [build_skeleton(config) for config in (unknown, half_known, broken)] == [None] * 3
