"""Every fault and every hostile input has one clear sentence and its exit code; nothing is lost, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_merge.cli.progress import _Lines
from tests.faults.other_users import in_python, open_to_all
from tests.faults.table import FAULTS, HOSTILE, MISTAKES, NOBODY, Fault, Place
from tests.faults.trial import content

BOMB = Path("/tmp/lora-merge-bomb")


def can_mount() -> bool:
    """Return True where this process may mount a filesystem."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    done = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True)
    return done.returncode == 0


@pytest.fixture
def place(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16", "60KB")
    adapter = pico_adapter(base)
    copies = [
        shutil.copytree(source, tmp_path / name) for source, name in ((base, "base"), (adapter, "adapter"))
    ]
    return Place(tmp_path, *copies, tmp_path / "out")


def words(text: str, place: Place) -> str:
    return text.format(base=place.base, adapter=place.adapter, out=place.out)


def arguments(place: Place) -> list[str]:
    return [
        "--base",
        str(place.base),
        "--adapter",
        str(place.adapter),
        "--out",
        str(place.out),
        *place.options,
    ]


@pytest.fixture
def interfering(place, monkeypatch):
    """Have the fault happen when the first tensor is done."""
    n_done = 0

    def done(self, name):
        nonlocal n_done
        n_done += 1
        if n_done == 1 and place.during is not None:
            place.during()

    monkeypatch.setattr(_Lines, "done", done)


@pytest.mark.parametrize("fault", [*FAULTS, *MISTAKES, *HOSTILE], ids=lambda fault: fault.name)
def test_a_fault_has_its_sentence_and_nothing_is_lost(fault: Fault, place, cli, interfering, tmp_path):
    if fault.needs == "root" and not can_mount():
        pytest.skip("only root may mount a filesystem")
    if fault.needs == "nobody" and os.geteuid() == 0:
        pytest.skip("root may do everything; the test below does it as somebody else")
    resumed = []

    def resume() -> None:
        place.during = None
        resumed.append(cli(*arguments(place), "--resume"))

    place.resume = resume
    context = fault.cause(place) or contextlib.nullcontext()
    before = everything(tmp_path)
    with context:
        result = cli(*arguments(place))
        assert result.exit_code == fault.code, (result.stderr, result.exception)
        check_sentence(result.stderr, words(fault.says, place))
        assert (content(place.out) if place.out.exists() else None) == (
            place.appeared or before.get(str(place.out))
        )
    if fault.is_resumed:
        assert re.search(
            r"hint: run again with --resume to continue: \d+ finished tensors? kept in ", result.stderr
        )
        if not resumed:
            resume()
        assert resumed[0].exit_code == 0, resumed[0].stderr
        assert "interrupted run had already written" in resumed[0].stderr
        assert not list(tmp_path.rglob("*.lora-merge-staging"))
    assert not BOMB.exists()


def check_sentence(text: str, says: str) -> None:
    """Check that a text has one error, with these words, and nothing that steers a terminal."""
    assert says in text, text
    assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in text
    assert "\x1b" not in text


def everything(root: Path) -> dict[str, dict[str, str]]:
    return {str(path): content(path) for path in root.iterdir() if path.is_dir() and os.access(path, os.R_OK)}


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may become somebody else; the table has been run as nobody"
)
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.needs == "nobody"], ids=lambda fault: fault.name
)
def test_what_is_not_permitted_has_its_sentence(fault: Fault, place, tmp_path, tmp_path_factory):
    open_to_all(tmp_path, tmp_path_factory)
    fault.cause(place)
    program = (
        "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from lora_merge.cli import entry\n"
        f"import torch, click, yaml, rich, pydantic, xxhash, transformers; os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "sys.argv[1:] = sys.argv[2:]; entry()"
    )
    done = in_python(program, *arguments(place))

    assert done.returncode == fault.code, done.stderr
    assert words(fault.says, place) in done.stderr
    assert done.stderr.count("error:") == 1


def test_code_that_a_model_carries_is_copied_and_never_run(place, cli, tmp_path):
    from tests.tampering import edit_json

    marker = tmp_path / "ran"
    for root in (place.base, place.adapter):
        for name in ("modeling_evil", "configuration_evil", "torch", "sitecustomize", "conftest"):
            (root / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').write(__file__)\n")
    edit_json(
        place.base / "config.json",
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )
    edit_json(
        place.adapter / "adapter_config.json",
        auto_mapping={"parent_library": "modeling_evil", "base_model_class": "M"},
    )

    result = cli(*arguments(place))

    assert result.exit_code == 0, result.stderr
    assert (place.out / "modeling_evil.py").is_file()
    assert not marker.exists()
    verified = cli("verify", place.out)
    assert verified.exit_code == 0, verified.stderr
    assert not marker.exists()
