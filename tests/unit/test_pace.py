"""The number of workers follows what they get done: series of throughputs, as machines give them."""

from __future__ import annotations

import pytest

from lora_merge.executors.pace import ALL, Pace

PIECE = 10_000_000


def run(pace, speed, seconds=60.0, piece=PIECE):
    """Feed a pace with pieces that n workers finish at ``speed(n)`` bytes a second; return the numbers that it chose."""
    now, chosen = 0.0, [pace.n]
    while now < seconds:
        now += piece / speed(pace.n)
        pace.done(piece, now)
        if pace.n != chosen[-1]:
            chosen.append(pace.n)
    return chosen


def test_all_workers_are_used_where_each_adds_its_share():
    pace = Pace(4, 16)
    assert run(pace, lambda n: n * 1e9) == [4, 6, 9, 14, 16]
    assert pace.why == ALL


def test_a_disk_that_is_full_with_the_first_keeps_them():
    pace = Pace(4, 16)
    assert run(pace, lambda n: 2.5e9) == [4, 6, 4]
    assert pace.why == "6 finished 1.00 times the bytes a second of 4"


def test_it_goes_back_from_workers_that_hinder_each_other():
    # Measured on 16 cores (docs/performance.md): 3 GB in 1.13 s by 4 workers, 1.15 s by 8 and 1.39 s by 16.
    seconds = {4: 1.13, 6: 1.14, 8: 1.15, 16: 1.39}
    pace = Pace(4, 16)
    assert run(pace, lambda n: 3e9 / seconds[n])[-1] == 4
    assert "6 finished 0.99 times" in pace.why


def test_it_stops_where_the_gain_ends():
    pace = Pace(4, 64)
    assert run(pace, lambda n: min(n, 9) * 1e9) == [4, 6, 9, 14, 9]
    assert pace.why == "14 finished 1.00 times the bytes a second of 9"


def test_a_settled_number_stays():
    pace = Pace(4, 16)
    run(pace, lambda n: 2.5e9)
    assert run(pace, lambda n: n * 1e9) == [4]


@pytest.mark.parametrize(("first", "most"), [(4, 4), (8, 4), (1, 1)])
def test_where_all_begin_there_is_nothing_to_try(first, most):
    pace = Pace(first, most)
    assert run(pace, lambda n: n * 1e9, 1.0) == [most]
    assert pace.why == ALL


def test_a_short_merge_ends_with_the_first_and_says_so():
    pace = Pace(4, 16)
    assert run(pace, lambda n: n * 1e9, 0.15) == [4]
    assert pace.why == "the merge ended before more were tried"


def test_pieces_begun_before_a_change_are_not_counted_for_it():
    """The first pieces after a change were under way: their bytes would make any number look fast."""
    pace = Pace(2, 4)
    now = 0.0
    while pace.n == 2:
        now += 0.1
        pace.done(PIECE, now)
    for _ in range(pace.n):
        pace.done(1000 * PIECE, now)
    for _ in range(9):
        now += 0.1
        pace.done(PIECE, now)
    assert pace.n == 2


def test_uneven_pieces_and_noise_do_not_make_it_give_up_a_real_gain():
    pace, sizes = Pace(4, 16), [1, 9, 3, 30, 2, 14, 6]
    now = 0.0
    for n in range(4000):
        nbytes = sizes[n % 7] * 1_000_000
        now += nbytes / (pace.n * 1e9) * (0.9 if n % 3 else 1.1)
        pace.done(nbytes, now)
    assert pace.n == 16
