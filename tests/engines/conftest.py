"""Merged checkpoints, and what each engine says about all of them: one process for each engine and session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.building import N_TOKENS, PROMPTS, Prepared, prepare
from tests.engines.families import CASES, LLAMA, LLAMA_TIED, Engine
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Line = dict[str, Any]

# These import engines, and run under another interpreter.
collect_ignore = ["lmdeploy_on_cpu.py", "lmdeploy_script.py", "turbomind_script.py"]

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS: Mapping[Engine, list[str]] = {
    "vllm": [str(ROOT / "lora_merge" / "engines" / "vllm_script.py")],
    "lmdeploy": ["-m", "tests.engines.lmdeploy_script"],
    "turbomind": ["-m", "tests.engines.turbomind_script"],
}
DTYPES: Mapping[Engine, str] = {"vllm": "float32", "lmdeploy": "float32", "turbomind": "bfloat16"}
"""TurboMind computes in nothing wider."""

LIMIT_S = 1800
"""Of one engine for everything; it takes minutes."""

PLAIN = next(case.name for case in CASES if case.model is LLAMA)
UNTIED = next(case.name for case in CASES if case.model is LLAMA_TIED and "embedding" in case.adapter)
LOST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def engines_python(pytestconfig: pytest.Config) -> Path:
    """Return the interpreter of the engines' environment."""
    given = pytestconfig.getoption("--engines-python")
    if given is None:
        pytest.skip("needs --engines-python, an interpreter with vLLM and LMDeploy: make engines")
    return Path(given).absolute()


@pytest.fixture(scope="session")
def prepared(
    request: pytest.FixtureRequest,
    engines_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cli: Callable[..., Any],
) -> Mapping[str, Prepared]:
    """Return the merged checkpoint of every case that this session asks for, and of two that are tampered with."""
    root = tmp_path_factory.mktemp("engines")
    callspecs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = {spec.params["case"].name for spec in callspecs if "case" in spec.params}
    return {case.name: prepare(root, case, cli) for case in CASES if case.name in {*asked, PLAIN, UNTIED}}


@pytest.fixture(scope="session")
def tampered_with(
    prepared: Mapping[str, Prepared], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Return checkpoints with something wrong about them, by what it is."""
    root = tmp_path_factory.mktemp("tampered")
    plain, untied = prepared[PLAIN], prepared[UNTIED]
    found = {
        "no checkpoint": root / "nothing",
        "the base alone": plain.base,
        "the merged one in shards": root / "shards",
        "a tensor short": root / "short",
        "two checkpoints in one place": root / "two",
        "said to be tied": root / "tied",
    }
    shutil.copytree(plain.merged, found["a tensor short"])
    edit_tensors(found["a tensor short"] / "model.safetensors", lambda tensors: tensors.pop(LOST))
    shutil.copytree(untied.merged, found["said to be tied"])
    edit_json(found["said to be tied"] / "config.json", tie_word_embeddings=True)
    for name in ("the merged one in shards", "two checkpoints in one place"):
        shutil.copytree(plain.merged, found[name])
        _shard(found[name])
    shutil.copy(plain.base / "model.safetensors", found["two checkpoints in one place"])
    return found


def _shard(checkpoint: Path) -> None:
    """Store a checkpoint of one file as one with an index."""
    from safetensors import safe_open

    one, shard = checkpoint / "model.safetensors", "model-00001-of-00001.safetensors"
    with safe_open(one, "pt") as tensors:
        places = dict.fromkeys(tensors.keys(), shard)
    one.rename(checkpoint / shard)
    index = {"metadata": {"total_size": (checkpoint / shard).stat().st_size}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def said(
    prepared: Mapping[str, Prepared],
    tampered_with: Mapping[str, Path],
    engines_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[Engine, Mapping[str, Line]]:
    """Return what every engine says about every checkpoint, by the names of cases and of what is wrong."""
    checkpoints = {**tampered_with, **{name: about.merged for name, about in prepared.items()}}
    root = tmp_path_factory.mktemp("said")
    running = {engine: _start(engine, engines_python, root, checkpoints.values()) for engine in PROGRAMS}
    return {
        engine: dict(zip(checkpoints, _lines(engine, process, root, len(checkpoints)), strict=True))
        for engine, process in running.items()
    }


def _start(engine: Engine, python: Path, root: Path, checkpoints: Iterator[Path]) -> subprocess.Popen[bytes]:
    """Start an engine's program."""
    jobs = [
        {"checkpoint": str(path), "prompts": PROMPTS, "n_tokens": N_TOKENS, "trust_remote_code": True}
        for path in checkpoints
    ]
    asked = root / f"{engine}.json"
    asked.write_text(json.dumps({"dtype": DTYPES[engine], "jobs": jobs}))
    with (
        asked.open("rb") as stdin,
        _out(root, engine).open("wb") as out,
        _err(root, engine).open("wb") as err,
    ):
        return subprocess.Popen(
            [python, *PROGRAMS[engine]],
            cwd=ROOT,
            env={**os.environ, "VLLM_CACHE_ROOT": str(root / "cache")},
            stdin=stdin,
            stdout=out,
            stderr=err,
        )


def _lines(engine: Engine, process: subprocess.Popen[bytes], root: Path, n_jobs: int) -> list[Line]:
    """Wait for an engine; return its lines, of which there has to be one for each job."""
    try:
        exit_code = process.wait(LIMIT_S)
    finally:
        process.kill()
    lines = _out(root, engine).read_text().splitlines()
    noise = _err(root, engine).read_text(errors="replace")[-3000:]
    assert (exit_code, len(lines)) == (0, n_jobs), f"{engine} exited with {exit_code}: {noise}"
    return [json.loads(line) for line in lines]


def _out(root: Path, engine: Engine) -> Path:
    return root / f"{engine}.out"


def _err(root: Path, engine: Engine) -> Path:
    return root / f"{engine}.err"
