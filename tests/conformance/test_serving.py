"""Rules about engines: each is complete, and what it says a conversion cures, a conversion cures."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from lora_merge.conversion.writers.gguf.families import AROUND, FAMILIES
from lora_merge.serving import ENGINES, report
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.rules import Need
from lora_merge.serving.traits import TRAITS, Trait
from tests.tampering import edit_json, edit_tensors, to_pickles

of_every_engine = pytest.mark.parametrize("engine", ENGINES)
RULES = [(name, rule) for name, engine in ENGINES.items() for rule in engine.rules]

ADAPTERS = {
    "rslora": {"use_rslora": True},
    "regex": {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
    "listed-paths": {
        "target_modules": [
            f"model.layers.{n}.{path}" for n in (0, 1) for path in ("self_attn.q_proj", "mlp.down_proj")
        ]
    },
    "all-linear": {"target_modules": "all-linear"},
    "ranks-differ": {"rank_pattern": {"q_proj": 2}},
    "alphas-differ": {"alpha_pattern": {"q_proj": 3}},
    "some-layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "packed-parts": {"target_modules": ["q_proj", "k_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "pickle": {},
    "new-fields": {},
    "rank": {"r": 40},
}
"""An adapter for every trait of LoRA on a Llama that a conversion can do something about."""


@pytest.mark.parametrize(("verb", "flag"), [("inspect", "--engine"), ("convert", "--for")])
def test_the_engines_that_have_rules_are_those_that_can_be_named(verb, flag, tmp_path, cli):
    assert f"{flag} [{'|'.join(ENGINES)}]" in " ".join(cli(verb, "--help").output.split())
    refused = cli(verb, tmp_path, flag, "nobody")
    assert refused.exit_code == 2
    assert f"'nobody' is not one of {', '.join(map(repr, ENGINES))}\n" in refused.stderr


@pytest.mark.parametrize(("engine", "rule"), RULES, ids=[f"{name}-{rule.trait}" for name, rule in RULES])
def test_a_rule_says_what_happens_where_it_was_seen_and_what_helps(engine, rule):
    assert rule.trait in TRAITS
    assert rule.sentence[0].islower()
    assert rule.sentence[-1] not in ".:"
    assert any(word in rule.source for word in ("run", "read", "PEFT 0.14"))
    assert any(char.isdigit() for char in rule.source)
    assert set(rule.needs) <= set(get_args(Need))
    assert sum(other.trait == rule.trait for other in ENGINES[engine].rules) == 1


@of_every_engine
def test_an_engine_names_its_release(engine):
    assert any(char.isdigit() for char in ENGINES[engine].version)
    assert ENGINES[engine].ranks.source


@of_every_engine
def test_a_family_is_served_refused_or_not_known_and_never_two_of_them(engine):
    families = ENGINES[engine].families
    served, refused, unknown = map(set, (families.served, families.refused, families.unknown))
    assert served
    assert len(served | refused | unknown) == len(served) + len(refused) + len(unknown)
    assert any(char.isdigit() for char in families.source)
    for pattern in set(families.served.values()):
        re.compile(pattern)


def test_the_families_of_llama_cpp_are_those_that_its_files_are_written_for():
    written = set(FAMILIES) | {outer for outer, _ in AROUND}
    assert set(ENGINES["llamacpp"].families.served) == {
        name for name in written if not name.endswith("_vl_text")
    }


@of_every_engine
def test_a_family_that_no_table_knows_is_never_served(engine, pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico("llama", "float32"), "base")
    edit_json(base / "config.json", model_type="brand_new", architectures=["BrandNewForCausalLM"])
    adapter = pico_adapter(pico("llama", "float32"), target_modules=["q_proj", "k_proj", "v_proj"])
    found, traits = verdict(cli, engine, adapter, "--base", base)
    families = ENGINES[engine].families
    assert found == ("no" if families.is_complete or engine == "llamacpp" else "not known")
    assert "family" in traits


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_conversion_promises_nothing_for_a_family_that_is_not_known(
    engine, pico, pico_adapter, tampered, cli, tmp_path
):
    """transformers knows this class, and no engine's table does."""
    base = tampered(pico("llama", "float32"), "base")
    edit_json(base / "config.json", architectures=["BrandNewForCausalLM"])
    adapter = pico_adapter(pico("llama", "float32"), target_modules=["q_proj", "k_proj", "v_proj"])
    result = cli("convert", adapter, "--for", engine, "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "serves LoRA for BrandNewForCausalLM is not known" in result.stderr


UNSERVED = [
    ("vllm", "gpt2", {"target_modules": ["c_attn"]}),
    ("lmdeploy", "gpt2", {"target_modules": ["c_attn"]}),
    ("sglang", "gpt2", {"target_modules": ["c_attn"]}),
    ("tgi", "gpt2", {"target_modules": ["c_attn"]}),
]


@pytest.mark.parametrize(("engine", "family", "fields"), UNSERVED, ids=[case[0] for case in UNSERVED])
def test_a_family_without_lora_is_refused_by_inspect_and_by_a_conversion(
    engine, family, fields, pico, pico_adapter, cli, tmp_path
):
    base = pico(family, "float32")
    adapter = pico_adapter(base, **fields)
    found, traits = verdict(cli, engine, adapter, "--base", base)
    assert (found, "family" in traits) == ("no", True)
    result = cli("convert", adapter, "--for", engine, "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "does not serve LoRA for" in result.stderr
    assert not (tmp_path / "out").exists()


LAYER = "model.layers.0."
OF_FAMILIES = [
    ("tgi", "phi3", "Phi3ForCausalLM", f"{LAYER}mlp.gate_up_proj", "no"),
    ("tgi", "phi3", "Phi3ForCausalLM", f"{LAYER}self_attn.qkv_proj", "yes"),
    ("tgi", "starcoder2", "Starcoder2ForCausalLM", f"{LAYER}mlp.c_fc", "yes"),
    ("tgi", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense", "no"),
    ("tgi", "qwen3", "Qwen3ForCausalLM", f"{LAYER}self_attn.q_proj", "no"),
    ("tgi", "qwen2_vl", "Qwen2VLForConditionalGeneration", f"{LAYER}self_attn.q_proj", "not known"),
    ("lorax", "phi3", "Phi3ForCausalLM", f"{LAYER}mlp.gate_up_proj", "yes"),
    ("lorax", "mixtral", "MixtralForCausalLM", f"{LAYER}block_sparse_moe.gate", "no"),
    ("lorax", "falcon", "FalconForCausalLM", "transformer.h.0.self_attention.query_key_value", "no"),
    ("lorax", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense", "no"),
    ("lorax", "qwen3", "Qwen3ForCausalLM", f"{LAYER}self_attn.q_proj", "no"),
    ("lorax", "gpt2", "GPT2LMHeadModel", "transformer.h.0.attn.c_attn", "yes"),
    ("lmdeploy", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense", "no"),
    ("lmdeploy", "olmoe", "OlmoeForCausalLM", f"{LAYER}self_attn.q_proj", "no"),
    ("lmdeploy", "internlm2", "InternLM2ForCausalLM", f"{LAYER}attention.wqkv", "yes"),
    ("lmdeploy", "qwen3_next", "Qwen3NextForCausalLM", f"{LAYER}linear_attn.in_proj_qkvz", "no"),
    ("lmdeploy", "cogvlm", "CogVLMForCausalLM", f"{LAYER}self_attn.q_proj", "not known"),
    ("sglang", "internlm2", "InternLM2ForCausalLM", f"{LAYER}attention.wqkv", "no"),
    ("sglang", "qwen3_5", "Qwen3_5ForCausalLM", f"{LAYER}linear_attn.in_proj_qkv", "no"),
    ("sglang", "qwen3_vl", "Qwen3VLForConditionalGeneration", "model.visual.blocks.0.attn.qkv", "no"),
    ("sglang", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense", "not known"),
    ("vllm", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense", "yes"),
    ("vllm", "falcon", "FalconForCausalLM", "transformer.h.0.self_attention.query_key_value", "no"),
    ("vllm", "bloom", "BloomForCausalLM", "transformer.h.0.self_attention.query_key_value", "no"),
    ("vllm", "stablelm", "StableLmForCausalLM", f"{LAYER}self_attn.q_proj", "no"),
    ("vllm", "deepseek_v4", "DeepseekV4ForCausalLM", f"{LAYER}attn.wq_a", "not known"),
]
"""Engine, ``model_type`` and class of a base, a module, and what is said of LoRA on it."""


@pytest.mark.parametrize(("engine", "model_type", "name", "path", "said"), OF_FAMILIES)
def test_what_an_engine_serves_is_asked_family_by_family_and_module_by_module(
    engine, model_type, name, path, said
):
    trait = Trait("modules", "one module", paths=(path,))
    found = report(engine, [trait], "my-lora", family=BaseFamily(model_type, (name,)))
    assert found.verdict == said


STACKED = [
    ("Qwen3_5MoeForConditionalGeneration", "experts", "with an option"),
    ("Qwen3_5MoeForConditionalGeneration", "target-parameters", "yes"),
    ("Qwen3_5MoeForConditionalGeneration", "stacked-parts", "no"),
    ("GptOssForCausalLM", "experts", "with an option"),
    ("Qwen3VLMoeForConditionalGeneration", "experts", "with an option"),
    ("Qwen3MoeForCausalLM", "experts", "yes"),
    ("Qwen3MoeForCausalLM", "target-parameters", "no"),
]


@pytest.mark.parametrize(("name", "trait", "said"), STACKED)
def test_vllm_takes_experts_as_the_class_has_them(name, trait, said):
    found = report("vllm", [Trait(trait, "experts")], "my-lora", family=BaseFamily("any", (name,)))
    assert found.verdict == said


@pytest.mark.parametrize("named", ["LlamaForCausalLM", "GPT2LMHeadModel", None])
def test_without_a_base_the_class_that_peft_wrote_down_counts_and_a_name_does_not(
    named, pico, pico_adapter, tampered, cli
):
    adapter = tampered(pico_adapter(pico("llama"), target_modules=["q_proj", "k_proj", "v_proj"]))
    mapping = named and {"base_model_class": named, "parent_library": "transformers"}
    edit_json(
        adapter / "adapter_config.json",
        base_model_name_or_path="meta-llama/Llama-3.1-8B",
        auto_mapping=mapping,
    )
    expected = {
        "LlamaForCausalLM": "yes",
        "GPT2LMHeadModel": "no",
        None: "yes, if it serves the family",
    }[named]
    assert {verdict(cli, engine, adapter)[0] for engine in ("vllm", "sglang")} == {expected}


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["0.q", "0.k", "0.v", "1.q"], "no"),
        (["0.q", "0.v", "1.q", "1.v"], "yes"),
        (["0.q", "0.k", "0.v", "1.k"], "no"),
    ],
    ids=["one layer lacks v", "k is filled with zeros", "one layer lacks q"],
)
def test_sglang_packs_layer_by_layer(paths, said, pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "float32")
    targets = "|".join(
        rf"model\.layers\.{layer}\.self_attn\.{name}_proj"
        for layer, _, name in (path.partition(".") for path in paths)
    )
    adapter = pico_adapter(base, target_modules=targets)
    edited = tmp_path / "listed"
    assert cli("convert", adapter, "--expand-targets", "--out", edited).exit_code == 0
    _, traits = verdict(cli, "sglang", edited, "--base", base)
    assert ("packed-parts" in traits) == (said == "no")

    made = cli("convert", edited, "--for", "sglang", "--base", base, "--out", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert verdict(cli, "sglang", tmp_path / "out", "--base", base) == ("yes", set())


@pytest.mark.parametrize(("token", "said"), [(95, "yes"), (96, "no")], ids=["known", "beyond the vocabulary"])
def test_sglang_refuses_added_tokens_beyond_the_vocabulary(
    token, said, pico, pico_adapter, tampered, cli, tmp_path
):
    base = pico("llama", "float32")
    adapter = tampered(pico_adapter(base, target_modules=["q_proj", "k_proj", "v_proj"]))
    (adapter / "added_tokens.json").write_text(json.dumps({"<new>": token}))
    assert verdict(cli, "sglang", adapter, "--base", base)[0] == said
    assert cli(
        "convert", adapter, "--for", "sglang", "--base", base, "--out", tmp_path / "out"
    ).exit_code == (0 if said == "yes" else 4)


def verdict(cli, engine, adapter, *options):
    result = cli("inspect", adapter, "--engine", engine, "--json", *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["engines"]
    return found["verdict"], {one["trait"] for one in found["obstacles"]}


@of_every_engine
@pytest.mark.parametrize("trait", ADAPTERS)
def test_what_is_converted_for_an_engine_is_served_by_it(
    engine, trait, pico, pico_adapter, tampered, cli, tmp_path
):
    base = pico("llama", "float32")
    adapter = tampered(pico_adapter(base, **ADAPTERS[trait]))
    if trait == "pickle":
        to_pickles(adapter)
    if trait == "all-linear":  # PEFT saves it as a list
        edit_json(adapter / "adapter_config.json", target_modules="all-linear")
    before, traits = verdict(cli, engine, adapter, "--base", base)
    rules = ENGINES[engine].by_trait
    if trait in rules:
        assert before == "no"
        assert trait in traits

    lossy = ["--rank", 16] if trait in {"dora", "rank"} else []
    result = cli("convert", adapter, "--for", engine, "--base", base, *lossy, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.output
    if ENGINES[engine].format == "peft":
        assert verdict(cli, engine, tmp_path / "out", "--base", base) == ("yes", set())
    else:
        assert (tmp_path / "out" / "adapter.gguf").is_file()


@of_every_engine
@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"layer_replication": [[0, 2], [1, 2]]}], ids=["bias", "replicated"]
)
def test_what_no_conversion_cures_is_refused_for_every_engine(
    engine, fields, pico, pico_adapter, tampered, cli, tmp_path
):
    """Qwen2 has biases; on no engine does an adapter change them."""
    base = pico("qwen2", "float32")
    adapter = tampered(pico_adapter(base, **fields))
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: [tensors[name].add_(1) for name in tensors if name.endswith(".bias")],
    )
    before, _ = verdict(cli, engine, adapter)

    result = cli("convert", adapter, "--for", engine, "--base", base, "--rank", 16, "--out", tmp_path / "out")

    assert before == "no"
    assert result.exit_code == 4, result.output
    assert "merge" in result.stderr
    assert not (tmp_path / "out").exists()
