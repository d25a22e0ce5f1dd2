"""Which modules are meant: PEFT's own functions against ours, on generated trees and configurations."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.targets import TargetRule, matching_patterns

STEMS = ("", "model.", "transformer.", "language_model.model.", "0.")
STACKS = ("layers", "h", "blocks", "my_layers")
BLOCKS = ("self_attn", "mlp", "mlp.experts.1", "attn.3", "layers.2.mlp")
LEAVES = ("q_proj", "v_proj", "proj", "xq_proj", "0")

layer_paths = st.builds(
    "{}{}.{}.{}.{}".format,
    st.sampled_from(STEMS),
    st.sampled_from(STACKS),
    st.integers(0, 12),
    st.sampled_from(BLOCKS),
    st.sampled_from(LEAVES),
)
other_paths = st.sampled_from(
    ["lm_head", "model.lm_head", "model.embed_tokens", "q_proj", "layers.1.q_proj", "layers.1"]
)
trees = st.lists(layer_paths | other_paths, min_size=1, max_size=12, unique=True)


@st.composite
def suffixes(draw, tree):
    """The end of a module's path: whole, from a dot on, or from the middle of a word."""
    path = draw(st.sampled_from(tree))
    if draw(st.booleans()):
        parts = path.split(".")
        return ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])
    return path[draw(st.integers(0, len(path) - 1)) :]


@st.composite
def regexes(draw, tree):
    """A regular expression made of pieces of the tree, with look-aheads, groups and flags."""
    one, other = (re.escape(draw(suffixes(tree))) for _ in range(2))
    template = draw(
        st.sampled_from(
            [
                r"{0}",
                r".*{0}",
                r".*\.({0}|{1})",
                r"^(?!.*{1}).*{0}$",
                r".*\.\d+\..*",
                r"(?i).*{0}",
                r".*\.(?P<leaf>q_proj|v_proj)",
                r"{0}|{1}",
                r"model\.layers\.[02468]\..*",
            ]
        )
    )
    return template.format(one, other)


def names_or_regex(tree):
    return st.lists(suffixes(tree), max_size=4) | regexes(tree)


layer_choices = st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=4)
stack_patterns = st.sampled_from(
    [*STACKS, "", "lay.rs", r"\w+", "(layers|h)", "layers|h", "experts", "model.layers"]
)
layers_patterns = st.none() | stack_patterns | st.lists(stack_patterns, max_size=3)


@st.composite
def trees_and_configs(draw):
    tree = draw(trees)
    config = {
        "target_modules": draw(names_or_regex(tree)),
        "exclude_modules": draw(st.none() | names_or_regex(tree)),
        "layers_to_transform": draw(layer_choices),
        "layers_pattern": draw(layers_patterns),
    }
    return tree, config


def by_peft(config, tree):
    """Return the modules that PEFT takes; it loads lists of names as sets."""
    names = {
        key: set(value)
        for key, value in config.items()
        if key.endswith("modules") and isinstance(value, list)
    }
    loaded = SimpleNamespace(**{**config, **names})
    return [path for path in tree if check_target_module_exists(loaded, path)]


@settings(max_examples=400, deadline=None)
@given(trees_and_configs())
@example(
    (
        ["model.layers.1.mlp.experts.0.q_proj", "model.layers.0.mlp.experts.1.q_proj"],
        {
            "target_modules": ["q_proj"],
            "exclude_modules": None,
            "layers_to_transform": 1,
            "layers_pattern": "",
        },
    )
)
def test_a_rule_takes_the_modules_that_peft_takes(tree_and_config):
    tree, config = tree_and_config
    rule = TargetRule.parse(json.loads(json.dumps(config)))
    assert [path for path in tree if rule.matches(path)] == by_peft(config, tree)


@st.composite
def trees_and_patterns(draw):
    tree = draw(trees)
    keys = draw(st.lists(suffixes(tree) | regexes(tree).filter(lambda key: "(?i)" not in key), max_size=5))
    return tree, {key: n for n, key in enumerate(keys)}


@settings(max_examples=400, deadline=None)
@given(trees_and_patterns())
def test_the_first_matching_pattern_is_the_one_that_peft_uses(tree_and_patterns):
    tree, patterns = tree_and_patterns
    for path in tree:
        first = next(iter(matching_patterns(patterns, path)), path)
        assert first == get_pattern_key(patterns, path)


@settings(max_examples=200, deadline=None)
@given(trees_and_configs())
def test_an_unmatched_target_is_one_that_no_module_answers_to(tree_and_config):
    tree, config = tree_and_config
    rule = TargetRule.parse({"target_modules": config["target_modules"]})
    for entry in rule.unmatched_targets(frozenset(tree)):
        assert by_peft({"target_modules": [entry], "exclude_modules": None}, tree) == []


@pytest.mark.parametrize("layers_pattern", ["(?i)layers", "(?P<idx>layers)", "(layers", ["layers", "(h"]])
def test_a_layers_pattern_that_peft_cannot_compile_is_refused(layers_pattern):
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": layers_pattern}
    path = "x.model.nothing.0.q_proj"
    with pytest.raises(re.error):
        by_peft({**config, "exclude_modules": None}, [path])
    with pytest.raises(TargetError, match="layers_pattern"):
        TargetRule.parse(config)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_all_linear_stands_for_the_modules_that_peft_expands_it_to(family, pico):
    from transformers import AutoModelForCausalLM

    base = pico(family)
    skeleton = build_skeleton(json.loads((base / "config.json").read_text()))
    config = LoraConfig(target_modules="ALL-linear")
    _maybe_include_all_linear_layers(config, AutoModelForCausalLM.from_pretrained(base))
    assert skeleton.all_linear() == config.target_modules
    assert len(config.target_modules) >= 8
