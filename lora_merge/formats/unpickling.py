"""Follows the pickle in a torch file opcode by opcode; Python's own unpickler never sees it.

Python's unpickler does what a pickle says before anyone can check it. It hashes keys: a tuple that holds itself
twice, and so on forty times, takes years to hash, in C, where no interrupt is heard. A million levels of nesting
overflow its stack. So this reader knows little more than torch's own (`torch._weights_only_unpickler`, torch 2.13),
and makes stand-ins. It hashes only text, never compares or prints nested values, calls only its own makers, never
recurses, and counts every step against a limit.
"""

from __future__ import annotations

import pickle
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import MAX_DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_STEPS = 6_000_000
"""The most opcodes and copied entries of a pickle. A tensor takes some forty; six million take ten seconds and half a
GB.
"""

_MOST_NAME_BYTES = 1000
"""The most bytes of a module's name, or of a name in it."""


class UntrustedError(Exception):
    """A pickle names something that plain tensors do not need. The argument is its dotted path."""


class OddKeyError(Exception):
    """A table has a key that is not text. The argument says what it is."""


@dataclass(frozen=True, slots=True)
class Name:
    """Stand-in for a class or function that a pickle names. It is not imported."""

    path: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Stand-in for a storage."""

    kind: str
    """Dotted path of its class."""

    key: str
    size: int
    """Elements; bytes where the class is untyped."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Stand-in for a tensor."""

    storage: Storage
    kind: str
    """Dotted path of the storage's class, or of the dtype where that is untyped."""

    offset: int
    """In elements, as shape and stride are."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_plain: bool
    """False when its values are marked as negated or conjugated."""


class Table:
    """Stand-in for a ``dict`` or an ``OrderedDict``; attributes such as a state dict's ``_metadata`` are dropped."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: dict[str, object] = {}

    def put(self, key: object, value: object) -> None:
        """Set a row.

        Raises:
            OddKeyError: the key is not text. A tuple would have to be hashed to the bottom, and numbers can be chosen
                to collide.
        """
        if not isinstance(key, str):
            raise OddKeyError(kind_of(key))
        self.rows[key] = value


def kind_of(value: object) -> str:
    """Return the kind of a stand-in, as messages print it."""
    if isinstance(value, Name):
        return f"made by {value.path}"
    return {Tensor: "a tensor", Storage: "a bare storage", Table: "a table"}.get(
        type(value), f"a value of type {type(value).__name__}"
    )


_HARMLESS = re.compile(
    r"torch\.(\w+Storage|storage\.\w+Storage|Tensor|Size|device|(complex|b?float|u?int|qu?int|bool|bits|per_|sparse_)\w*)"
    r"|torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout"
)
"""Names of torch that tensors which are not plain need; such a tensor is refused later, with its name."""

_ATTRIBUTES = frozenset({"torch.Size", "torch.device"})
"""Types that attributes of a parameter may be made by."""


def _layout(storage: object, kind: str, layout: tuple[Any, Any, Any], metadata: tuple[Any, ...]) -> Tensor:
    """Return the stand-in for a tensor.

    Args:
        storage: its storage, if the pickle is sound.
        kind: what its dtype follows from.
        layout: offset, shape, stride.
        metadata: flags of its values; any of them set means that it is not plain.

    Raises:
        ValueError: the sizes are not sizes.
    """
    offset, *sizes = layout
    # Types are checked before anything is compared or counted: the pickle may put any value here.
    if not isinstance(storage, Storage) or not all(
        isinstance(one, tuple | list) and len(one) <= MAX_DIMENSIONS for one in sizes
    ):
        raise ValueError("a tensor has invalid sizes")
    shape, stride = map(tuple, sizes)
    numbers = (storage.size, offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(one, int) and 0 <= one < 1 << 63 for one in numbers):
        raise ValueError("a tensor has invalid sizes")
    return Tensor(storage, kind, offset, shape, stride, is_plain=not any(metadata))


def _tensor_v2(args: tuple[Any, ...]) -> Tensor:
    """Make a tensor of ``storage, offset, size, stride, requires_grad, backward_hooks, metadata=None``."""
    storage, offset, size, stride, *rest = args[:7]
    return _layout(storage, getattr(storage, "kind", ""), (offset, size, stride), tuple(rest[2:]))


def _tensor_v3(args: tuple[Any, ...]) -> Tensor:
    """Make a tensor of ``storage, offset, size, stride, requires_grad, backward_hooks, dtype, metadata=None``."""
    storage, offset, size, stride, _, _, dtype, *rest = args[:8]
    if not isinstance(dtype, Name):
        raise ValueError("a tensor has no valid dtype")  # noqa: TRY004 - of the pickle, like all its faults
    return _layout(storage, dtype.path, (offset, size, stride), tuple(rest))


def _parameter(args: tuple[Any, ...]) -> object:
    """Make the tensor of ``data, requires_grad, backward_hooks``, with or without a state."""
    return args[0]


def _from_type(args: tuple[Any, ...]) -> object:
    """Make a tensor with attributes, of ``made_by, type, args, state``. A subclass was refused when the pickle named
    it.
    """
    made_by, kind, inner, _ = args[:4]
    maker = _TENSOR_MAKERS.get(made_by.path) if isinstance(made_by, Name) else None
    if maker is None or not isinstance(inner, tuple):
        raise ValueError("a tensor is made by an unknown function")
    return maker(inner) if kind == Name("torch.Tensor") else kind


_TENSOR_MAKERS: Mapping[str, Callable[[tuple[Any, ...]], object]] = {
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}

MAKERS: Mapping[str, Callable[[tuple[Any, ...]], object]] = {
    **_TENSOR_MAKERS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
"""Path → what is called instead of it, with the arguments as one tuple."""

_ORDERED_DICT = "collections.OrderedDict"

_CONSTANTS: Mapping[bytes, object] = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}

_NUMBERS = {
    pickle.BININT: struct.Struct("<i"),
    pickle.BININT1: struct.Struct("<B"),
    pickle.BININT2: struct.Struct("<H"),
    pickle.BINFLOAT: struct.Struct(">d"),
}

_TEXTS = {
    pickle.BINUNICODE: struct.Struct("<I"),
    pickle.BINSTRING: struct.Struct("<I"),
    pickle.SHORT_BINSTRING: struct.Struct("<B"),
}
"""Opcode → format of the length that precedes the text."""

_PUTS = {pickle.BINPUT: struct.Struct("<B"), pickle.LONG_BINPUT: struct.Struct("<I")}
_GETS = {pickle.BINGET: struct.Struct("<B"), pickle.LONG_BINGET: struct.Struct("<I")}


class Machine:
    """Follows one pickle, and leaves its value on its own stack.

    Args:
        content: the whole pickle.
    """

    def __init__(self, content: bytes) -> None:
        self._content, self._at, self._left = content, 0, MAX_STEPS
        self._stack: list[Any] = []
        self._marks: list[int] = []
        """Lengths of the stack at which a tuple, list or table begins."""

        self._memo: dict[int, object] = {}
        self.others: list[str] = []
        """Paths of calls without a maker. torch would make something of them, so the file is refused."""

        self._steps: Mapping[bytes, Callable[[], object]] = {
            pickle.PROTO: lambda: self._bytes(1),
            pickle.GLOBAL: self._global,
            pickle.BINPERSID: self._storage,
            pickle.REDUCE: self._reduce,
            pickle.BUILD: self._build,
            pickle.POP: self._stack.pop,
            pickle.MARK: lambda: self._marks.append(len(self._stack)),
            pickle.TUPLE: lambda: self._stack.append(tuple(self._since_mark())),
            pickle.TUPLE1: lambda: self._short_tuple(1),
            pickle.TUPLE2: lambda: self._short_tuple(2),
            pickle.TUPLE3: lambda: self._short_tuple(3),
            pickle.EMPTY_LIST: lambda: self._stack.append([]),
            pickle.EMPTY_DICT: lambda: self._stack.append(Table()),
            pickle.APPEND: lambda: self._extend([self._stack.pop()]),
            pickle.APPENDS: lambda: self._extend(self._since_mark()),
            pickle.SETITEM: self._set_one,
            pickle.SETITEMS: lambda: self._set(self._since_mark()),
        }
        """Opcode → action, for opcodes that neither push a plain value nor use the memo."""

    def run(self) -> object:
        """Return the value of the pickle, made of stand-ins.

        Raises:
            ValueError: it is malformed, has an opcode that torch's reader refuses too, or more of them than are meant.
            IndexError: it takes what is not there.
            UntrustedError: it names what plain tensors do not need.
            OddKeyError: a table in it has a key that is not text.
        """
        while (opcode := self._bytes(1)) != pickle.STOP:
            self._spend(1)
            if not (self._value(opcode) or self._memory(opcode)):
                step = self._steps.get(opcode)
                if step is None:
                    raise ValueError(f"the unknown opcode {opcode!r} at byte {self._at - 1}")
                step()
        return self._stack.pop()

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError(f"more than {MAX_STEPS} steps")

    def _bytes(self, count: int) -> bytes:
        found = self._content[self._at : self._at + count]
        if len(found) < count:
            raise ValueError(f"ends at byte {len(self._content)}")
        self._at += count
        return found

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._bytes(form.size))[0]

    def _value(self, opcode: bytes) -> bool:
        """Push a plain value; return False for other opcodes."""
        if opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            self._stack.append(self._number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            self._stack.append(self._bytes(self._number(_TEXTS[opcode])).decode("utf-8"))
        elif opcode == pickle.LONG1:
            self._stack.append(int.from_bytes(self._bytes(self._bytes(1)[0]), "little", signed=True))
        else:
            return False
        return True

    def _memory(self, opcode: bytes) -> bool:
        """Store the top of the stack in the memo, or push an entry of it; return False for other opcodes."""
        if opcode in _PUTS:
            number = self._number(_PUTS[opcode])
            # Each entry takes at least a byte of the pickle, so a larger number is not a real one.
            if number > len(self._content):
                raise ValueError(f"object number {number} in only {len(self._content)} bytes")
            self._memo[number] = self._stack[-1]
        elif opcode in _GETS:
            number = self._number(_GETS[opcode])
            if number not in self._memo:
                raise ValueError(f"object number {number} does not exist")
            self._stack.append(self._memo[number])
        else:
            return False
        return True

    def _line(self) -> str:
        # Names end with a newline. Searching the whole rest for each would take quadratic time.
        end = self._content.find(b"\n", self._at, self._at + _MOST_NAME_BYTES)
        if end < 0:
            raise ValueError(f"a name at byte {self._at} has no end")
        line = self._bytes(end - self._at).decode("utf-8")
        self._at = end + 1
        return line

    def _global(self) -> None:
        path = f"{self._line()}.{self._line()}"
        if path != _ORDERED_DICT and path not in MAKERS and not _HARMLESS.fullmatch(path):
            raise UntrustedError(path)
        self._stack.append(Name(path))

    def _storage(self) -> None:
        match self._stack.pop():
            case ("storage", Name(kind), str(key), _, int(size)):
                self._stack.append(Storage(kind, key, size))
            case _:
                raise ValueError("an invalid reference to a storage")

    def _reduce(self) -> None:
        args, made_by = self._stack.pop(), self._stack.pop()
        if not isinstance(made_by, Name) or type(args) is not tuple:
            raise ValueError("a call of something that cannot be called")
        if made_by.path == _ORDERED_DICT:
            self._stack.append(self._ordered(args))
            return
        maker = MAKERS.get(made_by.path)
        if maker is None and made_by.path not in _ATTRIBUTES:
            self.others.append(made_by.path)
        self._stack.append(made_by if maker is None else maker(args))

    def _ordered(self, args: tuple[Any, ...]) -> Table:
        """Return a table of pairs, as Python 2 wrote an ``OrderedDict``. Newer ones are filled later, and begin
        empty.
        """
        table = Table()
        pairs = args[0] if args else []
        if not isinstance(pairs, list | tuple):
            raise ValueError("a table from something other than pairs")  # noqa: TRY004 - of the pickle, like all its faults
        # One opcode may copy many entries, and each counts.
        self._spend(len(pairs))
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("a table from something other than pairs")
            table.put(*pair)
        return table

    def _build(self) -> None:
        """Drop a state of any kind.

        Raises:
            ValueError: what it is given to has none.
        """
        self._stack.pop()
        if not isinstance(self._stack[-1], Name | Table):
            raise ValueError("a state for an object without one")  # noqa: TRY004 - of the pickle, like all its faults

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _short_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("a tuple of missing values")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("an entry for something other than a list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, Table) or len(items) % 2:
            raise ValueError("a row for something other than a table")
        for at in range(0, len(items), 2):
            table.put(items[at], items[at + 1])

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])
