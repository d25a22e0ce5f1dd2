"""What every check keeps, for each member of `CHECKS`: a good output passes, a planted fault is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import lora_merge
from lora_merge.adapters import read
from lora_merge.checks import CHECKS, Evidence
from lora_merge.core.plan import Copy, Merge
from lora_merge.core.provenance import Provenance
from lora_merge.executors.serial import run_serial
from lora_merge.merge import Merger
from lora_merge.verify import verify
from lora_merge.writers import HfCheckpoint
from tests.tampering import edit_json

LEVELS = ("sample", "full")
INDEX = "model.safetensors.index.json"
STORAGE = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


@pytest.fixture
def outcome(tmp_path) -> Callable[..., Evidence]:
    """Return a function (base, adapter, options) → the evidence of a real merge."""

    def make(base, adapter, level="sample", **options):
        plan = lora_merge.plan(base=base, adapter=adapter, **options)
        root = tmp_path / "output"
        root.mkdir()
        writer = HfCheckpoint(root)
        writer.reserve(plan)
        records = tuple(run_serial(Merger(writer, "cpu"), plan.steps))
        versions = {"lora-merge": lora_merge.__version__}
        writer.seal(plan, records, Provenance(str(base), read(adapter), str(adapter), "output", {}, versions))
        return Evidence(plan, root, records, level)

    return make


@pytest.fixture
def evidence(outcome, pico, pico_adapter):
    """The evidence of a sharded merge that keeps three tensors of each layer as they are."""
    base = pico("llama", "bfloat16", "40KB")
    return outcome(base, pico_adapter(base, target_modules=["q_proj", "down_proj"]))


def codes(evidence, *checks):
    """Return the codes of what some checks find."""
    return {issue.code for check in checks for issue in CHECKS[check](evidence)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "bfloat16", {}),
        ("llama_tied", "float16", {"max_shard_size": "30KB"}),
        ("qwen2", "float32", {}),
        ("qwen2", "bfloat16", {"dtype": "float32"}),
        ("gpt2", "float32", {"dtype": "float16"}),
        ("gpt2", "bfloat16", {}),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "+".join(value) or "default",
)
def test_every_check_passes_a_good_output(family, dtype, options, level, outcome, pico, pico_adapter):
    base = pico(family, dtype)
    evidence = outcome(base, pico_adapter(base, target_modules="all-linear"), level, **options)
    found = {name: list(check(evidence)) for name, check in CHECKS.items()}
    assert found == {name: [] for name in CHECKS}
    assert verify(evidence.plan, evidence.root, evidence.records, level).ok


def steps_of(evidence, kind):
    return [step for step in evidence.plan.steps if isinstance(step.op, kind)]


def flip(path, offset):
    """Invert the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def flip_in(kind, byte):
    """Flip a bit in one byte of the first tensor that was copied, or merged."""

    def plant(evidence):
        slot = steps_of(evidence, kind)[0].slots[0]
        flip(evidence.root / slot.file, range(slot.start, slot.end)[byte])
        return evidence

    return plant


def nudge(evidence, slot, row):
    """Move the largest value of a row by two steps of its dtype."""
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    bits = np.frombuffer(
        content, STORAGE[slot.dtype], slot.nbytes // STORAGE[slot.dtype](0).nbytes, slot.start
    )
    values = bits.reshape(slot.shape)[row]
    magnitude = values & np.iinfo(values.dtype).max >> 1
    at = int(magnitude.argmax())
    values[at] += 2
    path.write_bytes(content)
    return f"row {row % slot.shape[0]}, column {at} "


def nudge_row(row):
    """Nudge a row of the first merged tensor."""

    def plant(evidence):
        nudge(evidence, steps_of(evidence, Merge)[0].slots[0], row)
        return evidence

    return plant


def set_nan(evidence):
    slot = steps_of(evidence, Merge)[0].slots[0]
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    content[slot.start : slot.start + 2] = b"\xff\x7f"
    path.write_bytes(content)
    return evidence


def not_finite(evidence):
    first, *others = evidence.records
    return replace(evidence, records=(replace(first, finite=False), *others))


def on_disk(change):
    """Plant a fault by a change to the directory."""

    def plant(evidence):
        change(evidence.root)
        return evidence

    return plant


def first_shard(root):
    return min(root.glob("*.safetensors"))


def truncate(root):
    path = first_shard(root)
    path.write_bytes(path.read_bytes()[:-1])


def extend(root):
    path = first_shard(root)
    path.write_bytes(path.read_bytes() + b"\0")


def in_header(old, new):
    """Replace a text in a header by another of the same length."""

    def change(root):
        path = first_shard(root)
        content = path.read_bytes()
        assert old in content
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))

    return change


def edit_index(change):
    def edit(root):
        table = json.loads((root / INDEX).read_text())
        change(table)
        (root / INDEX).write_text(json.dumps(table))

    return edit


def swap_files(table):
    weight_map = table["weight_map"]
    by_file = {file: name for name, file in weight_map.items()}
    one, other, *_ = by_file.values()
    weight_map[one], weight_map[other] = weight_map[other], weight_map[one]


@dataclass(frozen=True)
class Fault:
    """Something wrong with an output, and who finds it."""

    check: str
    plant: Callable[[Evidence], Evidence]
    code: str
    level: str = "sample"


FAULTS = {
    "a weight file is missing": Fault(
        "structure", on_disk(lambda root: first_shard(root).unlink()), "missing-file"
    ),
    "a side file is missing": Fault(
        "structure", on_disk(lambda root: (root / "tokenizer.json").unlink()), "missing-file"
    ),
    "the index is missing": Fault("structure", on_disk(lambda root: (root / INDEX).unlink()), "missing-file"),
    "the manifest is missing": Fault(
        "structure", on_disk(lambda root: (root / "merge_manifest.json").unlink()), "missing-file"
    ),
    "a file is one too many": Fault(
        "structure", on_disk(lambda root: (root / "x.bin").touch()), "extra-file"
    ),
    "a file in a folder is one too many": Fault(
        "structure", on_disk(lambda root: (root / "sub").mkdir() or (root / "sub/x").touch()), "extra-file"
    ),
    "a shard is cut short": Fault("structure", on_disk(truncate), "broken-file"),
    "a shard is too long": Fault("structure", on_disk(extend), "broken-file"),
    "a shard is empty": Fault(
        "structure", on_disk(lambda root: first_shard(root).write_bytes(b"")), "broken-file"
    ),
    "a tensor has another name": Fault(
        "structure", on_disk(in_header(b"embed_tokens", b"embed_tokenz")), "extra-tensor"
    ),
    "a tensor has another dtype": Fault(
        "structure", on_disk(in_header(b'"BF16"', b'"F16" ')), "wrong-tensor"
    ),
    "a tensor has another shape": Fault(
        "structure", on_disk(in_header(b"[96,64]", b"[64,96]")), "wrong-tensor"
    ),
    "a side file differs": Fault(
        "structure", on_disk(lambda root: flip(root / "config.json", 0)), "side-file"
    ),
    "the index counts wrongly": Fault(
        "structure", on_disk(edit_index(lambda table: table["metadata"].update(total_size=1))), "wrong-index"
    ),
    "the index forgets a tensor": Fault(
        "structure", on_disk(edit_index(lambda table: table["weight_map"].popitem())), "wrong-index"
    ),
    "the index swaps two files": Fault("structure", on_disk(edit_index(swap_files)), "wrong-index"),
    "the index is no JSON": Fault(
        "structure", on_disk(lambda root: (root / INDEX).write_text("{")), "wrong-index"
    ),
    "the index has no metadata": Fault(
        "structure", on_disk(lambda root: edit_json(root / INDEX, metadata=None)), "wrong-index"
    ),
    "a value was not finite": Fault("finite", not_finite, "non-finite"),
    "a copy's first byte differs": Fault("untouched", flip_in(Copy, 0), "wrong-digest"),
    "a copy's last byte differs": Fault("untouched", flip_in(Copy, -1), "wrong-digest"),
    "a merged byte differs": Fault("untouched", flip_in(Merge, 1000), "wrong-digest", "full"),
    "a value of the first row is off": Fault("recompute", nudge_row(0), "wrong-value"),
    "a value of the last row is off": Fault("recompute", nudge_row(-1), "wrong-value"),
    "a value of any row is off": Fault("recompute", nudge_row(17), "wrong-value", "full"),
    "a value became NaN": Fault("recompute", set_nan, "wrong-value"),
}
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


def test_every_check_has_faults_to_find():
    assert {fault.check for fault in FAULTS.values()} == set(CHECKS)


@every_fault
def test_a_check_finds_what_it_is_for(fault, evidence):
    evidence = fault.plant(replace(evidence, level=fault.level))
    assert fault.code in codes(evidence, fault.check)


@every_fault
def test_a_faulty_output_fails_verification(fault, evidence):
    evidence = fault.plant(replace(evidence, level=fault.level))
    verdict = verify(evidence.plan, evidence.root, evidence.records, evidence.level)
    assert not verdict.ok
    assert fault.code in {issue.code for issue in verdict.errors}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_recomputation_finds_two_steps_in_any_row_and_says_where(
    family, dtype, outcome, pico, pico_adapter
):
    base = pico(family, dtype)
    evidence = outcome(base, pico_adapter(base, target_modules="all-linear"), "full")
    places = {}
    for n, step in enumerate(steps_of(evidence, Merge)):
        slot = step.slots[0]
        places[slot.name] = nudge(evidence, slot, 7 * n % slot.shape[0])
    found = {issue.subject: issue.sentence for issue in CHECKS["recompute"](evidence)}
    assert sorted(found) == sorted(places)
    for name, place in places.items():
        assert found[name].startswith(place)


def test_full_recomputation_takes_every_row_and_a_sample_takes_three():
    from lora_merge.checks.recompute import sampled_rows
    from lora_merge.core.tensor import TensorRef

    slot = TensorRef("w", "BF16", (1000, 2), "file", 0, 4000)
    assert [row for rows in sampled_rows(slot, "full") for row in rows] == list(range(1000))
    (sample,) = sampled_rows(slot, "sample")
    assert sample == sorted(sample)
    assert {0, 999} < set(sample)
    assert len(sample) == 3


def test_no_check_writes_into_the_output(evidence):
    def content(root: Path):
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.iterdir()}

    before = content(evidence.root)
    for check in CHECKS.values():
        assert list(check(replace(evidence, level="full"))) == []
    assert content(evidence.root) == before
