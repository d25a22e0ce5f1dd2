"""Traits of an adapter that engines may not be able to serve, read from its headers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.modeling.towers import TOWER
from lora_merge.peft_rules.kinds import PEFT_0_14_FIELDS, mutating_init
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.targets import ALL_LINEAR, TargetRule
from lora_merge.words import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.tensor import TensorRef

TRAITS: Mapping[str, str] = {
    "rank": "the largest rank of a module",
    "ranks-differ": "modules of different ranks",
    "kind": "a method other than LoRA",
    "format": "files in another format than PEFT's",
    "pickle": "weights in a pickle",
    "regex": "target_modules is a regular expression",
    "all-linear": "target_modules is all-linear",
    "listed-paths": "target_modules lists whole paths",
    "excluded": "exclude_modules is set",
    "rslora": "rsLoRA: the scale is α/√r",
    "alphas-differ": "modules with different α (alpha_pattern)",
    "some-layers": "modules with LoRA in some layers only",
    "packed-parts": "q, k and v without their partners (other than q with v), or up without gate",
    "packed": "q, k, v, gate or up",
    "language-model": "modules under language_model",
    "dora": "DoRA",
    "lora-bias": "a bias of lora_B",
    "bias": "trained biases",
    "bias-said": "a configuration with biases, but no stored biases",
    "modules-to-save": "whole modules (modules_to_save)",
    "saved-embeddings": "saved embeddings: copies of the base's, or trained ones",
    "tokens": "trained tokens",
    "target-parameters": "LoRA on stacked experts",
    "experts": "LoRA on separate experts",
    "experts-apart": "LoRA on modules of a copy with separate experts",
    "some-experts": "LoRA on some experts, or some of their projections",
    "router": "LoRA on a router",
    "latent-query": "LoRA on q_a_proj of latent attention",
    "latent": "LoRA on q_b_proj or kv_a_proj_with_mqa of latent attention",
    "latent-kv": "LoRA on kv_b_proj of latent attention",
    "embedding": "LoRA on the input embedding",
    "head": "LoRA on the output embedding",
    "convolution": "LoRA on convolutions",
    "fan-in": "fan_in_fan_out: layers stored [in, out]",
    "new-fields": "fields that PEFT 0.14 does not know",
    "initial": "an initialisation that changed the base",
    "replicated": "repeated layers",
    "beside": "whole parameters in a second file",
    "added-tokens": "an added_tokens.json with ids that the base does not have",
    "tower": "LoRA on a vision or audio tower",
    "stacked-parts": "LoRA on one of the two stacked parameters of experts",
    "modules": "the modules with LoRA",
}
"""Every trait, in words."""

PACKED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Groups of modules that engines compute as one matrix."""

_FILLED = ({"q_proj", "v_proj"}, {"gate_proj"})
"""Parts of a group that suffice: an engine that packs adds zeros for the others."""

_PACKED_NAMES = frozenset(name for group in PACKED for name in group)

_BY_NAME: Mapping[str, frozenset[str]] = {
    "router": frozenset({"gate", "router"}),
    "latent-query": frozenset({"q_a_proj"}),
    "latent": frozenset({"q_b_proj", "kv_a_proj_with_mqa"}),
    "latent-kv": frozenset({"kv_b_proj"}),
}
"""Trait → last parts of the paths of modules that show it."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LISTED_EXPERT = re.compile(r"\.experts\.\w+_projs\.\d+$")


@dataclass(frozen=True, slots=True)
class Trait:
    """One trait of an adapter."""

    name: str
    """A key of `TRAITS`."""

    detail: str
    """The trait in this adapter, for sentences: ``"rank 32"``."""

    value: int = 0
    """The number, for ``rank``."""

    paths: tuple[str, ...] = ()
    """For ``modules``: all modules except heads, embeddings and experts, which have separate traits."""


def traits_of(
    adapter: Adapter,
    base_modules: Collection[str] = (),
    unchanged: Collection[str] = (),
    added_tokens: int = 0,
) -> tuple[Trait, ...]:
    """Return every trait that an adapter has, from its headers and what is known of its base.

    Args:
        adapter: from its headers.
        base_modules: every module of the base that has a matrix, if they are known.
        unchanged: whole parameters that only copy the base's, if that is known.
        added_tokens: how many entries of its ``added_tokens.json`` have ids beyond the base's vocabulary.
    """
    added = (Trait("added-tokens", f"{added_tokens} added tokens"),) if added_tokens else ()
    return (
        *added,
        *_of_config(adapter, base_modules),
        *_of_ranks(adapter),
        *_of_modules(adapter, base_modules),
        *_of_whole(adapter, unchanged),
    )


def _of_config(adapter: Adapter, base_modules: Collection[str]) -> Iterator[Trait]:
    config = adapter.config
    targets = config.get("target_modules")
    if adapter.format != "peft":
        yield Trait("format", f"of {adapter.format}")
    if adapter.kind != "LORA":
        yield Trait("kind", adapter.kind)
    if any(ref.file.endswith(".bin") for ref in _refs(adapter)):
        yield Trait("pickle", "adapter_model.bin")
    if isinstance(targets, str):
        is_short = targets.lower() == ALL_LINEAR
        yield Trait("all-linear" if is_short else "regex", f"target_modules is {quoted(targets)}")
    if isinstance(targets, list):
        last = Counter(str(entry).rpartition(".")[2] for entry in targets if "." in str(entry))
        # An engine that cuts paths to their last parts finds such a name twice.
        again = sorted(name for name, n in last.items() if n > 1 and name not in _PACKED_NAMES)
        if again:
            yield Trait("listed-paths", f"target_modules lists several paths that end in {again[0]}")
    if _excludes(config, base_modules):
        yield Trait("excluded", "exclude_modules leaves out what target_modules means")
    if config.get("use_rslora"):
        yield Trait("rslora", "use_rslora is set")
    if config.get("fan_in_fan_out"):
        yield Trait("fan-in", "fan_in_fan_out is set")
    unknown = sorted(name for name in config if name not in PEFT_0_14_FIELDS)
    if unknown and adapter.format == "peft":
        yield Trait("new-fields", listing(unknown, 3))
    # KaSA changes the base too, but has a separate field in place of ``init_lora_weights``.
    init = "KaSA" if config.get("kasa_config") else mutating_init(config)
    if init:
        yield Trait("initial", init)
    if config.get("layer_replication"):
        yield Trait("replicated", "layer_replication is set")


def _excludes(config: Mapping[str, Any], base_modules: Collection[str]) -> bool:
    """Return True if an exclusion removes a module that would be a target, or may do so."""
    if not config.get("exclude_modules"):
        return False
    try:
        rule = TargetRule.parse(config)
        wider = replace(rule, exclude_modules=None)
        return not base_modules or any(
            wider.matches(module) and not rule.matches(module) for module in base_modules
        )
    # A pattern that does not parse may exclude anything.
    except TargetError:
        return True


def _of_ranks(adapter: Adapter) -> Iterator[Trait]:
    ranks = {delta.module: delta.rank for delta in adapter.deltas if delta.facts.has_factors}
    config = adapter.config
    own = config.get("r")
    said = {own} if isinstance(own, int) and not isinstance(own, bool) else set()
    if adapter.stacked:
        # Shapes do not tell the rank of stacked experts: experts and rank share an axis.
        ranks |= {"": max(said, default=0)}
    if not ranks:
        return
    found = sorted(set(ranks.values()))
    if adapter.kind == "LORA":
        table = config.get("rank_pattern")
        said |= {
            value for value in (table if isinstance(table, dict) else {}).values() if isinstance(value, int)
        }
        # The config counts too: engines reserve memory for the rank that it names.
        largest = max({*found, *said})
        detail = (
            f"rank {found[-1]}" if largest == found[-1] else f"rank {found[-1]}, but {largest} in the config"
        )
        yield Trait("rank", detail, largest)
    else:
        yield Trait("rank", f"rank {found[-1]}", found[-1])
    if len(found) > 1:
        yield Trait("ranks-differ", f"ranks {', '.join(map(str, found))}")
    # An engine that reads r from the config expects another rank than the tensors have.
    elif adapter.kind == "LORA" and isinstance(own, int) and own != found[0]:
        yield Trait("ranks-differ", f"rank {found[0]}, but r is {own}")
    alphas = set()
    for delta in adapter.deltas:
        if delta.facts.has_factors:
            # α from the scale, which is α/r, or α/√r with rsLoRA.
            root = delta.rank**0.5 if adapter.config.get("use_rslora") else delta.rank
            alphas.add(round(delta.effective_scale * root, 6))
    if len(alphas) > 1 and adapter.format == "peft":
        yield Trait("alphas-differ", f"α is {', '.join(f'{alpha:g}' for alpha in sorted(alphas))}")


def _of_modules(adapter: Adapter, base_modules: Collection[str]) -> Iterator[Trait]:
    modules = sorted(adapter.modules)
    by_layer: dict[int, set[str]] = {}
    for module in modules:
        match = _LAYER.search(module)
        if match and not _EXPERT.search(module) and not _LISTED_EXPERT.search(module):
            by_layer.setdefault(int(match[1]), set()).add(module[match.end() :])
    everywhere = set().union(*by_layer.values()) if by_layer else set()
    numbers = [int(match[1]) for match in map(_LAYER.search, base_modules) if match]
    n_layers = max([*numbers, *by_layer], default=-1) + 1
    # Without a base, layers above the last one in the adapter cannot be seen.
    n_lacking = n_layers - sum(own == everywhere for own in by_layer.values())
    if n_lacking and by_layer:
        yield Trait("some-layers", f"{n_lacking} of {n_layers} layers have only some of the modules")
    elif not base_modules and adapter.config.get("layers_to_transform"):
        yield Trait("some-layers", "layers_to_transform is set")
    names = {module.rpartition(".")[2] for module in everywhere}
    if any(module.startswith(("language_model.", "model.language_model.")) for module in modules):
        yield Trait("language-model", "modules under language_model")
    if any(TOWER.search(module) for module in modules):
        yield Trait("tower", "modules of a tower")
    yield from _of_packed(modules)
    yield from _of_experts(adapter, modules)
    for trait, wanted in _BY_NAME.items():
        hit = sorted(names & wanted)
        if hit:
            yield Trait(trait, ", ".join(hit))
    if any(delta.transposed for delta in adapter.deltas):
        yield Trait("embedding", "the input embedding is a target")
    if any(module.rpartition(".")[2] in OUTPUT_NAMES for module in modules):
        yield Trait("head", "the output embedding is a target")
    if any(delta.facts.has_factors and len(delta.shape("A")) > 2 for delta in adapter.deltas):
        yield Trait("convolution", "a convolution is a target")
    yield Trait("modules", f"{len(modules)} modules", paths=_plain(adapter, modules))


def _plain(adapter: Adapter, modules: list[str]) -> tuple[str, ...]:
    embeddings = {delta.module for delta in adapter.deltas if delta.transposed}
    return tuple(
        module
        for module in modules
        if module.rpartition(".")[2] not in OUTPUT_NAMES | INPUT_NAMES
        and module not in embeddings
        and not _EXPERT.search(module)
    )


def _of_packed(modules: list[str]) -> Iterator[Trait]:
    """Yield traits of modules that engines compute as one. Only modules of the same parent belong together."""
    siblings: dict[str, set[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        if name in _PACKED_NAMES and not _EXPERT.search(module):
            siblings.setdefault(parent, set()).add(name)
    names = set().union(*siblings.values())
    if names:
        yield Trait("packed", ", ".join(sorted(names)))
    for parent, own in siblings.items():
        for group in PACKED:
            part = own & set(group)
            if part and part not in (set(group), *_FILLED):
                found = ", ".join(name for name in group if name in own)
                yield Trait("packed-parts", f"{found} without its partners, in {parent}")
                return


def _of_experts(adapter: Adapter, modules: list[str]) -> Iterator[Trait]:
    """Yield traits of LoRA on experts: stacked, one by one, or on some of them only."""
    if adapter.stacked:
        yield Trait("target-parameters", "target_parameters is set")
        pairs = Counter(pair.module for pair in adapter.stacked if pair.module.endswith("experts"))
        if pairs and min(pairs.values()) < 2:
            yield Trait("stacked-parts", "one of the two stacked parameters of experts is a target")
    listed = next(filter(_LISTED_EXPERT.search, modules), "")
    if listed:
        yield Trait("experts-apart", f"modules such as {listed}")
    found: dict[str, set[tuple[str, str]]] = {}
    for module in modules:
        block, dot, rest = module.partition(".experts.")
        index, _, projection = rest.partition(".")
        if dot and index.isdecimal():
            found.setdefault(block, set()).add((index, projection))
    if not found:
        return
    yield Trait("experts", "modules of single experts")
    numbers = {int(index) for own in found.values() for index, _ in own}
    # Three projections for each expert: gate, up and down.
    if any(len(own) != 3 * (max(numbers) + 1) for own in found.values()):
        yield Trait("some-experts", "some experts, or some of their projections, are missing")


def _of_whole(adapter: Adapter, unchanged: Collection[str]) -> Iterator[Trait]:
    of_algebras = (delta.facts.serving_trait for delta in adapter.deltas)
    yield from (Trait(*trait) for trait in dict.fromkeys(of_algebras) if trait is not None)
    why: dict[str, list[str]] = {}
    for parameter, one in adapter.replacements.items():
        # A copy of the base's parameter changes nothing.
        if parameter in unchanged:
            continue
        why.setdefault(one.why, []).append(parameter.rpartition(".")[0].rpartition(".")[2])
    kind = adapter.config.get("bias", "none")
    if "bias" in why:
        yield Trait("bias", f"bias is {quoted(kind)}")
    elif kind not in {None, "none"}:
        yield Trait("bias-said", f"bias is {quoted(kind)}, but no bias is stored")
    whole = sorted({*why.get("module", ()), *why.get("", ())})
    if whole:
        yield Trait("modules-to-save", ", ".join(whole))
    if "embedding" in why:
        yield Trait("saved-embeddings", f"{', '.join(sorted(set(why['embedding'])))} saved")
    if "saved" in why:
        yield Trait("beside", f"{len(why['saved'])} whole parameters")


def _refs(adapter: Adapter) -> Iterator[TensorRef]:
    for delta in adapter.deltas:
        yield from delta.factors.values()
    for pair in adapter.stacked:
        yield from pair.tensors.values()
    yield from adapter.peft_layers.values()
