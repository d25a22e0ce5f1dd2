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
from lora_merge.runtime.shortage import raise_if_out_of_memory

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
    """None for a tensor that is only renamed."""

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
        """Return the parameter that a stored name belongs to, and the converter's pattern that takes it; None for no
        converter.
        """
        found = self._canonical(name)
        if self._part and found[0] not in self._empty:
            in_part = self._canonical(f"{self._part}.{name}")
            return in_part if in_part[0] in self._empty else found
        return found

    def _canonical(self, name: str) -> tuple[str, str | None]:
        """Return the same as `canonical` for a name in the model itself, `part` left aside."""
        from transformers.core_model_loading import apply_converters

        found, pattern = apply_converters(self._after_renamings(name), self.converters)
        found = self._with_prefix(found)
        # The name is the model's own already, and a renaming for older releases leads away from it.
        if found not in self._empty and name in self._empty:
            return name, None
        return found, pattern

    def _after_renamings(self, name: str) -> str:
        """Return a name after transformers' renamings. The result is kept: each name is asked for many times."""
        from transformers.core_model_loading import apply_renamings

        if name not in self._renamed:
            self._renamed[name] = apply_renamings(name, self._renamings)
        return self._renamed[name]

    def _with_prefix(self, name: str) -> str:
        """Return a name with the base model's prefix (``model.``) put on or taken off, if the model has it that way."""
        prefix = f"{self._model.base_model_prefix}."
        # Some classes have no prefix: then it is a lone dot.
        if len(prefix) == 1 or name in self._empty:
            return name
        if name.removeprefix(prefix) in self._empty:
            return name.removeprefix(prefix)
        return f"{prefix}{name}" if f"{prefix}{name}" in self._empty else name

    def is_turned_by_shape(self, pattern: str | None) -> bool:
        """Return True for a converter that transposes every tensor without the model's shape; a square tensor hides
        that.
        """
        operations = self._by_pattern[pattern].operations if pattern else ()
        return any(getattr(operation, "check_dims", False) for operation in operations)

    def alternates(self, owner: str) -> bool:
        """Return True for stacked experts whose gate and up take turns, row by row.

        Reference:
            ``transformers.integrations.moe.use_experts_implementation`` (transformers 5.23).
        """
        # The experts' module has the flag, so the parameter's name is cut off.
        path = self.canonical(f"{owner}.gate_up_proj")[0].rpartition(".")[0]
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            # Nothing says that gate and up are two halves, so the answer is the one that refuses.
            return True
        return not getattr(module, "is_concatenated", True)

    def memory(self, shapes: Mapping[str, tuple[int, ...]]) -> Memory:
        """Return a checkpoint's tensors as the parameters of the model, which are put together only when asked for."""
        from transformers.core_model_loading import GroupWeightRename, dot_natural_key

        groups: dict[str, _Group] = {}
        # Such a renaming depends on which names came before, and transformers goes through them in sorted order.
        guarded = any(isinstance(renaming, GroupWeightRename) for renaming in self._renamings)
        for name in sorted(shapes, key=dot_natural_key) if guarded else shapes:
            parameter, pattern = self.canonical(name)
            if parameter in self._empty:
                converter = self._by_pattern[pattern] if pattern else None
                groups.setdefault(parameter, _Group(converter)).sources.append((name, pattern or name))
        return Memory(self, groups, shapes)

    def missing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return the parameters that a checkpoint leaves without a value → why, as a sentence without subject.

        Not those that are tied to one that has, nor those whose making is not known here.
        """
        memory = self.memory(shapes)
        found: dict[str, str] = {}
        # With duplicates: the ends of a tie have two names.
        for parameter, value in self._model.named_parameters(remove_duplicate=False):
            try:
                assembly = memory.assembly(parameter)
            except ConversionError as exc:
                # A parameter whose operation is unknown here is not known to be missing.
                if not isinstance(exc.__cause__, UnknownOperationError):
                    found[parameter] = str(exc)
                continue
            if assembly is None:
                found[parameter] = NOT_STORED
            elif assembly.shape != tuple(value.shape):
                got, wanted = shape_text(assembly.shape), shape_text(tuple(value.shape))
                found[parameter] = f"the tensors stored for it give {got}, expected {wanted}"
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        # A parameter that is tied to one with a value has that value.
        ends = {**tied, **{source: target for target, source in tied.items()}}
        return {name: why for name, why in found.items() if name not in ends or ends[name] in found}

    def assemble(
        self, group: _Group, parameter: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Assembly]:
        """Return all parameters that a group of stored tensors becomes, the one named among them.

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

        # A converter collects tensors in itself, and this one is used for other layers too.
        converter = copy.deepcopy(group.converter)
        # The order of transformers' own loader: expert 2 before expert 10.
        for name, pattern in sorted(group.sources, key=lambda source: dot_natural_key(source[0])):
            converter.add_tensor(parameter, name, pattern, Assembly.whole(name, shapes[name]))
        try:
            made = converter.convert(parameter, model=self._model, config=self._model.config)
        except UnknownOperationError as exc:
            steps = " and ".join(type(operation).__name__ for operation in converter.operations)
            raise ConversionError(f"transformers builds it by {steps}, and {exc}") from exc
        except Exception as exc:
            raise_if_out_of_memory(exc)
            raise ConversionError(f"its tensors do not fit together ({exc})") from exc
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def parts_of(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[Piece, ...]]:
        """Return which boxes of the model a tensor of a stored name would fill: pieces by parameter.

        The tensors that would be stored beside it (other experts, the other half) are taken to be of its shape.

        Raises:
            ConversionError: an operation is unknown, or the shape is not that of such a part.
        """
        parameter, pattern = self.canonical(name)
        if pattern is None:
            return {parameter: Assembly.whole(name, shape).pieces}
        made = self._virtual_group(parameter, self._by_pattern[pattern], shape)
        # The tensor's own pieces among those of the tensors that were made up to go with it.
        label = _label(pattern, _index_in(pattern, self.renamed(name)))
        found = {
            target: tuple(piece for piece in assembly.pieces if piece.part == label)
            for target, assembly in made.items()
        }
        return {target: pieces for target, pieces in found.items() if pieces}

    def _virtual_group(self, parameter: str, converter: Any, shape: tuple[int, ...]) -> dict[str, Assembly]:
        """Return the parameters that a converter would make of made-up tensors that all have one shape.

        Raises:
            ConversionError: such tensors do not make parameters of the model's shapes.
        """
        key = (parameter, id(converter), shape)
        if key in self._virtual:
            return self._virtual[key]
        # ``*`` in a pattern is the expert's number; the first axis of the model's parameter says how many there are.
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
                    f"{shape_text(shape)} is not a part of {target}, which has the shape {shape_text(wanted)}"
                )
        self._virtual[key] = made
        return made

    @cached_property
    def _reversed(self) -> list[Any]:
        """Renamings of a model that is saved, in the order in which ``revert_weight_conversion`` applies them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        transforms = get_model_conversion_mapping(self._model, add_legacy=False)
        return [
            transform.reverse_transform()
            for transform in transforms[::-1]
            if isinstance(transform, WeightRenaming) and not isinstance(transform, PrefixChange)
        ]

    def spelled(self, parameter: str) -> str:
        """Return a parameter's name as a published checkpoint has it; unchanged where more than a renaming is needed."""
        name = parameter
        for renaming in self._reversed:
            name = renaming.rename_source_key(name)[0]
        # Reading it must lead back to the same parameter; else the renamings are not each other's inverse.
        return name if self.canonical(name) == (parameter, None) else parameter


class Memory:
    """A checkpoint as the parameters of its model; each is put together when it is asked for."""

    def __init__(
        self, conversion: Conversion, groups: Mapping[str, _Group], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._conversion, self._groups, self._shapes = conversion, groups, shapes
        self._made: dict[str, Assembly] = {}

    def assembly(self, parameter: str) -> Assembly | None:
        """Return the stored boxes that a parameter consists of; None when the checkpoint has nothing for it.

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
        """Return the parameter under which the group of another is kept: the first of those that one converter makes."""
        if parameter in self._groups:
            return parameter
        for converter in self._conversion.converters:
            # A converter with several targets (a split fused projection) makes all of them at once.
            first, *others = converter.target_patterns
            for other in others:
                name = parameter.replace(other, first)
                if other in parameter and name in self._groups and self._groups[name].converter is converter:
                    return name
        return None


def _index_in(pattern: str, name: str) -> int | None:
    """Return the number in a name at the place of a pattern's ``*``; None for a pattern without one.

    Raises:
        ConversionError: the name has no number there.
    """
    if "*" not in pattern:
        return None
    before, _, after = pattern.partition("*")
    match = re.search(rf"{before}(\d+){after}", name)
    if match is None:
        raise ConversionError(f"has no number where {pattern} has one")
    return int(match[1])


def _label(pattern: str, index: int | None) -> str:
    return pattern if index is None else f"{pattern}.{index}"
