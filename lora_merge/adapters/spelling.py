"""Names of tensors as trainers leave them → PEFT's own spelling, which is the only one known elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, note
from lora_merge.core.tensor import TensorRef
from lora_merge.peft_rules.kinds import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


_WRAPPERS: Mapping[str, re.Pattern[str]] = {
    "_orig_mod.": re.compile(r"(?<![^.])_orig_mod\."),
    "_fsdp_wrapped_module.": re.compile(r"(?<![^.])_fsdp_wrapped_module\."),
    "_checkpoint_wrapped_module.": re.compile(r"(?<![^.])_checkpoint_wrapped_module\."),
    "module.": re.compile(rf"^module\.(?=base_model\.)|(?<=^{re.escape(PREFIX)})module\."),
}
"""What ``torch.compile``, FSDP, activation checkpointing and ``DistributedDataParallel`` put into names (torch 2.13).

A model may use the name ``module`` itself, so it is taken out only at the places where the parallel wrapper puts it.
"""

TUNERS = (
    "adamss",
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "gralora",
    "hada",
    "hira",
    "hra",
    "ia3",
    "lokr",
    "miss",
    "oft",
    "pvera",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "trainable_tokens",
    "unilora",
    "vera",
    "waveft",
)
"""How the names of PEFT's tensors begin, ``hada_w1_a`` for example, where an adapter's name may follow them.

FRoD, GLoRA, LN tuning, OSF, PEANuT, PSOFT, TinyLoRA and VB-LoRA have other words there (PEFT 0.21.2).
"""

_TUNER = re.compile(
    rf"\.(?:(?:{'|'.join(TUNERS)})_\w+|lora_(?:[ABE]|embedding_[AB]|magnitude_vector|diag))"
    r"(?P<named>\.(?P<adapter>(?!weight$|bias$|\d+$)[^.]+)(?=$|\.weight$|\.bias$))?(?=\.|$)"
)


_PLAIN_ENDS = (".lora_A.weight", ".lora_B.weight")
"""Ends of nearly all names; they need none of the expressions above."""


@dataclass(frozen=True, slots=True)
class _Spelled:
    """One tensor, and the name of the adapter that its own name gives."""

    ref: TensorRef
    name: str
    """Without wrappers."""

    is_tuner: bool
    adapter: str | None


def canonical(refs: Iterable[TensorRef], file: str) -> tuple[tuple[TensorRef, ...], list[Issue]]:
    """Return an adapter's tensors under PEFT's own names, and an issue for each that cannot have one.

    The adapter's name in names of tensors (``lora_A.NAME.weight``) is taken out if there is only one adapter, and so
    are the names of wrappers around the model in training. Two tensors that get one name are an error.

    Args:
        refs: the tensors of the file.
        file: its name.
    """
    spelled = [_spelled(ref) for ref in refs]
    adapters = list(dict.fromkeys(one.adapter for one in spelled if one.adapter is not None))
    if len(adapters) > 1:
        sentence = (
            f"contains the tensors of {len(adapters)} adapters ({', '.join(sorted(adapters))}), expected one "
            "adapter"
        )
        hint = "save each adapter into its own file: save_pretrained(…, selected_adapters=[NAME])"
        kept = tuple(_renamed(one, adapters[0]) for one in spelled if one.adapter in {None, adapters[0]})
        return kept, [error("several-adapters", file, sentence, hint)]
    # PEFT's own name for an adapter that was given none.
    adapter = adapters[0] if adapters else "default"
    renamed = [_renamed(one, adapter) for one in spelled]
    issues = _strays(spelled, adapter)
    unique: dict[str, TensorRef] = {}
    for one, ref in zip(spelled, renamed, strict=True):
        if ref.name in unique:
            sentence = f"is in the file twice; the other spelling of its name is {ref.name}"
            issues.append(
                error(
                    "duplicate-tensor", one.ref.name, sentence, "keep only the tensor that was trained last"
                )
            )
        unique.setdefault(ref.name, ref)
    return tuple(unique.values()), issues + _change_note(spelled, adapter, file)


def _spelled(ref: TensorRef) -> _Spelled:
    name = ref.name
    # The quick way for nearly all tensors.
    if name.endswith(_PLAIN_ENDS) and "module." not in name and "_orig_mod." not in name:
        return _Spelled(ref, name, is_tuner=True, adapter=None)
    for pattern in _WRAPPERS.values():
        name = pattern.sub("", name)
    match = _TUNER.search(name)
    return _Spelled(ref, name, match is not None, match["adapter"] if match else None)


def _renamed(one: _Spelled, adapter: str) -> TensorRef:
    """Return a tensor under PEFT's name for it; unchanged where it has that name."""
    if one.is_tuner and one.adapter is None and one.name == one.ref.name:
        return one.ref
    name = one.name
    if one.adapter is not None:
        name = _TUNER.sub(lambda match: match[0].removesuffix(match["named"] or ""), name, count=1)
    # PEFT saves such modules without this part of the name.
    return replace(one.ref, name=name.replace(f".modules_to_save.{adapter}.", "."))


def _strays(spelled: list[_Spelled], adapter: str) -> list[Issue]:
    """Return an issue when some tensors carry the name of an adapter and others carry none."""
    bare = [one.ref.name for one in spelled if one.is_tuner and one.adapter is None]
    # ``default`` may be left out: PEFT adds it by itself.
    if adapter == "default" or not bare:
        return []
    n_named = sum(one.adapter is not None for one in spelled)
    sentence = f"has no adapter name, and {n_named} other tensors have the adapter name {adapter!r}"
    return [error("unexpected-tensor", bare[0], sentence, "save the adapter again, without other adapters")]


def _change_note(spelled: list[_Spelled], adapter: str, file: str) -> list[Issue]:
    """Return a note that says what was taken out of the names; none for ``default``, which is PEFT's own."""
    changed = [one.ref.name for one in spelled if one.name != one.ref.name]
    words = [word for word, pattern in _WRAPPERS.items() if any(map(pattern.search, changed))]
    words += [f"{adapter}."] if adapter != "default" else []
    if not words:
        return []
    return [
        note(
            "spelling",
            file,
            f"its tensor names were read without the parts {', '.join(words)}, as PEFT writes them",
        )
    ]
