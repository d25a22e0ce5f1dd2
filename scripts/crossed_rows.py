"""Choose the rows of tables of tests that only `make crossed` runs: those that run no line and no branch of their own.

Two steps: `record` runs the suite and notes what each test runs (an hour, with two workers); `choose` writes
tests/crossed.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))

from covering import choosing, records  # noqa: E402 - found once the path has it

ROWS = SCRIPTS.parent / "tests" / "crossed.txt"
QUICK = ROWS.with_name("quick.txt")
WHOLE = (
    "tests/cli/test_convert_refusals.py",
    "tests/cli/test_refusals.py",
    "tests/faults/test_table.py",
    "tests/parity/test_families.py",
    "tests/parity/test_kinds.py",
    "tests/storages/test_decoding.py",
    "tests/storages/test_outputs.py",
)
"""Files whose tables stay whole: their rows differ in data of the program (names, formulas, sentences), which no line shows."""
SUITE = "not crossed and not system"


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--jobs", default=2, show_default=True, help="Workers.")
@click.option("--marks", default=SUITE, show_default=True, help="Tests to run, as pytest's -m takes them.")
@click.argument("options", nargs=-1)
def record(out: Path, jobs: int, marks: str, options: tuple[str, ...]) -> None:
    """Run the suite, and write into the directory OUT what each test runs. OPTIONS (after --) are pytest's.

    Rows of tests/crossed.txt are run too.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, records.OUT: str(out.resolve()), "LORA_MERGE_ROWS": "all"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "covering.recorder", "-n", str(jobs)]
    ran = subprocess.run(
        [*command, "--dist", "worksteal", "-m", marks, *options], env=os.environ | settings, check=False
    )
    sys.exit(ran.returncode)


@main.command()
@click.argument("recorded", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--write", is_flag=True, help="Write tests/crossed.txt.")
@click.option(
    "--seconds",
    default=0.1,
    show_default=True,
    help="Rows that take less stay, since leaving them out saves nothing.",
)
def choose(recorded: Path, write: bool, seconds: float) -> None:
    """Choose by what was RECORDED, and print what is saved."""
    tests = records.read(recorded)
    quick = QUICK.read_text(encoding="utf-8").splitlines()
    whole = {test.name for test in tests if test.name.startswith(WHOLE)}
    left_out = choosing.left_out(tests, seconds, whole.union(quick))
    print(choosing.summary(tests, left_out))
    if write:
        ROWS.write_text("".join(f"{name}\n" for name in sorted(left_out)), encoding="utf-8")
        print(f"{ROWS} written")


if __name__ == "__main__":
    main()
