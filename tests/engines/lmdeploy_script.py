"""Asks LMDeploy's PyTorch engine what checkpoints generate, and which of its parameters they leave empty.

Its own reading of the config, model classes, weight loader, name mapping and packing; attention and experts are
`tests.engines.lmdeploy_on_cpu`'s. Not asked: its cache and its scheduler. Every bit is set before weights are loaded,
since LMDeploy says nothing of tensors that a checkpoint lacks: what is NaN afterwards, or a row or column of packed
numbers that are all -1, is ``unloaded``.

A job may name ``adapters``. LMDeploy's own loader puts all of them beside the model, and the line has ``of_adapters``: the
``answers`` with each, where something is ``unloaded`` too.
"""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1")

import lmdeploy
import torch
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.model_inputs import BuildModelContext, StepCtxMgrApi
from lmdeploy.pytorch.models.patch import add_adapters, build_patched_model
from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights

from tests.engines.answering import Job, Line, answer_all
from tests.engines.lmdeploy_on_cpu import install

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")


def answer(job: Job, dtype: str) -> Line:
    """Return what is said about a job."""
    model, n_layers = _empty_model(job["checkpoint"], dtype)
    load_model_weights(model, job["checkpoint"], device=CPU)
    adapters = job.get("adapters", [])
    with _empty_memory_is_nan():
        # It sorts their names. Its numbers are from 1: 0 is no adapter.
        named = {f"{n:04}": path for n, path in enumerate(adapters, start=1)}
        add_adapters(model, named, dtype=getattr(torch, dtype), device=CPU)
    unloaded = [name for name, parameter in model.named_parameters() if _is_empty(parameter)]
    line = {"engine": "lmdeploy", "version": lmdeploy.__version__, "unloaded": unloaded}
    if adapters:
        of_adapters = [{"answers": _answers(model, n_layers, job, n)} for n in range(1, len(adapters) + 1)]
        return {**line, "of_adapters": of_adapters}
    return {**line, "answers": [] if unloaded else _answers(model, n_layers, job)}


def _empty_model(checkpoint: str, dtype: str) -> tuple[Any, int]:
    """Return LMDeploy's model, every bit of every parameter set, and its number of layers."""
    config = ModelConfig.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype)
    context = BuildModelContext(
        fp32_lm_head=config.fp32_lm_head,
        tie_word_embeddings=config.tie_word_embeddings,
        quant_config=config.quant_config,
    )
    model = build_patched_model(config, device=CPU, build_model_ctx=context)
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0xFF)  # NaN in every type that has it
    return model, config.num_layers


def _is_empty(parameter: torch.Tensor) -> bool:
    """Return whether nothing was loaded into a part of a parameter."""
    if parameter.is_floating_point():
        return bool(parameter.float().isnan().any())
    ones = parameter == -1
    return bool(ones.all(0).any() or ones.all(-1).any())


@contextmanager
def _empty_memory_is_nan() -> Iterator[None]:
    """Let ``torch.empty`` return NaN; else it is whatever memory holds, zeros at times."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _answers(model: Any, n_layers: int, job: Job, adapter: int = 0) -> list[Line]:
    """Return what is generated after every prompt."""
    step = SimpleNamespace(
        enable_microbatch=False,
        is_decoding=False,
        dp_meta=None,
        moe_metadata=None,
        local_adapter_ids=torch.tensor([adapter]),
    )
    with StepCtxMgrApi().context(model.ctx_mgr), model.ctx_mgr.context(step):
        return [_answer(model, n_layers, prompt, job["n_tokens"]) for prompt in job["prompts"]]


@torch.inference_mode()
def _answer(model: Any, n_layers: int, prompt: list[int], n_tokens: int) -> Line:
    """Return what is generated after a prompt, token by token, each time from the start."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        rows = _log_probabilities(model, n_layers, tokens)
        tokens.append(int(rows[-1].argmax()))
    rows = _log_probabilities(model, n_layers, tokens[:-1])
    of_each = [float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)]
    n_known = len(prompt) - 1
    return {
        "tokens": tokens[len(prompt) :],
        "logprobs": of_each[n_known:],
        "prompt_logprobs": of_each[:n_known],
    }


def _log_probabilities(model: Any, n_layers: int, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities [n, vocabulary] of what comes after each token."""
    n = len(tokens)
    positions = torch.arange(n)[None]
    nothing = torch.zeros(1, 1, 1, 4096)  # stands where a cache would be, and is never read
    more = {}
    if "mrope_position_ids" in inspect.signature(model.forward).parameters:
        more["mrope_position_ids"] = positions.expand(3, -1).contiguous()
    hidden = model(
        input_ids=torch.tensor([tokens]),
        position_ids=positions,
        past_key_values=[[nothing, nothing]] * n_layers,
        attn_metadata=_attention_of(n),
        **more,
    )
    hidden = hidden["hidden_states"] if isinstance(hidden, dict) else hidden
    return torch.log_softmax(model.get_logits(hidden)[0].float(), -1)


def _attention_of(n: int) -> SimpleNamespace:
    """Return what LMDeploy tells its attention of one whole sequence."""
    return SimpleNamespace(
        is_decoding=False,
        quant_policy=0,
        block_offsets=torch.zeros(1, 1, dtype=torch.long),
        q_start_loc=torch.zeros(1, dtype=torch.long),
        q_seqlens=torch.tensor([n]),
        kv_seqlens=torch.tensor([n]),
        fill_seqlens=None,
        cu_seqlens_q=torch.tensor([0, n]),
        cu_seqlens_k=torch.tensor([0, n]),
    )


if __name__ == "__main__":
    install()
    answer_all(answer)
