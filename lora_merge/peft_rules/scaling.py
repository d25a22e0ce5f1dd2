"""The rank and the scale of each module, by an adapter's configuration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_merge.core.report import Issue, error, warning
from lora_merge.core.tensor import LARGEST_FLOAT32
from lora_merge.peft_rules.hints import OTHER_CONFIG
from lora_merge.peft_rules.patterns import TargetError, patterns_of
from lora_merge.peft_rules.targets import matching_patterns
from lora_merge.words import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Scaling:
    """``r``, ``lora_alpha``, ``use_rslora`` and the two patterns of a LoRA configuration.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._default_rank = number(config, "r", 8)
        self._default_alpha = number(config, "lora_alpha", 8)
        self._ranks = _pattern_table(config, "rank_pattern")
        self._alphas = _pattern_table(config, "alpha_pattern")
        self._rslora = bool(config.get("use_rslora"))

    def of(self, module: str, found: int) -> tuple[float, list[Issue]]:
        """Return the scale of a module, and issues where the configuration contradicts its tensors.

        Args:
            module: its path; for a parameter of ``target_parameters``, that of the parameter.
            found: the rank of its tensors.

        Reference:
            ``peft.tuners.lora.layer.LoraLayer.update_layer`` (PEFT 0.21.2): α/r, or α/√r for rsLoRA.
        """
        rank, issues = self._lookup("rank_pattern", self._ranks, module, self._default_rank)
        alpha, ambiguous = self._lookup("alpha_pattern", self._alphas, module, self._default_alpha)
        # Where patterns disagree, that has been said and explains the rank.
        if found != rank and not issues:
            sentence = f"has rank {found}, the config says {rank:g} (r and rank_pattern)"
            hint = OTHER_CONFIG
            issues = [error("rank-mismatch", module, sentence, hint)]
        return alpha / (math.sqrt(rank) if self._rslora else rank), issues + ambiguous

    @staticmethod
    def _lookup(
        field: str, table: Mapping[str, float], module: str, default: float
    ) -> tuple[float, list[Issue]]:
        """Return the value of a module (the default where patterns disagree), and an issue for a disagreement."""
        matching = matching_patterns(table, module, field)
        if len(set(matching.values())) > 1:
            listed = ", ".join(f"{key!r}: {value:g}" for key, value in matching.items())
            sentence = f"{field} gives it several values ({listed})"
            hint = (
                "keep only the right pattern: saving sorted the patterns, so their order in the training is "
                "lost"
            )
            return default, [error("ambiguous-pattern", module, sentence, hint)]
        # They agree, so the first is as good as any.
        return next(iter(matching.values()), default), []

    def zeros(self, modules: Iterable[str]) -> list[Issue]:
        """Return an error when α is 0 for modules without a pattern, and a warning for patterns with α 0: nothing
        changes there.
        """
        # Some tools write 0 where they do not know α (verl-project/verl#1821).
        issues = []
        if self._default_alpha == 0 and any(
            not matching_patterns(self._alphas, one, "alpha_pattern") for one in modules
        ):
            sentence = "is 0, so the scale is 0 and the adapter changes nothing"
            hint = "set lora_alpha in adapter_config.json to the value of the training"
            issues.append(error("zero-scale", "lora_alpha", sentence, hint))
        zero = [key for key, alpha in self._alphas.items() if alpha == 0]
        if zero:
            sentence = f"gives {listing(zero)} the alpha 0, so nothing is merged there"
            issues.append(warning("zero-scale", "alpha_pattern", sentence))
        return issues

    def unmatched(self, modules: Iterable[str]) -> list[tuple[str, str]]:
        """Return ``(field, key)`` of each key of the two pattern tables that matches no module."""
        known = tuple(modules)
        loose = []
        for field, table in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            keys = tuple(table)
            patterns = patterns_of(field, keys, "end")
            answered = {at for module in known for at in patterns.matching(module)}
            loose += [(field, key) for at, key in enumerate(keys) if at not in answered]
        return loose


def number(config: Mapping[str, Any], field: str, default: float) -> float:
    """Return the number in a field, or the default where it is absent.

    Raises:
        TargetError: it holds something else, or a rank that is not positive.
    """
    value = config.get(field, default)
    if not is_number(value):
        # JSON's null, which Python calls None.
        found = "null" if value is None else quoted(value)
        hint = f"set {field} in adapter_config.json to the value of the training"
        raise TargetError(field, f"is {found}, expected a number that float32 can hold", hint)
    if field in {"r", "init_r"} and value <= 0:
        raise TargetError(field, f"is {value!r}, expected a positive number")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Return True for a number that float32 can hold, which merges compute in."""
    # True is an int to Python, and no number in JSON.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST_FLOAT32  # False for NaN


def _pattern_table(config: Mapping[str, Any], field: str) -> dict[str, float]:
    table = config.get(field)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise TargetError(field, f"is {quoted(table)}, expected a table of pattern → number")
    patterns_of(field, tuple(table), "end").check()
    for key, value in table.items():
        if not is_number(value) or (field == "rank_pattern" and value <= 0):
            wanted = "a positive number" if field == "rank_pattern" else "a number"
            raise TargetError(field, f"gives {quoted(key)} the value {quoted(value)}, expected {wanted}")
    return dict(table)
