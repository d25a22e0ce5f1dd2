"""Filesystems and sandboxes that lack a call, or do not permit it: the plain way is taken, and the bytes are the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_merge.cli import exits
from tests.faults import sandbox
from tests.faults.table import _failing
from tests.faults.trial import content

pytestmark = pytest.mark.system

SANDBOX = Path(sandbox.__file__)
PROGRAM = "from lora_merge.cli import entry; entry()"
FAST = ("fallocate", "fadvise64", "flock", "pwritev2", "preadv2", "renameat2")
"""Calls that are there for speed, or to be sure against what rarely happens."""


def sandboxed(code, names, arguments):
    command = [sys.executable, SANDBOX, str(code), ",".join(names), sys.executable, "-c", PROGRAM]
    return subprocess.run([*command, *map(str, arguments)], check=False, capture_output=True, text=True)


@pytest.fixture
def arguments(pico, pico_adapter, cli, tmp_path):
    """Those of a merge, but for the output; its content is in a directory ``whole/out``."""
    base = pico("llama", "bfloat16", "60KB")
    arguments = ["--base", base, "--adapter", pico_adapter(base), "--link", "reflink", "--out"]
    result = cli(*arguments, tmp_path / "whole" / "out")
    assert result.exit_code == 0, result.stderr
    return arguments


@pytest.mark.skipif(not sandbox.is_able(), reason="the numbers of this machine's calls are not known")
@pytest.mark.parametrize(
    ("code", "names"),
    [
        (errno.EPERM, FAST),
        (errno.ENOSYS, (*FAST, "fchmod", "statfs", "fstatfs")),
        (errno.EINVAL, (*FAST, "fsync", "ioctl")),
    ],
    ids=["not permitted", "not known", "not here"],
)
def test_a_merge_does_without_calls_that_the_kernel_refuses(code, names, arguments, tmp_path):
    out = tmp_path / "out"
    done = sandboxed(code, names, [*arguments, out])
    if "no seccomp here" in done.stderr:
        pytest.skip("this kernel has no seccomp")

    assert done.returncode == 0, done.stderr
    assert content(out) == content(tmp_path / "whole" / "out")
    if code == errno.EPERM:
        assert sandboxed(code, names, [*arguments, out, "--overwrite"]).returncode == 0
        assert content(out) == content(tmp_path / "whole" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("posix_fallocate", errno.EPERM), ("posix_fadvise", errno.EIO),
        ("fsync", errno.EROFS), ("fchmod", errno.EPERM),
    ],
    ids=str,
)  # fmt: skip
def test_a_call_that_fails_for_want_of_support_costs_nothing(name, code, arguments, cli, tmp_path):
    with _failing(name, code, 0):
        result = cli(*arguments, tmp_path / "out")

    assert result.exit_code == 0, (result.stderr, result.exception)
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("name", "code"), [("pwritev", errno.EIO), ("pwritev", errno.EDQUOT), ("fsync", errno.ENOSPC)], ids=str
)
def test_a_disk_that_fails_is_a_fault_all_the_same(name, code, arguments, cli, tmp_path):
    with _failing(name, code, 0):
        result = cli(*arguments, tmp_path / "out")

    assert result.exit_code == exits.WRITE
    words = "cannot be written (Input/output error)" if code == errno.EIO else "no space left on the disk"
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EIO])
def test_a_lock_that_fails_is_no_other_run(code, arguments, cli, tmp_path, monkeypatch):
    import fcntl

    def refuse(fd, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = cli(*arguments, tmp_path / "out")
    assert result.exit_code == 0, result.stderr


def test_a_disk_that_does_not_say_how_large_it_is_is_not_full(arguments, cli, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real[:2], 0, 0, 0, *real[5:]]))
    result = cli(*arguments, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
