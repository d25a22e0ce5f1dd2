"""Targets that a family lacks, routers that PEFT puts among the parameters, layers that a model never calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_merge.cli import exits
from lora_merge.peft_rules.bypassed import BYPASSED
from tests.conftest import COMMON, VOCAB
from tests.parity.building import one_thread, perturb
from tests.tampering import edit_tensors

USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 3e-5  # as in test_families.py

UNTIED = {**COMMON, "tie_word_embeddings": False, "pad_token_id": 0}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16, "mamba_n_groups": 1,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**UNTIED, **LOCAL, "head_dim": 16, "sliding_window": 8}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", UNTIED),
    "Granite 4": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**UNTIED, **LOCAL, **MAMBA, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]},
    ),
    "Nemotron-H": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **UNTIED, "num_hidden_layers": 3, "layers_block_type": ["mamba", "moe", "attention"], "mamba_num_heads": 8,
            "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "head_dim": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40,
            "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        },
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**UNTIED, **LOCAL}),
    "LFM2": ("Lfm2ForCausalLM", "Lfm2Config", {**UNTIED, "layer_types": ["conv", "full_attention"]}),
    "HunYuan MoE": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {**UNTIED, "num_experts": 4, "moe_topk": 2, "head_dim": 16},
    ),
    "LongCat": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **UNTIED, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 16, "head_dim": 8, "ffn_hidden_size": 80, "expert_ffn_hidden_size": 40,
            "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2, "num_layers": 2,
        },
    ),
    "Jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **UNTIED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8,
        },
    ),
    "Jamba, experts only": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **UNTIED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_state": 16, "mamba_dt_rank": 8,
        },
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8, "time_step_rank": 4},
    ),
    "FalconMamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8, "time_step_rank": 4},
    ),
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(16).view(2, 8) * 5 % VOCAB
    with one_thread(), torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(name: str, root: Any) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[name][0]).from_pretrained(root, dtype="auto")


def trained(tmp_path: Any, name: str, **fields: Any) -> tuple[Any, Any, torch.Tensor]:
    """Return the directories of a base and an adapter, and what PEFT makes of both, unmerged."""
    import transformers

    architecture, config, sizes = FAMILIES[name]
    torch.manual_seed(3)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(load(name, tmp_path / "base"), LoraConfig(r=4, lora_alpha=6, **fields))
    perturb(peft_model, 0.1)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(peft_model)


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ["gpt-oss", "Phi-3", "Granite 4", "Nemotron-H", "Mixtral", "LFM2"])
def test_the_usual_seven_targets_are_right_for_a_family_that_lacks_some(name, cli, tmp_path):
    base, adapter, wanted = trained(tmp_path, name, target_modules=USUAL)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.output
    assert off_by(logits(load(name, base)), wanted) > 0.01
    assert off_by(logits(load(name, tmp_path / "out")), wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["HunYuan MoE", "LongCat"])
def test_all_linear_may_name_a_router_that_is_elsewhere(name, cli, tmp_path):
    """PEFT writes ``gate.weight`` into ``target_parameters``, and these families have no such parameter."""
    base, adapter, wanted = trained(tmp_path, name, target_modules="all-linear")
    assert "gate.weight" in (adapter / "adapter_config.json").read_text()

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.output
    assert "note: target_parameters: the base has no parameter called 'gate.weight'" in result.stderr
    assert off_by(logits(load(name, tmp_path / "out")), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("LongCat", "router.classifier"),
        ("Jamba", "mamba.dt_proj"),
        ("Mamba", "mixer.dt_proj"),
        ("FalconMamba", "mixer.dt_proj"),
    ],
)
def test_a_layer_that_the_model_never_calls_is_left_out(name, target, cli, tmp_path):
    """The model reads its weight, so the adapter has no effect in PEFT, and would have one when merged."""
    others = ["o_proj"] if name == "LongCat" else ["in_proj"]
    base, adapter, wanted = trained(tmp_path, name, target_modules=[target, *others])
    assert target in BYPASSED[load(name, base).config.model_type]

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.output
    assert f"{target}.weight: was left out: the model reads this layer's weight" in result.stderr
    assert off_by(logits(load(name, tmp_path / "out")), wanted) < TOLERANCE
    before, after = (load_file(root / "model.safetensors") for root in (base, tmp_path / "out"))
    same = [tensor for tensor in before if target in tensor]
    assert same
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in same)
    if name == "Jamba":
        proved = cli("verify", tmp_path / "out", "--forward")
        assert proved.exit_code == exits.OK, proved.output


def test_wavlm_reads_the_weights_of_its_attention():
    """The only family of the table that is no language model."""
    import transformers

    config = transformers.WavLMConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80, conv_dim=(32, 32),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.WavLMModel(config).eval()
    sound = torch.randn(1, 800)
    with torch.no_grad():
        plain = model(sound).last_hidden_state
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=list(BYPASSED["wavlm"])))
        perturb(peft_model, 0.3)
        assert torch.equal(peft_model(sound).last_hidden_state, plain)
        assert len(peft_model.targeted_module_names) == 4


def test_experts_that_peft_skips_today_and_trained_before_are_a_warning(cli, tmp_path):
    """Jamba has them one by one on disk and stacked in transformers 5, and PEFT does not rewrite the config for it."""
    base, adapter, wanted = trained(tmp_path, "Jamba, experts only", target_modules=USUAL)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.output
    assert (
        "warning: target_modules: 'gate_proj' names experts, and the adapter has no tensors" in result.stderr
    )
    assert off_by(logits(load("Jamba", tmp_path / "out")), wanted) < TOLERANCE


def test_a_layer_whose_experts_were_lost_is_missed(cli, tmp_path):
    base, adapter, _ = trained(
        tmp_path, "gpt-oss", target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]
    )

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1.mlp." in name]:
            del tensors[name]

    edit_tensors(adapter / "adapter_model.safetensors", change)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    words = "layers.1.mlp.experts.gate_up_proj: the config targets it, and the adapter has no tensors for it"
    assert words in result.stderr
    assert "2 problems" in result.stderr
