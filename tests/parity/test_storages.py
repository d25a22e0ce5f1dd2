"""Bases that are stored in parts, by codecs that only tests know: recognised, merged, written the same way, verified, resumed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.core.adapter import Delta
from lora_merge.core.plan import Merge, MergePlan, Step
from lora_merge.core.tensor import Region, TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import FLOAT32, Storage, Weight
from lora_merge.deltas import DoraFacts, LowRankFacts
from lora_merge.formats.safetensors import read_header, tensor_digest
from lora_merge.merging.memory import InMemory
from lora_merge.merging.staged import Staged
from lora_merge.merging.worker import Merger
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.journal import FILE as JOURNAL
from tests.steps import step_at
from tests.toys import codecs as toy_codecs
from tests.toys.codecs import TOYS, known, scale_for, stored_as, values_in

each = pytest.mark.parametrize("storage", TOYS)
SCALE = 1.5
CODED = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
)
TOUCHED = CODED[:2]
"""Of these; and one that is a plain tensor."""
PLAIN = "model.layers.0.self_attn.q_proj.weight"
SHAPES = {CODED[0]: (96, 64), CODED[1]: (64, 96), CODED[2]: (96, 64), PLAIN: (64, 64)}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def factors():
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator))
        for name, shape in SHAPES.items()
        if name in (*TOUCHED, PLAIN)
    }


@pytest.fixture
def place(tmp_path):
    """Return a function: storage → a directory with a base in it, in two files, and its adapter."""

    def build(storage):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        base.mkdir()
        adapter.mkdir()
        tensors = {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16), "steps": torch.arange(3)}
        tensors[PLAIN] = weights()[PLAIN].bfloat16()
        for name in CODED:
            tensors |= stored_as(storage, name, weights()[name])
        scales = {name: tensor for name, tensor in tensors.items() if name.endswith("scaling")}
        files = {
            "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if n not in scales},
            "model-00002-of-00002.safetensors": scales,
        }
        for file, content in files.items():
            save_file(content, base / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, content in files.items() for n in content}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        (base / "config.json").write_text(
            json.dumps({"model_type": "of_nobody", "architectures": ["OfNobody"]})
        )
        made = {}
        for name, (a, b) in factors().items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            made |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        save_file(made, adapter / "adapter_model.safetensors", {"format": "pt"})
        targets = ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"]
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4 * SCALE, "target_modules": targets}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return build


def tensors_of(root):
    return {
        name: tensor
        for file in sorted(root.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@each
@pytest.mark.parametrize("workers", [1, 3])
def test_a_base_in_parts_is_merged_and_written_as_it_is_stored(storage, workers, place, cli, monkeypatch):
    monkeypatch.setattr("lora_merge.merging.peak.TILE_ELEMENTS", 1 << 10)
    root = place(storage)
    arguments = ("--base", root / "base", "--adapter", root / "adapter", "--out", root / "out")
    with known(storage):
        result = cli(*arguments, "--workers", workers, "--verify", "full")
    assert result.exit_code == exits.OK, result.stderr
    assert "merged 3 tensors" in result.stderr
    before, after = tensors_of(root / "base"), tensors_of(root / "out")
    assert list(before) == list(after)
    touched = {name for name in before if name.startswith((*TOUCHED, PLAIN))}
    for name in before.keys() - touched:
        assert torch.equal(before[name], after[name]), name
    for name in TOUCHED:
        a, b = factors()[name]
        wanted = values_in(storage, name, before) + SCALE * (b @ a)
        got = values_in(storage, name, after)
        largest = wanted.abs().amax(1, keepdim=True) if storage == "row_scaled" else wanted.abs().max()
        assert ((got - wanted).abs() <= scale_for(largest) / 2 + 1e-4).all()
        assert not torch.equal(got, values_in(storage, name, before))
    for index in ("model.safetensors.index.json", "config.json"):
        assert (root / "out" / index).exists()


@each
def test_the_output_of_a_base_in_parts_is_verified_later(storage, place, cli):
    root = place(storage)
    with known(storage):
        assert (
            cli("--base", root / "base", "--adapter", root / "adapter", "--out", root / "out").exit_code
            == exits.OK
        )
        for level in ("sample", "full"):
            result = cli("verify", root / "out", "--level", level)
            assert result.exit_code == exits.OK, result.stdout + result.stderr


@each
@pytest.mark.parametrize("role", ["weight", "scaling"])
def test_a_wrong_code_and_a_wrong_scale_are_found(storage, role, place, cli, monkeypatch):
    """The merge itself is made to store other values, so that no digest can tell."""
    root = place(storage)
    codec = TOYS[storage][0]
    honest = codec.grid

    def wrong(tile, values, out, storage, survey, stored):
        grid = honest(tile, values, out, storage, survey, stored)

        def keep(levels):
            grid.keep(levels)
            if role == "weight":
                out["weight"][3, 5] += 2 if out["weight"][3, 5] < 0 else -2
            else:
                out["scaling"].mul_(2)

        return replace(grid, keep=keep)

    monkeypatch.setattr(type(codec), "grid", lambda self, *rest: wrong(*rest))
    with known(storage):
        result = cli("--base", root / "base", "--adapter", root / "adapter", "--out", root / "out")
    assert result.exit_code == exits.VERIFY
    assert "wrong-value" in result.stderr or "expected" in result.stderr
    assert not (root / "out").exists()


@each
def test_what_is_not_decoded_a_second_time_is_said(storage, place, cli):
    root = place(storage)
    with known(storage, recomputed=False):
        result = cli("--base", root / "base", "--adapter", root / "adapter", "--out", root / "out")
    assert result.exit_code == exits.OK, result.stderr
    assert "there is no second decoder for this storage" in result.stderr


@each
@pytest.mark.parametrize("lost", ["nothing", "a scale", "a code"])
def test_an_interrupted_merge_of_a_base_in_parts_goes_on(storage, lost, place, cli, monkeypatch):
    root = place(storage)
    arguments = ("--base", root / "base", "--adapter", root / "adapter", "--resume", "--workers", 1, "--out")
    with known(storage):
        assert cli(*arguments, root / "whole").exit_code == exits.OK
        with monkeypatch.context() as patch:
            patch.setattr(Staged, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert cli(*arguments, root / "out").exit_code == 130
        (journal,) = root.rglob(JOURNAL)
        if lost != "nothing":
            name = TOYS[storage][0].names(TOUCHED[0], None)["scaling" if lost == "a scale" else "weight"]
            lines = journal.read_text().splitlines(keepends=True)
            journal.write_text("".join(line for line in lines if f'"{name}"' not in line[: len(name) + 4]))
        result = cli(*arguments, root / "out")
    assert result.exit_code == exits.OK, result.stderr
    n_tensors = len(tensors_of(root / "base"))
    assert f"{n_tensors if lost == 'nothing' else n_tensors - 2} of {n_tensors} tensors" in result.stderr
    assert {path.name for path in (root / "out").iterdir()} == {
        path.name for path in (root / "whole").iterdir()
    }
    for path in (root / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (root / "out" / path.name).read_bytes()


@each
def test_a_plan_of_a_base_in_parts_survives_json(storage, place):
    root = place(storage)
    with known(storage):
        plan = lora_merge.plan(base=root / "base", adapter=root / "adapter")
    assert MergePlan.from_json(plan.to_json()) == plan
    merges = {step.name: step for step in plan.steps if isinstance(step.op, Merge)}
    assert set(merges) == {*TOUCHED, PLAIN}
    assert list(merges[TOUCHED[0]].writes) == ["weight", "scaling"]
    assert merges[TOUCHED[0]].op.target == merges[TOUCHED[0]].op.source.storage


@each
def test_several_outputs_of_a_base_in_parts_are_those_of_one_each(storage, place, cli):
    root = place(storage)
    jobs = {
        "jobs": [
            {"base": str(root / "base"), "adapter": str(root / "adapter"), "out": str(root / f"out-{n}")}
            for n in range(2)
        ]
    }
    jobs["jobs"][1]["adapter"] = f"{root / 'adapter'}:0.5"
    (root / "jobs.yaml").write_text(json.dumps(jobs))
    with known(storage):
        result = cli("batch", root / "jobs.yaml")
        assert result.exit_code == exits.OK, result.stderr
        for n, job in enumerate(jobs["jobs"]):
            assert (
                cli(
                    "--base", job["base"], "--adapter", job["adapter"], "--out", root / f"alone-{n}"
                ).exit_code
                == exits.OK
            )
    for n in range(2):
        for path in (root / f"alone-{n}").glob("*.safetensors"):
            assert path.read_bytes() == (root / f"out-{n}" / path.name).read_bytes()


@each
def test_the_sizes_of_changes_of_a_base_in_parts_are_measured(storage, place, cli):
    root = place(storage)
    with known(storage):
        result = cli("inspect", root / "adapter", "--base", root / "base", "--json")
    assert result.exit_code == exits.OK, result.stderr
    before = tensors_of(root / "base")
    norms = {row["path"]: row for row in json.loads(result.stdout)["modules"]}
    for name in TOUCHED:
        a, b = factors()[name]
        row = norms[name.removesuffix(".weight")]
        assert row["weight_norm"] == pytest.approx(float(values_in(storage, name, before).norm()), rel=1e-4)
        assert row["delta_norm"] == pytest.approx(float((SCALE * b @ a).norm()), rel=1e-4)


@each
def test_without_its_codec_a_base_in_parts_is_refused(storage, place, cli):
    root = place(storage)
    result = cli("--base", root / "base", "--adapter", root / "adapter", "--out", root / "out")
    assert result.exit_code == exits.PLAN
    assert "is stored as I8, expected BF16, F16 or F32" in result.stderr


@each
@pytest.mark.parametrize("kind", ["low_rank", "dora across"])
@pytest.mark.parametrize("shape", [(300, 40), (130, 70)], ids=str)
def test_the_values_of_a_merge_do_not_depend_on_how_the_base_is_stored(
    storage, kind, shape, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_merge.merging.peak.TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr("lora_merge.merging.peak.PANEL_ELEMENTS", 1 << 12)
    n_in, n_out = shape
    generator = torch.Generator().manual_seed(2)
    coded = stored_as(storage, "W", torch.randn(shape, generator=generator))
    tensors = {
        **coded,
        "plain": values_in(storage, "W", coded),
        "A": torch.randn(4, n_in, generator=generator),
        "B": torch.randn(n_out, 4, generator=generator),
        "magnitude": torch.rand(n_out, generator=generator) + 1,
    }
    save_file(tensors, tmp_path / "tensors")
    refs = {ref.name: ref for ref in read_header(tmp_path / "tensors").tensors}
    roles = ("A", "B", "magnitude") if kind == "dora across" else ("A", "B")
    facts = DoraFacts() if kind == "dora across" else LowRankFacts()
    stated = Delta("W", facts, {role: refs[role] for role in roles}, SCALE)
    delta = stated.placed("W", Region(transposed=True))
    found = {}
    with known(storage), one_torch_thread():
        names = TOYS[storage][0].names("W", None)
        parts = {role: refs[name] for role, name in names.items()}
        for weight in (Weight("W", shape, Storage(storage, "I8"), parts), Weight.dense(refs["plain"])):
            sink = InMemory(4 * n_in * n_out)
            reach = "columns" if kind == "dora across" else "rows"
            op = Merge(weight, FLOAT32, (delta,), View.of(shape), reach)
            Merger(sink, "cpu")(step_at(refs["plain"], op))
            found[weight.storage] = sink.tensor(shape)
    one, other = found.values()
    assert torch.equal(one, other)
    assert not torch.equal(one, tensors["plain"])


def test_what_one_codec_stores_another_can_take_over(tmp_path):
    """From one scale for each row to one for the whole tensor, without a delta: only the storage changes."""
    values = torch.randn((60, 16), generator=torch.Generator().manual_seed(3))
    save_file(stored_as("row_scaled", "W", values), tmp_path / "tensors")
    tensors = load_file(tmp_path / "tensors")
    refs = {ref.name: ref for ref in read_header(tmp_path / "tensors").tensors}
    wanted = stored_as("tensor_scaled", "W", values_in("row_scaled", "W", tensors))
    with known(*TOYS):
        one, other = (TOYS[name][0] for name in TOYS)
        source = {role: refs[name] for role, name in one.names("W", None).items()}
        writes = {
            role: TensorRef(name, *other.parts((60, 16), None)[role], "out", 0, wanted[name].nbytes)
            for role, name in other.names("W", None).items()
        }
        weight = Weight("W", (60, 16), Storage("row_scaled", "I8"), source)
        op = Merge(weight, Storage("tensor_scaled", "I8"), (), View.of((60, 16)))
        sink = ByName()
        records = Merger(sink, "cpu", 1 << 6)(Step("W", writes, op))
    assert sink.content == {ref.name: wanted[ref.name].numpy().tobytes() for ref in writes.values()}
    assert [record.source for record in records] == [
        {role: tensor_digest(source[role]) for role in source}
    ] * 2


class ByName:
    """Keeps what is written, by the names of the tensors."""

    def __init__(self):
        self.content = {}

    def copy(self, run):
        raise AssertionError(run)

    @contextlib.contextmanager
    def open(self, slot):
        found = self.content[slot.name] = bytearray()
        yield found.extend


def test_the_toys_are_known_only_where_they_are_wanted():
    from lora_merge.codecs import CODECS

    assert not CODECS.keys() & toy_codecs.TOYS.keys()
