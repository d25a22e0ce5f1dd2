"""Users of one stored weight, by names alone."""

from __future__ import annotations

from lora_merge.core.tensor import TensorRef
from lora_merge.layouts import Stored
from lora_merge.planning.shared import Shared, in_parts_issue, shared_weights, split_issue, to_write


class Experts:
    """A conversion that stacks experts, of which each is stored by itself."""

    def canonical(self, name):
        return ("a.experts", "pattern") if name.startswith("a.experts.") else (name, None)

    def renamed(self, name):
        return name

    def spelled(self, name):
        return name


def stored(*names):
    refs = {name: TensorRef(name, "F32", (2, 2), "model.safetensors", 0, 16) for name in names}
    return Stored(refs, Experts)


def test_a_weight_with_a_stored_user_is_held_by_it():
    assert shared_weights({"b.weight": "a.weight"}, stored("b.weight")) == (
        Shared(("a.weight", "b.weight"), "b.weight"),
    )


def test_a_weight_that_is_stored_in_parts_has_no_holder():
    (shared,) = shared_weights({"b.experts": "a.experts"}, stored("a.experts.0", "a.experts.1"))
    assert shared.holder == ""
    assert shared.parts == ("a.experts.0", "a.experts.1")
    issue = in_parts_issue(shared, "a.experts.0")
    assert issue.severity == "error"
    assert "a.experts and b.experts" in issue.sentence


def test_the_source_is_written_too_where_another_user_holds_the_values():
    shared = Shared(("a", "b", "c"), "b")
    assert to_write(shared, "b", {"b": 0, "a": 0, "c": 1}, lambda one, other: one == other) == ("c", "a")
    assert to_write(shared, "b", {"b": 0, "a": 0, "c": 0}, lambda one, other: one == other) == ()


def test_one_pair_is_said_without_a_count():
    (issue,) = split_issue({"b": "a"})
    assert "more" not in issue.sentence
    assert split_issue({}) == []
