"""What every algebra keeps, for each member of `ALGEBRAS`: tiles of rows make the whole, in any order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import lora_merge
from lora_merge.core.adapter import Delta, PlacedDelta
from lora_merge.core.plan import Merge
from lora_merge.core.tensor import Region, TensorRef
from lora_merge.core.view import MIN_TILE_ROWS, View
from lora_merge.deltas import (
    ALGEBRAS,
    AdditionFacts,
    DoraFacts,
    Factors,
    LowRankFacts,
    RowsFacts,
    Stack,
    StackedFacts,
)
from lora_merge.formats.safetensors import load
from tests.parity import building
from tests.parity.kinds import KINDS

N_OUT, N_IN, RANK, SCALE, EXPERTS = 96, 80, 5, 0.7, 3
U = 2.0**-24
"""Unit roundoff of float32."""

Value = tuple[torch.Tensor, torch.Tensor]
"""Numbers in float64, and by how much float32 may miss each of them."""


@dataclass(frozen=True)
class Sample:
    """A delta, a weight for it, and what comes of the two."""

    spec: PlacedDelta
    factors: Mapping[str, torch.Tensor]
    view: View
    exact: Callable[[torch.Tensor, torch.Tensor], Value]
    """Weight and base → the formula, written out in float64."""

    stored: str = "F32"
    """What the weight will be stored as."""

    weight: torch.Tensor | None = None
    """The base's own, where the delta belongs to one; else any."""

    def fresh(self, seed: int = 2) -> torch.Tensor:
        """Return a weight; for a seed, always the same."""
        if self.weight is not None:
            return self.weight.clone()
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.view.n_rows, self.view.columns, generator=generator)

    def algebra(self, base: torch.Tensor, **changes: Any) -> Any:
        """Return the algebra, with the base surveyed if it asks for that."""
        spec = replace(self.spec, **changes)
        roles = {id(ref): role for role, ref in spec.factors.items()}
        load = Factors(lambda ref: self.factors[roles[id(ref)]])
        made = ALGEBRAS[spec.algebra](spec, load.of(spec.delta, spec.part), self.stored)
        if spec.reach == "columns":
            made.survey(panels(base, 48))
        return made

    def applied(self, weight: torch.Tensor, **changes: Any) -> torch.Tensor:
        """Return the whole weight changed at once."""
        changed = weight.clone()
        self.algebra(weight, **changes).apply(changed, changed, 0, self.view.n_rows)
        return changed


def panels(weight, width):
    """Yield a weight in panels of whole columns, to be changed."""
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        yield start, end, weight[:, start:end].clone()


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(facts, factors, scale=SCALE, *, transposed=False, part=(), rounded=False):
    refs = {role: TensorRef(role, "F32", tuple(tensor.shape), "", 0, 0) for role, tensor in factors.items()}
    delta = Delta("module.weight", facts, refs, scale, rounded=rounded)
    return delta.placed("module.weight", Region(transposed), part=part)


def product(b, a, scale, terms):
    """Return s · B A: each of its products is rounded, each but one of its sums, and the scaling."""
    return scale * b @ a, (terms + 2) * U * abs(scale) * b.abs() @ a.abs()


def plus(one, other):
    """Return a sum, which is rounded once more (and its rounding errors once more with it)."""
    value = one[0] + other[0]
    return value, (1 + 2 * U) * (one[1] + other[1]) + U * value.abs()


def turned(value, transposed):
    return tuple(part.T for part in value) if transposed else value


def with_zero_error(tensor):
    return tensor.double(), torch.zeros_like(tensor, dtype=torch.float64)


def low_rank(*, transposed=False, scale=SCALE, n_out=N_OUT, stored="F32", rounded=False, e=False, blocks=""):
    """Return W + s · B A, as a linear layer, a Conv1D, AdaLoRA or BD-LoRA has it."""
    factors = {"A": drawn(RANK, N_IN), "B": drawn(n_out, RANK, seed=3)}
    a, b, facts = factors["A"].double(), factors["B"].double(), LowRankFacts()
    if e:
        factors["E"] = drawn(RANK, 1, seed=4)
        a, facts = a * factors["E"].double(), LowRankFacts(divisor=12 + 1e-5)
    if blocks:
        facts = LowRankFacts(blocks_a=2) if blocks == "A" else LowRankFacts(blocks_b=2)
        factors = {"A": drawn(6, N_IN), "B": drawn(n_out, 6, seed=3)}
        a, b = factors["A"].double(), factors["B"].double()
        narrow = factors[blocks][:, : factors[blocks].shape[1] // 2].clone()
        factors[blocks] = narrow
        whole = torch.block_diag(*narrow.double().chunk(2))
        a, b = (whole, b) if blocks == "A" else (a, whole)
    divisor = facts.divisor or 1.0

    def exact(weight, _base):
        change = product(b, a, scale / divisor, len(a) + 3)  # E, the divisor and the division round as well
        if rounded:
            change = change[0].float().bfloat16().double(), change[1] + change[0].abs() * 2.0**-7
        return plus(with_zero_error(weight), turned(change, transposed))

    spec = spec_of(facts, factors, scale, transposed=transposed, rounded=rounded)
    shape = (N_IN, n_out) if transposed else (n_out, N_IN)
    return Sample(spec, factors, View.of(shape), exact, stored)


def turned_factors():
    """Return W + s · (A B)ᵀ, whose factors are stored as mlx-lm stores them."""
    factors = {"A": drawn(N_IN, RANK), "B": drawn(RANK, N_OUT, seed=3)}

    def exact(weight, _base):
        return plus(
            with_zero_error(weight), product(factors["B"].double().T, factors["A"].double().T, SCALE, RANK)
        )

    spec = spec_of(LowRankFacts(stored_transposed=True), factors)
    return Sample(spec, factors, View.of((N_OUT, N_IN)), exact)


def convolution():
    """Return W + s · B A of a two-dimensional convolution, whose B has a kernel of one."""
    factors = {"A": drawn(RANK, 8, 3, 3), "B": drawn(N_OUT, RANK, 1, 1, seed=3)}

    def exact(weight, _base):
        change = torch.einsum("or,rikl->oikl", factors["B"].double()[:, :, 0, 0], factors["A"].double())
        size = torch.einsum(
            "or,rikl->oikl", factors["B"].double().abs()[:, :, 0, 0], factors["A"].double().abs()
        )
        off = (RANK + 2) * U * SCALE * size
        return plus(with_zero_error(weight), (SCALE * change.flatten(1), off.flatten(1)))

    return Sample(spec_of(LowRankFacts(), factors), factors, View.of((N_OUT, 8, 3, 3)), exact)


def experts_of(factors, packing):
    """Return (A, B) of each expert: A has them one after the other, B side by side or (Unsloth) too."""
    return [
        (
            factors["A"].double()[expert * RANK : (expert + 1) * RANK],
            factors["B"].double()[:, expert * RANK : (expert + 1) * RANK]
            if packing == "expert-major"
            else factors["B"].double()[:, expert::EXPERTS],
        )
        for expert in range(EXPERTS)
    ]


def stacked(*, transposed, packing="interleaved"):
    """Return W[e] + s · B[e] A[e]."""
    factors = {"A": drawn(EXPERTS * RANK, N_IN), "B": drawn(N_OUT, RANK * EXPERTS, seed=3)}

    def exact(weight, _base):
        parts = [turned(product(b, a, SCALE, RANK), transposed) for a, b in experts_of(factors, packing)]
        change = tuple(torch.cat([part[n] for part in parts]) for n in range(2))
        return plus(with_zero_error(weight), change)

    spec = spec_of(StackedFacts(stack=Stack(EXPERTS, packing)), factors, transposed=transposed)
    shape = (EXPERTS, N_IN, N_OUT) if transposed else (EXPERTS, N_OUT, N_IN)
    return Sample(spec, factors, View.of(shape, stacked=True), exact)


def one_expert(*, transposed, packing="interleaved"):
    """Return the upper rows of the second expert of a stack, with a few inputs left out, as a weight of its own."""
    factors = {"A": drawn(EXPERTS * RANK, N_IN + 3), "B": drawn(N_OUT + 9, RANK * EXPERTS, seed=3)}

    def exact(weight, _base):
        a, b = experts_of(factors, packing)[1]
        change = product(b[:N_OUT], a[:, 3:], SCALE, RANK)
        return plus(with_zero_error(weight), turned(change, transposed))

    facts = LowRankFacts(stack=Stack(EXPERTS, packing))
    part = ((1, 2), (0, N_OUT), (3, N_IN + 3))
    spec = spec_of(facts, factors, transposed=transposed, part=part)
    shape = (N_IN, N_OUT) if transposed else (N_OUT, N_IN)
    return Sample(spec, factors, View.of(shape), exact)


def dora(*, transposed):
    """Return m/‖V‖ · (W + s · B A) with V = base + s · B A, a norm for each output."""
    factors = {
        "A": drawn(RANK, N_IN),
        "B": drawn(N_OUT, RANK, seed=3),
        "magnitude": drawn(N_OUT, seed=4).abs() + 1,
    }

    def exact(weight, base):
        change = turned(
            product(factors["B"].double(), factors["A"].double(), SCALE, RANK), transposed=transposed
        )
        v, v_off = plus(with_zero_error(base), change)
        value, off = plus(with_zero_error(weight), change)
        axis = 0 if transposed else 1
        norm = v.norm(dim=axis, keepdim=True)
        # a norm of n values: n squares and sums and a root; then a division and a multiplication
        relative = v_off.norm(dim=axis, keepdim=True) / norm + (v.shape[axis] + 4) * U
        factor = factors["magnitude"].double().view(norm.shape) / norm
        return factor * value, (factor * off + (factor * value).abs() * relative) * (1 + 2 * U)

    spec = spec_of(DoraFacts(), factors, transposed=transposed)
    return Sample(spec, factors, View.of((N_IN, N_OUT) if transposed else (N_OUT, N_IN)), exact)


def addition(*shape):
    """Return W + s · D."""
    factors = {"addend": drawn(*shape)}

    def exact(weight, _base):
        change = SCALE * factors["addend"].double().reshape(weight.shape)
        off = 2 * U * change.abs()  # the scale is rounded, and the scaling
        return plus(with_zero_error(weight), (change, off))

    return Sample(spec_of(AdditionFacts(), factors), factors, View.of(shape), exact)


def rows():
    """Return W with some rows replaced, out of order, the first and the last among them."""
    indices = [70, 0, N_OUT - 1, 17, 33]
    factors = {"rows": drawn(len(indices), N_IN)}

    def exact(weight, _base):
        value = weight.double()
        for row, index in zip(factors["rows"], indices, strict=True):
            value[index] = row.double()
        return with_zero_error(value)

    spec = spec_of(RowsFacts(tuple(indices)), factors, 1.0)
    return Sample(spec, factors, View.of((N_OUT, N_IN)), exact)


def of_peft(workshop, name, parameter):
    """Return a delta that PEFT's own layer makes, and the float32 weight it belongs to."""
    kind = next(kind for kind in KINDS if kind.name == name)
    case = building.case(workshop, kind, kind.models[0], "float32")
    steps = lora_merge.plan(base=case.base, adapter=case.adapter).steps
    step = next(step for step in steps if step.name == parameter)
    assert isinstance(step.op, Merge)
    (spec,) = step.op.deltas
    factors = {role: load(ref) for role, ref in spec.factors.items()}
    return spec, factors, step.op.view, load(step.op.source.plain).view(step.op.view.n_rows, -1)


def loha(workshop):
    """Return W + s · (A₁ B₁ ∘ A₂ B₂)."""
    spec, factors, view, weight = of_peft(workshop, "LoHa", "model.layers.0.self_attn.q_proj.weight")
    parts = {name.rpartition(".")[2]: tensor.double() for name, tensor in factors.items()}

    def exact(weight, _base):
        one, other = (
            product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], 1.0, len(parts[f"hada_w{n}_b"]))
            for n in (1, 2)
        )
        change = 2.0 * one[0] * other[0]  # alpha 8, rank 4
        off = 2.0 * (one[1] * other[0].abs() + one[0].abs() * other[1]) + 3 * U * change.abs()
        return plus(with_zero_error(weight), (change, 1.01 * off))

    return Sample(spec, factors, view, exact, weight=weight)


def ia3(workshop):
    """Return l ∘ W, one factor for each input of a feed-forward layer."""
    spec, factors, view, weight = of_peft(workshop, "IA³", "model.layers.1.mlp.down_proj.weight")
    (factor,) = (tensor.double() for name, tensor in factors.items() if name.endswith("ia3_l"))

    def exact(weight, _base):
        value = weight.double() * factor
        return value, U * value.abs()

    return Sample(spec, factors, view, exact, weight=weight)


MAKERS: dict[str, Callable[[Any], Sample]] = {
    "low_rank": lambda _: low_rank(),
    "low_rank, transposed": lambda _: low_rank(transposed=True),
    "low_rank, added by the matrix library": lambda _: low_rank(scale=2.0, n_out=256),
    "low_rank, rounded first": lambda _: low_rank(stored="BF16", rounded=True),
    "low_rank, singular values": lambda _: low_rank(e=True),
    "low_rank, A in blocks": lambda _: low_rank(blocks="A"),
    "low_rank, B in blocks": lambda _: low_rank(blocks="B"),
    "low_rank, factors turned round": lambda _: turned_factors(),
    "low_rank, convolution": lambda _: convolution(),
    "stacked": lambda _: stacked(transposed=False),
    "stacked, transposed": lambda _: stacked(transposed=True),
    "stacked, packed as Unsloth does": lambda _: stacked(transposed=False, packing="expert-major"),
    "one of a stack": lambda _: one_expert(transposed=False),
    "one of a stack, transposed": lambda _: one_expert(transposed=True),
    "one of a stack, packed as Unsloth does": lambda _: one_expert(transposed=False, packing="expert-major"),
    "dora": lambda _: dora(transposed=False),
    "dora, transposed": lambda _: dora(transposed=True),
    "addition of a bias": lambda _: addition(N_OUT),
    "addition of a matrix": lambda _: addition(N_OUT, N_IN),
    "rows": lambda _: rows(),
    "peft_layer, LoHa": loha,
    "peft_layer, IA³": ia3,
}
each = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture
def sample(workshop):
    """Return a function: name → the sample."""
    return lambda name: MAKERS[name](workshop)


def tiles(view, size):
    """Return row ranges of about a size: whole blocks, or parts of one."""
    if size >= view.rows:
        size -= size % view.rows
        return [(start, min(start + size, view.n_rows)) for start in range(0, view.n_rows, size)]
    return [
        (block * view.rows + start, block * view.rows + min(start + size, view.rows))
        for block in range(view.blocks)
        for start in range(0, view.rows, size)
    ]


def test_every_algebra_has_samples(workshop):
    assert {make(workshop).spec.algebra for make in MAKERS.values()} == set(ALGEBRAS)


@each
def test_the_table_has_each_algebra_under_the_name_of_its_facts(name, sample):
    spec = sample(name).spec
    assert ALGEBRAS[spec.algebra].facts is type(spec.facts)
    assert spec.facts.has_factors == ({"A", "B"} <= spec.factors.keys())
    assert (spec.rank > 0) == spec.facts.has_factors


@each
def test_the_whole_weight_follows_the_formula(name, sample):
    made = sample(name)
    weight = made.fresh()
    wanted, off = made.exact(weight, weight)
    got = made.applied(weight)
    assert ((got.double() - wanted).abs() <= off).all()
    assert not torch.equal(got, weight)
    # a bound that would pass an unchanged weight bounds nothing
    assert off.max() <= 0.02 * (wanted - weight.double()).abs().max()


@each
def test_what_other_deltas_did_before_is_kept(name, sample):
    made = sample(name)
    base, weight = made.fresh(), made.fresh()
    weight += drawn(*weight.shape, seed=9) * 0.5
    wanted, off = made.exact(weight, base)
    algebra, changed = made.algebra(base), weight.clone()
    algebra.apply(changed, base, 0, made.view.n_rows)
    assert ((changed.double() - wanted).abs() <= off).all()
    assert torch.equal(base, made.fresh())


@each
@pytest.mark.parametrize("size", [16, 32, 40, 64, 96, 192])
def test_tiles_in_any_order_make_the_same_bits_as_the_whole(name, size, sample):
    made = sample(name)
    if made.spec.reach == "tensor":
        pytest.skip("its tensors are never cut")
    if "matrix library" in name and size < MIN_TILE_ROWS:
        pytest.skip(
            "the library's own sum has other bits for a handful of rows, and no plan makes such a tile"
        )
    weight = made.fresh()
    whole, tiled = made.applied(weight), weight.clone()
    algebra = made.algebra(weight)
    for start, end in reversed(tiles(made.view, size)):
        assert end - start >= 16  # a handful of rows has other rounding, and no plan makes such a tile
        tile = tiled[start:end]
        algebra.apply(tile, tile, start, end)
    assert torch.equal(tiled, whole)


@each
def test_a_tile_is_changed_in_place_and_nothing_beside_it(name, sample):
    made = sample(name)
    before = made.fresh()
    algebra = made.algebra(before)
    whole = made.spec.reach == "tensor"
    start, end = (0, made.view.n_rows) if whole else (16, 80)
    frame = torch.cat([before, before, before])  # the tile lies inside something larger
    at = len(before) + start
    tile = frame[at : at + end - start]
    algebra.apply(tile, tile, start, end)
    assert torch.equal(frame[:at], torch.cat([before, before[:start]]))
    assert torch.equal(frame[at + end - start :], torch.cat([before[end:], before]))
    wanted, _ = made.exact(before, before)
    assert torch.equal(tile != before[start:end], wanted[start:end] != before[start:end].double())
    assert (tile != before[start:end]).any()


@each
def test_the_rest_of_the_weight_counts_as_far_as_an_algebra_reaches_and_no_further(name, sample):
    made = sample(name)
    one, other = made.fresh(), made.fresh()
    other[64:] += drawn(*other[64:].shape, seed=8)
    results = []
    for weight in (one, other):
        algebra, tile = made.algebra(weight), weight[:64].clone()
        if made.spec.reach == "tensor":
            pytest.skip("it is given no less than all of the weight")
        algebra.apply(tile, tile, 0, 64)
        results.append(tile)
    assert torch.equal(*results) == (made.spec.reach == "rows")


@each
def test_a_delta_is_the_same_however_often_it_was_applied(name, sample):
    made = sample(name)
    factors = {role: tensor.clone() for role, tensor in made.factors.items()}
    algebra, results = made.algebra(made.fresh()), []
    for _ in range(2):
        weight = made.fresh()
        algebra.apply(weight, weight, 0, len(weight))
        results.append(weight)
    assert torch.equal(*results)
    assert all(torch.equal(made.factors[role], tensor) for role, tensor in factors.items())


@each
def test_the_scale_counts_where_an_algebra_says_that_it_is_scaled(name, sample):
    made = sample(name)
    weight = made.fresh()
    same = torch.equal(made.applied(weight), made.applied(weight, scale=3 * made.spec.scale))
    assert same == (not made.spec.facts.is_scaled)


@each
def test_the_order_of_changes_matters_unless_an_algebra_says_that_it_is_a_sum(name, sample):
    made = sample(name)
    if made.spec.facts.by_peft:
        pytest.skip("nothing is promised of PEFT's layers, and some are sums")
    before, shift = made.fresh(), 0.5
    first, last = made.applied(before) + shift, made.applied(before + shift)
    assert torch.allclose(first, last, atol=1e-4) == made.spec.facts.is_sum


@each
def test_a_zero_makes_a_change_none_where_an_algebra_says_so(name, sample):
    made = sample(name)
    weight = made.fresh()
    assert made.spec.facts.vanishes_with <= {"A", "B", "E", "addend"}
    for role in made.spec.facts.vanishes_with & made.factors.keys():
        zeroed = replace(made, factors={**made.factors, role: torch.zeros_like(made.factors[role])})
        assert torch.equal(zeroed.applied(weight), weight)


@each
def test_an_algebra_that_looks_back_gives_another_result_with_another_base(name, sample):
    made = sample(name)
    weight, results = made.fresh(), []
    for base in (made.fresh(), made.fresh() * 2):
        changed = weight.clone()
        made.algebra(base).apply(changed, base, 0, made.view.n_rows)
        results.append(changed)
    assert torch.equal(*results) == (not made.spec.facts.looks_back)


@pytest.mark.parametrize("width", [1, 7, 48, N_OUT])
def test_a_survey_may_see_the_columns_in_panels_of_any_width(width):
    made = dora(transposed=True)
    weight = made.fresh()
    wanted, off = made.exact(weight, weight)
    algebra = ALGEBRAS["dora"](made.spec, made.factors, "F32")
    algebra.survey(panels(weight, width))
    algebra.apply(weight, weight, 0, len(weight))
    assert ((weight.double() - wanted).abs() <= off).all()


@pytest.mark.parametrize("name", ["low_rank", "low_rank, transposed", "stacked", "stacked, transposed"])
@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_a_rounded_sum_is_rounded_to_what_is_stored_before_it_is_added(name, stored, sample):
    made = replace(sample(name), stored=stored)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[stored]
    weight = made.fresh()
    change = made.applied(torch.zeros_like(weight))
    got = made.applied(weight, rounded=True)
    assert torch.equal(got, weight + change.to(dtype).float())
    assert not torch.equal(got, weight + change)


@pytest.mark.parametrize(("stored", "on_the_grid"), [("BF16", True), ("F32", False)])
def test_pefts_layer_computes_in_the_dtype_of_the_weight_unless_the_output_has_another(
    stored, on_the_grid, workshop
):
    kind = next(kind for kind in KINDS if kind.name == "LoHa")
    case = building.case(workshop, kind, "llama", "bfloat16")
    steps = lora_merge.plan(base=case.base, adapter=case.adapter).steps
    op = next(step.op for step in steps if isinstance(step.op, Merge))
    factors = {role: load(ref) for role, ref in op.deltas[0].factors.items()}
    weight = load(op.source.plain).float().view(op.view.n_rows, -1)
    ALGEBRAS["peft_layer"](op.deltas[0], factors, stored).apply(weight, weight, 0, len(weight))
    assert torch.equal(weight, weight.bfloat16().float()) == on_the_grid
