"""An expert that is a module in the adapter and a slice of a stack in the base, or vice versa.

Quantisers take only linear layers, so copies of a model for 4-bit training have its stacked experts one by one.
transformers knows nothing of these layouts, so they are data here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_merge.layouts.identity import identity
from lora_merge.layouts.renamed import renamed
from lora_merge.layouts.stored import LayoutError, Located, Place, Shape, Stored
from lora_merge.layouts.suffix import suffix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.modeling.pieces import Box

_EXPERT = re.compile(
    r"(?P<owner>(?:.+\.)?experts)\.(?:(?P<listed>\w+_proj)s\.(?P<n>\d+)|(?P<m>\d+)\.(?P<single>\w+_proj))"
    r"\.(?P<end>weight|bias)"
)
"""``experts.gate_up_projs.3.weight``: Unsloth's copies of gpt-oss (``unsloth_zoo.temporary_patches.gpt_oss``).
``experts.gate_projs.3.weight``: copies of Llama 4 and Qwen3.5-MoE made for QLoRA. ``experts.3.gate_proj.weight``: one
module per expert, as most families had in transformers 4."""

_STACK = re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<name>gate_up_proj|down_proj)")

_ROUTER = re.compile(r"(?P<owner>.+\.router)\.linear(?P<end>\.weight|\.bias)")
"""The router of Unsloth's copies of gpt-oss is a module with a linear layer in it."""

_IN_STACK: Mapping[str, tuple[str, int | None]] = {
    "gate_up_proj": ("gate_up_proj", None),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}
"""An expert's matrix → the stack that holds it, and which half of the stack's outputs it is (None: all)."""


def apart(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the slice of a stack that is one expert's, or the experts' own tensors that make up a stack.

    Raises:
        LayoutError: the orientation of the experts is unknown, or the parameter is not a block of the stack.
    """
    router = _ROUTER.fullmatch(parameter)
    if router is not None:
        found = _whole(f"{router['owner']}{router['end']}", stored)
        return None if found is None else _located(Place(found), shape=stored.tensors[found].shape)
    expert = _EXPERT.fullmatch(parameter)
    if expert is not None:
        return _slice(expert, shape, stored)
    stack = _STACK.fullmatch(parameter)
    return None if stack is None else _experts(stack, stored)


def _located(*places: Place, shape: Shape) -> Located:
    return Located("apart", places, shape, by_boxes=True)


def _slice(expert: re.Match[str], shape: Shape | None, stored: Stored) -> Located | None:
    """Return the place of one expert's weight or bias in a stack."""
    name, half = _IN_STACK.get(expert["listed"] or expert["single"], ("", None))
    # The stacks of gpt-oss are parameters of one module: ``gate_up_proj`` and ``gate_up_proj_bias``.
    ends = {"weight": "", "bias": "_bias"}
    tensor = _whole(f"{expert['owner']}.{name}{ends[expert['end']]}", stored) if name else None
    n = int(expert["n"] or expert["m"])
    if tensor is None or n >= stored.tensors[tensor].shape[0]:
        return None
    stack = stored.tensors[tensor].shape
    if expert["end"] == "bias":
        # A bias has one axis beside the experts, so nothing can be turned.
        outputs = _outputs(expert, stack[-1], half, stored)
        return _located(Place(tensor, ((n, n + 1), outputs)), shape=(outputs[1] - outputs[0],))
    turned = _is_turned(expert["owner"], name, shape, stack, half, stored)
    n_out, n_in = stack[1:][::-1] if turned else stack[1:]
    outputs = _outputs(expert, n_out, half, stored)
    sides = ((0, n_in), outputs) if turned else (outputs, (0, n_in))
    place = Place(tensor, ((n, n + 1), *sides), transposed=turned)
    return _located(place, shape=(outputs[1] - outputs[0], n_in))


def _experts(stack: re.Match[str], stored: Stored) -> Located | None:
    """Return the linear layers that the base stores for a stack's experts, as parts of transformers' parameter.

    Raises:
        LayoutError: the orientation of the experts is unknown.
    """
    conversion = stored.conversion
    if conversion is None:
        return None
    names: list[str] = []
    while f"{stack['owner']}.{stack['name']}s.{len(names)}.weight" in stored.tensors:
        names.append(f"{stack['owner']}.{stack['name']}s.{len(names)}.weight")
    shape = conversion.shape(conversion.canonical(stack[0])[0])
    # An expert that is missing in the base leaves nothing to lay the whole parameter over.
    if not names or shape is None or shape[0] != len(names):
        return None
    shapes = [
        conversion.shape(conversion.canonical(f"{stack['owner']}.{name}")[0]) or ()
        for name in ("gate_up_proj", "down_proj")
    ]
    turned = _by_both(*shapes)
    if turned is None:
        raise LayoutError(
            f"the layout of the experts of {stack['owner']} cannot be detected from their shapes"
        )
    sides: Box = tuple((0, size) for size in shape[1:])
    places = (Place(name, (), ((n, n + 1), *sides), turned) for n, name in enumerate(names))
    return _located(*places, shape=shape)


def _whole(name: str, stored: Stored) -> str | None:
    """Return the stored tensor of a name, by any of the rules that find whole tensors."""
    found = identity(name, None, stored) or renamed(name, None, stored) or suffix(name, None, stored)
    return None if found is None else found.whole


def _is_turned(
    owner: str, name: str, shape: Shape | None, stack: Shape, half: int | None, stored: Stored
) -> bool:
    """Return True where a stack's experts are ``[in, out]``.

    Raises:
        LayoutError: nothing tells.
    """
    if len(stack) != 3:
        raise LayoutError(f"{owner}.{name} has {len(stack)} axes, expected 3: experts, and two of a matrix")
    names = [_whole(f"{owner}.{one}", stored) for one in ("gate_up_proj", "down_proj")]
    # The two stacks tell by their shapes together, even where one of them is square.
    turned = _by_both(*(stored.tensors[one].shape if one else () for one in names))
    if turned is not None:
        return turned
    if shape is not None and len(shape) == 2:
        # Otherwise the adapter's shape decides, if it fits only one orientation.
        whole = (shape[0] * (1 if half is None else 2), shape[1])
        if (whole == stack[1:]) != (whole[::-1] == stack[1:]):
            return whole != stack[1:]
    raise LayoutError(f"the layout of the experts of {owner} cannot be detected from their shapes")


def _by_both(gate_up: Shape, down: Shape) -> bool | None:
    """Return True where two stacks are ``[in, out]``, False where they are ``[out, in]``, None where the shapes do
    not tell.

    Example:
        >>> _by_both((32, 2880, 5760), (32, 2880, 2880)), _by_both((8, 80, 64), (8, 64, 40))
        (True, False)
    """
    if len(gate_up) != 3 or len(down) != 3:
        return None
    # With hidden size h and inner size i, linear layers are [2 i, h] and [h, i]; turned they are [h, 2 i] and [i, h].
    (_, top, left), (_, n, m) = gate_up, down
    if (top, left) == (2 * m, n):
        return False
    return True if (top, left) == (m, 2 * n) else None


def _outputs(expert: re.Match[str], n_out: int, half: int | None, stored: Stored) -> tuple[int, int]:
    """Return the range of a stack's outputs: all of them, or the half that is gate's or up's.

    Raises:
        LayoutError: gate and up alternate, or it is not known whether they do.
    """
    if half is None:
        return (0, n_out)
    conversion = stored.conversion
    owner = expert["owner"]
    # Gate and up of gpt-oss alternate row by row, so half of an expert is not a block of rows.
    if conversion is None or conversion.alternates(owner):
        why = "may alternate" if conversion is None else "alternate"
        sentence = f"gate and up {why} in {owner}.gate_up_proj, so neither of them is one block of it"
        raise LayoutError(sentence, hint="merge it with the tool of the trainer that wrote the adapter")
    # Gate is the first half, up the second.
    return (half * n_out // 2, (half + 1) * n_out // 2)
