"""vLLM, in whichever Python has it: a process of its own, which is asked by a script and answers in JSON."""

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
    """What vLLM says to one prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token of the prompt after the first, then of those it says, given the ones before."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What vLLM says to all of them, or why it says nothing."""

    version: str
    answers: tuple[Spoken, ...]
    refusal: str = ""


def find_python(named: str | None) -> str:
    """Return the Python interpreter that has vLLM: the named one, or this one.

    Raises:
        RequestError: there is none.
    """
    if named is None:
        if importlib.util.find_spec("vllm") is None:
            raise RequestError("", 0, "engine", "vLLM is not installed beside lora-merge", hint=_HINT)
        return sys.executable
    path = user_path(named)
    if not is_file(path):
        raise RequestError("", 0, "engine_python", f"{named}: there is no such interpreter", hint=_HINT)
    return str(path)


def ask_vllm(
    python: str, checkpoint: Path, prompts: tuple[Prompt, ...], n_tokens: int, *, trust_remote_code: bool
) -> Heard:
    """Return what vLLM makes of a checkpoint, in float32 and with no LoRA support.

    Args:
        python: the interpreter that has it.
        checkpoint: the directory that it serves.
        prompts: all with tokens.
        n_tokens: how many it says to each, greedily.
        trust_remote_code: whether code in the checkpoint may be run.

    Raises:
        RequestError: the process itself fails; its last words are in the sentence.
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
        sentence = f"{python}: cannot be run ({exc.strerror})"
        raise RequestError("", 0, "engine_python", sentence, hint=_HINT) from exc
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        words = " / ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        sentence = f"{python} ended with code {done.returncode} before vLLM answered: {words}"
        raise RequestError("", 0, "engine", sentence, hint=_HINT)
    table = json.loads(lines[-1])
    if "No module named 'vllm'" in str(table.get("error")):
        raise RequestError("", 0, "engine", f"{python} has no vLLM", hint=_HINT)
    return _parse(table)


def _environment() -> dict[str, str]:
    """Return the environment of the other process: it asks no hub whatever is set here, and has no token for one."""
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
