"""A terminal, a pipe or a log that goes away costs lines and nothing else; whatever it is, it can be written to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lora_merge
from lora_merge.cli import exits
from lora_merge.storage.staging import staging_path

pytestmark = pytest.mark.system

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no disk that is full here")


@pytest.fixture(scope="module")
def inputs(pico, pico_adapter):
    base = pico()
    return base, pico_adapter(base)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Return the digest of every file of the merge, but for its name."""
    out = tmp_path_factory.mktemp("whole") / "merged"
    done = command(*merging(inputs, out))
    assert done.returncode == 0, done.stderr
    return digests(out)


def merging(inputs, out):
    return ["--base", inputs[0], "--adapter", inputs[1], "--out", out]


def command(*arguments, environ=None, **how):
    """Run the command as users do, in a process."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120, **how}
    words = [sys.executable, "-m", "lora_merge", *map(str, arguments)]
    return subprocess.run(words, env=os.environ | (environ or {}), check=False, **how)


def shell(line, *arguments):
    """Run the command where a line of the shell has ``"$@"``."""
    words = ["sh", "-c", line, "sh", sys.executable, "-m", "lora_merge", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def digests(out):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.name != "README.md"  # has the output's name in it
    }


@pytest.mark.parametrize(
    "line",
    [
        '"$@" 2>&-',
        '"$@" >&-',
        '"$@" <&- >&- 2>&-',
        pytest.param('"$@" 2>/dev/full', marks=needs_full),
        pytest.param('"$@" -v >/dev/full 2>&1', marks=needs_full),
        '{ "$@" -v 2>&1; echo $? >&3; } 3>&1 >/dev/null | { read code; exit $code; }',
        '{ { "$@" -v 2>&1; echo $? >&3; } | head -1 >/dev/null; } 3>&1 | { read code; exit $code; }',
    ],
)
def test_a_merge_is_made_whatever_becomes_of_its_lines(line, inputs, whole, tmp_path):
    out = tmp_path / "merged"

    done = shell(line, *merging(inputs, out))

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert digests(out) == whole
    assert not staging_path(out).exists()


@needs_full
def test_a_result_that_stdout_does_not_take_is_said_and_the_output_is_whole(inputs, whole, tmp_path):
    out = tmp_path / "merged"
    with FULL.open("w") as full:
        done = command(*merging(inputs, out), "--json", "-q", stdout=full)

    assert done.returncode == 0
    said = "warning: the result cannot be written to stdout (No space left on device)\n"
    assert done.stderr == said
    assert digests(out) == whole


@needs_full
@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["--version"]])
def test_where_the_result_is_all_there_is_losing_it_is_an_error(arguments, inputs):
    with FULL.open("w") as full:
        verb = [*arguments, *([inputs[1]] if arguments[0] == "inspect" else [])]
        done = command(*verb, stdout=full)

    assert done.returncode == exits.WRITE
    assert done.stderr.splitlines()[-1].startswith("error: the result cannot be written to stdout")


def test_a_reader_that_has_enough_is_no_error(inputs):
    done = shell('"$@" | head -1', "inspect", inputs[1], "--json")

    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "{", "")


ANSI = re.compile(r"\x1b\[(\?25[lh]|[0-9;]*[mKA])")
"""What moves our bars and colours our tables."""

HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b31m\r\nFAKED\u202e\u200b[_b][red]:smile:"


@pytest.mark.parametrize("verb", ["merge", "verify", "inspect", "batch"])
def test_a_terminal_gets_our_own_control_characters_and_no_others(verb, inputs, tmp_path):
    base, adapter = (shutil.copytree(source, tmp_path / f"{n}{HOSTILE}") for n, source in enumerate(inputs))
    out = tmp_path / f"2{HOSTILE}"
    file = tmp_path / f"{HOSTILE}.yaml"
    file.write_text(json.dumps({"jobs": [{"base": str(base), "adapter": str(adapter), "out": str(out)}]}))
    if verb == "verify":
        lora_merge.merge(base=base, adapter=adapter, out=out)
    words = {
        "merge": ["-v", "--base", base, "--adapter", adapter, "--out", out],
        "verify": ["verify", out],
        "inspect": ["inspect", adapter, "--base", base],
        "batch": ["batch", file],
    }
    code, shown = on_terminal(*words[verb])

    lines = ANSI.sub("", shown).replace("\r", "\n").split("\n")
    assert code == 0, shown
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.lstrip(" │").startswith("FAKED")]
    assert "FAKED" in shown.replace("\r\n", "")
    assert "🙂" not in shown
    assert "😄" not in shown


def on_terminal(*arguments):
    """Run the command on a terminal of 80 columns; return its exit code and all that it got."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["COLUMNS"] = "80"
        os.execv(sys.executable, [sys.executable, "-m", "lora_merge", *map(str, arguments)])
    got = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(terminal, 1 << 16):
            got += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), got.decode()


@pytest.mark.parametrize("hears", [True, False])
def test_a_terminal_that_hangs_up_ends_a_run_in_order_and_not_one_that_was_told_to_stay(
    hears, inputs, whole, tmp_path
):
    out = tmp_path / "merged"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if hears else signal.SIG_IGN)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "lora_merge", *map(str, merging(inputs, out))])
    deadline = time.monotonic() + 60
    while not staging_path(out).exists() and not out.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    if hears and code:
        assert code == exits.INTERRUPTED
        assert not out.exists()
        done = command(*merging(inputs, out), "--resume")
        assert done.returncode == 0, done.stderr
    else:
        assert code == 0  # it was done before the terminal had gone
    assert digests(out) == whole


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"COLUMNS": "1"},
        {"COLUMNS": "1000000000000"},
        {"COLUMNS": "²", "LINES": "-1"},
        {"TERM": "dumb", "NO_COLOR": "1"},
        {"FORCE_COLOR": "1"},
    ],
    ids=str,
)
def test_any_terminal_shows_a_name_that_it_has_no_letters_for(environ, inputs, tampered):
    adapter = tampered(inputs[1], "αβγ ☃ [/b]")

    done = command("inspect", adapter, environ=environ, text=False)

    assert done.returncode == 0, done.stderr
    # What to do next is a command to copy: one line, whatever the terminal says its width is.
    title, line = done.stderr.splitlines()
    assert title == b"merge it:"
    assert line.startswith(b"  lora-merge --base ")
    assert b"[/b]' --out merged" in line
    assert max(map(len, done.stdout.splitlines())) < 3000
    shown = done.stdout.replace(b"\n", b"").decode("latin-1")
    assert "[/b]" in shown or environ.get("COLUMNS") == "1"


def test_a_program_that_uses_the_library_keeps_its_streams(inputs, tmp_path):
    program = (
        "import sys, warnings, logging, lora_merge\n"
        "before = sys.stdout, sys.stderr, warnings.showwarning, sys.excepthook, list(logging.root.handlers)\n"
        "base, adapter, out = sys.argv[1:]\n"
        "lora_merge.merge(base=base, adapter=adapter, out=out)\n"
        "after = sys.stdout, sys.stderr, warnings.showwarning, sys.excepthook, list(logging.root.handlers)\n"
        "print(before == after)\n"
    )
    words = [sys.executable, "-c", program, *map(str, inputs), str(tmp_path / "merged")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("True\n", "")


class Failing:
    """An observer that fails on the way."""

    def __init__(self):
        self.n = 0

    def phase(self, name, total_bytes): ...

    def advance(self, nbytes): ...

    def done(self, name):
        self.n += 1
        if self.n == 5:
            raise BrokenPipeError("nobody reads this")


def test_an_observer_that_fails_ends_the_run_and_keeps_what_is_whole(inputs, whole, tmp_path):
    base, adapter = inputs
    out = tmp_path / "merged"
    with pytest.raises(BrokenPipeError) as caught:
        lora_merge.merge(base=base, adapter=adapter, out=out, observer=Failing())

    assert ["run again with --resume" in note for note in caught.value.__notes__] == [True]
    assert not out.exists()
    report = lora_merge.merge(base=base, adapter=adapter, out=out, resume=True)
    assert [issue.code for issue in report.issues if issue.code == "resumed"]
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert manifest["tensors"]
    assert digests(out)["model.safetensors"] == whole["model.safetensors"]
