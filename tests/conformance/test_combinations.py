"""What every combination keeps, for each member of `COMBINATIONS`: its formula, and the same bits again."""

from __future__ import annotations

import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch

from lora_merge.core.plan import Combination
from lora_merge.deltas import COMBINATIONS, combine

SHAPE = (60, 48)
WEIGHTS = (0.5, 1.0, -0.75)
DENSITY = 0.3
U = 2.0**-24
RANDOM = ("dare_linear", "dare_ties")

each = pytest.mark.parametrize("method", COMBINATIONS)
random_ones = pytest.mark.parametrize("method", RANDOM)


@pytest.fixture
def changes():
    """Three changes of a weight; some values are zero, as where an adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(SHAPE, generator=generator) * size for size in (1.0, 0.7, 1.3)]
    made[0][:, 3] = 0.0
    made[1][5] = 0.0
    return made


def how(method, density=DENSITY, seed=0, rank=7, name="name"):
    return Combination(method, density, seed, rank, name)


def bound(changes, weights, density=1.0):
    """Return how far float32 may be off: each of n terms is scaled up, weighted, added, and averaged at last."""
    size = sum(abs(weight) * change.double().abs() for weight, change in zip(weights, changes, strict=True))
    return (len(changes) + 5) * U * size / density


def off(got, wanted):
    return torch.from_numpy(np.abs(got.double().numpy() - wanted))


def arrays(changes):
    return [change.double().numpy() for change in changes]


def trimmed(change, density):
    """Return a change with all but its largest values set to zero, however many the density leaves."""
    n_kept = int(density * change.size)
    kept = np.zeros(change.size, dtype=bool)
    kept[np.argsort(-np.abs(change).ravel())[:n_kept]] = True
    return np.where(kept.reshape(change.shape), change, 0.0)


def elected(changes, weights):
    """Return the mean of the weighted values whose sign is that of the sum, value by value."""
    result = np.zeros(SHAPE)
    for at in product(*map(range, SHAPE)):
        values = [change[at] for change in changes]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * value for w, value in zip(weights, values, strict=True) if np.sign(value) == sign]
        result[at] = sum(agreeing) / max(len(agreeing), 1)
    return result


def low_rank(changes, weights, rank):
    u, s, v = np.linalg.svd(sum(w * change for w, change in zip(weights, changes, strict=True)))
    return u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]


def weighted_sum(changes, weights):
    return sum(weight * change for weight, change in zip(weights, changes, strict=True))


ORACLES = {
    "ties": lambda changes, weights: elected([trimmed(change, DENSITY) for change in changes], weights),
    "dare_linear": weighted_sum,
    "dare_ties": elected,
    "svd": lambda changes, weights: low_rank(changes, weights, 7),
}
"""Each formula, in float64; where values are dropped at random, with a density of 1."""


def test_every_combination_has_an_oracle():
    assert ORACLES.keys() == COMBINATIONS.keys()
    assert set(RANDOM) < set(COMBINATIONS)


@each
def test_a_combination_follows_its_formula(method, changes):
    density = 1.0 if method in RANDOM else DENSITY
    got = combine(changes, WEIGHTS, how(method, density))
    wanted = ORACLES[method](arrays(changes), WEIGHTS)
    if method == "svd":
        # LAPACK is backward stable: ‖E‖₂ ≤ p(m, n)·u·‖C‖₂ with a modest p; the truncation turns that into as
        # much times ‖C‖ over the gap of the singular values that are parted.
        total = weighted_sum(arrays(changes), WEIGHTS)
        s = np.linalg.svd(total, compute_uv=False)
        limit = 2 * s[0] / (s[6] - s[7]) * math.sqrt(max(SHAPE)) * U * s[0]
        assert np.linalg.norm(got.double().numpy() - wanted, 2) <= limit
        assert limit < 0.01 * np.linalg.norm(wanted, 2)
    else:
        assert (off(got, wanted) <= bound(changes, WEIGHTS)).all()
    assert np.abs(wanted).max() > 0.5


@each
def test_the_changes_that_are_given_stay_as_they_are(method, changes):
    before = [change.clone() for change in changes]
    combine(changes, WEIGHTS, how(method))
    assert all(torch.equal(one, other) for one, other in zip(changes, before, strict=True))


@each
def test_the_same_seed_and_name_give_the_same_bits_whatever_was_drawn_before(method, changes):
    first = combine(changes, WEIGHTS, how(method, seed=3))
    torch.rand(17)
    assert torch.equal(combine(changes, WEIGHTS, how(method, seed=3)), first)


@random_ones
@pytest.mark.parametrize(("seed", "name"), [(4, "name"), (3, "another name"), (2**31 - 1, "name")])
def test_another_seed_or_another_tensor_gives_others(method, seed, name, changes):
    first = combine(changes, WEIGHTS, how(method, seed=3))
    second = combine(changes, WEIGHTS, how(method, seed=seed, name=name))
    dropped_by_both = ((first == 0) & (second == 0)).double().mean()
    assert not torch.equal(first, second)
    assert dropped_by_both < (first == 0).double().mean()


@each
def test_torchs_own_random_numbers_are_not_disturbed(method, changes):
    torch.manual_seed(11)
    wanted = torch.rand(5)
    torch.manual_seed(11)
    combine(changes, WEIGHTS, how(method))
    assert torch.equal(torch.rand(5), wanted)


@each
def test_threads_do_not_mix_their_random_numbers(method, changes):
    names = [f"layers.{n}.weight" for n in range(24)]

    def one(name):
        return combine(changes, WEIGHTS, how(method, name=name))

    wanted = [one(name) for name in names]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(one, names))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@each
def test_what_other_threads_draw_meanwhile_changes_nothing(method, changes):
    wanted = combine(changes, WEIGHTS, how(method))
    done = threading.Event()

    def draw():
        while not done.is_set():
            torch.rand(3)

    other = threading.Thread(target=draw)
    other.start()
    try:
        got = [combine(changes, WEIGHTS, how(method)) for _ in range(50)]
    finally:
        done.set()
        other.join()
    assert all(torch.equal(one, wanted) for one in got)


@each
def test_nothing_is_warned_of(method, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine(changes, WEIGHTS, how(method, density=1.0))


def test_ties_with_one_adapter_and_a_density_of_one_gives_its_change_back(changes):
    for change in changes:
        assert torch.equal(combine([change], [1.0], how("ties", density=1.0)), change)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_ties_with_one_adapter_keeps_the_largest_values_and_no_others(density, changes):
    change = changes[2]
    got = combine([change], [1.0], how("ties", density=density))
    kept = got != 0
    assert int(kept.sum()) == int(density * change.numel())
    assert torch.equal(got[kept], change[kept])
    assert change[kept].abs().min() >= change[~kept].abs().max()


def test_ties_ignores_the_values_that_lost_the_vote():
    one, other, third = (torch.full((4, 4), value) for value in (2.0, 4.0, -5.0))
    got = combine([one, other, third], [1.0, 1.0, 1.0], how("ties", density=1.0))
    assert torch.equal(got, torch.full((4, 4), 3.0))


def test_dare_with_a_density_of_one_is_the_weighted_sum(changes):
    got = combine(changes, WEIGHTS, how("dare_linear", density=1.0))
    wanted = weighted_sum(arrays(changes), WEIGHTS)
    assert (off(got, wanted) <= bound(changes, WEIGHTS)).all()


@random_ones
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_as_many_values_as_it_is_told_and_scales_them_up(method, density):
    change = torch.randn(200, 200, generator=torch.Generator().manual_seed(5))
    got = combine([change], [1.0], how(method, density=density))
    kept = got != 0
    # a share of 40 000 coins is off by six standard deviations once in a thousand million
    deviation = math.sqrt(density * (1 - density) / change.numel())
    assert abs(float(kept.double().mean()) - density) <= 6 * deviation
    wanted = (change.double() / density)[kept]
    assert ((got[kept].double() - wanted).abs() <= 2 * U * wanted.abs()).all()


def test_dare_drops_the_values_of_each_adapter_by_themselves():
    ones = [torch.full((100, 100), 1.0), torch.full((100, 100), 10.0)]
    got = combine(ones, [1.0, 1.0], how("dare_linear", density=0.5))
    values, counts = torch.unique(got, return_counts=True)
    assert values.tolist() == [0.0, 2.0, 20.0, 22.0]
    deviation = math.sqrt(0.25 * 0.75 / got.numel())
    assert ((counts / got.numel() - 0.25).abs() <= 6 * deviation).all()


@pytest.mark.parametrize("rank", [1, 7, min(SHAPE)])
def test_svd_keeps_exactly_so_many_singular_values_and_they_are_the_largest(rank, changes):
    got = combine(changes, WEIGHTS, how("svd", rank=rank)).double().numpy()
    found = np.linalg.svd(got, compute_uv=False)
    wanted = np.linalg.svd(weighted_sum(arrays(changes), WEIGHTS), compute_uv=False)
    # Weyl: a singular value moves by no more than the norm of what was added to the matrix
    limit = math.prod(SHAPE) ** 0.5 * U * wanted[0] * 4
    assert np.abs(found[:rank] - wanted[:rank]).max() <= limit
    assert (found[rank:] <= limit).all()
    assert limit < wanted[min(rank, len(wanted) - 1)] / 100


def test_svd_of_as_many_values_as_the_changes_have_is_their_sum():
    generator = torch.Generator().manual_seed(2)
    parts = [
        torch.randn(60, 3, generator=generator) @ torch.randn(3, 48, generator=generator) for _ in range(2)
    ]
    got = combine(parts, [1.0, 0.5], how("svd", rank=6)).double().numpy()
    wanted = weighted_sum(arrays(parts), [1.0, 0.5])
    assert np.linalg.norm(got - wanted, 2) <= math.prod(SHAPE) ** 0.5 * U * np.linalg.norm(wanted, 2) * 4
