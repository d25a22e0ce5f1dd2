"""Run one file of tests, and record what lies in its temporary directories after each command and each test.

Runs in a process for each file. Everything that a test draws or is named by is made to depend on the test alone: random
numbers are seeded for each fixture and each test, and temporary directories get names without counters.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest

from digesting.directories import Files, Looker, digest, number_of, stamp, unstamped
from digesting.records import SHARED

PYTEST = (
    *("-o", "tmp_path_retention_policy=failed"),  # keeps what is looked at small
    "--hypothesis-seed=0",
    *("-p", "no:cacheprovider", "-q"),
)


class Recorder:
    """A pytest plugin that looks at the disk."""

    def __init__(self, root: Path, tree: Path) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self._root = str(root)
        self._looker = Looker({str(root): "<root>", str(tree): "<tree>"})
        self._current = ""
        self._own = ""
        self._busy = False
        self._n_named: dict[tuple[str, str], int] = {}

    # ---------------------------------------------------------------- what depends on chance

    def named(self, what: str) -> str:
        """Return the stamp of the next directory for something in this test."""
        name = self._current.partition("::")[2]  # a file of tests may move
        count = self._n_named[name, what] = self._n_named.get((name, what), -1) + 1
        return stamp(name, what, count)

    def _seed(self, *what: object) -> None:
        number = number_of(*what)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 - tests draw from it
        if torch := sys.modules.get("torch"):  # it begins with the same seed in every process
            torch.manual_seed(number)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
        """Seed a fixture: one of a test for that test, one of many for itself."""
        owner = self._current.partition("::")[2] if fixturedef.scope == "function" else ""
        self._seed(fixturedef.argname, owner, str(getattr(request, "param", "")))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Seed a test."""
        self._seed(item.nodeid.partition("::")[2])

    # ---------------------------------------------------------------- what a test made

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Look at everything once a test has been torn down."""
        self._current = item.nodeid
        self.tests.setdefault(item.nodeid, _empty())
        self._own = ""
        try:
            return (yield)
        finally:
            self.look()
            self._current = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how a test came out."""
        test = self.tests.setdefault(report.nodeid, _empty())
        if report.when == "call" or report.outcome != "passed":
            test["outcome"] = report.outcome if report.when == "call" else f"{report.when} {report.outcome}"

    def owned(self, path: str) -> None:
        """Say which directory belongs to the test alone."""
        self._own = path

    def said(self, exit_code: int) -> None:
        """Keep how a command ended, and look at what it made."""
        if self._current:
            self.tests[self._current]["exits"].append(exit_code)
        self.look_near()

    def look_near(self) -> None:
        """Record what is new in the directory of the test, or everywhere when it has none."""
        self.look(self._own)

    def look(self, top: str = "") -> None:
        """Record what is new or has changed under a directory, or everywhere."""
        if self._busy or not self._current:
            return
        self._busy = True
        try:
            for root, files in self._looker.look(top or self._root):
                self._keep(root, files)
        except Exception as exc:  # noqa: BLE001 - a test must not fail by it, and nothing may be lost in silence
            self.faults.append(f"{self._current}: {top}: {exc!r}")
        finally:
            self._busy = False

    def _keep(self, root: str, files: Files) -> None:
        if self._own and Path(root).is_relative_to(self._own):
            made = self.tests[self._current]["made"].setdefault(os.path.relpath(root, self._own), [])
            if not made or made[-1] != files:
                made.append(files)
            return
        shared = self.tests.setdefault(f"{self._current.partition('::')[0]}::{SHARED}", _empty())
        place = unstamped(os.path.relpath(root, self._root))
        content = digest(json.dumps(files, sort_keys=True).encode())[:12]
        shared["made"].setdefault(f"{place} {content}", [files])

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at a directory of the recording before it is removed."""
        if event == "shutil.rmtree" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - links stay
            if path.startswith(self._root):
                self.look(path)


def _empty() -> dict[str, Any]:
    return {"outcome": "", "exits": [], "made": {}}


class _Names:
    """What `tempfile` takes its random names from."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._recorder.named("tempfile")


def _after(owner: Any, name: str, then: Callable[[Any], None]) -> None:
    plain = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        then(result)
        return result

    setattr(owner, name, wrapped)


def _stand_in(recorder: Recorder) -> None:
    """Put the recorder where directories get their names and where commands end. The process runs one file and is gone."""

    def mktemp(self: Any, basename: str, numbered: bool = True) -> Path:
        del numbered
        root: Path = self.getbasetemp() / (basename + recorder.named(basename))
        root.mkdir(mode=0o700)
        return root

    def own(request: Any, factory: Any) -> Path:
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in request.node.name)[:30]
        path: Path = factory.mktemp(name)
        recorder.owned(str(path))
        return path

    pytest.TempPathFactory.mktemp = mktemp  # type: ignore[method-assign]
    setattr(sys.modules["_pytest.tmpdir"], "_mk_tmp", own)  # noqa: B010 - a private name: tmp_path asks it
    setattr(tempfile, "_name_sequence", _Names(recorder))  # noqa: B010 - a private name: mkdtemp asks it
    _after(click.testing.CliRunner, "invoke", lambda result: recorder.said(result.exit_code))
    _after(subprocess.Popen, "wait", lambda _: recorder.look_near())
    sys.addaudithook(recorder.audit)


def main(tests: str, root: str, out: str, *options: str) -> int:
    """Run a file of tests in the current directory, and write what was recorded into a JSON file."""
    recorder = Recorder(Path(root), Path.cwd())
    _stand_in(recorder)
    code = pytest.main(
        [tests, f"--basetemp={root}/tests", *PYTEST, *options],
        plugins=[recorder],
    )
    found = {"tests": recorder.tests, "faults": recorder.faults}
    Path(out).write_text(json.dumps(found, sort_keys=True))
    return int(code)
