"""Request files: what they say, and errors that name the line and the key."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_merge.cli import exits
from lora_merge.errors import RequestError
from lora_merge.requests.request import Request
from lora_merge.requests.request_file import read_request


def write(tmp_path, text):
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_holds_the_options_and_flags_win(tmp_path):
    path = write(tmp_path, "base: b\nadapter: a\nout: o\ndtype: bf16\nworkers: 2\nstrict: true\n")

    request = read_request(path, {"out": "elsewhere"})

    assert request == Request(
        adapter=("a",), out="elsewhere", base="b", dtype="bfloat16", workers=2, strict=True
    )


def test_a_file_may_name_several_adapters_with_weights(tmp_path):
    path = write(
        tmp_path,
        "adapter: [a, 'b:0.5']\nout: o\ncombine: dare_ties\ndensity: 0.25\nseed: 7\nbase_is: residual\n"
        "allow_untie: true\nallow_svd: true\n",
    )

    assert read_request(path, {}) == Request(
        adapter=("a", "b:0.5"), out="o", combine="dare_ties", density=0.25, seed=7, base_is="residual",
        allow_untie=True, allow_svd=True,
    )  # fmt: skip


def test_adapters_on_the_command_line_take_the_place_of_those_in_the_file(tmp_path):
    path = write(tmp_path, "adapter: [a, b]\nout: o\n")

    assert read_request(path, {"adapter": ("c:2",)}).adapter == ("c:2",)


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("adapter: a\nout: o\nmax_shard_siez: 5GB\n", 3, "max_shard_siez", "unknown key for a merge"),
        ("adapter: a\nout: o\ndtype: int4\n", 3, "dtype", "'int4' is not a known dtype"),
        ("adapter: a\nout: 5\n", 2, "out", "is 5: input should be a valid string"),
        (
            "adapter: a\nout: o\noverwrite: maybe\n",
            3,
            "overwrite",
            "is 'maybe', expected true or false",
        ),
        ("adapter: a\nout: o\nverify: twice\n", 3, "verify", "'twice' is not a known level of verification"),
        ("adapter: a\nout: o\nworkers: 0\n", 3, "workers", "0 is not a number of workers"),
        ("adapter: a\nout: o\nworkers: [1]\n", 3, "workers", "is not a number of workers"),
        ("adapter: a\nout: o\ndevice: tpu\n", 3, "device", "'tpu' is not a known device"),
        ("adapter: a\nout: o\nmax_shard_size: huge\n", 3, "max_shard_size", "'huge' is not a size"),
        ("adapter: a\nout: o\nadapter: b\n", 3, "adapter", "is given twice; the first is on line 1"),
        ("out: o\n", 0, "adapter", "is missing"),
        ("out: o\nadapter: []\n", 2, "adapter", "names no adapter, expected at least one"),
        ("out: o\nadapter: 5\n", 2, "adapter", "5 is not an adapter; write a weight together with its path"),
        (
            "out: o\nadapter: [a, 7]\n",
            2,
            "adapter",
            "7 is not an adapter; write a weight together with its path",
        ),
        ("out: o\nadapter: ['']\n", 2, "adapter", "'' is not an adapter; expected a directory"),
        ("out: o\nadapter: [a, 'b:0']\n", 2, "adapter", "'b:0' has the weight 0, so it would change nothing"),
        ("out: o\nadapter: a\nbase: ''\n", 3, "base", "is empty, expected a path"),
        (
            "adapter: a\nout: o\nworkers: 99999999999\n",
            3,
            "workers",
            "expected a whole number from 1 to 1024",
        ),
        (
            "adapter: a\nout: o\nmax_shard_size: 5\n",
            3,
            "max_shard_size",
            "5 has no unit, and would mean 5 bytes",
        ),
        ("adapter: a\nout: o\nmemory_limit: 2\n", 3, "memory_limit", "2 has no unit, and would mean 2 bytes"),
        ("adapter: a\nout: o\nmax_shard_size: 2.5\n", 3, "max_shard_size", "write 2.5MB or 2.5GB"),
        ("out: o\nadapter: [a, 'b:inf']\n", 2, "adapter", "'b:inf' has the weight inf, expected a number"),
        ("out: o\nadapter: {a: much}\n", 2, "adapter", "'a' has a string as its weight, expected a number"),
        (
            "adapter: a\nout: o\nbase_is: new\n",
            3,
            "base_is",
            "'new' is not a known kind of base, expected original",
        ),
        (
            "adapter: a\nout: o\ncombine: slerp\n",
            3,
            "combine",
            "'slerp' is not a known way to combine, expected",
        ),
        (
            "adapter: a\nout: o\ncombine: [ties]\n",
            3,
            "combine",
            "a list is not a known way to combine, expected",
        ),
        ("adapter: a\nout: o\ndensity: 0\n", 3, "density", "0 is not a density, expected a number above 0"),
        ("adapter: a\nout: o\ndensity: 1.5\n", 3, "density", "1.5 is not a density"),
        ("adapter: a\nout: o\ndensity: much\n", 3, "density", "'much' is not a density"),
        ("adapter: a\nout: o\ndensity: true\n", 3, "density", "True is not a density"),
        ("adapter: a\nout: o\ndensity: .nan\n", 3, "density", "nan is not a density"),
        ("adapter: a\nout: o\nseed: -1\n", 3, "seed", "-1 is not a seed, expected a whole number"),
        ("adapter: a\nout: o\nseed: 1.5\n", 3, "seed", "1.5 is not a seed"),
        ("adapter: a\nout: o\nseed: 2147483648\n", 3, "seed", "2147483648 is not a seed"),
        (
            "adapter: a\nout: o\nallow_svd: maybe\n",
            3,
            "allow_svd",
            "is 'maybe', expected true or false",
        ),
        ("adapter: a\nout: o\nallow_untie: 2\n", 3, "allow_untie", "is 2, expected true or false"),
        ("- adapter\n", 1, "", "contains a list, expected a table"),
        ("adapter: [\n", 2, "", "is not valid YAML"),
        ("", 1, "", "contains nothing"),
    ],
)
def test_a_fault_names_its_line_and_key(text, line, key, words, tmp_path):
    path = write(tmp_path, text)

    with pytest.raises(RequestError) as caught:
        read_request(path, {})

    assert (caught.value.line, caught.value.key) == (line, key)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}" if line else path)


def test_a_table_gives_adapters_their_weights(tmp_path):
    table = read_request(write(tmp_path, "adapter: {a: 0.5, b: 1}\nout: o\n"), {})
    listed = read_request(write(tmp_path, "adapter: [{a: 0.5}, b]\nout: o\n"), {})

    assert table.adapter == ("a:0.5", "b:1")
    assert listed.adapter == ("a:0.5", "b")


def test_a_misspelt_key_is_answered_with_the_right_one(tmp_path):
    with pytest.raises(RequestError) as caught:
        read_request(write(tmp_path, "adaptor: a\nout: o\n"), {})

    assert caught.value.hint == "did you mean adapter?"


def test_the_command_runs_a_request_file(pico, pico_adapter, cli, tmp_path):
    path = write(tmp_path, f"adapter: {pico_adapter(pico())}\nout: {tmp_path / 'out'}\nverify: full\n")

    result = cli("--config", path)

    assert result.exit_code == exits.OK, result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_command_names_the_line_of_a_wrong_key(cli, tmp_path):
    result = cli("--config", write(tmp_path, "adapter: a\nout: o\ndtyp: x\n"))

    assert result.exit_code == exits.USAGE
    assert "merge.yaml:3: dtyp: unknown key for a merge" in result.stderr
    assert "did you mean dtype?" in result.stderr


EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("merge*.yaml"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_every_example_runs(path, pico, pico_adapter, cli, tmp_path):
    places = ("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    result = cli("--config", path, *places)

    assert result.exit_code == exits.OK, result.stderr


LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 12))
BOMBS = {
    "aliases of aliases": (
        "l0: &l0 [a]\n" + LAUGHS,
        "expands to more than 200000 values, because of its aliases",
    ),
    "aliases in keys": (
        "l0: &l0 [a]\n" + LAUGHS + "? *l11\n: a\n",
        "values, because of its aliases|as a key",
    ),
    "merged aliases": (
        "l0: &l0 {a: b}\n"
        + "".join(f"l{n}: &l{n}\n  <<: [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        "expands to more than 200000 values, because of its aliases",
    ),
    "a long text with many aliases": (
        f"a: &a {'x' * 9000}\nb: [{', '.join(['*a'] * 3000)}]\n",
        "because of its aliases",
    ),
    "a long text": (f"a: {'x' * 20_000}\n", "has a value of 20000 characters, expected at most 10000"),
    "deep lists": ("a: " + "[" * 100_000 + "]" * 100_000, "more than 64 levels deep"),
    "deep tables": ("{a: " * 50_000, "more than 64 levels deep"),
    "is not a valid date": (
        "out: 2020-99-99\n",
        "is not a valid date, or is a number of thousands of digits",
    ),
    "a number of many digits": (
        "seed: " + "9" * 9000 + "\n",
        "is not a valid date, or is a number of thousands of digits",
    ),
    "too many bytes": ("a: b # " + "x" * 1_000_000 + "\n", "has 1000008 bytes, expected at most 1000000"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_stands_for_too_much_is_refused(bomb, tmp_path):
    text, words = BOMBS[bomb]
    began = time.process_time()
    with pytest.raises(RequestError, match=words):
        read_request(write(tmp_path, text), {})
    assert time.process_time() - began < 30


def test_aliases_that_stand_for_little_are_filled_in(tmp_path):
    path = write(tmp_path, "adapter: &a x\nout: *a\nbase: *a\n")
    assert read_request(path, {}) == Request(adapter=("x",), out="x", base="x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a pipe, expected a regular file"),
        (Path.mkdir, "is a directory, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a regular file"),
        (
            lambda path: path.touch() or os.truncate(path, 1 << 40),
            "has 1099511627776 bytes, expected at most 1000000",
        ),
    ],
)
def test_what_is_no_small_file_is_refused_at_once(make, words, tmp_path):
    make(tmp_path / "merge.yaml")
    with pytest.raises(RequestError, match=words):
        read_request(str(tmp_path / "merge.yaml"), {})


def test_a_pipe_of_the_shell_s_is_read(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"adapter: a\nout: o\n")
    os.close(writing)
    try:
        assert read_request(f"/dev/fd/{reading}", {}).adapter == ("a",)
    finally:
        os.close(reading)
