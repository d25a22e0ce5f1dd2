"""What a terminal shows, at 80 x 24 and at 140 x 40: nothing is wider than it, and no word or command is broken."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from lora_merge.cli.layout import Column, Mark, cells, facts, grid, shortened, wrapped
from lora_merge.cli.meter import Meter
from lora_merge.cli.next_steps import continued
from lora_merge.cli.progress import bar_text
from lora_merge.cli.watching import board_lines

pytest.importorskip("pyte", reason="pyte, which emulates a terminal, is not installed")

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(80, 24), (140, 40)]
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def load_terminal():
    """Return the module with which the pictures of the documentation are made."""
    path = ROOT / "scripts" / "picturing" / "terminal.py"
    spec = importlib.util.spec_from_file_location("picturing_terminal", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TERMINAL = load_terminal()


@pytest.fixture(scope="module")
def folder(pico, pico_adapter, tmp_path_factory):
    """Return a directory with a base and an adapter, named as users name them."""
    root = tmp_path_factory.mktemp("screens")
    base = pico()
    shutil.copytree(base, root / "base")
    shutil.copytree(pico_adapter(base, target_modules="all-linear"), root / "my-lora")
    return root


def shown(folder, *words, size, status=0, **environ):
    columns, rows = size
    session = TERMINAL.record(
        [sys.executable, "-m", "lora_merge", *words], columns=columns, rows=rows, cwd=folder, environ=environ
    )
    assert session.status == status, session.frames[-1].text
    return session


def assert_whole(session, *words):
    """Assert that words and commands stand on one line each, and that no word is cut by the end of a line."""
    lines = session.frames[-1].lines
    for word in words:
        assert any(word in line for line in lines), (word, lines)
    columns = len(session.frames[-1].rows[0])
    # A line that fills the terminal to its last column, and goes on in the next, has been broken by the terminal.
    assert not [line for line in lines if cells(line) >= columns]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_merge_verify_and_inspect_fit_the_terminal(folder, size):
    out = f"merged-{size[0]}"

    merged = shown(folder, "--base", "base", "--adapter", "my-lora", "--out", out, size=size)
    assert merged.frames[-1].lines[0] == "Llama 68k, bf16 + LoRA r4 on 14 modules → dense bf16"
    assert_whole(merged, f"  vllm serve {out}", "merged 14 tensors, copied 7")
    assert "/?" not in "".join(frame.text for frame in merged.frames)

    proof = shown(folder, "verify", out, size=size)
    assert_whole(proof, "verified: all checks passed", f"  vllm serve {out}")

    found = shown(folder, "inspect", "my-lora", "--base", "base", "--engine", "tgi", size=size)
    assert_whole(
        found, "lora-merge --base base --adapter my-lora --out merged", "model.layers.0-1.mlp.down_proj"
    )


def test_an_error_is_red_has_its_hint_below_and_keeps_relative_paths(folder):
    session = shown(
        folder, "--base", "base", "--adapter", "my-lroa", "--out", "wrong", size=(80, 24), status=3
    )

    screen = session.frames[-1]
    (at,) = [n for n, line in enumerate(screen.lines) if line.startswith("error: my-lroa: ")]
    assert {glyph.colour for glyph in screen.rows[at][:5]} == {"red"}
    assert {glyph.colour for glyph in screen.rows[at][7:]} == {"default"}
    assert any(line.startswith("hint: ") for line in screen.lines[at + 1 :])
    assert str(folder) not in screen.text


def test_no_color_turns_colours_off(folder):
    words = ("--base", "base", "--adapter", "my-lroa", "--out", "wrong")

    session = shown(folder, *words, size=(80, 24), status=3, NO_COLOR="1")

    assert {glyph.colour for row in session.frames[-1].rows for glyph in row} == {"default"}


def test_a_dry_run_ends_with_the_command_that_merges(folder):
    session = shown(
        folder, "--base", "base", "--adapter", "my-lora:0.5", "--out", "x", "--dry-run", size=(80, 24)
    )

    assert_whole(session, "  lora-merge --base base --adapter my-lora:0.5 --out x", "peak memory", "written")
    assert "0.00" not in session.frames[-1].text
    assert not (folder / "x").exists()


# ---------------------------------------------------------------------------- layout


LONG = "model.language_model.layers.0-93.mlp.experts.0-127.gate_up_proj"


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_table_fits_and_breaks_no_word(width):
    columns = [Column("module"), Column("n", "number"), Column("about", "text"), Column("note", can_go=True)]
    rows = [
        (LONG, "128 ×", "the quick brown fox jumps over the lazy dog " * 2, "whatever"),
        ("a", "1", "b", "c"),
    ]

    lines = [STYLE.sub("", line) for line in grid(columns, rows, width)]

    assert max(map(cells, lines)) <= width
    told = " ".join(lines).split()
    assert {"quick", "brown", "jumps"} <= set(told)
    assert "128" in told


def test_a_pipe_gets_whole_rows():
    (head, row) = grid([Column("module"), Column("about", "text")], [(LONG, "word " * 60)], None)

    assert LONG in row
    assert row.count("word") == 60
    assert "module" in head


def test_text_is_wrapped_between_words_and_commands_are_left_whole():
    command = "`lora-merge --base a --adapter b --out c`"

    lines = wrapped(f"error: it is so and so, run {command} to see", 40)

    assert command in [line.strip() for line in lines]
    assert all(cells(line) <= 40 for line in lines if command not in line)


def test_a_path_keeps_its_end_and_a_style_its_text():
    assert shortened("/data/models/org/Llama-3-8B/snapshots/abc/merged", 30) == "/data/…/snapshots/abc/merged"
    assert cells(shortened("x" * 200, 20)) == 20
    assert facts([("state", Mark("failed", "31"))], 40) == ["  state  \x1b[31mfailed\x1b[0m"]


def test_a_command_that_is_too_long_goes_on_after_a_backslash_before_an_option():
    line = (
        "lora-merge --base base --adapter style:0.7 --adapter facts --combine ties --density 0.5 --out both"
    )

    lines = continued(line, 60)

    assert all(cells(one) <= 60 for one in lines)
    assert " ".join(one.removesuffix(" \\").strip() for one in lines) == line
    assert continued(line, None) == [f"  {line}"]
    assert continued("vllm serve " + "x" * 90, 60) == ["  vllm serve " + "x" * 90]


# ---------------------------------------------------------------------------- progress


def run_of(seconds, step, nbytes):
    """Return a meter that heard of the same number of bytes in each step, and the time at its end."""
    meter = Meter(100.0)
    meter.begin(10**9, 100.0)
    meter.enter("merging", 10**9, 100.0)
    n = round(seconds / step)
    for k in range(1, n + 1):
        meter.add(nbytes // n, 100.0 + k * step)
    return meter, 100.0 + seconds


def test_the_rate_depends_on_time_and_not_on_how_often_progress_is_heard_of():
    rates = [meter.rate(now) for meter, now in (run_of(20, step, 4 * 10**8) for step in (0.01, 0.1, 0.5))]

    assert rates == pytest.approx([2e7] * 3, rel=0.1)


def test_the_rate_follows_a_change_within_some_seconds():
    meter, now = run_of(60, 0.1, 3 * 10**8)
    for k in range(200):
        meter.add(10**6, now + k * 0.1)

    assert meter.rate(now + 20) == pytest.approx(1e7, rel=0.1)


def test_time_in_which_torch_loads_is_taken_out_of_the_rate():
    meter, now = run_of(10, 0.1, 10**8)
    before = meter.rate(now)

    meter.enter("loading torch", 0, now)
    meter.enter("merging", 9 * 10**8, now + 30)

    assert meter.rate(now + 30) == pytest.approx(before)
    assert meter.left(now + 30) == pytest.approx((10**9 - meter.done) / before)


def test_nothing_is_promised_by_the_first_bytes():
    meter = Meter(0.0)
    meter.begin(10**9, 0.0)
    meter.enter("copying", 10**9, 0.0)
    meter.add(20_000, 1.5)

    assert meter.left(1.5) is None


@pytest.mark.parametrize("width", [20, 40, 80, 140])
@pytest.mark.parametrize("done", [0, 1, 10**6, 10**9])
def test_the_bar_fits_and_never_asks_of_what(width, done):
    meter = Meter(0.0)
    meter.begin(10**9, 0.0)
    meter.enter("making factors", 10**9, 0.0)
    meter.add(done, 2.0)

    text = bar_text(meter, 2.5, width).plain

    assert cells(text) <= width
    assert "?" not in text
    assert f"{done // 10**7}%" in text or width < 40


def test_a_phase_of_unknown_length_shows_its_time():
    meter = Meter(0.0)
    meter.enter("verifying", 0, 0.0)

    assert bar_text(meter, 75.0, 80).plain.split() == ["verifying", "1:15"]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_batch_with_more_jobs_than_lines_shows_those_that_run(width, height):
    names = [f"out/adapter-{n}/checkpoint-{n * 1000}" for n in range(300)]
    states = dict.fromkeys(names, "done") | dict.fromkeys(names[200:], "planned")
    states |= {names[150]: "failed", names[199]: "running"}

    lines = [STYLE.sub("", line) for line in board_lines(states, width, height)]

    assert len(lines) < height
    assert max(map(cells, lines)) < width
    assert f"  {names[199]}" in " ".join(lines)
    assert [line for line in lines if names[150] in line and "failed" in line]
    assert lines[0] == "1 running, 1 failed, 100 planned, 198 done"
    n_shown = len(lines) - 3
    assert sum(map(int, re.findall(r"\d+", lines[-1]))) == 300 - n_shown
