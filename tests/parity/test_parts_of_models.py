"""Adapters that were trained on a part of the base: a language model of a multimodal checkpoint, one of its models.

The oracle is PEFT's forward pass on that part, unmerged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.conftest import COMMON
from tests.parity.building import perturb

if TYPE_CHECKING:
    from pathlib import Path

FLOAT32_TOLERANCE = 3e-5
LEAST_EFFECT = 0.05
TOKENS = torch.tensor([[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 2]])
IMAGES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
QWEN35 = {
    **COMMON, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
ROPE_3D = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LLAMA4 = {
    "text_config": {
        **COMMON, "intermediate_size": 40, "intermediate_size_mlp": 80, "num_local_experts": 4, "head_dim": 16,
        "num_experts_per_tok": 1, "moe_layers": [1], "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip
THINKER = {
    "audio_config": {
        "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 40, "num_mel_bins": 8,
        "output_dim": 64, "max_source_positions": 16, "n_window": 4,
    },
    "vision_config": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "fullatt_block_indexes": [0],
    },
    "text_config": {**COMMON, "rope_parameters": ROPE_3D},
    "audio_token_index": 88, "image_token_index": 90, "video_token_index": 91,
}  # fmt: skip
QWEN25 = {**COMMON, "tie_word_embeddings": False, "rope_parameters": ROPE_3D}
QWEN25_TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "fullatt_block_indexes": [0], "patch_size": 4, "window_size": 16,
}  # fmt: skip
LLAVA = {
    "text_config": {**COMMON, "model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32,
    },
    "image_token_index": 95,
}  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "Qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": QWEN35, "vision_config": TOWER, **IMAGES},
        "AutoModelForCausalLM",
        "",
    ),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": {**QWEN35, **EXPERTS}, "vision_config": TOWER, **IMAGES},
        "AutoModelForCausalLM",
        "",
    ),
    "Llama 4": ("Llama4ForConditionalGeneration", "Llama4Config", LLAMA4, "AutoModelForCausalLM", ""),
    "Qwen2.5-Omni": (
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniConfig",
        {"thinker_config": THINKER, "enable_audio_output": False},
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "",
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": QWEN25, "vision_config": QWEN25_TOWER, **IMAGES},
        "Qwen2_5_VLForConditionalGeneration",
        "model.language_model",
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        LLAVA,
        "LlavaForConditionalGeneration",
        "model.language_model",
    ),
}
"""Architecture, config class, its fields; the class that is trained, and which of its modules."""

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": ("Qwen3.5", ATTENTION),
    "Qwen3.5, all linear layers": ("Qwen3.5", {"target_modules": "all-linear"}),
    "Qwen3.5, a path from the beginning": (
        "Qwen3.5",
        {"target_modules": r"model\.layers\.1\..*(q|down)_proj"},
    ),
    "Qwen3.5, the head": ("Qwen3.5", {"target_modules": ["q_proj", "lm_head"]}),
    "Qwen3.5, the last norm trained whole": ("Qwen3.5", {**ATTENTION, "modules_to_save": ["model.norm"]}),
    "Qwen3.5, tokens": ("Qwen3.5", {**ATTENTION, "trainable_token_indices": [1, 17]}),
    "Qwen3.5-MoE, experts": (
        "Qwen3.5-MoE",
        {**ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "Llama 4": ("Llama 4", ATTENTION),
    "Qwen2.5-Omni, the thinker": ("Qwen2.5-Omni", {"target_modules": r"model\.language_model.*(q|v)_proj"}),
    "Qwen2.5-VL, its language model alone, whose targets the tower has too": (
        "Qwen2.5-VL",
        {"target_modules": SEVEN},
    ),
    "LLaVA, its language model alone": ("LLaVA", {"target_modules": ["q_proj", "down_proj"]}),
}


def part_of(name: str, root: Path) -> Any:
    """Return the part of a checkpoint that is trained."""
    import transformers

    _, _, _, loader, path = MODELS[name]
    model = getattr(transformers, loader).from_pretrained(root)
    return (model.get_submodule(path) if path else model).eval()


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


def train(part: Any, out: Path, fields: dict[str, Any]) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(part, LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    perturb(model, 0.1)
    model.save_pretrained(out)
    return compute(model.eval())


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function (name) → directory of a multimodal checkpoint."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            import transformers

            architecture, config, fields, _, _ = MODELS[name]
            torch.manual_seed(1)
            model = getattr(transformers, architecture)(getattr(transformers, config)(**fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.2)
            built[name] = tmp_path_factory.mktemp("multimodal") / "base"
            model.save_pretrained(built[name])
        return built[name]

    return build


@pytest.mark.parametrize("case", CASES)
def test_the_part_computes_what_it_did_with_the_adapter_and_the_rest_is_copied(
    case, base, merged, stored, tmp_path
):
    name, fields = CASES[case]
    root = base(name)
    wanted = train(part_of(name, root), tmp_path / "adapter", fields)
    assert (compute(part_of(name, root)) - wanted).abs().max() > LEAST_EFFECT * wanted.abs().max()
    out = merged(root, tmp_path / "adapter")
    got = compute(part_of(name, out))
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()
    before, after = stored(root), stored(out)
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before if "vis" in key or "audio" in key)


def test_peft_layers_of_a_language_model(base, merged, tmp_path):
    from peft import LoHaConfig, get_peft_model

    root = base("Qwen3.5")
    torch.manual_seed(2)
    model = get_peft_model(
        part_of("Qwen3.5", root), LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"])
    )
    perturb(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    wanted = compute(model.eval())
    out = merged(root, tmp_path / "adapter")
    got = compute(part_of("Qwen3.5", out))
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()


def test_a_part_is_named_in_a_note(base, cli, tmp_path):
    root = base("Qwen3.5")
    train(part_of("Qwen3.5", root), tmp_path / "adapter", ATTENTION)
    result = cli("--base", root, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "the adapter was trained on a part of the base (Qwen3_5ForCausalLM)" in result.output


def test_names_that_fit_two_parts_are_not_guessed(base, cli, tmp_path):
    # Both models have layers.0.self_attn.k_proj, and here they are of one size.
    import transformers
    from peft import LoraConfig, get_peft_model

    text = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
    vision = {key: value for key, value in LLAVA["vision_config"].items() if key != "model_type"}
    root = tmp_path / "base"
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(root)
    model = transformers.CLIPModel.from_pretrained(root)
    adapter = tmp_path / "adapter"
    get_peft_model(model.text_model, LoraConfig(r=4, target_modules=["k_proj"])).save_pretrained(adapter)
    result = cli("--base", root, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "matches several modules (text_model or vision_model)" in result.output


def test_an_adapter_of_a_multimodal_model_is_refused_on_a_language_model(base, cli, tmp_path, pico):
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(base("LLaVA"))
    train(model, tmp_path / "adapter", {"target_modules": r".*language_model.*q_proj"})
    result = cli("--base", pico("llama"), "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "the adapter is for a multimodal model, and the base is only a language model" in result.output
