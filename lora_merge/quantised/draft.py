"""The weights of one method as they are found, each with the check of its parts."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES, shape_text
from lora_merge.core.weight import WEIGHT, Setting, Storage, Weight
from lora_merge.quantised.describing import describe
from lora_merge.quantised.method import Found
from lora_merge.quantised.outputs import leftover
from lora_merge.words import choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_merge.core.tensor import TensorRef
    from lora_merge.quantised.exceptions import Exceptions
    from lora_merge.quantised.tables import Table

CODE = "quantised"
"""Of the issues of this room about tensors that do not fit their configuration."""

AGAIN = "download the checkpoint again, or merge into its full-precision parent: --base PARENT"

NOTHING = Found({})

_EXTRAS = (
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "qscale_act",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "weight_shape",
    "weight_format",
    "bias_scale",
)
"""What may be stored beside the codes of a module, and tells nothing about the weight's values."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Wanted(NamedTuple):
    """One part that a weight must have."""

    role: str
    name: str
    """Its whole name in the files."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """The shapes that it may have."""


# Tens of thousands of weights share a few storages.
@lru_cache(maxsize=1024)
def storage(codec: str, dtype: str, **settings: Setting) -> Storage:
    """Return a storage, with its settings in the order of their names."""
    return Storage(codec, dtype, tuple(sorted(settings.items())))


def grid(shape: Sequence[int], rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of a tensor of scales: one for each block, ragged ones at the edges included.

    Args:
        shape: of the weight, ``[…, rows, columns]``.
        rows: of a block; 0 for the whole axis.
        columns: likewise.

    Example:
        >>> grid((576, 448), 128, 128), grid((8, 5, 64), 1, 0)
        ((5, 4), (8, 5, 1))
    """
    *stack, height, width = shape
    return (*stack, -(-height // rows) if rows else 1, -(-width // columns) if columns else 1)


class Draft:
    """What one method has found so far.

    Args:
        tensors: that are left, by name.
        table: the settings of the method.
    """

    def __init__(self, tensors: Mapping[str, TensorRef], table: Table) -> None:
        self.tensors, self.table = tensors, table
        self.weights: dict[str, Weight] = {}
        self.issues: list[Issue] = []
        self._broken: dict[str, TensorRef] = {}
        # Most checkpoints have one of them at most, and a lookup for each module and name takes time.
        last = {name.rpartition(".")[2] for name in tensors}
        self._extras = [extra for extra in _EXTRAS if any(one.endswith(extra) for one in last)]

    def add(self, name: str, shape: tuple[int, ...], how: Storage, wanted: Sequence[Wanted]) -> bool:
        """Add a weight if all its parts are there, as they should be. Else there is an issue.

        Args:
            name: of the weight, as the model has it.
            shape: of its values.
            how: it is stored.
            wanted: its parts; the first holds the codes.
        """
        parts: dict[str, TensorRef] = {}
        if wanted[0].name != name and name in self.tensors:
            sentence = f"is stored twice: in full precision, and quantised ({wanted[0].name})"
            return self.refuse(error(CODE, name, sentence, AGAIN), self.beside(module_of(name)))
        for one in wanted:
            ref = self.tensors.get(one.name)
            fault = self._fault(ref, one, wanted[0], how)
            if fault is not None:
                return self.refuse(fault, [self.tensors[w.name] for w in wanted if w.name in self.tensors])
            assert ref is not None
            parts[one.role] = ref
        self._add_extras(name, parts)
        self.weights[name] = Weight(name, shape, how, parts)
        return True

    def refuse(self, issue: Issue, refs: Iterable[TensorRef]) -> bool:
        """Note what is wrong with a weight, and return False. Its tensors are of no other method.

        Args:
            issue: what is wrong.
            refs: the tensors that were meant to be its parts.
        """
        self.issues.append(issue)
        self._broken |= {ref.name: ref for ref in refs}
        return False

    def beside(self, name: str) -> list[TensorRef]:
        """Return the tensor of this name and those whose names begin with it: for what is wrong, since all are looked at."""
        return [ref for key, ref in self.tensors.items() if key == name or key.startswith(f"{name}.")]

    def has(self, name: str) -> bool:
        """Return True where a tensor of this name is there."""
        return name in self.tensors

    def done(self, exceptions: Exceptions, orphans: re.Pattern[str], codes: str) -> Found:
        """Return what was found, with the issues that only show when all of it is known.

        Args:
            exceptions: what the configuration leaves dense.
            orphans: matches the names of tensors that are only there beside codes.
            codes: what such codes are, for messages.
        """
        used = {ref.name for weight in self.weights.values() for ref in weight.parts.values()}
        self._check_orphans(used, orphans, codes)
        if not self.weights and not self.issues:
            sentence = f"says that weights are quantised ({self.table.method}), but no weight is"
            hint = f"remove {self.table.place} if the weights are meant to be in full precision"
            self.issues.append(error(CODE, self.table.place, sentence, hint))
        modules = [module_of(name) for name in self.weights]
        self._check_excepted(modules, exceptions)
        self._check_mates(modules, exceptions)
        return Found(self.weights, tuple(self._broken.values()), {}, tuple(self.issues))

    def _check_orphans(self, used: set[str], orphans: re.Pattern[str], codes: str) -> None:
        """Note scales without codes: once for each module."""
        # The rest of a module that has another fault is not reported again.
        known = {_owner(name, orphans) for name in self._broken}
        for name, ref in self.tensors.items():
            hit = None if name in used or name in self._broken else orphans.search(name)
            if hit is None or leftover(name):
                continue
            self._broken[name] = ref
            module = name[: hit.start()]
            if module not in known:
                sentence = f"belongs to a quantised weight whose codes are missing, expected {codes}"
                self.issues.append(error(CODE, name, sentence, AGAIN))
            known.add(module)

    def _fault(self, ref: TensorRef | None, one: Wanted, codes: Wanted, how: Storage) -> Issue | None:
        """Return what is wrong with a part; None where it is as it should be."""
        if ref is not None and ref.dtype in one.dtypes and ref.shape in one.shapes:
            return None
        shapes = (
            "one value"
            if () in one.shapes
            else f"shape {choice([shape_text(shape) for shape in one.shapes])}"
        )
        if ref is None:
            main = self.tensors.get(codes.name)
            sentence = (
                f"holds {main.dtype} codes, but has no {_last(one.name)}"  # the codes were found first
                if main is not None
                else f"is missing, expected {choice(one.dtypes)} of {shapes}"
            )
            expected = f", expected {choice(one.dtypes)} of {shapes}" if main is not None else ""
            return error(CODE, codes.name, sentence + expected, AGAIN)
        said = f"as {self.table.place} says ({describe(how)})"
        if ref.dtype not in one.dtypes:
            sentence = f"is stored as {ref.dtype}, expected {choice(one.dtypes)}"
            return error(CODE, ref.name, f"{sentence}, {said}", AGAIN)
        sentence = f"has shape {shape_text(ref.shape)}, expected {shapes.removeprefix('shape ')}"
        return error(CODE, ref.name, f"{sentence}, {said}", AGAIN)

    def _add_extras(self, name: str, parts: dict[str, TensorRef]) -> None:
        base = f"{name.removesuffix('weight')}" if name.endswith(".weight") else f"{name}_"
        for extra in self._extras:
            ref = self.tensors.get(base + extra)
            if ref is not None:
                # `weight_shape` may be a wanted part, and has its role then.
                parts.setdefault(extra, ref)

    def _check_excepted(self, modules: Sequence[str], exceptions: Exceptions) -> None:
        for module in exceptions.surely(modules):
            sentence = f"is stored quantised, but {self.table.place} says that it is not ({exceptions.field})"
            hint = f"remove it from {exceptions.field}, or download the checkpoint again"
            self.issues.append(error(CODE, module, sentence, hint))

    def _check_mates(self, modules: Iterable[str], exceptions: Exceptions) -> None:
        """Note each module that is dense although those of other layers are quantised, and nothing excepts it."""
        kinds = {_NUMBER.sub("#", module) for module in modules}
        dense = [
            module
            for name, ref in self.tensors.items()
            if ref.dtype in TORCH_NAMES
            # Biases and norms are dense in every method.
            and len(ref.shape) > 1
            and name not in self.weights
            and name not in self._broken
            for module in [module_of(name)]
            if _NUMBER.sub("#", module) in kinds
        ]
        # Engines read the list in different ways: one that excepts the module is enough here.
        for module in sorted(set(dense) - exceptions.perhaps(dense), key=dense.index):
            sentence = (
                f"is stored dense, but the same module of other layers is quantised and {self.table.place} "
                f"does not except it"
            )
            hint = f"add it to {exceptions.field}, or download the checkpoint again"
            self.issues.append(error(CODE, module, sentence, hint))


def _owner(name: str, orphans: re.Pattern[str]) -> str:
    hit = orphans.search(name)
    return name.rpartition(".")[0] if hit is None else name[: hit.start()]


def module_of(name: str) -> str:
    """Return the path of the module that owns a weight; of a stack of experts, the parameter's own name."""
    return name.removesuffix(".weight")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def number(values: Mapping[str, object], *keys: str) -> int | None:
    """Return the first of some settings that is a whole number."""
    found = (values.get(key) for key in keys)
    # JSON's true is an int in Python.
    return next((one for one in found if isinstance(one, int) and not isinstance(one, bool)), None)


def codes_of(role_name: str, dtype: str, shape: tuple[int, ...]) -> Wanted:
    """Return the part that holds the codes, which was found already."""
    return Wanted(WEIGHT, role_name, (dtype,), (shape,))
