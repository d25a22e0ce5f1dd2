"""Outputs that one pass over a base makes are those of separate merges: every file of every output, byte for byte."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_merge
from lora_merge.batches.groups import MOST_TOGETHER
from lora_merge.batches.job import Job
from lora_merge.batches.run import Batch
from lora_merge.core.plan import Merge
from lora_merge.formats.weights import WeightReader
from lora_merge.requests.request import Request
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.property.test_executors import content, layers, write_mixture

KINDS_BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Wanted:
    """One output: the kinds of the adapters that are merged, and the options."""

    kinds: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def wanted(*kinds, **options):
    return Wanted(kinds, options)


CATALOGUE = {
    "llama": (
        wanted("LoRA"),
        wanted("LoRA", dtype="float16"),
        wanted("rsLoRA", max_shard_size="50KB"),
        wanted("LoRA with rank_pattern and alpha_pattern", verify="full"),
        wanted("DoRA on a linear layer"),
        wanted("DoRA on an embedding", dtype="float32"),
        wanted("LoRA on an embedding"),
        wanted("LoHa"),
        wanted("OFT", dtype="float16"),
        wanted("AdaLoRA"),
        wanted("modules_to_save"),
        wanted("modules_to_save of an embedding", max_shard_size="30KB"),
        wanted("trainable tokens alone"),
        wanted("trainable_token_indices, layer by layer", dtype="bfloat16"),
        wanted("a larger vocabulary"),
        wanted("LoRA", "rsLoRA", combine="ties", density=0.4),
        wanted("LoHa", "LoRA", combine="dare_linear", seed=3),
        wanted("DoRA on a linear layer", "LoRA"),
    ),
    "llama_tied": (
        wanted("modules_to_save"),
        wanted("LoRA on a tied embedding", allow_untie=True),
        wanted("LoRA on a tied output embedding", allow_untie=True, max_shard_size="30KB"),
        wanted("a larger vocabulary of a tied model", dtype="float16"),
    ),
    "gpt2": (
        wanted("LoRA on Conv1D"),
        wanted("DoRA on Conv1D"),
        wanted("HiRA", dtype="float16"),
        wanted("DoRA on Conv1D", "LoRA on Conv1D", combine="ties"),
    ),
}
"""Outputs of each family's base; their numbers name them."""

BASES = [
    ("llama", "bfloat16", None), ("llama", "float32", "60KB"), ("llama_tied", "float32", None),
    ("llama_tied", "bfloat16", "40KB"), ("gpt2", "bfloat16", "60KB"),
]  # fmt: skip
"""Family, dtype, size of its shards."""


class Witness:
    """An observer that counts how often jobs are begun: once, unless a pass failed and each was tried on its own."""

    def __init__(self):
        self.n_begun = 0

    def phase(self, name, total_bytes): ...

    def advance(self, nbytes): ...

    def done(self, name): ...

    def job(self, name, state, sentence=""):
        self.n_begun += state == "running"


@pytest.fixture(scope="module")
def separate(tmp_path_factory, pico):
    """Return functions: a base and a number of its catalogue → the request, without its output; and all files of a merge of its own."""
    workshop = tmp_path_factory.mktemp("together")

    @cache
    def request(base, n):
        family, dtype, shards = base
        one = CATALOGUE[family][n]
        adapters = [building.case(workshop, KINDS_BY_NAME[name], family, dtype).adapter for name in one.kinds]
        return Request(
            adapter=tuple(map(str, adapters)), out="", base=str(pico(family, dtype, shards)), **one.options
        )

    @cache
    def files(base, n):
        out = workshop / "-".join(map(str, base)) / f"out-{n}"
        own = request(base, n)
        options = {**CATALOGUE[base[0]][n].options, "verify": "none", "workers": 1}
        lora_merge.merge(base=own.base, adapter=own.adapter, out=out, **options)
        return content(out)

    return request, files


def carried_out(requests, workers=1):
    """Carry out a batch of requests, and return its report."""
    jobs = [
        Job(request.out, replace(request, workers=request.workers or workers, resume=True))
        for request in requests
    ]
    witness = Witness()
    batch = Batch(jobs, witness)
    batch.run()
    assert witness.n_begun == len(jobs)
    return batch.report("")


@pytest.mark.parametrize("base", BASES, ids=lambda base: "-".join(filter(None, base)))
@settings(max_examples=3, deadline=None)
@given(st.data())
def test_any_outputs_in_any_order_are_those_of_merges_of_their_own(base, separate, data):
    request, files = separate
    catalogue = range(len(CATALOGUE[base[0]]))
    numbers = data.draw(st.lists(st.sampled_from(catalogue), min_size=2, max_size=9, unique=True))
    workers = data.draw(st.sampled_from([1, 2]))
    with tempfile.TemporaryDirectory() as name:
        requests = [replace(request(base, n), out=f"{name}/out-{n}") for n in numbers]

        report = carried_out(requests, workers)

        assert [(job.state, job.message) for job in report.jobs] == [("done", "")] * len(numbers)
        for n in numbers:
            assert content(Path(name) / f"out-{n}") == files(base, n), CATALOGUE[base[0]][n]


@pytest.mark.parametrize("base", BASES[:2], ids=lambda base: base[1])
def test_every_kind_of_adapter_is_made_beside_every_other(base, separate, tmp_path):
    request, files = separate
    numbers = range(len(CATALOGUE["llama"]))

    report = carried_out([replace(request(base, n), out=str(tmp_path / f"out-{n}")) for n in numbers], 2)

    assert report.ok
    for n in numbers:
        assert content(tmp_path / f"out-{n}") == files(base, n), CATALOGUE["llama"][n]


@settings(max_examples=8, deadline=None)
@given(layers, st.permutations(range(6)), st.sampled_from([1, 2]), st.sampled_from([None, "2KB"]))
def test_tensors_of_many_tiles_are_those_of_merges_of_their_own(drawn, order, workers, max_shard_size):
    """Random bases whose tensors have up to three tiles, adapters alone and together, and a change of dtype."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lora_merge.merging.budget.TILE_ELEMENTS", 16
        )  # 64 rows are a tile, as few as there may be
        root = Path(name)
        made = list(map(str, write_mixture(root, drawn)))
        choices = [
            (made[:1], {}),
            (made[-1:], {}),
            (made, {}),
            (made[::-1], {}),
            (made, {"dtype": "float16"}),
            (made, {"combine": "ties"}),
        ]
        requests = [
            Request(
                adapter=tuple(choices[n][0]), out=f"{name}/together/{n}", base=f"{name}/base", max_shard_size=max_shard_size,
                **choices[n][1],
            )
            for n in order
        ]  # fmt: skip

        report = carried_out(requests, workers)

        assert [job.message for job in report.jobs] == [""] * 6
        for request in requests:
            n = Path(request.out).name
            lora_merge.merge(
                base=request.base, adapter=request.adapter, out=f"{name}/alone/{n}", dtype=request.dtype, combine=request.combine,
                max_shard_size=max_shard_size, workers=1,
            )  # fmt: skip
            assert content(root / "together" / n) == content(root / "alone" / n)


@pytest.fixture
def bytes_read(monkeypatch):
    """Return a function: what to do → the bytes of the base's tensors that merging reads meanwhile."""
    counts = []
    plain = WeightReader.read_into

    def counted(self, buffers, ranges):
        counts.append(sum(map(len, buffers.values())))
        plain(self, buffers, ranges)

    monkeypatch.setattr(WeightReader, "read_into", counted)

    def during(do):
        counts.clear()
        do()
        return sum(counts)

    return during


@pytest.mark.parametrize("shards", [None, "60KB"])
def test_any_number_of_outputs_reads_as_many_bytes_as_one(shards, bytes_read, separate, tmp_path):
    request, _ = separate
    base = ("llama", "float32", shards)
    alike = [replace(request(base, 0), verify="none"), replace(request(base, 2), verify="none")]
    others = [replace(alike[0], dtype=dtype) for dtype in ("float32", "float16", "bfloat16")]
    plan = lora_merge.plan(base=alike[0].base, adapter=alike[0].adapter)
    merged_bytes = sum(
        step.op.source.nbytes for step in plan.steps if isinstance(step.op, Merge) and step.op.deltas
    )

    def carry_out(place, requests):
        named = [replace(one, out=str(tmp_path / place / str(n))) for n, one in enumerate(requests)]
        assert carried_out(named).ok

    one = bytes_read(lambda: carry_out("one", alike[:1]))
    two = bytes_read(lambda: carry_out("two", alike))
    alone = bytes_read(lambda: carry_out("cast alone", others[1:2]))
    five = bytes_read(lambda: carry_out("five", [*alike, *others]))

    assert one == two == merged_bytes > 0
    assert five == alone > one  # a change of dtype reads every tensor, and the others read none beside it


def test_outputs_beyond_those_of_one_pass_read_the_base_again(bytes_read, separate, tmp_path):
    request, _ = separate
    own = replace(request(("llama", "float32", None), 0), verify="none")
    one = bytes_read(lambda: carried_out([replace(own, out=str(tmp_path / "alone"))]))

    many = [replace(own, out=str(tmp_path / f"m{n}")) for n in range(MOST_TOGETHER + 1)]

    assert bytes_read(lambda: carried_out(many)) == 2 * one
