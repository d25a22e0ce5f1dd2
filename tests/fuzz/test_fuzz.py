"""A short form of ``make fuzz``: the corpus, mutations of it by hypothesis, and the fuzzer itself for a moment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CORPUS, TARGETS, check

ONLY = [f"--only={name}" for name in ("header", "index", "pickled", "manifest", "paths", "tensor_names")]
"""Targets that start within seconds."""

ROOT = Path(__file__).parents[2]


def seeds(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_ends_in_answers_and_sentences(name):
    assert seeds(name)
    for data in seeds(name):
        check(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_close_to_the_corpus_does_too(name):
    pieces = st.lists(st.sampled_from(seeds(name)) | st.binary(max_size=40), min_size=1, max_size=3)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        pieces,
        st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(max_size=6)), max_size=6),
    )
    def run(parts, edits):
        data = b"".join(parts)
        for at, cut, new in edits:
            start = at % (len(data) + 1)
            data = data[:start] + new + data[start + cut :]
        check(name, data)

    run()


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (Linux, CPython up to 3.13)"
)
@pytest.mark.system
def test_the_fuzzer_finds_nothing_in_a_moment(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fuzz.py", "--runs", "3000", "--found", tmp_path, *ONLY],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3000 executions" in done.stdout
