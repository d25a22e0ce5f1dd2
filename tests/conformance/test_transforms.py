"""Every transform against dense float64, and what an exact one promises."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch

from lora_merge.conversion.lora import Keep
from lora_merge.conversion.transforms import (
    TRANSFORMS,
    BakeScale,
    PadRank,
    Pair,
    ReduceRank,
    factorised,
    rounded,
    stacked,
)

ULP = 2.0**-24
"""What rounding to float32 may be off by, as a part of the value."""

N_OUT, N_IN, RANK = 33, 40, 5

SVD_TOLERANCE = 8 * sqrt(N_IN) * ULP
"""Of the largest singular value: two QR, two products, an SVD and two more products, √n·2⁻²⁴ each."""

SCALES = (1.0, 1.5, -0.75, 1 / 3, 2.0**-4, 0.0)

MAKE = {
    "reduce_rank": lambda: ReduceRank(Keep(rank=2)),
    "bake_scale": BakeScale,
    "pad_rank": lambda: PadRank(RANK + 3),
}
"""How each of the table is made; none of the pairs below has a rank above the padded one."""


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(rank=RANK, experts=0, scale=1.0, seed=0):
    """Return random factors whose product has singular values of different sizes."""
    lead = (experts,) if experts else ()
    sizes = torch.arange(1, rank + 1) ** 0.5
    a, b = drawn(*lead, rank, N_IN, seed=seed), drawn(*lead, N_OUT, rank, seed=seed + 50)
    return Pair(a * sizes[:, None], b, scale)


PAIRS = {
    "two axes": pair_of(),
    "a stack": pair_of(experts=3),
    "rank 1": pair_of(rank=1),
    "a stack of rank 1": pair_of(rank=1, experts=2),
    "zeros": Pair(torch.zeros(RANK, N_IN), torch.zeros(N_OUT, RANK)),
    "zeros in B": Pair(drawn(RANK, N_IN), torch.zeros(N_OUT, RANK)),
}


def dense(pair):
    """Return s·BA in float64."""
    return pair.scale * (pair.b.double() @ pair.a.double())


def rounding_of(pair):
    """Return how far s·BA may move, value by value, when s and B are rounded: 2⁻²⁴ each of every product."""
    return 2.01 * ULP * abs(pair.scale) * (pair.b.double().abs() @ pair.a.double().abs())


def test_the_table_here_has_every_transform():
    assert MAKE.keys() == TRANSFORMS.keys()


def exact_ones():
    return [name for name, transform in TRANSFORMS.items() if transform.exact]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", exact_ones())
def test_an_exact_transform_keeps_the_change_to_the_rounding_of_float32(name, pair, scale):
    pair = replace(pair, scale=scale)
    made = MAKE[name]()(pair)
    assert ((dense(made) - dense(pair)).abs() <= rounding_of(pair)).all()
    assert made.a.dtype == made.b.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name, transform in TRANSFORMS.items() if not transform.exact])
def test_a_transform_that_is_not_exact_loses_more_than_rounding(name):
    pair = PAIRS["two axes"]
    assert ((dense(MAKE[name]()(pair)) - dense(pair)).abs() > rounding_of(pair)).any()


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_what_it_is_given_as_it_was(name, pair):
    pair = replace(pair, scale=1.5)
    a, b = pair.a.clone(), pair.b.clone()
    MAKE[name]()(pair)
    assert torch.equal(pair.a, a)
    assert torch.equal(pair.b, b)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_the_shape_of_the_change(name, pair):
    made = MAKE[name]()(replace(pair, scale=1.5))
    assert (made.b @ made.a).shape == (pair.b @ pair.a).shape
    assert made.a.shape[-2] == made.b.shape[-1] == made.rank


def test_a_scale_that_is_a_power_of_two_is_baked_without_any_rounding():
    pair = pair_of(scale=-(2.0**-3))
    made = BakeScale()(pair)
    assert made.scale == 1
    assert torch.equal(dense(made), dense(pair))


def test_a_scale_of_one_is_baked_already():
    pair = pair_of()
    assert BakeScale()(pair) is pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [0, 3])
def test_padding_adds_zeros_behind_the_factors_and_keeps_their_bits(experts, dtype):
    pair = pair_of(experts=experts, scale=1.5)
    pair = replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))
    made = PadRank(8)(pair)
    assert (made.rank, made.scale, made.a.dtype, made.b.dtype) == (8, 1.5, dtype, dtype)
    assert torch.equal(made.a[..., :RANK, :], pair.a)
    assert torch.equal(made.b[..., :RANK], pair.b)
    assert not made.a[..., RANK:, :].any()
    assert not made.b[..., RANK:].any()


def test_padding_to_its_own_rank_changes_nothing():
    pair = pair_of()
    assert PadRank(RANK)(pair) is pair


# ReduceRank against the singular value decomposition of the product, in float64.


def spectrum(pair):
    return torch.linalg.svdvals(dense(pair))


@pytest.mark.parametrize("scale", SCALES[:-1])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("experts", [0, 3])
def test_a_lower_rank_keeps_the_largest_singular_values_and_loses_the_others(experts, rank, scale):
    pair = pair_of(experts=experts, scale=scale)
    made = ReduceRank(Keep(rank=rank))(pair)
    before, after = spectrum(pair), spectrum(made)
    largest = float(before.max())
    assert made.rank == rank
    assert made.scale == 1
    assert (after[..., :rank] - before[..., :rank]).abs().max() <= SVD_TOLERANCE * largest
    lost = float((before[..., rank:] ** 2).sum().sqrt())
    tolerance = SVD_TOLERANCE * float(before.norm())
    assert abs(float((dense(pair) - dense(made)).norm()) - lost) <= tolerance
    assert abs(pair.distance(made) - lost) <= tolerance
    assert lost > 1000 * tolerance


@pytest.mark.parametrize("experts", [0, 3])
def test_both_factors_have_the_square_root_of_the_singular_values(experts):
    pair = pair_of(experts=experts, scale=1.5)
    made = ReduceRank(Keep(rank=3))(pair)
    kept = spectrum(pair)[..., :3]
    for lengths in (made.a.double().norm(dim=-1), made.b.double().norm(dim=-2)):
        assert (lengths**2 - kept).abs().max() <= SVD_TOLERANCE * float(kept.max())


def smallest_rank(sigma, energy):
    """Return how many singular values make up a share of the sum of their squares."""
    squares = sigma**2
    return next(k for k in range(1, len(sigma) + 1) if squares[:k].sum() >= energy * squares.sum())


@pytest.mark.parametrize("energy", [0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_an_energy_takes_the_lowest_rank_that_has_it(seed, energy):
    pair = pair_of(seed=seed, scale=-1.5)
    wanted = smallest_rank(spectrum(pair)[:RANK], energy)
    made = ReduceRank(Keep(energy=energy))(pair)
    assert made.rank == wanted
    assert (made.norm() / pair.norm()) ** 2 >= energy * (1 - SVD_TOLERANCE)
    if wanted > 1:
        less = ReduceRank(Keep(rank=wanted - 1))(pair)
        assert (less.norm() / pair.norm()) ** 2 < energy


def test_a_stack_has_the_rank_of_the_expert_that_wants_most():
    flat, steep = torch.ones(RANK), 10.0 ** -torch.arange(RANK)
    q_out, _ = torch.linalg.qr(drawn(N_OUT, RANK))
    q_in, _ = torch.linalg.qr(drawn(N_IN, RANK, seed=1))
    pair = Pair(torch.stack([q_in.T, q_in.T]), torch.stack([q_out * steep, q_out * flat]))
    alone = [ReduceRank(Keep(energy=0.75))(Pair(pair.a[n], pair.b[n])).rank for n in range(2)]
    assert alone == [1, 4]
    made = ReduceRank(Keep(energy=0.75))(pair)
    assert made.rank == 4
    assert (spectrum(made)[..., :4] - spectrum(pair)[..., :4]).abs().max() <= SVD_TOLERANCE


@pytest.mark.parametrize(("keep", "rank"), [(Keep(2, 0.999), 2), (Keep(5, 0.3), 1), (Keep(3, 0.3), 1)])
def test_of_a_rank_and_an_energy_the_lower_rank_counts(keep, rank):
    pair = pair_of(seed=1)
    assert smallest_rank(spectrum(pair)[:RANK], 0.3) == 1
    assert ReduceRank(keep)(pair).rank == rank


@pytest.mark.parametrize("keep", [Keep(rank=RANK), Keep(rank=100), Keep(energy=1.0), Keep(100, 1.0)])
@pytest.mark.parametrize("experts", [0, 3])
def test_factors_of_which_nothing_is_dropped_are_left_untouched(experts, keep):
    pair = pair_of(experts=experts, scale=1.5)
    assert ReduceRank(keep)(pair) is pair


@pytest.mark.parametrize("keep", [Keep(rank=2), Keep(energy=0.9)])
@pytest.mark.parametrize("name", ["zeros", "zeros in B"])
def test_a_change_of_nothing_stays_nothing(name, keep):
    made = ReduceRank(keep)(PAIRS[name])
    assert made.rank == (keep.rank or 1)
    assert made.norm() == 0
    assert made.a.isfinite().all()


@pytest.mark.parametrize("keep", [Keep(rank=4), Keep(rank=N_OUT + 2), Keep(energy=1.0)])
def test_a_rank_above_the_sides_of_the_matrix_is_brought_down(keep):
    rank = N_OUT + 7
    pair = Pair(drawn(rank, N_IN), drawn(N_OUT, rank, seed=1), 0.5)
    made = ReduceRank(keep)(pair)
    k = min(keep.rank or N_OUT, N_OUT)
    assert made.rank == k
    sigma = spectrum(pair)
    lost = float((sigma[k:] ** 2).sum().sqrt())
    assert abs(float((dense(pair) - dense(made)).norm()) - lost) <= SVD_TOLERANCE * float(sigma.norm())


def test_factors_of_a_lower_rank_than_they_look_lose_nothing_by_it():
    padded = PadRank(12)(pair_of(scale=1.5))
    made = ReduceRank(Keep(rank=RANK))(padded)
    assert made.rank == RANK
    assert padded.distance(made) <= SVD_TOLERANCE * padded.norm()


# Pair: norms from the factors alone, against dense float64.

CANCELLATION = 2e-8
"""Of the norms: their squares have 2⁻⁵³ of their size as an error each, and the root of a few of those is this."""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_norm_is_that_of_the_product(pair, scale):
    pair = replace(pair, scale=scale)
    wanted = float(dense(pair).norm())
    assert pair.norm() == pytest.approx(wanted, rel=1e-13, abs=0)


@pytest.mark.parametrize("other_scale", SCALES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experts", [0, 3])
def test_the_distance_is_that_of_the_products_whatever_their_ranks(experts, scale, other_scale):
    one, other = pair_of(experts=experts, scale=scale), pair_of(2, experts, other_scale, seed=9)
    wanted = float((dense(one) - dense(other)).norm())
    assert abs(one.distance(other) - wanted) <= CANCELLATION * (one.norm() + other.norm())
    assert one.distance(other) == pytest.approx(other.distance(one), rel=1e-12)


def test_the_distance_of_factors_that_differ_in_their_last_bits_is_seen():
    pair = pair_of(scale=1.5)
    moved = replace(pair, b=pair.b * (1 + 2.0**-12))
    wanted = float((dense(pair) - dense(moved)).norm())
    assert abs(pair.distance(moved) - wanted) <= CANCELLATION * 2 * pair.norm()
    assert wanted > 1e4 * CANCELLATION * pair.norm() / 2
    assert pair.distance(pair) <= CANCELLATION * 2 * pair.norm()


def test_pairs_are_equal_when_their_values_and_scales_are():
    pair = pair_of(scale=1.5)
    assert pair.equals(replace(pair, a=pair.a.clone()))
    assert not pair.equals(replace(pair, scale=1.25))
    assert not pair.equals(PadRank(RANK + 1)(pair))
    assert not pair.equals(replace(pair, b=pair.b.nextafter(torch.tensor(9.0))))


# Rounding to what is stored.

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def in_half(code):
    """Return factors whose values a half has."""
    pair = pair_of(scale=1.5)
    return replace(pair, a=pair.a.to(HALVES[code]).float(), b=pair.b.to(HALVES[code]).float())


@pytest.mark.parametrize("code", HALVES)
def test_factors_keep_their_dtype_where_it_holds_them(code):
    pair = in_half(code)
    stored = rounded(pair, None, code)
    assert stored.a.dtype == stored.b.dtype == HALVES[code]
    assert torch.equal(stored.a.float(), pair.a)
    assert torch.equal(stored.b.float(), pair.b)
    assert stored.scale == 1.5


@pytest.mark.parametrize("moved", ["a", "b"])
@pytest.mark.parametrize("code", HALVES)
def test_both_factors_go_to_float32_where_their_dtype_does_not_hold_one(code, moved):
    pair = in_half(code)
    pair = replace(pair, **{moved: getattr(pair, moved) * (1 + 2.0**-20)})
    stored = rounded(pair, None, code)
    assert stored.a.dtype == stored.b.dtype == torch.float32
    assert torch.equal(stored.a, pair.a)
    assert torch.equal(stored.b, pair.b)


def test_a_value_beyond_float16_goes_to_float32():
    pair = in_half("F16")
    pair.b[0, 0] = 70000.0
    assert rounded(pair, None, "F16").b.dtype == torch.float32


@pytest.mark.parametrize("own", ["F32", *HALVES])
@pytest.mark.parametrize(("code", "dtype"), [*HALVES.items(), ("F32", torch.float32)])
def test_a_dtype_that_is_asked_for_is_taken_whatever_it_costs(code, dtype, own):
    pair = pair_of()
    stored = rounded(pair, code, own)
    assert stored.a.dtype == stored.b.dtype == dtype
    assert torch.equal(stored.a, pair.a.to(dtype))


# A change without factors: large enough for its range to be sampled.

SIDES = (700, 600)
NEARLY = 1.01
"""What sampling may lose, as a multiple of what the best matrix of that rank loses: with four rounds of iteration, the
part of the leading vectors that is missed is (σ of the rest / σ of them)⁹, nothing next to noise of full rank."""


def with_noise(sigma, noise=1e-3, sides=SIDES, seed=0):
    """Return a matrix of some singular values with noise over all of it."""
    n_out, n_in = sides
    q_out, _ = torch.linalg.qr(drawn(n_out, len(sigma), seed=seed))
    q_in, _ = torch.linalg.qr(drawn(n_in, len(sigma), seed=seed + 1))
    return (q_out * sigma) @ q_in.T + noise * drawn(n_out, n_in, seed=seed + 2)


@pytest.fixture(scope="module")
def matrices():
    """Large matrices, each with its singular values in float64."""
    found = {
        "rank 8 and noise": with_noise(torch.linspace(3, 1, 8)),
        "rank 60 and noise": with_noise(torch.ones(60)),
        "turned": with_noise(torch.linspace(3, 1, 8)).mT,
    }
    return {name: (matrix, torch.linalg.svdvals(matrix.double())) for name, matrix in found.items()}


NAMES = ("rank 8 and noise", "rank 60 and noise", "turned")


def loss_of(matrix, pair):
    return float((matrix.double() - dense(pair)).norm())


@pytest.mark.parametrize("rank", [4, 8, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_change_loses_hardly_more_than_the_best_matrix_of_a_rank_does(name, rank, matrices):
    matrix, sigma = matrices[name]
    pair = factorised(matrix, Keep(rank=rank))
    assert pair.rank == rank
    assert pair.a.shape == (rank, matrix.shape[1])
    assert pair.b.shape == (matrix.shape[0], rank)
    best = float((sigma[rank:] ** 2).sum().sqrt())
    assert best * (1 - 1e-5) <= loss_of(matrix, pair) <= NEARLY * best


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_change_takes_the_lowest_rank_that_has_an_energy(name, energy, matrices):
    matrix, sigma = matrices[name]
    pair = factorised(matrix, Keep(energy=energy))
    assert pair.rank == smallest_rank(sigma, energy)
    kept = 1 - (loss_of(matrix, pair) / float(sigma.norm())) ** 2
    assert kept >= energy * (1 - 1e-5)


def test_an_energy_beyond_the_first_guess_is_looked_for_further(matrices):
    matrix, sigma = matrices["rank 60 and noise"]
    wanted = smallest_rank(sigma, 0.9)
    assert wanted > 32
    assert factorised(matrix, Keep(energy=0.9)).rank == wanted
    assert factorised(matrix, Keep(40, 0.9)).rank == 40


def test_an_energy_that_only_the_noise_makes_up_takes_all_of_it(matrices):
    matrix, sigma = matrices["rank 8 and noise"]
    pair = factorised(matrix, Keep(energy=0.9999))
    assert pair.rank == smallest_rank(sigma, 0.9999) > 200
    full = factorised(matrix, Keep(rank=10_000))
    assert full.rank == min(SIDES)
    assert loss_of(matrix, full) <= 8 * sqrt(max(SIDES)) * ULP * float(sigma.norm())


@pytest.mark.parametrize("keep", [Keep(rank=8), Keep(energy=0.9), Keep(energy=0.9999)])
def test_the_same_change_has_the_same_factors_every_time(keep, matrices):
    matrix, _ = matrices["rank 8 and noise"]
    before = torch.get_rng_state()
    one = factorised(matrix, keep)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    other = factorised(matrix, keep)
    torch.set_rng_state(before)
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


@pytest.mark.parametrize("keep", [Keep(rank=3), Keep(energy=0.8), Keep(rank=1000)])
def test_a_small_change_has_its_exact_decomposition(keep):
    matrix = drawn(N_OUT, N_IN)
    sigma = torch.linalg.svdvals(matrix.double())
    pair = factorised(matrix, keep)
    k = smallest_rank(sigma, keep.energy) if keep.energy else min(keep.rank, N_OUT)
    assert pair.rank == k
    best = float((sigma[k:] ** 2).sum().sqrt())
    assert abs(loss_of(matrix, pair) - best) <= SVD_TOLERANCE * float(sigma.norm())


@pytest.mark.parametrize("keep", [Keep(rank=3), Keep(energy=0.8)])
@pytest.mark.parametrize("sides", [(4, 6), (600, 520)])
def test_a_change_of_zeros_has_factors_of_zeros(sides, keep):
    pair = factorised(torch.zeros(sides), keep)
    assert pair.rank == (keep.rank or 1)
    assert not (pair.b @ pair.a).any()


def test_a_stack_of_matrices_has_the_largest_rank_and_every_product():
    pairs = [factorised(drawn(N_OUT, N_IN, seed=n), Keep(rank=n + 1)) for n in range(3)]
    stack = stacked(pairs)
    assert stack.rank == 3
    for n, pair in enumerate(pairs):
        assert torch.equal(dense(Pair(stack.a[n], stack.b[n])), dense(pair))
