"""Plant faults in merges and in what they have staged, and count how many the verification finds.

Every fault is put in by standing in the way of the real code (tests/planting.py), at a place drawn for each run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchmarks import inputs  # noqa: E402 - found once the path has it
from benchmarks.cases import Case  # noqa: E402

from tests import planting  # noqa: E402

ONE_UNIT = "an element one unit off"
FLIPPED = "a bit flipped on the disk, in "
FAULTS = ("nothing", *planting.IN_MERGES, ONE_UNIT, *(FLIPPED + where for where in planting.ON_DISK))


def planted(fault: str, place: planting.Place, seed: int) -> contextlib.AbstractContextManager[None]:
    """Return what plants a fault."""
    if fault in planting.IN_MERGES:
        return planting.in_merge(fault, place, place.name)
    if fault.startswith(FLIPPED):
        return planting.bit_flipped(fault.removeprefix(FLIPPED), seed)
    return planting.one_unit_off(place, place.name) if fault == ONE_UNIT else contextlib.nullcontext()


@click.command(help=__doc__)
@click.option("--runs", default=60, show_default=True, help="Of each fault at each level.")
@click.option("--size", default=0.06, show_default=True, help="GB of the base, a synthetic Llama.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of the base.")
@click.option("--level", "levels", multiple=True, default=("sample", "full"), help="Of verification.")
def main(runs: int, size: float, dtype: str, levels: tuple[str, ...]) -> None:
    """Print a table of what was found."""
    import lora_merge
    from lora_merge.errors import VerifyError

    case = Case(size, dtype, "all", 16)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        places = [inputs.base_place(cache, case), inputs.adapter_place(cache, case, "lora")]
        inputs.ensure(places)
        base, adapter = (place.directory for place in places)
        plan = lora_merge.plan(base=base, adapter=adapter)
        click.echo(f"| planted | {' | '.join(f'found at `{level}`' for level in levels)} |")
        click.echo(f"| --- |{' --- |' * len(levels)}")
        for fault in FAULTS:
            cells = []
            for level in levels:
                verify: dict[str, Any] = {"verify": level}
                n_found = 0
                for seed in range(runs):
                    shutil.rmtree(cache / "out", ignore_errors=True)
                    place = planting.place_in(plan, seed)
                    with planted(fault, place, seed):
                        try:
                            lora_merge.merge(base=base, adapter=adapter, out=cache / "out", **verify)
                        except VerifyError:
                            n_found += 1
                cells.append(f"{n_found} of {runs}")
            click.echo(f"| {fault} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
