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


def test_costs_are_requests_gigabytes_and_prices():
    (line,) = (line for line in scale.costs().splitlines() if "DeepSeek" in line and "all layers" in line)
    # 688.57e9 / 2**23 and / 2**24; 82 085 x 0.0004 / 1000 + 41 042 x 0.005 / 1000; x 0.023; x 0.02; x 0.09.
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        "82085",
        "41042",
        "0.24",
        "15.8",
        "13.8",
        "62.0",
    ]
