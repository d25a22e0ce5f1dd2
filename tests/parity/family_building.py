"""Bases and adapters of every family, and what they compute, without a line of the code under test.

Two oracles. An adapter of transformers 5 is made by PEFT, and PEFT's forward pass says what is right. Of older
names nobody computes with today: their factors are written here by hand, each with its place in the parameters
of transformers 5, ``W + s·B·A`` is added there, and that model's forward pass says what is right.

Everything is cached for the session: nobody may write into what is returned.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.parity.building import one_thread, perturb
from tests.parity.families import FAMILIES, IMAGE, IMAGE_BEGINS, Family, Layout, Naming

PROMPTS = [[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]]
N_SHARDS = 4
EXTRAS = {"mtp.layers.0.eh_proj.weight": (8, 16), "model.layers.0.self_attn.k_scale": ()}
"""Tensors beside a base's own that transformers does not load: a head for several tokens, a scale of a cache."""

BEYOND: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "Llama": {"model.layers.2.self_attn.q_proj.weight": (64, 64)},
    "DeepSeek-V3": {
        "model.layers.2.eh_proj.weight": (64, 128),
        "model.layers.2.self_attn.q_a_proj.weight": (24, 64),
        "model.layers.2.self_attn.o_proj.weight": (64, 32),
        "model.layers.2.mlp.experts.0.gate_proj.weight": (40, 64),
        "model.layers.2.mlp.experts.0.up_proj.weight": (40, 64),
        "model.layers.2.mlp.experts.0.down_proj.weight": (64, 40),
        "model.layers.2.shared_head.head.weight": (96, 64),
    },
    "GLM-4-MoE": {
        "model.layers.2.eh_proj.weight": (64, 128),
        "model.layers.2.self_attn.q_proj.weight": (64, 64),
        "model.layers.2.mlp.shared_experts.up_proj.weight": (40, 64),
    },
}
"""Families published with a layer beyond the last, which transformers does not load and no adapter has seen."""


def by_name(name: str) -> Family:
    """Return a family."""
    return next(family for family in FAMILIES if family.name == name)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(PROMPTS)}


def _with_image(*before: int) -> torch.Tensor:
    """Return a prompt with an image of four tokens in it."""
    return torch.tensor([[1, 17, *before, *[IMAGE] * 4, 5, 80, 33, 9, 62, 2]])


def _patches(width: int) -> dict[str, torch.Tensor]:
    ids = _with_image(IMAGE_BEGINS)
    return {
        "input_ids": ids,
        "pixel_values": _noise(16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def _image() -> dict[str, torch.Tensor]:
    return {"input_ids": _with_image(), "pixel_values": _noise(1, 3, 16, 16)}


INPUTS = {
    "tokens": _tokens,
    "pairs": lambda: {**_tokens(), "decoder_input_ids": torch.tensor(PROMPTS).flip(1)},
    "sound": lambda: {
        "input_features": _noise(1, 16, 32),
        "decoder_input_ids": torch.tensor(PROMPTS[:1]),
    },
    "pixels": lambda: {"pixel_values": _noise(1, 3, 16, 16)},
    "patches": lambda: _patches(2 * 3 * 4 * 4),
    "small_patches": lambda: _patches(3 * 4 * 4),
    "image": _image,
    "image_and_types": lambda: {**_image(), "token_type_ids": (_with_image() == IMAGE).long()},
}
"""What a model is called with; an image is there wherever a tower is, so the tower matters to the output."""


def compute(model: Any, family: Family) -> torch.Tensor:
    """Return what a model makes of the fixed inputs."""
    with one_thread(), torch.no_grad():
        output = model.eval()(**INPUTS[family.inputs]())
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def make(family: Family, **fields: Any) -> Any:
    """Return a model with random weights, always the same; its biases and norms matter too."""
    import transformers

    torch.manual_seed(sum(family.name.encode()))
    config = getattr(transformers, family.config)(**{**family.fields, **fields})
    model = getattr(transformers, family.architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def made(family_name: str) -> Any:
    """Return the model of a family; nobody may change it."""
    return make(by_name(family_name))


def load(directory: Path, family: Family) -> Any:
    """Return a checkpoint in transformers."""
    import transformers

    architecture = getattr(transformers, family.architecture)
    return architecture.from_pretrained(directory, dtype="auto").eval()


# How a base lies on disk.


def published(model: Any, **save: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out, **save)
        return {
            name: tensor
            for path in Path(out).glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }


def tensors(model: Any, family: Family, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint of a model."""
    if layout == "in memory":
        return published(model, save_original_format=False)
    found = published(model)
    return (
        {_hub(name, family): _turned(name, t, family) for name, t in found.items()}
        if layout == "Hub"
        else found
    )


def _hub(name: str, family: Family) -> str:
    for pattern, replacement in family.hub:
        name = re.sub(pattern, replacement, name)
    return name


def _turned(name: str, tensor: torch.Tensor, family: Family) -> torch.Tensor:
    turn = family.hub_transposed and re.search(family.hub_transposed, name)
    return tensor.transpose(-1, -2).contiguous() if turn else tensor


def write(out: Path, model: Any, found: Mapping[str, torch.Tensor], n_shards: int = 1) -> Path:
    """Write a checkpoint; its tensors are dealt to the shards in turn, so that no layer lies in one of them."""
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    if n_shards == 1:
        save_file(dict(found), out / "model.safetensors", {"format": "pt"})
        return out
    names = sorted(found)
    files = {
        name: f"model-{n % n_shards + 1:05}-of-{n_shards:05}.safetensors" for n, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({name: found[name] for name in names if files[name] == file}, out / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def extra_shapes(family_name: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a base has beside those of the model."""
    return {**EXTRAS, **BEYOND.get(family_name, {})}


@cache
def base(root: Path, family_name: str, layout: Layout) -> Path:
    """Return the directory of a base checkpoint."""
    family = by_name(family_name)
    model = made(family_name)
    extras = {name: _noise(*shape) for name, shape in extra_shapes(family_name).items()}
    found = {**tensors(model, family, layout), **extras}
    out = root / f"base-{FAMILIES.index(family)}-{layout.replace(' ', '-')}"
    return write(out, model, found, N_SHARDS if layout == "in shards" else 1)


# Names of transformers 4, and where in transformers 5 they are.


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a module's change, and what they are added to."""

    parameter: str
    where: tuple[int | slice, ...] = ()
    """What of the parameter; all of it if empty."""

    rows: slice = field(default_factory=lambda: slice(None))
    """Rows of the change, as the adapter has it, [out, in]."""

    transposed: bool = False
    """The parameter is stored [in, out]."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module that an adapter names."""

    name: str
    n_out: int
    n_in: int
    parts: tuple[Part, ...]
    n_experts: int = 1
    """More than one: the factors of all experts are packed, as PEFT packs them."""


def old_name(path: str, family: Family) -> str:
    """Return what transformers 4 called a module."""
    for pattern, replacement in family.old_names:
        path = re.sub(pattern, replacement, path)
    return path


def places(family: Family) -> list[Place]:
    """Return every matrix of a family by the name it had in transformers 4."""
    found: list[Place] = []
    apart = {end for ends in family.fused.values() for end in ends}
    for path, module in made(family.name).named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            found += _experts(path, module, family)
        elif (
            isinstance(module, torch.nn.Linear) or type(module).__name__.endswith("Router")
        ) and not path.endswith(tuple(apart)):
            n_out, n_in = module.weight.shape
            found.append(Place(old_name(path, family), n_out, n_in, (Part(f"{path}.weight"),)))
        elif type(module).__name__ == "Conv1D":
            n_in, n_out = module.weight.shape
            part = Part(f"{path}.weight", transposed=True)
            found.append(Place(old_name(path, family), n_out, n_in, (part,)))
        found += _fused(path, module, family)
    return found


def _fused(path: str, module: Any, family: Family) -> list[Place]:
    """Return the modules that transformers 5 keeps as several, one under the other."""
    found = []
    for name, ends in family.fused.items():
        parent, _, first = ends[0].rpartition(".")
        if not path.endswith(parent) or not hasattr(module, first):
            continue
        widths = [getattr(module, end.rpartition(".")[2]).out_features for end in ends]
        starts = [sum(widths[:n]) for n in range(len(widths))]
        owner = path.removesuffix(parent)
        parts = tuple(
            Part(f"{owner}{end}.weight", rows=slice(start, start + width))
            for end, start, width in zip(ends, starts, widths, strict=True)
        )
        found.append(Place(f"{owner}{name}", sum(widths), getattr(module, first).in_features, parts))
    return found


def _experts(path: str, module: Any, family: Family) -> list[Place]:
    """Return the matrices of stacked experts: one by one, or packed where they were stacked before."""
    up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    n_experts, twice, hidden = module.gate_up_proj.shape
    half = twice // 2
    if family.old_parameters:
        owner = path.removesuffix(".experts")
        return [
            Place(f"{owner}.input_linear", twice, hidden, (Part(up),), n_experts),
            Place(f"{owner}.output_linear", hidden, half, (Part(down),), n_experts),
        ]
    if family.experts is None:
        return []
    gate_name, up_name, down_name = family.experts
    owner = old_name(path, family)
    return [
        place
        for e in range(n_experts)
        for place in (
            Place(f"{owner}.{e}.{gate_name}", half, hidden, (Part(up, (e, slice(0, half))),)),
            Place(f"{owner}.{e}.{up_name}", half, hidden, (Part(up, (e, slice(half, twice))),)),
            Place(f"{owner}.{e}.{down_name}", hidden, half, (Part(down, (e,)),)),
        )
    ]


# Adapters.


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a LoRA's config says of ranks and scales."""

    r: int = 4
    alpha: float = 6
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank(self, name: str) -> int:
        """Return the rank of a module."""
        return next((r for key, r in self.ranks.items() if re.fullmatch(rf"(.*\.)?{key}", name)), self.r)

    def scale(self, name: str) -> float:
        """Return the scale of a module."""
        alpha = next(
            (a for key, a in self.alphas.items() if re.fullmatch(rf"(.*\.)?{key}", name)), self.alpha
        )
        return alpha / (math.sqrt(self.rank(name)) if self.rslora else self.rank(name))

    def fields(self) -> dict[str, Any]:
        """Return what the config is told."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
        }


PLAIN = Recipe()


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter on disk and what base and adapter compute."""

    adapter: Path
    state: Mapping[str, torch.Tensor]
    """The parameters of transformers 5 with the adapter merged into them."""

    wanted: torch.Tensor
    """The oracle: what base and adapter compute."""

    changes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """s·B·A of each module, by the adapter's name for it; known of those that are written here."""


def merged_model(family: Family, state: Mapping[str, torch.Tensor]) -> Any:
    """Return the model with other parameters."""
    model = copy.deepcopy(made(family.name))
    model.load_state_dict(dict(state))
    return model


def trained_by_peft(root: Path, family: Family, recipe: Recipe = PLAIN) -> Trained:
    """Return an adapter with today's names, made by PEFT; the oracle is PEFT's forward pass, unmerged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    fields = {"target_modules": list(family.modules), "target_parameters": list(family.parameters) or None}
    model = load(base(root, family.name, "published"), family)
    torch.manual_seed(3)
    peft_model = get_peft_model(model, LoraConfig(**recipe.fields(), **fields))
    perturb(peft_model, 0.1)
    out = Path(tempfile.mkdtemp(dir=root, prefix="adapter-"))
    peft_model.save_pretrained(out)
    unmerged = PeftModel.from_pretrained(load(base(root, family.name, "published"), family), out)
    wanted = compute(unmerged, family)
    return Trained(out, unmerged.merge_and_unload().state_dict(), wanted)


def written(root: Path, family: Family, naming: Naming, recipe: Recipe = PLAIN) -> Trained:
    """Return an adapter with older names; the oracle is the model with W + s·B·A."""
    if naming == "ms-swift":
        targets: Any = family.swift
        chosen = [place for place in places(family) if re.fullmatch(family.swift, place.name)]
        fields: dict[str, Any] = {"target_modules": targets}
    else:
        names = (*family.old_modules, *(p.removesuffix(".weight") for p in family.old_parameters))
        chosen = [
            p for p in places(family) if p.name in names or p.name.endswith(tuple(f".{n}" for n in names))
        ]
        fields = {
            "target_modules": list(family.old_modules),
            "target_parameters": list(family.old_parameters) or None,
        }
    out = Path(tempfile.mkdtemp(dir=root, prefix="adapter-"))
    return write_adapter(out, family, chosen, fields, recipe)


def write_adapter(
    out: Path, family: Family, chosen: Sequence[Place], fields: Mapping[str, Any], recipe: Recipe
) -> Trained:
    """Write an adapter of some modules; return it with what it changes in transformers 5."""
    state = {name: tensor.clone() for name, tensor in made(family.name).state_dict().items()}
    factors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(17)
    for place in chosen:
        rank, n = recipe.rank(place.name), place.n_experts
        a = torch.randn(n * rank, place.n_in, generator=generator) * 0.1
        b = torch.randn(place.n_out, n * rank, generator=generator) * 0.1
        factors[f"base_model.model.{place.name}.lora_A.weight"] = a
        factors[f"base_model.model.{place.name}.lora_B.weight"] = b
        change = recipe.scale(place.name) * (b @ a if n == 1 else stacked_product(a, b, n))
        changes[place.name] = change
        for part in place.parts:
            rows = change[part.rows] if n == 1 else change
            state[part.parameter][part.where] += rows.T if part.transposed else rows
    save_file(factors, out / "adapter_model.safetensors", {"format": "pt"})
    write_config(out, **recipe.fields(), **fields)
    wanted = compute(merged_model(family, state), family)
    return Trained(out, state, wanted, changes)


def stacked_product(a: torch.Tensor, b: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Return B·A of every expert, [experts, out, in], from factors as PEFT packs them.

    A has an expert's rows one after the other; B has column ``k·experts + e`` for rank k of expert e.
    """
    rank = len(a) // n_experts
    return torch.stack([b[:, e::n_experts] @ a[e * rank : (e + 1) * rank] for e in range(n_experts)])


def write_config(out: Path, **fields: Any) -> None:
    """Write ``adapter_config.json`` as PEFT does."""
    from peft import LoraConfig

    config = LoraConfig(**fields)
    config.inference_mode = True
    config.save_pretrained(out)


@cache
def trained(root: Path, family_name: str, naming: Naming) -> Trained:
    """Return a family's adapter."""
    family = by_name(family_name)
    return trained_by_peft(root, family) if naming == "transformers 5" else written(root, family, naming)
