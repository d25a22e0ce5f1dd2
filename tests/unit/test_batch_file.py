"""Batch files: which jobs they stand for, and errors that name the line and the key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora_merge.batches.batch_file import read_batch
from lora_merge.errors import RequestError
from lora_merge.requests.request import ConvertRequest, Request


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function: the text of a batch, values that win → its jobs; directories are relative to an empty one."""
    monkeypatch.chdir(tmp_path)

    def read(text, **overrides):
        Path("batch.yaml").write_text(text)
        return read_batch("batch.yaml", overrides)

    return read


@pytest.fixture
def refused(read):
    """Return a function: the text of a batch → the error that it is."""

    def refused(text):
        with pytest.raises(RequestError) as caught:
            read(text)
        return caught.value

    return refused


def make(*names):
    for name in names:
        Path(name).mkdir(parents=True, exist_ok=True)


def shown(jobs):
    return [(job.request.adapter, job.request.out) for job in jobs]


def test_an_entry_is_a_job_with_the_values_of_a_request_and_its_line(read):
    jobs = read(
        "jobs:\n"
        "- {adapter: a, out: one, dtype: bf16, workers: 2, verify: full}\n"
        "- name: the second\n"
        "  convert: b\n"
        "  for: vllm\n"
        "  rank: 16\n"
        "  energy: 99%\n"
        "  out: two\n"
    )

    assert [(job.name, job.kind, job.line) for job in jobs] == [
        ("one", "merge", 2),
        ("the second", "convert", 3),
    ]
    assert jobs[0].request == Request(
        adapter=("a",), out="one", dtype="bfloat16", workers=2, verify="full", resume=True
    )
    assert jobs[1].request == ConvertRequest(adapter="b", out="two", serving="vllm", rank=16, energy=0.99)


def test_a_merge_goes_on_with_what_is_there_unless_it_is_told_not_to(read):
    jobs = read("jobs:\n- {adapter: a, out: o}\n- {adapter: a, out: p, resume: false}\n")

    assert [job.request.resume for job in jobs] == [True, False]


def test_defaults_are_of_every_job_that_has_such_a_key_and_its_own_keys_win(read):
    merge, other, conversion = read(
        "defaults: {base: b, dtype: bf16, combine: ties, rank: 4}\n"
        "jobs:\n"
        "- {adapter: x, out: one}\n"
        "- {adapter: x, out: two, dtype: fp32, base: c}\n"
        "- {convert: x, out: three}\n"
    )

    assert (merge.request.base, merge.request.dtype, merge.request.combine) == ("b", "bfloat16", "ties")
    assert (other.request.base, other.request.dtype, other.request.combine) == ("c", "float32", "ties")
    assert (conversion.request.base, conversion.request.dtype, conversion.request.rank) == (
        "b",
        "bfloat16",
        4,
    )


def test_what_is_given_on_the_command_line_wins_over_the_file(read):
    jobs = read(
        "defaults: {overwrite: false}\n"
        "jobs:\n- {adapter: a, out: o, offline: false}\n- {convert: a, out: p, token: file}\n",
        overwrite=True,
        offline=True,
        token="flag",
    )

    assert [(job.request.overwrite, job.request.offline, job.request.token) for job in jobs] == [
        (True, True, "flag")
    ] * 2


def test_a_wildcard_is_a_job_for_each_directory_in_the_order_of_numbers(read):
    make("runs/b/checkpoint-9", "runs/a/checkpoint-10", "runs/a/checkpoint-9", "runs/a/checkpoint-100")
    Path("runs/a/checkpoint-5").write_text("a file, and no adapter")

    jobs = read("jobs:\n- {adapter: runs/*/checkpoint-*, out: 'merged/{1}-{2}'}\n")

    assert shown(jobs) == [
        (("runs/a/checkpoint-9",), "merged/a-9"),
        (("runs/a/checkpoint-10",), "merged/a-10"),
        (("runs/a/checkpoint-100",), "merged/a-100"),
        (("runs/b/checkpoint-9",), "merged/b-9"),
    ]
    assert {job.line for job in jobs} == {2}


@pytest.mark.parametrize(
    ("pattern", "outs"),
    [
        ("runs/?/c-*", ["a-1", "a-20", "b-3"]),
        ("runs/[ab]/c-[0-9]", ["a-1", "b-3"]),
        ("runs/[!b]/c-[0-9]*", ["a-1", "a-2"]),
        ("runs/[]a]/c-*", ["a-1", "a-20"]),
        ("runs/**/c-*", ["a-1", "a-20", "b-3"]),
        ("./runs/*/c-*/", ["a-1", "a-20", "b-3"]),
        ("r*s/a/c-?", ["un-1"]),
    ],
)
def test_every_wildcard_is_captured_by_itself(pattern, outs, read):
    make("runs/a/c-1", "runs/a/c-20", "runs/b/c-3")

    jobs = read(f"jobs:\n- {{adapter: '{pattern}', out: '{{1}}-{{2}}'}}\n")

    assert [job.request.out for job in jobs] == outs


def test_two_stars_may_stand_for_no_directory_at_all(read):
    make("runs/c-1", "runs/a/b/c-2")

    jobs = read("jobs:\n- {adapter: runs/**/c-*, out: 'm/_{1}_{2}'}\n")

    assert shown(jobs) == [(("runs/a/b/c-2",), "m/_a/b_2"), (("runs/c-1",), "m/__1")]


def test_a_weight_stands_behind_a_wildcard_and_is_each_matchs(read):
    make("runs/a", "runs/b")

    jobs = read("jobs:\n- {adapter: 'runs/*:0.5', out: 'm/{1}-{adapter}'}\n")

    assert shown(jobs) == [(("runs/a:0.5",), "m/a-a"), (("runs/b:0.5",), "m/b-b")]


def test_wildcards_of_base_and_adapter_are_combined(read):
    make("models/x", "models/y", "runs/a", "runs/b")

    jobs = read("jobs:\n- {adapter: runs/*, base: models/*, out: '{base}/{1}'}\n")

    assert [(job.request.base, *job.request.adapter, job.request.out) for job in jobs] == [
        ("models/x", "runs/a", "x/a"), ("models/y", "runs/a", "y/a"), ("models/x", "runs/b", "x/b"), ("models/y", "runs/b", "y/b"),
    ]  # fmt: skip


def test_a_directory_whose_name_looks_like_a_wildcard_is_taken_for_what_it_is(read):
    make("run[1]", "run1")

    assert shown(read("jobs:\n- {adapter: 'run[1]', out: 'm/{adapter}'}\n")) == [(("run[1]",), "m/run[1]")]


def test_a_wildcard_may_begin_in_the_home_directory(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make("home/runs/a")

    assert shown(read("jobs:\n- {adapter: ~/runs/*, out: 'm/{1}'}\n")) == [
        ((str(tmp_path / "home" / "runs" / "a"),), "m/a")
    ]


def test_templates_know_adapter_parent_and_base(read):
    jobs = read(
        "jobs:\n"
        "- {adapter: runs/style/checkpoint-10:0.5, base: org/Base-8B@v1, name: '{base}!', out: 'm/{parent}-{adapter}'}\n"
        "- {adapter: [runs/a, 'org/b@main:2', c], out: 'm/{adapter}'}\n"
        "- {convert: runs/style, out: 'm/{parent}/{adapter}-converted'}\n"
    )

    assert [(job.name, job.request.out) for job in jobs] == [
        ("Base-8B!", "m/style-checkpoint-10"),
        ("m/a+b+c", "m/a+b+c"),
        ("m/runs/style-converted", "m/runs/style-converted"),
    ]


def test_a_table_of_weights_is_one_job_and_fills_templates_as_texts_do(read):
    one, other = read(
        "jobs:\n- {adapter: {runs/a: 0.5, b: 1}, out: '{parent}/{adapter}'}\n- {adapter: ['runs/a:0.5', b], out: x}\n"
    )

    assert one.request.adapter == ("runs/a:0.5", "b:1")
    assert (one.request.out, other.request.adapter) == ("runs/a+b", ("runs/a:0.5", "b"))


def test_a_matrix_is_a_job_for_each_combination(read):
    jobs = read(
        "defaults: {dtype: fp32}\n"
        "jobs:\n"
        "- matrix: {rank: [8, 16], for: [vllm, sglang]}\n"
        "  convert: a\n"
        "  out: '{adapter}-{rank}-{for}'\n"
        "- matrix: {dtype: [bf16, fp16], adapter: [x, [x, y]]}\n"
        "  out: '{adapter}.{dtype}'\n"
    )

    assert [job.request.out for job in jobs] == [
        "a-8-vllm", "a-8-sglang", "a-16-vllm", "a-16-sglang", "x.bf16", "x+y.bf16", "x.fp16", "x+y.fp16",
    ]  # fmt: skip
    assert [(job.request.rank, job.request.serving) for job in jobs[:4]] == [
        (8, "vllm"), (8, "sglang"), (16, "vllm"), (16, "sglang"),
    ]  # fmt: skip
    assert [job.request.adapter for job in jobs[4:]] == [("x",), ("x", "y")] * 2
    assert {job.request.dtype for job in jobs[4:]} == {"bfloat16", "float16"}


def test_a_matrix_may_have_words_of_its_own_which_also_stand_in_adapters(read):
    make("runs/a", "runs/b", "models/x")

    jobs = read(
        "jobs:\n- matrix: {strength: [0.5, 1.5], model: [x]}\n"
        "  adapter: ['runs/a:{strength}', runs/b]\n  base: 'models/{model}'\n  out: 'm/{strength}-{base}'\n"
        "- {matrix: {which: [a, b]}, adapter: 'runs/{which}*:0.5', out: 'n/{which}{1}'}\n"
    )

    assert shown(jobs) == [
        (("runs/a:0.5", "runs/b"), "m/0.5-x"),
        (("runs/a:1.5", "runs/b"), "m/1.5-x"),
        (("runs/a:0.5",), "n/a"),
        (("runs/b:0.5",), "n/b"),
    ]


def test_yaml_may_say_a_thing_once_and_refer_to_it(read):
    first, second = read("jobs:\n- &first {adapter: a, dtype: bf16, out: one}\n- {<<: *first, out: two}\n")

    assert first.request.dtype == second.request.dtype == "bfloat16"
    assert second.request.out == "two"


JOB = "jobs:\n- {adapter: a, out: o}\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("", 1, "", "contains nothing, expected a table of keys"),
        ("- adapter: a\n", 1, "", "contains a list, expected a table of keys"),
        ("jobs: [\n", 2, "", "is not valid YAML"),
        ("jobs:\n- {out: a\n  x: 1}\n", 3, "", "is not valid YAML (expected ',' or '}', but got ':')"),
        ("jobs: *secret\n", 1, "", "is not valid YAML (found undefined alias)"),
        ("jobs:\n\t- a\n", 2, "", "is not valid YAML"),
        ("defaults: {}\n", 1, "jobs", "is None"),
        ("defaults: {}\njobs:\n", 2, "jobs", "is None"),
        ("\njobs: []\n", 2, "jobs", "is []"),
        ("jobs: {adapter: a, out: o}\n", 1, "jobs", "is a table"),
        ("jobs:\n- {adapter: a, out: o}\n- [a]\n", 3, "jobs", "a job is a list, expected a table of keys"),
        ("jobs:\n- {adapter: a, out: o}\n- a\n", 3, "jobs", "a job is a text, expected a table of keys"),
        (f"{JOB}job: 5\n", 3, "job", "unknown key for a batch"),
        (f"defaults: base\n{JOB}", 1, "defaults", "is 'base', expected a table of keys"),
        (f"defaults: []\n{JOB}", 1, "defaults", "is [], expected a table of keys"),
        (f"defaults:\n  base: b\n  dtyp: bf16\n{JOB}", 3, "dtyp", "unknown key for defaults"),
        (f"defaults:\n  base: b\n  name: n\n{JOB}", 3, "name", "unknown key for defaults"),
        (f"defaults:\n  base: b\n  dtype: int4\n{JOB}", 3, "dtype", "'int4' is not a known dtype"),
        ("jobs:\n- adapter: a\n  outt: o\n", 3, "outt", "unknown key for a merge"),
        ("jobs:\n- adapter: a\n  1: o\n", 3, "1", "unknown key for a merge"),
        ("jobs:\n- adapter: a\n  rank: 4\n  out: o\n", 3, "rank", "unknown key for a merge"),
        ("jobs:\n- convert: a\n  combine: ties\n  out: o\n", 3, "combine", "unknown key for a conversion"),
        ("jobs:\n- convert: a\n  adapter: b\n  out: o\n", 3, "adapter", "unknown key for a conversion"),
        ("jobs:\n- convert: a\n  serving: vllm\n  out: o\n", 3, "serving", "unknown key for a conversion"),
        ("jobs:\n- adapter: a\n", 2, "out", "is missing"),
        ("jobs:\n- adapter: a\n  out: ''\n", 3, "out", "is missing"),
        ("jobs:\n- out: o\n", 2, "adapter", "is missing"),
        ("jobs:\n- adapter: a\n  out: 8\n", 3, "out", "is 8: input should be a valid string"),
        ("jobs:\n- adapter: a\n  out: {adapter}\n", 3, "out", "is a table: input should be a valid"),
        ("jobs:\n- out: o\n  adapter:\n", 3, "adapter", "is None"),
        ("jobs:\n- out: o\n  adapter: []\n", 3, "adapter", "names no adapter, expected at least one"),
        ("jobs:\n- out: o\n  adapter: {a: much}\n", 3, "adapter", "'a' has a string as its weight, expected a number"),
        ("jobs:\n- out: o\n  adapter: 'a:nan'\n", 3, "adapter", "'a:nan' has the weight nan, expected a number"),
        ("jobs:\n- out: o\n  adapter: [b, 'a:inf']\n", 3, "adapter", "'a:inf' has the weight inf"),
        ("jobs:\n- out: o\n  adapter: [b, 'runs/*']\n", 3, "adapter", "a list cannot contain wildcards"),
        ("jobs:\n- out: o\n  adapter: runs/*\n", 3, "adapter", "runs/* matches no directory"),
        ("jobs:\n- out: o\n  adapter: 'runs/*:nan'\n", 3, "adapter", "runs/*:nan matches no directory"),
        ("jobs:\n- out: o\n  adapter: 'runs/[z-a]'\n", 3, "adapter", "runs/[z-a] matches no directory"),
        ("jobs:\n- out: o\n  adapter: a\n  base: models/*\n", 4, "base", "models/* matches no directory"),
        ("jobs:\n- out: o\n  adapter: a\n  base: [b]\n", 4, "base", "is a list, expected a path"),
        ("jobs:\n- out: o\n  convert:\n", 3, "convert", "is None, expected one adapter"),
        ("jobs:\n- out: o\n  convert: [a, b]\n", 3, "convert", "is a list, expected one adapter"),
        ("jobs:\n- out: o\n  convert: runs/*\n", 3, "convert", "runs/* matches no directory"),
        ("jobs:\n- convert: a\n  for: vlm\n  out: o\n", 3, "for", "'vlm' is not a known engine, expected vllm"),
        ("jobs:\n- convert: a\n  rank: 0\n  out: o\n", 3, "rank", "0 is not a rank"),
        ("jobs:\n- adapter: a\n  workers: many\n  out: o\n", 3, "workers", "'many' is not a number of workers"),
        ("jobs:\n- adapter: a\n  strict: maybe\n  out: o\n", 3, "strict", "is 'maybe', expected true or false"),
        ("jobs:\n- adapter: a\n  out: 'm/{nam}'\n", 3, "out", "unknown field {nam} in 'm/{nam}'"),
        ("jobs:\n- adapter: a\n  out: 'm/{}'\n", 3, "out", "unknown field {} in"),
        ("jobs:\n- adapter: a\n  out: 'm/{1}'\n", 3, "out", "unknown field {1} in"),
        ("jobs:\n- adapter: a\n  out: 'm/{base}'\n", 3, "out", "unknown field {base} in"),
        ("jobs:\n- adapter: a\n  out: 'm/{parent}'\n", 3, "out", "unknown field {parent} in"),
        ("jobs:\n- adapter: a\n  name: '{nam}'\n  out: m\n", 3, "name", "unknown field {nam} in"),
        ("jobs:\n- adapter: a\n  matrix: {dtype: bf16}\n  out: m\n", 3, "matrix", "has no list for dtype, expected a table of key → list"),
        ("jobs:\n- adapter: a\n  matrix: {dtype: []}\n  out: m\n", 3, "matrix", "has no list for dtype, expected a table of key → list"),
        ("jobs:\n- adapter: a\n  matrix: [bf16]\n  out: m\n", 3, "matrix", "is a list, expected a table of key → list"),
        (f"{JOB}jobs: []\n", 3, "jobs", "is given twice; the first is on line 1"),
        (f"defaults:\n  base: a\n  base: b\n{JOB}", 3, "base", "is given twice; the first is on line 2"),
        ("jobs:\n- adapter: a\n  out: o\n  adapter: b\n", 4, "adapter", "is given twice; the first is on line 2"),
        (
            "jobs:\n- adapter: a\n  out: '{seed}'\n  matrix:\n    seed: [1]\n    seed: [2]\n",
            6, "seed", "is given twice; the first is on line 5",
        ),
        ("jobs:\n- {adapter: a, out: ~nobody-of-that-name/o}\n", 2, "out", "there is no user nobody-of-that-name"),
        ("jobs:\n- {adapter: ~nobody-of-that-name/*, out: o}\n", 2, "adapter", "there is no user nobody-of"),
        ('jobs:\n- {adapter: a, out: "o\\0"}\n', 2, "out", "holds a NUL character"),
        ('jobs:\n- {adapter: "a\\0", out: o}\n', 2, "adapter", "holds a NUL character"),
    ],
)  # fmt: skip
def test_a_fault_names_its_line_and_key(text, line, key, words, refused):
    error = refused(text)

    assert (error.line, error.key) == (line, key)
    assert words in str(error)
    assert str(error).startswith(f"batch.yaml:{line}: ")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (f"default: {{base: b}}\n{JOB}", "did you mean defaults?"),
        (f"defaults: {{bas: b}}\n{JOB}", "did you mean base?"),
        ("jobs:\n- {adaptor: a, out: o}\n", "did you mean adapter?"),
        ("jobs:\n- {convert: a, pad_ranks: 8, out: o}\n", "did you mean pad_rank?"),
        ("jobs:\n- {adapter: a, matrx: {dtype: [bf16]}, out: o}\n", "did you mean matrix?"),
        ("jobs:\n- {adapter: a}\n", "add out: PATH; {adapter}, {parent}, {base} and {1} are"),
        ("jobs:\n- {out: o}\n", "add adapter: PATH to merge one, or convert: PATH"),
        ("jobs: {}\n", "write a list, one entry for each job: - adapter: …"),
        ("jobs:\n- {adapter: runs/a, base: b, out: 'm/{bse}'}\n", "use one of {adapter}, {parent}, {base}"),
        ("jobs:\n- {adapter: a, out: 'm/{bse}'}\n", "use one of {adapter}"),
        ("jobs:\n- {adapter: a, out: o, matrix: {dtype: [bf16]}, name: '{dtpe}'}\n", "use one of {dtype}, {adapter}"),
    ],
)  # fmt: skip
def test_a_fault_says_what_may_have_been_meant(text, hint, refused):
    assert refused(text).hint.startswith(hint)


def two(first, second):
    """Return a batch of two jobs, on the lines 2 and 3."""
    return f"jobs:\n- {{{first}}}\n- {{{second}}}\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        (two("name: n, adapter: a, out: o", "name: n, adapter: a, out: p"), 3, "name",
         "two jobs are named n (the other is on line 2)"),
        (two("adapter: a, out: o", "adapter: b, out: o"), 3, "name", "two jobs are named o (the other is on line 2)"),
        (two("name: n, adapter: a, out: o", "adapter: b, out: ./o"), 3, "out", "./o overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: o", "adapter: b, out: p/../o"), 3, "out", "p/../o overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: link/o", "adapter: b, out: real/o"), 3, "out", "overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: o", "adapter: b, out: o/p/q"), 3, "out", "o/p/q overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: o/p/q", "adapter: b, out: o"), 3, "out", "o overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: o", "convert: b, out: o/p"), 3, "out", "o/p overlaps the output of n (line 2)"),
        (two("name: n, adapter: a, out: o", "adapter: [b, 'o:0.5'], out: p"), 3, "adapter", "o is the output of n (line 2)"),
        (two("name: n, adapter: o, out: p", "name: m, convert: a, out: o"), 2, "adapter", "o is the output of m (line 3)"),
        (two("name: n, convert: o/a, out: p", "name: m, adapter: a, out: o"), 2, "convert", "o/a is the output of m (line 3)"),
        (two("name: n, adapter: a, out: o", "adapter: b, base: o, out: p"), 3, "base", "o is the output of n (line 2)"),
        (two("name: n, adapter: a, out: link/o", "adapter: b, base: real/o, out: p"), 3, "base", "is the output of n (line 2)"),
        ("jobs:\n- {adapter: runs/*, out: o}\n", 2, "name", "two jobs are named o (the other is on line 2)"),
        ("jobs:\n- {name: n, adapter: a, out: a}\n", 2, "adapter", "a is the output of n (line 2)"),
    ],
)  # fmt: skip
def test_jobs_that_get_in_each_others_way_are_refused(text, line, key, words, refused):
    make("runs/a", "runs/b", "real")
    Path("link").symlink_to("real")

    error = refused(text)

    assert (error.line, error.key) == (line, key)
    assert words in str(error)


def test_outputs_side_by_side_are_apart(read):
    jobs = read(
        two("adapter: a, out: o/p", "adapter: a, out: o/pq")
        + "- {adapter: a, out: o/p.5}\n- {adapter: o, out: p}\n"
    )

    assert len(jobs) == 4


@pytest.mark.parametrize(
    "job", ["token: hf secret", "token: [hf_secret]", "token: {hf_secret: 1}", "token: sécret"]
)
@pytest.mark.parametrize("where", ["job", "defaults"])
def test_a_token_that_cannot_be_one_is_not_repeated(job, where, refused):
    text = (
        f"defaults: {{{job}}}\n{JOB}" if where == "defaults" else f"jobs:\n- {{adapter: a, out: o, {job}}}\n"
    )

    error = refused(text)

    assert (error.key, error.line) == ("token", 1 if where == "defaults" else 2)
    assert "cret" not in f"{error} {error.hint}"


@pytest.mark.parametrize(
    "text",
    [
        "jobs: {adapter: a, out: o, token: hf_secret}\n",
        "jobs:\n- [token, hf_secret]\n",
        f"defaults: [token, hf_secret]\n{JOB}",
        "jobs:\n- {adapter: a, out: o, matrix: {token: hf_secret}}\n",
        "jobs:\n- {adapter: a, out: o, tokn: hf_secret}\n",
        "jobs:\n- {convert: a, out: o, rank: 0, token: hf_secret}\n",
    ],
)
def test_a_token_in_the_wrong_place_is_not_repeated_either(text, refused):
    error = refused(text)

    assert "secret" not in f"{error} {error.hint}"


def test_a_file_that_is_no_text_says_so(tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_bytes(b"jobs: \xff")

    with pytest.raises(RequestError, match="cannot be read"):
        read_batch(str(path))


def test_an_alias_for_what_it_stands_in_is_an_error_and_another_is_none(refused, read):
    error = refused("jobs: &all\n- {adapter: a, out: o}\n- *all\n")

    assert error.line == 1
    assert "has an alias (*) for a table or list that contains the alias" in str(error)
    jobs = read(
        "defaults: &same {base: b}\njobs:\n- {adapter: a, out: o, <<: *same}\n- {<<: *same, adapter: a, out: p}\n"
    )
    assert [job.request.base for job in jobs] == ["b", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "jobs:\n- adapter: '{a}'\n  out: o\n  matrix:\n"
            + "".join(f"    {word}: [{', '.join(map(str, range(100)))}]\n" for word in "abcdef"),
            "expands to 100 × 100 × 100 × 100 × 100 × 100 jobs, expected at most 10000",
        ),
        (f"jobs:\n- adapter: {'a*' * 9}\n  out: o\n", "has 9 wildcards, expected at most 8"),
    ],
)
def test_an_entry_that_stands_for_too_many_jobs_is_refused_before_they_are_made(text, words, tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=words):
        read_batch(str(path))


@pytest.mark.slow
def test_thousands_of_jobs_are_told_apart_at_once(tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_text("jobs:\n" + "".join(f"- {{adapter: a, out: o/{n}}}\n" for n in range(5000)))
    began = time.process_time()
    assert len(read_batch(str(path))) == 5000
    assert time.process_time() - began < 60


def test_an_output_above_an_earlier_one_is_refused(tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_text("jobs:\n- {adapter: a, out: o/p/q}\n- {adapter: b, out: o}\n")
    with pytest.raises(RequestError, match="o overlaps the output of o/p/q"):
        read_batch(str(path))
