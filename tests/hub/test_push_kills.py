"""Pushes that are killed at random moments, or between two requests: nothing on the branch until all of it, and the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_merge import api
from lora_merge.cli import exits
from tests.faults.trial import content
from tests.hub.conftest import settings_of
from tests.hub.push_killing import COMPLETE, REPO
from tests.hub.taking import WRITE_TOKEN

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("LORA_MERGE_PUSH_KILLS", "12"))
"""Of all ways together; some runs are killed twice."""

WAYS = {
    "spool over LFS": (False, "spool", False),
    "spool over xet": (True, "spool", False),
    "stream over xet": (True, "stream", False),
    "a directory over LFS": (False, "spool", True),
}
"""Name → over xet, how files get there, and whether a directory is made first."""

EVERY_FILE = (
    "from lora_merge.storage.hub.uploads import pull_request; pull_request.COMMIT_SECONDS = 0; "
    "from lora_merge.cli import entry; entry()"
)
"""The command, with a commit for each file."""


@pytest.fixture
def base(pico):
    """Return a base in a dozen shards."""
    return pico("llama", "bfloat16", "14KB")


@pytest.fixture
def options(base, pico_adapter):
    return ["--base", str(base), "--adapter", str(pico_adapter(base))]


@pytest.fixture
def on_disk(options, tmp_path):
    """Return the files of the same merge on a disk."""
    out = tmp_path / "disk" / "merged"
    api.merge(base=options[1], adapter=options[3], out=out)
    return content(out)


@pytest.mark.parametrize("name", WAYS)
def test_a_killed_push_leaves_the_branch_alone_and_goes_on(name, options, on_disk, tmp_path):
    is_xet, way, is_kept = WAYS[name]
    if is_xet:
        pytest.importorskip("hf_xet")
    for folder in ("hub", "spool", "hf"):
        (tmp_path / folder).mkdir()
    told = {
        "hub": str(tmp_path / "hub"),
        "arguments": [*options, "--workers", "2", *(() if is_kept else ("--upload", way))],
        "out": str(tmp_path / "kept" / "merged") if is_kept else None,
        "whole": on_disk,
        "seed": 1,
        "n": -(-N_KILLS // len(WAYS)),
    }
    settings = settings_of("", tmp_path) | {"HF_TOKEN": WRITE_TOKEN, "TMPDIR": str(tmp_path / "spool")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hub.push_killing", json.dumps(told)],
        cwd=ROOT,
        env=settings | ({} if is_xet else {"HF_HUB_DISABLE_XET": "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{name}: {found}\n")  # -rP shows it
    assert not [word for word in found if word.startswith("broken")], found
    assert found["killed"] >= told["n"] // 2
    assert found["resumed"] == told["n"]


class Running:
    """The real command in a process of its own, which is ended in the middle of a request.

    Args:
        arguments: of the command.
        environment: of the process.
    """

    def __init__(self, arguments, environment, work):
        command = [sys.executable, "-W", "ignore", "-c", EVERY_FILE, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, hub, how, seconds=60):
        """End it when the hub stalls; return its exit code and what it said."""
        assert hub.stalled.wait(seconds), self._process.communicate(timeout=1)
        self._process.send_signal(how)
        return self.ended(seconds)

    def ended(self, seconds=60):
        """Return its exit code and what it said."""
        _, said = self._process.communicate(timeout=seconds)
        return self._process.returncode, said


def on_branch(hub):
    """Return name → SHA-256 of the files of the branch, without the one that each repo has."""
    files = hub.state()["repos"][REPO]["refs"]["main"]
    return {name: digest for name, digest in files.items() if name != ".gitattributes"}


def pulls_of(hub):
    return [one["status"] for one in hub.state()["repos"][REPO]["pull_requests"].values()]


def stall_at_commit(hub, number):
    """Have a hub stall at one commit: the first one opens the pull request."""
    hub.plan("commit", times=number)
    hub.plan("commit", stall=True)


class TestBetweenTwoRequests:
    """Ended where a random moment hardly ever is."""

    @pytest.fixture
    def begin(self, options, pushing, tmp_path):
        def begin(*more):
            return Running([*options, "--push-to-hub", REPO, *more], pushing, tmp_path)

        return begin

    @pytest.mark.parametrize("is_late", [False, True], ids=["never", "late"])
    def test_the_merge_that_was_asked_for_comes_late_or_never(self, is_late, begin, uploads, on_disk):
        """All commits are made. A request of a process that is dead can still be carried out."""
        uploads.plan("merge", stall=True)
        code, _ = begin().end(uploads, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert on_branch(uploads) == {}
        if is_late:
            uploads.release()
            while not on_branch(uploads):
                time.sleep(0.01)
            assert on_branch(uploads) == on_disk
        n_sent = len(uploads.asked("put"))
        code, said = begin("--resume").ended()
        assert code == exits.OK or (is_late and COMPLETE in said), said
        uploads.release()
        assert on_branch(uploads) == on_disk
        assert pulls_of(uploads) == ["merged"]
        assert len(uploads.asked("put")) == n_sent

    def test_a_last_commit_that_comes_after_the_run_that_went_on_changes_nothing(
        self, begin, uploads, on_disk
    ):
        begin("--create-pr", "--push-to-hub", "me/count").ended()
        stall_at_commit(uploads, len(uploads.asked("commit")) - 1)
        begin().end(uploads, signal.SIGKILL)
        assert on_branch(uploads) == {}
        assert begin("--resume").ended()[0] == exits.OK
        uploads.release()
        assert on_branch(uploads) == on_disk
        assert pulls_of(uploads) == ["merged"]

    def test_an_interrupt_says_how_to_go_on(self, begin, uploads, on_disk):
        stall_at_commit(uploads, 4)
        code, said = begin("--workers", "1").end(uploads, signal.SIGINT)
        assert code == exits.INTERRUPTED, said
        assert on_branch(uploads) == {}
        assert "run again with --resume to continue" in said
        assert "finished files kept in" in said
        code, said = begin("--resume").ended()
        assert code == exits.OK, said
        assert "had already written" in said
        uploads.release()
        assert on_branch(uploads) == on_disk
