"""Tables of facts about PEFT and transformers, held against the installed versions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lora_merge.modeling.skeleton import CONV1D_MODEL_TYPES, build_skeleton, may_hold_conv1d
from lora_merge.peft_rules import kinds


@pytest.mark.parametrize("config_class", ["LoraConfig", "AdaLoraConfig", "TrainableTokensConfig"])
def test_every_field_of_pefts_configs_that_are_read_here_is_known(config_class):
    import peft

    known = kinds.IGNORED_FIELDS | kinds.READ_FIELDS | kinds.UNMERGEABLE_FIELDS.keys()
    assert {field.name for field in dataclasses.fields(getattr(peft, config_class))} <= known


def test_no_field_is_known_in_two_ways():
    refused = (
        frozenset(kinds.UNMERGEABLE_FIELDS),
        frozenset(kinds.RETIRED_FIELDS),
        frozenset(kinds.REQUANTISED_FIELDS),
    )
    tables = (kinds.IGNORED_FIELDS, kinds.READ_FIELDS, *refused)
    assert len(frozenset().union(*tables)) == sum(map(len, tables))


def test_every_type_of_peft_is_merged_or_is_called_unmergeable_and_no_other_is_named():
    from peft import PeftType

    tables = (kinds.NATIVE, kinds.PEFT_LAYERS, frozenset(kinds.NOT_IN_WEIGHTS))
    assert frozenset().union(*tables) == {kind.value for kind in PeftType} - {"BONE"}
    assert len(frozenset().union(*tables)) == sum(map(len, tables))


def test_every_type_of_peft_layers_has_a_tuner_in_peft():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    for name in kinds.PEFT_LAYERS:
        assert issubclass(PEFT_TYPE_TO_TUNER_MAPPING[name], BaseTuner), name


def test_the_types_that_decompose_are_of_peft_layers():
    assert kinds.DECOMPOSING.keys() <= kinds.PEFT_LAYERS


def inits_of_peft():
    """Return every value of ``init_lora_weights`` that PEFT's annotation names."""
    from typing import get_args, get_type_hints

    from peft import LoraConfig

    def values(hint):
        parts = get_args(hint)
        return {value for part in parts for value in values(part)} if parts else {hint}

    return values(get_type_hints(LoraConfig)["init_lora_weights"]) - {bool, str}


def test_every_initialisation_of_peft_leaves_the_base_alone_or_is_known_to_change_it():
    for init in inits_of_peft():
        changes = kinds.mutating_init({"peft_type": "LORA", "init_lora_weights": init}) is not None
        assert changes != (init in kinds.PLAIN_INITS), init
    assert len(inits_of_peft()) >= 8


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_is_known_by_how_it_begins(init):
    name = kinds.mutating_init({"peft_type": "LORA", "init_lora_weights": init})
    assert name in kinds.MUTATING_INITS.values()
    assert name.lower().replace("-", "_") in init.lower()


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
