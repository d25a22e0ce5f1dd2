"""Asks vLLM what checkpoints generate. Run by its path, with the interpreter of an environment that has vLLM.

stdin is one document: ``{"dtype": "float32", "jobs": [{"checkpoint": "/a/directory", "prompts": [[1, 2, 3]],
"n_tokens": 16, "trust_remote_code": false}]}``. stdout gets one line of JSON for each job, in order. It has
``engine``, ``version``, ``checkpoint``, ``answers`` and ``seconds``, or ``checkpoint`` and ``error``.

An answer has ``tokens``, generated greedily and past any end; ``logprobs`` of these; and ``prompt_logprobs``, those of
the prompt's tokens from the second on. LoRA is never switched on.

Nothing of this package is imported: the other environment need not have it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The last one keeps the engine in this process. Dropping the engine then frees its memory for the next job."""

ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""A cache of 1 GiB, and no binding to cores: a container may lack the cores that vLLM picks."""

Job = dict[str, Any]
Line = dict[str, Any]


def main() -> None:
    """Answer the document on stdin."""
    # The first entry is this folder, whose vllm.py would hide the package.
    del sys.path[0]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # vLLM and its libraries print on stdout, which is for answers.
    os.dup2(2, 1)
    document = json.load(sys.stdin)
    dtype = document.get("dtype", "auto")
    _set_environment()
    if dtype == "float32":
        _leave_out_amx()
    for job in document["jobs"]:
        line = _line(job, dtype)
        lines.write(f"{json.dumps(line)}\n")
        lines.flush()
    # Ending worker threads can hang, and there is nothing left to do.
    os._exit(0)


def _set_environment() -> None:
    """Set the variables that vLLM reads, except those that the user has set."""
    import torch

    for name, value in {**ALWAYS, **({} if torch.cuda.is_available() else ON_CPU)}.items():
        os.environ.setdefault(name, value)


def _leave_out_amx() -> None:
    """Let vLLM choose its kernels for AVX-512 on a processor that has AMX too.

    In float32, 0.32 chooses its attention for AMX (MLA), which then refuses such weights. With INT4, its kernel for AMX
    rounds inputs to eight bits.
    """
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False  # noqa: SLF001 - no public name tells it


def _line(job: Job, dtype: str) -> Line:
    """Return the line of a job: its answers, or an error."""
    try:
        line = _answered(job, dtype)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next job gets its turn
        line = {"checkpoint": job["checkpoint"], "error": f"{type(error).__name__}: {error}"}
    # Only here: inside the handler, the traceback would keep the engine alive.
    _free()
    return line


def _answered(job: Job, dtype: str) -> Line:
    import vllm

    started = time.monotonic()
    # vLLM collects garbage often. Imported objects stay, so it need not look at them each time.
    gc.freeze()
    answers = _answers(job, dtype)
    return {
        "engine": "vllm",
        "version": vllm.__version__,
        "checkpoint": job["checkpoint"],
        "answers": answers,
        "seconds": round(time.monotonic() - started, 2),
    }


def _answers(job: Job, dtype: str) -> list[Line]:
    """Start an engine, return what it generates, and shut it down."""
    import vllm

    _look_into_classes_here(Path(job["checkpoint"]))
    engine = vllm.LLM(
        model=job["checkpoint"],
        dtype=dtype,
        trust_remote_code=job.get("trust_remote_code", False),
        max_model_len=max(len(prompt) for prompt in job["prompts"]) + job["n_tokens"],
        enforce_eager=True,  # nothing is asked often enough to pay for a compilation
        enable_prefix_caching=False,  # a cached prompt has no log-probabilities
        seed=0,
    )
    try:
        asked = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=job["n_tokens"],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        return [_answer(output) for output in engine.generate(prompts, asked, use_tqdm=False)]
    finally:
        with contextlib.suppress(Exception):
            engine.llm_engine.engine_core.shutdown()


def _answer(output: Any) -> Line:
    """Return vLLM's answer to one prompt as data."""
    generated = output.outputs[0]
    tokens = list(generated.token_ids)
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "tokens": tokens,
        "logprobs": [at[token].logprob for token, at in zip(tokens, generated.logprobs, strict=True)],
        "prompt_logprobs": [at[token].logprob for token, at in prompt],
    }


def _look_into_classes_here(checkpoint: Path) -> None:
    """Let vLLM inspect a model's class in this process."""
    import torch
    from vllm import ModelRegistry

    if torch.cuda.is_available():
        return
    # Otherwise vLLM starts another process for that, which takes half a minute. It only matters where
    # importing the class would touch a GPU.
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for architecture in config.get("architectures") or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def _free() -> None:
    """Free what an engine held: its memory, and its place in torch's process groups."""
    with contextlib.suppress(Exception):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    main()
