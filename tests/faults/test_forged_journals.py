"""The journal of an interrupted run is edited, so that it fits tensors that are wrong: they are written again."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

import lora_merge
from lora_merge.checks import choosing
from lora_merge.core.plan import Copy, Merge
from lora_merge.core.report import Silence
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.merging import resuming
from lora_merge.storage.staging import staging_path

N_DONE = 14
"""Tensors that the interrupted run has written, copies among them."""

NAME, DIGEST, SUSPECTS, BLOCKS = 0, 3, 7, 8
"""Where a line of a journal has them."""


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def case(request, pico, pico_adapter, tmp_path_factory):
    """A base and an adapter, as arguments, and the output of an uninterrupted run."""
    base = pico("llama", request.param, "400KB", hidden_size=256, intermediate_size=320)
    inputs = {"base": base, "adapter": pico_adapter(base, target_modules="all-linear")}
    whole = tmp_path_factory.mktemp("whole") / "out"
    lora_merge.merge(**inputs, out=whole)
    return inputs, whole


@pytest.fixture(autouse=True)
def as_in_a_large_model(monkeypatch):
    """Have no tensor recomputed for being small, and no source read again because its time of change is not conclusive."""
    monkeypatch.setattr(choosing, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(
        resuming,
        "changed_times",
        lambda inputs: {path: file.identity.changed for path, file in inputs.files.items()},
    )


class _Interrupting(Silence):
    """Interrupts a run once some tensors are done."""

    n_done = 0

    def done(self, name):
        self.n_done += 1
        if self.n_done == N_DONE:
            raise KeyboardInterrupt


def interrupted(inputs, out: Path) -> Path:
    """Interrupt a merge; return its staging directory."""
    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(**inputs, out=out, workers=1, observer=_Interrupting())
    return staging_path(out)


def resumed(inputs, out: Path, **options) -> int:
    """Resume a merge; return how many tensors it took over."""
    report = lora_merge.merge(**inputs, out=out, resume=True, **options)
    (told,) = [issue.sentence for issue in report.issues if issue.code == "resumed"]
    return int(told.partition(" written ")[2].split()[0])


def a_row_of_zeros(row: memoryview, before: bytes) -> None:
    row[:] = bytes(len(row))


def a_row_of_the_base(row: memoryview, before: bytes) -> None:
    row[:] = before


def a_row_of_nan(row: memoryview, before: bytes) -> None:
    row[:] = b"\xff" * len(row)


def nan_in_an_even_column(row: memoryview, before: bytes) -> None:
    row[160:164] = b"\xff" * 2 + bytes(row[162:164]) if len(row) == 512 else b"\xff" * 4


def nan_in_an_odd_column(row: memoryview, before: bytes) -> None:
    row[164:168] = bytes(row[164:166]) + b"\xff" * 2 if len(row) == 512 else b"\xff" * 4


def the_lowest_bit(row: memoryview, before: bytes) -> None:
    row[40] ^= 1


def a_bit(row: memoryview, before: bytes) -> None:
    row[1] ^= 0x40


FAULTS = [
    (Merge, a_row_of_zeros),
    (Merge, a_row_of_the_base),
    (Merge, a_row_of_nan),
    (Merge, nan_in_an_even_column),
    (Merge, nan_in_an_odd_column),
    (Copy, a_bit),
]


def forge(staging: Path, inputs, kind: type, fault, *, is_edited: bool = True) -> None:
    """Plant a fault in the last tensor that a run has written in a way, and edit the journal so that it fits."""
    journal = staging / "journal.jsonl"
    head, *rows = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = {step.main.name: step for step in lora_merge.plan(**inputs).steps if isinstance(step.op, kind)}
    entry = [row for row in rows if row[NAME] in steps][-1]
    step = steps[entry[NAME]]
    source = step.reads["weight"]
    size = source.nbytes // source.shape[0]
    slot = replace(step.main, file=str(staging / "output" / step.main.file))
    with Path(slot.file).open("r+b") as file, Path(source.file).open("rb") as base:
        # A row that is not among those that are always recomputed.
        at = (zlib.crc32(step.name.encode()) + 1) % (slot.shape[0] - 2) + 1
        base.seek(source.start + at * size)
        file.seek(slot.start + at * size)
        content = bytearray(file.read(size))
        fault(memoryview(content), base.read(size))
        file.seek(slot.start + at * size)
        file.write(content)
    if not is_edited:
        return
    entry[DIGEST], entry[SUSPECTS], entry[BLOCKS] = tensor_digest(slot), entry[SUSPECTS] and [], []
    # Editors may make the times fit too.
    head["changed"] = times(inputs)
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in [head, *rows]))


def times(inputs) -> dict[str, int]:
    """Return when each file of the inputs changed last, in nanoseconds."""
    return {str(path): path.stat().st_ctime_ns for root in inputs.values() for path in root.iterdir()}


@pytest.mark.parametrize(("kind", "fault"), FAULTS, ids=lambda value: value.__name__)
def test_a_tensor_that_a_forged_journal_vouches_for_is_written_again(case, kind, fault, tmp_path):
    inputs, whole = case
    out = tmp_path / "out"
    staging = interrupted(inputs, out)
    forge(staging, inputs, kind, fault)

    assert resumed(inputs, out) == N_DONE - 1
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_bit_that_only_the_digest_in_the_journal_tells_is_written_again(case, tmp_path):
    inputs, whole = case
    out = tmp_path / "out"
    forge(interrupted(inputs, out), inputs, Merge, the_lowest_bit, is_edited=False)

    assert resumed(inputs, out) == N_DONE - 1
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_right_is_taken_over(case, tmp_path):
    inputs, whole = case
    out = tmp_path / "out"
    interrupted(inputs, out)

    assert resumed(inputs, out) == N_DONE
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_verification_the_digests_of_a_journal_are_enough(case, tmp_path):
    inputs, _ = case
    out = tmp_path / "out"
    forge(interrupted(inputs, out), inputs, Merge, a_row_of_zeros)

    assert resumed(inputs, out, verify="none") == N_DONE
