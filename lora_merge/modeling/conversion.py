"""How transformers turns a checkpoint's tensors into a model's parameters, from its own conversion mapping.

Renamings and operations are transformers' own; they run on `Assembly` objects in place of tensors, so that what comes
out is an account of which box of which stored tensor each parameter consists of. Nothing is loaded.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import shape_text
from lora_merge.modeling.pieces import Assembly, Piece, UnknownOperationError
from lora_merge.modeling.skeleton import meta_model
from lora_merge.runtime.shortage import not_for_want_of_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

NOT_STORED = "no stored tensor belongs to it"
"""Why a parameter has no value, where nothing else is to be said of it."""


class ConversionError(ValueError):
    """A parameter's tensors cannot be put together; the message says why, as the end of a sentence."""


@dataclass(slots=True)
class _Group:
    """The stored tensors that one conversion takes in."""

    converter: Any
    """None for a tensor that is but renamed."""

    sources: list[tuple[str, str]] = field(default_factory=list)
    """``(stored name, pattern of the converter)``; the order of their names is that of the parts."""


class Conversion:
    """Names and shapes of a model, and how stored names become them.

    Reference:
        ``transformers.core_model_loading.convert_and_load_state_dict_in_model`` and
        ``transformers.conversion_mapping.get_model_conversion_mapping`` (transformers 5.23).
    """

    def __init__(self, model: Any, part: str = "") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._model, self._part = model, part
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self.converters for pattern in converter.source_patterns
        }
        self._empty = model.state_dict()
        self._renamed: dict[str, str] = {}
        self._virtual: dict[object, dict[str, Assembly]] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any], part: str = "") -> Conversion | None:
        """Return the conversion of a ``config.json``, or None when transformers has no class for it.

        Args:
            config: of the model.
            part: path of a module whose own names are understood too, as those of an adapter that was trained on it.
        """
        model = meta_model(config)
        return None if model is None else cls(model, part)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter of the model; None when it has none of this name."""
        found = self._empty.get(parameter)
        return None if found is None else tuple(found.shape)

    def renamed(self, name: str) -> str:
        """Return a name after the renamings alone: what two spellings of one tensor have in common."""
        found = self._with_prefix(self._after_renamings(name))
        if self._part and found not in self._empty:
            in_part = self._with_prefix(self._after_renamings(f"{self._part}.{name}"))
            return in_part if in_part in self._empty else found
        return found

    def canonical(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a stored name belongs to, and the converter's pattern that takes it in."""
        found = self._canonical(name)
        if self._part and found[0] not in self._empty:
            in_part = self._canonical(f"{self._part}.{name}")
            return in_part if in_part[0] in self._empty else found
        return found

    def _canonical(self, name: str) -> tuple[str, str | None]:
        """Return the same for a name in the model itself."""
        from transformers.core_model_loading import apply_converters

        found, pattern = apply_converters(self._after_renamings(name), self.converters)
        found = self._with_prefix(found)
        if found not in self._empty and name in self._empty:
            return name, None
        return found, pattern

    def _after_renamings(self, name: str) -> str:
        """Return a name after the renamings, once for all that is asked about it."""
        from transformers.core_model_loading import apply_renamings

        if name not in self._renamed:
            self._renamed[name] = apply_renamings(name, self._renamings)
        return self._renamed[name]

    def _with_prefix(self, name: str) -> str:
        """Return a name with the base model's prefix put on or taken off, where the model has it that way."""
        prefix = f"{self._model.base_model_prefix}."
        if len(prefix) == 1 or name in self._empty:
            return name
        if name.removeprefix(prefix) in self._empty:
            return name.removeprefix(prefix)
        return f"{prefix}{name}" if f"{prefix}{name}" in self._empty else name

    def is_turned_by_shape(self, pattern: str | None) -> bool:
        """Return True for a converter that transposes what does not have the model's shape, which a square hides."""
        operations = self._by_pattern[pattern].operations if pattern else ()
        return any(getattr(operation, "check_dims", False) for operation in operations)

    def alternates(self, owner: str) -> bool:
        """Return True for stacked experts whose gate and up take turns, row by row.

        Reference:
            ``transformers.integrations.moe.use_experts_implementation`` (transformers 5.23).
        """
        path = self.canonical(f"{owner}.gate_up_proj")[0].rpartition(".")[0]
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return True
        return not getattr(module, "is_concatenated", True)

    def memory(self, shapes: Mapping[str, tuple[int, ...]]) -> Memory:
        """Return what the model's parameters consist of, for a checkpoint's tensors."""
        from transformers.core_model_loading import GroupWeightRename, dot_natural_key

        groups: dict[str, _Group] = {}
        # such a renaming asks which names came before
        guarded = any(isinstance(renaming, GroupWeightRename) for renaming in self._renamings)
        for name in sorted(shapes, key=dot_natural_key) if guarded else shapes:
            parameter, pattern = self.canonical(name)
            if parameter in self._empty:
                converter = self._by_pattern[pattern] if pattern else None
                groups.setdefault(parameter, _Group(converter)).sources.append((name, pattern or name))
        return Memory(self, groups, shapes)

    def missing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return the parameters that a checkpoint's tensors leave without a value, and why.

        Not those that are tied to one that has, nor those whose making is not known here.
        """
        memory = self.memory(shapes)
        found: dict[str, str] = {}
        for parameter, value in self._model.named_parameters(remove_duplicate=False):
            try:
                assembly = memory.assembly(parameter)
            except ConversionError as exc:
                if not isinstance(exc.__cause__, UnknownOperationError):
                    found[parameter] = str(exc)
                continue
            if assembly is None:
                found[parameter] = NOT_STORED
            elif assembly.shape != tuple(value.shape):
                got, wanted = shape_text(assembly.shape), shape_text(tuple(value.shape))
                found[parameter] = f"what is stored for it is {got}, expected {wanted}"
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        ends = {**tied, **{source: target for target, source in tied.items()}}
        return {name: why for name, why in found.items() if name not in ends or ends[name] in found}

    def assemble(
        self, group: _Group, parameter: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Assembly]:
        """Return the parameters that a group of stored tensors becomes, the one named among them.

        Raises:
            ConversionError: an operation is unknown, or the tensors do not fit together.
        """
        if group.converter is None:
            if len(group.sources) > 1:
                names = " and ".join(name for name, _ in group.sources[:2])
                raise ConversionError(f"{names} are both stored for it")
            name = group.sources[0][0]
            return {parameter: Assembly.whole(name, shapes[name])}
        from transformers.core_model_loading import dot_natural_key

        converter = copy.deepcopy(group.converter)
        for name, pattern in sorted(group.sources, key=lambda source: dot_natural_key(source[0])):
            converter.add_tensor(parameter, name, pattern, Assembly.whole(name, shapes[name]))
        try:
            made = converter.convert(parameter, model=self._model, config=self._model.config)
        except UnknownOperationError as exc:
            steps = " and ".join(type(operation).__name__ for operation in converter.operations)
            raise ConversionError(f"transformers makes it by {steps}, and {exc}") from exc
        except Exception as exc:
            not_for_want_of_memory(exc)
            raise ConversionError(f"its tensors do not fit together ({exc})") from exc
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def parts_of(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[Piece, ...]]:
        """Return where a tensor of a stored name would lie in the model: pieces by parameter.

        The tensors that would be stored beside it (other experts, the other half) are taken to be of its shape.

        Raises:
            ConversionError: an operation is unknown, or the shape is not that of such a part.
        """
        parameter, pattern = self.canonical(name)
        if pattern is None:
            return {parameter: Assembly.whole(name, shape).pieces}
        made = self._virtual_group(parameter, self._by_pattern[pattern], shape)
        label = _label(pattern, _index_in(pattern, self.renamed(name)))
        found = {
            target: tuple(piece for piece in assembly.pieces if piece.part == label)
            for target, assembly in made.items()
        }
        return {target: pieces for target, pieces in found.items() if pieces}

    def _virtual_group(self, parameter: str, converter: Any, shape: tuple[int, ...]) -> dict[str, Assembly]:
        """Return the parameters that a converter would make of tensors that all have one shape."""
        key = (parameter, id(converter), shape)
        if key in self._virtual:
            return self._virtual[key]
        known = self.shape(parameter) or (0,)
        labels = {
            _label(pattern, index): pattern
            for pattern in converter.source_patterns
            for index in (range(known[0]) if "*" in pattern else (None,))
        }
        made = self.assemble(_Group(converter, list(labels.items())), parameter, dict.fromkeys(labels, shape))
        for target, assembly in made.items():
            if self.shape(target) != assembly.shape:
                wanted = self.shape(target) or ()
                raise ConversionError(
                    f"{shape_text(shape)} is no part of {target}, which is {shape_text(wanted)}"
                )
        self._virtual[key] = made
        return made

    @cached_property
    def _reversed(self) -> list[Any]:
        """Return the renamings of a model that is saved, as ``revert_weight_conversion`` has them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        transforms = get_model_conversion_mapping(self._model, add_legacy=False)
        return [
            transform.reverse_transform()
            for transform in transforms[::-1]
            if isinstance(transform, WeightRenaming) and not isinstance(transform, PrefixChange)
        ]

    def spelled(self, parameter: str) -> str:
        """Return a parameter's name as a published checkpoint would have it; for one that is only renamed."""
        name = parameter
        for renaming in self._reversed:
            name = renaming.rename_source_key(name)[0]
        return name if self.canonical(name) == (parameter, None) else parameter


class Memory:
    """A checkpoint as the parameters of its model; each is put together when it is asked for."""

    def __init__(
        self, conversion: Conversion, groups: Mapping[str, _Group], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._conversion, self._groups, self._shapes = conversion, groups, shapes
        self._made: dict[str, Assembly] = {}

    def assembly(self, parameter: str) -> Assembly | None:
        """Return what a parameter consists of; None when the checkpoint has nothing for it.

        Raises:
            ConversionError: its tensors cannot be put together.
        """
        if parameter not in self._made:
            first = self._first(parameter)
            if first is None:
                return None
            self._made |= self._conversion.assemble(self._groups[first], first, self._shapes)
        return self._made.get(parameter)

    def _first(self, parameter: str) -> str | None:
        """Return the parameter that the group of a parameter goes by: the first of those made together."""
        if parameter in self._groups:
            return parameter
        for converter in self._conversion.converters:
            first, *others = converter.target_patterns
            for other in others:
                name = parameter.replace(other, first)
                if other in parameter and name in self._groups and self._groups[name].converter is converter:
                    return name
        return None


def _index_in(pattern: str, name: str) -> int | None:
    """Return the number that stands for the ``*`` of a pattern in a name."""
    if "*" not in pattern:
        return None
    before, _, after = pattern.partition("*")
    match = re.search(rf"{before}(\d+){after}", name)
    if match is None:
        raise ConversionError(f"has no number where {pattern} has one")
    return int(match[1])


def _label(pattern: str, index: int | None) -> str:
    return pattern if index is None else f"{pattern}.{index}"
