"""AdaLoRA: factors with a diagonal between them, and ranks that training pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Delta
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.tensor import TensorRef, shape_text
from lora_merge.deltas import LowRankFacts
from lora_merge.peft_rules.hints import OTHER_CONFIG, incomplete
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.scaling import number

if TYPE_CHECKING:
    from collections.abc import Collection

Group = Mapping[str, TensorRef]


class AdaLora:
    """Groups of tensors of an AdaLoRA configuration → deltas.

    Reference:
        ``peft.tuners.adalora.layer.SVDLinear.get_delta_weight`` (PEFT 0.21.2): ΔW = B (A · E) · α / (init_r + 1e-5);
        α is not divided by a rank, and ``ranknum`` stays ``init_r`` however many ranks were masked.
    """

    def __init__(self, config: Mapping[str, Any], issues: list[Issue]) -> None:
        self._issues = issues
        self._init_r = number(config, "init_r", 12)
        alpha = number(config, "lora_alpha", 8)
        # PEFT takes α itself, not α over a rank; without an α it takes the rank.
        self._scale = float(alpha if alpha > 0 else self._init_r)
        self._ranks = _masked_ranks(config)
        self._found: list[int] = []

    def deltas(self, module: str, group: Group) -> list[Delta]:
        """Return the delta of one group of tensors; none where no rank is left, or where the group is faulty (an
        issue says so).
        """
        # Without one of the three PEFT would merge noise, or nothing.
        for role in ("A", "B", "E"):
            if role not in group:
                hint = incomplete("would merge noise or nothing here")
                self._issues.append(error(f"missing-{role}", module, f"has no lora_{role}", hint))
                return []
        a, b, e = (group[role].shape for role in ("A", "B", "E"))
        if len(a) != 2 or len(b) != 2 or e != (a[0], 1) or b[1] != a[0]:
            shapes = f"lora_A is {shape_text(a)}, lora_B is {shape_text(b)}, lora_E is {shape_text(e)}"
            sentence = f"{shapes}, expected (r, in), (out, r) and (r, 1) with the same rank r"
            self._issues.append(error("bad-shape", module, sentence))
            return []
        self._found.append(a[0])
        wanted = self._ranks.get(module, self._init_r)
        if a[0] != wanted:
            sentence = f"has rank {a[0]}, the config says {wanted:g} (rank_pattern and init_r)"
            hint = OTHER_CONFIG
            self._issues.append(error("rank-mismatch", module, sentence, hint))
        # Pruned to rank 0: the tensors are there, with no rows.
        if a[0] == 0:
            self._issues.append(
                note("rank-zero", module, "AdaLoRA pruned this module to rank 0, so it does not change")
            )
            return []
        factors = {role: group[role] for role in ("A", "B", "E")}
        # ``ranknum`` stays ``init_r`` in PEFT, however many ranks were masked; 1e-5 is PEFT's too.
        facts = LowRankFacts(divisor=self._init_r + 1e-5)
        return [Delta(f"{module}.weight", facts, factors, self._scale)]

    def finish(self, modules: Collection[str]) -> list[Issue]:
        """Return a warning when every module still has its first rank, so that AdaLoRA allocated nothing.

        Args:
            modules: unused here; the reader of LoRA needs them.
        """
        del modules
        if not self._found or any(rank != self._init_r for rank in self._found):
            return []
        sentence = f"every module still has its initial rank, init_r = {self._init_r:g}"
        hint = (
            "training never called update_and_allocate(), so AdaLoRA pruned nothing; the merge is still exact"
        )
        return [warning("adalora-ranks", "rank_pattern", sentence, hint)]


def _masked_ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """Return module → how many ranks are left, from AdaLoRA's ``rank_pattern``: ``{"….lora_E": [True, …]}``.

    Raises:
        TargetError: the field holds something else.
    """
    table = {} if config.get("rank_pattern") is None else config["rank_pattern"]
    if not isinstance(table, dict) or not all(isinstance(mask, list) for mask in table.values()):
        raise TargetError(
            "rank_pattern", f"is {str(table)[:60]}, expected a table of module → list of booleans"
        )
    return {
        name.removeprefix(PREFIX).removesuffix(".default").removesuffix(".lora_E"): sum(map(bool, mask))
        for name, mask in table.items()
    }
