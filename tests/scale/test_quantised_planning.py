"""Plans of published models, hollow on a disk: sizes are the published ones, and a plan takes seconds and little memory."""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

import pytest
from hollows.models import MODELS
from hollows.planned import BYTES, TENSORS, hollow
from safetensors import safe_open

from tests.scale.test_planning import reference, run


class Published(NamedTuple):
    """What the index of a model on the Hub says, and what was counted in it."""

    n_tensors: int
    nbytes: float
    n_files: int
    most: str
    """The dtype of most bytes."""


PUBLISHED = {
    # Its `total_size` has the headers too: 688 586 727 753.
    "DeepSeek-V3": Published(91_991, 688.574839360e9, 163, "F8_E4M3"),
    "Kimi-K2": Published(139_583, 1029.17e9, 61, "F8_E4M3"),
    "Kimi-K2-Thinking": Published(208_215, 594.2e9, 62, "I32"),
    "gpt-oss-120b": Published(687, 65_248_815_744, 15, "U8"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_hollow_model_has_the_tensors_and_bytes_of_the_published_one(name):
    tensors, published = list(MODELS[name].tensors()), PUBLISHED[name]
    assert len({tensor.name for tensor in tensors}) == len(tensors) == published.n_tensors
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(published.nbytes, rel=1e-4)
    assert len(set(MODELS[name].files)) == published.n_files
    by_dtype = Counter()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.nbytes
    assert by_dtype.most_common(1)[0][0] == published.most


def test_the_further_layer_of_deepseek_has_its_own_embedding_and_head():
    further = {
        one.name.removeprefix("model.layers.61."): one.shape
        for one in MODELS["DeepSeek-V3"].tensors()
        if ".layers.61." in one.name
    }
    assert further["embed_tokens.weight"] == further["shared_head.head.weight"] == (129_280, 7168)
    assert further["eh_proj.weight"] == (7168, 14_336)
    assert further["mlp.experts.255.down_proj.weight_scale_inv"] == (56, 16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_hollow_files_take_no_room_and_their_headers_fit(name, tmp_path):
    place = hollow(MODELS[name], tmp_path / name, ("attention",))
    files = list(place.base.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > PUBLISHED[name].nbytes
    # Kimi-K2-Thinking states a shape beside each of 69 120 weights, which takes a block of the disk.
    assert sum(path.stat().st_blocks * 512 for path in files) < 400_000_000
    kept = 0
    for path in files:
        with safe_open(path, "pt") as opened:
            kept += len(opened.keys())
    assert kept == PUBLISHED[name].n_tensors


SECONDS = {"attention": 30, "all": 100}
"""Of processor time, on a machine that does the `reference` in a second; a slower one has as much more. Twice of what it
takes here: an adapter of all layers is read, 13 to 21 GB of it."""
MEMORY_BYTES = 1_000_000_000

OUT_GB = {
    "DeepSeek-V3": {"attention": {"base": 688.6, "mixed": 700.0, "dense": 1369}, "all": {"mixed": 1357}},
    "Kimi-K2": {"all": {"dense": 2053}},
    "Kimi-K2-Thinking": {"attention": {"base": 594.2}, "all": {"base": 594.2, "dense": 2053}},
    "gpt-oss-120b": {"attention": {"base": 65.25, "dense": 233.7}, "all": {"base": 65.25}},
}
"""Model → adapter → storage of the output → bytes of its tensors, in 10⁹."""


@pytest.fixture(scope="module", params=OUT_GB)
def model(request, tmp_path_factory):
    """Return the name of a model, and where it and its adapters are."""
    root = tmp_path_factory.mktemp("hollow") / request.param
    return request.param, hollow(MODELS[request.param], root)


@pytest.mark.system
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_published_model_is_planned_in_seconds(targets, model, tmp_path):
    name, place = model
    for storage, gigabytes in OUT_GB[name].get(targets, {}).items():
        ran = run(
            tmp_path, "--base", place.base, "--adapter", place.adapters[targets], "--out", tmp_path / "out",
            "--out-storage", storage, "--dry-run", "--json",
        )  # fmt: skip
        assert ran.code == 0, ran.err[-2000:]
        summary = json.loads(ran.out)["summary"]
        changed = sum(1 for _ in MODELS[name].modules(targets))
        assert summary["n_merged"] == changed
        assert sum(summary[one] for one in BYTES) / 1e9 == pytest.approx(gigabytes, rel=1e-3)
        if storage == "base":
            assert sum(summary[one] for one in TENSORS) == PUBLISHED[name].n_tensors
            assert summary["n_shards"] == PUBLISHED[name].n_files
        assert ran.cpu_seconds < SECONDS[targets] * max(1.0, reference())
        assert 1_000_000 < ran.peak_bytes < MEMORY_BYTES
        assert not (tmp_path / "out").exists()
