"""Runs vLLM in a separate process, with the Python that has it. A script answers in JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.errors import RequestError
from lora_merge.storage.user_paths import is_file, user_path

if TYPE_CHECKING:
    from lora_merge.verification.forward_comparison import Prompt

SCRIPT = Path(__file__).with_name("vllm_script.py")

_HINT = "name the interpreter that has vLLM with --engine-python PATH"
_LAST_LINES = 4
_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"})


@dataclass(frozen=True, slots=True)
class Spoken:
    """vLLM's answer to one prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each token of the prompt from the second on, then of each generated token."""


@dataclass(frozen=True, slots=True)
class Heard:
    """vLLM's answers to all prompts, or its reason to refuse the checkpoint."""

    version: str
    answers: tuple[Spoken, ...]
    refusal: str = ""


def find_python(named: str | None) -> str:
    """Return the Python interpreter that has vLLM: the named one, otherwise this one.

    Raises:
        RequestError: vLLM is not installed here, or there is no such interpreter.
    """
    if named is None:
        if importlib.util.find_spec("vllm") is None:
            raise RequestError(
                "", 0, "engine", "vLLM is not installed in the environment of lora-merge", hint=_HINT
            )
        return sys.executable
    path = user_path(named)
    if not is_file(path):
        raise RequestError(
            "", 0, "engine_python", f"{named}: not found, expected a Python interpreter", hint=_HINT
        )
    return str(path)


def ask_vllm(
    python: str, checkpoint: Path, prompts: tuple[Prompt, ...], n_tokens: int, *, trust_remote_code: bool
) -> Heard:
    """Return vLLM's answers for a checkpoint, in float32 and without LoRA support.

    Args:
        python: the interpreter that has vLLM.
        checkpoint: the directory to serve.
        prompts: each with tokens.
        n_tokens: tokens to generate for each, greedily.
        trust_remote_code: whether code in the checkpoint may be run.

    Raises:
        RequestError: the process fails. The sentence has its last lines.
    """
    job = {
        "checkpoint": str(checkpoint),
        "prompts": [list(prompt.ids) for prompt in prompts],
        "n_tokens": n_tokens,
        "trust_remote_code": trust_remote_code,
    }
    request = json.dumps({"dtype": "float32", "jobs": [job]})
    command = [python, str(SCRIPT)]
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter is the user's choice, the script is ours
            command, input=request, env=_environment(), capture_output=True, text=True, check=False
        )
    except OSError as exc:
        sentence = f"{python}: cannot run it ({exc.strerror})"
        raise RequestError("", 0, "engine_python", sentence, hint=_HINT) from exc
    # Libraries may print other lines.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        words = " / ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        sentence = f"{python} ended with code {done.returncode} before vLLM answered: {words}"
        raise RequestError("", 0, "engine", sentence, hint=_HINT)
    table = json.loads(lines[-1])
    if "No module named 'vllm'" in str(table.get("error")):
        raise RequestError("", 0, "engine", f"vLLM is not installed for {python}", hint=_HINT)
    return _parse(table)


def _environment() -> dict[str, str]:
    """Return the environment of the other process: offline, and without access tokens."""
    kept = {name: value for name, value in os.environ.items() if name not in _TOKENS}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _parse(table: dict[str, Any]) -> Heard:
    version = str(table.get("version", ""))
    if "error" in table:
        return Heard(version, (), str(table["error"]))
    answers = tuple(
        Spoken(tuple(found["tokens"]), (*found["prompt_logprobs"], *found["logprobs"]))
        for found in table["answers"]
    )
    return Heard(version, answers)
