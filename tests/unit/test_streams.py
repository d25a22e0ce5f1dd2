"""What libraries print is a note, whatever is in it, and nothing that a stream does comes back."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time

import pytest

from lora_merge.runtime.streams import Foreign, failure_of, own

FAKED = "a \x1b[31mname\x1b]0;owned\x07\u202e\nerror: faked\r\n"


@pytest.fixture
def foreign():
    return Foreign(io.StringIO())


def text(foreign):
    foreign.finish()
    return foreign.own.getvalue()


def test_every_line_is_a_note_and_shows_what_is_in_it(foreign):
    foreign.write(FAKED)

    assert text(foreign) == "note: a \\x1b[31mname\\x1b]0;owned\\x07\\u202e\nnote: error: faked\n"


def test_lines_come_in_pieces_and_as_bytes(foreign):
    for piece in ("ab", "c\nd", "", "e"):
        foreign.write(piece)
    foreign.buffer.write(b"f\xff\n")

    assert text(foreign) == "note: abc\nnote: def\\xff\n"


def test_of_a_bar_the_last_state_is_printed(foreign):
    for percent in range(0, 101, 10):
        foreign.write(f"\r{percent}%|###|")
    foreign.write("\n")

    assert text(foreign) == "note: 100%|###|\n"


def test_a_line_without_an_end_is_printed_before_it_takes_memory(foreign):
    for _ in range(1000):
        foreign.write("x" * 100)

    assert len(foreign.own.getvalue()) > 90_000


def test_what_is_quiet_says_nothing(foreign):
    foreign.quiet = True
    foreign.write("a\nb")

    assert text(foreign) == ""


def test_ours_goes_past_it(foreign):
    own(foreign).write("ours\n")

    assert text(foreign) == "ours\n"
    assert own(sys.stdout) is sys.stdout


def guarded(program, **how):
    lines = ["import os, sys, warnings, logging", "from lora_merge.runtime import streams", "streams.guard()"]
    script = "\n".join([*lines, program])
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.run([sys.executable, "-c", script], check=False, timeout=60, **how)


def test_warnings_and_log_records_of_libraries_are_notes():
    done = guarded(
        f"name = {FAKED!r}\n"
        "warnings.warn(name, stacklevel=1)\n"
        "logging.getLogger('x').warning(name)\n"
        "logging.getLogger('y').addHandler(logging.StreamHandler())\n"
        "logging.getLogger('y').error(name)\n"
        "print(name, file=sys.stderr)\n"
    )

    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) >= 8
    assert all(line.startswith("note: ") and line.isprintable() for line in lines)


def test_closed_streams_are_open_and_no_file_gets_their_numbers():
    program = (
        "from lora_merge.runtime import streams; streams.guard()\n"
        "import os, sys; print('out'); print('err', file=sys.stderr); input_ = os.read(0, 1)\n"
        "fd = os.open('/dev/null', os.O_RDONLY)\n"
        "inherited = [os.get_inheritable(n) for n in range(3)]\n"
        "os._exit(0 if fd > 2 and input_ == b'' and all(inherited) else 1)"
    )
    line = '"$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", line, sys.executable, program], check=False)

    assert done.returncode == 0


def test_a_reader_that_leaves_is_no_failure_and_a_full_disk_is_one():
    program = (
        "print('x' * 100)\nprint('y')\n"
        "failure = streams.failure_of(sys.stdout)\n"
        "streams.own(sys.stderr).write(failure.strerror if failure else 'none')"
    )
    read, write = os.pipe()
    os.close(read)
    assert guarded(program, stdout=write).stderr == "none"
    os.close(write)
    if os.path.exists("/dev/full"):  # noqa: PTH110 - a device
        with open("/dev/full", "w") as full:  # noqa: PTH123
            assert guarded(program, stdout=full).stderr == "No space left on device"
    assert failure_of(sys.stdout) is None


def test_a_pipe_that_does_not_block_gets_all_of_it():
    read, write = os.pipe()
    os.set_blocking(write, False)
    got = []

    def take():
        while piece := os.read(read, 4096):
            got.append(piece)
            time.sleep(0.0005)

    reader = threading.Thread(target=take)
    reader.start()
    done = guarded("print('x' * 1_000_000)", stdout=write)
    os.close(write)
    reader.join()
    os.close(read)

    assert done.returncode == 0
    assert len(b"".join(got)) == 1_000_001


def test_an_encoding_without_a_letter_is_no_error():
    done = guarded("print('α\\udc80')", env=os.environ | {"PYTHONIOENCODING": "ascii"})

    assert (done.stdout, done.stderr) == ("\\u03b1\\udc80\n", "")
