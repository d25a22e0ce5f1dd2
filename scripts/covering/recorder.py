"""A pytest plugin that records which lines and branches of lora_merge each test runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import coverage
import pytest

from covering import records

SOURCE = Path(__file__).resolve().parents[2] / "lora_merge"


class Recorder:
    """Traces this process while a test runs."""

    def __init__(self) -> None:
        self._coverage = coverage.Coverage(data_file=None, branch=True, source=[str(SOURCE)])
        self._arcs: dict[records.Arc, int] = {}
        self._tests: list[records.Test] = []
        self._n_started = 0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Record one test with its fixtures."""
        self._n_started = 0
        began = time.perf_counter()
        self._coverage.start()
        try:
            return (yield)
        finally:
            self._coverage.stop()
            seconds = time.perf_counter() - began
            test = records.Test(item.nodeid, seconds, self._ran(), self._n_started == 0)
            self._tests.append(test)

    def pytest_sessionfinish(self) -> None:
        """Write what this worker recorded."""
        if self._tests:
            out = Path(os.environ[records.OUT])
            records.write(out / f"{os.getpid()}.pickle", self._arcs, self._tests)

    def count_started(self) -> None:
        """Count a process that the test starts."""
        self._n_started += 1

    def _ran(self) -> frozenset[int]:
        """Return what ran since the last time."""
        data = self._coverage.get_data()
        arcs = [(file, *arc) for file in data.measured_files() for arc in data.arcs(file) or ()]
        self._coverage.erase()
        return frozenset(self._arcs.setdefault(arc, len(self._arcs)) for arc in arcs)


def pytest_configure(config: pytest.Config) -> None:
    recorder = Recorder()
    config.pluginmanager.register(recorder)
    for kind, name in ((subprocess.Popen, "__init__"), (BaseProcess, "start")):
        setattr(kind, name, _counted(getattr(kind, name), recorder))


def _counted(start: Any, recorder: Recorder) -> Any:
    def started(*arguments: Any, **options: Any) -> Any:
        recorder.count_started()
        return start(*arguments, **options)

    return started
