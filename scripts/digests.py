"""Record the digests of every output that the test suites make, and compare two records.

A refactoring that should change no byte is shown to change none: record the commit before it, record the commit after
it, and compare. Nothing of lora_merge is imported, so one script records any commit (`--tree`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import click

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))

from digesting import records  # noqa: E402 - found once the path has it

ROOT = Path("/tmp/lora-merge-digests")
"""The same in every recording: some outputs hold digests of files that hold paths."""

SUITES = (
    "tests/parity",
    "tests/cli/test_batch.py",
    "tests/cli/test_convert_refusals.py",
    "tests/cli/test_extract.py",
    "tests/cli/test_kept.py",
    "tests/cli/test_merge.py",
    "tests/cli/test_pickled.py",
    "tests/cli/test_sentence_modules.py",
    "tests/conformance/test_formats.py",
    "tests/conformance/test_gguf.py",
    "tests/conformance/test_layouts.py",
    "tests/property/test_executors.py",
    "tests/property/test_together.py",
)
"""What makes outputs: of every kind, family, combination, batch and conversion."""

LONGEST = (
    "test_families",
    "test_kinds",
    "test_convert",
    "test_config_shapes",
    "test_lora",
    "test_batch",
    "test_merge",
)
"""Files that are begun first, so that none of them is left at the end alone."""

RUN = "import sys; sys.path.append(sys.argv[1]); from digesting import suite; sys.exit(suite.main(*sys.argv[2:]))"
OUTCOMES = {0, 1, 5}
"""Exit codes of pytest after which the record is whole: all passed, some failed, none selected."""


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--tree",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=SCRIPTS.parent,
    help="A checkout: its tests and its lora_merge are used.  [default: this one]",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    help="Of that checkout: a file or a directory of tests; may be repeated.",
)
@click.option("--jobs", default=2, show_default=True, help="Files of tests that are run at a time.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=ROOT, show_default=True, help="For temporary files."
)
@click.option(
    "--go-on", is_flag=True, help="OUT is of this commit and was cut short: run the files that it lacks."
)
@click.argument("options", nargs=-1)
def record(
    out: Path,
    tree: Path,
    suites: tuple[str, ...],
    jobs: int,
    root: Path,
    go_on: bool,
    options: tuple[str, ...],
) -> None:
    """Run the suites and write the digests of what they make into OUT. OPTIONS (after --) are pytest's.

    OUT is written whenever a file of tests is through.
    """
    tree = tree.resolve()
    files = _files(tree, suites or SUITES)
    whole = _begun(out, root, _commit(tree), go_on)
    left = [file for file in files if file not in whole["files"]]
    whole["not run"] = dict.fromkeys(left, "was not run")
    with _locked(root), ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run) for run in _in_turn(left, tree, root, options)]
        for done in as_completed(running):
            _add(whole, done.result(), out)
    click.echo(f"{out}: {records.summary(whole)}")
    for line in records.complaints(whole):
        click.echo(line, err=True)
    sys.exit(bool(whole["faults"] or whole["not run"]))


def _begun(out: Path, root: Path, commit: str, go_on: bool) -> dict[str, Any]:
    """Return the record to add to."""
    if not go_on:
        return {"root": str(root), "commit": commit, "tests": {}, "faults": [], "files": [], "not run": {}}
    begun = records.read(out)
    if (begun["root"], begun["commit"]) != (str(root), commit) or commit.endswith("-dirty"):
        raise click.ClickException(
            f"{out}: is of {begun['commit']} in {begun['root']}, not of {commit} in {root}"
        )
    return begun


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Have the directory of temporary files alone."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise click.ClickException(f"{root}: another recording uses it; wait, or give --root") from None
        yield


def _add(whole: dict[str, Any], part: dict[str, Any], out: Path) -> None:
    """Add what one file of tests made, and write the record."""
    if "ended" in part:
        whole["not run"][part["file"]] = part["ended"]
    else:
        whole["tests"] |= part["tests"]
        whole["faults"] += part["faults"]
        whole["files"].append(part["file"])
        del whole["not run"][part["file"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".fresh")
    fresh.write_text(json.dumps(whole, sort_keys=True))
    fresh.replace(out)


def _files(tree: Path, suites: tuple[str, ...]) -> list[str]:
    """Return the files of tests, the longest first."""
    found: set[Path] = set()
    for suite in suites:
        place = tree / suite
        if not place.exists():
            raise click.ClickException(f"{place}: not found; say --suite for a tree of another shape")
        found |= set(place.rglob("test_*.py")) if place.is_dir() else {place}
    places = sorted(found, key=lambda path: (path.stem not in LONGEST, path.as_posix()))
    return [path.relative_to(tree).as_posix() for path in places]


def _in_turn(
    files: list[str], tree: Path, root: Path, options: tuple[str, ...]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield what records each file; files of one name take turns, since they have one place."""
    turns = {Path(file).stem: threading.Lock() for file in files}

    def run(file: str) -> dict[str, Any]:
        with turns[Path(file).stem]:
            return _recorded(file, tree, root, options)

    for file in files:
        yield partial(run, file)


def _recorded(file: str, tree: Path, root: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Run one file of tests in a process of its own, and return its record."""
    place = root / Path(file).stem  # the same when the file moves to another folder
    shutil.rmtree(place, ignore_errors=True)
    (place / "temp").mkdir(parents=True)
    settings = {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "TMPDIR": str(place / "temp")}
    found = place / "record.json"
    command = [sys.executable, "-c", RUN, str(SCRIPTS), file, str(place), str(found), *options]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tree, env=os.environ | settings, check=False, capture_output=True, text=True
    )
    if done.returncode not in OUTCOMES or not found.exists():
        said = done.stdout[-3000:] + done.stderr[-3000:]
        return {"file": file, "ended": f"pytest ended with {done.returncode}\n{said}"}
    last = (done.stdout.strip() or "nothing was said").splitlines()[-1]
    click.echo(f"{time.monotonic() - began:6.1f} s  {file}: {last}")
    part: dict[str, Any] = json.loads(found.read_text()) | {"file": file}
    shutil.rmtree(place, ignore_errors=True)
    return part


def _commit(tree: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@main.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--part",
    is_flag=True,
    help="NEW was recorded with --suite: leave out the files of tests that it did not run.",
)
def compare(old: Path, new: Path, part: bool) -> None:
    """Compare two records; exit with 1 when anything differs or is in one of them alone."""
    before, after = records.read(old), records.read(new)
    if part:
        before = records.part_of(before, after)
    found = records.compare(before, after)
    click.echo(str(found))
    sys.exit(bool(found.differences))


if __name__ == "__main__":
    main()
