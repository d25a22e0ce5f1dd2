"""Tensor names of a PEFT adapter → which module each belongs to, and in which role."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Replacement
from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.core.kinds import PREFIX
from lora_merge.core.report import Issue, error
from lora_merge.core.targets import is_saved
from lora_merge.core.tensor import TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

_ROLES: tuple[tuple[str, str], ...] = (
    (r"\.lora_A(\.weight)?", "A"),
    (r"\.lora_B(\.weight)?", "B"),
    (r"\.lora_B\.bias", "bias"),
    (r"\.lora_embedding_A", "embedding_A"),
    (r"\.lora_embedding_B", "embedding_B"),
    (r"\.lora_E", "E"),
    (r"\.lora_magnitude_vector(\.weight)?", "magnitude"),
    (r"\.lora_diag", "diagonal"),
    (r"(\.token_adapter)?\.trainable_tokens_delta", "tokens"),
)
"""The end of a name, and the role that it stands for."""

_ROLE_PATTERNS = tuple((re.compile(rf"(?P<module>.+?){end}"), role) for end, role in _ROLES)

_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")
"""What VeLoRA and MonteCLoRA keep for training; a merge leaves it out, as PEFT's does."""

_FULL = re.compile(
    r"(?P<module>(?:(?!\.lora_).)+?)(?:\.(?:base_layer|modules_to_save|original_module))?"
    r"\.(?P<parameter>[^.]+)"
)
"""A whole parameter, trained or saved along (PEFT's ``save_embedding_layers`` does so by itself)."""


@dataclass(slots=True)
class Sorted:
    """The tensors of an adapter file, sorted out."""

    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    """``{module: {role: tensor}}``, the module as the names have it, ``base_layer`` included."""

    replacements: dict[str, Replacement] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)


def sort_out(refs: tuple[TensorRef, ...], config: Mapping[str, Any], file: str) -> Sorted:
    """Return the tensors of a LoRA or AdaLoRA adapter by module and role, and an issue for each that has none."""
    found = Sorted()
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        if name != ref.name and not _TRAINING_ONLY.fullmatch(name):
            _file_away(found, name, ref, config)
    found.issues += outside(refs, file)
    return found


def outside(refs: tuple[TensorRef, ...], file: str, shared: str = PREFIX) -> list[Issue]:
    """Return an issue when there are no tensors, or some without the prefix that PEFT gives them.

    Args:
        refs: every tensor of the file.
        file: its name.
        shared: the prefix of a tensor that may belong to no module.
    """
    stray = [ref.name for ref in refs if not ref.name.startswith(shared)]
    if not refs:
        return [error("empty", file, "holds no tensors")]
    if not stray:
        return []
    many = f"{len(stray)} of {len(refs)} tensors lack the prefix {PREFIX}"
    hint = "PEFT would load none of these; rename them, or save the adapter with PEFT"
    return [error("wrong-prefix", stray[0], many, hint)]


def _file_away(found: Sorted, name: str, ref: TensorRef, config: Mapping[str, Any]) -> None:
    """Put one tensor where it belongs."""
    for pattern, role in _ROLE_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            group = found.groups.setdefault(match["module"], {})
            if role in group:
                sentence = f"is a second {_spoken(role)} of its module"
                found.issues.append(error("duplicate-tensor", ref.name, sentence))
            group.setdefault(role, ref)
            return
    match = _FULL.fullmatch(name)
    if match is None:
        found.issues.append(_other_tensor(ref))
        return
    parameter = f"{match['module']}.{match['parameter']}"
    why = reason(match["module"], match["parameter"], config)
    if not why and match["parameter"] not in {"weight", "bias"}:
        found.issues.append(_other_tensor(ref))
    elif parameter in found.replacements:
        sentence = f"is a second {match['parameter']} of its module"
        found.issues.append(error("duplicate-tensor", ref.name, sentence))
    else:
        found.replacements[parameter] = Replacement(ref, why)


def reason(
    module: str, parameter: str, config: Mapping[str, Any]
) -> Literal["module", "bias", "embedding", ""]:
    """Return what in the configuration explains a whole parameter in the file."""
    if any(is_saved(module, entry) for entry in config.get("modules_to_save") or ()):
        return "module"
    if parameter == "bias" and config.get("bias", "none") != "none":
        return "bias"
    if parameter == "weight" and module.rpartition(".")[2] in INPUT_NAMES | OUTPUT_NAMES:
        return "embedding"
    return ""


def _spoken(role: str) -> str:
    return {"A": "lora_A", "B": "lora_B"}.get(role, role)


def _other_tensor(ref: TensorRef) -> Issue:
    return error("unexpected-tensor", ref.name, "is no tensor of a LoRA adapter")
