"""Every family × names of the adapter × layout of the base: the real command against forward passes."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from tests.crossing import diagonal, one_for_each
from tests.parity import family_building as building
from tests.parity.families import FAMILIES, Layout, cells

# As in test_kinds.py: no inner dimension is larger than 256, and each product adds √n·2⁻²⁴ of its size. These
# models have up to four layers behind a tower of two: some thirty products lie one after the other.
FLOAT32_TOLERANCE = 3e-5

# A wrong merge is off by about the adapter's effect, which is three orders of magnitude above the tolerance.
LEAST_EFFECT = 0.05


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")


def matrix():
    return [pytest.param(*cell, id="-".join((slug(cell[0].name), *map(slug, cell[1:])))) for cell in cells()]


def families(*, old: bool = False):
    return [
        pytest.param(family, id=slug(family.name))
        for family in FAMILIES
        if not old or "transformers 4" in family.namings()
    ]


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def files_of(root):
    """Return the file of every tensor, as its header says."""
    found = {}
    for path in root.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found |= dict.fromkeys(json.loads(file.read(size)), path.name)
    found.pop("__metadata__", None)
    return found


def expected_tensors(family, layout: Layout, state):
    """Return the tensors that transformers would write for the merged model, in a layout of disk."""
    return building.tensors(building.merged_model(family, state), family, layout)


def raw(tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
    )


@pytest.mark.parametrize(
    ("family", "naming", "layout"),
    one_for_each(
        matrix(),
        lambda family, *_: family.name,
        lambda family, _, layout: (family.structure(), layout),
        lambda _, naming, layout: (naming, layout),
    ),
)
def test_the_merged_checkpoint_computes_what_base_and_adapter_compute(
    family, naming, layout, workshop, merged, stored, record_property
):
    record_property("family", [family.name, naming, layout])
    base = building.base(workshop, family.name, layout)
    trained = building.trained(workshop, family.name, naming)
    assert off_by(building.compute(building.made(family.name), family), trained.wanted) > LEAST_EFFECT

    out = merged(base, trained.adapter)

    error = off_by(building.compute(building.load(out, family), family), trained.wanted)
    record_property("measured", f"{error:.1e}")
    assert error <= FLOAT32_TOLERANCE
    before, after = stored(base), stored(out)
    assert files_of(out) == files_of(base)
    expected = expected_tensors(family, layout, trained.state)
    touched = {name for name, tensor in expected.items() if raw(tensor) != before[name].raw}
    assert touched
    assert [name for name in before if name not in touched and after[name] != before[name]] == []
    for name in touched:
        got = torch.frombuffer(bytearray(after[name].raw), dtype=torch.float32).view(expected[name].shape)
        assert off_by(got, expected[name]) <= FLOAT32_TOLERANCE, name
        assert after[name] != before[name], name


@pytest.mark.parametrize("family", one_for_each(families(), lambda family: family.structure()))
def test_the_parameters_of_the_oracle_compute_its_answer(family, workshop):
    # PEFT's forward pass does not merge, and the parameters come from PEFT's merge: two ways to one answer.
    trained = building.trained(workshop, family.name, "transformers 5")
    model = building.merged_model(family, trained.state)
    assert off_by(building.compute(model, family), trained.wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", one_for_each(families(old=True), lambda family: family.structure()))
def test_names_of_transformers_4_are_published_names_and_the_oracle_puts_their_changes_there(
    family, workshop, tmp_path
):
    # Independent of where the oracle thinks that a name lies: the stored tensor of that very name is changed,
    # and transformers loads the result by its own rules.
    trained = building.trained(workshop, family.name, "transformers 4")
    layout: Layout = "Hub" if family.hub else "published"
    found = building.tensors(building.made(family.name), family, layout)
    for name, change in trained.changes.items():
        found[f"{name}.weight"] = found[f"{name}.weight"] + change
    out = building.write(tmp_path / "by-name", building.made(family.name), found)
    got = building.compute(building.load(out, family), family)
    assert off_by(got, trained.wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", families())
def test_a_family_lists_every_layout_that_it_has(family, workshop):
    model = building.made(family.name)
    published = {name: t.shape for name, t in building.tensors(model, family, "published").items()}
    in_memory = {name: t.shape for name, t in building.tensors(model, family, "in memory").items()}
    assert (published != in_memory) == family.in_memory
    hub = building.tensors(model, family, "Hub")
    assert ({name: t.shape for name, t in hub.items()} != published) == ("Hub" in family.layouts())


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if "in shards" in f.layouts()], ids=lambda f: slug(f.name)
)
def test_in_shards_the_experts_of_one_layer_lie_in_several_files(family, workshop):
    files = files_of(building.base(workshop, family.name, "in shards"))
    layers: dict[str, set[str]] = {}
    for name, file in files.items():
        if ".experts." in name:
            layers.setdefault(name.partition(".experts.")[0], set()).add(file)
    assert layers
    assert min(map(len, layers.values())) > 1


def test_every_family_has_its_own_name():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


RECIPES = {
    "rslora": building.Recipe(r=4, alpha=3, rslora=True),
    "patterns": building.Recipe(
        ranks={r"experts\.1\.(w1|gate_proj)": 2, r"experts\.\d+\.(w2|down_proj)": 3, "q_proj": 5},
        alphas={r"experts\.2\.(w3|up_proj)": 11, r"layers\.1\..*\.experts\.0\.(w1|gate_proj)": 1},
    ),
    "rslora_and_patterns": building.Recipe(
        rslora=True, ranks={r"(w3|up_proj)": 2}, alphas={r"experts\.3\.(w1|w2|gate_proj|down_proj)": 2}
    ),
}
"""What PEFT's own conversion of such adapters gets wrong: the scale and the rank are those of each expert."""


@pytest.mark.parametrize(
    ("recipe", "name", "layout"),
    diagonal(RECIPES.keys(), ["Qwen3-MoE", "Mixtral"], ["in memory", "published"]),
)
def test_every_expert_has_its_own_rank_and_scale(name, layout, recipe, workshop, merged):
    family = building.by_name(name)
    trained = building.written(workshop, family, "transformers 4", RECIPES[recipe])
    out = merged(building.base(workshop, name, layout), trained.adapter)
    assert off_by(building.compute(building.load(out, family), family), trained.wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layout", ["published", "in memory"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_stacked_experts_have_the_ranks_and_scales_that_their_patterns_give(
    name, layout, rslora, workshop, merged
):
    family = building.by_name(name)
    recipe = building.Recipe(
        rslora=rslora, ranks={r"experts\.gate_up_proj": 2}, alphas={r"layers\.1\.mlp\.experts\.down_proj": 9}
    )
    trained = building.trained_by_peft(workshop, family, recipe)
    out = merged(building.base(workshop, name, layout), trained.adapter)
    assert off_by(building.compute(building.load(out, family), family), trained.wanted) <= FLOAT32_TOLERANCE


OLD_TARGETS = {
    "Mixtral": ["q_proj", "w1", "w2", "w3"],
    "Qwen3-MoE": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "OLMoE": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}
"""What people have always written; for stacked experts PEFT turns it into ``target_parameters`` without a path."""


@pytest.mark.parametrize(
    ("name", "layout", "rslora"),
    diagonal(OLD_TARGETS.keys(), ["published", "in memory"], [False, True]),
)
def test_targets_that_peft_turns_into_parameters(name, layout, rslora, workshop, merged):
    family = dataclasses.replace(building.by_name(name), modules=tuple(OLD_TARGETS[name]), parameters=())
    trained = building.trained_by_peft(workshop, family, building.Recipe(rslora=rslora))
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == {"gate_up_proj", "down_proj"}
    out = merged(building.base(workshop, name, layout), trained.adapter)
    assert off_by(building.compute(building.load(out, family), family), trained.wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("naming", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GLM-4-MoE", "Qwen2-VL"])
def test_tensors_that_no_model_loads_come_out_as_they_went_in(name, naming, workshop, merged, stored):
    base = building.base(workshop, name, "published")
    before, after = stored(base), stored(merged(base, building.trained(workshop, name, naming).adapter))
    extras = building.extra_shapes(name)
    assert {extra: after[extra] for extra in extras} == {extra: before[extra] for extra in extras}


# What an adapter of another structure would need is in none of the stored tensors: it is refused, by name.


@pytest.mark.parametrize(
    ("name", "module", "n_out", "n_in"),
    [
        ("Phi-3", "model.layers.0.self_attn.q_proj", 64, 64),  # a part of qkv_proj, of which one cannot know
        (
            "gpt-oss",
            "model.layers.0.mlp.experts.0.gate_proj",
            40,
            64,
        ),  # columns of gate_up_proj are interleaved
        ("Mixtral", "model.layers.0.block_sparse_moe.experts.9.w1", 40, 64),
        ("Qwen2-VL", "visual.blocks.7.attn.qkv", 96, 32),
        ("LLaVA", "language_model.model.layers.0.mlp.w1", 80, 64),
    ],
)
def test_a_module_that_a_family_does_not_have_is_refused_by_its_name(
    name, module, n_out, n_in, workshop, cli, tmp_path
):
    family = building.by_name(name)
    place = building.Place(module, n_out, n_in, ())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    target = module.rpartition(".")[2]
    building.write_adapter(adapter, family, [place], {"target_modules": [target]}, building.PLAIN)
    base = building.base(workshop, name, "published")
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert module in re.sub(r"\s", "", result.output)
    assert not (tmp_path / "out").exists()
