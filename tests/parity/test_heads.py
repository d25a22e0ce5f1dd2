"""Classifiers and reward models that were trained on a model without their head.

The oracle is PEFT's forward pass on the class with the head, unmerged.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import COMMON
from tests.tampering import edit_json

if TYPE_CHECKING:
    from pathlib import Path

FLOAT32_TOLERANCE = 3e-5
TOKENS = torch.tensor([[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 2]])
DECODER = {**COMMON, "pad_token_id": 0}
BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 70,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "pad_token_id": 0}
T5 = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

BASES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": False}, ["q_proj"]),
    "tied Llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}, ["q_proj"]),
    "Llama, two labels": ("LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "num_labels": 2}, ["q_proj"]),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": False}, ["q_proj"]),
    "Mistral": ("MistralForCausalLM", "MistralConfig", DECODER, ["q_proj"]),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}, ["q_proj"]),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 16}, ["q_proj"]),
    "GPT-2 without a head": ("GPT2Model", "GPT2Config", GPT2, ["c_attn"]),
    "BERT, masked": ("BertForMaskedLM", "BertConfig", BERT, ["query"]),
    "BERT without a head": ("BertModel", "BertConfig", BERT, ["query"]),
    "RoBERTa, masked": ("RobertaForMaskedLM", "RobertaConfig", BERT, ["query"]),
    "DeBERTa, masked": ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT, ["query_proj"]),
    "ModernBERT, masked": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**BERT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        ["Wqkv"],
    ),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, ["q", "v"]),
    "ViT without a head": ("ViTModel", "ViTConfig", VIT, r".*(q_proj|query)"),
}  # fmt: skip

SEQUENCE, TOKEN, ANSWER = "SequenceClassification", "TokenClassification", "QuestionAnswering"
CASES: list[tuple[str, str, str | None, int, list[str] | None]] = [
    ("Llama", SEQUENCE, "SEQ_CLS", 1, None),
    ("Llama", SEQUENCE, "SEQ_CLS", 3, None),
    ("Llama", SEQUENCE, None, 3, ["score"]),
    ("Llama", TOKEN, "TOKEN_CLS", 5, None),
    ("tied Llama", SEQUENCE, "SEQ_CLS", 2, None),
    ("Llama, two labels", SEQUENCE, "SEQ_CLS", 2, None),
    ("Llama, two labels", SEQUENCE, "SEQ_CLS", 3, None),
    ("Qwen2", SEQUENCE, "SEQ_CLS", 3, None),
    ("Mistral", ANSWER, "QUESTION_ANS", 2, None),
    ("Mixtral", SEQUENCE, "SEQ_CLS", 3, None),
    ("Gemma", SEQUENCE, "SEQ_CLS", 3, None),
    ("GPT-2 without a head", SEQUENCE, "SEQ_CLS", 3, None),
    ("BERT without a head", SEQUENCE, "SEQ_CLS", 3, None),
    ("BERT, masked", TOKEN, "TOKEN_CLS", 5, None),
    ("BERT, masked", ANSWER, "QUESTION_ANS", 2, None),
    ("BERT, masked", SEQUENCE, "SEQ_CLS", 3, ["pooler"]),
    ("RoBERTa, masked", SEQUENCE, "SEQ_CLS", 3, None),
    ("DeBERTa, masked", TOKEN, "TOKEN_CLS", 3, None),
    ("ModernBERT, masked", SEQUENCE, "SEQ_CLS", 3, None),
    ("T5", TOKEN, "TOKEN_CLS", 3, None),
    ("T5", SEQUENCE, "SEQ_CLS", 3, ["classification_head"]),
    ("ViT without a head", "ImageClassification", None, 4, ["classifier"]),
]  # fmt: skip


def build_base(name: str, root: Path) -> Path:
    import transformers

    architecture, config, fields, _ = BASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(0.1)
    model.save_pretrained(root)
    return root


def auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, f"AutoModelFor{task}")


def compute(model: Any) -> torch.Tensor:
    image = {"pixel_values": torch.ones(2, 3, 16, 16)}
    with torch.no_grad():
        got = model.eval()(
            **(image if "ViT" in type(model).__name__ + str(model.config) else {"input_ids": TOKENS})
        )
    return torch.cat([value.flatten() for key, value in got.items() if key.endswith("logits")])


def train(
    base: Path, task: str, task_type: str | None, n_labels: int, saved: Any, targets: Any, out: Path
) -> Any:
    """Train an adapter and its head, and return what they compute unmerged."""
    from peft import LoraConfig, get_peft_model

    model = auto_class(task).from_pretrained(base, num_labels=n_labels, ignore_mismatched_sizes=True)
    torch.manual_seed(2)
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": targets,
        "task_type": task_type,
        "modules_to_save": saved,
    }
    model = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(out)
    return compute(model)


@pytest.mark.parametrize(("name", "task", "task_type", "n_labels", "saved"), CASES)
def test_the_output_is_of_the_class_with_the_head(name, task, task_type, n_labels, saved, merged, tmp_path):
    base = build_base(name, tmp_path / "base")
    wanted = train(base, task, task_type, n_labels, saved, BASES[name][3], tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    model, loading = auto_class(task).from_pretrained(out, output_loading_info=True)
    got = compute(model)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()
    assert {key: value for key, value in loading.items() if value} == {}
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert model.config.num_labels == n_labels


def test_verify_asks_a_classifier_that_answers_at_the_end_of_its_text(merged, cli, tmp_path):
    base = build_base("T5", tmp_path / "base")
    train(base, SEQUENCE, "SEQ_CLS", 3, ["classification_head"], ["q", "v"], tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    result = cli("verify", out, "--forward")
    assert result.exit_code == 0
    assert "outputs of the model (--forward)" in result.output


def test_inspect_has_no_ratio_for_a_head_that_the_base_lacks(classifier):
    import lora_merge

    base, adapter = classifier("Llama")
    found = lora_merge.inspect(adapter, base=base)
    ratios = {one.path: one.relative for one in found.modules}
    assert ratios.pop("score.weight") is None
    assert all(ratios.values())


def merge_classifier(base: Path, adapter: Path, cli: Any, tmp_path: Path) -> Any:
    return cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")


@pytest.fixture
def classifier(tmp_path):
    """Return a function (name) → base and adapter with three labels."""

    def build(name: str) -> tuple[Path, Path]:
        base = build_base(name, tmp_path / "base")
        train(base, SEQUENCE, "SEQ_CLS", 3, None, BASES[name][3], tmp_path / "adapter")
        return base, tmp_path / "adapter"

    return build


def test_labels_of_the_base_that_fit_are_kept(classifier, merged):
    base, adapter = classifier("Llama")
    labels = {
        "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
        "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    }
    edit_json(base / "config.json", **labels)
    config = json.loads((merged(base, adapter) / "config.json").read_text())
    assert {key: config[key] for key in labels} == labels


def test_a_part_of_the_head_that_was_drawn_at_random_and_is_lost_is_named(classifier, cli, tmp_path):
    result = merge_classifier(*classifier("BERT, masked"), cli, tmp_path)
    assert result.exit_code == 4
    assert "bert.pooler.dense.weight: BertForSequenceClassification needs this parameter" in result.output


def test_a_head_of_a_task_that_is_not_known_gets_a_way_out(classifier, cli, tmp_path):
    base, adapter = classifier("Llama")
    edit_json(adapter / "adapter_config.json", task_type=None, auto_mapping=None, modules_to_save=["score"])
    result = merge_classifier(base, adapter, cli, tmp_path)
    assert result.exit_code == 4
    assert "score.weight: is a trained head, and the base has no head" in result.output
    assert "SEQ_CLS" in result.output


def test_an_adapter_whose_head_is_lost_is_refused(classifier, cli, tmp_path):
    base, adapter = classifier("Llama")
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    result = merge_classifier(base, adapter, cli, tmp_path)
    assert result.exit_code == 4
    assert "task_type: is SEQ_CLS, the adapter file has no head" in result.output


def test_a_class_that_loads_nothing_of_the_base_is_refused(cli, tmp_path):
    # transformers 5.23 looks for "transformer.layers" here, and the language model has "model.layers".
    base = build_base("Llama", tmp_path / "base")
    train(base, ANSWER, "QUESTION_ANS", 2, None, ["q_proj"], tmp_path / "adapter")
    result = merge_classifier(base, tmp_path / "adapter", cli, tmp_path)
    assert result.exit_code == 4
    assert (
        "error: LlamaForQuestionAnswering: transformers would load none of the base's tensors"
        in result.output
    )
    assert "qa_outputs" not in result.output


def test_the_head_of_the_language_model_is_left_out_with_a_note(classifier, cli, tmp_path, stored):
    base, adapter = classifier("Llama")
    result = merge_classifier(base, adapter, cli, tmp_path)
    assert (
        "lm_head.weight: was left out: LlamaForSequenceClassification does not have this parameter"
        in result.output
    )
    assert stored(tmp_path / "out").keys() == stored(base).keys() - {"lm_head.weight"} | {"score.weight"}
