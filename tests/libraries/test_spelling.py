"""Whatever trainers put into the names of tensors, PEFT's own names come out."""

from __future__ import annotations

import pytest
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lora_merge.adapters.spelling import TUNERS, canonical
from lora_merge.core.tensor import TensorRef
from lora_merge.peft_rules.kinds import NATIVE, PEFT_LAYERS

Q = "model.layers.0.self_attn.q_proj"
P = f"base_model.model.{Q}"


def spelled(*names):
    refs = [TensorRef(name, "F32", (2, 2), "file", 16 * n, 16) for n, name in enumerate(names)]
    return canonical(refs, "file")


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (f"{P}.lora_A.mine.weight", f"{P}.lora_A.weight"),
        (f"{P}.lora_A.default.weight", f"{P}.lora_A.weight"),
        (f"{P}.lora_B.mine.bias", f"{P}.lora_B.bias"),
        (f"{P}.lora_embedding_A.mine", f"{P}.lora_embedding_A"),
        (f"{P}.lora_E.mine", f"{P}.lora_E"),
        (f"{P}.lora_magnitude_vector.mine.weight", f"{P}.lora_magnitude_vector.weight"),
        (f"{P}.hada_w1_a.mine", f"{P}.hada_w1_a"),
        (f"{P}.oft_R.mine.weight", f"{P}.oft_R.weight"),
        (f"{P}.trainable_tokens_delta.mine", f"{P}.trainable_tokens_delta"),
        ("base_model.vera_A.mine", "base_model.vera_A"),
        (f"_orig_mod.{P}.lora_A.weight", f"{P}.lora_A.weight"),
        (f"base_model.model._orig_mod.{Q}.lora_A.weight", f"{P}.lora_A.weight"),
        ("base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight", f"{P}.lora_A.weight"),
        (f"module.{P}.lora_A.weight", f"{P}.lora_A.weight"),
        (f"base_model.model.module.{Q}.lora_A.weight", f"{P}.lora_A.weight"),
        (f"base_model.model._fsdp_wrapped_module.{Q}.lora_A.weight", f"{P}.lora_A.weight"),
        (f"module._orig_mod.{P}.lora_A.mine.weight", f"{P}.lora_A.weight"),
    ],
)
def test_a_name_is_read_as_peft_spells_it(stored, wanted):
    (ref,), issues = spelled(stored)
    assert ref == TensorRef(wanted, "F32", (2, 2), "file", 0, 16)
    assert {issue.severity for issue in issues} <= {"note"}
    assert bool(issues) == (".default." not in stored)


@pytest.mark.parametrize(
    "name",
    [
        f"{P}.lora_A.weight",
        f"{P}.lora_B.bias",
        f"{P}.lora_embedding_A",
        f"{P}.lora_velora_embed.mine",
        f"{P}.lora_monteclora_sampler.mine.std",
        f"{P}.oft_R.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.module.lora_A.weight",
        "base_model.model.my_orig_mod.lora_A.weight",
        "base_model.frod_V.q_proj",
        f"{P}.glora_A.lora_A",
        "base_model.tinylora_v.0",
        "model.lora_tower.block.weight",
    ],
)
def test_a_name_without_an_adapters_stays_as_it_is(name):
    (ref,), issues = spelled(name)
    assert ref.name == name
    assert issues == []


def test_a_trained_module_loses_the_adapters_name_and_the_wrapper():
    refs, _ = spelled(f"{P}.lora_A.mine.weight", "base_model.model.score.modules_to_save.mine.dense.weight")
    assert refs[1].name == "base_model.model.score.dense.weight"


def test_a_trained_module_of_another_adapter_keeps_its_name():
    refs, _ = spelled(f"{P}.lora_A.mine.weight", "base_model.model.score.modules_to_save.yours.dense.weight")
    assert refs[1].name.endswith("score.modules_to_save.yours.dense.weight")


def test_every_type_of_peft_whose_tensors_may_carry_a_name_is_known():
    prefixes = {
        PEFT_TYPE_TO_PREFIX_MAPPING[kind].removesuffix("_").removesuffix("_lambda")
        for kind in PEFT_TYPE_TO_TUNER_MAPPING
        if kind.value in NATIVE | PEFT_LAYERS
    }
    assert prefixes - set(TUNERS) == {
        "lora", "frod", "glora", "ln_tuning", "osf", "peanut", "psoft", "tinylora", "vblora",
    }  # fmt: skip
    assert set(TUNERS) <= prefixes
