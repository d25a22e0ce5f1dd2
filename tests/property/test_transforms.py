"""What a written configuration means: PEFT's own functions, on generated trees, ranks and scales."""

from __future__ import annotations

import json
from types import SimpleNamespace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_merge.conversion import listed, module_paths, scaling
from lora_merge.peft_rules.scaling import Scaling

STEMS = ("", "model.", "draft.model.", "language_model.model.", "0.")
BLOCKS = ("layers.{}.self_attn", "layers.{}.mlp.experts.1", "layers.{}.mlp.experts.11", "h.{}", "merger.mlp")
LEAVES = ("q_proj", "v_proj", "qv_proj", "proj", "0", "1", "q+v", "q.proj", "layers")

inner_paths = st.builds(
    lambda stem, block, layer, leaf: f"{stem}{block.format(layer)}.{leaf}",
    st.sampled_from(STEMS),
    st.sampled_from(BLOCKS),
    st.integers(0, 12),
    st.sampled_from(LEAVES),
)
outer_paths = st.sampled_from(
    [
        "lm_head",
        "model.lm_head",
        "embed_tokens",
        "model.embed_tokens",
        "q_proj",
        "layers.1.q_proj",
        "h.1.1.proj",
    ]
)
trees = st.lists(inner_paths | outer_paths, min_size=1, max_size=12, unique=True)
ranks = st.sampled_from([1, 4, 8, 16, 64])
scales = st.sampled_from([1.0, 2.0, 0.5, 1.5, 1 / 3, -0.25, 12 / 64**0.5, 1e-7, 0.0]) | st.floats(-1e4, 1e4)


@st.composite
def trees_and_targets(draw):
    """All modules that have weights, and those that are meant."""
    tree = draw(trees)
    return tree, draw(st.lists(st.sampled_from(tree), min_size=1, unique=True))


def by_peft(targets, modules):
    """Return the modules that PEFT takes; it loads a list of names as a set."""
    loaded = SimpleNamespace(
        target_modules=targets if isinstance(targets, str) else set(targets), target_parameters=None
    )
    return {path for path in modules if check_target_module_exists(loaded, path)}


@settings(max_examples=200, deadline=None)
@given(trees_and_targets())
@example(
    (["merger.mlp.0", "layers.0.q_proj"], ["merger.mlp.0"])
)  # a container has a number for its name, too
@example((["q_proj", "model.q_proj"], ["q_proj"]))  # every name of the one is a name of the other
@example((["a.conv", "b.conv.inner"], ["a.conv"]))
def test_listed_targets_are_the_modules_that_were_meant_and_no_others(tree_and_targets):
    tree, targets = tree_and_targets
    modules = module_paths(f"{path}.weight" for path in tree)
    assert set(tree) <= modules
    names = json.loads(json.dumps(listed(targets, modules)))
    assert by_peft(names, modules) == set(targets)


@settings(max_examples=200, deadline=None)
@given(trees_and_targets())
def test_targets_are_a_list_wherever_one_will_do(tree_and_targets):
    tree, targets = tree_and_targets
    modules = module_paths(f"{path}.weight" for path in tree)
    names = listed(targets, modules)
    assert isinstance(names, list) == (by_peft(targets, modules) == set(targets))


@settings(max_examples=200, deadline=None)
@given(trees)
def test_without_a_base_whole_paths_are_listed(targets):
    assert listed(targets, ()) == sorted(targets)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_a_name_stands_for_all_modules_of_a_base_that_end_in_it(tree):
    modules = module_paths(f"{path}.weight" for path in tree)
    names = listed(tree, modules)
    for path in tree if isinstance(names, list) else ():
        last = path.rpartition(".")[2]
        is_theirs = {m for m in modules if m.rpartition(".")[2] == last} <= set(tree)
        assert (last in names) is (is_theirs and not last.isdecimal()) or path in names


@st.composite
def ranks_and_scales(draw):
    """Modules with their ranks and scales; several often share one."""
    few = draw(st.lists(st.tuples(ranks, scales), min_size=1, max_size=3))
    return {path: draw(st.sampled_from(few)) for path in draw(trees)}


SIMILAR = {"h.1.1.q": (4, 1.0), "h.121.q": (8, 1.0), "h.2.q": (4, 1.0), "h.3.q": (4, 1.0)}
"""A dot in a regex is any character."""

ENDING_ALIKE = {"q_proj": (8, 2.0), "model.q_proj": (4, 1.0), "draft.model.q_proj": (4, 1.0)}
"""A pattern for the first is found at the end of the others."""


@settings(max_examples=200, deadline=None)
@given(ranks_and_scales())
@example(SIMILAR)
@example(ENDING_ALIKE)
def test_patterns_give_every_module_its_rank_and_its_scale(modules):
    config = json.loads(json.dumps(scaling(modules), sort_keys=True))  # as PEFT saves it
    reader = Scaling(config)
    for path, (rank, scale) in modules.items():
        of_rank, of_alpha = (
            get_pattern_key(config[f"{key}_pattern"].keys(), path) for key in ("rank", "alpha")
        )
        r = config["rank_pattern"].get(of_rank, config["r"])
        alpha = config["alpha_pattern"].get(of_alpha, config["lora_alpha"])
        assert r == rank
        assert abs(alpha / r - scale) <= 2.0**-52 * abs(scale)  # a product and a quotient
        assert reader.of(path, rank) == (alpha / r, [])


@settings(max_examples=100, deadline=None)
@given(ranks_and_scales())
def test_no_pattern_is_written_that_means_nothing(modules):
    config = scaling(modules)
    assert not config["use_rslora"]
    assert Scaling(config).unmatched(modules) == []
    if len(set(modules.values())) == 1:
        assert config["rank_pattern"] == config["alpha_pattern"] == {}


@settings(max_examples=100, deadline=None)
@given(trees)
def test_module_paths_are_all_that_stand_on_the_way_to_a_parameter(tree):
    found = module_paths(f"{path}.weight" for path in tree)
    wanted = {".".join(path.split(".")[:n]) for path in tree for n in range(1, len(path.split(".")) + 1)}
    assert found == wanted
