"""Fuzz what reads files of strangers, with coverage as the guide (atheris, which is libFuzzer for Python).

    python scripts/fuzz.py                      one million executions, shared out over all targets
    python scripts/fuzz.py --only header        one target
    python scripts/fuzz.py --write              new inputs that reached new code join the corpus

An input that crashes a target is left in ``.fuzz/``; put it into ``tests/fuzz/corpus/TARGET/`` once it is mended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHARES = {
    "header": 24, "header_text": 24, "index": 8, "model_config": 6, "adapter_config": 3, "keys": 3, "pickled": 14,
    "manifest": 20, "paths": 6, "adapter_types": 1, "swift_types": 1, "mlx_types": 1, "config_types": 1, "tensor_names": 1,
    "request_text": 1, "batch_text": 1, "manifest_written": 1,
}  # fmt: skip
"""How much of all executions each target gets: the quick ones more, so that all take about as long."""

_MOST_BYTES = 4096
_SECONDS_FOR_ONE = 30


def main() -> None:
    """Fuzz every target, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=1_000_000, help="executions in all (default: %(default)s)"
    )
    parser.add_argument("--only", choices=SHARES, action="append", help="a target; may be repeated")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="let the corpus grow by what reached new code")
    parser.add_argument(
        "--found", type=Path, default=ROOT / ".fuzz", help="directory for what is found (default: .fuzz)"
    )
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()
    if options.target:
        _fuzz(options.target, more)
        return
    found: Path = options.found
    names = options.only or list(SHARES)
    total = sum(SHARES[name] for name in names)
    shares = {name: options.runs * SHARES[name] // total for name in names}
    shares[names[0]] += options.runs - sum(shares.values())
    waiting, running, failed = list(shares), dict[str, subprocess.Popen[bytes]](), list[str]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            running[name] = _start(name, shares[name], found, write=options.write)
        name = next(iter(running))
        if running.pop(name).wait():
            failed.append(name)
    for name in names:
        print(
            f"{name}: {_executions(found, name)} executions, {_last(found, name, 'cov: ')} edges"
            + (", FAILED" if name in failed else "")
        )
    print(f"{sum(_executions(found, name) for name in names)} executions, {len(failed)} targets failed")
    for name in failed:
        print(f"--- {name}\n{_log(found, name).read_text(errors='replace')[-3000:]}")
    sys.exit(bool(failed))


def _start(name: str, runs: int, place: Path, *, write: bool) -> subprocess.Popen[bytes]:
    found = place / name
    shutil.rmtree(found, ignore_errors=True)
    (found / "new").mkdir(parents=True)
    corpus = ROOT / "tests" / "fuzz" / "corpus" / name
    flags = [
        f"-runs={runs}",
        f"-max_len={_MOST_BYTES}",
        f"-timeout={_SECONDS_FOR_ONE}",
        "-seed=7",
        f"-artifact_prefix={found}/",
    ]
    places = [str(corpus)] if write else [str(found / "new"), str(corpus)]
    command = [sys.executable, __file__, "--target", name, *flags, *places]
    with _log(place, name).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def _fuzz(name: str, flags: list[str]) -> None:
    """Fuzz one target in this process; it ends by itself."""
    import atheris

    with atheris.instrument_imports(include=["lora_merge"]):
        from tests.fuzz.targets import CORPUS, check

        for path in (CORPUS / name).iterdir():
            check(
                name, path.read_bytes()
            )  # what is imported later counts as slow, and atheris breaks some of it
    atheris.Setup([sys.argv[0], *flags], lambda data: check(name, data))
    atheris.Fuzz()


def _log(found: Path, name: str) -> Path:
    return found / f"{name}.log"


def _executions(found: Path, name: str) -> int:
    done = [
        line
        for line in _log(found, name).read_text(errors="replace").splitlines()
        if line.startswith("Done ")
    ]
    return int(done[-1].split()[1]) if done else 0


def _last(found: Path, name: str, word: str) -> str:
    text = _log(found, name).read_text(errors="replace")
    return text.rpartition(word)[2].split()[0] if word in text else "?"


if __name__ == "__main__":
    main()
