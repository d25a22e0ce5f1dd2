"""Messages about tensors with long names, in a terminal of 80 columns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_merge
from lora_merge.cli import exits
from lora_merge.cli.layout import cells, wrapped
from tests.rounding import adapter_for
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 80
PREFIX = "model.language_model.embedded_multimodal_decoder_stack.layers."


def in_terminal(*arguments: object) -> tuple[int, list[str]]:
    """Run the command in a terminal; return its exit status, and the lines without their styles."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.pop("COLUMNS", None)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", "lora_merge", *map(str, arguments)])
    said = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while part := os.read(terminal, 1 << 16):
            said += part
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()).replace("\r\n", "\n")
    return (
        os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
        # Of what is drawn again and again, the last.
        [line.split("\r")[-1] for line in text.split("\n")],
    )


def assert_fits(lines: list[str], width: int = WIDTH) -> None:
    """Assert that lines fit, except those of a word that is longer than a line, with at most one word before it."""
    for line in lines:
        *before, last = line.split()[-2:] or [""]
        hang = len(line) - len(line.lstrip())
        assert cells(line) <= width or (
            len(line.split()) <= 2
            and cells(last) > width - max(hang, 10)
            and all(cells(word) < width // 4 for word in before)
        ), line


def longer(path: Path) -> None:
    """Give the tensors of the layers in a file longer names."""

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.layers.", PREFIX)] = tensors.pop(name)

    edit_tensors(path, rename)


@pytest.fixture(scope="module")
def long(pico, tmp_path_factory):
    """A base, an adapter for it, and an output of them, with long names: three directories."""
    root = tmp_path_factory.mktemp("long")
    base, adapter = root / "base", root / "adapter"
    shutil.copytree(pico("llama", "bfloat16"), base)
    # A class whose parameters are not known to us: otherwise each long name would be a parameter that the model lacks.
    edit_json(base / "config.json", architectures=["OtherForCausalLM"], model_type="other")
    adapter_for(base, adapter)
    longer(base / "model.safetensors")
    longer(adapter / "adapter_model.safetensors")
    lora_merge.merge(base=base, adapter=adapter, out=root / "out")
    return base, adapter, root / "out"


def broken(long, root: Path) -> Path:
    """Return a copy of the output in which merged tensors have wrong values."""
    shutil.copytree(long[2], root)

    def change(tensors):
        for name in tensors:
            if "mlp" in name:
                tensors[name].view(-1)[5] += 0.5

    edit_tensors(root / "model.safetensors", change)
    return root


def test_what_differs_fits_and_has_whole_names(long, tmp_path):
    status, lines = in_terminal("verify", broken(long, tmp_path / "out"))

    assert status == exits.VERIFY
    assert_fits(lines)
    # The names are longer than a line: what is wrong with them is below.
    for check, wrong in [("recorded", "has changed since"), ("recompute", "row 0, column 5 is")]:
        at = lines.index(f"  {check}: {PREFIX}1.mlp.gate_proj.weight:")
        assert lines[at + 1].startswith(f"    {wrong}"), lines
    assert any(line.startswith("hint: merge again") for line in lines)


def test_the_short_list_has_whole_names_and_what_is_wrong(long, tmp_path):
    status, lines = in_terminal("verify", broken(long, tmp_path / "out"), "-q")

    assert status == exits.VERIFY
    assert_fits(lines)
    at = lines.index(f"  {PREFIX}0.mlp.down_proj.weight:")
    assert re.fullmatch(r"    has changed since it was written: .*…", lines[at + 1])
    assert lines[at + 2].startswith(f"  {PREFIX}")


def test_an_output_without_a_manifest_fits(long, tmp_path):
    out = broken(long, tmp_path / "out")
    (out / "merge_manifest.json").unlink()
    status, lines = in_terminal("verify", out, "--base", long[0], "--adapter", long[1])

    assert status == exits.VERIFY
    assert_fits(lines)
    assert f"  recompute: {PREFIX}0.mlp.up_proj.weight:" in lines


def test_a_refused_merge_fits_and_names_are_whole_in_lists(long, tmp_path):
    base, adapter, _ = long
    wrong = tmp_path / "adapter"
    shutil.copytree(adapter, wrong)

    def spoil(tensors):
        for name in list(tensors):
            if "q_proj.lora_A" in name:
                del tensors[name]
            elif "mlp" in name:
                tensors[name.replace("mlp", "feed_forward")] = tensors.pop(name)
            elif "k_proj" in name or "o_proj.lora_B" in name:
                tensors[name][0, 0] = float("nan")

    edit_tensors(wrong / "adapter_model.safetensors", spoil)
    status, lines = in_terminal("--base", base, "--adapter", wrong, "--out", tmp_path / "out")

    assert status == exits.PLAN
    assert_fits(lines)
    words = " ".join(lines).split()
    # In a list, in a sentence, and in a hint.
    assert f"base_model.model.{PREFIX}{{0-1}}.self_attn.k_proj.lora_A.weight," in words
    assert f"{PREFIX}0.feed_forward.down_proj.weight" in words
    assert f"{PREFIX}0.mlp.down_proj.weight" in words
    assert any(line.lstrip().startswith("hint: check --base; the base's nearest name is") for line in lines)


PARTS = st.sampled_from(
    ["model", "language_model", "layers", "0", "self_attn", "{0-3, 5}", "gate_up_proj", "weight"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=14).map(".".join)
NAME = re.compile(r"(?:\{[^}]*\}|\S)+")
WORDS = st.one_of(NAMES, st.text("abc", min_size=1, max_size=12))


@given(st.lists(WORDS, min_size=1, max_size=9), st.sampled_from([0, 2, 4, 6]), st.sampled_from([2, 4, 6]))
def test_words_are_whole_and_those_that_are_longer_than_a_line_end_it(words, indent, hang):
    text = " " * indent + " ".join(words)
    lines = wrapped(text, WIDTH, hang)

    assert " ".join(line.strip() for line in lines) == text.strip()
    for line in lines:
        *before, last = NAME.findall(line)
        room = WIDTH - (hang if before or line != lines[0] else max(hang, indent))
        assert cells(line) <= WIDTH or (len(before) <= 1 and cells(last) > room), line
    assert [word for line in lines for word in NAME.findall(line)] == words


@given(st.lists(WORDS, min_size=1, max_size=9), st.sampled_from([0, 2, 4, 6]), st.sampled_from([2, 4, 6]))
def test_where_words_may_be_broken_all_lines_fit(words, indent, hang):
    text = " " * indent + " ".join(words)
    lines = wrapped(text, WIDTH, hang, break_words=True)

    assert max(map(cells, lines)) <= WIDTH
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    for word in words:
        if cells(word) <= WIDTH - max(indent, hang):
            assert any(word in line for line in lines), word


def test_a_part_that_is_longer_than_a_line_is_broken_after_an_underscore():
    lines = wrapped("a_" * 60, WIDTH, break_words=True)
    assert max(map(cells, lines)) <= WIDTH
    assert lines[0].endswith("a_")
