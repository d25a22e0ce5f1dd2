"""What to do after a command: the next command, ready to be copied."""

from __future__ import annotations

import json
import re
import shlex
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.cli.layout import cells
from lora_merge.cli.options import given_values
from lora_merge.cli.program import with_name
from lora_merge.cli.voice import say, say_raw, width_of
from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.errors import LoraMergeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.conversion.lora import ConvertReport

_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the names of classes that generate text."""

_SERVES_ADAPTER: Mapping[str, str] = {
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={out}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths {name}={out}",
    "lmdeploy": "lmdeploy serve api_server {base} --backend pytorch --adapters {name}={out}",
    "lorax": "lorax-launcher --model-id {base} --adapter-id {out}",
    "tgi": "text-generation-launcher --model-id {base} --lora-adapters {name}={out}",
}
"""Engine → the command that serves a base with an adapter."""

_OF_DRY_RUNS = frozenset({"dry_run", "survival", "explain", "verbose", "profile", "quiet", "json"})
"""Options that a real merge after a dry run does not need."""

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's ``--max-lora-rank`` may have."""


def command(*words: str) -> str:
    """Return words as a command line that a shell reads back as they are.

    Example:
        >>> command("vllm", "serve", "my model")
        "vllm serve 'my model'"
    """
    return shlex.join(words)


def say_next(what: str, line: str) -> None:
    """Print what to do next, and the command for it on a separate line, which is never broken."""
    say(f"{what}:")
    for part in continued(with_name(line), width_of(sys.stderr) if sys.stderr.isatty() else None):
        say_raw(part)


def continued(line: str, width: int | None) -> list[str]:
    """Return a command in lines that fit into a width, as a shell reads them: broken before options, with a backslash.

    Example:
        >>> print(*continued("lora-merge --base a --out b", 26), sep="\\n")
          lora-merge --base a \\
            --out b
    """
    lines = ["  "]
    # An option and its value stay together. Text in quotes may have spaces, and is left alone.
    for part in re.split(r" (?=--?[a-z])", line) if "'" not in line else [line]:
        joined = f"{lines[-1]}{' ' * (lines[-1].strip() != '')}{part}"
        if width is None or not lines[-1].strip() or cells(joined) + len(" \\") <= width:
            lines[-1] = joined
        else:
            lines.append(f"    {part}")
    return [f"{one} \\" for one in lines[:-1]] + lines[-1:]


def serving(out: str) -> tuple[str, str] | None:
    """Return what to do with a checkpoint, and the command; None where its configuration cannot be read.

    Args:
        out: its directory, as the user named it.
    """
    config = _config(out, CONFIG_FILE)
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if not name.endswith(_GENERATES):
        return ("load it in Python", _loading(name, out)) if name.isidentifier() else None
    # mlx-lm writes its settings under this key, and its weights are in no form that other engines read.
    if _is_mlx(config):
        return "run it with mlx-lm", command(
            "mlx_lm.generate", "--model", _model(out, "mlx")[0], "--prompt", "Hello"
        )
    return "serve it with vLLM", _vllm(out)


def _vllm(out: str) -> str:
    """Return the command that serves a checkpoint."""
    place, *options = _model(out, "vllm")
    return command("vllm", "serve", place, *options)


def _model(text: str, engine: str) -> tuple[str, ...]:
    """Return what an engine takes for a model, and the options that it needs for that.

    A URL of ``file://`` is a directory for every other program. vLLM and SGLang read other stores, vLLM when told to.
    """
    from lora_merge.storage.objects.urls import parse_store_url, path_here

    url, here = parse_store_url(text), path_here(text)
    if url is None:
        return (text,)
    if here is not None:
        return (str(here),)
    if engine == "vllm":
        return (str(url), "--load-format", "runai_streamer")
    return (str(url),) if engine == "sglang" else ("BASE",)


def _is_mlx(config: Mapping[str, Any]) -> bool:
    table = config.get("quantization")
    return isinstance(table, dict) and "bits" in table and "quant_method" not in table


def _loading(name: str, out: str) -> str:
    code = f"from transformers import {name}; model = {name}.from_pretrained({json.dumps(out)})"
    return command("python", "-ic", code)


def again(**more: str) -> str:
    """Return the present command as a merge: the options that the user gave, without those of a dry run.

    Args:
        more: values to add, by the names of their options.
    """
    from lora_merge.reporting.command import command_text

    given = {name: value for name, value in given_values().items() if name not in _OF_DRY_RUNS}
    # The default command needs no name.
    return command_text("merge", {**given, **more}).replace("lora-merge merge ", "lora-merge ", 1)


def named_base(adapter: str) -> str:
    """Return the base that an adapter's configuration names; empty where it names none."""
    found = _config(adapter, ADAPTER_CONFIG).get("base_model_name_or_path")
    return found if isinstance(found, str) else ""


def _config(folder: str, name: str) -> Mapping[str, Any]:
    """Return a JSON file of a directory; empty where it cannot be read."""
    # Loaded for a finished run alone: the help needs none of it.
    from lora_merge.storage.small_files import read_json
    from lora_merge.storage.user_paths import file_in

    try:
        return read_json(file_in(folder, name))
    except (LoraMergeError, OSError, ValueError):
        return {}


def after_merge(out: str, *, is_verified: bool) -> None:
    """Print what to do with a merged checkpoint."""
    if not is_verified:
        say_next("verify it", command("lora-merge", "verify", out))
    if private := _private(out):
        line = command("chmod", "-R", "a+rX", private)
        say_next(
            "only you can read the output, as an input or the umask says, so open it if others serve it", line
        )
    if found := serving(out):
        say_next(*found)


def _private(out: str) -> str:
    """Return the directory of an output that its owner alone may read; empty for any other output."""
    from lora_merge.storage.objects.urls import path_here

    here = path_here(out)
    try:
        is_private = here is not None and not here.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except OSError:
        return ""
    return _model(out, "vllm")[0] if is_private else ""


def after_conversion(report: ConvertReport, out: str, base: str, engine: str | None) -> None:
    """Print how to use an adapter that was written.

    Args:
        report: on the conversion.
        out: the adapter's directory, as the user named it.
        base: its base, as the user or the adapter's configuration names it; empty if none does.
        engine: that it was converted for.
    """
    named = base or "BASE"
    if report.format == "gguf":
        file = next((name for name in report.files if name.endswith(".gguf")), "")
        model = "BASE.gguf"
        say_next(
            "serve it with llama.cpp", command("llama-server", "-m", model, "--lora", str(Path(out, file)))
        )
    elif report.format == "mlx":
        words = (
            "mlx_lm.generate",
            "--model",
            _model(named, "mlx")[0],
            "--adapter-path",
            out,
            "--prompt",
            "Hello",
        )
        say_next("run it with mlx-lm", command(*words))
    elif engine is not None and engine in _SERVES_ADAPTER:
        rank = max((one.rank for one in report.modules), default=0)
        allowed = next((one for one in _VLLM_RANKS if one >= rank), rank)
        line = _SERVES_ADAPTER[engine].format(
            base=shlex.join(_model(named, engine)),
            rank=allowed,
            name=shlex.quote(Path(out).name),
            out=shlex.quote(out),
        )
        say_next("serve it", line)
    else:
        words = ("lora-merge", "--base", named, "--adapter", out, "--out", "merged")
        say_next("merge it", command(*words))
