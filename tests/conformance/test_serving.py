"""Rules about engines: each is complete, and what it says a conversion cures, a conversion cures."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from lora_merge.core.request import ServingEngine
from lora_merge.core.traits import TRAITS
from lora_merge.serving import ENGINES
from lora_merge.serving.rules import Need
from tests.tampering import edit_json, to_pickles

of_every_engine = pytest.mark.parametrize("engine", ENGINES)
RULES = [(name, rule) for name, engine in ENGINES.items() for rule in engine.rules]

ADAPTERS = {
    "rslora": {"use_rslora": True},
    "regex": {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
    "listed-paths": {
        "target_modules": [
            f"model.layers.{n}.{path}" for n in (0, 1) for path in ("self_attn.q_proj", "mlp.down_proj")
        ]
    },
    "all-linear": {"target_modules": "all-linear"},
    "ranks-differ": {"rank_pattern": {"q_proj": 2}},
    "alphas-differ": {"alpha_pattern": {"q_proj": 3}},
    "some-layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "packed-parts": {"target_modules": ["q_proj", "k_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "pickle": {},
    "new-fields": {},
    "rank": {"r": 40},
}
"""An adapter for every trait of LoRA on a Llama that a conversion can do something about."""


def test_every_engine_that_can_be_named_has_rules():
    assert tuple(ENGINES) == get_args(ServingEngine)


@pytest.mark.parametrize(("engine", "rule"), RULES, ids=[f"{name}-{rule.trait}" for name, rule in RULES])
def test_a_rule_says_what_happens_where_it_was_seen_and_what_helps(engine, rule):
    assert rule.trait in TRAITS
    assert rule.sentence[0].islower()
    assert rule.sentence[-1] not in ".:"
    assert any(word in rule.source for word in ("run", "read", "PEFT 0.14"))
    assert any(char.isdigit() for char in rule.source)
    assert set(rule.needs) <= set(get_args(Need))
    assert sum(other.trait == rule.trait for other in ENGINES[engine].rules) == 1


@of_every_engine
def test_an_engine_names_its_release(engine):
    assert any(char.isdigit() for char in ENGINES[engine].version)
    assert ENGINES[engine].ranks.source


def verdict(cli, engine, adapter, *options):
    result = cli("inspect", adapter, "--engine", engine, "--json", *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["engines"]
    return found["verdict"], {one["trait"] for one in found["obstacles"]}


@of_every_engine
@pytest.mark.parametrize("trait", ADAPTERS)
def test_what_is_converted_for_an_engine_is_served_by_it(
    engine, trait, pico, pico_adapter, tampered, cli, tmp_path
):
    base = pico("llama", "float32")
    adapter = tampered(pico_adapter(base, **ADAPTERS[trait]))
    if trait == "pickle":
        to_pickles(adapter)
    if trait == "all-linear":  # PEFT saves it as a list
        edit_json(adapter / "adapter_config.json", target_modules="all-linear")
    before, traits = verdict(cli, engine, adapter, "--base", base)
    rules = ENGINES[engine].by_trait
    if trait in rules:
        assert before == "no"
        assert trait in traits

    lossy = ["--rank", 16] if trait in {"dora", "rank"} else []
    result = cli("convert", adapter, "--for", engine, "--base", base, *lossy, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.output
    if ENGINES[engine].format == "peft":
        assert verdict(cli, engine, tmp_path / "out", "--base", base) == ("yes", set())
    else:
        assert (tmp_path / "out" / "adapter.gguf").is_file()


@of_every_engine
@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"layer_replication": [[0, 2], [1, 2]]}], ids=["bias", "replicated"]
)
def test_what_no_conversion_cures_is_refused_for_every_engine(
    engine, fields, pico, pico_adapter, cli, tmp_path
):
    """Qwen2 has biases; on no engine does an adapter change them."""
    base = pico("qwen2", "float32")
    adapter = pico_adapter(base, **fields)
    before, _ = verdict(cli, engine, adapter)

    result = cli("convert", adapter, "--for", engine, "--base", base, "--rank", 16, "--out", tmp_path / "out")

    assert before == "no"
    assert result.exit_code == 4, result.output
    assert "merge" in result.stderr
    assert not (tmp_path / "out").exists()
