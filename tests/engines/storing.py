"""Quantised bases and adapters for engines, merged by the real command, and what base and adapter compute.

The reference is the base as this project decodes it, in float32, with the adapter in PEFT, unmerged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.conftest import write_tokenizer
from tests.engines.building import (
    N_TOKENS,
    RANK,
    Answer,
    Command,
    adapted,
    answer,
    log_probabilities_of,
    train,
)
from tests.engines.families import Model
from tests.engines.stored import OUTPUTS, WEIGHTS_ROUNDED, Output, Stored
from tests.parity.building import one_thread
from tests.storages.reference import FIXTURES, decoded, model_of
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

N_CANDIDATES = 1000
N_PROMPTS = 3
PROMPT_LENGTH = 7
FIRST_WORD = 4
"""Below are the tokens that begin, end and pad."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged into a quantised base, and what it has to compute."""

    base: Path
    outputs: Mapping[Output, Path]
    prompts: list[list[int]]
    wanted: list[Answer]
    without: list[list[float]]
    """The base's own log-probabilities of the same tokens."""


def prepare_stored(root: Path, about: Stored, command: Command) -> Merged:
    """Build a base, train an adapter in the sense of this suite, merge it in every way, and compute what is right."""
    from peft import LoraConfig

    here = root / about.title.replace(" ", "-").replace(",", "")
    base, adapter = base_of(here / "base", about), here / "adapter"
    plain = here / "plain"
    architecture = model_of(decoded(base), base, plain).config.architectures[0]
    model = Model(about.name, architecture, "", {})
    train(plain, model, LoraConfig(**{**RANK, **about.lora}), adapter)
    trained = adapted(plain, model, adapter)
    outputs = {output: here / output for output in OUTPUTS if output in about.outputs}
    for output, out in outputs.items():
        result = command("--base", base, "--adapter", adapter, "--out", out, "--out-storage", output)
        assert result.exit_code == 0, result.output
    with one_thread(), torch.no_grad():
        prompts = prompts_of(trained, 2 * max(WEIGHTS_ROUNDED, about.mixed_tolerance))
        wanted = [answer(trained, prompt) for prompt in prompts]
        with trained.disable_adapter():
            pairs = zip(prompts, wanted, strict=True)
            without = [log_probabilities_of(trained, [*prompt, *found.tokens]) for prompt, found in pairs]
    return Merged(base, outputs, prompts, wanted, without)


def base_of(out: Path, about: Stored) -> Path:
    """Write a base: what the library wrote, with what engines want beside it."""
    shutil.copytree(FIXTURES / about.fixture, out)
    write_tokenizer(out)
    fields = json.loads((out / "config.json").read_text())
    _edit(out, lambda tensors: tensors["model.embed_tokens.weight"][fields["pad_token_id"]].zero_())
    if about.has_wide_groups:
        _edit(out, _widen)
        settings = {**fields["quantization_config"], "group_size": 128}
        edit_json(out / "config.json", quantization_config=settings)
        edit_json(out / "quantize_config.json", group_size=128)
    if about.is_qwen3:
        _edit(out, lambda tensors: _norm_heads(tensors, fields["head_dim"]))
        edit_json(out / "config.json", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    return out


def _edit(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    edit_tensors(out / "model.safetensors", change)


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    """Give two groups of 64 the scales and zeros of the first."""
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".qzeros")):
            tensors[name] = tensor[::2].contiguous()
        elif name.endswith(".g_idx"):
            tensors[name] = tensor // 2


def _norm_heads(tensors: dict[str, torch.Tensor], head_dim: int) -> None:
    """Add the norms of queries and keys that a Qwen3 has."""
    generator = torch.Generator().manual_seed(13)
    like = tensors["model.norm.weight"]
    for name in [name for name in tensors if name.endswith("input_layernorm.weight")]:
        layer = name.removesuffix("input_layernorm.weight")
        for norm in ("q_norm", "k_norm"):
            values = 1 + 0.1 * torch.randn(head_dim, generator=generator)
            tensors[f"{layer}self_attn.{norm}.weight"] = values.to(like.dtype)


def prompts_of(model: Any, gap: float, n_candidates: int = N_CANDIDATES) -> list[list[int]]:
    """Return prompts after which every token that is generated leads the next best by a gap: no rounding flips it."""
    generator = torch.Generator().manual_seed(11)
    size = (n_candidates, PROMPT_LENGTH)
    tokens = torch.randint(FIRST_WORD, model.config.vocab_size, size, generator=generator)
    tokens[:, 0] = model.config.bos_token_id
    for _ in range(N_TOKENS):
        best = model(input_ids=tokens).logits[:, -1].log_softmax(-1).topk(2)
        leads = best.values[:, 0] - best.values[:, 1] > gap
        tokens = torch.cat([tokens, best.indices[:, :1]], 1)[leads]
    assert len(tokens) >= N_PROMPTS, f"{len(tokens)} prompts after which no token is a coin toss"
    return tokens[:N_PROMPTS, :PROMPT_LENGTH].tolist()
