"""The command as a user meets it: outputs, options, exit codes, what is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from lora_merge.cli import exits
from tests.tampering import edit_json

COMMAND = [sys.executable, "-m", "lora_merge"]


def raw_tensors(root: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {
        name: tensor.view(-1).view(__import__("torch").uint8).numpy().tobytes()
        for file in sorted(root.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_merge_says_what_it_did_and_leaves_only_the_output(pico, pico_adapter, cli, tmp_path):
    result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    assert result.stdout == ""
    assert "merged 4 tensors, copied 17" in result.stderr
    assert "12 rows recomputed" in result.stderr
    assert leftovers(tmp_path) == ["out"]


def test_merge_spelled_out_is_the_same_command(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--out")

    assert cli(*arguments, tmp_path / "short").exit_code == exits.OK
    assert cli("merge", *arguments, tmp_path / "long").exit_code == exits.OK
    short, long = (tmp_path / name / "model.safetensors" for name in ("short", "long"))
    assert short.read_bytes() == long.read_bytes()


def test_the_base_may_be_left_to_the_adapter(pico, pico_adapter, cli, tmp_path):
    result = cli("--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr


def test_a_base_that_the_adapter_names_and_nobody_has_is_asked_for(
    pico, pico_adapter, tampered, cli, tmp_path
):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="some-org/some-model")

    result = cli("--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert "its base model is some-org/some-model" in result.stderr
    assert "--base DIRECTORY" in result.stderr


def test_the_same_merge_writes_the_same_bytes_with_any_number_of_workers(pico, pico_adapter, cli, tmp_path):
    for workers in (1, 3):
        arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--workers", workers)
        assert cli(*arguments, "--out", tmp_path / str(workers) / "out").exit_code == exits.OK

    one, three = tmp_path / "1" / "out", tmp_path / "3" / "out"
    assert leftovers(one) == leftovers(three)
    for name in leftovers(one):
        assert (one / name).read_bytes() == (three / name).read_bytes(), name


def test_side_files_are_copied_byte_for_byte(pico, pico_adapter, cli, tampered, tmp_path):
    base = tampered(pico(), "base")
    (base / "modeling_custom.py").write_text("raise SystemExit('never run')\n")
    (base / "preprocessor_config.json").write_text('{"size":  7}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "optimizer.pt").write_text("training state")
    (base / "pytorch_model.bin").write_text("the weights again")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("")

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    out = tmp_path / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "modeling_custom.py", "preprocessor_config.json", "additional_chat_templates/tools.jinja"):  # fmt: skip
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    for name in ("optimizer.pt", "pytorch_model.bin", ".git"):
        assert not (out / name).exists(), name
    assert "pytorch_model.bin was left out" in result.stderr


def test_a_tokenizer_in_the_adapter_wins_and_the_report_says_so(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    (adapter / "chat_template.jinja").write_text("{{ 'trained with this' }}")
    (adapter / "tokenizer.json").write_bytes((pico() / "tokenizer.json").read_bytes())

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--json")

    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'trained with this' }}"
    notes = [issue for issue in json.loads(result.stdout)["issues"] if issue["code"] == "side-file"]
    assert [issue["subject"] for issue in notes] == ["chat_template.jinja"]


def test_the_manifest_names_every_tensor_with_the_digest_of_its_bytes(pico, pico_adapter, cli, tmp_path):
    import xxhash

    adapter = pico_adapter(pico())
    cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    raw = raw_tensors(tmp_path / "out")
    assert manifest["tensors"].keys() == raw.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["digest"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw[name])}"
    actions = [entry["action"] for entry in manifest["tensors"].values()]
    assert (actions.count("merged"), actions.count("copied")) == (4, 17)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert manifest["adapters"][0]["digest"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(weights)}"


def test_the_model_card_has_front_matter_that_names_the_base(pico, pico_adapter, cli, tmp_path):
    cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == pico().name
    assert "rank 4, scale 1.5" in text


def test_a_dry_run_prints_the_plan_and_writes_nothing(pico, pico_adapter, cli, tmp_path):
    result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out", "--dry-run")

    assert result.exit_code == exits.OK
    for words in ("tensors merged", "peak memory", "disk needed", "disk free", "weight files"):
        assert words in result.stdout
    assert leftovers(tmp_path) == []


def test_json_is_one_document_on_stdout(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out", "--json")

    planned = json.loads(cli(*arguments, "--dry-run").stdout)
    merged = json.loads(cli(*arguments).stdout)
    refused = json.loads(cli(*arguments).stdout)

    assert planned["dry_run"]
    assert planned["summary"] == {
        **merged["summary"],
        "disk_free_bytes": planned["summary"]["disk_free_bytes"],
    }
    assert merged["ok"]
    assert merged["verdict"]["level"] == "sample"
    assert merged["verdict"]["issues"] == []
    assert (refused["ok"], refused["error"], refused["exit_code"]) == (False, "WriteError", exits.WRITE)


def test_a_wrong_command_line_is_json_too(cli):
    document = json.loads(cli("--adapter", "x", "--json").stdout)

    assert (document["error"], document["exit_code"]) == ("UsageError", exits.USAGE)
    assert "Missing option '--out'" in document["message"]


def test_quiet_says_nothing_and_verbose_names_tensors(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()))

    quiet = cli(*arguments, "--out", tmp_path / "a", "--quiet")
    verbose = cli(*arguments, "--out", tmp_path / "b", "--verbose")

    assert (quiet.exit_code, quiet.output) == (exits.OK, "")
    assert "model.layers.0.self_attn.q_proj.weight" in verbose.stderr
    assert "time: plan" in verbose.stderr


def test_an_existing_output_is_an_error_unless_overwritten(pico, pico_adapter, cli, tmp_path):
    out = tmp_path / "out"
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--out", out)
    assert cli(*arguments).exit_code == exits.OK
    (out / "mark").write_text("old")

    refused = cli(*arguments)
    assert refused.exit_code == exits.WRITE
    assert "already exists" in refused.stderr
    assert (out / "mark").exists()

    assert cli(*arguments, "--overwrite").exit_code == exits.OK
    assert not (out / "mark").exists()
    assert leftovers(tmp_path) == ["out"]


def test_a_failed_overwrite_leaves_the_old_output(pico, pico_adapter, tampered, cli, tmp_path):
    out = tmp_path / "out"
    base = tampered(pico(), "base")
    cli("--base", base, "--adapter", pico_adapter(pico()), "--out", out)
    before = raw_tensors(out)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", out, "--overwrite")

    assert result.exit_code == exits.RESOLVE
    assert raw_tensors(out) == before


def test_overwrite_leaves_alone_what_is_no_checkpoint(pico, pico_adapter, cli, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")

    result = cli(
        "--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "home", "--overwrite"
    )

    assert result.exit_code == exits.WRITE
    assert "is no model checkpoint" in result.stderr
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("which", ["base", "adapter", "parent"])
def test_an_output_never_takes_the_place_of_an_input(which, pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "in/base"), tampered(pico_adapter(pico()), "in/adapter")
    out = {"base": base, "adapter": adapter, "parent": tmp_path / "in"}[which]

    result = cli("--base", base, "--adapter", adapter, "--out", out, "--overwrite")

    assert result.exit_code == exits.WRITE
    assert "holds the input" in result.stderr
    assert (base / "model.safetensors").exists()
    assert (adapter / "adapter_model.safetensors").exists()


def test_an_empty_directory_may_become_the_output(pico, pico_adapter, cli, tmp_path):
    (tmp_path / "out").mkdir()

    assert cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out").exit_code == 0


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    pico, pico_adapter, cli, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_merge.pipeline._free_bytes", lambda out: 1000)

    result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.WRITE
    assert "GB are free on its disk" in result.stderr
    assert leftovers(tmp_path) == []


def test_values_that_overflow_the_output_dtype_fail_verification(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico(dtype="float16")))
    edit_json(adapter / "adapter_config.json", lora_alpha=1e9)

    result = cli("--base", pico(dtype="float16"), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.VERIFY
    assert "holds NaN or infinite values after the merge (F16)" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x"], "Missing option '--adapter'"),
        (["--adapter", "x"], "Missing option '--out'"),
        (["--adapter", "x", "--out", "y", "--dtype", "int3"], "'int3' is no dtype, expected one of"),
        (["--adapter", "x", "--out", "y", "--device", "tpu"], "'tpu' is no device"),
        (["--adapter", "x", "--out", "y", "--max-shard-size", "big"], "'big' is no size"),
        (["--adapter", "x", "--out", "y", "--workers", "0"], "'0' is no number of workers"),
        (["--adapter", "x", "--out", "y", "--verify", "full", "--no-verify"], "exclude each other"),
        (["--adapter", "x", "--out", "y", "--adaptor", "z"], "No such option"),
    ],
)
def test_a_wrong_command_line_is_usage(arguments, words, cli):
    result = cli(*arguments)

    assert result.exit_code == exits.USAGE
    assert words in result.stderr


def test_a_device_that_is_not_there_is_usage(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    result = cli(*arguments, "--device", "cuda:7")

    assert result.exit_code == exits.USAGE
    assert "there is no cuda:7" in result.stderr
    assert leftovers(tmp_path) == []


def test_names_cannot_steer_the_terminal(cli):
    result = cli("--adapter", "a\x1b[31m\x07", "--out", "y")

    assert result.exit_code == exits.RESOLVE
    assert "\x1b" not in result.stderr
    assert "\\x1b[31m" in result.stderr


def test_the_python_api_returns_a_typed_report_as_often_as_it_is_called(pico, pico_adapter, tmp_path):
    import lora_merge

    for name in ("one", "two"):
        report = lora_merge.merge(base=pico(), adapter=pico_adapter(pico()), out=tmp_path / name)
        assert isinstance(report, lora_merge.Report)
        assert report.summary.n_merged == 4
        assert report.verdict.ok
        plan = lora_merge.plan(base=pico(), adapter=pico_adapter(pico()))
        assert isinstance(plan, lora_merge.MergePlan)
        assert len(plan.steps) == 21


def test_the_python_api_leaves_the_number_of_torch_threads_as_it_was(pico, pico_adapter, tmp_path):
    import torch

    import lora_merge

    before = torch.get_num_threads()
    lora_merge.merge(base=pico(), adapter=pico_adapter(pico()), out=tmp_path / "out")
    assert torch.get_num_threads() == before


def test_the_output_loads_in_safetensors_with_the_metadata_that_transformers_wants(
    pico, pico_adapter, cli, tmp_path
):
    cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0, 0.01, 0.1, 0.3], ids=lambda delay: f"after {delay} s")
def test_an_interrupt_clears_staging_and_says_so(signum, delay, pico, pico_adapter, tmp_path):
    out = tmp_path / "out"
    arguments = ["--base", str(pico()), "--adapter", str(pico_adapter(pico())), "--out", str(out)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    staging = tmp_path / "out.lora-merge-staging"
    while not staging.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == exits.INTERRUPTED, errors
    assert "interrupted" in errors
    assert leftovers(tmp_path) == []


def test_a_killed_run_leaves_no_output_and_the_next_run_succeeds(pico, pico_adapter, tmp_path):
    """SIGKILL at moments spread over the whole run: before staging, while merging, around the rename."""
    arguments = ["--base", str(pico()), "--adapter", str(pico_adapter(pico())), "--out"]
    subprocess.run([*COMMAND, *arguments, tmp_path / "whole"], check=True, capture_output=True)
    whole = raw_tensors(tmp_path / "whole")
    out, staging = tmp_path / "out", tmp_path / "out.lora-merge-staging"
    killed = 0
    for seconds_into_staging in (None, 0, 0.01, 0.05, 0.2, 0.5, 1, 1.5, 2, 3):
        process = subprocess.Popen([*COMMAND, *arguments, out], stderr=subprocess.DEVNULL)
        if seconds_into_staging is not None:
            while not any(path.is_file() for path in staging.glob("*")) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(seconds_into_staging)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert raw_tensors(out) == whole
            shutil.rmtree(out)
        else:
            killed += 1
            assert set(leftovers(tmp_path)) <= {"whole", "out.lora-merge-staging"}

    assert killed >= 3
    subprocess.run([*COMMAND, *arguments, out], check=True, capture_output=True)
    assert raw_tensors(out) == whole
    assert leftovers(tmp_path) == ["out", "whole"]


def test_two_runs_to_one_output_do_not_mix(pico, pico_adapter, cli, tmp_path):
    from lora_merge.io.staging import staging

    with staging(tmp_path / "out"):
        result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.WRITE
    assert "another run is writing this output" in result.stderr
    assert leftovers(tmp_path) == ["out.lora-merge-staging"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "int4", "dtype: 'int4' is no dtype"),
        ("verify", "twice", "verify: 'twice' is no level"),
        ("workers", 0, "workers: 0 is no number of workers"),
        ("device", "tpu", "device: 'tpu' is no device"),
        ("max_shard_size", "huge", "max_shard_size: 'huge' is no size"),
    ],
)
def test_the_python_api_names_a_wrong_value(field, value, words, pico, pico_adapter, tmp_path):
    import lora_merge

    with pytest.raises(lora_merge.RequestError, match=words):
        lora_merge.merge(base=pico(), adapter=pico_adapter(pico()), out=tmp_path / "out", **{field: value})


def test_an_output_that_is_a_link_is_left_alone(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--overwrite", "--out")
    cli(*arguments, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    result = cli(*arguments, tmp_path / "link")

    assert result.exit_code == exits.WRITE
    assert (tmp_path / "link").is_symlink()
    assert leftovers(tmp_path) == ["link", "real"]
