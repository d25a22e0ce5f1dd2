"""``--quantize``: which weights of an output are quantised, which linear layers stay dense, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.codecs import ENCODERS
from lora_merge.core.report import Issue, error, note
from lora_merge.planning.gpt_oss import named_dense, scheme_for
from lora_merge.planning.ignoring import ignored_modules
from lora_merge.planning.linear_layers import Kind, Matrix, head_of, matrices_of
from lora_merge.planning.mates import fused_with, with_mates
from lora_merge.quantised.schemes import Scheme
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.planning.joined import Joined

_CODE = "quantize"

_DENSE_BY_KIND: Mapping[Kind, str] = {
    "tower": "belongs to a vision or audio tower",
    "router": "is a router",
    "outside": "is outside the model's layers",
    "unknown": "is not a module that transformers knows, so it may not be a linear layer",
    "stack": "is a stack of experts in one tensor, which engines load dense",
}
"""What is said of weights that stay dense and that one might expect to be quantised. A head and embeddings never are."""

_LISTED: tuple[Kind, ...] = ("linear", "head", "router", "tower", "outside", "unknown", "stack")
"""The kinds that the configuration has to name where they are dense: an engine might take them for linear layers."""


PartOf = tuple[str, str, tuple[int, ...]]
"""Name, dtype (a safetensors code) and shape of one stored tensor."""


@dataclass(frozen=True, slots=True)
class Target:
    """One weight that is quantised."""

    module: str
    """As the checkpoint spells it."""

    shape: tuple[int, ...]
    """``[out, in]``; of a stack of experts ``[experts, in, out]``."""

    parts: Mapping[str, PartOf]
    """Role → name, dtype and shape of each tensor that stores it, the codes first."""

    mates: tuple[str, ...]
    """The parameters that are one matrix with it in an engine. A scale for the whole matrix depends on their values too."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a scheme does to the weights of an output."""

    scheme: Scheme
    weights: Mapping[str, Target]
    """By parameter, in the order of the output's files."""

    dense: tuple[str, ...]
    """Names of the modules that the configuration leaves dense: as the checkpoint spells them, and where transformers has
    another name for it, that one too. vLLM reads the first, transformers the second.
    """

    issues: tuple[Issue, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` of the output."""
        return self.scheme.config(self.dense)


def parts_of(scheme: Scheme, module: str, shape: tuple[int, ...]) -> dict[str, PartOf]:
    """Return role → name, dtype and shape of each tensor that stores a weight, the codes first.

    Args:
        scheme: how.
        module: as `Scheme.names` takes it.
        shape: ``[out, in]``; of a stack ``[experts, in, out]``.
    """
    parts = ENCODERS[scheme.storage.codec].parts(shape, scheme.storage)
    return {role: (name, *parts[role]) for role, name in scheme.names(module).items()}


def targets_of(joined: Joined, scheme: Scheme, ignore: Sequence[str] = ()) -> Targets:
    """Return which weights of an output are quantised.

    Args:
        joined: what the output is made of.
        scheme: how.
        ignore: patterns of modules that stay dense, see `lora_merge.planning.ignoring`.
    """
    matrices = matrices_of(joined)
    scheme, said = scheme_for(joined, matrices, scheme)
    head = head_of(joined)
    names = {one.module: one.spellings for one in matrices}
    ignored, issues = ignored_modules(ignore, names | ({head: (head,)} if head else {}))
    kind: Kind = "stack" if scheme.is_of_stacks else "linear"
    taken = {one.name: one for one in matrices if one.kind == kind}
    reasons = _misfits(taken, scheme, ignored)
    chosen = [one for one in taken.values() if one.name not in reasons]
    if not chosen and not issues:
        issues.append(_nothing(joined, matrices, reasons, scheme))
    mates = fused_with([one.name for one in chosen])
    weights = {
        one.name: Target(
            one.module,
            one.shape,
            parts_of(scheme, one.name.removesuffix(".weight"), one.shape),
            mates[one.name],
        )
        for one in chosen
    }
    others = [one for one in matrices if one.name not in weights]
    if scheme.is_of_stacks:
        # All else stays as it is published, and asks for no explanation.
        others = [one for one in others if one.kind == kind]
        dense = named_dense(list(taken.values()), others)
    else:
        dense = _named(head, others)
    issues += [*_said(others, reasons, ignored), *said]
    return Targets(scheme, weights, dense, tuple(issues))


def _misfits(taken: Mapping[str, Matrix], scheme: Scheme, ignored: frozenset[str]) -> dict[str, str]:
    """Return why some of the weights that the scheme is for stay dense, by parameter."""
    fused = fused_with(taken)
    reasons: dict[str, str] = {}
    for name, one in taken.items():
        # Of a stack [experts, in, out]: its last two axes, the other way round.
        rows, columns = one.shape[:-3:-1] if scheme.is_of_stacks else one.shape
        if one.module in ignored:
            reasons[name] = "is excluded by --ignore"
        elif misfit := scheme.misfit((rows, columns), is_fused=bool(fused[name])):
            reasons[name] = f"{misfit} ({scheme.name})"
    # Engines load such weights as one: none of them is quantised where one cannot be.
    for name in with_mates(reasons, taken) - reasons.keys():
        reasons[name] = "is loaded together with a weight that stays dense"
    return reasons


def _said(others: Sequence[Matrix], reasons: Mapping[str, str], ignored: frozenset[str]) -> list[Issue]:
    """Return a note for each reason why linear layers stay dense; none for what the user ignores."""
    by_reason: dict[str, list[str]] = {}
    for one in others:
        reason = reasons.get(one.name) or _DENSE_BY_KIND.get(one.kind, "")
        if reason and one.module not in ignored:
            by_reason.setdefault(reason, []).append(one.module)
    return [
        note(
            _CODE,
            "",
            f"{counted(len(modules), 'weight')} not quantised, because each {reason}: {_listing(modules)}",
        )
        for reason, modules in by_reason.items()
    ]


def _listing(modules: Sequence[str]) -> str:
    # The stacks of a layer's experts belong to one module.
    return listing(list(dict.fromkeys(modules)))


def _nothing(joined: Joined, matrices: Sequence[Matrix], reasons: Mapping[str, str], scheme: Scheme) -> Issue:
    """Return the refusal of an output of which nothing would be quantised."""
    if any(one.kind == "conv1d" for one in matrices):
        sentence = "its layers are Conv1D, whose weights are stored [in, out]; --quantize supports only linear layers"
        return error("unsupported", joined.base.root, sentence, "leave --quantize out")
    what = "stack of experts" if scheme.is_of_stacks else "linear layer"
    sentence = f"has no {what} that --quantize {scheme.name} can store"
    if reasons:
        name, reason = next(iter(reasons.items()))
        sentence += f". For example, {name.removesuffix('.weight')} {reason}"
    return error(_CODE, joined.base.root, sentence, "choose another scheme, or leave --quantize out")


def _named(head: str, others: Sequence[Matrix]) -> tuple[str, ...]:
    """Return the modules that the configuration has to name as dense: the head first, then in the order of the files."""
    # A head that is tied to the embeddings has no tensor, but it is a module.
    found = dict.fromkeys(name for one in others if one.kind == "head" for name in one.spellings)
    if head:
        found |= {head: None}
    for one in others:
        if one.kind in _LISTED:
            found |= dict.fromkeys((*one.spellings, *_stack(one.module)))
    return tuple(found)


def _stack(module: str) -> tuple[str, ...]:
    """Return the path of the experts that an expert's module is one of: engines ask about all of them at once."""
    before, is_expert, rest = module.partition(".experts.")
    return (f"{before}.experts",) if is_expert and rest[:1].isdigit() else ()
