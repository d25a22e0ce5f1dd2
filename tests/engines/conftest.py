"""Merged checkpoints and adapters, and what each engine says about all of them: one process for each and session."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from tests.engines.adapters import ADAPTERS, Adapted, Server
from tests.engines.asking import ROOT, Asker, Key, Line, job
from tests.engines.building import LOST, Prepared, prepare
from tests.engines.families import CASES, PLAIN, UNTIED_BY_MERGE, Case, Engine
from tests.engines.serving import Served, prepare_served
from tests.engines.stored import FP8_LLAMA, ROWS, STORED
from tests.engines.storing import Merged, prepare_stored
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Given = TypeVar("Given")

# These import engines, and run under another interpreter.
collect_ignore = [
    "lmdeploy_on_cpu.py",
    "lmdeploy_script.py",
    "turbomind_script.py",
    "vllm_adapters_script.py",
    "vllm_on_cpu.py",
    "vllm_quantised_script.py",
]

PROGRAMS: Mapping[Engine, list[str]] = {
    "vllm": [str(ROOT / "lora_merge" / "verification" / "engines" / "vllm_script.py")],
    "lmdeploy": ["-m", "tests.engines.lmdeploy_script"],
    "turbomind": ["-m", "tests.engines.turbomind_script"],
}
ABOUT_QUANTISED: Mapping[Engine, list[str]] = {
    **PROGRAMS,
    "vllm": ["-m", "tests.engines.vllm_quantised_script"],
}
DTYPES: Mapping[Engine, str] = {"vllm": "float32", "lmdeploy": "float32", "turbomind": "bfloat16"}
"""TurboMind computes in nothing wider."""


@pytest.fixture(autouse=True)
def no_sockets() -> None:
    """Refuse nothing: engines speak to processes of their own over sockets, by the machine's own address."""


@pytest.fixture(scope="session")
def engines_python(pytestconfig: pytest.Config) -> Path:
    """Return the interpreter of the engines' environment."""
    given = pytestconfig.getoption("--engines-python")
    if given is None:
        pytest.skip("needs --engines-python, an interpreter with vLLM and LMDeploy: make engines")
    os.environ.pop("SOCKET_LOG", None)  # in the engines' own processes nothing is refused
    os.environ["HF_HUB_OFFLINE"] = "1"  # and they ask no hub
    return Path(given).absolute()


@pytest.fixture(scope="session")
def prepared(
    request: pytest.FixtureRequest,
    engines_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cli: Callable[..., Any],
) -> Mapping[str, Prepared]:
    """Return the merged checkpoint of every case that is asked for, and of two that are tampered with."""
    root = tmp_path_factory.mktemp("engines")
    asked = {case.name for case in _asked(request, Case)}
    return {
        case.name: prepare(root, case, cli)
        for case in CASES
        if case.name in {*asked, PLAIN.name, UNTIED_BY_MERGE.name}
    }


def _asked(request: pytest.FixtureRequest, kind: type[Given]) -> list[Given]:
    """Return what the session's tests are given of a kind, whatever their parameters are called."""
    callspecs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    return [given for spec in callspecs for given in spec.params.values() if isinstance(given, kind)]


@pytest.fixture(scope="session")
def tampered_with(
    prepared: Mapping[str, Prepared], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Return checkpoints with something wrong about them, by what it is."""
    root = tmp_path_factory.mktemp("tampered")
    plain, untied = prepared[PLAIN.name], prepared[UNTIED_BY_MERGE.name]
    found = {
        # The first one: its lost tensor may get the memory of one that was loaded before, and with it the right values.
        "a tensor short": root / "short",
        "no checkpoint": root / "nothing",
        "the base alone": plain.base,
        "the merged one in shards": root / "shards",
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
    merged = {name: about.merged for name, about in prepared.items()}
    bases = {
        f"base of {case.name}": prepared[case.name].base
        for case in CASES
        if case.otherwise and case.name in merged
    }
    checkpoints = {**tampered_with, **merged, **bases}
    asker = Asker(engines_python, tmp_path_factory.mktemp("said"))
    jobs = [job(path, trust_remote_code=True) for path in checkpoints.values()]
    return {
        engine: dict(zip(checkpoints, asker.ask(program, DTYPES[engine], jobs), strict=True))
        for engine, program in PROGRAMS.items()  # one after the other: their threads would wait for each other's
    }


@pytest.fixture(scope="session")
def shown(
    request: pytest.FixtureRequest,
    engines_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cli: Callable[..., Any],
) -> Mapping[str, Served]:
    """Return every adapter that is asked for, converted for every engine that it is shown to."""
    root = tmp_path_factory.mktemp("adapters")
    asked = {about.name for about in _asked(request, Adapted)}
    return {about.name: prepare_served(root, about, cli) for about in ADAPTERS if about.name in asked}


@pytest.fixture(scope="session")
def said_with(
    shown: Mapping[str, Served], engines_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[Server, Mapping[Key, Line]]:
    """Return what engines generate with every adapter beside its base, by its name and how it is served.

    That is: the ``"original"``; the same where vLLM is ``"told"`` its rank, if that is over the default; the one that is
    ``"converted"`` for the engine; and for LMDeploy, all of these of one base ``"together"``.
    """
    asker = Asker(engines_python, tmp_path_factory.mktemp("said-with"))

    def to(server: Server) -> dict[str, Served]:
        return {
            about.name: shown[about.name]
            for about in ADAPTERS
            if about.name in shown and server in about.asked
        }

    return {"vllm": asker.vllm(to("vllm")), "lmdeploy": asker.lmdeploy(to("lmdeploy"))}


@pytest.fixture(scope="session")
def merged(
    engines_python: Path, tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]
) -> Mapping[str, Merged]:
    """Return what was merged into every quantised base, by title."""
    root = tmp_path_factory.mktemp("quantised")
    return {about.title: prepare_stored(root, about, cli) for about in STORED}


@pytest.fixture(scope="session")
def said_of_stored(
    merged: Mapping[str, Merged], engines_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[Engine, Mapping[str, Line]]:
    """Return what every engine says about every output of a quantised base, and about one ``"without exceptions"``."""
    jobs = {
        f"{about.title}, {output}": job(
            merged[about.title].outputs[output],
            prompts=merged[about.title].prompts,
            dtype="float32"
            if output == "dense"
            else "bfloat16",  # of vLLM's products there are none in float32
        )
        for about, output in ROWS
    }
    wrong, right = tmp_path_factory.mktemp("wrong") / "mixed", merged[FP8_LLAMA.title]
    shutil.copytree(right.outputs["mixed"], wrong)
    settings = json.loads((right.base / "config.json").read_text())["quantization_config"]
    edit_json(wrong / "config.json", quantization_config=settings)
    jobs["without exceptions"] = job(wrong, prompts=right.prompts, dtype="bfloat16")
    asker = Asker(engines_python, tmp_path_factory.mktemp("said-of-stored"))
    return {
        engine: dict(zip(jobs, asker.ask(program, DTYPES[engine], list(jobs.values())), strict=True))
        for engine, program in ABOUT_QUANTISED.items()
    }
