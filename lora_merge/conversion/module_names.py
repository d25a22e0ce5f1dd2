"""The names of an adapter's modules in transformers 4 or 5, and modules of zeros that engines expect beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.conversion.lora import LoraModule, Recipe, Unchanged
from lora_merge.core.report import Issue, error
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.serving.traits import PACKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.tensor import TensorRef
    from lora_merge.layouts import Stored
    from lora_merge.planning.joined import Joined
    from lora_merge.requests.choices import Naming

_WHOLE = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)"
    r"(?P<end>(\.base_layer)?\.(weight|bias|token_adapter\.trainable_tokens_delta|trainable_tokens_delta))"
)
"""The name of a tensor that is carried whole: its module, and the rest."""


def renamed(
    modules: Sequence[LoraModule], whole: Mapping[str, TensorRef], naming: Naming, joined: Joined
) -> tuple[list[LoraModule], dict[str, TensorRef], list[Issue]]:
    """Return modules and whole tensors under the names of a release of transformers, and the issues.

    A module gives an error if that release has it as part of a larger parameter, or in parts. Whole tensors without a
    name there keep theirs.
    """
    stored = joined.stored
    if stored.conversion is None:
        sentence = "transformers has no class for this model: it has but one naming"
        return list(modules), dict(whole), [error("unsupported", joined.base.root, sentence)]
    # Modules of a copy with experts one by one have no name in any release of transformers.
    apart = {delta.target for delta in joined.deltas if delta.rule == "apart"}
    found: list[LoraModule] = []
    issues: list[Issue] = []
    for module in modules:
        name = module.path if module.form == "experts" else f"{module.path}.weight"
        other = None if name in apart else _named(name, naming, stored)
        if other is None:
            issues.append(_of_a_copy(module) if name in apart else _no_name(module, naming, stored))
        else:
            path = other if module.form == "experts" else other.removesuffix(".weight")
            found.append(replace(module, path=path))
    tensors = {}
    for name, ref in whole.items():
        match = _WHOLE.fullmatch(name)
        other = _named(f"{match['module']}.weight", naming, stored) if match else None
        if match and other:
            tensors[f"{PREFIX}{other.removesuffix('.weight')}{match['end']}"] = ref
        else:
            tensors[name] = ref
    return found, tensors, issues


def _named(name: str, naming: Naming, stored: Stored) -> str | None:
    """Return a parameter's name in a release; None where the release has no parameter for exactly this one."""
    assert stored.conversion is not None
    canonical, pattern = stored.conversion.canonical(name)
    if naming == "v5":
        is_its_own = pattern is None or stored.conversion.shape(name) is not None
        return canonical if is_its_own else None
    if pattern is not None:
        # transformers 5 stores this parameter inside a larger one, so only the published name means the part.
        return name
    published = stored.as_published(name)
    # A parameter that transformers 5 assembles from several has a name in version 4 only if the base stores
    # it whole.
    is_made = any(
        canonical.endswith(target)
        for converter in stored.conversion.converters
        for target in converter.target_patterns
    )
    return None if is_made and published not in stored.tensors else published


def _of_a_copy(module: LoraModule) -> Issue:
    sentence = "is a module of a copy for 4-bit training, but part of a larger parameter in transformers"
    return error("unsupported", module.path, sentence, "add --fuse-experts")


def _no_name(module: LoraModule, naming: Naming, stored: Stored) -> Issue:
    assert stored.conversion is not None
    release = "5 stores it inside a larger parameter" if naming == "v5" else "4 stores it in parts"
    canonical, _ = stored.conversion.canonical(f"{module.path}.weight")
    if module.form == "experts" or len(stored.conversion.shape(canonical) or ()) == 3:
        hint = f"add {'--fuse-experts' if naming == 'v5' else '--split-experts'}"
    else:
        release, hint = f"{naming[1:]} stores it joined with others, or in parts", "leave out --rename"
    return error("unsupported", module.path, f"does not have a separate name: transformers {release}", hint)


def filled(modules: Sequence[LoraModule], joined: Joined, recipe: Recipe) -> list[LoraModule]:
    """Return the modules, and modules of zeros that an engine expects beside them.

    With ``every_layer``, these are the same modules in other layers and other experts; with ``every_name``, all
    modules with the last name of a target; with ``packed``, the other members of a group that is computed as one (q, k
    and v).
    """
    linear = [module for module in modules if module.form == "linear"]
    like = {_without_number(module.path): module for module in linear}
    named = {module.path.rpartition(".")[2]: module for module in linear} if recipe.every_name else {}
    layers = {_layer(module.path) for module in modules}
    if recipe.packed:
        for pattern, module in list(like.items()):
            stem, _, last = pattern.rpartition(".")
            for group in PACKED:
                if last in group:
                    like |= {f"{stem}.{name}": module for name in group if f"{stem}.{name}" not in like}
    known = {module.path for module in modules} | {joined.stored.module(module.path) for module in modules}
    found = list(modules)
    for path in sorted(joined.modules - known):
        shape = joined.stored.tensors[f"{path}.weight"].shape
        # The packed group concerns layers that have LoRA; others stay as they are.
        is_near = recipe.every_layer or recipe.every_name or _layer(path) in layers
        twin = like.get(_without_number(path)) if is_near else None
        twin = twin or named.get(path.rpartition(".")[2])
        if twin is not None and len(shape) == 2 and joined.stored.module(path) not in known:
            # With the rank and scale of its twin: some engines take one rank and one α for all modules.
            # A twin that is still to be decomposed has the rank 0.
            found.append(LoraModule(path, "linear", Unchanged(), shape, max(twin.rank, 1), twin.scale))
    return found


def _layer(path: str) -> str:
    """Return a path up to its last number; empty where it has none.

    Example:
        >>> _layer("model.layers.11.self_attn.q_proj")
        'model.layers.11'
    """
    found = re.match(r"(.*\.\d+)\.", path)
    return found[1] if found else ""


def _without_number(path: str) -> str:
    """Return a path with ``*`` for the numbers of layers and experts.

    Example:
        >>> _without_number("model.layers.11.self_attn.q_proj")
        'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
