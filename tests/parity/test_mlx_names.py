"""mlx-lm's names: adapters written for its model classes and read back, family by family; and its configs of all ages."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from lora_merge.adapters.mlx_names import FAMILIES, MlxNameError, hf_name, mlx_name
from tests import twins
from tests.parity import family_building as building
from tests.tampering import edit_json, edit_tensors

LANGUAGE = r"(?!.*visual|.*vision|.*multi_modal).*\.({})"

CASES = {
    "Llama": ("q_proj|down_proj", "model.layers."),
    "Qwen3": ("q_proj|up_proj", "model.layers."),
    "GPT-2": ("c_attn|c_fc", "model.h."),
    "GPT-NeoX": ("query_key_value|dense_4h_to_h", "model.h."),
    "Mamba": ("in_proj|x_proj", "backbone.layers."),
    "Qwen2-VL": ("q_proj|down_proj", "language_model.model.layers."),
    "Qwen2.5-VL": ("q_proj|o_proj", "language_model.model.layers."),
    "Qwen3-VL": ("q_proj|up_proj", "language_model.model.layers."),
    "LLaVA": ("q_proj|v_proj", "language_model.model.layers."),
    "Gemma 3": ("q_proj|gate_proj", "language_model.model.layers."),
}
"""Family → the ends of what is adapted, and how mlx-lm calls its layers."""

EXPERTS = {
    "Mixtral": ("block_sparse_moe", "w1", "gate_proj"),
    "Phi-3.5-MoE": ("block_sparse_moe", "w3", "up_proj"),
    "Qwen3-MoE": ("mlp", "gate_proj", "gate_proj"),
    "DeepSeek-V3": ("mlp", "down_proj", "down_proj"),
    "Jamba": ("feed_forward", "up_proj", "up_proj"),
}
"""Family → the block of its experts, and a projection as published and in mlx-lm."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return where bases and adapters of this module lie."""
    return tmp_path_factory.mktemp("mlx-names")


def train(root, family_name, out, **fields):
    """Write a LoRA of PEFT with random factors; return what base and adapter compute."""
    from peft import LoraConfig, get_peft_model

    family = building.by_name(family_name)
    base = building.base(root, family_name, "published")
    model = get_peft_model(building.load(base, family), LoraConfig(r=4, lora_alpha=6, **fields))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(out)
    edit_json(out / "adapter_config.json", base_model_name_or_path=str(base))
    return base, building.compute(model, family)


@pytest.mark.parametrize("family_name", CASES)
def test_an_adapter_for_mlx_has_its_names_and_merges_to_what_base_and_adapter_compute(
    family_name, root, cli, tmp_path
):
    ends, start = CASES[family_name]
    base, wanted = train(root, family_name, tmp_path / "peft", target_modules=LANGUAGE.format(ends))
    made = cli("convert", tmp_path / "peft", "--format", "mlx", "--base", base, "--out", tmp_path / "mlx")
    assert made.exit_code == 0, made.output
    assert all(name.startswith(start) for name in load_file(tmp_path / "mlx" / "adapters.safetensors"))

    merged = cli("--base", base, "--adapter", tmp_path / "mlx", "--out", tmp_path / "out")

    assert merged.exit_code == 0, merged.output
    family = building.by_name(family_name)
    got = building.compute(building.load(tmp_path / "out", family), family)
    assert torch.allclose(got, wanted, rtol=0, atol=2e-5)


def test_an_adapter_of_mlx_becomes_one_that_peft_loads_under_its_own_names(root, cli, tmp_path):
    """Without the base nobody knows the family, so the base that the adapter names is looked at."""
    from peft import PeftModel

    base, wanted = train(root, "GPT-NeoX", tmp_path / "peft", target_modules=["query_key_value"])
    for source, options, out in (
        ("peft", ("--format", "mlx", "--base", base), "mlx"),
        ("mlx", ("--base", base), "again"),
    ):
        made = cli("convert", tmp_path / source, *options, "--out", tmp_path / out)
        assert made.exit_code == 0, made.output

    family = building.by_name("GPT-NeoX")
    again = PeftModel.from_pretrained(building.load(base, family), tmp_path / "again")
    assert torch.allclose(building.compute(again, family), wanted, rtol=0, atol=2e-5)


def test_names_that_are_not_plainly_hugging_faces_are_not_converted_without_the_base(cli, tmp_path):
    module = "model.h.0.attention.dense"
    adapter = lora(tmp_path / "mlx", {"rank": 4, "scale": 2.0}, module=module, fine_tune_type="lora")
    result = cli("convert", adapter, "--out", tmp_path / "peft")
    assert result.exit_code != 0
    assert "--base" in result.stderr


@pytest.mark.parametrize("family_name", EXPERTS)
def test_experts_have_the_names_of_mlx_and_of_the_base(family_name, root):
    block, published, theirs = EXPERTS[family_name]
    model_type = json.loads((building.base(root, family_name, "published") / "config.json").read_text())[
        "model_type"
    ]
    path = f"model.layers.1.{block}.experts.3.{published}"
    family = FAMILIES[model_type]
    assert mlx_name(path, family) == f"model.layers.1.{block}.switch_mlp.{theirs}"
    assert hf_name(f"model.layers.1.{block}.experts.3.{theirs}", family) == path


GPT = {
    "gpt2": "transformer.h.0.attn.c_attn",
    "gptj": "transformer.h.0.attn.q_proj",
    "gpt_neox": "gpt_neox.layers.0.attention.dense",
}
"""Families with other names than most."""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_go_to_mlx_and_back(model_type):
    family = FAMILIES[model_type]
    path = GPT.get(model_type, "model.layers.0.self_attn.q_proj")
    theirs = mlx_name(path, family)
    assert mlx_name(hf_name(theirs, family), family) == theirs
    assert (hf_name(theirs, family) == path) == (not theirs.startswith("language_model."))
    with pytest.raises(MlxNameError, match="loads only the language model"):
        mlx_name("model.vision_tower.layers.0.q_proj", family)


@pytest.mark.parametrize(
    ("family_name", "target", "said"),
    [
        ("DeepSeek-V3", "kv_b_proj", "mlx-lm splits kv_b_proj"),
        ("Falcon-H1", "q_proj", "a family whose module names in mlx-lm are not known"),
        ("Qwen3-VL", r".*visual.*\.qkv", "mlx-lm does not load"),
        ("Gemma 2", "embed_tokens", "one end of tied embeddings"),
    ],
)
def test_what_mlx_has_no_place_for_is_refused(family_name, target, said, root, cli, tmp_path):
    targets = target if "*" in target else [target]
    base, _ = train(root, family_name, tmp_path / "peft", target_modules=targets)
    result = cli("convert", tmp_path / "peft", "--format", "mlx", "--base", base, "--out", tmp_path / "mlx")
    assert result.exit_code == 4, result.output
    assert said in result.stderr
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
def test_one_end_of_a_tie_is_refused_and_both_ends_alike_are_one_embedding(
    targets, pico, pico_adapter, tampered, cli, tmp_path
):
    """mlx-lm uses the factors of a tied embedding at both ends; PEFT does where ensure_weight_tying is set."""
    base = pico("llama_tied", "float32")
    one, both = (
        tampered(pico_adapter(base, target_modules=targets, ensure_weight_tying=tying), f"tying-{tying}")
        for tying in (False, True)
    )
    for adapter in (one, both):
        edit_tensors(adapter / "adapter_model.safetensors", without_copies)
    options = ("--format", "mlx", "--base", base, "--out")

    refused = cli("convert", one, *options, tmp_path / "one")
    assert refused.exit_code == 4, refused.output
    assert "both ends" in refused.stderr

    made = cli("convert", both, *options, tmp_path / "both")
    assert made.exit_code == 0, made.output
    names = load_file(tmp_path / "both" / "adapters.safetensors")
    assert {name for name in names if "layers" not in name} == {
        "model.embed_tokens.lora_a", "model.embed_tokens.lora_b",
    }  # fmt: skip
    for source, out in ((both, "theirs"), (tmp_path / "both", "ours")):
        merged = cli("--base", base, "--adapter", source, "--out", tmp_path / out)
        assert merged.exit_code == 0, merged.output
    theirs, ours = (load_file(tmp_path / out / "model.safetensors") for out in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[name], ours[name], rtol=0, atol=1e-5) for name in ours)


LAST = "model.layers.1.self_attn.q_proj"


def without_copies(tensors):
    """Leave out the embeddings that PEFT saves along."""
    for name in [name for name in tensors if "lora_" not in name]:
        del tensors[name]


def lora(root, parameters, module=LAST, **fields):
    """Write a LoRA of one module of a tiny Llama as mlx-lm does, with a config of any age."""
    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{module}.lora_a": torch.randn(64, 4, generator=generator) * 0.1,
        f"{module}.lora_b": torch.randn(4, 64, generator=generator) * 0.1,
    }
    config = {"num_layers": 1, "lora_parameters": parameters, **fields}
    config = {name: value for name, value in config.items() if value is not ...}
    return twins.save(root, config, tensors, "adapters.safetensors")


OLD_DEFAULTS = {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"fine_tune_type": "lora"},
        {},
        {"fine_tune_type": "lora", "peft_type": "LORA", "task_type": "CAUSAL_LM"},
    ],
    ids=["a config since October 2024", "num_layers alone", "peft_type beside it"],
)
def test_an_alpha_that_no_release_of_its_time_read_is_not_read(fields, pico, cli, tmp_path):
    """mlx-lm's own loader does not look at peft_type either."""
    base = pico("llama", "float32")
    adapter = lora(tmp_path / "mlx", OLD_DEFAULTS, **fields)
    merged = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    name = LAST
    factors = load_file(adapter / "adapters.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    delta = 10.0 * (factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T
    wanted = before[f"{name}.weight"] + delta
    assert torch.allclose(after[f"{name}.weight"], wanted, rtol=0, atol=1e-5)


def test_an_alpha_of_a_time_that_nobody_can_tell_is_refused_with_both_scales(cli, pico, tmp_path):
    adapter = lora(tmp_path / "mlx", OLD_DEFAULTS, num_layers=..., lora_layers=1)
    result = cli("--base", pico("llama", "float32"), "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    said = re.sub(r"\s+", " ", result.stderr)
    assert "multiplied scale by alpha/rank until June 2024" in said
    assert "set scale to 10 x 16/4" in said


def vlm(root, **config):
    """Write an adapter as mlx-vlm did before it took over mlx-lm's format."""
    module = "language_model.model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{module}.A": torch.randn(64, 4, generator=generator) * 0.1,
        f"{module}.B": torch.randn(4, 64, generator=generator) * 0.1,
    }
    return twins.save(
        root, {"rank": 4, "alpha": 16, "dropout": 0.0, **config}, tensors, "adapters.safetensors"
    )


def test_an_adapter_of_mlx_vlm_needs_its_scale_said_and_then_merges(root, cli, tmp_path):
    base = building.base(root, "Qwen3-VL", "published")
    refused = cli("--base", base, "--adapter", vlm(tmp_path / "a"), "--out", tmp_path / "no")
    assert refused.exit_code == 4, refused.output
    said = re.sub(r"\s+", " ", refused.stderr)
    assert '"scale": 16 (until 0.4) or "scale": 4 (from 0.5 on)' in said

    adapter = vlm(tmp_path / "b", scale=4.0)
    merged = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert merged.exit_code == 0, merged.output
    a, b = load_file(adapter / "adapters.safetensors").values()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(after[name], before[name] + 4.0 * (a @ b).T, rtol=0, atol=1e-5)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]


def test_a_whole_training_of_a_family_that_mlx_stores_the_other_way_round_is_refused(root, cli, tmp_path):
    """GPT-2's attn.c_proj is square: its shape would not show it."""
    base = building.base(root, "GPT-2", "published")
    tensors = {"model.h.0.attn.c_proj.weight": torch.randn(64, 64)}
    config = {"fine_tune_type": "full", "num_layers": -1, "lora_parameters": {}}
    adapter = twins.save(tmp_path / "mlx", config, tensors, "adapters.safetensors")
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "stores the matrices of this family transposed" in result.stderr
