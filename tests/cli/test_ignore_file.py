"""``--ignore-file``: every command that reads an adapter takes it, and it is recorded."""

from __future__ import annotations

import json

import pytest
import yaml

import lora_merge
from lora_merge.cli import exits
from lora_merge.errors import PlanError, RequestError

NAME = "value_head.bin"


@pytest.fixture
def adapter(pico, pico_adapter, tampered):
    """An adapter beside a file that nothing reads."""
    root = tampered(pico_adapter(pico()))
    (root / NAME).write_bytes(b"weights")
    return root


@pytest.fixture
def commands(pico, adapter, tmp_path):
    """Return the commands that read adapters, each with what it needs."""
    base = ("--base", pico())
    merge = ("merge", *base, "--adapter", adapter, "--out", tmp_path / "merged")
    return {
        "merge": merge,
        "plan": ("plan", *base, "--adapter", adapter),
        "inspect": ("inspect", adapter),
        "inspect with a base": ("inspect", adapter, *base),
        "convert": ("convert", adapter, "--out", tmp_path / "converted", "--bake-scale"),
        "convert with a base": ("convert", adapter, *base, "--out", tmp_path / "again", "--bake-scale"),
    }


def test_every_command_refuses_a_file_that_nothing_reads_and_takes_the_option(cli, commands):
    for name, command in commands.items():
        refused = cli(*command)
        assert refused.exit_code == exits.PLAN, name
        assert f"--ignore-file {NAME}" in " ".join(refused.output.split()), name
        taken = cli(*command, "--ignore-file", NAME)
        assert taken.exit_code == exits.OK, taken.output


def test_a_name_that_is_not_there_is_an_error(cli, commands):
    for name, command in commands.items():
        result = cli(*command, "--ignore-file", NAME, "--ignore-file", "absent.bin")
        assert result.exit_code not in {exits.OK, exits.PLAN}, name
        assert "ignore_file: no adapter has a file absent.bin; looked in" in result.output, name


def test_it_is_recorded_and_verification_goes_by_the_record(cli, commands, tmp_path, adapter):
    assert cli(*commands["merge"], "--ignore-file", NAME).exit_code == exits.OK
    manifest = json.loads((tmp_path / "merged" / "merge_manifest.json").read_text())
    assert manifest["options"]["ignore_file"] == [NAME]
    assert cli("verify", tmp_path / "merged").exit_code == exits.OK
    (adapter / NAME).unlink()  # the file may go, or stay
    assert cli("verify", tmp_path / "merged").exit_code == exits.OK


def test_a_request_file_a_batch_and_python_take_it(cli, pico, adapter, tmp_path):
    job = {"base": str(pico()), "adapter": str(adapter), "out": str(tmp_path / "one"), "ignore_file": [NAME]}
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(job))
    result = cli("merge", "--config", tmp_path / "request.yaml")
    assert result.exit_code == exits.OK, result.output
    jobs = [{**job, "out": str(tmp_path / "two"), "ignore_file": NAME}]
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    result = cli("batch", tmp_path / "batch.yaml")
    assert result.exit_code == exits.OK, result.output
    with pytest.raises(PlanError, match="value head"):
        lora_merge.plan(base=pico(), adapter=adapter)
    assert lora_merge.plan(base=pico(), adapter=adapter, ignore_file=NAME).steps
    with pytest.raises(RequestError, match=r"'\.\./x' is not a file name"):
        lora_merge.plan(base=pico(), adapter=adapter, ignore_file=["../x"])
