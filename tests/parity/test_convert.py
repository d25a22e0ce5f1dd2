"""Converted adapters, with PEFT as the oracle: the same answers where a transform is exact, else what is reported.

Three ways to the same question. PEFT loads both adapters on the float32 base and both answer. Both are merged, by the
command whose merges the other suites prove, and the merged weights are compared densely in float64. And what the
report says of each module is held against those weights.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_merge.cli import exits
from tests import twins
from tests.crossing import diagonal, one_for_each, table
from tests.parity import building, family_building
from tests.parity.kinds import KINDS, Kind, algebra, peft_type
from tests.tampering import edit_json, edit_tensors

EXACT_TOLERANCE = 1e-5
"""Of the largest output. As in test_kinds.py: at most some ten products lie one after the other, no inner dimension is
larger than 256, and every product adds √n·2⁻²⁴ of its size. Baking, padding and stacking replace roundings by others."""

FACTORISED_TOLERANCE = 3e-5
"""A change is the difference of two rounded weights, an SVD (√n·2⁻²⁴) takes it apart, and the product of the factors puts
it together: three times as many roundings."""

MERGED_TOLERANCE = 1e-6
"""Of the largest weight: s·B is rounded before the product or after it, 2·2⁻²⁴ for each of at most eight terms."""

ULP = 2.0**-24


@dataclass(frozen=True)
class Converted:
    """What the command made, and what it said about it."""

    root: Path
    report: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.root / "adapter_config.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / "adapter_model.safetensors")


@pytest.fixture
def convert(cli, tmp_path):
    """Return a function (adapter, *options) → what the real command makes of it."""
    made = iter(range(1000))

    def run(adapter: Path, *options: object) -> Converted:
        out = tmp_path / f"converted-{next(made)}"
        result = cli("convert", adapter, "--out", out, "--json", *options)
        assert result.exit_code == exits.OK, result.output
        return Converted(out, json.loads(result.stdout))

    return run


@pytest.fixture
def refusal(cli, tmp_path):
    """Return a function (adapter, *options) → the sentence with which the command writes nothing."""

    def run(adapter: Path, *options: object) -> str:
        out = tmp_path / "refused"
        result = cli("convert", adapter, "--out", out, *options)
        assert result.exit_code == exits.PLAN, result.output
        assert sorted(tmp_path.glob("refused*")) == []
        return result.stderr

    return run


@pytest.fixture
def weights(cli, tmp_path):
    """Return a function (base, adapter, *options) → the tensors of the checkpoint that both are merged to."""
    made = iter(range(1000))

    def merge(base: Path, adapter: Path, *options: object) -> dict[str, torch.Tensor]:
        out = tmp_path / f"merged-{next(made)}"
        result = cli("--base", base, "--adapter", adapter, "--out", out, *options)
        assert result.exit_code == exits.OK, result.output
        return stored(out)

    return merge


@pytest.fixture
def trained(pico, pico_adapter):
    """Return a function (family, fields of a LoraConfig) → a float32 base and an adapter for it."""

    def make(family: str = "llama", **fields: Any) -> tuple[Path, Path]:
        base = pico(family, "float32")
        return base, pico_adapter(base, **fields)

    return make


@pytest.fixture
def answer(load, logits):
    """Return a function (base, adapter) → both in PEFT, and what they answer; without an adapter, the base alone."""
    from peft import PeftModel

    def run(base: Path, adapter: Path | None = None) -> tuple[Any, torch.Tensor]:
        model = load(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return model, logits(model)

    return run


def stored(root: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: t for path in root.glob("*.safetensors") for name, t in load_file(path).items()}


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def loaded(case: building.Case, adapter: Path) -> Any:
    """Return base + a converted adapter in PEFT; every tensor of either has found the other."""
    plain = replace(case.kind, setting="plain" if case.kind.setting == "residual" else case.kind.setting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = replace(case, kind=plain, adapter=adapter).unmerged()
    assert [str(one.message) for one in caught if "adapter keys" in str(one.message)] == []
    return model


def lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's layers of LoRA, by their paths."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.scaling
    }


def name_of(path: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the stored tensor of a module, or of a parameter."""
    return path if path in tensors else f"{path}.weight"


def rounding(*values: torch.Tensor) -> float:
    """Return how far merged weights may be from what they mean: eight roundings of every value."""
    return 8 * ULP * sum(float(value.double().norm()) for value in values)


def assert_the_report_is_right(
    report: Mapping[str, Any],
    base: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    got: Mapping[str, torch.Tensor],
) -> None:
    """‖Δ‖ and ‖Δ - Δ′‖ of every module are those of the merged weights, and the bound that they are holds."""
    squares = [0.0, 0.0]
    for module in report["modules"]:
        name = name_of(module["path"], wanted)
        before = base.get(name, base.get("model.embed_tokens.weight"))  # a tie has one tensor
        change = wanted[name].double() - before.double()
        difference = wanted[name].double() - got[name].double()
        fuzz = rounding(wanted[name], got[name])
        residual = float(difference.norm())
        if module["loss"] is None:
            assert residual <= fuzz, name
            continue
        loss = module["loss"]
        assert abs(loss["residual"] - residual) <= 1e-4 * residual + fuzz, name
        assert abs(loss["norm"] - float(change.norm())) <= 1e-4 * loss["norm"] + fuzz, name
        assert loss["relative"] == pytest.approx(loss["residual"] / loss["norm"])
        assert loss["energy"] == pytest.approx(1 - loss["relative"] ** 2)
        matrix = difference if difference.dim() == 3 else difference.flatten(1)  # experts, or a kernel
        x = torch.randn(matrix.shape[-1], 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        bound = loss["residual"] * (1 + 1e-4) + fuzz
        assert ((matrix @ x).norm(dim=-2) <= bound * x.norm(dim=0)).all(), name
        squares = [total + loss[key] ** 2 for total, key in zip(squares, ("norm", "residual"), strict=True)]
    for total, key in zip(squares, ("norm", "residual"), strict=True):
        assert report["loss"][key] == pytest.approx(sqrt(total))


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9=³]+", "_", text).strip("_")


def cases(kinds):
    """Return kind × model."""
    return [
        pytest.param(kind, model, id=f"{slug(kind.name)}-{model}") for kind in kinds for model in kind.models
    ]


def named(*names: str) -> tuple[Kind, ...]:
    by_name = {kind.name: kind for kind in KINDS}
    return tuple(by_name[name] for name in names)


# Which kinds there are: those with factors of LoRA, those that have a matrix to make some of, and the rest.

ATTENTION_TWICE = "LoRA on nn.MultiheadAttention"
DECOMPOSED = tuple(kind for kind in KINDS if kind.name.startswith(("KaSA", "PiSSA", "OLoRA")))
"""Their factors belong to a base that was changed by factors of this rank."""

WITHOUT_FACTORS = (
    *(kind for kind in KINDS if kind.group == "other PEFT methods"),
    *named("trainable tokens alone", "LayerNorm tuning"),
)
EXACT = tuple(
    kind for kind in KINDS if kind not in (*WITHOUT_FACTORS, *DECOMPOSED) and kind.name != ATTENTION_TWICE
)

NO_MATRIX = named(
    ATTENTION_TWICE,
    "LoRA with a bias (lora_bias)",
    "IA³",
    "IA³ on Conv1D",
    "RoAd",
    "GLoRA",
    "BEFT",
    "modules_to_save of norms",
    "LayerNorm tuning",
    'bias="all"',
    'bias="lora_only"',
    "a larger vocabulary",
    "a larger vocabulary with LoRA on it",
    "a larger vocabulary of a tied model",
)
"""No LoRA on matrices says what these do."""

WITHOUT_BIASES = tuple(
    replace(kind, name=f"{kind.name} without biases", models=("llama",))
    for kind in named("IA³", "RoAd", "GLoRA")
)
TO_LORA = (
    *(
        kind
        for kind in KINDS
        if kind not in NO_MATRIX
        and (kind not in EXACT or "DoRA" in kind.name or kind.group == "whole parameters")
    ),
    *WITHOUT_BIASES,
)


def test_every_kind_is_in_its_place():
    exact, to_lora, no_matrix = ({kind.name for kind in kinds} for kinds in (EXACT, TO_LORA, NO_MATRIX))
    assert exact | to_lora | no_matrix >= {kind.name for kind in KINDS}
    assert not to_lora & no_matrix


# Exact transforms.

FLAT = ("AdaLoRA", "resnet")
"""Its factors for a convolution are flat, and only the base has the kernel's shape."""

TRANSFORMS = {
    "bake": ("--bake-scale",),
    "expand": ("--expand-targets",),
    "pad": ("--pad-rank", "8"),
    "float32": ("--dtype", "float32"),
    "all": ("--bake-scale", "--expand-targets", "--pad-rank", "8", "--dtype", "float32"),
}
WAYS = [(transform, False) for transform in TRANSFORMS] + [("expand", True), ("all", True)]
"""Transforms, and whether a base is given: names are shortened where it says that they may be."""

EACH_WAY = named(
    "LoRA",
    "LoRA with rank_pattern and alpha_pattern",
    "LoRA on stacked experts beside linear layers",
    "AdaLoRA",
    "modules_to_save",
)
"""Kinds that every transform is tried on; all others are tried on all transforms at once."""

OF_THEIR_OWN = {"LoRA with rank_pattern and alpha_pattern", "VeLoRA", "MiCA"}
"""Kinds whose fields of the config are changed in another way."""


def assert_written_as_wanted(transform: str, config: Mapping[str, Any], model: Any) -> None:
    """Every layer has the scale and the rank that were asked for, and the targets are a list."""
    layers = lora_layers(model).values()
    assert layers
    if transform in {"bake", "all"}:
        assert {layer.scaling["default"] for layer in layers} == {1}
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
    if transform in {"pad", "all"}:
        assert {layer.r["default"] for layer in layers} == {8}
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    if transform in {"expand", "all"}:
        assert isinstance(config["target_modules"], list)
        assert {config.get(name) for name in ("layers_to_transform", "exclude_modules")} == {None}


def ways():
    """Return kind × model × transform × with a base: all transforms at once for each kind, and each of them for a few."""
    return [
        pytest.param(*case.values, *way, id=f"{case.id}-{way[0]}{'-base' * way[1]}")
        for case in cases(EXACT)
        for way in WAYS
        if way == ("all", True) or (case.values[0] in EACH_WAY and case.values[1] == case.values[0].models[0])
    ]


@pytest.mark.parametrize(
    ("kind", "model", "transform", "with_base"),
    one_for_each(
        ways(),
        lambda kind, model, *way: (algebra(kind, model), *way),
        lambda kind, model, *_: (kind.setting, model),
        lambda kind, _, *way: kind.name in OF_THEIR_OWN and (kind.name, *way),
    ),
)
def test_an_exact_transform_answers_as_the_adapter_does(kind, model, transform, with_base, workshop, convert):
    case = building.case(workshop, kind, model, "float32")
    base = ("--base", case.base) if with_base or (kind.name, model) == FLAT else ()
    made = convert(case.adapter, *TRANSFORMS[transform], *base)
    assert made.report["loss"] is None or made.report["loss"]["relative"] <= EXACT_TOLERANCE
    ours = loaded(case, made.root)
    assert_written_as_wanted(transform, made.config, ours)
    wanted = building.compute(case.unmerged(), model)
    assert off_by(building.compute(ours, model), wanted) <= EXACT_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "model"), one_for_each(cases(EXACT), algebra, lambda kind, model: (kind.setting, model))
)
def test_a_converted_adapter_merges_to_what_the_adapter_merges_to(kind, model, workshop, convert, weights):
    case = building.case(workshop, kind, model, "float32")
    made = convert(case.adapter, *TRANSFORMS["all"], "--base", case.base)
    wanted, got = (weights(case.base, adapter) for adapter in (case.adapter, made.root))
    assert got.keys() == wanted.keys()
    before = stored(case.base)
    assert any(not torch.equal(wanted[name], before[name]) for name in before.keys() & wanted.keys())
    assert {name: e for name in wanted if (e := off_by(got[name], wanted[name])) > MERGED_TOLERANCE} == {}


@pytest.mark.parametrize(
    ("kind", "model"),
    one_for_each(
        cases(kind for kind in EXACT if kind.peft_type == "LORA" and kind.name != "BD-LoRA"), algebra
    ),
)
def test_targets_are_listed_without_changing_a_bit(kind, model, workshop, convert, weights):
    case = building.case(workshop, kind, model, "float32")
    made = convert(case.adapter, "--expand-targets", "--base", case.base)
    wanted, got = load_file(case.adapter / "adapter_model.safetensors"), made.tensors
    assert got.keys() == {name for name in wanted if "velora" not in name and "monteclora" not in name}
    assert all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parametrize("kind", DECOMPOSED, ids=lambda kind: slug(kind.name))
def test_factors_of_a_decomposed_base_are_neither_scaled_nor_padded(kind, workshop, refusal):
    case = building.case(workshop, kind, "llama", "float32")
    for options in (
        ("--bake-scale",),
        ("--pad-rank", "8"),
        ("--rank", "2"),
        ("--rename", "v4", *kind.options),
    ):
        assert "changed the base before training" in refusal(case.adapter, *options)


@pytest.mark.parametrize(
    "kind", [kind for kind in DECOMPOSED if "original" in kind.name], ids=lambda kind: slug(kind.name)
)
def test_an_adapter_that_decomposes_its_base_does_so_after_its_targets_are_listed(kind, workshop, convert):
    case = building.case(workshop, kind, "llama", "float32")
    made = convert(case.adapter, "--expand-targets")
    wanted = building.compute(case.unmerged(), "llama")
    assert off_by(building.compute(loaded(case, made.root), "llama"), wanted) <= EXACT_TOLERANCE


@pytest.mark.parametrize(
    "kind", named("KaSA", "KaSA beside trained tokens"), ids=lambda kind: slug(kind.name)
)
def test_the_truncated_base_of_kasa_is_not_forgotten(kind, workshop, refusal):
    case = building.case(workshop, kind, "llama", "float32")
    assert "KaSA changed the base before training" in refusal(case.adapter, "--expand-targets")


@pytest.mark.parametrize(
    "kind",
    one_for_each(
        [
            pytest.param(kind, id=slug(kind.name))
            for kind in WITHOUT_FACTORS
            if kind.name != "trainable tokens alone"
        ],
        peft_type,
    ),
)
def test_what_has_no_factors_says_that_it_may_be_made_a_lora(kind, workshop, refusal):
    if kind.needs:
        pytest.importorskip(kind.needs)
    case = building.case(workshop, kind, kind.models[0], "float32")
    sentence = refusal(case.adapter, "--bake-scale")
    assert "has no LoRA factors" in sentence
    assert "--to-lora" in sentence


def test_experts_without_a_base_cannot_be_told_apart(workshop, tampered, cli, tmp_path):
    (kind,) = named("LoRA on stacked experts (target_parameters), one parameter")
    adapter = tampered(building.case(workshop, kind, "qwen3_moe", "float32").adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    result = cli("convert", adapter, "--bake-scale", "--out", tmp_path / "out")
    assert result.exit_code != exits.OK
    assert "--base" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_targets_are_not_those_that_peft_would_choose(workshop, convert):
    (kind,) = named("LoRA on a matrix by its parameter's name (target_parameters)")
    case = building.case(workshop, kind, "llama", "float32")
    assert convert(case.adapter, "--bake-scale").config["target_modules"] == []


# How targets may be spelled.

SPELLINGS: Mapping[str, dict[str, Any]] = {
    "a regex": {"target_modules": r".*layers\.[01]\.(self_attn\.q_proj|mlp\.down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "whole paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers of a pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "exclusions": {"exclude_modules": ["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"]},
    "an excluding regex": {"exclude_modules": r".*\.0\..*"},
    "patterns by layer": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 9},
    },
    "a pattern under rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
}


@pytest.mark.parametrize(
    ("spelling", "transform", "with_base"),
    one_for_each(
        table(SPELLINGS.keys(), ["bake", "expand", "all"], [False, True]),
        lambda spelling, _, with_base: (spelling, with_base),
        lambda _, transform, with_base: (transform, with_base),
    ),
)
def test_a_listing_means_the_modules_that_were_meant(
    transform, spelling, with_base, trained, convert, answer
):
    base, adapter = trained(**SPELLINGS[spelling])
    options = ["9" if option == "8" else option for option in TRANSFORMS[transform]]
    made = convert(adapter, *options, *(("--base", base) if with_base else ()))
    (before, wanted), (after, got) = (answer(base, root) for root in (adapter, made.root))
    assert sorted(after.targeted_module_names) == sorted(before.targeted_module_names)
    assert off_by(got, wanted) <= EXACT_TOLERANCE
    if transform != "bake":
        listed = made.config["target_modules"]
        in_every_layer = {"a regex", "all-linear", "patterns by layer", "a pattern under rsLoRA"}
        short = with_base and spelling in in_every_layer
        assert all(name.startswith("model.") is not short for name in listed)


# Other trainers' formats.

FORMATS = {
    "q, v and down": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "DoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize(
    ("make", "fields", "transform"),
    diagonal({"mlx": twins.mlx, "swift": twins.swift}, FORMATS, TRANSFORMS.keys()),
)
def test_other_formats_become_pefts_and_answer_alike(
    make, fields, transform, trained, convert, answer, tmp_path
):
    base, adapter = trained(**fields)
    if "embed_tokens" in fields["target_modules"] and make is twins.mlx:  # PEFT saves the embeddings along
        adapter = twins.respelled(adapter, tmp_path / "factors", str)
        edit_tensors(adapter / "adapter_model.safetensors", _drop_whole_weights)
    made = convert(make(adapter, tmp_path / "twin"), *TRANSFORMS[transform])
    (_, plain), (_, wanted), (ours, got) = (answer(base, root) for root in (None, adapter, made.root))
    assert_written_as_wanted(transform, made.config, ours)
    assert off_by(got, wanted) <= EXACT_TOLERANCE
    assert off_by(plain, wanted) > 0.05


def _drop_whole_weights(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_" not in name]:
        del tensors[name]


def test_whole_weights_beside_an_adapter_of_ms_swift_are_not_left_behind(
    pico, pico_adapter, refusal, tmp_path
):
    root = twins.swift(pico_adapter(pico()), tmp_path / "swift")
    norm = load_file(pico() / "model.safetensors")["model.norm.weight"]
    twins.save(
        tmp_path / "swift" / "extra_states",
        {"extra_state_keys": [r"model\.norm\..*"]},
        {"model.norm.weight": norm * 2},
        "adapter_model.safetensors",
    )
    sentence = refusal(root, "--bake-scale")
    assert "is a whole parameter in a second file of the adapter" in sentence
    assert "model.norm.weight" in sentence


def respelled_for(name: str, adapter: Path, root: Path) -> Path:
    """Return an adapter whose tensors have the names of a training loop's model, or are pickled."""
    spelling = {
        "with the adapter's name": lambda key: twins.named(key, "mine"),
        "compiled": lambda key: key.replace(twins.PREFIX, f"{twins.PREFIX}_orig_mod."),
        "parallel": lambda key: f"module.{key}",
        "pickled": str,
    }
    twin = twins.respelled(adapter, root, spelling[name])
    if name == "pickled":
        torch.save(load_file(twin / "adapter_model.safetensors"), twin / "adapter_model.bin")
        (twin / "adapter_model.safetensors").unlink()
    return twin


@pytest.mark.parametrize("spelling", ["with the adapter's name", "compiled", "parallel", "pickled"])
def test_tensors_under_other_names_are_written_under_pefts(spelling, trained, convert, answer, tmp_path):
    base, adapter = trained(
        target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"]
    )
    made = convert(respelled_for(spelling, adapter, tmp_path / "twin"), *TRANSFORMS["all"])
    assert made.tensors.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    (_, wanted), (_, got) = (answer(base, root) for root in (adapter, made.root))
    assert off_by(got, wanted) <= EXACT_TOLERANCE


@pytest.mark.parametrize("option", ["--bake-scale", "--split-experts", "--fuse-experts"])
def test_what_mlx_stacks_lies_as_the_base_or_the_model_has_it(option, convert, weights, tmp_path):
    base, module = tmp_path / "base", "model.layers.1.mlp.switch_mlp"
    building.make("qwen3_moe").save_pretrained(base, save_original_format=True)
    tensors = {}
    for seed, (name, (n_out, n_in)) in enumerate(
        {"gate_proj": (40, 64), "up_proj": (40, 64), "down_proj": (64, 40)}.items()
    ):
        generator = torch.Generator().manual_seed(seed)
        tensors[f"{module}.{name}.lora_a"] = torch.randn(4, 3, n_in, generator=generator)
        tensors[f"{module}.{name}.lora_b"] = torch.randn(4, n_out, 3, generator=generator)
    settings = {"rank": 3, "scale": 1.5, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings, "model": "none"}
    adapter = twins.save(tmp_path / "mlx", config, tensors, "adapters.safetensors")
    made = convert(adapter, option, "--base", base)
    ranks = {module["path"].rpartition(".")[2]: module["rank"] for module in made.report["modules"]}
    stacks = {"gate_up_proj": 6, "down_proj": 3}
    assert ranks == (stacks if option == "--fuse-experts" else {"gate_proj": 3, "up_proj": 3, "down_proj": 3})
    assert_merge_alike(weights, base, adapter, made, MERGED_TOLERANCE)


def test_layers_that_mlx_trained_whole_are_no_lora(pico, refusal, tmp_path):
    tensors = load_file(pico("llama", "float32") / "model.safetensors")
    whole = {name: tensor * 2 for name, tensor in tensors.items() if ".layers.1." in name}
    settings = {"rank": 3, "scale": 1.5, "dropout": 0.0}
    config = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": settings, "model": "none"}
    adapter = twins.save(tmp_path / "mlx", config, whole, "adapters.safetensors")
    assert "are whole parameters in a second file of the adapter" in refusal(adapter, "--bake-scale")
    base = pico("llama", "float32")
    sentence = refusal(adapter, "--to-lora", "--rank", "4", "--base", base)
    assert (
        "input_layernorm.weight: has the shape (64) and is changed, but LoRA can change matrices only"
        in sentence
    )


# Layers that an adapter repeats.

REPLICATION = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [(0, 2), (0, 2)]}
ABOVE = {**REPLICATION, "layers_to_transform": [2, 3]}
"""The base has as many layers as these, under other numbers."""


@pytest.mark.parametrize(
    ("transform", "fields", "with_base"),
    diagonal(TRANSFORMS.keys(), {"all": REPLICATION, "above": ABOVE}, [False, True]),
)
def test_repeated_layers_have_adapters_of_their_own(fields, transform, with_base, trained, convert, answer):
    base, adapter = trained(**fields)
    made = convert(adapter, *TRANSFORMS[transform], *(("--base", base) if with_base else ()))
    (before, wanted), (after, got) = (answer(base, root) for root in (adapter, made.root))
    assert sorted(after.targeted_module_names) == sorted(before.targeted_module_names)
    assert off_by(got, wanted) <= EXACT_TOLERANCE


def test_repeated_layers_are_nothing_that_a_lora_on_the_base_says(trained, refusal):
    base, adapter = trained(**REPLICATION)
    for options in (("--to-lora",), ("--rename", "v4"), ("--fuse-experts",)):
        assert "repeats layers of the base" in refusal(adapter, *options, "--base", base)


# Factors in another dtype.

HALVED = named(
    "LoRA",
    "rsLoRA",
    "LoRA on Conv1D",
    "LoRA on an embedding",
    "LoRA on Conv2d",
    "LoRA on stacked experts beside linear layers",
    "AdaLoRA after its ranks were reduced",
    "BD-LoRA",
)


@pytest.mark.parametrize(("kind", "model", "dtype"), diagonal(cases(HALVED), ["bfloat16", "float16"]))
def test_what_a_smaller_dtype_loses_is_what_is_reported(kind, model, dtype, workshop, convert, weights):
    case = building.case(workshop, kind, model, "float32")
    made = convert(case.adapter, "--dtype", dtype)
    factors = [tensor for name, tensor in made.tensors.items() if "lora_" in name]
    assert {tensor.dtype for tensor in factors} == {getattr(torch, dtype)}
    wanted, got = (weights(case.base, adapter) for adapter in (case.adapter, made.root))
    assert made.report["loss"]["residual"] > 0
    assert_the_report_is_right(made.report, stored(case.base), wanted, got)
    eps = 2.0 ** -(9 if dtype == "bfloat16" else 12)
    assert (
        made.report["loss"]["relative"] <= 2.01 * eps * 2
    )  # both factors, and what lies below the least float16


def in_bfloat16(adapter: Path, root: Path) -> Path:
    """Return an adapter with the values that bfloat16 has, stored in it."""
    config, tensors = twins.load(adapter)
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    return twins.save(root, config, halved, "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("alpha", "options", "dtype"),
    [
        (8, (), torch.bfloat16),
        (8, ("--bake-scale",), torch.bfloat16),  # times two
        (8, ("--bake-scale", "--pad-rank", "8"), torch.bfloat16),
        (6, ("--pad-rank", "8"), torch.float32),
        (6, ("--bake-scale",), torch.float32),  # times one and a half
        (6, ("--dtype", "bfloat16"), torch.bfloat16),
        (6, ("--rank", "2"), torch.float32),
        (6, ("--rank", "2", "--dtype", "bfloat16"), torch.bfloat16),
    ],
)
def test_factors_keep_their_dtype_where_it_holds_them(
    alpha, options, dtype, trained, convert, weights, tmp_path
):
    base, adapter = trained(lora_alpha=alpha)
    adapter = in_bfloat16(adapter, tmp_path / "halved")
    made = convert(adapter, *options)
    assert {tensor.dtype for tensor in made.tensors.values()} == {dtype}
    assert {module["dtype"] for module in made.report["modules"]} == {
        "BF16" if dtype == torch.bfloat16 else "F32"
    }
    if "--rank" not in options:  # at a power of two, or in float32, nothing is lost
        wanted, got = (weights(base, root) for root in (adapter, made.root))
        assert all(off_by(got[name], wanted[name]) <= MERGED_TOLERANCE for name in wanted)


def test_a_value_that_a_dtype_cannot_hold_is_named(pico, pico_adapter, tampered, refusal):
    adapter = tampered(pico_adapter(pico()))
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def enlarge(tensors):
        tensors[name][3, 1] = 70000.0

    edit_tensors(adapter / "adapter_model.safetensors", enlarge)
    sentence = refusal(adapter, "--dtype", "float16")
    assert "model.layers.1.mlp.down_proj: has factors that float16 cannot hold" in sentence


# A lower rank.


def smallest_rank(change: torch.Tensor, energy: float) -> int:
    """Return how many singular values make up a share of the sum of their squares."""
    squares = torch.linalg.svdvals(change.double()) ** 2
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1


PATTERNED = "LoRA with rank_pattern and alpha_pattern"
"""q_proj has rank 2, layers.1.mlp.down_proj rank 7, the others 4."""

LOWERED = named(
    "LoRA",
    "rsLoRA",
    PATTERNED,
    "LoRA on Conv1D",
    "LoRA on an embedding",
    "LoRA on an untied output embedding",
    "LoRA on Conv1d",
    "LoRA on Conv2d",
    "LoRA on Conv3d",
    "LoRA on stacked experts (target_parameters), two parameters",
    "LoRA on stacked experts beside linear layers",
    "LoRA on a matrix by its parameter's name (target_parameters)",
    "AdaLoRA",
    "BD-LoRA",
    "modules_to_save",
    "trainable_token_indices",
)


@pytest.mark.parametrize(
    ("kind", "model", "options"),
    diagonal(cases(LOWERED), {"rank": ("--rank", "2"), "energy": ("--energy", "0.8")}),
)
def test_what_a_lower_rank_loses_is_what_is_reported(kind, model, options, workshop, convert, weights):
    case = building.case(workshop, kind, model, "float32")
    made = convert(case.adapter, *options, "--base", case.base)
    wanted, got = (weights(case.base, adapter) for adapter in (case.adapter, made.root))
    assert_the_report_is_right(made.report, stored(case.base), wanted, got)
    assert made.report["loss"]["relative"] > 0.05
    lost = [module["loss"] for module in made.report["modules"] if module["loss"]]
    if "--energy" in options:
        assert all(loss["energy"] >= 0.8 for loss in lost)
    layers = lora_layers(loaded(case, made.root))
    assert max(layer.r["default"] for layer in layers.values()) == max(
        m["rank"] for m in made.report["modules"]
    )


def ranks_in_peft(case: building.Case, adapter: Path) -> dict[str, int]:
    """Return the rank of every layer that PEFT makes, by the module's path."""
    layers = lora_layers(loaded(case, adapter))
    return {name.removeprefix(twins.PREFIX): layer.r["default"] for name, layer in layers.items()}


def test_layers_keep_the_ranks_that_are_low_enough(workshop, convert):
    (kind,) = named(PATTERNED)
    case = building.case(workshop, kind, "llama", "float32")
    made = convert(case.adapter, "--rank", "3")
    ranks = ranks_in_peft(case, made.root)
    assert ranks == {path: 2 if path.endswith("q_proj") else 3 for path in ranks}
    assert len(ranks) == 6
    assert {module["path"]: module["rank"] for module in made.report["modules"]} == ranks
    before = {module["path"]: module["rank_before"] for module in made.report["modules"]}
    assert before == ranks_in_peft(case, case.adapter)
    assert made.config["rank_pattern"] == made.config["alpha_pattern"] == {"q_proj": 2}
    assert (made.config["r"], made.config["lora_alpha"]) == (3, 3)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_an_energy_gives_every_layer_the_lowest_rank_that_has_it(energy, workshop, convert, weights):
    (kind,) = named(PATTERNED)
    case = building.case(workshop, kind, "llama", "float32")
    made = convert(case.adapter, "--energy", str(energy))
    base, merged = stored(case.base), weights(case.base, case.adapter)
    wanted = {
        module["path"]: smallest_rank(
            merged[f"{module['path']}.weight"] - base[f"{module['path']}.weight"], energy
        )
        for module in made.report["modules"]
    }
    assert len(set(wanted.values())) > 1
    assert ranks_in_peft(case, made.root) == wanted


def test_a_rank_that_all_layers_have_already_changes_nothing(workshop, convert, weights):
    (kind,) = named("LoRA")
    case = building.case(workshop, kind, "llama", "float32")
    made = convert(case.adapter, "--rank", "4")
    assert made.report["loss"] is None
    wanted, got = (weights(case.base, adapter) for adapter in (case.adapter, made.root))
    assert all(off_by(got[name], wanted[name]) <= MERGED_TOLERANCE for name in wanted)


def test_dora_has_no_lower_rank_of_its_own(workshop, refusal):
    (kind,) = named("DoRA on a linear layer")
    case = building.case(workshop, kind, "llama", "float32")
    sentence = refusal(case.adapter, "--rank", "2")
    assert "is DoRA, and what a lower rank does to it depends on the base's weights" in sentence


def test_a_rank_to_pad_to_that_is_too_low_names_the_module(trained, cli, tmp_path):
    _, adapter = trained(rank_pattern={"layers.1.self_attn.q_proj": 6})
    result = cli("convert", adapter, "--pad-rank", "5", "--out", tmp_path / "out")
    assert result.exit_code == exits.USAGE
    assert "pad_rank: is 5, but model.layers.1.self_attn.q_proj has rank 6" in result.stderr
    assert "--rank 5" in result.stderr
    assert not (tmp_path / "out").exists()


# Plain LoRA of any other kind.


def full_rank(kind, model):
    """Return what tells kinds apart; all that matters of other methods is the change that they make of a weight."""
    return kind.peft_type if kind.group == "other PEFT methods" else algebra(kind, model)


def place(kind, model):
    """Return where a kind's changes are, and what a user has to say of its base."""
    on_embedding = "embed_tokens" in kind.fields.get("target_modules", ())
    return kind.group, model, kind.options, on_embedding


@pytest.fixture
def to_lora(workshop, convert):
    """Return a function (kind, model, keep) → base and adapter, and the plain LoRA that is made of them."""

    def make(kind: Kind, model: str, **keep: Any) -> tuple[building.Case, Converted]:
        if kind.needs:
            pytest.importorskip(kind.needs)
        case = building.case(workshop, kind, model, "float32")
        options = [part for name, value in keep.items() for part in (f"--{name}", value)]
        return case, convert(case.adapter, "--to-lora", "--base", case.base, *kind.options, *options)

    return make


@pytest.mark.parametrize(("kind", "model"), one_for_each(cases(TO_LORA), full_rank, place))
def test_a_lora_of_full_rank_answers_as_any_other_kind_does(kind, model, to_lora):
    case, made = to_lora(kind, model, rank=1000)
    config = made.config
    assert (config["peft_type"], config["use_dora"], config["bias"]) == ("LORA", False, "none")
    assert {config.get(name) for name in ("modules_to_save", "trainable_token_indices", "task_type")} == {
        None
    }
    assert all("lora_" in name and "magnitude" not in name for name in made.tensors)
    assert config["init_lora_weights"] is True
    wanted = building.compute(case.unmerged(), model)
    assert off_by(building.compute(case.plain(), model), wanted) > 0.05
    assert off_by(building.compute(loaded(case, made.root), model), wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize(("kind", "model"), one_for_each(cases(TO_LORA), peft_type))
def test_what_a_lora_of_lower_rank_loses_is_what_is_reported(kind, model, to_lora, weights):
    case, made = to_lora(kind, model, rank=3)
    loaded(case, made.root)
    assert {module["rank"] for module in made.report["modules"]} <= {1, 2, 3}
    wanted = weights(case.base, case.adapter, *kind.options)
    got = weights(case.base, made.root)
    assert_the_report_is_right(made.report, stored(case.base), wanted, got)
    changed = {
        name
        for name in got
        if name not in stored(case.base) or not torch.equal(got[name], stored(case.base)[name])
    }
    assert changed == {name_of(module["path"], got) for module in made.report["modules"]}


@pytest.mark.parametrize(
    "kind",
    [
        *named("LoHa", "DoRA on a linear layer", "IA³ on a convolution", "modules_to_save"),
        *WITHOUT_BIASES[:1],
    ],
    ids=lambda kind: slug(kind.name),
)
def test_a_lora_of_some_energy_has_it(kind, to_lora, weights):
    model = kind.models[0]
    case, made = to_lora(kind, model, energy=0.9)
    wanted, got = (weights(case.base, adapter) for adapter in (case.adapter, made.root))
    assert_the_report_is_right(made.report, stored(case.base), wanted, got)
    losses = [module["loss"] for module in made.report["modules"] if module["loss"]]
    assert losses
    assert all(loss["energy"] >= 0.9 * (1 - 1e-5) for loss in losses)
    base = stored(case.base)
    for module in made.report["modules"]:
        name = f"{module['path']}.weight"
        change = (wanted[name].double() - base[name].double()).flatten(1)
        assert module["rank"] <= max(smallest_rank(change, 0.9), module.get("rank_before") or 0)


TIED = {
    "trained tokens": {"trainable_token_indices": [1, 17, 80]},
    "trained tokens, both ends": {"trainable_token_indices": {"embed_tokens": [1, 17], "lm_head": [5, 33]}},
    "a whole embedding": {"modules_to_save": ["embed_tokens"]},
    "both ends as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on both ends as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "DoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "DoRA on the output": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("fields", TIED.values(), ids=TIED)
def test_a_lora_has_both_ends_of_a_tie_where_both_are_changed(fields, trained, convert, answer, tampered):
    base, adapter = trained("llama_tied", **fields)
    adapter = tampered(adapter)
    if "use_dora" not in fields and "target_modules" not in fields:
        edit_tensors(adapter / "adapter_model.safetensors", _enlarge_whole)
    made = convert(adapter, "--to-lora", "--rank", "96", "--base", base)
    (_, plain), (_, wanted), (_, got) = (answer(base, root) for root in (None, adapter, made.root))
    assert off_by(plain, wanted) > 0.05
    assert off_by(got, wanted) <= FACTORISED_TOLERANCE


def _enlarge_whole(tensors: dict[str, torch.Tensor]) -> None:
    """Change what is carried whole, which is but a copy so far."""
    for name in [name for name in tensors if "lora_" not in name]:
        tensors[name] = tensors[name] * 1.5


def test_a_lora_of_mlx_on_a_tied_embedding_counts_at_both_ends(trained, convert, cli, answer, tmp_path):
    base, adapter = trained("llama_tied", target_modules=["q_proj", "embed_tokens"])
    adapter = twins.mlx(adapter, tmp_path / "mlx")
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "merged").exit_code == exits.OK
    _, wanted = answer(tmp_path / "merged")
    for options in ((), ("--to-lora",)):
        _, got = answer(base, convert(adapter, *options, "--base", base).root)
        assert off_by(got, wanted) <= EXACT_TOLERANCE


@pytest.mark.parametrize(
    "kind",
    named("DoRA on a linear layer", "LoHa", "OFT", "modules_to_save", "trainable_token_indices"),
    ids=lambda kind: slug(kind.name),
)
def test_a_base_in_bfloat16_is_changed_as_its_values_in_float32_are(kind, workshop, convert, tmp_path):
    case = building.case(workshop, kind, "llama", "bfloat16")
    wide = tmp_path / "wide"
    shutil.copytree(case.base, wide)
    edit_tensors(wide / "model.safetensors", _widen)
    edit_json(wide / "config.json", dtype="float32")
    options = ("--to-lora", "--rank", "8", "--dtype", "float32", "--base")
    ours, theirs = (convert(case.adapter, *options, base) for base in (case.base, wide))
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    assert ours.report["loss"] == theirs.report["loss"]


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()


def test_a_convolution_in_groups_is_no_lora(refusal, tmp_path):
    """PEFT groups B too, so that its LoRA on such a layer is another."""
    import transformers
    from peft import LoHaConfig, get_peft_model

    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = transformers.ConvNextModel(config)
    model.save_pretrained(base)
    loha = get_peft_model(model, LoHaConfig(r=4, target_modules=["dwconv"]))
    building.perturb(loha, 0.2)
    loha.save_pretrained(adapter)
    sentence = refusal(adapter, "--to-lora", "--rank", "4", "--base", base)
    assert "dwconv.weight: is a grouped convolution" in sentence


@pytest.mark.parametrize(("kind", "model"), cases(NO_MATRIX))
def test_what_no_matrix_changes_is_refused(kind, model, workshop, refusal):
    case = building.case(workshop, kind, model, "float32")
    sentence = refusal(case.adapter, "--to-lora", "--rank", "4", "--base", case.base)
    wanted = (
        "whose output projection PEFT changes twice"
        if kind.name == ATTENTION_TWICE
        else "LoRA cannot resize"
        if "vocabulary" in kind.name
        else "LoRA can change matrices only"
    )
    assert wanted in sentence
    assert "merge it" in sentence


@pytest.mark.parametrize(
    "kind", named("LoHa", "DoRA on a linear layer", "modules_to_save"), ids=lambda k: slug(k.name)
)
def test_how_much_is_kept_has_to_be_said(kind, workshop, refusal):
    case = building.case(workshop, kind, "llama", "float32")
    sentence = refusal(case.adapter, "--to-lora", "--base", case.base)
    assert "--rank N or --energy SHARE" in sentence


@pytest.mark.parametrize(
    "kind",
    named("LoRA on a matrix by its parameter's name (target_parameters)", "LoRA", "AdaLoRA", "BD-LoRA"),
    ids=lambda kind: slug(kind.name),
)
def test_what_has_factors_needs_no_rank_to_be_a_lora(kind, workshop, convert):
    case = building.case(workshop, kind, "llama", "float32")
    made = convert(case.adapter, "--to-lora", "--base", case.base)
    assert made.report["loss"] is None
    wanted = building.compute(case.unmerged(), "llama")
    assert off_by(building.compute(loaded(case, made.root), "llama"), wanted) <= EXACT_TOLERANCE


def test_a_router_that_is_a_parameter_is_neither_taken_apart_nor_made_twice(workshop, convert):
    (kind,) = named("LoRA on a router by its parameter's name (target_parameters)")
    case = building.case(workshop, kind, "gpt_oss", "float32")
    made = convert(case.adapter, "--to-lora", "--base", case.base)
    assert [module["path"] for module in made.report["modules"]] == [
        f"model.layers.{n}.mlp.router.weight" for n in range(2)
    ]
    assert (
        off_by(
            building.compute(loaded(case, made.root), "gpt_oss"), building.compute(case.unmerged(), "gpt_oss")
        )
        <= EXACT_TOLERANCE
    )


def test_a_change_that_is_not_finite_is_named(workshop, refusal, tampered):
    (kind,) = named("LoHa")
    case = building.case(workshop, kind, "llama", "float32")
    base = tampered(case.base, "base")
    name = "model.layers.1.self_attn.v_proj.weight"

    def spoil(tensors):
        tensors[name][2, 3] = float("nan")

    edit_tensors(base / "model.safetensors", spoil)
    sentence = refusal(case.adapter, "--to-lora", "--rank", "4", "--base", base)
    assert "model.layers.1.self_attn.v_proj" in sentence
    assert "NaN or infinite" in sentence


# Experts one by one and stacked, names of transformers 4 and 5.

MIXTURES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3")


def family_case(workshop: Path, name: str, naming: str, layout: str) -> tuple[Any, Path, Any]:
    """Return a family, its base, and an adapter."""
    family = family_building.by_name(name)
    base = family_building.base(workshop, name, layout)
    return family, base, family_building.trained(workshop, name, naming)


def in_peft(workshop: Path, family: Any, adapter: Path) -> torch.Tensor:
    """Return what PEFT makes of an adapter on the model of transformers 5."""
    from peft import PeftModel

    model = family_building.load(family_building.base(workshop, family.name, "published"), family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unmerged = PeftModel.from_pretrained(model, adapter)
    assert [str(one.message) for one in caught if "adapter keys" in str(one.message)] == []
    return family_building.compute(unmerged, family)


def assert_merge_alike(weights, base: Path, adapter: Path, made: Converted, tolerance: float) -> None:
    wanted, got = (weights(base, root) for root in (adapter, made.root))
    assert got.keys() == wanted.keys()
    assert {name: e for name in wanted if (e := off_by(got[name], wanted[name])) > tolerance} == {}


def is_stack(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


@pytest.mark.parametrize("layout", ["published", "in shards"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_split_merge_to_the_same_bits(name, layout, workshop, convert, weights):
    family, base, trained = family_case(workshop, name, "transformers 5", layout)
    made = convert(trained.adapter, "--split-experts", "--base", base)
    paths = {module["path"] for module in made.report["modules"]}
    assert not any(map(is_stack, paths))
    assert "target_parameters" not in made.config
    experts = {path for path in paths if re.search(r"\.experts\.\d+\.", path)}
    assert experts
    assert {f"{path}.weight" for path in experts} <= stored(base).keys()
    assert {path.rpartition(".")[2] for path in experts} == set(family.experts)
    assert_merge_alike(weights, base, trained.adapter, made, 0.0)


@pytest.mark.parametrize("layout", ["published", "in memory"])
@pytest.mark.parametrize("name", [*MIXTURES, "Jamba"])
def test_experts_that_are_stacked_merge_alike_and_answer_in_peft(name, layout, workshop, convert, weights):
    family, base, trained = family_case(workshop, name, "transformers 4", layout)
    made = convert(trained.adapter, "--fuse-experts", "--base", base)
    paths = {module["path"] for module in made.report["modules"]}
    assert not any(re.search(r"\.experts\.\d+\.", path) for path in paths)
    stacks = [module for module in made.report["modules"] if is_stack(module["path"])]
    ranks = {module["path"].rpartition(".")[2]: module["rank"] for module in stacks}
    assert ranks == {"gate_up_proj": 8, "down_proj": 4}  # gate and up have factors side by side
    assert_merge_alike(weights, base, trained.adapter, made, MERGED_TOLERANCE)
    assert off_by(in_peft(workshop, family, made.root), trained.wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_experts_with_ranks_and_scales_of_their_own_are_stacked(name, workshop, convert, weights):
    family = family_building.by_name(name)
    recipe = family_building.Recipe(
        rslora=True,
        ranks={r"experts\.1\.(w1|gate_proj)": 2, r"experts\.\d+\.(w2|down_proj)": 3, "q_proj": 5},
        alphas={r"experts\.2\.(w3|up_proj)": 11, r"layers\.1\..*\.experts\.0\.(w1|gate_proj)": 1},
    )
    trained = family_building.written(workshop, family, "transformers 4", recipe)
    base = family_building.base(workshop, name, "published")
    made = convert(trained.adapter, "--fuse-experts", "--base", base)
    assert_merge_alike(weights, base, trained.adapter, made, MERGED_TOLERANCE)
    assert off_by(in_peft(workshop, family, made.root), trained.wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize("naming", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_split_and_stacked_again_merge_alike(name, naming, workshop, convert, weights):
    family, base, trained = family_case(workshop, name, naming, "published")
    options = [("--fuse-experts", "--rename", "v5"), ("--split-experts", "--rename", "v4")]
    first, second = options if naming == "transformers 4" else reversed(options)
    there = convert(trained.adapter, *first, "--base", base)
    back = convert(there.root, *second, "--base", base)
    assert_merge_alike(weights, base, trained.adapter, there, MERGED_TOLERANCE)
    assert_merge_alike(weights, base, trained.adapter, back, MERGED_TOLERANCE)
    ours = there if naming == "transformers 4" else back
    assert off_by(in_peft(workshop, family, ours.root), trained.wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize("option", ["--split-experts", "--fuse-experts"])
def test_experts_that_are_as_wanted_stay_so(option, workshop, convert, weights):
    naming = "transformers 4" if option == "--split-experts" else "transformers 5"
    _, base, trained = family_case(workshop, "Mixtral", naming, "published")
    made = convert(trained.adapter, option, "--base", base)
    before = load_file(trained.adapter / "adapter_model.safetensors")
    assert made.tensors.keys() == before.keys()
    assert all(torch.equal(made.tensors[key], before[key]) for key in before)


@pytest.mark.parametrize("transform", ["bake", "pad", "all"])
@pytest.mark.parametrize("option", ["--split-experts", "--fuse-experts"])
def test_experts_are_taken_apart_or_stacked_before_all_else_is_done(
    option, transform, workshop, convert, weights
):
    naming = "transformers 5" if option == "--split-experts" else "transformers 4"
    _, base, trained = family_case(workshop, "Qwen3-MoE", naming, "published")
    made = convert(trained.adapter, option, *TRANSFORMS[transform], "--base", base)
    assert_merge_alike(weights, base, trained.adapter, made, MERGED_TOLERANCE)
    if transform != "pad":
        assert {module["scale"] for module in made.report["modules"]} == {1}
    if transform != "bake":
        assert {module["rank"] for module in made.report["modules"]} == {8}


def test_stacked_experts_of_a_lower_rank_lose_what_is_reported(workshop, convert, weights):
    _, base, trained = family_case(workshop, "Qwen3-MoE", "transformers 4", "in memory")
    made = convert(trained.adapter, "--fuse-experts", "--rank", "3", "--base", base)
    wanted, got = (weights(base, root) for root in (trained.adapter, made.root))
    assert {module["rank"] for module in made.report["modules"]} == {3}
    assert_the_report_is_right(made.report, stored(base), wanted, got)


def adalora_of(adapter: Path, root: Path) -> Path:
    """Return an AdaLoRA with the factors of a LoRA, each with singular values."""
    config, tensors = twins.load(adapter)
    for name in [name for name in tensors if "lora_A" in name]:
        e = torch.linspace(0.5, 1.5, len(tensors[name]))[:, None]
        tensors[name.replace("lora_A.weight", "lora_E")] = e
    spelled = {re.sub(r"(lora_[AB])\.weight", r"\1", name): tensor for name, tensor in tensors.items()}
    fields = {
        "peft_type": "ADALORA", "init_r": config["r"], "target_r": 2, "total_step": 10, "lora_alpha": 6,
        "target_modules": config["target_modules"], "rank_pattern": None,
    }  # fmt: skip
    return twins.save(root, fields, spelled, "adapter_model.safetensors")


def test_adalora_on_every_expert_is_stacked_with_its_scale(workshop, convert, weights, tmp_path):
    _, base, trained = family_case(workshop, "Mixtral", "transformers 4", "published")
    adapter = adalora_of(trained.adapter, tmp_path / "adalora")
    made = convert(adapter, "--fuse-experts", "--base", base)
    assert_merge_alike(weights, base, adapter, made, MERGED_TOLERANCE)


def dora_of(adapter: Path, root: Path, base: Path) -> Path:
    """Return a DoRA with the factors of a LoRA, and lengths that are not the base's."""
    config, tensors = twins.load(adapter)
    before = stored(base)
    for name in [name for name in tensors if "lora_A" in name]:
        module = name.removeprefix(twins.PREFIX).removesuffix(".lora_A.weight")
        lengths = before[f"{module}.weight"].norm(dim=1) * 1.1
        tensors[f"{twins.PREFIX}{module}.lora_magnitude_vector"] = lengths
    return twins.save(root, {**config, "use_dora": True}, tensors, "adapter_model.safetensors")


def test_dora_on_every_expert_is_made_a_lora_before_it_is_stacked(
    workshop, convert, refusal, weights, tmp_path
):
    _, base, trained = family_case(workshop, "Mixtral", "transformers 4", "published")
    adapter = dora_of(trained.adapter, tmp_path / "dora", base)
    assert "has DoRA or a bias" in refusal(adapter, "--fuse-experts", "--base", base)
    at_once = refusal(adapter, "--fuse-experts", "--to-lora", "--rank", "64", "--base", base)
    assert "convert it to plain LoRA first" in at_once
    plain = convert(adapter, "--to-lora", "--rank", "64", "--base", base)
    made = convert(plain.root, "--fuse-experts", "--base", base)
    assert_merge_alike(weights, base, plain.root, made, MERGED_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "naming", "layout", "option", "sentence"),
    [
        (
            "Mixtral",
            "transformers 5",
            "in memory",
            ("--split-experts",),
            "pass a --base that stores each expert separately",
        ),
        (
            "gpt-oss",
            "transformers 5",
            "published",
            ("--split-experts",),
            "pass a --base that stores each expert separately",
        ),
        ("Mixtral", "transformers 5", "published", ("--rename", "v4"), "add --split-experts"),
        ("Qwen3-MoE", "transformers 4", "published", ("--rename", "v5"), "add --fuse-experts"),
        ("DINOv2", "transformers 5", "published", ("--rename", "v4"), "leave out --rename"),
    ],
)
def test_what_has_no_name_of_its_own_says_what_to_do(
    name, naming, layout, option, sentence, workshop, refusal
):
    _, base, trained = family_case(workshop, name, naming, layout)
    assert sentence in refusal(trained.adapter, *option, "--base", base)


RENAMED = ("Qwen2-VL", "LLaVA", "Gemma 3", "GPT-NeoX", "InternVL")


@pytest.mark.parametrize("layout", ["published", "in memory"])
@pytest.mark.parametrize(
    ("name", "naming"),
    [(name, n) for name in RENAMED for n in family_building.by_name(name).namings() if n != "transformers 5"],
)
def test_names_of_transformers_5_are_those_that_peft_finds_there(
    name, naming, layout, workshop, convert, weights
):
    family, base, trained = family_case(workshop, name, naming, layout)
    made = convert(trained.adapter, "--rename", "v5", "--base", base)
    parameters = family_building.made(name).state_dict()
    assert {f"{module['path']}.weight" for module in made.report["modules"]} <= parameters.keys()
    assert_merge_alike(weights, base, trained.adapter, made, 0.0)
    assert off_by(in_peft(workshop, family, made.root), trained.wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize("layout", ["published", "in memory"])
@pytest.mark.parametrize("name", RENAMED)
def test_names_of_transformers_4_are_those_that_were_published(name, layout, workshop, convert, weights):
    _, base, trained = family_case(workshop, name, "transformers 5", layout)
    made = convert(trained.adapter, "--rename", "v4", "--base", base)
    published = family_building.tensors(
        family_building.made(name), family_building.by_name(name), "published"
    )
    assert {f"{module['path']}.weight" for module in made.report["modules"]} <= published.keys()
    assert_merge_alike(weights, base, trained.adapter, made, 0.0)


@pytest.mark.parametrize("layout", ["published", "Hub"])
def test_stacks_that_are_published_as_stacks_have_one_name(layout, workshop, convert, weights):
    family, base, trained = family_case(workshop, "Qwen3-VL-MoE", "transformers 5", layout)
    for rename in ("v4", "v5"):
        made = convert(trained.adapter, "--rename", rename, "--base", base)
        assert_merge_alike(weights, base, trained.adapter, made, 0.0)
        assert off_by(in_peft(workshop, family, made.root), trained.wanted) <= FACTORISED_TOLERANCE


@pytest.mark.parametrize("naming", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize(("rename", "joined"), [("v4", 0), ("v5", 1)])
def test_parameters_that_share_a_module_by_their_other_name_are_nested_anew(
    rename, joined, naming, workshop, convert, weights
):
    """Granite's stacks are a module each in transformers 4, and parameters of one in 5, of which PEFT nests one."""
    _, base, trained = family_case(workshop, "Granite-MoE", naming, "published")
    made = convert(trained.adapter, "--rename", rename, "--base", base)
    assert sum("base_layer" in name for name in made.tensors) == joined * 2 * 2
    assert_merge_alike(weights, base, trained.adapter, made, 0.0)


def test_a_module_that_is_carried_whole_is_renamed_too(workshop, convert, weights, tmp_path):
    _, base, trained = family_case(workshop, "LLaVA", "transformers 4", "published")
    config, tensors = twins.load(trained.adapter)
    name = "multi_modal_projector.linear_2"
    tensors[f"{twins.PREFIX}{name}.weight"] = stored(base)[f"{name}.weight"] * 2
    tensors[f"{twins.PREFIX}{name}.bias"] = stored(base)[f"{name}.bias"] * 3
    config |= {"modules_to_save": ["linear_2"]}
    adapter = twins.save(tmp_path / "whole", config, tensors, "adapter_model.safetensors")
    made = convert(adapter, "--rename", "v5", "--base", base)
    assert f"{twins.PREFIX}model.{name}.weight" in made.tensors
    assert made.report["n_whole"] == 2
    assert_merge_alike(weights, base, adapter, made, 0.0)


def test_a_wrong_conversion_would_be_seen(trained, convert, answer):
    """The comparison of answers notices one rank of one module."""
    base, adapter = trained()
    made = convert(adapter, *TRANSFORMS["all"])
    spoiled = made.root.with_name("spoiled")
    shutil.copytree(made.root, spoiled)

    def spoil(tensors):
        tensors[f"{twins.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"][3] = 0

    edit_tensors(spoiled / "adapter_model.safetensors", spoil)
    (_, wanted), (_, got) = (answer(base, root) for root in (adapter, spoiled))
    assert off_by(got, wanted) > 100 * EXACT_TOLERANCE
