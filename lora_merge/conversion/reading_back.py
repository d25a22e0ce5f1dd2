"""Reads a written adapter like any other, and compares it with what was meant; with a base, checks that it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx_spelling import in_names_of
from lora_merge.conversion import Maker, draft
from lora_merge.conversion.lora import Recipe
from lora_merge.conversion.transforms import Pair
from lora_merge.core.report import Issue, Silence, Verdict, error
from lora_merge.errors import PlanError
from lora_merge.formats.safetensors import load
from lora_merge.merging.changes import change_of
from lora_merge.planning import Reading, check_fit
from lora_merge.planning.resolve import resolve_adapter
from lora_merge.planning.run import InputTexts, join_inputs
from lora_merge.storage.hub import Access

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_merge.conversion.lora import Lora, LoraModule
    from lora_merge.planning import Joined

_TOLERANCE = 1e-6
"""Largest ‖Δ - Δ′‖ / ‖Δ‖. The scale is recomputed as α/r, so its last bit may differ, and with it each product."""


@dataclass(frozen=True, slots=True)
class OnBase:
    """The base with which a written adapter is joined, and how both are read."""

    base: str
    """Root of the checkpoint."""

    reading: Reading
    access: Access

    def join(self, adapter: Path) -> Joined:
        """Return the join of the base and the adapter in a directory.

        Raises:
            PlanError: it does not fit.
        """
        texts = InputTexts(((str(adapter), 1.0),), self.base, access=self.access)
        joined = join_inputs(texts, self.reading, Silence()).joined
        check_fit(joined)
        return joined


def read_back(root: Path, lora: Lora, on_base: OnBase | None) -> Verdict:
    """Read the adapter in a directory, draft it again, and return whether it is the one that was meant.

    Args:
        root: directory of the adapter.
        lora: what was meant.
        on_base: its base, if it is at hand.
    """
    adapter = resolve_adapter(root)
    issues = [issue for issue in adapter.issues if issue.severity == "error"]
    joined = None
    if on_base is not None and not issues:
        try:
            joined = on_base.join(root)
            adapter = in_names_of(adapter, joined.base.config)
        except PlanError as exc:
            issues += exc.issues
    if not issues:
        found = draft(adapter, Recipe(), joined)
        # An empty recipe: the draft then has the modules of the file, as they are.
        issues += found.issues or _differences(lora, {one.path: one for one in found.modules})
        missing = lora.whole.keys() - found.whole.keys()
        issues += [
            error("missing", name, "is missing in the output, which must contain it whole")
            for name in sorted(missing)
        ]
    return Verdict("full", len(lora.made), 0, tuple(issues))


def _differences(lora: Lora, modules: Mapping[str, LoraModule]) -> list[Issue]:
    """Return an issue for each module that is missing, surplus, or has another change than was made."""
    maker = Maker(change_of, Recipe(), (), "F32")
    issues = []
    for made in lora.made:
        path = made.module.path
        if path not in modules:
            issues.append(error("missing", path, "is missing in the output"))
            continue
        wanted = Pair(load(made.a), load(made.b), made.scale)
        got, _ = maker(modules[path])
        # Equal factors need no norms.
        if wanted.equals(got):
            continue
        off = wanted.distance(got)
        if off > _TOLERANCE * wanted.norm():
            sentence = f"has changed on the disk, by {off / (wanted.norm() or 1):.2g} of its size"
            issues.append(error("differs", path, sentence))
    surplus = sorted(modules.keys() - {made.module.path for made in lora.made})
    issues += [error("surplus", path, "is in the output, but was not converted") for path in surplus]
    return issues
