"""Which weights ``--quantize`` takes, and which stay dense: on the module trees that transformers has."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from lora_merge.planning import join
from lora_merge.planning.ignoring import ignored_modules
from lora_merge.planning.quantising import targets_of
from lora_merge.planning.resolve import resolve_base
from lora_merge.planning.settings import Reading
from lora_merge.quantised.schemes import SCHEMES

FIELDS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYER = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)]
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
GPT2 = {"n_embd": 128, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 64}


def llama(**fields):
    return t.LlamaConfig(**{**FIELDS, **fields})


def llava():
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=llama())
    return t.LlavaForConditionalGeneration(config)


MODELS = {
    "llama": lambda: t.LlamaForCausalLM(llama()),
    "tied": lambda: t.LlamaForCausalLM(llama(tie_word_embeddings=True)),
    "narrow": lambda: t.LlamaForCausalLM(llama(intermediate_size=96)),
    "classifier": lambda: t.LlamaForSequenceClassification(llama(num_labels=128)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**FIELDS, **EXPERTS)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**FIELDS, num_local_experts=2)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**FIELDS, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "llava": llava,
}


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Return a function: kind of model → a base joined with no adapter."""
    found = {}

    def build(kind):
        if kind not in found:
            root = tmp_path_factory.mktemp(kind)
            MODELS[kind]().to(torch.bfloat16).save_pretrained(root)
            found[kind] = join(resolve_base(root), (), Reading())
        return found[kind]

    return build


def modules(targets):
    """Return the modules that are quantised."""
    return {name.removesuffix(".weight") for name in targets.weights}


def layers(names, prefix="model.layers", n=2):
    """Return the paths of some modules in each layer."""
    return {f"{prefix}.{layer}.{name}" for layer in range(n) for name in names}


def notes(targets):
    """Return the sentences of the issues, which are notes."""
    assert {issue.severity for issue in targets.issues} <= {"note"}
    return [issue.sentence for issue in targets.issues]


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_all_linear_layers_of_a_llama_are_quantised_and_the_head_is_not(joined, kind):
    targets = targets_of(joined(kind), SCHEMES["int4"])
    assert modules(targets) == layers(LAYER)
    # A tied head is a module without a tensor.
    assert targets.dense == ("lm_head",)
    assert targets.config["ignore"] == ["lm_head"]
    assert targets.issues == ()
    target = targets.weights["model.layers.1.mlp.down_proj.weight"]
    assert target.shape == (128, 256)
    assert target.parts["weight"] == ("model.layers.1.mlp.down_proj.weight_packed", "I32", (128, 32))
    assert target.mates == ()


def test_mates_are_the_weights_that_an_engine_fuses(joined):
    targets = targets_of(joined("llama"), SCHEMES["nvfp4"])
    path = "model.layers.0.self_attn"
    assert targets.weights[f"{path}.q_proj.weight"].mates == (
        f"{path}.k_proj.weight",
        f"{path}.v_proj.weight",
    )
    assert targets.weights["model.layers.0.mlp.up_proj.weight"].mates == (
        "model.layers.0.mlp.gate_proj.weight",
    )


def test_where_a_block_does_not_fit_the_mates_stay_dense_too(joined):
    targets = targets_of(joined("llama"), SCHEMES["fp8"])
    # k and v have 64 rows; q has 128, and is loaded with them.
    assert modules(targets) == layers(["self_attn.o_proj", *(f"mlp.{name}" for name in MLP)])
    assert set(targets.dense) == {"lm_head"} | layers([f"self_attn.{name}" for name in ATTENTION[:3]])
    assert targets.config["modules_to_not_convert"] == list(targets.dense)
    said = notes(targets)
    assert any(
        "4 weights not quantised, because each has 64 output features" in sentence for sentence in said
    )
    assert any("2 weights not quantised, because each is loaded together" in sentence for sentence in said)


def test_where_a_group_does_not_fit_that_module_stays_dense(joined):
    targets = targets_of(joined("narrow"), SCHEMES["int4"])
    assert modules(targets) == layers([name for name in LAYER if name != "mlp.down_proj"])
    (sentence,) = notes(targets)
    assert "has 96 input features, which is not a multiple of 128 (int4)" in sentence
    assert modules(targets_of(joined("narrow"), SCHEMES["int4-g32"])) == layers(LAYER)


def test_experts_are_quantised_and_routers_are_not(joined):
    targets = targets_of(joined("qwen3_moe"), SCHEMES["nvfp4"])
    experts = [f"mlp.experts.{n}.{name}" for n in range(4) for name in MLP]
    assert modules(targets) == layers([f"self_attn.{name}" for name in ATTENTION] + experts)
    assert targets.dense == ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    # Each expert has its own matrix of gate and up, and so its own scale.
    expert = "model.layers.0.mlp.experts.3"
    assert targets.weights[f"{expert}.up_proj.weight"].mates == (f"{expert}.gate_proj.weight",)
    assert any("is a router" in sentence for sentence in notes(targets))


def test_the_experts_of_a_layer_are_quantised_together(joined):
    targets = targets_of(joined("qwen3_moe"), SCHEMES["int8"], ["*.0.mlp.experts.1.down_proj"])
    assert not any("layers.0.mlp" in module for module in modules(targets))
    assert "model.layers.1.mlp.experts.1.down_proj" in modules(targets)
    # An engine asks about all of them at once.
    assert "model.layers.0.mlp.experts" in targets.dense
    assert "model.layers.0.mlp.experts.3.gate_proj" in targets.dense
    assert "model.layers.1.mlp.experts" not in targets.dense


def test_modules_with_two_names_are_left_dense_under_both(joined):
    targets = targets_of(joined("mixtral"), SCHEMES["mxfp4"])
    experts = [f"block_sparse_moe.experts.{n}.{name}" for n in range(2) for name in ("w1", "w2", "w3")]
    assert modules(targets) == layers([f"self_attn.{name}" for name in ATTENTION] + experts)
    gates = layers(["block_sparse_moe.gate", "mlp.gate"])
    assert set(targets.dense) == {"lm_head"} | gates
    expert = "model.layers.0.block_sparse_moe.experts.1"
    assert targets.weights[f"{expert}.w3.weight"].mates == (f"{expert}.w1.weight",)


def test_stacks_of_experts_stay_dense(joined):
    targets = targets_of(joined("gpt_oss"), SCHEMES["mxfp8"])
    assert modules(targets) == layers([f"self_attn.{name}" for name in ATTENTION])
    assert layers(["mlp.experts", "mlp.router"]) < set(targets.dense)
    assert any("stack of experts" in sentence for sentence in notes(targets))


def test_towers_stay_dense(joined):
    targets = targets_of(joined("llava"), SCHEMES["fp8-channel"])
    assert modules(targets) == layers(LAYER, "language_model.model.layers")
    dense = set(targets.dense)
    assert {"lm_head", "language_model.lm_head"} < dense
    for name in ("self_attn.q_proj", "mlp.fc1"):
        path = f"vision_tower.encoder.layers.0.{name}"
        assert {path, f"model.{path}"} < dense
    assert {"multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"} < dense
    # Convolutions and embeddings are no linear layers, so that nobody would quantise them.
    assert not any("embed" in name for name in dense)


def test_a_head_of_another_task_stays_dense(joined):
    targets = targets_of(joined("classifier"), SCHEMES["fp8-channel"])
    assert modules(targets) == layers(LAYER)
    assert "score" in targets.dense


def test_conv1d_is_refused(joined):
    (issue,) = targets_of(joined("gpt2"), SCHEMES["fp8"]).issues
    assert (issue.severity, issue.code) == ("error", "unsupported")
    assert "Conv1D" in issue.sentence


def test_an_output_of_which_nothing_would_be_quantised_is_refused(joined):
    targets = targets_of(joined("llama"), SCHEMES["int4"], ["*"])
    issue = targets.issues[0]
    assert (issue.severity, issue.code) == ("error", "quantize")
    assert "no linear layer" in issue.sentence
    assert targets.weights == {}


def test_a_base_that_is_quantised_already_is_decoded_first():
    from tests.storages.reference import FIXTURES

    base = resolve_base(FIXTURES / "ct-int4")
    targets = targets_of(join(base, (), Reading()), SCHEMES["int8"])
    coded = {name for name, weight in base.weights.items() if weight.plain is None}
    assert len(coded) == 7 * base.config["num_hidden_layers"]
    assert targets.weights.keys() == coded
    assert [issue for issue in targets.issues if issue.severity == "error"] == []


@pytest.mark.parametrize(
    ("patterns", "gone"),
    [
        (["*.0.mlp.down_proj"], {"model.layers.0.mlp.down_proj"}),
        (["*.mlp.down_proj"], layers(["mlp.down_proj"])),
        (["model.layers.[1-9].self_attn.o_proj"], {"model.layers.1.self_attn.o_proj"}),
        (["re:.*layers\\.1\\..*o_proj"], {"model.layers.1.self_attn.o_proj"}),
        (
            ["*.0.self_attn.*", "*.1.mlp.up_proj"],
            {
                *(f"model.layers.0.self_attn.{name}" for name in ATTENTION),
                "model.layers.1.mlp.up_proj",
                "model.layers.1.mlp.gate_proj",
            },
        ),
        # It is dense as it is, and may be named.
        (["lm_head"], set()),
    ],
    ids=["one", "each layer", "a class", "a regex", "several", "the head"],
)
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_ignored_modules_stay_dense(joined, kind, patterns, gone):
    targets = targets_of(joined(kind), SCHEMES["fp8-channel"], patterns)
    assert layers(LAYER) - modules(targets) == gone
    assert set(targets.dense) == {"lm_head"} | gone


@pytest.mark.parametrize(
    ("pattern", "sentence", "hint"),
    [
        ("o_proj", "matches no module", "patterns must match whole names: '*.o_proj'"),
        ("model.layers.1.mlp.dwn_proj", "matches no module", "did you mean model.layers.1.mlp.down_proj"),
        ("xyz", "matches no module", "only linear layers can be named"),
        ("re:.*(", "is not a regular expression", "correct --ignore"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(joined, pattern, sentence, hint):
    targets = targets_of(joined("llama"), SCHEMES["int8"], [pattern])
    (issue,) = targets.issues
    assert (issue.severity, issue.subject) == ("error", pattern)
    assert sentence in issue.sentence
    assert hint in issue.hint


def test_either_spelling_of_a_module_can_be_ignored():
    found, issues = ignored_modules(
        ["model.mlp.gate"], {"model.moe.gate": ("model.moe.gate", "model.mlp.gate")}
    )
    assert found == {"model.moe.gate"}
    assert not issues


def test_a_model_without_a_class_is_known_by_names(tmp_path):
    import json

    MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = join(resolve_base(tmp_path), (), Reading())
    assert base.skeleton is None
    targets = targets_of(base, SCHEMES["int4"])
    assert modules(targets) == layers(LAYER)
    assert targets.dense == ("lm_head",)
