"""Two records of what tests made say every byte that differs, and nothing is left out in silence."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from digesting import records

SCRIPT = Path(__file__).parents[2] / "scripts" / "digests.py"

TINY = """
import json, os, random, shutil, sys, tempfile
from pathlib import Path

import click
import numpy
import pytest
from click.testing import CliRunner


def write(out, data):
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    out.mkdir(parents=True)
    (out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (out / "merge_manifest.json").write_text(json.dumps({"base": str(out), "tensors": {}}))
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text("{}")


@click.command()
@click.argument("out", type=Path)
def command(out):
    write(out, b"abcd")
    sys.exit(3)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    write(root / "base", bytes(random.randrange(256) for _ in range(4)))
    return root / "base"


def test_a_command_makes_an_output(tmp_path):
    CliRunner().invoke(command, [str(tmp_path / "out")])


def test_outputs_that_are_gone_when_it_ends(tmp_path):
    write(tmp_path / "out", b"once")
    shutil.rmtree(tmp_path / "out")
    write(tmp_path / "out", b"more")
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "elsewhere", numpy.random.bytes(4))


def test_what_is_shared(drawn, tmp_path):
    write(tmp_path / "a.lora-merge-staging" / "output", os.urandom(4))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_bytes(os.urandom(4))


def test_one_that_fails():
    assert False
"""


def record(tree, out, *more):
    command = [
        sys.executable,
        SCRIPT,
        "record",
        out,
        "--tree",
        tree,
        "--suite",
        "tests",
        "--root",
        out.parent / "root",
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Records of two trees: the second writes one other byte, and has a file of tests that cannot be collected."""
    outs = []
    for text in (TINY, TINY.replace('b"abcd"', 'b"abce"')):
        tree = tmp_path_factory.mktemp("tree")
        (tree / "tests").mkdir()
        (tree / "tests" / "test_tiny.py").write_text(text)
        if outs:
            (tree / "tests" / "test_broken.py").write_text("import nothing_of_this_name")
        out = tree.parent / f"{tree.name}.json"
        done = record(tree, out)
        assert done.returncode == len(outs), done.stdout + done.stderr
        assert "test_tiny.py::test_one_that_fails: failed" in done.stderr
        outs.append(out)
    assert "tests/test_broken.py: pytest ended with 2" in done.stderr
    return outs


@pytest.fixture
def found(recorded):
    return records.read(recorded[0])


def of(record, name):
    return record["tests"][f"tests/test_tiny.py::{name}"]


def compared(one, other):
    return records.compare(one, other).differences


def test_outputs_are_seen_after_a_command_before_they_are_removed_and_at_the_end(found):
    first = of(found, "test_a_command_makes_an_output")
    assert first["exits"] == [3]
    assert list(first["made"]) == ["out"]
    assert sorted(first["made"]["out"][0]) == [
        "1_Pooling/config.json",
        "merge_manifest.json",
        "model.safetensors",
    ]
    second = of(found, "test_outputs_that_are_gone_when_it_ends")
    digests = [version["model.safetensors"][1]["tensor a"] for version in second["made"]["out"]]
    assert len(set(digests)) == len(digests) == 2
    shared = [place.partition(" ")[0] for place in of(found, "(shared)")["made"]]
    assert sorted(shared) == ["temp/tmp/elsewhere", "tests/drawn/base"]
    assert of(found, "test_what_is_shared")["made"] == {}
    assert of(found, "test_one_that_fails")["outcome"] == "failed"


def run_compare(*paths):
    command = [sys.executable, SCRIPT, "compare", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_record_is_the_same_as_itself(recorded):
    done = run_compare(recorded[0], recorded[0])
    assert done.returncode == 0, done.stdout
    said = done.stdout.splitlines()
    assert said[-1] == "no difference"
    assert said[-2].startswith("compared: 5 tests, 1 commands, 15 files, ")


def test_one_changed_byte_and_a_file_of_tests_that_did_not_run_are_all_that_differs(recorded):
    # Whatever the tests drew at random, and the names of their temporary directories, were the same in both runs.
    done = run_compare(*recorded)
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert said[0].startswith("not recorded: new record: tests/test_broken.py: pytest ended with 2")
    assert said[-3] == (
        "file: tests/test_tiny.py::test_a_command_makes_an_output out/model.safetensors: 72 bytes; tensor a"
    )
    assert said[-2].startswith("compared: 5 tests, 1 commands, 15 files, ")
    assert said[-1] == "2 differences: 1 file, 1 not recorded"


def drop_file(record):
    del of(record, "test_a_command_makes_an_output")["made"]["out"][0]["merge_manifest.json"]


def drop_version(record):
    of(record, "test_outputs_that_are_gone_when_it_ends")["made"]["out"].pop()


def drop_directory(record):
    of(record, "test_a_command_makes_an_output")["made"].clear()


def drop_test(record):
    del record["tests"]["tests/test_tiny.py::test_what_is_shared"]


@pytest.mark.parametrize(
    ("drop", "kind"),
    [(drop_file, "file"), (drop_version, "directory"), (drop_directory, "directory"), (drop_test, "test")],
)
def test_what_is_on_one_side_alone_is_named(drop, kind, found):
    less = copy.deepcopy(found)
    drop(less)
    missing, additional = compared(found, less), compared(less, found)
    assert [line.partition(":")[0] for line in missing] == [f"missing {kind}"]
    assert [line.partition(":")[0] for line in additional] == [f"additional {kind}"]


def change_exit(record):
    of(record, "test_a_command_makes_an_output")["exits"] = [4]


def change_outcome(record):
    of(record, "test_one_that_fails")["outcome"] = "passed"


def change_root(record):
    record["root"] = "/elsewhere"


def add_fault(record):
    record["faults"].append("tests/test_other.py: pytest ended with 4")


@pytest.mark.parametrize("change", [change_exit, change_outcome, change_root, add_fault])
def test_what_is_no_file_is_compared_too(change, found):
    other = copy.deepcopy(found)
    change(other)
    assert len(compared(found, other)) == len(compared(other, found)) == 1


def test_a_test_that_moved_is_matched_by_its_name(found):
    text = json.dumps(found).replace("tests/test_tiny.py::test", "tests/more/test_tiny.py::test")
    result = records.compare(found, json.loads(text))
    assert len(result.moved) == 4
    assert result.differences == []
    assert str(result).startswith("matched by its name: tests/test_tiny.py::test_a_command")


def test_a_record_that_was_cut_short_goes_on_with_the_files_that_it_lacks(recorded):
    out = recorded[1].with_name("continued.json")
    shutil.copy(recorded[1], out)
    tree = recorded[1].with_suffix("")
    (tree / "tests" / "test_broken.py").write_text("def test_mended(): pass")
    (tree / "tests" / "test_tiny.py").write_text("assert False")
    done = record(tree, out, "--go-on")
    assert done.returncode == 0, done.stderr
    whole = records.read(out)
    assert whole["not run"] == {}
    kinds = [line.partition(":")[0] for line in compared(records.read(recorded[0]), whole)]
    assert kinds == ["additional test", "file"]


def test_a_record_of_some_files_is_compared_with_its_part_of_another(found):
    whole = copy.deepcopy(found)
    whole["tests"]["tests/test_other.py::test_more"] = of(found, "test_one_that_fails")
    whole["not run"]["tests/test_third.py"] = "was not run"
    assert len(compared(whole, found)) == 2
    assert compared(records.part_of(whole, found), found) == []
