"""The arithmetic of large models: sizes as the models are published, and what their outputs take."""

from __future__ import annotations

import pytest
import scale

PUBLISHED_GB = {"DeepSeek-V3": 688.6, "Kimi-K2": 1029, "Kimi-K2-Thinking": 594, "gpt-oss-120b": 65.2}
GROUPS = ("attention", "experts", "mlp", "rest")
MODELS = {model.name: model for model in scale.models()}


@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_bases_have_the_sizes_of_the_published_ones(name):
    assert MODELS[name].nbytes / 1e9 == pytest.approx(PUBLISHED_GB[name], rel=2e-3)


def test_outputs_of_deepseek_are_those_of_dry_runs():
    model = MODELS["DeepSeek-V3"]
    assert model.written(scale.ATTENTION, "mixed") / 1e9 == pytest.approx(700, abs=0.5)
    assert model.written(scale.LAYERS, "dense") / 1e9 == pytest.approx(1369, abs=0.5)
    assert model.written(scale.LAYERS, "base") == model.nbytes


def test_what_an_adapter_leaves_alone_is_the_rest_of_the_base():
    model = MODELS["gpt-oss-120b"]
    same = model.kept(scale.ATTENTION, "base")
    stored = {
        group: sum(held.nbytes for part, held in model.parts.items() if part.group == group)
        for group in GROUPS
    }
    assert same == model.nbytes - stored["attention"]
    assert model.kept(scale.LAYERS, "dense") == stored["rest"]
    assert stored["experts"] == 36 * 128 * 3 * 2880**2 * 17 // 32


def test_a_line_takes_its_time():
    assert scale.minutes(60e9, 1, 10) == pytest.approx(1)
    assert scale.minutes(60e9, 4, 25) == pytest.approx(0.1)
