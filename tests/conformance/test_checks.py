"""What every check keeps, for each member of `CHECKS`: a good output passes, a planted fault is found."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import lora_merge
from lora_merge.adapters import read
from lora_merge.checks import CHECKS, Evidence
from lora_merge.checks.choosing import has_formula, some_rows
from lora_merge.checks.expecting import manner_of
from lora_merge.checks.plain_rows import PlainRows
from lora_merge.checks.reckoners import reckoners
from lora_merge.checks.verdict import verify
from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import Copy, Merge
from lora_merge.core.tensor import Region, TensorRef
from lora_merge.core.view import View
from lora_merge.deltas import LowRankFacts
from lora_merge.errors import CheckpointError
from lora_merge.formats.provenance import Provenance
from lora_merge.merging.hf_checkpoint import seal
from lora_merge.peft_rules.kinds import NATIVE, PEFT_LAYERS
from lora_merge.requests.values import parse_adapter
from lora_merge.storage.folder import Folder
from tests import planting
from tests.crossing import one_for_each
from tests.filling import fill
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.steps import dense_merge
from tests.tampering import edit_json, edit_pickle, to_pickles

LEVELS = ("sample", "full")
INDEX = "model.safetensors.index.json"
STORAGE = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


OPTIONS = {
    (): {},
    ("--allow-svd",): {"allow_svd": True},
    ("--base-is", "original"): {"base_is": "original"},
    ("--base-is", "residual"): {"base_is": "residual"},
}
"""What the options of a kind are in Python."""


@pytest.fixture
def outcome(tmp_path) -> Callable[..., Evidence]:
    """Return a function (base, adapter or adapters, options) → the evidence of a real merge."""

    def make(base, adapter, level="sample", **options):
        plan = lora_merge.plan(base=base, adapter=adapter, **options)
        root = tmp_path / "output"
        records = tuple(fill(plan, root))
        paths = tuple(map(str, adapter if isinstance(adapter, list) else [adapter]))
        adapters = tuple(read(Path(parse_adapter(path)[0])) for path in paths)
        versions = {"lora-merge": lora_merge.__version__}
        seal(Folder.of(root), plan, records, Provenance(str(base), adapters, paths, "output", {}, versions))
        return Evidence(plan, root, records, level)

    return make


@pytest.fixture
def outcome_of(workshop, outcome) -> Callable[..., Evidence]:
    """Return a function (names of kinds with weights, model, dtype of the base, options) → full evidence."""

    def make(named, model, stored, **options):
        cases = []
        for name, weight in named.items():
            kind = next(kind for kind in KINDS if kind.name == name)
            if kind.needs:
                pytest.importorskip(kind.needs)
            options |= OPTIONS[kind.options]
            cases.append((building.case(workshop, kind, model, stored), weight))
        adapters = [f"{case.adapter}:{weight:g}" for case, weight in cases]
        return outcome(cases[0][0].base, adapters, "full", **options)

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


def kinds_of(types):
    """Return (name, model, dtype) of every kind of some PEFT types."""
    return [
        pytest.param(kind.name, model, dtype, id=f"{kind.name}-{model}-{dtype}")
        for kind in KINDS
        if kind.peft_type in types
        for model in kind.models
        for dtype in kind.dtypes
    ]


def test_every_type_that_is_merged_is_among_the_kinds():
    assert {kind.peft_type for kind in KINDS} == NATIVE | PEFT_LAYERS


@pytest.mark.parametrize(("kind", "model", "dtype"), one_for_each(kinds_of(NATIVE), lambda kind, *_: kind))
def test_every_check_passes_a_good_output_of_every_kind_with_a_formula(kind, model, dtype, outcome_of):
    evidence = outcome_of({kind: 1}, model, dtype)
    assert {name: list(check(evidence)) for name, check in CHECKS.items()} == {name: [] for name in CHECKS}
    suspects = [record.suspects or () for record in evidence.records]
    assert all(sum(last - first for first, last in ranges) <= 1 for ranges in suspects)
    verdict = verify(evidence.plan, evidence.root, evidence.records, "full")
    with_formula = any(
        all(not delta.facts.by_peft for delta in step.op.deltas) for step in steps_of(evidence, Merge)
    )
    assert with_formula == (verdict.n_rows > 0)
    assert verdict.ok


_VARIED = ("BOFT", "IA³", "LoKr", "TinyLoRA", "VeRA", "OSF")
"""Methods of which PEFT keeps something beside factors: ties, shared matrices, seeds."""


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    one_for_each(
        [case for case in kinds_of(PEFT_LAYERS) if case.values[2] == "bfloat16" or "LoHa" in case.values[0]],
        lambda _, model, __: model,
        lambda kind, *_: kind in _VARIED and kind,
    ),
)
def test_every_check_passes_a_good_output_of_pefts_own_layers(kind, model, dtype, outcome_of):
    evidence = outcome_of({kind: 1}, model, dtype)
    assert [
        issue for check in CHECKS.values() for issue in check(evidence) if issue.severity == "error"
    ] == []


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
        slot = steps_of(evidence, kind)[0].main
        flip(evidence.root / slot.file, range(slot.start, slot.end)[byte])
        return evidence

    return plant


def nudge(evidence, slot, row, n_steps=2):
    """Move the largest value of a row by some steps of its dtype."""
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    bits = np.frombuffer(
        content, STORAGE[slot.dtype], slot.nbytes // STORAGE[slot.dtype](0).nbytes, slot.start
    )
    n_rows = view_of(evidence, slot).n_rows
    values = bits.reshape(n_rows, -1)[row]
    magnitude = values & np.iinfo(values.dtype).max >> 1
    at = int(magnitude.argmax())
    values[at] += n_steps
    path.write_bytes(content)
    return f"row {row % n_rows}, column {at} "


def view_of(evidence, slot):
    """Return the view of a merged tensor."""
    return next(step.op.view for step in steps_of(evidence, Merge) if step.main == slot)


def nudge_row(row):
    """Nudge a row of the first merged tensor."""

    def plant(evidence):
        nudge(evidence, steps_of(evidence, Merge)[0].main, row)
        return evidence

    return plant


def set_nan(evidence):
    slot = steps_of(evidence, Merge)[0].main
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    content[slot.start : slot.start + 2] = b"\xff\x7f"
    path.write_bytes(content)
    return evidence


def keep_as_in_the_base(evidence):
    """Put the base's bytes in the place of the first merged tensor."""
    step = steps_of(evidence, Merge)[0]
    slot, source = step.main, step.op.source.plain
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    content[slot.start : slot.end] = Path(source.file).read_bytes()[source.start : source.end]
    path.write_bytes(content)
    return evidence


def double_a_row(evidence):
    """Multiply every value of a row of the first merged tensor by two, in bfloat16."""
    step = steps_of(evidence, Merge)[0]
    slot = step.main
    path = evidence.root / slot.file
    content = bytearray(path.read_bytes())
    bits = np.frombuffer(content, np.uint16, slot.nbytes // 2, slot.start).reshape(step.op.view.n_rows, -1)
    bits[5] += 1 << 7  # the exponent stands above seven bits of fraction
    path.write_bytes(content)
    return evidence


def not_finite(evidence):
    """Have the first merged tensor hold NaN, and its record say that it may."""
    name = steps_of(set_nan(evidence), Merge)[0].main.name
    records = tuple(replace(one, finite=one.finite and one.name != name) for one in evidence.records)
    return replace(evidence, records=records)


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


def miscounted(evidence):
    """Say in the output's config that there is one more token, and in the plan that this was wanted."""
    edit_json(evidence.root / "config.json", vocab_size=97)
    return replace(evidence, plan=replace(evidence.plan, config_patch=ConfigPatch({"vocab_size": 97})))


@dataclass(frozen=True)
class Fault:
    """Something wrong with an output, and who finds it."""

    check: str
    plant: Callable[[Evidence], Evidence]
    code: str
    level: str = "sample"
    kind: str = ""
    """The kind of adapter; empty for a LoRA on a sharded base."""


FAULTS = {
    "the config counts other tokens than the embedding has": Fault("loadable", miscounted, "vocabulary"),
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
    "a module of PEFT's layers was not merged": Fault(
        "layers", keep_as_in_the_base, "wrong-output", kind="LoHa"
    ),
    "a module of PEFT's layers became NaN": Fault("layers", set_nan, "wrong-output", kind="LoHa"),
    "a row of PEFT's layers is twice as large": Fault("layers", double_a_row, "wrong-output", kind="LoHa"),
}
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


@pytest.fixture
def faulty(request, outcome_of):
    """Return a function: fault → the evidence of an output with it."""

    def make(fault):
        good = (
            outcome_of({fault.kind: 1}, "llama", "bfloat16")
            if fault.kind
            else request.getfixturevalue("evidence")
        )
        return fault.plant(replace(good, level=fault.level))

    return make


def test_every_check_has_faults_to_find():
    assert {fault.check for fault in FAULTS.values()} == set(CHECKS)


@every_fault
def test_a_check_finds_what_it_is_for(fault, faulty):
    assert fault.code in codes(faulty(fault), fault.check)


@every_fault
def test_a_faulty_output_fails_verification(fault, faulty):
    evidence = faulty(fault)
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
        slot = step.main
        places[slot.name] = nudge(evidence, slot, 7 * n % slot.shape[0])
    assert_found_at(evidence, places)


def assert_found_at(evidence, places):
    """Check that recomputation finds a fault in each of these tensors, there, and in no others."""
    found = {issue.subject: issue.sentence for issue in CHECKS["recompute"](evidence)}
    assert sorted(found) == sorted(places)
    for name, place in places.items():
        assert found[name].startswith(place)


OTHER_LORA = "LoRA with rank_pattern and alpha_pattern"
OUTCOMES = {
    "a DoRA": ({"DoRA on a linear layer": 1}, "llama", {}),
    "a DoRA by a half": ({"DoRA on a linear layer": 0.5}, "llama", {}),
    "a DoRA on Conv1D": ({"DoRA on Conv1D": 1}, "gpt2", {}),
    "a DoRA on an embedding": ({"DoRA on an embedding": 1}, "llama", {}),
    "a DoRA on a convolution": ({"DoRA on Conv2d": 1}, "resnet", {}),
    "an embedding": ({"LoRA on an embedding": 1}, "llama", {}),
    "an AdaLoRA": ({"AdaLoRA": 1}, "llama", {}),
    "an AdaLoRA on a convolution": ({"AdaLoRA": 1}, "resnet", {}),
    "a convolution": ({"LoRA on Conv2d": 1}, "resnet", {}),
    "stacked experts, in × out": (
        {"LoRA on stacked experts (target_parameters), two parameters": 1},
        "gpt_oss",
        {},
    ),
    "stacked experts, out × in": (
        {"LoRA on stacked experts (target_parameters), two parameters": 1},
        "qwen3_moe",
        {},
    ),
    "biases of lora_B": ({"LoRA with a bias (lora_bias)": 1}, "llama_biased", {}),
    "BD-LoRA": ({"BD-LoRA": 1}, "llama", {}),
    "an attention whose output is merged twice": ({"LoRA on nn.MultiheadAttention": 1}, "siglip", {}),
    "trained rows": ({"trainable_token_indices": 1}, "llama", {}),
    "a module in the place of another": ({"modules_to_save": 1}, "llama", {"dtype": "float16"}),
    "two adapters": ({"LoRA": 0.5, OTHER_LORA: 1.75}, "llama", {}),
    "two adapters, the second a DoRA": ({"LoRA": 0.5, "DoRA on a linear layer": 1}, "llama", {}),
    "ties": ({"LoRA": 1, OTHER_LORA: 3}, "llama", {"combine": "ties"}),
    "dare": ({"LoRA": 1, OTHER_LORA: 3}, "llama", {"combine": "dare_linear", "seed": 3}),
    "dare and ties": ({"LoRA": 1, OTHER_LORA: 3}, "llama", {"combine": "dare_ties", "density": 0.7}),
    "ties of a LoRA and a DoRA": (
        {"LoRA": 1, "DoRA on a linear layer": 1},
        "llama",
        {"combine": "ties", "density": 0.2},
    ),
}
every_outcome = pytest.mark.parametrize(("named", "model", "options"), OUTCOMES.values(), ids=OUTCOMES.keys())


@every_outcome
def test_every_outcome_below_is_a_good_one(named, model, options, outcome_of):
    evidence = outcome_of(named, model, "bfloat16", **options)
    assert [issue for check in CHECKS.values() for issue in check(evidence)] == []


@every_outcome
def test_two_steps_of_the_dtype_are_found_in_the_output_of_any_formula(named, model, options, outcome_of):
    evidence = outcome_of(named, model, "bfloat16", **options)
    steps = [step for step in steps_of(evidence, Merge) if has_formula(step.op)]
    assert any(step.op.deltas for step in steps)
    places = {}
    for n, step in enumerate(steps):
        slot = step.main
        # where PEFT rounds a delta, or the weight in between, the right value is known to one step less each
        rounded = any(delta.rounded for delta in step.op.deltas)
        settled = any(delta.round_before_next for delta in step.op.deltas)
        # a combination leaves several values to choose from, and one of them may lie a few steps away
        steps_away = 2 + rounded + settled + (100 if step.op.combination else 0)
        row = (7 * n + 17) % step.op.view.n_rows
        places[slot.name] = nudge(evidence, slot, row, steps_away)
    assert_found_at(evidence, places)


@pytest.mark.parametrize("row", [1, 17, 80, 2, 95])
def test_two_steps_are_found_in_a_trained_row_and_in_any_other(row, outcome_of):
    evidence = outcome_of({"trainable_token_indices": 1}, "llama", "bfloat16")
    slot = next(step.main for step in steps_of(evidence, Merge) if "embed" in step.main.name)
    place = nudge(evidence, slot, row)
    assert_found_at(evidence, {slot.name: place})


@pytest.mark.parametrize("shape", [(1000, 2), (1000,), (1000, 4, 3, 3)])
def test_a_sample_of_a_large_tensor_takes_three_rows_and_those_that_are_suspect(shape):
    slot = TensorRef("w", "BF16", shape, "file", 0, 0)
    op = dense_merge(slot, (), View.of(shape, stacked=True))
    sample = some_rows(slot.name, op)
    assert sample == sorted(sample)
    assert {0, 999} < set(sample)
    assert len(sample) == 3
    assert some_rows(slot.name, op, ((7, 9), (990, 1000))) == sorted({*sample, 7, 8, *range(990, 1000)})


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    one_for_each(kinds_of(NATIVE), lambda kind, *_: kind, lambda _, model, dtype: (model, dtype)),
)
def test_projections_of_every_kind_suspect_a_row_of_zeros(kind, model, dtype, workshop, outcome_of):
    case = building.case(workshop, next(one for one in KINDS if one.name == kind), model, dtype)
    options = OPTIONS[next(one for one in KINDS if one.name == kind).options]
    plan = lora_merge.plan(base=case.base, adapter=case.adapter, **options)
    place = planting.place_in(plan, 0)
    (step,) = [step for step in plan.steps if step.main.name == place.name]
    with planting.in_merge("a row of zeros", place, step.op.source.name):
        evidence = outcome_of({kind: 1}, model, dtype)
    (record,) = [record for record in evidence.records if record.name == place.name]
    if not manner_of(step.op):
        assert record.suspects is None
        return
    assert any(first <= place.row < last for first, last in record.suspects)


@pytest.mark.parametrize(("shape", "n_experts"), [((8, 125, 2), 8), ((500, 2, 3), 63)])
def test_a_sample_of_stacked_experts_takes_a_row_of_each_or_of_many(shape, n_experts):
    slot = TensorRef("w", "BF16", shape, "file", 0, 0)
    op = dense_merge(slot, (), View.of(shape, stacked=True))
    sample = some_rows(slot.name, op)
    assert {0, 999} < set(sample)
    assert len({row // shape[1] for row in sample}) >= n_experts


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_sample_of_parts_takes_a_row_of_each(at_once):
    slot = TensorRef("w", "BF16", (6, 40, 2), "file", 0, 0)
    parts = [Region(box=((n, n + at_once), (10, 20), (0, 2))) for n in range(0, 6, at_once)]
    deltas = tuple(Delta("w", LowRankFacts(), {}).placed("w", region) for region in parts)
    sample = some_rows(slot.name, dense_merge(slot, deltas, View.of(slot.shape, stacked=True)))
    for region in parts:
        first = region.box[0][0]
        assert any(row // 40 == first and 10 <= row % 40 < 20 for row in sample)


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_values_of_a_pickled_file_are_recomputed_from_that_file(role, outcome, pico, pico_adapter, tampered):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    to_pickles(base)
    to_pickles(adapter)
    evidence = outcome(base, adapter, "full")
    assert list(CHECKS["recompute"](evidence)) == []

    (file,) = {"base": base, "adapter": adapter}[role].glob("*model.bin")
    edit_pickle(
        file,
        lambda tensors: [t.add_(1) for name, t in tensors.items() if "layers.1.self_attn.q_proj" in name],
    )

    assert [issue.subject for issue in CHECKS["recompute"](evidence)] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]


def test_no_check_writes_into_the_output(evidence):
    def content(root: Path):
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.iterdir()}

    before = content(evidence.root)
    for check in CHECKS.values():
        assert list(check(replace(evidence, level="full"))) == []
    assert content(evidence.root) == before


# several threads


def found_by(n_threads, evidence):
    """Return what every check finds with some threads."""
    with reckoners(n_threads) as crew:
        return {name: list(check(replace(evidence, crew=crew))) for name, check in CHECKS.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_several_threads_find_what_one_finds_in_the_same_order(level, evidence):
    for step in steps_of(evidence, Merge):
        nudge(evidence, step.main, 0)
    for step in steps_of(evidence, Copy):
        flip(evidence.root / step.main.file, step.main.start)
    spoiled = replace(evidence, level=level)
    alone = found_by(1, spoiled)
    assert len(alone["recompute"]) == len(steps_of(evidence, Merge)) > 3
    assert len(alone["untouched"]) > len(steps_of(evidence, Copy)) > 3
    for _ in range(5):
        assert found_by(3, spoiled) == alone


@pytest.mark.parametrize("check", ["recompute", "untouched"])
def test_an_error_at_one_tensor_comes_out_of_several_threads_as_of_one(check, evidence):
    found = []
    for file in evidence.plan.files[1:]:
        path = evidence.root / file.name
        path.write_bytes(path.read_bytes()[: file.slots[0].start + 1])
    for n_threads in (1, 3, 3, 3):
        with reckoners(n_threads) as crew, pytest.raises(CheckpointError) as caught:
            list(CHECKS[check](replace(evidence, level="full", crew=crew)))
        found.append(str(caught.value))
    assert found == [found[0]] * 4


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_interrupt_of_a_verification_is_not_kept_waiting_for_the_rest(
    n_threads, outcome, pico, pico_adapter, monkeypatch
):
    base = pico("llama", "bfloat16", "40KB")
    evidence = outcome(base, pico_adapter(base, target_modules="all-linear"))
    explain, main, begun = PlainRows.are_explained, threading.get_ident(), []

    def struck(*arguments):
        begun.append(arguments)
        time.sleep(0.2)
        if begun[0] is arguments:  # once, after all threads have begun
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.2)
        return explain(*arguments)

    monkeypatch.setattr(PlainRows, "are_explained", struck)
    with pytest.raises(KeyboardInterrupt), reckoners(n_threads) as crew:
        verify(evidence.plan, evidence.root, evidence.records, "full", crew=crew)
    assert 1 <= len(begun) <= 2 * n_threads < len(steps_of(evidence, Merge)) / 2
