"""Asks vLLM what it generates with adapters that it serves itself: one engine for all adapters of a base.

A job is ``{"checkpoint", "max_lora_rank", "adapters", "prompts", "n_tokens"}``; without ``max_lora_rank`` the engine has
its own default. Its line has ``of_adapters``: for each adapter ``{"answers"}``, or ``{"error"}``. The log-probabilities of
prompts are not asked for: where it has LoRA on the head, vLLM fails on them (0.32, ``einsum(): subscript b``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_merge.verification.engines import vllm_script
from tests.engines.answering import Job, Line, answer_all


def answer(job: Job, dtype: str) -> Line:
    """Return what is said about a job."""
    import vllm

    vllm_script._look_into_classes_here(Path(job["checkpoint"]))
    limit = {"max_lora_rank": job["max_lora_rank"]} if "max_lora_rank" in job else {}
    engine = vllm.LLM(
        model=job["checkpoint"],
        dtype=dtype,
        max_model_len=max(len(prompt) for prompt in job["prompts"]) + job["n_tokens"],
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_lora=True,
        seed=0,
        **limit,
    )
    try:
        found = [_with(engine, n, path, job) for n, path in enumerate(job["adapters"], start=1)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        vllm_script._free()
    return {"engine": "vllm", "version": vllm.__version__, "of_adapters": found}


def _with(engine: Any, number: int, path: str, job: Job) -> Line:
    """Return what is generated with one adapter, or why it is not loaded."""
    import vllm
    from vllm.lora.request import LoRARequest

    request = LoRARequest(str(number), number, path)
    try:
        engine.llm_engine.add_lora(request)  # by itself: an error here leaves no request behind
    except Exception as error:  # noqa: BLE001 - whatever it is, the next adapter gets its turn
        return {"error": f"{type(error).__name__}: {error}"}
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    asked = vllm.SamplingParams(
        temperature=0.0, max_tokens=job["n_tokens"], ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = engine.generate(prompts, asked, lora_request=request, use_tqdm=False)
    return {"answers": [_answer(output.outputs[0]) for output in outputs]}


def _answer(generated: Any) -> Line:
    """Return what vLLM generates after one prompt."""
    tokens = list(generated.token_ids)
    return {
        "tokens": tokens,
        "logprobs": [at[token].logprob for token, at in zip(tokens, generated.logprobs, strict=True)],
    }


if __name__ == "__main__":
    vllm_script._set_environment()
    vllm_script._leave_out_amx()
    answer_all(answer)
    os._exit(0)  # as there: taking its worker threads down can hang
