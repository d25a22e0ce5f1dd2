"""How far two answers are apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_merge.verification.forward_comparison import Answer, Prompt, compare, compare_logprobs

SCORES = np.array([[0, 1, 2], [3, 0, 0], [0, 0, 4], [1, 5, 0]], dtype=np.float32)
WANTED = Answer(Prompt("text", (0, 2, 1)), (2, 1), SCORES)


def log_softmax(row):
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def spoken(scores, tokens):
    """Return what an engine with these scores says of the prompt and of these tokens."""
    following = [*WANTED.prompt.ids[1:], *tokens]
    return tuple(log_softmax(row)[token] for row, token in zip(scores.tolist(), following, strict=False))


def test_equal_answers_are_no_distance_apart():
    found = compare("e", WANTED, SCORES, 0.0)
    assert (found.max_difference, found.kl, found.top1, found.first_diverging) == (0.0, 0.0, 1.0, None)
    assert found.ok


def test_every_measure_is_the_one_that_its_name_says():
    other = SCORES.copy()
    other[3] = [1, 5, 6]  # another token is the likeliest, where the second one is said
    found = compare("e", WANTED, other, 5.9)
    p, q = log_softmax([1, 5, 0]), log_softmax([1, 5, 6])
    assert found.max_difference == 6.0
    assert found.kl == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    assert found.top1 == 0.75
    assert (found.first_diverging, found.n_tokens) == (1, 2)
    assert not found.ok
    assert "number 2 is the first that differs" in found.sentence()


@pytest.mark.parametrize("other", [np.full_like(SCORES, np.nan), SCORES[:3], SCORES[:, :2]])
def test_what_is_no_answer_at_all_does_not_pass(other):
    assert not compare("e", WANTED, other, 1e9).ok


def test_log_probabilities_are_compared_token_by_token():
    assert compare_logprobs("e", WANTED, (2, 1), spoken(SCORES, (2, 1)), 1e-12).ok
    off = list(spoken(SCORES, (2, 1)))
    off[1] += 0.25
    assert compare_logprobs("e", WANTED, (2, 1), tuple(off), 0.1).max_difference == pytest.approx(0.25)


def test_where_tokens_part_the_other_one_has_to_be_as_likely():
    # Told apart from a near tie by what base and adapter think of the token that was said instead.
    other = SCORES.copy()
    other[2] = [6, 0, 4]
    found = compare_logprobs("e", WANTED, (0, 1), spoken(other, (0, 1)), 1e-3)
    assert found.first_diverging == 0
    expected = abs(log_softmax([6, 0, 4])[0] - log_softmax([0, 0, 4])[0])
    assert found.max_difference == pytest.approx(expected)
    assert not found.ok


@pytest.mark.parametrize(("tokens", "logprobs"), [((2, 1), ()), ((), ()), ((2, 1), (0.0, 0.0, 0.0))])
def test_an_answer_cut_short_does_not_pass(tokens, logprobs):
    assert not compare_logprobs("e", WANTED, tokens, logprobs, 1e9).ok
