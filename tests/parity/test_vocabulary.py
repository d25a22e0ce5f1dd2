"""Added tokens, the standard way: the embeddings are resized, trained whole or row by row, and saved as PEFT saves them.

PEFT's forward pass is the oracle: base, resized, and adapter against the merged checkpoint in transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.core.checkpoint import ConfigPatch, patched_config
from lora_merge.planning.vocabulary import vocabulary_patch
from tests.conftest import VOCAB, write_tokenizer
from tests.parity import building
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from pathlib import Path

# As in test_kinds.py: the same model, with one product more.
FLOAT32_TOLERANCE = 1e-5

GROWN, SHRUNK = VOCAB + 4, VOCAB - 6
NEW = [VOCAB, VOCAB + 1, VOCAB + 3]
LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}


@dataclass(frozen=True, slots=True)
class Added:
    """How tokens were added: ``{input}`` and ``{head}`` in the fields stand for the two embeddings."""

    fields: dict[str, Any]
    size: int = GROWN
    kind: str = "LoraConfig"
    save: dict[str, Any] = field(default_factory=dict)
    """What PEFT's ``save_pretrained`` is told; by itself it saves copies of what was resized."""

    untied: bool = True
    """The two ends of a tie differ afterwards."""


WAYS: dict[str, Added] = {
    "both saved": Added({"modules_to_save": ["{input}", "{head}"]}),
    "both saved, without copies": Added(
        {"modules_to_save": ["{input}", "{head}"]}, save={"save_embedding_layers": False}
    ),
    "both saved, shrunk": Added({"modules_to_save": ["{input}", "{head}"]}, size=SHRUNK),
    "the input saved": Added({"modules_to_save": ["{input}"]}),
    "the head saved": Added({"modules_to_save": ["{head}"]}),
    "the input saved, LoRA on the head": Added(
        {"modules_to_save": ["{input}"], "target_modules": ["{layers}", "{head}"]}
    ),
    "the head saved, LoRA on the input": Added(
        {"modules_to_save": ["{head}"], "target_modules": ["{layers}", "{input}"]}
    ),
    "DoRA on both": Added({"target_modules": ["{layers}", "{input}", "{head}"], "use_dora": True}),
    "the input saved, kept tied": Added(
        {"modules_to_save": ["{input}"], "ensure_weight_tying": True}, untied=False
    ),
    "LoRA on the input, kept tied": Added(
        {"target_modules": ["{layers}", "{input}"], "ensure_weight_tying": True}, untied=False
    ),
    "rows": Added({"trainable_token_indices": [3, *NEW]}, untied=False),
    "rows, shrunk": Added({"trainable_token_indices": [3, 5]}, size=SHRUNK, untied=False),
    "rows of the input": Added({"trainable_token_indices": {"{input}": NEW}}, untied=False),
    "rows of both": Added({"trainable_token_indices": {"{input}": NEW, "{head}": NEW}}, untied=False),
    "other rows of each": Added({"trainable_token_indices": {"{input}": NEW, "{head}": [5, *NEW]}}),
    "nothing but layers": Added({}, untied=False),
    "LoHa, both saved": Added({"modules_to_save": ["{input}", "{head}"]}, kind="LoHaConfig"),
    "LoHa on layers": Added({}, kind="LoHaConfig", untied=False),
    "LoHa on the head, the input saved": Added(
        {"modules_to_save": ["{input}"], "target_modules": ["{layers}", "{head}"]}, kind="LoHaConfig"
    ),
    "LoKr on the head, shrunk": Added(
        {"target_modules": ["{layers}", "{head}"]}, size=SHRUNK, kind="LoKrConfig"
    ),
}
ENDS = {"gpt2": ("wte", "lm_head"), "t5": ("shared", "lm_head")}


def filled(value: Any, names: dict[str, Any]) -> Any:
    """Return the fields of a configuration with names of a family's own."""
    match value:
        case str():
            return names.get(value, value)
        case list():
            found = [filled(item, names) for item in value]
            return [one for item in found for one in (item if isinstance(item, list) else [item])]
        case dict():
            return {filled(key, names): filled(item, names) for key, item in value.items()}
    return value


def config_of(model: str, way: Added) -> Any:
    """Return PEFT's configuration of a way to add tokens to a model."""
    import peft

    layers = LAYERS.get(model, LAYERS["llama"])
    ends = ENDS.get(model, ("embed_tokens", "lm_head"))
    names = {"{input}": ends[0], "{head}": ends[1], "{layers}": layers}
    fields = {"target_modules": layers, **filled(way.fields, names)}
    if way.kind != "TrainableTokensConfig":
        fields |= {"r": 4, "lora_alpha" if way.kind == "LoraConfig" else "alpha": 6}
    return getattr(peft, way.kind)(**fields)


def resized(base: Path, model: str, size: int, seed: int) -> Any:
    """Return a base with another vocabulary, as transformers resizes it; a seed gives the new rows."""
    torch.manual_seed(seed)
    loaded = building.load(base, model)
    loaded.resize_token_embeddings(size, mean_resizing=False)
    return loaded


def answers(model: Any, name: str, size: int) -> torch.Tensor:
    """Return what a model makes of a prompt, with added tokens if there are any."""
    tokens = [1, 17, 5, 80, 33, 9, 62, 2, *NEW] if size > VOCAB else [1, 17, 5, 80, 33, 9, 62, 2]
    inputs = {"input_ids": torch.tensor([tokens])}
    if name.startswith("t5"):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    with building.one_thread(), torch.no_grad():
        return model.eval()(**inputs).logits


def trained(base: Path, model: str, way: Added, out: Path) -> torch.Tensor:
    """Write an adapter of a base with another vocabulary; return what the two compute."""
    from peft import get_peft_model

    tuned = get_peft_model(resized(base, model, way.size, seed=11), config_of(model, way))
    building.perturb(tuned, 0.1)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(out, **way.save)
    return answers(tuned, model, way.size)


def off_by(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("model", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_the_merged_model_has_the_tokens_that_were_added(way, model, workshop, merged, tmp_path):
    added = WAYS[way]
    if model == "gpt2" and (added.kind != "LoraConfig" or "kept tied" in way):
        pytest.skip("PEFT has no LoHa for Conv1D, and heeds ensure_weight_tying for embed_tokens only")
    if model == "llama" and way == "LoRA on the input, kept tied":
        pytest.skip("nothing is tied, and PEFT saves the input only")
    base = building.base(workshop, model, "float32")
    wanted = trained(base, model, added, tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    loaded = building.load_afresh(out, model)
    assert off_by(answers(loaded, model, added.size), wanted) <= FLOAT32_TOLERANCE
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == added.size
    assert config.get("tie_word_embeddings", True) is (model != "llama" and not added.untied)


@pytest.mark.parametrize("way", ["both saved", "rows", "the input saved, LoRA on the head"])
def test_a_base_that_was_resized_is_merged_as_the_published_one_is(way, workshop, merged, tmp_path):
    """Its new rows are others here: PEFT takes the adapter's, and says nothing; the merge says that they differ."""
    base = building.base(workshop, "llama_tied", "float32")
    wanted = trained(base, "llama_tied", WAYS[way], tmp_path / "adapter")
    again = resized(base, "llama_tied", GROWN, seed=5)
    again.save_pretrained(tmp_path / "resized")
    out = merged(tmp_path / "resized", tmp_path / "adapter")
    loaded = building.load_afresh(out, "llama_tied")
    assert off_by(answers(loaded, "llama_tied", GROWN), wanted) <= FLOAT32_TOLERANCE


def test_a_padded_vocabulary_is_counted_with_its_padding(workshop, merged, tmp_path):
    base = building.base(workshop, "llama", "float32")
    trained(base, "llama", Added(WAYS["both saved"].fields, size=104), tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 104


def test_the_level_of_the_text_model_counts_the_tokens(merged, tmp_path):
    """PEFT looks for vocab_size at the top only, so a trainer has to ask for what was resized."""
    base = tmp_path / "base"
    building.make("llava_tied").save_pretrained(base)
    way = Added(WAYS["both saved"].fields, save={"save_embedding_layers": True})
    wanted = trained(base, "llava_tied", way, tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == GROWN
    got = answers(building.load_afresh(out, "llava_tied"), "llava_tied", GROWN)
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("config", "levels"),
    [
        ({"model_type": "llama", "vocab_size": 32000}, {"vocab_size"}),
        ({"model_type": "llama"}, {"vocab_size"}),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, {"text_config.vocab_size"}),
        ({"model_type": "llava"}, {"text_config.vocab_size"}),
        (
            {"model_type": "llava", "vocab_size": 32000, "text_config": {"model_type": "llama"}},
            {"vocab_size", "text_config.vocab_size"},
        ),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 5}}, set()),
        ({"model_type": "of_remote_code", "llm_config": {"vocab_size": 32000}}, {"llm_config.vocab_size"}),
    ],
)
def test_a_size_is_written_where_it_is_said_and_where_it_is_a_default(config, levels):
    patch = vocabulary_patch(config, 32000, 32064)
    assert patch == dict.fromkeys(levels, 32064)
    for path in levels:
        level = patched_config(config, ConfigPatch(patch))
        for key in path.split("."):
            level = level[key]
        assert level == 32064


def test_rows_of_every_module_that_a_tie_holds_are_one(workshop, merged, tmp_path):
    """T5 reads one matrix at four places, and PEFT saves the trained rows of each."""
    way = Added({"token_indices": NEW, "target_modules": ["{input}"]}, kind="TrainableTokensConfig")
    base = building.base(workshop, "t5", "float32")
    wanted = trained(base, "t5", way, tmp_path / "adapter")
    assert {"encoder", "decoder"} <= {
        name.split(".")[2] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    got = answers(building.load_afresh(merged(base, tmp_path / "adapter"), "t5"), "t5", GROWN)
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


def test_rows_of_modules_that_a_tie_holds_may_not_differ(workshop, cli, tmp_path):
    way = Added({"token_indices": [3, 5], "target_modules": ["{input}"]}, kind="TrainableTokensConfig")
    base = building.base(workshop, "t5", "float32")
    trained(base, "t5", way, tmp_path / "adapter")
    name = "base_model.model.encoder.embed_tokens.trainable_tokens_delta"
    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", lambda tensors: tensors[name].mul_(2))
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "encoder.embed_tokens.weight: uses the same weight as shared.weight" in result.stderr


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["{layers}", "{input}"]}, {"modules_to_save": ["{input}"]}],
    ids=["LoRA", "saved"],
)
def test_one_of_the_modules_that_share_a_weight_is_no_change_of_that_weight(fields, workshop, cli, tmp_path):
    """PEFT wraps T5's shared, which the encoder and the decoder do not call: they keep the weight as it was."""
    base = building.base(workshop, "t5", "float32")
    wanted = trained(base, "t5", Added(fields, size=VOCAB), tmp_path / "adapter")
    options = ("--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--allow-untie")
    result = cli("--base", base, *options)
    assert result.exit_code == 0, result.output
    got = answers(building.load_afresh(tmp_path / "out", "t5"), "t5", VOCAB)
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


def test_copies_of_both_ends_of_a_tie_that_equal_the_base_change_nothing(workshop, merged, tmp_path):
    base = building.base(workshop, "llama_tied", "float32")
    way = Added({}, size=VOCAB, save={"save_embedding_layers": True})
    wanted = trained(base, "llama_tied", way, tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    assert (
        off_by(answers(building.load_afresh(out, "llama_tied"), "llama_tied", VOCAB), wanted)
        <= FLOAT32_TOLERANCE
    )
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_an_embedding_whose_new_rows_are_nowhere_is_refused(workshop, cli, tmp_path):
    """PEFT saves but the one that is a target, and cannot load its own file as it was."""
    base = building.base(workshop, "llama", "float32")
    trained(base, "llama", Added({"target_modules": ["{layers}", "{head}"]}), tmp_path / "adapter")
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert (
        "model.embed_tokens.weight: has 96 rows, lm_head.weight grows to 100, and the adapter does not have the 4 new rows"
        in result.stderr
    )
    assert "merge into the base that was resized before the training (--base)" in result.stderr


def test_an_embedding_that_the_adapter_leaves_out_shrinks_with_the_other(workshop, merged, tmp_path):
    base = building.base(workshop, "llama", "float32")
    way = Added({"target_modules": ["{layers}", "{head}"]}, size=SHRUNK)
    wanted = trained(base, "llama", way, tmp_path / "adapter")
    got = answers(building.load_afresh(merged(base, tmp_path / "adapter"), "llama"), "llama", SHRUNK)
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


def test_a_padding_token_that_a_smaller_vocabulary_has_no_row_for_is_refused(
    workshop, cli, tmp_path, tampered
):
    base = tampered(building.base(workshop, "llama", "float32"))
    trained(base, "llama", WAYS["both saved, shrunk"], tmp_path / "adapter")
    edit_json(base / "config.json", pad_token_id=VOCAB - 1, eos_token_id=VOCAB - 2)
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "pad_token_id: is 95 in config.json, and the vocabulary shrinks to 90 rows" in result.stderr


def test_another_base_shows_in_the_copy_that_the_adapter_has_of_it(workshop, cli, tmp_path, tampered):
    base = tampered(building.base(workshop, "llama", "float32"))
    trained(base, "llama", WAYS["both saved"], tmp_path / "adapter")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["model.embed_tokens.weight"][7].mul_(2))
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "from the training, and 1 of 96 rows differ from" in result.stderr
    assert "check that --base is the model that was trained" in result.stderr


def test_a_second_copy_that_differs_is_refused(workshop, cli, tmp_path):
    base = building.base(workshop, "llama", "float32")
    trained(base, "llama", WAYS["both saved"], tmp_path / "adapter")
    name = "base_model.model.lm_head.modules_to_save.weight"
    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", lambda tensors: tensors[name].mul_(2))
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert (
        f"{name}: is a second weight of its module, and differs from base_model.model.lm_head.weight"
        in result.stderr
    )


def test_only_the_untrained_half_of_a_saved_module_is_no_module(workshop, cli, tmp_path):
    base = building.base(workshop, "llama", "float32")
    trained(base, "llama", WAYS["both saved"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("base_model.model.lm_head.") or ".original_module." in name
    }
    save_file(kept, path, {"format": "pt"})
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert (
        "modules_to_save: has the entry 'lm_head', and no tensor in the file belongs to it" in result.stderr
    )


def test_the_bias_of_a_head_grows_with_it_wherever_it_is_stored(merged, tmp_path):
    """BERT stores it beside the head, as cls.predictions.bias."""
    import peft
    import transformers

    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB
    )
    torch.manual_seed(3)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    fields = {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "decoder"]}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**fields))
    building.perturb(tuned, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path / "base", tmp_path / "adapter")
    assert load_file(out / "model.safetensors")["cls.predictions.bias"].shape == (GROWN,)
    got = answers(transformers.BertForMaskedLM.from_pretrained(out), "bert", GROWN)
    assert off_by(got, answers(tuned, "bert", GROWN)) <= FLOAT32_TOLERANCE


def test_trained_rows_of_a_head_with_a_bias_are_refused(cli, tmp_path):
    """PEFT's forward pass leaves the bias out, so no checkpoint with it computes what was trained."""
    import peft
    import transformers

    config = transformers.PhiConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB
    )
    model = transformers.PhiForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}
    peft.get_peft_model(model, peft.LoraConfig(**fields)).save_pretrained(tmp_path / "adapter")
    write_tokenizer(tmp_path / "base")
    result = cli("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "lm_head.bias: PEFT ignores this bias in its forward pass" in result.stderr


def test_a_head_that_equals_the_trained_embedding_after_the_cast_keeps_the_tie(workshop, merged, tmp_path):
    base = building.base(workshop, "llama_tied", "bfloat16")
    way = Added({"modules_to_save": ["{input}"]}, size=VOCAB)
    trained(base, "llama_tied", way, tmp_path / "adapter")
    ends = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")

    def widen(tensors):
        tensors[ends[1]] = tensors[ends[0]].to(torch.bfloat16)
        tensors[ends[0]] = tensors[ends[0]].float() * (1 + 2**-12)  # less than half a step of bfloat16

    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", widen)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors[ends[0]].to(torch.bfloat16), tensors[ends[1]])
    out = merged(base, tmp_path / "adapter")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_a_copy_of_the_tied_embedding_is_left_out_for_an_engine(workshop, cli, tmp_path):
    """PEFT saves the head along where it is a target; a tied base stores it under the embedding's name."""
    base = building.base(workshop, "llama_tied", "float32")
    trained(
        base,
        "llama_tied",
        Added({"target_modules": ["{layers}", "{head}"]}, size=VOCAB),
        tmp_path / "adapter",
    )
    head = "base_model.model.lm_head.base_layer.weight"
    assert head in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    options = ("--for", "vllm", "--base", base, "--out", tmp_path / "out")
    result = cli("convert", tmp_path / "adapter", *options)
    assert result.exit_code == 0, result.output
    assert head not in load_file(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("way", ["both saved", "the input saved", "rows"])
def test_verify_compares_with_peft_where_the_file_has_second_copies(way, workshop, merged, cli, tmp_path):
    base = building.base(workshop, "llama_tied", "float32")
    trained(base, "llama_tied", WAYS[way], tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter")
    result = cli("verify", out, "--forward", "--json")
    assert result.exit_code == 0, result.output
    assert "compared with PEFT, unmerged" in result.stdout


@pytest.mark.parametrize("way", ["both saved", "the input saved", "rows"])
def test_a_converted_adapter_still_has_its_tokens(way, workshop, cli, tmp_path):
    from peft import PeftModel

    base = building.base(workshop, "llama_tied", "float32")
    wanted = trained(base, "llama_tied", WAYS[way], tmp_path / "adapter")
    options = ("--bake-scale", "--base", base, "--out", tmp_path / "converted")
    assert cli("convert", tmp_path / "adapter", *options).exit_code == 0
    again = resized(base, "llama_tied", GROWN, seed=5)
    got = answers(PeftModel.from_pretrained(again, tmp_path / "converted"), "llama_tied", GROWN)
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE
