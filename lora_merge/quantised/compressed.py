"""compressed-tensors: groups of modules, each with a format and with arguments of its weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import error
from lora_merge.quantised.compressed_parts import Group, add_module
from lora_merge.quantised.draft import AGAIN, CODE, NOTHING, Draft
from lora_merge.quantised.exceptions import Exceptions
from lora_merge.quantised.matching import matching
from lora_merge.quantised.method import Found, PatternError
from lora_merge.quantised.tables import settings_of, table_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.method import Surroundings

_PACKED = ".weight_packed"
_PLAIN = ".weight"
_BYTES = ("F8_E4M3", "F8_E5M2", "I8")
_ORPHANS = re.compile(r"\.weight_(packed|scale|zero_point|g_idx|global_scale)$")
_MIXED = "mixed-precision"


class CompressedTensors:
    """``quant_method`` compressed-tensors. Source: compressed-tensors 0.20 ``QuantizationConfig`` and its compressors."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored so."""
        table = table_of(settings_of(around.config, around.side), "compressed-tensors")
        if table is None:
            return NOTHING
        groups = _groups(table.values)
        if not groups:  # only activations, or the cache of keys and values
            return NOTHING
        draft = Draft(tensors, table)
        codes = {}
        for name, ref in tensors.items():
            if name.endswith(_PACKED):
                codes[name.removesuffix(_PACKED)] = ref
            elif name.endswith(_PLAIN) and ref.dtype in _BYTES and len(ref.shape) > 1:
                codes[name.removesuffix(_PLAIN)] = ref
        exceptions = Exceptions("ignore", table.values.get("ignore"), "targets", around)
        shapes: dict[object, tuple[int, ...]] = {}
        for module, group in zip(codes, _resolved(groups, list(codes), around), strict=True):
            if group is None:
                sentence = f"is stored as {codes[module].dtype}, but no group of config_groups targets it"
                draft.refuse(error(CODE, codes[module].name, sentence, AGAIN), [codes[module]])
            else:
                add_module(draft, module, codes[module], group, around, shapes)
        return draft.done(exceptions, _ORPHANS, "weight_packed, or a weight in FP8 or I8")


def _groups(values: Mapping[str, Any]) -> list[Group]:
    """Return the groups that quantise weights, in their order."""
    listed = values.get("config_groups")
    found = []
    overall = str(values.get("format") or "")
    for name, table in listed.items() if isinstance(listed, dict) else ():
        arguments = table.get("weights") if isinstance(table, dict) else None
        if isinstance(arguments, dict) and arguments:
            # `mixed-precision` only says that each group names a format.
            own = str(table.get("format") or ("" if overall == _MIXED else overall))
            targets = table.get("targets")
            texts = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
            found.append(Group(str(name), tuple(texts), own, arguments))
    return found


def _resolved(groups: Sequence[Group], modules: Sequence[str], around: Surroundings) -> list[Group | None]:
    """Return the group of each module: by its whole name, else by a regex, else by its class. Classes are not known here: the
    first group that names one is taken.
    """
    # Reversed, so that the first group that names a target stays.
    named = {target: group for group in reversed(groups) for target in group.targets}
    patterns = [(target, group) for group in groups for target in group.targets if target.startswith("re:")]
    of_class = next((group for group in groups for target in group.targets if target[:1].isupper()), None)
    hits: list[list[int]] = [[] for _ in modules]
    if patterns:
        try:
            hits = matching([target.removeprefix("re:") for target, _ in patterns], modules, around.match)
        except PatternError as exc:
            sentence = f"targets has {quoted(patterns[exc.at][0])}, which {exc}"
            raise PatternError(exc.at, sentence) from exc
    return [
        named.get(module) or (patterns[min(found)][1] if found else of_class)
        for module, found in zip(modules, hits, strict=True)
    ]
