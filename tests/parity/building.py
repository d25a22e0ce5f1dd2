"""Bases and adapters of every kind, built with transformers and PEFT once per session.

All functions take the session's directory first and are cached: nobody may write into what they return.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.conftest import COMMON, VOCAB, build_model, write_tokenizer
from tests.parity.kinds import Kind
from tests.tampering import edit_json

LARGER_VOCAB = VOCAB + 4
"""Of a base whose vocabulary was resized before the training."""

MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
IMAGE = {"num_channels": 3, "image_size": 16}


@dataclass(frozen=True, slots=True)
class Model:
    """A tiny architecture: how it is made, and what is compared."""

    architecture: str
    """The class in transformers."""

    config: str
    """Its config's class."""

    fields: Mapping[str, Any]
    """What is handed to that class."""

    inputs: Callable[[], dict[str, Any]]
    """Makes what it is called with, always the same."""

    output: str = "logits"
    """The output that depends on everything."""

    save: tuple[tuple[str, Any], ...] = ()
    """What its ``save_pretrained`` is told."""


def _tokens() -> dict[str, Any]:
    """Return two prompts that use tokens of low and high rank, the trained ones among them."""
    return {"input_ids": torch.tensor([[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]])}


def _noise(name: str, *shape: int) -> Callable[[], dict[str, Any]]:
    """Return a function that makes one input of random numbers."""
    return lambda: {name: torch.randn(*shape, generator=torch.Generator().manual_seed(5))}


def _pairs() -> dict[str, Any]:
    """Return the prompts for an encoder, and for its decoder."""
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"].flip(1)}


def _llama(architecture: str = "LlamaForCausalLM", **fields: Any) -> Model:
    """Return a llama with something changed."""
    return Model(architecture, "LlamaConfig", {**COMMON, "tie_word_embeddings": False, **fields}, _tokens)


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

MODELS: Mapping[str, Model] = {
    "llama": _llama(),
    "llama_tied": _llama(tie_word_embeddings=True),
    "llama_biased": _llama(attention_bias=True, mlp_bias=True),
    "llama_classifier": _llama("LlamaForSequenceClassification", num_labels=3, pad_token_id=0),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", {**GPT2, **ENDS}, _tokens),
    "gpt2_untied": Model(
        "GPT2LMHeadModel", "GPT2Config", {**GPT2, **ENDS, "tie_word_embeddings": False}, _tokens
    ),
    "qwen3_moe": Model(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**COMMON, **MIXTURE, "head_dim": 16, "num_experts": 4, "tie_word_embeddings": False},
        _tokens,
        save=(("save_original_format", False),),
    ),
    "granitemoe": Model(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        _tokens,
        save=(("save_original_format", False),),
    ),
    "gpt_oss": Model(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        _tokens,
    ),
    "gemma": Model("GemmaForCausalLM", "GemmaConfig", {**COMMON, "head_dim": 16}, _tokens),
    "gemma2": Model("Gemma2ForCausalLM", "Gemma2Config", {**COMMON, "head_dim": 16}, _tokens),
    "cohere": Model("CohereForCausalLM", "CohereConfig", COMMON, _tokens),
    "t5": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 1, "num_decoder_layers": 1,
            "num_heads": 4, "decoder_start_token_id": 0,
        },
        _pairs,
    ),
    "llava_tied": Model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
            "vision_config": {
                **IMAGE, "model_type": "siglip_vision_model", "patch_size": 8, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            },
            "image_token_index": 95, "tie_word_embeddings": True,
        },
        _tokens,
        save=(("save_original_format", False),),
    ),
    "siglip": Model(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {
            **IMAGE, "patch_size": 4, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        _noise("pixel_values", 2, 3, 16, 16),
        "pooler_output",
    ),
    "resnet": Model(
        "ResNetModel",
        "ResNetConfig",
        {
            "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck",
            "downsample_in_first_stage": False,
        },
        _noise("pixel_values", 2, 3, 32, 32),
        "last_hidden_state",
    ),
    "wav2vec2": Model(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80,
            "conv_dim": (32, 48), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
            "conv_bias": True, "do_stable_layer_norm": True, "vocab_size": VOCAB,
        },
        _noise("input_values", 2, 200),
        "last_hidden_state",
    ),
    "videomae": Model(
        "VideoMAEModel",
        "VideoMAEConfig",
        {
            **IMAGE, "patch_size": 4, "num_frames": 4, "tubelet_size": 2, "hidden_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80,
        },
        _noise("pixel_values", 2, 4, 3, 16, 16),
        "last_hidden_state",
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """Return a model with random weights, always the same; its biases and norms matter too."""
    import transformers

    if name in {"llama", "llama_tied", "gpt2"}:
        return build_model(name)
    about = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, about.architecture)(getattr(transformers, about.config)(**about.fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def base(root: Path, name: str, dtype: str) -> Path:
    """Return the directory of a base checkpoint."""
    out = root / f"base-{name}-{dtype}"
    make(name).to(getattr(torch, dtype)).save_pretrained(out, **dict(MODELS[name].save))
    if "input_ids" in MODELS[name].inputs():
        write_tokenizer(out)
    return out


@cache
def _loaded(directory: Path, name: str) -> Any:
    """Return a checkpoint in transformers, in its own dtype."""
    import transformers

    return getattr(transformers, MODELS[name].architecture).from_pretrained(directory, dtype="auto").eval()


def load(directory: Path, name: str) -> Any:
    """Return a copy of a checkpoint in transformers, in its own dtype, to do anything with."""
    return copy.deepcopy(_loaded(directory, name))


def load_afresh(directory: Path, name: str) -> Any:
    """Return a checkpoint that is loaded once: an output of a merge."""
    return _loaded.__wrapped__(directory, name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the products are tiny, and handing them to threads takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(model: Any, name: str) -> Any:
    """Return what a model makes of the fixed inputs."""
    about = MODELS[name]
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in about.inputs().items()
    }
    if "input_ids" in inputs and model.get_input_embeddings().weight.shape[0] == LARGER_VOCAB:
        inputs["input_ids"][:, 2:4] = torch.tensor([VOCAB, LARGER_VOCAB - 1])
    with one_thread(), torch.no_grad():
        return model.eval()(**inputs)[about.output]


def resize(model: Any, seed: int) -> Any:
    """Return the model with a larger vocabulary; a seed gives the new rows."""
    model.resize_token_embeddings(LARGER_VOCAB, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[VOCAB:].normal_(0, 0.2)
    return model


def perturb(model: Any, scale: float) -> None:
    """Add a random number to every trainable value: what a training would do to them."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * scale)


def reduce_ranks(peft_model: Any) -> None:
    """Let AdaLoRA take its ranks away as at the end of a training; one module loses all of them."""
    tuner = peft_model.base_model
    layers = [module for module in tuner.modules() if hasattr(module, "lora_E")]
    with torch.no_grad():
        layers[0].lora_A["default"].mul_(1e-6)
    tokens = _tokens()["input_ids"]
    peft_model.train()
    peft_model(input_ids=tokens, labels=tokens).loss.backward()
    config = peft_model.peft_config["default"]
    tuner.update_and_allocate(config.tinit + 1)  # learns what matters
    tuner.update_and_allocate(config.total_step - config.tfinal)  # and keeps that
    ranks = [sum(kept) for kept in config.rank_pattern.values()]
    assert min(ranks) == 0
    assert 0 < sum(ranks) < config.init_r * len(layers)


@dataclass(frozen=True, slots=True)
class Case:
    """A base and an adapter of some kind on disk."""

    kind: Kind
    model: str
    base: Path
    adapter: Path

    def plain(self) -> Any:
        """Return the base in transformers, resized where the adapter wants that: its new rows mean nothing."""
        model = load(self.base, self.model)
        return resize(model, seed=1) if self.kind.setting == "resized" else model

    def unmerged(self) -> Any:
        """Return base + adapter in PEFT, loaded as a user would."""
        from peft import PeftModel

        adapter = self.adapter
        if self.kind.setting == "residual":
            adapter = adapter.with_name(f"{adapter.name}-as-plain-lora")
        return PeftModel.from_pretrained(self.plain(), adapter).eval()

    def save_merged_by_peft(self, out: Path) -> None:
        """Write the checkpoint that PEFT's default merge gives."""
        merged = self.unmerged().merge_and_unload()
        merged.save_pretrained(out, **dict(MODELS[self.model].save))


_CASES: dict[tuple[Path, str, str, str], Case] = {}


def case(root: Path, kind: Kind, model: str, dtype: str) -> Case:
    """Return a base of a dtype and an adapter that was trained on it."""
    key = (root, kind.name, model, dtype)
    if key not in _CASES:
        _CASES[key] = _build(root, kind, model, dtype)
    assert _CASES[key].kind == kind, f"two kinds are called {kind.name!r}"
    return _CASES[key]


def _build(root: Path, kind: Kind, model: str, dtype: str) -> Case:
    """Train an adapter, in the sense of this suite: every trainable value is moved by a random number."""
    from peft import get_peft_model

    base_dir = base(root, model, dtype)
    loaded = load(base_dir, model)
    if kind.setting == "resized":
        loaded = resize(loaded, seed=11)
    torch.manual_seed(3)
    peft_model = get_peft_model(loaded, kind.config(model))
    out = root / f"adapter-{len(_CASES)}"
    if kind.setting == "residual":
        base_dir = root / f"{out.name}-residual"
        copy.deepcopy(peft_model).unload().save_pretrained(base_dir)
    perturb(peft_model, kind.scale)
    if kind.setting == "masked":
        reduce_ranks(peft_model)
    peft_model.peft_config["default"].base_model_name_or_path = str(base_dir)
    peft_model.save_pretrained(out, **kind.save)
    if kind.setting == "resized":
        _write_larger_tokenizer(out)
    if kind.setting == "residual":
        _write_as_plain_lora(out)
    return Case(kind, model, base_dir, out)


def _write_larger_tokenizer(out: Path) -> None:
    """Write the base's tokenizer with the new tokens."""
    from transformers import AutoTokenizer

    write_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens([f"new{n}" for n in range(LARGER_VOCAB - VOCAB)])
    tokenizer.save_pretrained(out)


def _write_as_plain_lora(adapter: Path) -> None:
    """Write the adapter again beside itself, under a config that does not decompose the base."""
    import shutil

    other = adapter.with_name(f"{adapter.name}-as-plain-lora")
    shutil.copytree(adapter, other)
    edit_json(other / "adapter_config.json", init_lora_weights=True)
