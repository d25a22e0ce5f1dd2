"""Write what a real merge prints into ``README.md``, or check that it still prints that.

The model and the adapter are those of ``make demo``, and the command is run as a user runs it. Times differ from run to
run, so ``--check`` compares everything else.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import demo

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
BEGIN = "<!-- first merge: begin (scripts/first_merge.py --write) -->"
END = "<!-- first merge: end -->"
OPTIONS = ("--base", "base", "--adapter", "my-lora", "--out", "merged")
WIDTH = 88
CHECKED_STEPS = 2
"""What a merge prints does not depend on how well the model is trained, so a check trains it for this many steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write the page")
    choice.add_argument("--check", action="store_true", help="exit 1 when the page is not current")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if write:
            build(folder)
        else:
            build(folder, n_steps=CHECKED_STEPS)
        block = console(folder)
    if write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), block), encoding="utf-8")
        print(f"wrote {PAGE.name}")
    elif timeless(written(PAGE.read_text(encoding="utf-8"))) != timeless(block):
        sys.exit(f"{PAGE.name} is not current; run: python scripts/first_merge.py --write\n\n{block}")
    else:
        print(f"{PAGE.name} is current")


def build(folder: Path, *, n_steps: int | None = None) -> None:
    """Write the demo's base and adapter to ``base`` and ``my-lora``; fewer steps of training where that is enough."""
    demo.quiet_libraries()
    steps = {} if n_steps is None else {"n_steps": n_steps}
    demo.build_base(folder / "base", **steps)
    demo.train_adapter(folder / "base", folder / "my-lora", **steps)


def console(folder: Path) -> str:
    """Return the merge in a folder as a Markdown block: the command, and what it prints."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_merge", *OPTIONS],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"the merge failed with exit code {done.returncode}:\n{done.stdout}")
    said = done.stdout.replace(f"{folder}{os.sep}", "").strip()
    return f"```console\n$ lora-merge {' '.join(OPTIONS)}\n{said}\n```"


def timeless(block: str) -> str:
    """Return a block without times, rates, and the lines of phases, of which a fast one may be left out.

    Example:
        >>> timeless("verifying …\\n6.4 MB in 3.0 s")
        '6.4 MB in … s'
    """
    lines = [line for line in block.splitlines() if not line.endswith(" …")]
    return re.sub(r"[\d.]+ (?=s\b)|[\d.]+ (?=[kMG]?B/s\b)", "… ", "\n".join(lines))


def written(page: str) -> str:
    """Return the block that a page has; exit when its marks are missing."""
    _, has_begin, rest = page.partition(f"{BEGIN}\n")
    block, has_end, _ = rest.partition(f"\n{END}")
    if not (has_begin and has_end):
        sys.exit(f"{PAGE.name} lacks one of the lines {BEGIN} and {END}")
    return block.strip()


def renewed(page: str, block: str) -> str:
    """Return a page with another block between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, has_end, after = rest.partition(END)
    if not (rest and has_end):
        sys.exit(f"{PAGE.name} lacks one of the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


if __name__ == "__main__":
    main()
