"""The command as a user meets it: outputs, options, exit codes, what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml
from safetensors import safe_open

from lora_merge.cli import exits
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json

if TYPE_CHECKING:
    from pathlib import Path

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
    assert "rows by projection, " in result.stderr
    assert leftovers(tmp_path) == ["out"]


def test_a_merge_without_projections_does_not_speak_of_them(pico, pico_adapter, cli, tmp_path):
    base, out = pico("llama", hidden_size=256, intermediate_size=256), tmp_path / "out"

    result = cli("--base", base, "--adapter", pico_adapter(base), "--out", out, "--quantize", "fp8")

    assert result.exit_code == exits.OK, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("verified")]
    assert re.fullmatch(r"verified \d+ tensors: [1-9]\d* rows recomputed", line)


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

    result = cli("--adapter", adapter, "--out", tmp_path / "out", "--offline")

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


def test_the_bases_weights_for_other_programs_are_not_passed_off_as_merged(
    pico, pico_adapter, cli, tampered, tmp_path
):
    base = tampered(pico(), "base")
    foreign = (
        "openvino_model.bin", "openvino_model.xml", "ggml-model-q4_0.bin", "model.onnx.data", "llm.mnn", "model.pte",
        "llm.mnn.weight", "model.tflite", "model.task", "model.ckpt", "model.engine", "exported/openvino_model.bin",
        "Model.mlpackage/weights.bin",
    )  # fmt: skip
    kept = ("speakers.pt", "2_Dense/pytorch_model.bin", "assets/openvino.txt")
    for name in (*foreign, *kept):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("binary")

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    assert [name for name in foreign if (tmp_path / "out" / name).exists()] == []
    assert [name for name in kept if not (tmp_path / "out" / name).exists()] == []
    for name in ("openvino_model.bin", "exported/openvino_model.bin"):
        assert f"{name} was left out" in result.stderr


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
    for words in ("4 tensors", "peak memory", " needed, ", " free", "1 weight file", "written", " worker"):
        assert words in result.stdout
    assert "merge it:\n  lora-merge --base " in result.stderr
    assert "--dry-run" not in result.stderr
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
    assert "missing option `--out`" in document["message"]


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

    resumed = cli(*arguments, "--resume")
    assert resumed.exit_code == exits.OK
    assert "is complete, and was made from the same base, adapters and options" in resumed.stderr
    assert "wrote" not in resumed.stderr
    assert json.loads(cli(*arguments, "--resume", "--json").stdout)["was_complete"] is True

    other = cli(*arguments, "--resume", "--dtype", "float32")
    assert other.exit_code == exits.WRITE
    assert "this run may make something else: it was made with other options (dtype)" in other.stderr
    assert f"`lora-merge verify {out}` checks what is there" in other.stderr
    assert (out / "mark").exists()

    assert cli(*arguments, "--overwrite").exit_code == exits.OK
    assert not (out / "mark").exists()
    assert leftovers(tmp_path) == ["out"]


def test_an_output_is_not_called_complete_when_its_base_has_changed_or_a_file_is_lost(
    pico, pico_adapter, tampered, cli, tmp_path
):
    out, base = tmp_path / "out", tampered(pico("llama", "float16", "60KB"), "base")
    shard = min(base.glob("*.safetensors"))
    arguments = ("--base", base, "--adapter", pico_adapter(base), "--out", out, "--resume")
    assert cli(*arguments).exit_code == exits.OK
    assert cli(*arguments).exit_code == exits.OK
    now, content = shard.stat(), shard.read_bytes()

    os.utime(shard)
    newer = cli(*arguments)
    # Other values, with the old time.
    start = 8 + int.from_bytes(content[:8], "little")
    shard.write_bytes(content[:start] + bytes(len(content) - start))
    os.utime(shard, ns=(now.st_atime_ns, now.st_mtime_ns))
    changed = cli(*arguments)
    shard.write_bytes(content)
    os.utime(shard, ns=(now.st_atime_ns, now.st_mtime_ns))
    same = cli(*arguments)
    (out / shard.name).unlink()
    lost = cli(*arguments)

    assert same.exit_code == exits.OK
    for result, why in (
        (newer, f"{shard}, of the base, is newer than the output"),
        (changed, f"in {shard} differs from what was merged"),
        (lost, f"{shard.name} is missing"),
    ):
        assert result.exit_code == exits.WRITE
        assert why in result.stderr


def test_an_alpha_that_is_null_says_which_file_to_mend(pico, pico_adapter, cli, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(pico_adapter(pico()), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": None}))

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "lora_alpha: is null, expected a number" in result.stderr
    assert "hint: set lora_alpha in adapter_config.json to the value of the training" in result.stderr


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
    assert "already exists and is not a model checkpoint" in result.stderr
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("which", ["base", "adapter", "parent"])
def test_an_output_never_takes_the_place_of_an_input(which, pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "in/base"), tampered(pico_adapter(pico()), "in/adapter")
    out = {"base": base, "adapter": adapter, "parent": tmp_path / "in"}[which]

    result = cli("--base", base, "--adapter", adapter, "--out", out, "--overwrite")

    assert result.exit_code == exits.WRITE
    assert "contains the input" in result.stderr
    assert (base / "model.safetensors").exists()
    assert (adapter / "adapter_model.safetensors").exists()


def test_an_empty_directory_may_become_the_output(pico, pico_adapter, cli, tmp_path):
    (tmp_path / "out").mkdir()

    assert cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out").exit_code == 0


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    pico, pico_adapter, cli, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_merge.storage.local_output.LocalDestination.free_bytes", lambda out: 1000)

    result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.WRITE
    assert "but its disk has only 1.0 kB free" in result.stderr
    assert leftovers(tmp_path) == []


def test_values_that_overflow_the_output_dtype_fail_verification(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico(dtype="float16")))
    edit_json(adapter / "adapter_config.json", lora_alpha=1e9)

    result = cli("--base", pico(dtype="float16"), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.VERIFY
    assert "holds NaN or infinite values after the merge (F16)" in result.stderr
    assert "but the largest number of F16 is 6.55e+04" in result.stderr
    assert result.stderr.count("pass --dtype float32 or bfloat16") == 1
    assert result.stderr.endswith("hint: no output was created\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_a_change_whose_square_only_is_too_large_is_merged(
    pico, pico_adapter, tampered, cli, tmp_path, rounding
):
    base = pico(dtype="bfloat16")
    adapter, out = tampered(pico_adapter(base)), tmp_path / "out"
    edit_json(adapter / "adapter_config.json", lora_alpha=1e37)

    result = cli("--base", base, "--adapter", adapter, "--out", out, "--rounding", rounding)

    assert result.exit_code == exits.OK, result.stderr
    assert "nan" not in result.stderr + result.stdout


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_a_change_beyond_bfloat16_fails_verification_and_another_run_is_not_advised(
    pico, pico_adapter, tampered, cli, tmp_path, rounding
):
    base = pico(dtype="bfloat16")
    from safetensors.torch import load_file, save_file

    adapter, out = tampered(pico_adapter(base)), tmp_path / "out"
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: 1e22 * factor for name, factor in factors.items()}, adapter / "adapter_model.safetensors"
    )

    result = cli("--base", base, "--adapter", adapter, "--out", out, "--rounding", rounding, "--allow-loss")

    assert result.exit_code == exits.VERIFY
    assert "but the largest number of BF16 is 3.39e+38" in result.stderr
    assert "check the values of the adapter's factors" in result.stderr
    assert result.stderr.endswith("hint: no output was created\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x"], "missing option `--adapter`"),
        (["--adapter", "x"], "missing option `--out`"),
        (["--adapter", "x", "--out", "y", "--dtype", "int3"], "'int3' is not a known dtype, expected one of"),
        (["--adapter", "x", "--out", "y", "--device", "tpu"], "'tpu' is not a known device"),
        (["--adapter", "x", "--out", "y", "--max-shard-size", "big"], "'big' is not a size"),
        (["--adapter", "x", "--out", "y", "--workers", "0"], "'0' is not a number of workers"),
        (["--adapter", "x:nan", "--out", "y"], "'x:nan' has the weight nan, expected a number"),
        (["--adapter", "x:-inf", "--out", "y"], "'x:-inf' has the weight -inf, expected a number"),
        (["--adapter", "", "--out", "y"], "'' is not an adapter; expected a directory"),
        (
            ["--adapter", "x", "--out", "y", "--combine", "slerp"],
            "'slerp' is not a known way to combine, expected linear",
        ),
        (
            ["--adapter", "x", "--out", "y", "--density", "0"],
            "'0' is not a density, expected a number above 0",
        ),
        (["--adapter", "x", "--out", "y", "--density", "1.01"], "'1.01' is not a density"),
        (["--adapter", "x", "--out", "y", "--density", "half"], "'half' is not a density"),
        (["--adapter", "x", "--out", "y", "--density", "nan"], "'nan' is not a density"),
        (["--adapter", "x", "--out", "y", "--seed", "-1"], "'-1' is not a seed, expected a whole number"),
        (["--adapter", "x", "--out", "y", "--seed", "0.5"], "'0.5' is not a seed"),
        (["--adapter", "x", "--out", "y", "--seed", "2147483648"], "'2147483648' is not a seed"),
        (
            ["--adapter", "x", "--out", "y", "--base-is", "new"],
            "'new' is not a known kind of base, expected original",
        ),
        (["--adapter", "x", "--out", "y", "--verify", "full", "--no-verify"], "exclude each other"),
        (
            ["--adapter", "x", "--out", "y", "--adaptor", "z"],
            "no option `--adaptor`; did you mean `--adapter`?",
        ),
    ],
)
def test_a_wrong_command_line_is_usage(arguments, words, cli):
    result = cli(*arguments)

    assert result.exit_code == exits.USAGE
    assert words in result.stderr


def test_without_a_gpu_the_cpu_merges_and_says_so(pico, pico_adapter, cli, tmp_path):
    arguments = ("--base", pico(), "--adapter", pico_adapter(pico()), "--device", "cuda")

    strict = cli(*arguments, "--out", tmp_path / "strict", "--strict")
    assert strict.exit_code == exits.PLAN
    assert "finds no CUDA device" in strict.stderr
    assert leftovers(tmp_path) == []

    result = cli(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0
    first, hint, *others = result.stderr.splitlines()
    assert first.startswith("warning: device: torch")
    assert first.endswith("finds no CUDA device, so the merge runs on the CPU")
    assert hint.startswith("hint: install a torch built for CUDA")
    assert not [line for line in others if "CUDA" in line]
    assert cli(*arguments[:4], "--out", tmp_path / "cpu").exit_code == 0
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "cpu"))
    assert one.read_bytes() == other.read_bytes()


def test_a_gpu_that_is_not_among_those_there_is_usage(pico, pico_adapter, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
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


def test_the_python_api_leaves_the_number_of_torch_threads_as_it_was(
    pico, pico_adapter, three_threads, tmp_path
):
    import torch

    import lora_merge

    lora_merge.merge(base=pico(), adapter=pico_adapter(pico()), out=tmp_path / "out")
    assert torch.get_num_threads() == three_threads


def test_the_output_loads_in_safetensors_with_the_metadata_that_transformers_wants(
    pico, pico_adapter, cli, tmp_path
):
    cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.fixture
def two(pico, pico_adapter):
    """A base, and two adapters for it that share the q_proj."""
    base = pico("llama", "float16")
    return (
        base,
        pico_adapter(base),
        pico_adapter(base, r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"]),
    )


def test_json_tells_what_became_of_every_delta(two, cli, tmp_path):
    base, one, other = two
    arguments = (
        "--base",
        base,
        "--adapter",
        f"{one}:0.5",
        "--adapter",
        f"{other}:-2",
        "--out",
        tmp_path / "out",
    )

    report = json.loads(cli(*arguments, "--json").stdout)

    assert report.keys() == {
        "ok", "base", "adapters", "out", "dry_run", "summary", "issues", "verdict", "survival", "seconds",
        "busy_seconds", "foreseen", "headline", "part", "was_complete", "store_copied_bytes", "pushed",
        "workers",
    }  # fmt: skip
    assert report["headline"] == "Llama 68k, fp16 + 0.5 × LoRA r4 + -2 × LoRA r2 on 6 modules → dense fp16"
    assert report["foreseen"] == {}
    assert report["adapters"] == [f"{one}:0.5", f"{other}:-2"]
    summary = report["summary"]
    assert (summary["n_merged"], summary["n_replaced"], summary["replaced_bytes"]) == (6, 0, 0)
    assert summary["kinds"] == {"low_rank": 8}
    assert summary["ranks"] == {"2": 4, "4": 4}
    assert summary["scales"] == {"-4": 4, "0.75": 4}
    merged = {
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    }
    assert summary["module_ranks"].keys() == report["survival"].keys() == merged
    assert {summary["module_ranks"][f"model.layers.0.{name}.weight"] for name in ("mlp.down_proj",)} == {4}
    for survival in report["survival"].values():
        assert survival.keys() == {
            "weight_norm", "delta_norm", "error_norm", "unchanged", "kept", "saturated", "effect_norm", "effect_error",
        }  # fmt: skip
        assert survival["weight_norm"] > 0 < survival["delta_norm"]
        assert survival["kept"] == pytest.approx(1, abs=0.05)
        # To the nearest of a plain dtype: the effect is not looked at.
        assert survival["effect_norm"] == survival["effect_error"] == -1


def stored_tensors(root):
    from safetensors.torch import load_file

    return {name: tensor for file in root.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_manifest_tells_how_much_of_each_adapter_was_wanted_and_what_was_kept(two, cli, tmp_path):
    base, one, other = two
    adapters = ("--adapter", f"{one}:0.5", "--adapter", other)

    assert cli("--base", base, *adapters, "--out", tmp_path / "out").exit_code == exits.OK

    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert [entry["weight"] for entry in manifest["adapters"]] == [0.5, 1.0]
    assert [entry["path"] for entry in manifest["adapters"]] == [str(one), str(other)]
    assert [entry["config"]["r"] for entry in manifest["adapters"]] == [4, 2]
    before, after = stored_tensors(base), stored_tensors(tmp_path / "out")
    factors = [stored_tensors(adapter) for adapter in (one, other)]
    n_deltas = 0
    for name, entry in manifest["tensors"].items():
        if entry["action"] != "merged":
            assert "delta" not in entry
            continue
        n_deltas += 1
        weight, delta = before[name].double(), 0.0
        for scale, tensors in zip((0.5 * 6 / 4, 4 / 2), factors, strict=True):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in tensors:
                b, a = (tensors[f"{prefix}.lora_{role}.weight"].double() for role in "BA")
                delta = delta + scale * b @ a
        stored = after[name].double() - weight
        # all of these tensors are small enough to be looked at as a whole; float32 keeps seven digits
        assert entry["delta"]["relative_norm"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        assert entry["delta"]["lost_share"] == pytest.approx(
            float((stored - delta).norm() / delta.norm()), rel=1e-2, abs=1e-6
        )
        assert entry["delta"]["unchanged_share"] == pytest.approx(
            float((stored == 0).double().mean()), abs=1e-6
        )
    assert n_deltas == 6


def test_the_model_card_names_every_adapter_and_how_much_of_it(two, cli, tmp_path):
    base, one, other = two

    cli("--base", base, "--adapter", f"{one}:0.5", "--adapter", other, "--out", tmp_path / "out")

    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == base.name
    assert f"with the adapters **{one.name}** × 0.5, **{other.name}** merged into them" in text
    for adapter in (one, other):
        assert f"| adapter | `{adapter}` |" in text
    assert text.count("| adapter digest | `xxh3_128:") == 2
    assert "| kind | LORA, rank 2, 4, scale 2, 0.75 |" in text


@pytest.fixture
def with_a_head(workshop):
    """A base and an adapter that was trained with its output embedding."""
    kind = next(kind for kind in KINDS if kind.name == "modules_to_save")
    case = building.case(workshop, kind, "llama", "bfloat16")
    return case.base, case.adapter


def test_a_parameter_that_the_adapter_brings_whole_is_called_replaced(with_a_head, cli, tmp_path):
    base, adapter = with_a_head

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")

    summary = json.loads(result.stdout)["summary"]
    assert (summary["n_merged"], summary["n_replaced"], summary["n_copied"]) == (6, 1, 14)
    assert summary["replaced_bytes"] == 96 * 64 * 2
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    replaced = [name for name, entry in manifest["tensors"].items() if entry["action"] == "replaced"]
    assert replaced == ["lm_head.weight"]
    head = stored_tensors(adapter)["base_model.model.lm_head.weight"]
    assert stored_tensors(tmp_path / "out")["lm_head.weight"].equal(head.bfloat16())
    assert not stored_tensors(base)["lm_head.weight"].equal(head.bfloat16())


def test_the_report_counts_what_was_replaced(with_a_head, cli, tmp_path):
    base, adapter = with_a_head
    arguments = ("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    planned, merged = cli(*arguments, "--dry-run"), cli(*arguments)

    assert re.search(r"^  replaced +1 tensor +12\.3 kB$", planned.stdout, re.MULTILINE), planned.stdout
    assert "merged 6 tensors, copied 14, replaced 1" in merged.stderr


def test_an_adapter_may_lie_in_the_directory_of_its_base(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(pico_adapter(pico()) / name, base)

    result = cli("--base", base, "--adapter", base, "--out", tmp_path / "out", "--json")

    summary = json.loads(result.stdout)["summary"]
    assert (summary["n_merged"], summary["n_replaced"], summary["n_copied"]) == (4, 0, 17)


def test_a_directory_whose_name_ends_like_a_weight_is_taken_for_what_it_is(
    pico, pico_adapter, tampered, cli, tmp_path
):
    adapter = tampered(pico_adapter(pico()), "checkpoint:500")

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--json")

    assert result.exit_code == exits.OK, result.stderr
    assert "rank 4, scale 1.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_a_combination_is_in_the_manifest_and_a_seed_makes_it_again(method, two, cli, tmp_path):
    base, one, other = two
    outputs = {}
    for name, seed, workers in [("one", 1, 1), ("again", 1, 3), ("other", 2, 1)]:
        result = cli(
            "--base", base, "--adapter", one, "--adapter", other, "--combine", method, "--density", "0.4",
            "--seed", seed, "--workers", workers, "--verify", "full", "--out", tmp_path / name / "out",
        )  # fmt: skip
        assert result.exit_code == exits.OK, result.stderr
        outputs[name] = raw_tensors(tmp_path / name / "out")
    options = json.loads((tmp_path / "one" / "out" / "merge_manifest.json").read_text())["options"]
    assert (options["combine"], options["density"], options["seed"]) == (method, 0.4, 1)
    assert outputs["again"] == outputs["one"]
    assert (outputs["other"] == outputs["one"]) == (method == "ties")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()}
        for name in ("one", "again")
    ]
    assert files[0] == files[1]


def test_svd_keeps_the_rank_of_the_largest_adapter(pico, pico_adapter, cli, tmp_path):
    import torch

    base = pico("llama", "float32")
    one = pico_adapter(base)
    other = pico_adapter(base, r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"])

    result = cli(
        "--base", base, "--adapter", one, "--adapter", other, "--combine", "svd", "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.OK, result.stderr
    before, after = stored_tensors(base), stored_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    values = torch.linalg.svdvals(after[name].double() - before[name].double())
    # rounding to float32 adds a matrix whose norm is at most 2⁻²⁴·‖W‖_F
    assert values[4] <= 2.0**-24 * float(after[name].double().norm()) * 4
    assert values[3] > 0.1


def test_the_order_of_adapters_is_the_order_of_their_side_files(two, tampered, cli, tmp_path):
    base, *made = two
    adapters = [tampered(adapter, name) for adapter, name in zip(made, ("one", "other"), strict=True)]
    for adapter in adapters:
        (adapter / "chat_template.jinja").write_text(adapter.name)

    result = cli(
        "--base", base, "--adapter", adapters[1], "--adapter", adapters[0], "--out", tmp_path / "out"
    )

    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "one"
    assert (
        "chat_template.jinja: several adapters have this file; the output gets the last adapter's copy"
        in result.stderr
    )


def test_the_python_api_takes_one_adapter_or_several(two, tmp_path):
    import lora_merge

    base, one, other = two
    alone = lora_merge.merge(base=base, adapter=one, out=tmp_path / "alone")
    weighted = lora_merge.merge(
        base=base, adapter=[one, f"{other}:0.5"], out=tmp_path / "both", combine="ties"
    )
    plan = lora_merge.plan(base=base, adapter=(f"{one}:2", other))

    assert alone.adapters == (str(one),)
    assert weighted.adapters == (str(one), f"{other}:0.5")
    assert weighted.summary.kinds == {"low_rank": 8}
    assert plan.weights == (2.0, 1.0)
    assert plan.adapters == (str(one), str(other))


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.system)])
@pytest.mark.parametrize(
    "delay",
    [0.1, *(pytest.param(delay, marks=pytest.mark.system) for delay in (0, 0.01, 0.3))],
    ids=lambda delay: f"after {delay} s",
)
def test_an_interrupt_says_so_and_what_is_written_can_be_resumed(signum, delay, pico, pico_adapter, tmp_path):
    out = tmp_path / "out"
    # Torch takes a while to load. Without it the merge would be over.
    adapter = pico_adapter(pico(), use_dora=True)
    arguments = ["--base", str(pico()), "--adapter", str(adapter), "--out", str(out)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    staging = tmp_path / "out.lora-merge-staging"
    while not staging.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == exits.INTERRUPTED, errors
    assert "interrupted; no output was created" in errors
    assert leftovers(tmp_path) == (["out.lora-merge-staging"] if "run again with --resume" in errors else [])
    subprocess.run([*COMMAND, *arguments, "--resume"], check=True, capture_output=True)
    assert leftovers(tmp_path) == ["out"]


IMPORTS = """
import os, signal, sys, threading

class Finder:
    def find_spec(self, name, path=None, target=None):
        thread = threading.current_thread().name
        if thread == "MainThread" and any(each.name == "torch" for each in threading.enumerate()):
            os.write(2, f"imported beside torch: {name}\\n".encode())
        if thread == "torch" and name == when:
            os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    when = sys.argv.pop(1)
    sys.meta_path.insert(0, Finder())
    from lora_merge.cli import entry
    entry()
"""
"""Runs the command, writes down what its main thread imports while torch is imported, and may interrupt it then."""


@pytest.mark.parametrize(
    ("when", "options"),
    [
        ("never", ()),
        ("torch", ()),
        ("torch._C", ()),
        ("torch.functional", ("--executor", "serial")),
        ("torch.functional", ("--executor", "processes", "--workers", "2")),
    ],
)
def test_while_torch_is_imported_the_main_thread_imports_nothing(when, options, pico, pico_adapter, tmp_path):
    """An interrupt that hits an import of its own may be swallowed, and leave the lock held that torch's import needs."""
    adapter = pico_adapter(pico(), use_dora=True)
    arguments = ["--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", *options]
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, when, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert run.returncode == (exits.OK if when == "never" else exits.INTERRUPTED), run.stderr
    assert "imported beside torch" not in run.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("fields", "least"), [({}, 1), ({"use_dora": True}, 3)], ids=["without torch", "torch"]
)
def test_a_killed_run_leaves_no_output_and_the_next_run_succeeds(fields, least, pico, pico_adapter, tmp_path):
    """SIGKILL at moments spread over the whole run: before staging, while merging, around the rename."""
    arguments = ["--base", str(pico()), "--adapter", str(pico_adapter(pico(), **fields)), "--out"]
    subprocess.run([*COMMAND, *arguments, tmp_path / "whole"], check=True, capture_output=True)
    whole = raw_tensors(tmp_path / "whole")
    out, staging = tmp_path / "out", tmp_path / "out.lora-merge-staging"
    killed = 0
    for seconds_into_staging in (None, 0, 0.01, 0.05, 0.2, 0.5, 1, 1.5, 2, 3):
        process = subprocess.Popen([*COMMAND, *arguments, out], stderr=subprocess.DEVNULL)
        if seconds_into_staging is not None:
            while not any(path.is_file() for path in staging.glob("*/*")) and process.poll() is None:
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

    assert killed >= least
    subprocess.run([*COMMAND, *arguments, out], check=True, capture_output=True)
    assert raw_tensors(out) == whole
    assert leftovers(tmp_path) == ["out", "whole"]


def test_two_runs_to_one_output_do_not_mix(pico, pico_adapter, cli, tmp_path):
    from lora_merge.storage.staging import staging

    with staging(tmp_path / "out"):
        result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")
        assert leftovers(tmp_path) == ["out.lora-merge-staging"]

    assert result.exit_code == exits.WRITE
    assert "another run is writing this output" in result.stderr


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "int4", "dtype: 'int4' is not a known dtype"),
        ("verify", "twice", "verify: 'twice' is not a known level"),
        ("workers", 0, "workers: 0 is not a number of workers"),
        ("combine", "slerp", "combine: 'slerp' is not a known way to combine"),
        ("density", 0.0, "density: 0.0 is not a density"),
        ("density", float("nan"), "density: nan is not a density"),
        ("density", "much", "density: 'much' is not a density"),
        ("seed", -1, "seed: -1 is not a seed"),
        ("seed", 2**31, "seed: 2147483648 is not a seed"),
        ("base_is", "new", "base_is: 'new' is not a known kind of base"),
        ("device", "tpu", "device: 'tpu' is not a known device"),
        ("max_shard_size", "huge", "max_shard_size: 'huge' is not a size"),
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


def test_an_adapter_is_not_merged_a_second_time_unless_that_is_meant(pico, pico_adapter, cli, tmp_path):
    base = pico()
    one, other = pico_adapter(base), pico_adapter(base, r=2)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert cli("--base", base, "--adapter", one, "--out", first).exit_code == 0
    again = cli("--base", first, "--adapter", one, "--out", second)
    assert again.exit_code == exits.PLAN
    assert (
        f"{one}: the base already contains this adapter (merged as {one}, according to its merge_manifest.json)"
        in again.stderr
    )
    assert "--allow-again" in again.stderr
    assert not second.exists()

    assert cli("--base", first, "--adapter", other, "--out", second).exit_code == 0
    history = json.loads((second / "merge_manifest.json").read_text())["base"]["adapters"]
    assert [entry["path"] for entry in history] == [str(one)]
    for adapter in (one, other):  # the base's own base counts too
        assert cli("--base", second, "--adapter", adapter, "--out", third).exit_code == exits.PLAN

    assert cli("--base", second, "--adapter", one, "--out", third, "--allow-again").exit_code == 0
    assert cli("verify", third).exit_code == 0


def test_resuming_where_there_is_nothing_to_resume_is_a_plain_run(pico, pico_adapter, cli, tmp_path):
    arguments = ["--base", pico(), "--adapter", pico_adapter(pico()), "--out"]
    assert cli(*arguments, tmp_path / "plain").exit_code == 0
    result = cli(*arguments, tmp_path / "out", "--resume")

    assert result.exit_code == 0
    assert "resume" not in result.stderr.replace("--resume", "")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "plain")
    assert leftovers(tmp_path) == ["out", "plain"]


def interrupted(arguments, monkeypatch, cli, after=5):
    """Run a merge that is interrupted once some tensors are done."""
    from lora_merge.cli.progress import _Lines

    n_done = 0

    def done(self, name):
        nonlocal n_done
        n_done += 1
        if n_done == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Lines, "done", done)
        result = cli(*arguments)
    assert result.exit_code == exits.INTERRUPTED
    return result


def test_a_run_goes_on_where_the_interrupted_one_stopped(pico, pico_adapter, cli, tmp_path, monkeypatch):
    arguments = ["--base", pico(), "--adapter", pico_adapter(pico()), "--workers", "1", "--out"]
    assert cli(*arguments, tmp_path / "whole").exit_code == 0
    interrupted([*arguments, tmp_path / "out"], monkeypatch, cli)
    result = cli(*arguments, tmp_path / "out", "--resume", "--json")

    assert result.exit_code == 0, result.stderr
    assert "had already written" in result.stderr
    assert {"resume"} <= json.loads(result.stdout)["seconds"].keys()
    for path in (tmp_path / "whole").iterdir():
        if path.name != "README.md":  # it has the output's name
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert leftovers(tmp_path) == ["out", "whole"]


@pytest.mark.parametrize("what", ["another adapter", "another option", "a base that changed", "no journal"])
def test_another_merge_is_begun_anew_and_says_so(
    what, pico, pico_adapter, tampered, cli, tmp_path, monkeypatch
):
    base, adapter = tampered(pico(), "base"), pico_adapter(pico())
    arguments = ["--base", base, "--adapter", adapter, "--out", tmp_path / "out"]
    interrupted(arguments, monkeypatch, cli)
    staging = tmp_path / "out.lora-merge-staging"
    match what:
        case "another adapter":
            arguments[3] = pico_adapter(pico(), r=2)
        case "another option":
            arguments += ["--dtype", "float32"]
        case "a base that changed":
            os.utime(base / "model.safetensors")
        case "no journal":
            (staging / "journal.jsonl").unlink()
    assert cli(*arguments[:4], "--out", tmp_path / "plain", *arguments[6:]).exit_code == 0
    result = cli(*arguments, "--resume")

    assert result.exit_code == 0, result.stderr
    assert ("the interrupted run had other inputs" in result.stderr) == (what != "no journal")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "plain")
    assert not staging.exists()


@pytest.mark.parametrize("damage", ["a bit", "the header", "a file", "all", "a link to the base"])
def test_what_is_no_longer_as_it_was_written_is_written_again(
    damage, pico, pico_adapter, tampered, cli, tmp_path, monkeypatch
):
    base = tampered(pico("llama", "bfloat16", "60KB"), "base")
    arguments = ["--base", base, "--adapter", pico_adapter(pico()), "--workers", "1", "--out"]
    assert cli(*arguments, tmp_path / "whole").exit_code == 0
    interrupted([*arguments, tmp_path / "out"], monkeypatch, cli, after=12)
    staged = tmp_path / "out.lora-merge-staging" / "output"
    before = {path.name: path.read_bytes() for path in base.glob("*.safetensors")}
    for path in sorted(staged.glob("*.safetensors")):
        content = bytearray(path.read_bytes())
        match damage:
            case "a bit":
                content[-1] ^= 1
                path.write_bytes(content)
            case "the header":
                content[9] ^= 1
                path.write_bytes(content)
            case "a file":
                path.unlink()
                break
            case "all":
                path.write_bytes(bytes(len(content)))
            case "a link to the base":
                path.unlink()
                os.link(base / path.name, path)
    (staged / "stray").mkdir()
    (staged / "stray" / "file").write_text("left by someone")
    (staged / "linked").symlink_to(base)
    result = cli(*arguments, tmp_path / "out", "--resume")

    assert result.exit_code == 0, result.stderr
    assert {path.name: path.read_bytes() for path in base.glob("*.safetensors")} == before
    assert leftovers(tmp_path / "out") == leftovers(tmp_path / "whole")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "whole")
