"""Outputs whose codes are made by a merge: the same bits from one worker and from many, in any tiles, resumed, in a batch.

The first way, one worker in this thread, is what the others are compared with. It is verified in full.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

import lora_merge
from lora_merge.cli import exits
from lora_merge.merging.staged import Staged
from lora_merge.storage.journal import FILE as JOURNAL
from tests.crossing import one_for_each
from tests.storages import dense
from tests.storages.quantising import SCHEMES
from tests.storages.reference import decoded, same_bytes, tensors_of


class Output(NamedTuple):
    """What is made."""

    base: str
    """A fixture, or a base that `made` knows."""

    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.base, *map(str, self.options.values())]).replace("True", "").strip()


def _quantised(scheme: str, **more: Any) -> Output:
    return Output("tall", {"quantize": scheme, **more})


def _requantised(base: str, rounding: str) -> Output:
    return Output(base, {"out_storage": "base", "rounding": rounding, "allow_loss": True})


ACROSS = ("gptq-4bit-act-order", "awq-gemm", "gptoss-mxfp4")
"""Their codes, or their adapters, run across the rows that tiles are made of."""

OUTPUTS = (
    *(_quantised(scheme) for scheme in SCHEMES),
    *(_quantised(scheme, rounding="adapter") for scheme in ("fp8", "int4-asym", "mxfp8", "nvfp4")),
    *(_quantised(scheme, rounding="stochastic") for scheme in ("fp8-block", "int4", "nvfp4")),
    *(
        _requantised(base, rounding)
        for base in (*ACROSS, "tall as nvfp4", "tall as int4-asym", "fp8-ragged", "bnb-nf4-double")
        for rounding in ("nearest", "adapter", "stochastic")
    ),
    *(
        _requantised(base, "adapter")
        for base in ("ct-int3-asymmetric", "mlx-3bit", "modelopt-int4-awq", "gptq-3bit")
    ),
    *(
        Output(base, {"rounding": rounding, "dtype": dtype})
        for base, dtype in (("tall", None), ("tall", "float16"), ("gpt2", None), ("fp8-block", "bfloat16"))
        for rounding in ("adapter", "stochastic")
    ),
    Output("gptoss-mxfp4", {"rounding": "adapter", "out_storage": "dense"}),
    Output("fp8-block", {"quantize": "int4-g32"}),
)


def rows(outputs, *keys):
    """Return outputs as rows; those with nothing new are marked."""
    return one_for_each([pytest.param(output, id=str(output)) for output in outputs], *keys)


def _base(output):
    return output.base


def _scheme(output):
    return output.options.get("quantize")


def _rounding(output):
    return output.options.get("rounding")


each = pytest.mark.parametrize("output", rows(OUTPUTS, _base, _scheme, _rounding))
every_second = pytest.mark.parametrize("output", rows(OUTPUTS[::2], _scheme, _rounding))
every_third = pytest.mark.parametrize("output", rows(OUTPUTS[::3], _rounding))


@pytest.fixture(scope="session")
def made(tmp_path_factory, case, pico, pico_adapter):
    """Return a function: name → base and adapter."""
    root = tmp_path_factory.mktemp("made")

    @cache
    def build(name):
        if name == "gpt2":
            base = pico("gpt2")
            return base, pico_adapter(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        if name == "tall":
            base = dense.build(root / "tall", **dense.TALL)
            return base, dense.lora(base, root / "tall-lora")
        if name.startswith("tall as "):
            tall, adapter = build("tall")
            scheme = name.removeprefix("tall as ")
            head = dense.of_head(tall, root / f"head-{scheme}")
            lora_merge.merge(base=tall, adapter=head, out=root / scheme, quantize=scheme, verify="none")
            return root / scheme, adapter
        return case(name).base, case(name).adapter

    return build


@pytest.fixture(scope="session")
def alone(tmp_path_factory, made):
    """Return a function: output → its folder, made by one worker."""
    root, found = tmp_path_factory.mktemp("alone"), {}

    def find(output):
        key = str(output)
        if key not in found:
            found[key] = root / str(len(found))
            merge(made, output, found[key], verify="full", executor="serial", workers=1)
        return found[key]

    return find


def merge(made, output, out, **more):
    base, adapter = made(output.base)
    return lora_merge.merge(
        base=base, adapter=adapter, out=out, **{"verify": "none", **output.options, **more}
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Let tiles be as small as they may be."""
    monkeypatch.setattr("lora_merge.merging.budget.TILE_ELEMENTS", 1 << 10)


@each
def test_workers_and_tiles_do_not_matter(output, alone, made, tmp_path, small_tiles):
    merge(made, output, tmp_path / "out", workers=3)
    assert dense.content(tmp_path / "out") == dense.content(alone(output))


@every_second
def test_a_merge_that_goes_on_does_not_matter(output, alone, made, tmp_path, monkeypatch, small_tiles):
    """Every third tensor has been lost; of weights in parts, one part is enough."""
    out, whole = tmp_path / "out", alone(output)
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(made, output, out, resume=True)
    (journal,) = tmp_path.rglob(JOURNAL)
    first, *lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([first, *(line for n, line in enumerate(lines) if n % 3)]))
    report = merge(made, output, out, resume=True)
    assert "resumed" in {issue.code for issue in report.issues}
    assert dense.content(out) == dense.content(whole)


@every_third
def test_files_of_another_size_have_the_same_tensors(output, alone, made, tmp_path):
    merge(made, output, tmp_path / "out", max_shard_size="60KB", workers=2)
    one, other = tensors_of(alone(output)), tensors_of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert one.keys() == other.keys()
    assert all(same_bytes(one[name], other[name]) for name in one)


APART = [
    output
    for output in OUTPUTS
    if str(output)
    in ("tall nvfp4", "tall fp8 adapter", "tall as int4-asym base stochastic", "gptoss-mxfp4 base adapter")
]


@pytest.mark.parametrize(
    "output",
    rows(APART, lambda output: "quantize" in output.options, lambda output: output.base == "gptoss-mxfp4"),
)
def test_processes_do_not_matter(output, alone, made, tmp_path, small_tiles):
    merge(made, output, tmp_path / "out", executor="processes", workers=2)
    assert dense.content(tmp_path / "out") == dense.content(alone(output))


def test_all_kinds_of_outputs_are_made_apart():
    assert len(APART) == 4


@pytest.mark.parametrize("base", ["tall", *ACROSS[:2], "tall as nvfp4", "fp8-block"])
def test_a_batch_makes_what_merges_alone_make(base, alone, made, tmp_path, cli, small_tiles):
    """All outputs of one base together: it is read once for all of them."""
    outputs = [output for output in OUTPUTS if output.base == base]
    root, adapter = map(str, made(base))
    jobs = [
        {"base": root, "adapter": adapter, "out": str(tmp_path / str(n)), **output.options}
        for n, output in enumerate(outputs)
    ]
    (tmp_path / "jobs.yaml").write_text(json.dumps({"jobs": jobs}))
    result = cli("batch", tmp_path / "jobs.yaml")
    assert result.exit_code == exits.OK, result.stderr
    assert len(outputs) > 1
    for n, output in enumerate(outputs):
        assert dense.content(tmp_path / str(n)) == dense.content(alone(output)), output


def test_small_tiles_are_many(made, small_tiles):
    """Else the tests above would say nothing. Where the adapter's effect is kept, a tile has a whole band at least."""
    counts = {}
    for rounding in ("nearest", "adapter"):
        base, adapter = made("tall")
        plan = lora_merge.plan(base=base, adapter=adapter, quantize="int4", rounding=rounding)
        (step,) = [step for step in plan.steps if step.name.endswith("up_proj.weight")]
        counts[rounding] = len(step.op.tiles(1 << 10))
    assert counts == {"nearest": 36, "adapter": 2}


def test_each_kind_of_rounding_gives_other_codes(alone, made):
    """The matrix above has no two rows that are the same."""
    for base in ("tall as int4-asym", "gptoss-mxfp4"):
        values = [
            torch.cat([value.flatten() for value in decoded(alone(_requantised(base, rounding))).values()])
            for rounding in ("nearest", "adapter", "stochastic")
        ]
        assert not torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert not torch.equal(values[1], values[2])
