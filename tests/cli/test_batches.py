"""Many merges from one file: what is made, what is kept, what is refused, and what one pass over a base writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lora_merge.cli import exits
from lora_merge.io.safetensors import RowReader
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json, edit_tensors


@pytest.fixture(scope="module")
def base(pico):
    return pico("llama", "float32")


@pytest.fixture
def batch(cli, tmp_path, monkeypatch):
    """Return a function: jobs, options → the exit code, the report and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(jobs, *options, **defaults):
        Path("batch.yaml").write_text(yaml.safe_dump({"defaults": defaults, "jobs": jobs}))
        result = cli("batch", "batch.yaml", "--json", *options)
        start = result.stdout.find("{")
        document = json.loads(result.stdout[start:]) if start >= 0 else {}
        return result.exit_code, document, result.stderr

    return run


def states(document):
    return {job["name"]: job["state"] for job in document["jobs"]}


def files(root):
    """Return the bytes and the time of change of every file."""
    return {
        path.relative_to(root): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_of_twenty_jobs_with_two_broken_ones_eighteen_have_outputs_and_nothing_is_redone(
    base, pico_adapter, batch, tmp_path
):
    for n in range(20):
        shutil.copytree(pico_adapter(base, r=2 + n % 3), tmp_path / "runs" / f"a{n}")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(tmp_path / "runs" / "a7" / "adapter_model.safetensors", lambda tensors: tensors.pop(name))
    (tmp_path / "runs" / "a13" / "adapter_config.json").write_text("{")
    jobs = [{"adapter": "runs/a*", "out": "merged/{1}"}]

    code, none, _ = batch(jobs, base=str(base))

    assert code == exits.BATCH
    assert set(states(none).values()) == {"failed", "not run"}
    assert not (tmp_path / "merged").exists()

    code, first, said = batch(jobs, "--keep-going", base=str(base))

    assert code == exits.BATCH
    failed = {job["name"]: job for job in first["jobs"] if job["state"] == "failed"}
    assert failed.keys() == {"merged/7", "merged/13"}
    assert "has lora_A and no lora_B" in failed["merged/7"]["message"]
    assert "is not valid JSON" in failed["merged/13"]["message"]
    assert list(states(first).values()).count("done") == 18
    assert "20 jobs: 18 done, 2 failed" in said
    assert len(list((tmp_path / "merged").iterdir())) == 18
    before = files(tmp_path / "merged")

    code, again, _ = batch(jobs, "--keep-going", base=str(base))

    assert code == exits.BATCH
    assert list(states(again).values()).count("kept") == 18
    assert files(tmp_path / "merged") == before

    for n in (7, 13):
        shutil.rmtree(tmp_path / "runs" / f"a{n}")
        shutil.copytree(pico_adapter(base, r=2 + n % 3), tmp_path / "runs" / f"a{n}")
    code, mended, _ = batch(jobs, base=str(base))

    assert code == 0
    assert {name for name, state in states(mended).items() if state == "done"} == {"merged/7", "merged/13"}


KINDS_TOGETHER = ("LoRA", "rsLoRA", "DoRA on a linear layer", "modules_to_save", "LoRA on an embedding", "LoHa", "trainable_token_indices", "AdaLoRA")  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pass_writes_what_separate_merges_write(dtype, cli, batch, tmp_path, tmp_path_factory):
    workshop = tmp_path_factory.getbasetemp() / "together"
    cases = [
        building.case(workshop, kind, "llama", dtype)
        for kind in KINDS
        if kind.name in KINDS_TOGETHER and dtype in kind.dtypes
    ]
    assert len(cases) >= 6
    options = ({}, {"dtype": "float16"}, {"max_shard_size": "50kB"}, {"verify": "full"})
    jobs = [
        {"adapter": str(case.adapter), "out": f"together/m{n}", **options[n % len(options)]}
        for n, case in enumerate(cases)
    ]

    code, document, said = batch(jobs, base=str(cases[0].base))

    assert code == 0, said
    assert set(states(document).values()) == {"done"}
    for n, job in enumerate(jobs):
        flags = [
            word
            for key, value in options[n % len(options)].items()
            for word in (f"--{key.replace('_', '-')}", value)
        ]
        alone = tmp_path / "alone" / f"m{n}"
        assert (
            cli("--base", cases[0].base, "--adapter", job["adapter"], "--out", alone, *flags).exit_code == 0
        )
        together = {name: content for name, (content, _) in files(tmp_path / job["out"]).items()}
        assert together == {name: content for name, (content, _) in files(alone).items()}, KINDS_TOGETHER[n]


def test_a_base_is_read_once_for_all_of_its_adapters(base, pico_adapter, batch, monkeypatch):
    read = []
    plain = RowReader.read_into
    monkeypatch.setattr(
        RowReader,
        "read_into",
        lambda self, buffer, start: (read.append(len(buffer)), plain(self, buffer, start)),
    )
    jobs = [
        {"adapter": str(pico_adapter(base, r=r)), "out": f"out/r{r}", "verify": "none"} for r in (2, 3, 5, 6)
    ]

    assert batch(jobs[:1], base=str(base))[0] == 0
    of_one = sum(read)
    read.clear()
    assert batch(jobs[1:], base=str(base))[0] == 0

    assert sum(read) == of_one > 0


def test_a_conversion_is_a_job_too_and_is_made_again_when_its_options_change(
    base, pico_adapter, batch, tmp_path
):
    job = {
        "convert": str(pico_adapter(base, r=32)),
        "for": "vllm",
        "rank": 16,
        "out": "adapters/{adapter}-16",
    }

    for wanted in ("done", "kept"):
        code, document, said = batch([job])
        assert code == 0, said
        assert list(states(document).values()) == [wanted]

    code, document, said = batch([{**job, "rank": 8}])
    assert code == exits.BATCH
    assert "already exists" in said
    code, document, _ = batch([{**job, "rank": 8}], "--overwrite")
    assert code == 0
    (out,) = (tmp_path / "adapters").iterdir()
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8


def test_an_output_is_made_again_when_its_adapter_is_newer_or_another(base, pico_adapter, batch, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(pico_adapter(base), adapter)
    jobs = [{"adapter": "adapter", "out": "out", "overwrite": True}]
    assert batch(jobs, base=str(base))[0] == 0
    assert states(batch(jobs, base=str(base))[1]) == {"out": "kept"}

    os.utime(adapter / "adapter_model.safetensors")
    assert states(batch(jobs, base=str(base))[1]) == {"out": "done"}
    assert states(batch(jobs, base=str(base))[1]) == {"out": "kept"}
    assert states(batch([{**jobs[0], "dtype": "bfloat16"}], base=str(base))[1]) == {"out": "done"}
    assert states(batch([{**jobs[0], "adapter": "adapter:0.5", "dtype": "bfloat16"}], base=str(base))[1]) == {
        "out": "done"
    }


def test_a_matrix_and_templates_name_every_cell(base, pico_adapter, batch, tmp_path):
    for name in ("style/checkpoint-9", "style/checkpoint-10", "facts/checkpoint-10"):
        shutil.copytree(pico_adapter(base), tmp_path / "runs" / name)
    jobs = [
        {"adapter": "runs/*/checkpoint-*", "out": "merged/{1}-{2}"},
        {
            "matrix": {"dtype": ["bfloat16", "float16"]},
            "adapter": "runs/style/checkpoint-9:0.5",
            "out": "half/{adapter}-{parent}-{dtype}",
        },
    ]

    code, document, said = batch(jobs, "--dry-run", base=str(base))

    assert code == 0, said
    assert [job["out"] for job in document["jobs"]] == [
        "merged/facts-10", "merged/style-9", "merged/style-10",
        "half/checkpoint-9-style-bfloat16", "half/checkpoint-9-style-float16",
    ]  # fmt: skip
    assert set(states(document).values()) == {"planned"}
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("job:\n- adapter: x\n", "batch.yaml:1: job: is no key of a batch"),
        ("jobs: []\n", "a batch is a list of jobs"),
        ("jobs:\n- adapter: x\n  outt: y\n", "batch.yaml:3: outt: is no key of such a job"),
        ("jobs:\n- adapter: x\n", "batch.yaml:2: out: is missing"),
        ("jobs:\n- out: x\n", "adapter: is missing"),
        ("jobs:\n- adapter: nothing/*\n  out: x\n", "batch.yaml:2: adapter: nothing/* matches no directory"),
        ("jobs:\n- adapter: x\n  out: m/{nam}\n", "has {nam}, which nothing fills"),
        ("jobs:\n- {adapter: x, out: m}\n- {adapter: y, out: m}\n", "batch.yaml:3: name: is m a second time"),
        ("jobs:\n- {name: a, adapter: x, out: m}\n- {name: b, adapter: y, out: m/n}\n", "m/n is the output of a"),
        ("jobs:\n- {adapter: x, out: m}\n- {adapter: y, base: m, out: n}\n", "jobs have no order"),
        ("jobs:\n- adapter: x\n  adapter: y\n  out: z\n", "batch.yaml:3: adapter: stands twice"),
        ("jobs:\n- {adapter: x, out: m, dtype: int4}\n", "batch.yaml:2: dtype: 'int4' is no dtype"),
        ("jobs:\n- {adapter: x, out: m, workers: many}\n", "workers: 'many' is no number of workers"),
        ("jobs:\n- {adapter: [a*, b], out: m}\n", "has a wildcard in a list"),
        ("jobs:\n- {convert: x, combine: ties, out: m}\n", "combine: is no key of such a job"),
        ("jobs:\n- matrix: {dtype: float32}\n  adapter: x\n  out: m\n", "expected a table of key"),
        ("jobs:\n- matrix: {dtpye: [float32]}\n  adapter: x\n  out: m\n", "has 'dtpye', which is no key of such a job"),
        ("jobs: [\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused_with_its_line(text, says, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("batch.yaml").write_text(text)

    result = cli("batch", "batch.yaml")

    assert result.exit_code == exits.USAGE, result.output
    assert says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["batch.yaml"]


def test_what_fails_while_it_is_verified_takes_no_other_down(
    base, pico_adapter, batch, tmp_path, monkeypatch
):
    from lora_merge.core.report import Verdict, error
    from lora_merge.pipeline import writing

    check = writing.check_output
    monkeypatch.setattr(
        writing,
        "check_output",
        lambda plan, root, records, level: (
            Verdict("sample", 1, 0, (error("planted", "x", "is wrong"),))
            if "bad" in str(root)
            else check(plan, root, records, level)
        ),
    )
    adapter = str(pico_adapter(base))
    jobs = [{"adapter": adapter, "out": f"out/{name}"} for name in ("one", "bad", "two")]

    code, document, _ = batch(jobs, "--keep-going", base=str(base))

    assert code == exits.BATCH
    assert states(document) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]


def test_an_adapter_that_breaks_while_it_is_read_takes_no_other_down(
    base, pico_adapter, batch, tmp_path, monkeypatch
):
    """Truncated once it is planned: the pass fails, and each is tried on its own."""
    from lora_merge import batch as batches

    shutil.copytree(pico_adapter(base), tmp_path / "broken")
    carry_out = batches.carry_out

    def breaking(group, watch):
        if (tmp_path / "broken" / "adapter_model.safetensors").stat().st_size > 2000:
            with (tmp_path / "broken" / "adapter_model.safetensors").open("r+b") as file:
                file.truncate(2000)
        return carry_out(group, watch)

    monkeypatch.setattr(batches, "carry_out", breaking)
    jobs = [
        {"adapter": str(pico_adapter(base)), "out": "out/good"},
        {"adapter": "broken", "out": "out/broken"},
    ]

    code, document, _ = batch(jobs, "--keep-going", base=str(base))

    assert code == exits.BATCH
    assert states(document) == {"out/good": "done", "out/broken": "failed"}
    assert (tmp_path / "out" / "good" / "model.safetensors").is_file()


def test_the_log_has_a_line_of_json_for_each_thing_that_happens(base, pico_adapter, batch, tmp_path):
    jobs = [
        {"adapter": str(pico_adapter(base)), "out": "out/a", "token": "hf_secret"},
        {"adapter": "nothing", "out": "out/b"},
    ]

    code, document, said = batch(jobs, "--keep-going", "--log-file", "batch.jsonl", base=str(base))

    assert code == exits.BATCH
    lines = [json.loads(line) for line in Path("batch.jsonl").read_text().splitlines()]
    assert all({"time", "event"} <= line.keys() for line in lines)
    assert [line["state"] for line in lines if line["event"] == "job" and line["name"] == "out/a"] == [
        "planned",
        "running",
        "done",
    ]
    assert lines[-1]["event"] == "end"
    assert lines[-1]["ok"] is False
    assert "hf_secret" not in Path("batch.jsonl").read_text() + json.dumps(document) + said


def test_processes_write_the_same_bytes(pico, pico_adapter, batch, tmp_path):
    bases = [pico("llama", "float32"), pico("qwen2", "float32")]
    jobs = [
        {"adapter": str(pico_adapter(base)), "base": str(base), "out": f"{{place}}/{n}"}
        for n, base in enumerate(bases)
    ]

    for place, options in (("serial", ()), ("parallel", ("--jobs", 2))):
        code, document, said = batch(
            [{**job, "out": job["out"].format(place=place)} for job in jobs], *options
        )
        assert code == 0, said
        assert set(states(document).values()) == {"done"}

    serial, parallel = (
        {name: content for name, (content, _) in files(tmp_path / place).items()}
        for place in ("serial", "parallel")
    )
    assert serial == parallel


def test_after_sigterm_a_second_run_does_the_rest(pico, pico_adapter, tmp_path):
    """The signal comes when the first base is done; what is there then is not made again."""
    bases = [pico("llama", "float32"), pico("qwen2", "float32"), pico("llama_tied", "float32")]
    jobs = [
        {"adapter": str(pico_adapter(base)), "base": str(base), "out": f"out/{n}"}
        for n, base in enumerate(bases)
    ]
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    command = [sys.executable, "-m", "lora_merge", "batch", "batch.yaml", "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("out/1*")) and time.monotonic() < until:
            time.sleep(0.002)
        run.send_signal(signal.SIGTERM)
        stdout, stderr = run.communicate(timeout=60)

    if run.returncode != exits.INTERRUPTED:  # it was done before the signal reached it
        pytest.skip("the machine was too quick for the signal")
    assert "interrupted" in stderr
    first = states(
        json.loads(
            stdout[stdout.index("{") : stdout.rindex("}") + 1].split('\n{\n  "ok": false,\n  "error"')[0]
        )
    )
    assert first["out/0"] == "done"
    assert set(first.values()) == {"done", "not run"}
    before = files(tmp_path / "out" / "0")

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert again.returncode == 0, again.stderr
    assert states(json.loads(again.stdout))["out/0"] == "kept"
    assert files(tmp_path / "out" / "0") == before
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_base_with_too_little_room_for_all_is_said_so(base, pico_adapter, batch, monkeypatch):
    from lora_merge.core.plan import MergePlan

    room = MergePlan.disk_bytes
    sizes = []
    monkeypatch.setattr(MergePlan, "disk_bytes", lambda self: sizes.append(1) or room(self) + 10**15 // 4)
    jobs = [{"adapter": str(pico_adapter(base)), "out": f"out/{n}"} for n in range(2)]

    code, document, said = batch(jobs, base=str(base))

    assert code == exits.BATCH
    assert "are free" in said
    assert "done" not in states(document).values()


def test_an_adapter_of_one_job_may_be_edited_between_runs(base, pico_adapter, batch, tmp_path):
    shutil.copytree(pico_adapter(base), tmp_path / "adapter")
    jobs = [{"adapter": "adapter", "out": "out"}]
    assert batch(jobs, base=str(base))[0] == 0
    edit_json(tmp_path / "adapter" / "adapter_config.json", lora_alpha=12)

    code, _, said = batch(jobs, base=str(base))

    assert code == exits.BATCH
    assert "already exists" in said
