"""The generated tables of ``docs/supported.md``: methods, families, storages and schemes, from the lists that are tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.peft_rules.kinds import NOT_IN_WEIGHTS, REQUANTISED_FIELDS, RETIRED_FIELDS, UNMERGEABLE_FIELDS
from lora_merge.quantised import METHODS
from lora_merge.quantised.schemes import SCHEMES

if TYPE_CHECKING:
    from tests.parity.families import Family
    from tests.parity.kinds import Kind

ROOT = Path(__file__).resolve().parents[1]

_METHODS = """\
For a tiny model of each family in the second column: with a base in F32, the merged checkpoint computes what base and
adapter compute in PEFT, unmerged. With a base in BF16 or F16, every tensor has the bits of PEFT's own merge.
"""

_FAMILIES = """\
For a tiny model of each family and every combination in its row: the merged checkpoint computes what base and adapter
compute, and every tensor that the adapter does not touch keeps its bytes. If a row names only transformers 5, the
module names of transformers 4 were the same, or it did not have the family.

| family | adapter with the module names of | base stored | notes |
| --- | --- | --- | --- |
"""

_REFUSED = """\
These are refused, each with its name:

| adapter | reason |
| --- | --- |
"""

_GROUPS = {"LoRA family": "LoRA and its variants", "whole parameters": "Parameters trained as a whole"}


def methods() -> str:
    """Return the table of every kind of adapter that is merged, and that of those that are refused."""
    parts = [_METHODS]
    for group, kinds in groupby(_kinds(), key=lambda kind: kind.group):
        rows = "".join(row(kind.name, _models(kind), _dtypes(kind), _notes(kind)) for kind in kinds)
        title = _GROUPS.get(group, group)
        parts.append(f"| {title} | tested on | base in | notes |\n| --- | --- | --- | --- |\n{rows}")
    parts.append(_REFUSED + "".join(row(names, why) for names, why in _refused()))
    return "\n".join(parts)


def families() -> str:
    """Return the table of every model family that is tested, with its adapters' names and its bases' layouts."""
    rows = "".join(
        row(family.name, ", ".join(family.namings()), ", ".join(family.layouts()), family.notes)
        for family in _families()
    )
    return f"{_FAMILIES}{rows}"


def storages() -> str:
    """Return the methods of quantised bases that are read, and the schemes that outputs can be written with."""
    read = ", ".join(f"`{name}`" for name in METHODS)
    rows = "".join(row(f"`{name}`", scheme.words, scheme.engines) for name, scheme in SCHEMES.items())
    return (
        f"Methods of quantised bases that are read (`quant_method`): {read}.\n\n"
        f"| `--quantize` | stored as | engines that load it |\n| --- | --- | --- |\n{rows}"
    )


def row(*cells: str) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _families() -> tuple[Family, ...]:
    """Return the parity suite's list; its module is data and imports neither torch nor PEFT."""
    sys.path.insert(0, str(ROOT))
    from tests.parity.families import FAMILIES

    return FAMILIES


def _kinds() -> tuple[Kind, ...]:
    """Return the parity suite's list; its module is data and imports neither torch nor PEFT."""
    sys.path.insert(0, str(ROOT))
    from tests.parity.kinds import KINDS

    return KINDS


def _models(kind: Kind) -> str:
    return ", ".join(model.replace("_", " ") for model in kind.models)


def _dtypes(kind: Kind) -> str:
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    return ", ".join(short[dtype] for dtype in kind.dtypes)


def _notes(kind: Kind) -> str:
    """Return what a user has to say and to install, then the kind's own note."""
    notes = [
        f"`{' '.join(kind.options)}`" if kind.options else "",
        f"needs {kind.needs}" if kind.needs else "",
        kind.notes,
    ]
    return "; ".join(note for note in notes if note)


def _refused() -> Iterator[tuple[str, str]]:
    """Yield what has no merged form and why; types with one reason together."""
    for why in dict.fromkeys(NOT_IN_WEIGHTS.values()):
        yield _quoted(NOT_IN_WEIGHTS, why), f"{why}, which no weight can hold"
    requantised = {name: why for name, (why, _) in REQUANTISED_FIELDS.items()}
    fields = {**UNMERGEABLE_FIELDS, **RETIRED_FIELDS, **requantised}
    for why in dict.fromkeys(fields.values()):
        yield _quoted(fields, why), why


def _quoted(reasons: Mapping[str, str], why: str) -> str:
    return ", ".join(f"`{name}`" for name, reason in reasons.items() if reason == why)
