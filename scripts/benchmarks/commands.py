"""Commands of the benchmark that are defined where their work is."""

from __future__ import annotations

from benchmarks import machines, startup

MORE = {"machines": machines.command, "startup": startup.command}
