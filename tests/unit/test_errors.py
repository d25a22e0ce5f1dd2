"""Errors carry data and one sentence; each has its exit code."""

from __future__ import annotations

import pytest

from lora_merge import errors
from lora_merge.cli import exits
from lora_merge.core.report import Verdict, error


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize("kind", list(subclasses(errors.LoraMergeError)), ids=lambda kind: kind.__name__)
def test_every_error_has_an_exit_code_of_its_own_kind(kind):
    instance = kind.__new__(kind)

    assert exits.code_of(instance) in exits.MEANINGS
    assert exits.code_of(instance) != exits.OK
    assert (exits.code_of(instance) == exits.BUG) == (kind is errors.BugError)


@pytest.mark.parametrize("kind", list(subclasses(errors.LoraMergeError)), ids=lambda kind: kind.__name__)
def test_every_error_is_drawn_in_the_tree(kind):
    assert f"─ {kind.__name__} " in errors.__doc__


def test_one_issue_is_one_sentence_and_several_are_a_list():
    one = errors.PlanError([error("a", "q_proj", "is odd", "mend it")])
    two = errors.PlanError([error("a", "q_proj", "is odd", "mend it"), error("b", "k_proj", "is even")])

    assert str(one) == "q_proj: is odd\nhint: mend it"
    assert (one.without_hint, one.hint) == ("q_proj: is odd", "mend it")
    assert str(two).splitlines() == [
        "the adapter cannot be merged: 2 problems",
        "  1. q_proj: is odd",
        "     hint: mend it",
        "  2. k_proj: is even",
    ]


def test_a_long_list_is_cut_and_says_so():
    issues = [error("a", f"m{n}", f"problem {n}") for n in range(30)]

    assert str(errors.PlanError(issues)).endswith("… and 18 other kinds (-v and --json list them all)")
    assert str(errors.PlanError(issues[:13])).endswith("… and 1 other kind (-v and --json list them all)")


def test_a_verify_error_lists_the_errors_of_its_verdict():
    verdict = Verdict("sample", 3, 9, (error("wrong-value", "q_proj", "row 0 is 1, expected 2"),))

    assert "q_proj: row 0 is 1, expected 2" in str(errors.VerifyError(verdict))
