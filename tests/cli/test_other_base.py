"""An adapter that was trained on another model of the same shape: a warning with both names, and a card that does not lie."""

from __future__ import annotations

import json

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json

MERGED, NAMED = "acme/Solid-7B-Instruct", "acme/Solid-7B"


@pytest.fixture
def pair(pico, pico_adapter, tampered, tmp_path):
    """Return a function (folder of the base, _name_or_path, what the adapter names, fields) → base and adapter."""

    def make(folder="base", called=None, named=NAMED, **fields):
        base = tampered(pico(), folder) if "/" not in folder else _deep(tampered, pico(), tmp_path, folder)
        adapter = tampered(pico_adapter(pico()), "adapter")
        if called:
            edit_json(base / "config.json", _name_or_path=called)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=named, **fields)
        return base, adapter

    return make


def _deep(tampered, source, tmp_path, folder):
    (tmp_path / folder).parent.mkdir(parents=True)
    return tampered(source, folder)


SNAPSHOT = "hub/models--acme--Solid-7B-Instruct/snapshots/" + "ab" * 20


def test_a_folder_of_another_family_is_another_model_whatever_it_is_called(
    pair, tampered, pico, cli, tmp_path
):
    """Two folders called base say nothing by their names; where both are here, their configurations tell."""
    named = tampered(pico("qwen2"), "trained/base")
    base, adapter = pair("base", named=str(named))

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    assert (
        f"was trained on {named}; their configurations differ, so they look like different models"
        in result.stderr
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tampered(base, "again")))
    again = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "again-out")
    assert "two models" not in again.stderr


@pytest.mark.parametrize(
    ("folder", "called", "is_called"),
    [
        ("base", MERGED, f"{MERGED}, from its config.json"),
        (SNAPSHOT, None, f"{MERGED}, from its path in the cache"),
        (SNAPSHOT, NAMED, f"{MERGED}, from its path in the cache"),
        ("Solid-7B-Instruct", None, "Solid-7B-Instruct"),
    ],
)
def test_another_model_is_a_warning_that_says_both_names(folder, called, is_called, pair, cli, tmp_path):
    base, adapter = pair(folder, called)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")
    strict = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "strict", "--strict")

    assert result.exit_code == exits.OK, result.stderr
    (issue,) = (one for one in json.loads(result.stdout)["issues"] if one["code"] == "other-base")
    assert issue["severity"] == "warning"
    assert is_called in issue["sentence"]
    assert (
        f"was trained on {NAMED}; their names differ, so they look like different models" in issue["sentence"]
    )
    assert strict.exit_code == exits.PLAN
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAMED}\n" not in card
    assert f"**{NAMED}**" not in card


@pytest.mark.parametrize(
    ("folder", "called", "named"),
    [
        ("base", None, NAMED),
        ("base", NAMED, f"unsloth/{NAMED[5:]}-bnb-4bit"),
        ("base", MERGED, "./base"),
        ("base", MERGED, "/home/x/models/Solid-7B-Instruct"),
        ("Solid-7B", None, NAMED),
        ("Solid-7B", None, "/home/y/Solid-7B"),
        ("tuned-7B", NAMED, NAMED),
        ("base", None, None),
    ],
)
def test_names_that_may_be_of_one_model_are_no_warning(folder, called, named, pair, cli):
    base, adapter = pair(folder, called, named)

    result = cli("plan", "--base", base, "--adapter", adapter, "--strict")

    assert result.exit_code == exits.OK, result.stderr


def test_each_of_several_adapters_is_asked(pair, pico, pico_adapter, tampered, cli):
    base, adapter = pair("base", MERGED, MERGED)
    second = tampered(pico_adapter(pico()), "second")
    edit_json(second / "adapter_config.json", base_model_name_or_path=NAMED)

    result = cli("plan", "--base", base, "--adapter", adapter, "--adapter", second)

    assert result.stderr.count("their names differ, so they look like different models") == 1
    assert f"the adapter {second} was trained on {NAMED}" in result.stderr


def test_what_a_merge_was_made_of_is_known_from_its_manifest(
    pair, pico_adapter, pico, tampered, cli, tmp_path
):
    base, adapter = pair("Solid-7B-Instruct", None, MERGED)
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out").exit_code == exits.OK
    second = tampered(pico_adapter(pico(), r=2), "second")

    told = {}
    for named in (NAMED, MERGED):
        edit_json(second / "adapter_config.json", base_model_name_or_path=named)
        told[named] = cli("plan", "--base", tmp_path / "out", "--adapter", second).stderr

    assert f"is {base}, from its merge_manifest.json" in told[NAMED]
    assert "two models" not in told[MERGED]


@pytest.mark.parametrize(
    ("revision", "is_told"), [("cd" * 20, True), ("ab" * 20, False), ("main", False), ("v2", True)]
)
def test_another_revision_of_a_cached_repo_is_a_warning(revision, is_told, pair, cli):
    base, adapter = pair(SNAPSHOT, None, MERGED, revision=revision)
    references = base.parents[1] / "refs"
    references.mkdir()
    for name, commit in (("main", "ab" * 20), ("v2", "cd" * 20)):
        (references / name).write_text(commit)

    result = cli("plan", "--base", base, "--adapter", adapter)

    assert ("the base may have changed since the training" in result.stderr) == is_told
    assert (f"names revision {revision}" in result.stderr) == is_told


@pytest.mark.parametrize(
    ("folder", "named", "card"),
    [
        ("Solid-7B", NAMED, NAMED),
        ("solid-7b", NAMED, NAMED),
        ("other", NAMED, "other"),
        ("Solid-7B", "unsloth/Solid-7B-bnb-4bit", "Solid-7B"),
        (SNAPSHOT, NAMED, MERGED),
    ],
)
def test_the_card_names_what_was_merged(folder, named, card, pair, cli, tmp_path):
    base, adapter = pair(folder, None, named)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--no-verify")

    assert result.exit_code == exits.OK, result.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {card}\n" in text
    assert f"The weights of **{card}** with" in text
