"""``lora-merge verify``: what a user sees of an output, now and years later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import lora_merge
from lora_merge.checks import choosing
from lora_merge.cli import exits
from lora_merge.merging.worker.devices import TorchLoading
from lora_merge.native.library import library
from lora_merge.verification import looking, records
from tests.tampering import edit_json, edit_tensors, to_pickles

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "merge_manifest.json"


@pytest.fixture
def merge(pico, pico_adapter, cli, tmp_path):
    """A merge whose base, adapter and output are copies that may be broken: (base, adapter, out)."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(pico("llama", "bfloat16", "40KB"), base)
    shutil.copytree(pico_adapter(pico("llama", "bfloat16", "40KB")), adapter)
    result = cli("--base", base, "--adapter", adapter, "--out", out)
    assert result.exit_code == 0, result.output
    return base, adapter, out


def states(result) -> dict[str, str]:
    """Return what each check came to, of a run with ``--json``."""
    return {found["check"]: found["state"] for found in json.loads(result.stdout)["findings"]}


def subjects(result, check) -> set[str]:
    """Return what one check complains of."""
    found = next(one for one in json.loads(result.stdout)["findings"] if one["check"] == check)
    return {issue["subject"] for issue in found["issues"] if issue["severity"] == "error"}


def shard_of(root: Path, name: str) -> Path:
    index = json.loads((root / "model.safetensors.index.json").read_text())
    return root / index["weight_map"][name]


def nudge(root: Path, name: str) -> None:
    """Change one value of a tensor."""

    def change(tensors):
        tensors[name].view(-1)[5] += 0.5

    edit_tensors(shard_of(root, name), change)


MERGED, COPIED = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("level", ["sample", "full"])
def test_a_good_output_passes_from_its_manifest_alone(level, merge, cli):
    result = cli("verify", merge[2], "--level", level, "--json")
    assert result.exit_code == 0, result.output
    assert set(states(result).values()) == {"passed"}
    assert set(states(result)) >= {
        "loadable",
        "recorded",
        "planned",
        "placed",
        "untouched",
        "finite",
        "recompute",
    }


@pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")
def test_one_reading_of_a_merged_tensor_is_enough(merge, cli, monkeypatch):
    digested, asked = [], []
    digest, finite = looking.tensor_digest, records.is_finite

    def noted(ref):
        digested.append(ref.name)
        return digest(ref)

    def noted_too(ref):
        asked.append(ref.name)
        return finite(ref)

    monkeypatch.setattr(looking, "tensor_digest", noted)
    monkeypatch.setattr(records, "is_finite", noted_too)
    assert cli("verify", merge[2]).exit_code == 0
    assert COPIED in digested
    assert MERGED not in digested
    assert asked == []
    # Each value is recomputed: projections would be of no use, and the base is not read for them.
    assert cli("verify", merge[2], "--level", "full").exit_code == 0
    assert MERGED in digested
    assert MERGED in asked


@pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_value_that_is_not_finite_is_seen_in_that_reading(merge, cli, value):
    edit_tensors(
        shard_of(merge[2], MERGED), lambda tensors: tensors[MERGED].view(-1)[7:8].fill_(float(value))
    )
    result = cli("verify", merge[2], "--json")
    assert result.exit_code == exits.VERIFY
    assert MERGED in subjects(result, "recorded")
    assert MERGED in subjects(result, "finite")


@pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")
@pytest.mark.parametrize("is_ready", [False, True])
def test_a_wrong_row_is_found_whether_torch_was_loaded_by_then_or_not(merge, cli, monkeypatch, is_ready):
    monkeypatch.setattr(choosing, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(TorchLoading, "is_ready", is_ready)
    (merge[2] / "merge_manifest.json").unlink()
    edit_tensors(shard_of(merge[2], MERGED), lambda tensors: tensors[MERGED][37].neg_())

    result = cli("verify", merge[2], "--base", merge[0], "--adapter", merge[1], "--json")

    found = next(one for one in json.loads(result.stdout)["findings"] if one["check"] == "recompute")
    (issue,) = found["issues"]
    assert issue["subject"] == MERGED
    assert issue["sentence"].startswith("row 37,")


def test_findings_are_in_the_order_of_the_questions(merge, cli):
    result = cli("verify", merge[2], "--json")
    assert list(states(result))[:4] == ["loadable", "recorded", "planned", "placed"]
    assert list(json.loads(result.stdout)["seconds"]) == [
        "loadable",
        "plan",
        "recorded",
        "load",
        "recomputed",
    ]


@pytest.mark.parametrize(
    ("dtype", "level", "is_loaded"),
    [
        ("float32", "structure", False),
        ("float32", "sample", True),
        pytest.param(
            "bfloat16",
            "sample",
            False,
            marks=pytest.mark.skipif(library() is None, reason="the compiled loops are not built here"),
        ),
    ],
)
def test_torch_is_loaded_beside_the_rest_where_it_is_needed(dtype, level, is_loaded, merge, cli):
    base, adapter, out = merge
    done = cli("--base", base, "--adapter", adapter, "--out", out, "--overwrite", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    script = (
        "import sys, threading\n"
        "from lora_merge.runtime import libtorch\n"
        "from lora_merge.cli.verify import verify\n"
        "verify(sys.argv[1:], standalone_mode=False)\n"
        "print(bool(libtorch._loading), bool(libtorch._paths()), 'torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, str(out), "--level", level]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    is_begun, can_be_begun, is_imported = (word == "True" for word in said.split()[-3:])
    assert is_imported == is_loaded
    assert is_begun == (is_loaded and can_be_begun)


def test_the_table_names_every_check_and_the_last_line_says_what_it_comes_to(merge, cli):
    result = cli("verify", merge[2])
    assert result.exit_code == 0
    for check in ("loadable", "recorded", "untouched", "recompute"):
        assert check in result.stdout
    *_, checked, not_checked, conclusion = result.stdout.rstrip().splitlines()
    assert checked.startswith("checked: structure (what engines need to load it); digests of all files")
    assert checked.endswith("weights, compared with base and adapter")
    assert not_checked == "not checked: outputs of the model (--forward)"
    assert conclusion == "verified: all checks passed"


@pytest.mark.parametrize(
    ("name", "checks"), [(MERGED, {"recorded", "recompute"}), (COPIED, {"recorded", "untouched"})]
)
def test_a_changed_value_is_found_by_digest_and_by_what_it_should_be(name, checks, merge, cli):
    nudge(merge[2], name)
    result = cli("verify", merge[2], "--level", "full", "--json")
    assert result.exit_code == 6, result.output
    assert {check for check, state in states(result).items() if state == "failed"} == checks
    assert all(subjects(result, check) == {name} for check in checks)


def test_a_failure_is_a_list_of_what_differs(merge, cli):
    nudge(merge[2], COPIED)
    result = cli("verify", merge[2])
    assert result.exit_code == 6
    assert f"What differs:\n  recorded: {COPIED}: " in result.stdout
    assert f"\n  untouched: {COPIED}: " in result.stdout
    assert result.stdout.rstrip().endswith("verification failed")


def test_without_base_and_adapter_the_recorded_digests_still_tell(merge, cli):
    base, adapter, out = merge
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    good = cli("verify", out, "--json")
    assert good.exit_code == 0, good.output
    assert states(good) == {"loadable": "passed", "recorded": "passed", "planned": "not asked"}
    assert "the deltas were not recomputed" in good.output
    assert json.loads(good.stdout)["not_run"] == ["planned", "placed", "untouched", "finite", "recompute"]
    strict = cli("verify", out, "--strict")
    assert strict.exit_code == 6
    assert strict.stderr.splitlines()[-1] == "hint: --strict counts warnings as errors"
    nudge(out, COPIED)
    bad = cli("verify", out, "--json")
    assert bad.exit_code == 6
    assert subjects(bad, "recorded") == {COPIED}


def test_without_base_or_adapter_the_last_line_says_which_checks_could_not_run(merge, cli, tmp_path):
    _, adapter, out = merge
    shutil.rmtree(adapter)
    page = tmp_path / "page.html"
    result = cli("verify", out, "--report", page)
    assert result.exit_code == 0, result.output
    left = "5 checks could not run: planned, placed, untouched, finite, recompute"
    assert f"verified in part: {left}" in result.stdout.splitlines()
    assert "all checks passed" not in result.output
    assert f"Verified in part, with 1 warning: {left}." in page.read_text()
    quiet = cli("verify", out, "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_quiet_names_a_few_tensors_that_differ_and_counts_the_others(merge, cli):
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        nudge(merge[2], f"model.layers.0.self_attn.{part}.weight")
    quiet = cli("verify", merge[2], "-q")
    first, *named, left, hint = quiet.stderr.splitlines()
    assert (quiet.exit_code, quiet.stdout) == (6, "")
    assert first == f"error: {merge[2]}: verification failed"
    assert len(named) == 3
    assert len({line.partition(":")[0] for line in named}) == 3
    assert left == "  … and 1 more"
    assert hint.startswith("hint: merge again")


def test_the_last_hint_is_about_what_failed(merge, pico, cli):
    def last(*arguments):
        return cli("verify", *arguments).stderr.splitlines()[-1]

    again = "hint: merge again, or restore the output from a copy"
    nothing = last(pico("llama", "bfloat16", "40KB"))
    assert nothing.startswith("hint: pass --base and --adapter, or --level structure")
    nudge(merge[2], COPIED)
    assert last(merge[2]).startswith(again)


def test_base_and_adapter_that_were_moved_can_be_named(merge, cli, tmp_path):
    base, adapter, out = merge
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (base, adapter):
        path.rename(moved / path.name)
    result = cli("verify", out, "--base", moved / "base", "--adapter", moved / "adapter", "--json")
    assert result.exit_code == 0, result.output
    assert set(states(result).values()) == {"passed"}


def test_relative_paths_are_looked_for_beside_the_output(pico, pico_adapter, cli, tmp_path, monkeypatch):
    shutil.copytree(pico(), tmp_path / "base")
    shutil.copytree(pico_adapter(pico()), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert cli("--base", "base", "--adapter", "adapter", "--out", "out").exit_code == 0
    monkeypatch.chdir("/")
    result = cli("verify", os.path.relpath(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    assert states(result)["recompute"] == "passed"


def test_another_base_than_the_merged_one_is_found(merge, cli):
    base, _, out = merge
    nudge(base, COPIED)
    result = cli("verify", out, "--json")
    assert result.exit_code == 6
    assert {check for check, state in states(result).items() if state == "failed"} == {"untouched"}
    assert subjects(result, "untouched") == {COPIED}


def test_another_adapter_than_the_merged_one_is_found(merge, pico, pico_adapter, cli):
    other = pico_adapter(pico("llama", "bfloat16", "40KB"), lora_alpha=7, r=2)
    result = cli("verify", merge[2], "--adapter", other, "--json")
    assert result.exit_code == 6
    found = {check for check, state in states(result).items() if state == "failed"}
    assert found == {"planned", "recompute"}
    assert "is not the adapter that was merged" in result.stdout


def test_an_adapter_that_no_longer_fits_is_a_failure_and_one_that_is_named_an_error(merge, cli):
    base, adapter, out = merge
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(next(iter(tensors))))
    result = cli("verify", out, "--json")
    assert result.exit_code == 6
    assert states(result)["planned"] == "failed"
    assert cli("verify", out, "--base", base, "--adapter", adapter).exit_code == 4


def test_side_files_are_held_to_their_digests(merge, cli):
    out = merge[2]
    edit_json(out / "generation_config.json", temperature=0.1)
    (out / "tokenizer_config.json").unlink()
    result = cli("verify", out, "--json")
    assert result.exit_code == 6
    assert subjects(result, "recorded") == {"generation_config.json", "tokenizer_config.json"}


def test_what_was_put_beside_the_weights_since_is_no_fault(merge, cli):
    (merge[2] / "notes.txt").write_text("served since May")
    (merge[2] / "README.md").write_text("# my model")
    assert cli("verify", merge[2]).exit_code == 0


def test_an_output_that_is_compared_with_nothing_is_not_called_verified(pico, cli):
    # A base as it was published: no manifest, and nobody says what was merged into it.
    result = cli("verify", pico("llama", "bfloat16", "40KB"), "--json")
    assert result.exit_code == 6, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert states(result) == {
        "loadable": "passed",
        "recorded": "not asked",
        "planned": "not asked",
        "compared": "failed",
    }
    (issue,) = found["findings"][-1]["issues"]
    assert issue["code"] == "nothing-compared"
    assert found["checked"] == ["structure (what engines need to load it)"]
    assert len(found["not_checked"]) == 3
    said = cli("verify", pico("llama", "bfloat16", "40KB")).stdout
    assert "verified" not in said
    assert (
        "not checked: digests of all files (merge_manifest.json); weights, compared with base and adapter"
        in said
    )


def test_the_structure_alone_can_be_asked_for(pico, cli, tmp_path):
    base = pico("llama", "bfloat16", "40KB")
    result = cli("verify", base, "--level", "structure")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("the values of the weights were not checked")
    assert "verified" not in result.stdout
    shutil.copytree(base, tmp_path / "broken")
    shard_of(tmp_path / "broken", COPIED).unlink()
    assert cli("verify", tmp_path / "broken", "--level", "structure").exit_code == 6
    asked = cli("verify", base, "--level", "structure", "--forward")
    assert asked.exit_code == 2
    assert "--forward asks for a comparison" in asked.output


def test_a_base_without_an_adapter_is_nothing_to_compare_with(pico, cli):
    base = pico("llama", "bfloat16", "40KB")
    result = cli("verify", base, "--base", base, "--json")
    assert result.exit_code == 6
    assert states(result)["compared"] == "failed"


def test_an_output_of_another_tool_is_held_to_base_and_adapter(pico, pico_adapter, cli, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pico("llama", "bfloat16", "40KB")
    adapter = pico_adapter(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by-peft")
    result = cli(
        "verify", tmp_path / "by-peft", "--base", base, "--adapter", adapter, "--level", "full", "--json"
    )
    assert result.exit_code == 0, result.output
    assert states(result)["recompute"] == "passed"
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(tmp_path / "by-peft" / "model.safetensors", lambda t: t[name].mul_(1.5))
    again = cli("verify", tmp_path / "by-peft", "--base", base, "--adapter", adapter, "--json")
    assert again.exit_code == 6
    assert subjects(again, "recompute") == {name}


def test_what_peft_makes_of_a_tied_head_is_found(pico, pico_adapter, cli, tmp_path):
    # It merges into the storage that both ends share, and keeps the tie.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pico("llama_tied", "float32")
    adapter = pico_adapter(base, target_modules=["lm_head"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by-peft")
    result = cli("verify", tmp_path / "by-peft", "--base", base, "--adapter", adapter, "--forward", "--json")
    assert result.exit_code == 6, result.output
    assert states(result)["placed"] == states(result)["untouched"] == states(result)["forward"] == "failed"


def test_options_of_the_merge_are_taken_from_the_manifest(pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "bfloat16")
    one, two = pico_adapter(base), pico_adapter(base, target_modules=["v_proj", "q_proj"], r=2)
    options = [
        "--combine",
        "dare_ties",
        "--density",
        "0.4",
        "--seed",
        "5",
        "--dtype",
        "float16",
        "--max-shard-size",
        "60KB",
    ]
    merged = cli(
        "--base", base, "--adapter", f"{one}:0.5", "--adapter", two, "--out", tmp_path / "out", *options
    )
    assert merged.exit_code == 0, merged.output
    result = cli("verify", tmp_path / "out", "--level", "full", "--json")
    assert result.exit_code == 0, result.output
    assert set(states(result).values()) == {"passed"}


def test_a_base_in_bin_files_is_evidence_too(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico("llama", "bfloat16", "40KB"), "base")
    to_pickles(base)
    assert cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out").exit_code == 0
    assert cli("verify", tmp_path / "out", "--level", "full").exit_code == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.write_text("{"), "is not valid JSON"),
        (lambda path: edit_json(path, manifest_version=99), "manifest_version is 99, expected 1"),
        (lambda path: edit_json(path, tensors={"x": {"file": 1}}), "tensors.x."),
    ],
)
def test_a_broken_manifest_is_a_failure_and_says_where(change, sentence, merge, cli):
    change(merge[2] / MANIFEST)
    result = cli("verify", merge[2], "--json")
    assert result.exit_code == 6
    assert states(result)["recorded"] == "failed"
    assert sentence in result.stdout
    assert "not checked: digests of all files (merge_manifest.json)" in cli("verify", merge[2]).output


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["no-such-directory"], 3, "no-such-directory: this directory does not exist"),
        (["{file}"], 3, "is a file"),
        (["{out}", "--base", "no-base"], 3, "no-base: this directory does not exist"),
        (["{out}", "--tolerance", "-1"], 2, "'-1' is not a tolerance"),
        (["{out}", "--n-tokens", "0"], 2, "'0' is not a number of tokens"),
        (["{out}", "--engine", "gguf"], 2, "'gguf' is not a known engine, expected vllm"),
        (["{out}", "--engine", "vllm"], 2, "vLLM is not installed in the environment"),
        (["{out}", "--engine", "vllm", "--engine-python", "/no/python"], 2, "/no/python: not found, expected a Python interpreter"),
        (["{out}", "--engine", "vllm", "--engine-python", sys.executable], 2, "vLLM is not installed for"),
        (["{out}", "--quiet", "--verbose"], 2, "exclude each other"),
        ([], 2, "missing argument OUT: merged checkpoint to verify, directory or URL"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_its_code(arguments, code, sentence, merge, cli, monkeypatch):
    monkeypatch.delenv("LORA_MERGE_ENGINE_PYTHON", raising=False)
    file = merge[2] / "config.json"
    result = cli("verify", *(text.format(out=merge[2], file=file) for text in arguments))
    assert result.exit_code == code, result.output
    assert sentence in result.output


def test_forward_passes_need_base_and_adapter_and_say_so(merge, cli):
    base, _, out = merge
    shutil.rmtree(base)
    result = cli("verify", out, "--forward")
    assert result.exit_code == 3
    assert "forward passes need base and adapter" in result.output
    assert "--base" in result.output


def test_texts_need_a_tokenizer_and_say_so(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    assert cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out").exit_code == 0
    result = cli("verify", tmp_path / "out", "--forward", "--prompt", "hello")
    assert result.exit_code == 2
    assert "its tokenizer does not load" in result.output
    assert cli("verify", tmp_path / "out", "--forward").exit_code == 0


def test_code_in_a_checkpoint_is_not_run_unasked(merge, cli):
    base, _, out = merge
    for root in (base, out):
        edit_json(
            root / "config.json",
            architectures=["OwnModel"],
            auto_map={"AutoModelForCausalLM": "own.OwnModel"},
        )
        (root / "own.py").write_text("raise RuntimeError('it ran')\n")
    result = cli("verify", out, "--forward")
    assert result.exit_code == 4, result.output
    assert "transformers has no class OwnModel" in result.output
    assert "--trust-remote-code" in result.output
    assert "it ran" not in result.output


def test_quiet_prints_nothing_of_a_good_output(merge, cli):
    good = cli("verify", merge[2], "--quiet")
    assert (good.exit_code, good.output) == (0, "")


def test_in_python_the_same_is_a_value(merge):
    proof = lora_merge.verify(merge[2])
    assert isinstance(proof, lora_merge.Proof)
    assert proof.ok
    nudge(merge[2], COPIED)
    proof = lora_merge.verify(merge[2], level="full")
    assert not proof.ok
    assert {issue.subject for issue in proof.issues if issue.severity == "error"} == {COPIED}


@pytest.mark.parametrize("named", ["base", "adapter", None])
def test_nothing_is_fetched_that_only_the_manifest_names(named, merge, cli):
    base, adapter, out = merge
    manifest = json.loads((out / MANIFEST).read_text())
    for recorded in (manifest["base"], *manifest["adapters"]):
        recorded.update(hub="Hugging Face", id="evil/repo", revision="main", commit="0" * 40)
    (out / MANIFEST).write_text(json.dumps(manifest))
    options = {"base": ("--base", base), "adapter": ("--adapter", adapter), None: ()}[named]

    result = cli("verify", out, *options)

    assert "evil/repo" in result.stderr
    assert "offline mode is on" in result.stderr
    assert ("repos that only the manifest names are not downloaded" in result.stderr) == (named is not None)


def test_a_model_is_not_run_with_an_adapter_beside_it(merge, cli):
    base, adapter, out = merge
    shutil.copy(adapter / "adapter_config.json", out)

    result = cli("verify", out, "--base", base, "--adapter", adapter, "--forward", "--json")

    assert result.exit_code == 6
    assert "would load that adapter too" in result.stdout


def test_an_interrupted_verification_does_not_speak_of_outputs(merge, cli, monkeypatch):
    def struck(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_merge.verification.verify_existing.recorded", struck)
    result = cli("verify", merge[2])
    assert result.exit_code == exits.INTERRUPTED
    assert "error: interrupted\n" in result.stderr
    assert "output" not in result.stderr
