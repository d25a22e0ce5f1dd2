"""Rows of codes that are recomputed without torch: what they say yes to, the formulas explain; and of right merges they say yes."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lora_merge.checks.bounds import Wanted
from lora_merge.checks.coded_rows import CodedRows, limits
from lora_merge.checks.decoding import Levels
from lora_merge.checks.decoding.by_code import coding_of
from lora_merge.checks.effect import Effect
from lora_merge.checks.formulas import Site, changed
from lora_merge.checks.reading import Reader
from lora_merge.core.adapter import Delta
from lora_merge.core.plan import Combination, Merge, Rounding
from lora_merge.core.tensor import Region, Survival
from lora_merge.core.view import View
from lora_merge.core.weight import Storage, Weight
from lora_merge.deltas import LowRankFacts
from lora_merge.formats.safetensors import read_header

ROWS, COLUMNS, RANK = 40, 192, 4
SCALED = {"block_rows": 16, "block_columns": 64, "scale": "F32"}
PACKED = {"bits": 4, "group": 32, "zero": False, "g_idx": False}
STORAGES = {
    "fp8-blocks": ("scaled", "F8_E4M3", SCALED | {"codes": "F8_E4M3"}),
    "e5m2-tensor": (
        "scaled",
        "F8_E5M2",
        SCALED | {"codes": "F8_E5M2", "block_rows": 0, "block_columns": 0},
    ),
    "int8-rows": ("scaled", "I8", SCALED | {"codes": "I8", "block_rows": 1, "block_columns": 0}),
    "mxfp8": (
        "scaled",
        "F8_E4M3",
        SCALED | {"codes": "F8_E4M3", "block_rows": 1, "block_columns": 32, "scale": "U8"},
    ),
    "int4": ("packed_int", "I32", PACKED),
    "int4-rows": ("packed_int", "I32", PACKED | {"group": 0}),
    "int8-packed": ("packed_int", "I32", PACKED | {"bits": 8}),
    "mxfp4": ("fp4", "U8", {"group": 32, "scale": "E8M0", "global": "none"}),
    "nvfp4": ("fp4", "U8", {"group": 16, "scale": "E4M3", "global": "divide"}),
    "nvfp4-times": ("fp4", "U8", {"group": 16, "scale": "E4M3", "global": "multiply"}),
}
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8}
PERMISSIVE = Survival(1.0, 1.0, 0.0, 0.0, effect_norm=1e30, effect_error=1e30)


def storage_of(name):
    codec, dtype, settings = STORAGES[name]
    return Storage(codec, dtype, tuple(sorted(settings.items())))


def scales_of(name, generator):
    """Return the parts with the scales of a weight."""
    settings = STORAGES[name][2]
    group = settings.get("group", settings.get("block_columns")) or COLUMNS
    high = -(-ROWS // (settings.get("block_rows", 1) or ROWS))
    shape = (high, COLUMNS // group)
    match settings.get("scale"):
        case "E8M0" | "U8":
            parts = {"scale": torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)}
        case "E4M3":
            scale = torch.rand(shape, generator=generator) * 100 + 1
            parts = {"scale": scale.to(torch.float8_e4m3fn)}
        case _:
            parts = {"scale": torch.rand(shape, generator=generator) * 0.02 + 0.001}
    if settings.get("global", "none") != "none":
        parts["global"] = torch.tensor([3000.0 if settings["global"] == "divide" else 1 / 3000])
    return parts


def bits_of(name):
    return {"fp4": 4, "packed_int": STORAGES[name][2].get("bits")}.get(STORAGES[name][0], 8)


def packed(name, codes):
    """Return codes, uint8 ``[ROWS, COLUMNS]``, as they are stored."""
    if bits_of(name) == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    if STORAGES[name][0] == "packed_int":
        return codes.contiguous().view(torch.int32)
    return codes.contiguous().view(TORCH[STORAGES[name][1]])


def drawn(name, generator):
    """Return codes, none of which is NaN or infinite."""
    codes = torch.randint(0, 1 << bits_of(name), (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    if STORAGES[name][1] == "F8_E4M3":
        codes[(codes & 0x7F) == 0x7F] = 3
    if STORAGES[name][1] == "I8" or (STORAGES[name][0] == "packed_int" and bits_of(name) == 8):
        # Not near the last ones.
        middle = 0 if STORAGES[name][1] == "I8" else 128
        return ((codes % 120).short() - 60 + middle).to(torch.uint8)
    return codes & 0xBF if STORAGES[name][1] == "F8_E5M2" else codes


def said_of(coded, rows, record):
    return coded.are_explained(rows) and coded.are_as_recorded(record)


class Made:
    """A weight, an adapter of it, and the merge; what is stored is chosen by the test."""

    def __init__(self, root, name, *, method=None, size=1.0, seed=0, codes=None):
        self.root, self.name = root, name
        generator = torch.Generator().manual_seed(seed)
        self.base = drawn(name, generator) if codes is None else codes
        self.scales = scales_of(name, generator)
        a = torch.randn(RANK, COLUMNS, generator=generator)
        b = torch.randn(ROWS, RANK, generator=generator) * size
        save_file({"a": a, "b": b}, root / "adapter.safetensors")
        self.weight = self._saved("base", self.base)
        pair = {role: self._ref("adapter", role.lower()) for role in ("A", "B")}
        delta = Delta("w", LowRankFacts(), pair, scale=0.3).placed("w")
        self.op = Merge(
            self.weight,
            self.weight.storage,
            (delta,),
            View.of((ROWS, COLUMNS)),
            rounding=Rounding(method) if method else None,
            on_stored_grid=True,
        )
        assert CodedRows.applies(self.op)

    def _ref(self, file, name):
        return next(ref for ref in read_header(self.root / f"{file}.safetensors").tensors if ref.name == name)

    def _saved(self, file, codes):
        save_file({"w": packed(self.name, codes), **self.scales}, self.root / f"{file}.safetensors")
        parts = {"weight": self._ref(file, "w")} | {role: self._ref(file, role) for role in self.scales}
        return Weight("w", (ROWS, COLUMNS), storage_of(self.name), parts)

    @contextlib.contextmanager
    def reader(self):
        with contextlib.ExitStack() as stack:
            yield Reader(stack)

    def nearest(self):
        """Return the codes of the nearest levels, and the wanted values among the levels."""
        with self.reader() as reader:
            site = Site(reader, self.op, range(ROWS), "F32")
            exact, _ = changed(site, self.op.deltas, site.start(range(ROWS)))
            levels = self.meaning()
            scale = reader.written(self.weight, range(ROWS), ROWS).scale
            numbers = exact / scale
            near = (numbers.unsqueeze(-1) - levels).abs().nan_to_num(nan=1e300).argmin(-1)
            return near.to(torch.uint8), numbers

    def meaning(self):
        """Return the level of each code."""
        every = torch.arange(1 << bits_of(self.name), dtype=torch.uint8)
        codes = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
        codes.view(-1)[: len(every)] = every
        weight = self._saved("every", codes)
        with self.reader() as reader:
            return reader.written(weight, range(ROWS), ROWS).level.flatten()[: len(every)]

    def verdicts(self, codes, rows=None):
        """Return for each row what is said of codes without torch, and by the formulas."""
        written = self._saved("out", codes)
        plain, wanted = [], []
        for row in range(ROWS) if rows is None else rows:
            with self.reader() as reader:
                plain.append(said_of(CodedRows(reader, self.op, written), [row], PERMISSIVE))
                site = Site(reader, self.op, [row], "F32")
                exact, off = changed(site, self.op.deltas, site.start([row]))
                found = Wanted(self.op, reader.written(written, [row], ROWS), exact, off)
                wanted.append(bool(found.is_explained(torch.ones(1, 1, dtype=torch.bool)).all()))
        return plain, wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STORAGES)
def test_verdicts_are_those_of_the_formulas(tmp_path, name, seed):
    made = Made(tmp_path, name, size=0.02, seed=seed)
    codes, _ = made.nearest()
    generator = torch.Generator().manual_seed(seed)
    # Some rows are right. In the others one code is another one.
    for row in range(0, ROWS, 2):
        codes[row, int(torch.randint(COLUMNS, (), generator=generator))] ^= 1 << row // 2 % bits_of(name)
    plain, wanted = made.verdicts(codes)
    assert plain == wanted
    assert all(wanted[1::2])
    # A code of zero and one of minus zero are the same number.
    assert sum(wanted[::2]) < 3


def stepped(made, codes, by, generator, n_each):
    """Move some values of each row by steps, among the levels."""
    levels, place = (
        made.meaning().nan_to_num(nan=1e300, posinf=1e300, neginf=-1e300).unique(return_inverse=True)
    )
    code_of = torch.full((len(levels),), -1)
    code_of[place] = torch.arange(len(place))
    n_levels = int((levels < 1e299).sum())
    for row in range(ROWS):
        for column in torch.randperm(COLUMNS, generator=generator)[:n_each].tolist():
            step = by if torch.rand((), generator=generator) < 0.5 else -by
            at = int(place[codes[row, column].long()]) + step
            codes[row, column] = int(code_of[min(max(at, 0), n_levels - 1)])
    return codes


@pytest.mark.parametrize("by", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("name", STORAGES)
def test_no_value_may_be_moved_further_than_the_formulas_allow(tmp_path, name, by):
    made = Made(tmp_path, name, method="adapter", size=2.0 if bits_of(name) == 8 else 0.5, seed=by)
    codes, _ = made.nearest()
    plain, wanted = made.verdicts(stepped(made, codes, by, torch.Generator().manual_seed(by), 1))
    # The effect of a row may be lost by one value; then it is not known here.
    assert all(value for said, value in zip(plain, wanted, strict=True) if said)
    if by == 1 and bits_of(name) == 8:
        assert any(plain)
    if by > 5 and bits_of(name) == 8:
        assert not all(wanted)


@pytest.mark.parametrize("method", [None, "adapter"])
@pytest.mark.parametrize("name", STORAGES)
def test_limits_are_those_of_the_formulas(name, method):
    storage = storage_of(name)
    meaning = coding_of(storage, (ROWS, COLUMNS)).meaning
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor(meaning, dtype=torch.float64)
    table = level[level.isfinite()].unique()
    near = table[torch.randint(len(table), (4000,), generator=generator)]
    # Levels, middles between them, and all that is around: as far as ten steps, and beyond the last ones.
    steps = torch.cat([table.diff(), table.diff()[-1:]])[torch.searchsorted(table, near)]
    by = torch.randint(-20, 21, near.shape, generator=generator) / 2
    by += torch.randn(near.shape, generator=generator, dtype=torch.float64) * (
        torch.rand(near.shape, generator=generator) < 0.7
    )
    numbers = torch.cat([near + by * steps, table * 1.5, torch.tensor([1e300, -1e300, torch.inf, torch.nan])])
    codes = torch.randint(len(meaning), numbers.shape, generator=generator)
    # Half of the codes are those of levels nearby.
    nearby = (numbers.unsqueeze(1) + steps[:1] - level).abs().nan_to_num(nan=1e308).argmin(1)
    codes = torch.where(torch.rand(numbers.shape, generator=generator) < 0.5, codes, nearby)
    weight = Weight("w", (ROWS, COLUMNS), storage, {})
    rounding = Rounding(method) if method else None
    op = Merge(weight, storage, (), View.of((ROWS, COLUMNS)), rounding=rounding, on_stored_grid=True)
    stored = Levels(level[codes].unsqueeze(0), table)
    found = Wanted(op, stored, numbers.unsqueeze(0), torch.zeros(1, len(numbers), dtype=torch.float64))
    wanted = found.is_explained(torch.ones(1, 1, dtype=torch.bool))[0]
    low, high = (torch.from_numpy(end)[codes] for end in limits(meaning, is_adapter=method == "adapter"))
    said = (low <= numbers) & (numbers <= high)
    assert not (said & ~wanted).any()
    # Limits for the adapter stop a little short of the last step, and beyond the last level steps do not grow.
    is_inside = (numbers >= table[0]) & (numbers <= table[-1])
    missed = (wanted & ~said & is_inside).double().mean().item()
    assert missed < (0.08 if method else 1e-9)
    assert 0.04 < wanted.double().mean().item() < 0.95


@pytest.mark.parametrize("name", STORAGES)
def test_a_record_is_met_as_by_the_formulas(tmp_path, name):
    made = Made(tmp_path, name, size=0.02)
    codes, _ = made.nearest()
    written, rows = made._saved("out", codes), range(ROWS)
    with made.reader() as reader:
        effect = Effect(reader, made.op, is_whole=True)
        site = Site(reader, made.op, rows, "F32")
        exact, off = changed(site, made.op.deltas, site.start(rows))
        effect.add(
            rows, site.start(rows)[0], Wanted(made.op, reader.written(written, rows, ROWS), exact, off)
        )
        norm, error = effect._sums.effect**0.5, effect._sums.error**0.5

    def said(norm, error, rows=rows):
        with made.reader() as reader:
            record = replace(PERMISSIVE, effect_norm=norm, effect_error=error)
            return said_of(CodedRows(reader, made.op, written), rows, record)

    assert said(norm, error)
    assert said(norm * (1 + 1e-7), error * (1 - 1e-7))
    assert not said(norm * 1.01, error)
    assert not said(norm, error * 0.99)
    some = range(0, ROWS, 4)
    assert said(norm, error, some)
    assert not said(norm / 100, error, some)
    assert not said(norm, error / 100, some)
    with made.reader() as reader:
        assert not said_of(CodedRows(reader, made.op, written), rows, None)


def test_a_tie_is_explained_by_what_float32_may_miss(tmp_path):
    # 16 + 1 is between 16 and 18: just above it, float32 may have had the tie.
    codes = torch.full((ROWS, COLUMNS), 0x58, dtype=torch.uint8)
    for change, expected in ((1 + 2.0**-23, True), (1 + 2.0**-13, False)):
        made = Made(tmp_path, "fp8-blocks", codes=codes)
        made.scales["scale"] = torch.ones_like(made.scales["scale"])
        a = torch.eye(RANK, COLUMNS) + torch.eye(RANK, COLUMNS).roll(9, 1)
        b = torch.zeros(ROWS, RANK)
        b[:, 0] = change / 0.3
        save_file({"a": a, "b": b}, tmp_path / "adapter.safetensors")
        made.op = replace(made.op, source=made._saved("base", codes))
        plain, wanted = made.verdicts(codes, rows=[0, 7])
        assert plain == wanted == [expected] * 2


@pytest.mark.parametrize("part", ["nan", "zero", "negative", "infinite"])
def test_odd_scales_are_left_to_the_formulas(tmp_path, part):
    made = Made(tmp_path, "fp8-blocks", size=0.02)
    codes, _ = made.nearest()
    value = {"nan": torch.nan, "zero": 0.0, "negative": -0.01, "infinite": torch.inf}[part]
    made.scales["scale"] = made.scales["scale"].clone()
    made.scales["scale"][0, 0] = value
    made.op = replace(made.op, source=made._saved("base", made.base))
    plain, _ = made.verdicts(codes, rows=[0, 20])
    assert plain == [False, True]


def test_a_code_that_is_no_number_is_not_explained(tmp_path):
    made = Made(tmp_path, "fp8-blocks", size=0.02)
    codes, _ = made.nearest()
    codes[3, 5] = 0x7F
    plain, wanted = made.verdicts(codes)
    assert plain == wanted
    assert plain.index(False) == 3


def test_an_adapter_with_rows_that_are_nearly_the_same_is_left_to_the_formulas(tmp_path):
    made = Made(tmp_path, "fp8-blocks", size=0.02)
    codes, _ = made.nearest()
    assert made.verdicts(codes, rows=[1])[0] == [True]
    a = torch.randn(RANK, COLUMNS)
    a[1] = a[0] * (1 + 1e-6)
    save_file({"a": a, "b": torch.randn(ROWS, RANK)}, tmp_path / "adapter.safetensors")
    made.op = replace(made.op)
    assert made.verdicts(made.nearest()[0], rows=[1])[0] == [False]


def test_other_merges_are_left_to_the_formulas(tmp_path):
    op = Made(tmp_path, "int4").op
    (delta,) = op.deltas

    def stored(codec, **settings):
        found = Storage(codec, "I32", tuple(sorted(settings.items())))
        return replace(op, target=found, source=replace(op.source, storage=found))

    others = [
        replace(op, deltas=(delta, delta)),
        replace(op, deltas=(replace(delta, adapter_weight=0.5),)),
        replace(op, deltas=(replace(delta, rounded=True),)),
        replace(op, deltas=(replace(delta, region=Region(transposed=True)),)),
        replace(op, deltas=(replace(delta, part=((0, 2), (0, COLUMNS))),)),
        replace(op, rounding=Rounding("stochastic")),
        replace(op, combination=Combination("ties", 0.5, 0, 0, "")),
        replace(op, on_stored_grid=False),
        replace(op, source=replace(op.source, shape=(2, ROWS // 2, COLUMNS))),
        stored("packed_int", **(PACKED | {"zero": True})),
        stored("packed_int", **(PACKED | {"g_idx": True})),
        stored("packed_int", **(PACKED | {"bits": 3})),
        stored("gptq", bits=4, group=32),
    ]
    assert not any(map(CodedRows.applies, others))
