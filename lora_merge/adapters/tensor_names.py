"""Tensor names of a PEFT adapter → which module each belongs to, and in which role."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.core.adapter import Reason, Replacement
from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TensorRef
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.peft_rules.targets import saved_among

if TYPE_CHECKING:
    from collections.abc import Mapping


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
"""``(end of a name, role)``, as regular expressions."""

_ROLE_PATTERNS = tuple((re.compile(rf"(?P<module>.+?){end}"), role) for end, role in _ROLES)

_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")
"""What VeLoRA and MonteCLoRA keep for training; a merge leaves it out, as PEFT's does."""

_FULL = re.compile(r"(?P<module>(?:(?!\.lora_).)+)\.(?P<parameter>[^.]+)")
"""A whole parameter: trained, or saved along by PEFT (``save_embedding_layers``)."""

_TRAINED = re.compile(r"\.modules_to_save(?=\.)")
_UNTRAINED = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|original_module)(?=\.)")
"""Wrappers of ``modules_to_save`` and ``trainable_token_indices``, and what they hold of the base
(``peft.utils.other.AuxiliaryTrainingWrapper``, PEFT 0.21.2)."""


class Repeat(NamedTuple):
    """Two tensors that must have the same values, since only one of them is read."""

    first: TensorRef
    second: TensorRef
    what: str
    """What both are to their module: ``"weight"``, ``"lora_A"``."""


@dataclass(slots=True)
class Wholes:
    """The whole parameters of an adapter file, and the copies of them that PEFT saves beside them.

    Where the vocabulary was resized, PEFT saves everything below an embedding: the trained weight as ``.weight`` and as
    ``.modules_to_save.weight``, and what it was before the training as ``.original_module.weight``
    (``peft.utils.save_and_load.get_peft_model_state_dict``, PEFT 0.21.2).
    """

    trained: dict[str, list[TensorRef]] = field(default_factory=dict)
    """By parameter; the first is the one that PEFT loads."""

    untrained: dict[str, list[TensorRef]] = field(default_factory=dict)
    """By parameter: what the base's own one was in the training."""

    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, ref: TensorRef, config: Mapping[str, Any]) -> bool:
        """Keep a tensor that is a whole parameter; return False for any other."""
        name = ref.name.removeprefix(PREFIX)
        bare = _UNTRAINED.sub("", _TRAINED.sub("", name))
        match = _FULL.fullmatch(bare)
        if match is None:
            return False
        why = reason(match["module"], match["parameter"], config)
        # With ensure_weight_tying PEFT saves the other end of a tie as a separate module, under its plain name.
        if why == "embedding" and name == bare and _saves_both_ends(config):
            why = "module"
        # Nothing explains it: only a weight or a bias can be meant as a whole parameter.
        if not why and match["parameter"] not in {"weight", "bias"}:
            return False
        is_copy = _UNTRAINED.search(name) is not None and why != "bias"
        found = (self.untrained if is_copy else self.trained).setdefault(bare, [])
        # PEFT loads the plain name and drops the copies.
        found.insert(0 if name == bare else len(found), ref)
        self.reasons[bare] = why
        return True

    def replacements(self) -> dict[str, Replacement]:
        """Return parameter → what takes its place in the base."""
        found = {}
        for parameter, why in self.reasons.items():
            trained, untrained = self._of(parameter)
            # A module of modules_to_save, and what PEFT ties to one, is PEFT's own and stays beside the base's
            # parameter. Anything else is loaded into the base.
            if trained and untrained and self._is_apart(parameter):
                found[parameter] = Replacement(trained[0], "module", untrained[0])
            elif trained or not (why == "module" and _has_original(untrained)):
                found[parameter] = Replacement((trained or untrained)[0], why)
        return found

    def repeats(self) -> list[Repeat]:
        """Return the pairs of tensors that are copies of each other."""
        pairs = []
        for parameter in self.reasons:
            trained, untrained = self._of(parameter)
            for refs in [trained, untrained] if self._is_apart(parameter) else [trained + untrained]:
                pairs += [Repeat(refs[0], ref, parameter.rpartition(".")[2]) for ref in refs[1:]]
        return pairs

    def _of(self, parameter: str) -> tuple[list[TensorRef], list[TensorRef]]:
        return self.trained.get(parameter, []), self.untrained.get(parameter, [])

    def _is_apart(self, parameter: str) -> bool:
        """Return True where the trained weight and the base's own are two different parameters to PEFT."""
        trained, untrained = self._of(parameter)
        return self.reasons[parameter] == "module" or (bool(trained) and _has_original(untrained))


def _saves_both_ends(config: Mapping[str, Any]) -> bool:
    """Return True where PEFT saves both ends of a tie because one is in ``modules_to_save``."""
    saved = {str(entry).rpartition(".")[2] for entry in config.get("modules_to_save") or ()}
    return bool(config.get("ensure_weight_tying")) and not saved.isdisjoint(INPUT_NAMES | OUTPUT_NAMES)


def _has_original(refs: list[TensorRef]) -> bool:
    """Return True where one of the tensors is the untrained half of a module of ``modules_to_save``."""
    return any(".original_module." in ref.name for ref in refs)


@dataclass(slots=True)
class Sorted:
    """The tensors of an adapter file by module and role, and whole parameters."""

    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    """``{module: {role: tensor}}``, the module as the names have it, ``base_layer`` included."""

    wholes: Wholes = field(default_factory=Wholes)
    repeats: list[Repeat] = field(default_factory=list)
    """PEFT saves some tensors below a resized embedding twice."""

    issues: list[Issue] = field(default_factory=list)


def sort_out(refs: tuple[TensorRef, ...], config: Mapping[str, Any], file: str) -> Sorted:
    """Return the tensors of a LoRA or AdaLoRA adapter by module and role; a tensor without a role is an issue."""
    found = Sorted()
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        # Tensors without PEFT's prefix are one issue of `outside`, not one each.
        if name != ref.name and not _TRAINING_ONLY.fullmatch(name):
            _file_away(found, name, ref, config)
    found.repeats += found.wholes.repeats()
    found.issues += outside(refs, file)
    return found


def outside(refs: tuple[TensorRef, ...], file: str, shared: str = PREFIX) -> list[Issue]:
    """Return an issue when there are no tensors, or when some lack the prefix that PEFT gives them.

    Args:
        refs: every tensor of the file.
        file: its name.
        shared: the prefix of a tensor that may belong to no module.
    """
    stray = [ref.name for ref in refs if not ref.name.startswith(shared)]
    if not refs:
        return [error("empty", file, "contains no tensors")]
    if not stray:
        return []
    many = f"{len(stray)} of {len(refs)} tensors do not have the prefix {PREFIX}"
    hint = "rename these tensors, or save the adapter again with PEFT, which would load none of them"
    return [error("wrong-prefix", stray[0], many, hint)]


def _file_away(found: Sorted, name: str, ref: TensorRef, config: Mapping[str, Any]) -> None:
    """Put one tensor into its group, or among the whole parameters; else add an issue."""
    for pattern, role in _ROLE_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            group = found.groups.setdefault(match["module"], {})
            if role in group:
                found.repeats.append(Repeat(group[role], ref, _spoken(role)))
            # The first is kept; a repeat is compared with it later.
            group.setdefault(role, ref)
            return
    if not found.wholes.add(ref, config):
        found.issues.append(_other_tensor(ref))


def reason(module: str, parameter: str, config: Mapping[str, Any]) -> Reason:
    """Return the field of the configuration that explains a whole parameter in the file; empty if none does.

    Args:
        module: that owns the parameter, by its path.
        parameter: name in the module.
        config: PEFT's.
    """
    entries = config.get("modules_to_save") or ()
    if saved_among(frozenset(entries), (module,)):
        return "module"
    if parameter == "bias" and config.get("bias", "none") != "none":
        return "bias"
    if parameter in {"weight", "bias"} and module.rpartition(".")[2] in INPUT_NAMES | OUTPUT_NAMES:
        return "embedding"
    return ""


def _spoken(role: str) -> str:
    return {"A": "lora_A", "B": "lora_B"}.get(role, role)


def _other_tensor(ref: TensorRef) -> Issue:
    return error("unexpected-tensor", ref.name, "is not a tensor of a LoRA adapter")


NESTED = ".base_layer"
"""Name that PEFT gives the module inside its own layer."""


def plain(module: str) -> str:
    """Return a module's path without PEFT's ``.base_layer``."""
    return module.replace(NESTED, "")
