"""Tied embeddings: each end becomes what the adapter's forward pass makes of it, and both stay one if they can.

PEFT's merge adds to what the two ends share, so its forward pass is the oracle here, and that is first compared
with the two ends worked out by hand. E is the matrix that they share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import building
from tests.parity.kinds import Kind

# As in test_kinds.py: the same model, with one product more.
FLOAT32_TOLERANCE = 1e-5
LEAST_EFFECT = 0.05

FACTORS = {"r": 4, "lora_alpha": 6}
SCALE = 6 / 4
LAYERS = {**FACTORS, "target_modules": ["q_proj", "down_proj"]}
INPUT, OUTPUT = "base_model.model.model.embed_tokens", "base_model.model.lm_head"

Tensors = dict[str, torch.Tensor]
Ends = Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, torch.Tensor]]


def input_delta(tensors: Tensors) -> torch.Tensor:
    """Return (B·A)ᵀ·s of an adapter on the embedding."""
    return (tensors[f"{INPUT}.lora_embedding_B"] @ tensors[f"{INPUT}.lora_embedding_A"]).T * SCALE


def output_delta(tensors: Tensors) -> torch.Tensor:
    """Return B·A·s of an adapter on the output embedding."""
    return tensors[f"{OUTPUT}.lora_B.weight"] @ tensors[f"{OUTPUT}.lora_A.weight"] * SCALE


def with_rows(shared: torch.Tensor, rows: list[int], tensors: Tensors, end: str) -> torch.Tensor:
    """Return the matrix with trained rows in their places."""
    replaced = shared.clone()
    replaced[rows] = tensors[f"{end}.token_adapter.trainable_tokens_delta"]
    return replaced


def with_norms(directions: torch.Tensor, magnitudes: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the matrix with the magnitudes of DoRA: of its rows (dim 1) or its columns (dim 0)."""
    return directions / directions.norm(dim=dim, keepdim=True) * magnitudes.unsqueeze(dim)


@dataclass(frozen=True, slots=True)
class Tied:
    """An adapter that touches a tied embedding."""

    fields: dict[str, Any]
    """Of its ``LoraConfig``."""

    ends: Ends
    """(E, the adapter's tensors) → the embedding and the output embedding that its forward pass has."""

    parts: bool
    """The two ends are no longer the same."""

    def kind(self, model: str = "llama_tied") -> Kind:
        """Return it as something that can be built."""
        return Kind(repr(self.fields), "LoRA family", "LORA", "LoraConfig", self.fields, (model,))


TOKENS = [1, 17, 80]
OTHERS = [5, 33]

CASES: dict[str, Tied] = {
    "lora_on_the_embedding": Tied(
        {**FACTORS, "target_modules": ["q_proj", "embed_tokens"]},
        lambda shared, tensors: (shared + input_delta(tensors), shared),
        parts=True,
    ),
    "lora_on_the_output": Tied(
        {**FACTORS, "target_modules": ["q_proj", "lm_head"]},
        lambda shared, tensors: (shared, shared + output_delta(tensors)),
        parts=True,
    ),
    "lora_on_both": Tied(
        {**FACTORS, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        lambda shared, tensors: (shared + input_delta(tensors), shared + output_delta(tensors)),
        parts=True,
    ),
    # PEFT adds the other end by itself, with the same factors transposed: one delta, at both ends.
    "lora_on_the_embedding_kept_tied": Tied(
        {**FACTORS, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        lambda shared, tensors: (shared + input_delta(tensors),) * 2,
        parts=False,
    ),
    "lora_on_the_output_kept_tied": Tied(
        {**FACTORS, "target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        lambda shared, tensors: (shared + output_delta(tensors),) * 2,
        parts=False,
    ),
    "dora_on_both": Tied(
        {**FACTORS, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
        lambda shared, tensors: (
            with_norms(shared + input_delta(tensors), tensors[f"{INPUT}.lora_magnitude_vector"], 0),
            with_norms(shared + output_delta(tensors), tensors[f"{OUTPUT}.lora_magnitude_vector"], 1),
        ),
        parts=True,
    ),
    # A list means the embedding, and the output that is tied to it follows.
    "tokens": Tied(
        {**LAYERS, "trainable_token_indices": TOKENS},
        lambda shared, tensors: (with_rows(shared, TOKENS, tensors, INPUT),) * 2,
        parts=False,
    ),
    "tokens_of_the_embedding": Tied(
        {**LAYERS, "trainable_token_indices": {"embed_tokens": TOKENS}},
        lambda shared, tensors: (with_rows(shared, TOKENS, tensors, INPUT),) * 2,
        parts=False,
    ),
    "the_same_tokens_of_both": Tied(
        {**LAYERS, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
        lambda shared, tensors: (with_rows(shared, TOKENS, tensors, INPUT),) * 2,
        parts=False,
    ),
    "other_tokens_of_each": Tied(
        {**LAYERS, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": OTHERS}},
        lambda shared, tensors: (
            with_rows(shared, TOKENS, tensors, INPUT),
            with_rows(shared, OTHERS, tensors, OUTPUT),
        ),
        parts=True,
    ),
    "tokens_of_the_output": Tied(
        {**LAYERS, "trainable_token_indices": {"lm_head": OTHERS}},
        lambda shared, tensors: (shared, with_rows(shared, OTHERS, tensors, OUTPUT)),
        parts=True,
    ),
    "a_saved_output": Tied(
        {**LAYERS, "modules_to_save": ["lm_head"]},
        lambda shared, tensors: (shared, tensors[f"{OUTPUT}.weight"]),
        parts=True,
    ),
    "a_saved_embedding": Tied(
        {**LAYERS, "modules_to_save": ["embed_tokens"]},
        lambda shared, tensors: (tensors[f"{INPUT}.weight"], shared),
        parts=True,
    ),
    "both_saved": Tied(
        {**LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
        lambda shared, tensors: (tensors[f"{INPUT}.weight"], tensors[f"{OUTPUT}.weight"]),
        parts=True,
    ),
    "both_saved_kept_tied": Tied(
        {**LAYERS, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        lambda shared, tensors: (tensors[f"{INPUT}.weight"],) * 2,
        parts=False,
    ),
    "a_saved_output_kept_tied": Tied(
        {**LAYERS, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        lambda shared, tensors: (tensors[f"{INPUT}.weight"],) * 2,
        parts=False,
    ),
}
every_case = pytest.mark.parametrize("tied", CASES.values(), ids=CASES.keys())
every_parting_case = pytest.mark.parametrize(
    "tied", [tied for tied in CASES.values() if tied.parts], ids=[n for n, t in CASES.items() if t.parts]
)


def tensors_of(adapter) -> Tensors:
    """Return the adapter's tensors."""
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def untied(model: Any) -> Any:
    """Return the same model, with an output embedding of its own."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def ties(root):
    """Return every ``tie_word_embeddings`` of a config, at whatever level."""

    def walk(table):
        for key, value in table.items():
            if key == "tie_word_embeddings":
                yield value
            elif isinstance(value, dict):
                yield from walk(value)

    return list(walk(json.loads((root / "config.json").read_text())))


@every_case
def test_pefts_forward_pass_has_the_two_ends_that_are_expected(tied, workshop):
    case = building.case(workshop, tied.kind(), "llama_tied", "float32")
    shared = case.plain().lm_head.weight.detach()
    ends = tied.ends(shared, tensors_of(case.adapter))
    by_hand = untied(case.unmerged().merge_and_unload())  # right in the layers; the ends are set here
    by_hand.model.embed_tokens.weight = torch.nn.Parameter(ends[0])
    by_hand.lm_head.weight = torch.nn.Parameter(ends[1])
    wanted = building.compute(case.unmerged(), "llama_tied")
    assert off_by(building.compute(by_hand, "llama_tied"), wanted) <= FLOAT32_TOLERANCE
    assert torch.equal(*ends) is not tied.parts


@every_case
def test_the_merged_model_computes_what_base_and_adapter_compute(tied, workshop, merged):
    case = building.case(workshop, tied.kind(), "llama_tied", "float32")
    wanted = building.compute(case.unmerged(), "llama_tied")
    assert off_by(building.compute(case.plain(), "llama_tied"), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter)
    loaded = building.load_afresh(out, "llama_tied")
    assert off_by(building.compute(loaded, "llama_tied"), wanted) <= FLOAT32_TOLERANCE
    shares = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shares is not tied.parts


@every_case
def test_the_ends_are_untied_in_the_files_only_where_they_differ(tied, workshop, merged, stored):
    case = building.case(workshop, tied.kind(), "llama_tied", "float32")
    out = merged(case.base, case.adapter)
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    if tied.parts:
        assert ties(out)
        assert not any(ties(out))
        assert stored(out).keys() == stored(case.base).keys() | both
    else:
        assert ties(out) == ties(case.base)
        assert stored(out).keys() == stored(case.base).keys()


LORA_OR_SAVED = [name for name, tied in CASES.items() if tied.parts and "tokens" not in name]


@pytest.mark.parametrize("name", LORA_OR_SAVED)
def test_each_end_has_the_bits_of_pefts_merge_into_a_model_that_was_untied_before(
    name, workshop, merged, stored, tmp_path
):
    from peft import PeftModel

    case = building.case(workshop, CASES[name].kind(), "llama_tied", "bfloat16")
    by_peft = PeftModel.from_pretrained(untied(case.plain()), case.adapter).merge_and_unload()
    by_peft.save_pretrained(tmp_path / "by-peft")
    got, wanted = stored(merged(case.base, case.adapter)), stored(tmp_path / "by-peft")
    assert sorted(got) == sorted(wanted)
    assert [tensor for tensor in wanted if got[tensor] != wanted[tensor]] == []


TOKENS_ALONE = Kind(
    "trainable tokens alone, tied",
    "whole parameters",
    "TRAINABLE_TOKENS",
    "TrainableTokensConfig",
    {"token_indices": TOKENS, "target_modules": ["embed_tokens"]},
    ("llama_tied",),
)


def test_trainable_tokens_alone_keep_both_ends_tied(workshop, merged, stored):
    case = building.case(workshop, TOKENS_ALONE, "llama_tied", "float32")
    assert f"{OUTPUT}.trainable_tokens_delta" in tensors_of(case.adapter)  # the same rows, saved twice
    wanted = building.compute(case.unmerged(), "llama_tied")
    assert off_by(building.compute(case.plain(), "llama_tied"), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter)
    got = building.compute(building.load_afresh(out, "llama_tied"), "llama_tied")
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE
    assert ties(out) == ties(case.base)
    assert stored(out).keys() == stored(case.base).keys()


def test_a_tie_is_taken_back_at_every_level_of_the_config(workshop, merged):
    kind = Tied({**FACTORS, "target_modules": ["q_proj", "lm_head"]}, lambda *_: _, parts=True).kind(
        "llava_tied"
    )
    case = building.case(workshop, kind, "llava_tied", "float32")
    assert ties(case.base) == [True, True]
    wanted = building.compute(case.unmerged(), "llava_tied")
    assert off_by(building.compute(case.plain(), "llava_tied"), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter)
    assert ties(out) == [False, False]
    got = building.compute(building.load_afresh(out, "llava_tied"), "llava_tied")
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


TOUCHED: dict[str, dict[str, Any]] = {
    "the head": {**FACTORS, "target_modules": ["q_proj", "lm_head"]},
    "the embedding": {**FACTORS, "target_modules": ["q_proj", "embed_tokens"]},
    "the head, trained whole": {**LAYERS, "modules_to_save": ["lm_head"]},
    "tokens": {**LAYERS, "trainable_token_indices": TOKENS},
    "both alike": {**LAYERS, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("names", ["of today", "as published"])
@pytest.mark.parametrize("touched", TOUCHED)
def test_a_tie_under_published_names(touched, names, workshop, cli, tmp_path):
    """Embedding and head of LLaVA have other names on disk than in the model, and so may the adapter's have."""
    kind = Tied(TOUCHED[touched], lambda *_: _, parts=True).kind("llava_tied")
    case = building.case(workshop, kind, "llava_tied", "float32")
    wanted = building.compute(case.unmerged(), "llava_tied")
    assert off_by(building.compute(case.plain(), "llava_tied"), wanted) > LEAST_EFFECT
    base, adapter = tmp_path / "base", case.adapter
    building.make("llava_tied").save_pretrained(base)
    before = load_file(base / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in before
    if names == "as published":
        adapter = tmp_path / "adapter"
        shutil.copytree(case.adapter, adapter)
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(
            {published_name(name): t for name, t in tensors.items()}, adapter / "adapter_model.safetensors"
        )
        path = adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = [name for name in config["target_modules"] if "." not in name]
        saved = config["modules_to_save"]
        config["modules_to_save"] = saved and sorted({name.rpartition(".")[2] for name in saved})
        path.write_text(json.dumps(config))
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    got = building.compute(building.load_afresh(out, "llava_tied"), "llava_tied")
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE
    added = load_file(out / "model.safetensors").keys() - before.keys()
    still_one = touched in {"tokens", "both alike"}
    assert added == (set() if still_one else {"language_model.lm_head.weight"})
    assert ties(out) == [still_one] * 2


def published_name(name: str) -> str:
    """Return what a tensor of a LLaVA adapter was called when it was trained with transformers 4."""
    name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    name = name.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.")
    return name.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")


HARD_TIED = ("gemma", "gemma2", "cohere", "t5")
"""Engines tie these whatever the config says; T5's forward pass depends on the flag."""


def output_adapter(family, workshop):
    """Return a base of a family, and an adapter on its output embedding."""
    fields = {**FACTORS, "target_modules": ["lm_head"]}
    kind = Kind(f"{family}: lm_head", "LoRA family", "LORA", "LoraConfig", fields, (family,))
    return building.case(workshop, kind, family, "float32")


@pytest.mark.parametrize("family", HARD_TIED)
def test_a_family_that_engines_always_tie_is_refused(family, workshop, cli, tmp_path):
    case = output_adapter(family, workshop)
    result = cli("--base", case.base, "--adapter", case.adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert family in result.output.replace(str(case.base), "")
    assert "--allow-untie" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma", "gemma2", "cohere"])
def test_it_is_untied_all_the_same_for_who_serves_it_with_transformers(family, workshop, merged):
    case = output_adapter(family, workshop)
    wanted = building.compute(case.unmerged(), family)
    assert off_by(building.compute(case.plain(), family), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter, "--allow-untie")
    assert not any(ties(out))
    assert off_by(building.compute(building.load_afresh(out, family), family), wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", HARD_TIED)
def test_a_family_that_engines_always_tie_is_merged_where_the_tie_is_left_alone(family, workshop, merged):
    targets = ["q_proj"] if family != "t5" else ["q", "wi"]
    fields = {**FACTORS, "target_modules": targets}
    kind = Kind(f"{family}: layers", "LoRA family", "LORA", "LoraConfig", fields, (family,), scale=0.3)
    case = building.case(workshop, kind, family, "float32")
    wanted = building.compute(case.unmerged(), family)
    out = merged(case.base, case.adapter)
    assert ties(out) == ties(case.base)
    assert off_by(building.compute(building.load_afresh(out, family), family), wanted) <= FLOAT32_TOLERANCE


def test_a_family_whose_output_is_scaled_keeps_its_flag_when_it_is_untied(workshop, merged):
    # T5 scales the decoder's output where the config says tied; transformers reads both ends, as they differ
    case = output_adapter("t5", workshop)
    wanted = building.compute(case.unmerged(), "t5")
    assert off_by(building.compute(case.plain(), "t5"), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter, "--allow-untie")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    got = building.compute(building.load_afresh(out, "t5"), "t5")
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE
