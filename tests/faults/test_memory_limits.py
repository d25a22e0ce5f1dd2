"""A limit on memory (``ulimit -v``) ends a run in the sentence of memory, wherever it is met, and keeps what is staged."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import lora_merge
from lora_merge.cli import exits
from lora_merge.storage.staging import staging_path

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def inputs(pico, pico_adapter, tmp_path_factory):
    base = pico()
    adapter = pico_adapter(base)
    out = tmp_path_factory.mktemp("merged") / "merged"
    lora_merge.merge(base=base, adapter=adapter, out=out)
    return base, adapter, out


def limited(megabytes, *arguments):
    """Run the command with so much address space."""
    nbytes = megabytes * 1_000_000
    return subprocess.run(
        [sys.executable, "-m", "lora_merge", *map(str, arguments)],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes)),
    )


def check_end(done):
    """Check that a run is done, or ends in one sentence; return which."""
    assert "Traceback" not in done.stderr
    assert "bug in" not in done.stderr
    if done.returncode == 0:
        return True
    assert done.returncode == exits.WRITE, done.stderr
    assert done.stderr.count("error:") == 1
    assert "the machine has no memory left" in done.stderr
    assert "hint: " in done.stderr
    return False


@pytest.mark.parametrize("megabytes", [80, 120, 250, 600, 860])
def test_a_merge_ends_in_one_sentence_and_goes_on_from_there(megabytes, inputs, tmp_path):
    base, adapter, _ = inputs
    out = tmp_path / "merged"

    if check_end(limited(megabytes, "--base", base, "--adapter", adapter, "--out", out)):
        return

    assert not out.exists()
    if staging_path(out).exists():  # torch did not fit, and copies were done by then
        report = lora_merge.merge(base=base, adapter=adapter, out=out, resume=True)
        assert [issue.code for issue in report.issues if issue.code == "resumed"]
        assert not staging_path(out).exists()


def test_what_was_copied_before_torch_did_not_fit_is_kept(pico, pico_adapter, tmp_path):
    base = pico(dtype="float16")
    adapter = pico_adapter(base)
    # Torch is loaded beside the copies, and mostly fails after the first of them.
    for n in range(5):
        out = tmp_path / str(n)
        done = limited(300, "--base", base, "--adapter", adapter, "--out", out)
        assert done.returncode == exits.WRITE
        assert ("run again with --resume" in done.stderr) == staging_path(out).exists()
        if staging_path(out).exists():
            return
    pytest.fail("nothing was ever copied before torch did not fit")


@pytest.mark.parametrize("megabytes", range(180, 300, 8))
def test_a_merge_without_torch_neither_hangs_nor_aborts(megabytes, inputs, tmp_path):
    base, adapter, _ = inputs
    check_end(limited(megabytes, "--base", base, "--adapter", adapter, "--out", tmp_path / "merged"))


@pytest.mark.parametrize(
    ("megabytes", "verb"),
    [(80, "verify"), (860, "verify"), (120, "inspect"), (520, "inspect"), (520, "convert")],
)
def test_other_verbs_end_so_too(megabytes, verb, inputs, tmp_path):
    base, adapter, merged = inputs
    words = {
        "verify": [merged],
        "inspect": [adapter, "--base", base],
        "convert": [adapter, "--rank", "2", "--out", tmp_path / "out"],
    }
    check_end(limited(megabytes, verb, *words[verb]))

    assert not (tmp_path / "out").exists()
