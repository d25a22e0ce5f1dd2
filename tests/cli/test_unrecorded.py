"""``lora-merge verify`` of outputs without a manifest: how their weights are stored, and how they were rounded."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

import lora_merge
from lora_merge.cli import exits
from tests.rounding import adapter_for
from tests.storages.reference import FIXTURES
from tests.tampering import edit_tensors

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "merge_manifest.json"


@pytest.fixture(scope="session")
def plain(pico, tmp_path_factory):
    """A base in bfloat16, and an adapter for all its linear layers."""
    base = pico("llama", "bfloat16")
    return base, adapter_for(base, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture(scope="session")
def fp8(tmp_path_factory):
    """A base in FP8, and an adapter for all its linear layers."""
    base = FIXTURES / "ct-fp8-channel"
    return base, adapter_for(base, tmp_path_factory.mktemp("fp8") / "adapter")


def merged(inputs: tuple[Path, Path], out: Path, **options: str) -> tuple[str, ...]:
    """Merge, remove the manifest, and return the command that verifies the output."""
    base, adapter = inputs
    lora_merge.merge(base=base, adapter=adapter, out=out, allow_loss=True, **options)  # type: ignore[arg-type]
    (out / MANIFEST).unlink()
    return "verify", str(out), "--base", str(base), "--adapter", str(adapter)


def codes(result) -> set[str]:
    """Return the codes of all errors, of a run with ``--json``."""
    found = json.loads(result.stdout)["findings"]
    return {issue["code"] for one in found for issue in one["issues"] if issue["severity"] == "error"}


@pytest.mark.parametrize("rounding", ["adapter", "stochastic"])
@pytest.mark.parametrize("level", ["sample", "full"])
def test_another_rounding_is_named_and_verified_when_it_is_given(rounding, level, plain, cli, tmp_path):
    command = (*merged(plain, tmp_path / "out", rounding=rounding), "--level", level)
    hint = f"hint: pass --rounding {rounding} if the merge used it; if not, merge again\n"

    for options in ((), ("--rounding", "nearest")):
        failed = cli(*command, *options)
        assert failed.exit_code == exits.VERIFY
        assert f"within what --rounding {rounding} may write (8 tensors compared)" in failed.output
        assert failed.stderr.endswith(hint)
        assert cli(*command, *options, "-q").stderr.endswith(hint)
        assert codes(cli(*command, *options, "--json")) == {"wrong-value", "other-rounding"}

    passed = cli(*command, "--rounding", rounding)
    assert passed.exit_code == 0, passed.output
    assert "verified in part: 1 check could not run: recorded" in passed.output


def test_python_takes_the_rounding_too(plain, tmp_path):
    merged(plain, tmp_path / "out", rounding="adapter")
    base, adapter = plain
    out = tmp_path / "out"
    assert not lora_merge.verify(out, base=base, adapter=adapter).ok
    assert lora_merge.verify(out, base=base, adapter=adapter, rounding="adapter").ok


def test_an_output_on_the_scales_of_its_base_is_recognised(fp8, cli, tmp_path):
    command = merged(fp8, tmp_path / "out", out_storage="base")
    for options in ((), ("--rounding", "adapter"), ("--level", "full")):
        result = cli(*command, *options)
        assert result.exit_code == 0, result.output
        assert "7 merged tensors" in result.output


def test_an_output_whose_changed_weights_alone_are_dense_is_recognised(fp8, tmp_path, cli):
    base, adapter = fp8
    one = tmp_path / "adapter"
    shutil.copytree(adapter, one)
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["down_proj"]}))
    edit_tensors(
        one / "adapter_model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "down_proj" not in name],
    )
    result = cli(*merged((base, one), tmp_path / "out", out_storage="mixed"))
    assert result.exit_code == 0, result.output
    assert "1 merged tensor," in result.output


def test_nearest_numbers_on_the_scales_of_the_base_have_to_be_said(fp8, cli, tmp_path):
    command = merged(fp8, tmp_path / "out", out_storage="base", rounding="nearest")
    failed = cli(*command)
    assert failed.exit_code == exits.VERIFY
    assert failed.stderr.endswith("hint: pass --rounding nearest if the merge used it; if not, merge again\n")
    assert cli(*command, "--rounding", "nearest").exit_code == 0


def test_damage_does_not_look_like_another_rounding(plain, cli, tmp_path):
    command = merged(plain, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"

    def nudge(tensors):
        # One unit in the last place.
        tensors[name].view(-1)[:7] *= 1 + 2**-7

    edit_tensors(tmp_path / "out" / "model.safetensors", nudge)
    assert codes(cli(*command, "--json")) == {"wrong-value"}
    result = cli(*command)
    assert result.exit_code == exits.VERIFY
    assert "--rounding" not in result.output


def test_values_that_no_rounding_explains_get_no_such_hint(plain, cli, tmp_path):
    command = merged(plain, tmp_path / "out", rounding="adapter")

    def halve(tensors):
        for name in tensors:
            if "_proj" in name:
                tensors[name] *= 0.5

    edit_tensors(tmp_path / "out" / "model.safetensors", halve)
    assert codes(cli(*command, "--json")) == {"wrong-value"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nearest"),
        ({"rounding": "stochastic"}, "stochastic"),
        ({"out_storage": "base"}, "adapter"),
    ],
)
def test_a_rounding_that_the_manifest_contradicts_is_an_error_of_the_command_line(
    options, said, plain, fp8, cli, tmp_path
):
    base, adapter = fp8 if "out_storage" in options else plain
    out = tmp_path / "out"
    lora_merge.merge(base=base, adapter=adapter, out=out, **options)
    assert cli("verify", out, "--rounding", said).exit_code == 0
    other = {"nearest": "adapter", "adapter": "nearest", "stochastic": "adapter"}[said]

    result = cli("verify", out, "--rounding", other)

    assert result.exit_code == exits.USAGE
    assert f"error: rounding: is {other}, but the manifest of the output says {said}" in result.stderr
    assert "hint: leave out --rounding" in result.stderr


def test_a_rounding_needs_values_to_compare(plain, cli, tmp_path):
    merged(plain, tmp_path / "out")
    result = cli("verify", tmp_path / "out", "--level", "structure", "--rounding", "adapter")
    assert result.exit_code == exits.USAGE
    assert "--rounding asks for a comparison" in result.stderr
