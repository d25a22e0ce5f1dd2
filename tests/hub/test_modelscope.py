"""Models and adapters on ModelScope, through its own package where it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json

INSTALLED = importlib.util.find_spec("modelscope") is not None
needs_modelscope = pytest.mark.skipif(
    not INSTALLED, reason="modelscope is not installed: pip install -e '.[modelscope]'"
)


@pytest.fixture
def adapter(pico, pico_adapter, copied):
    root = copied(pico_adapter(pico()), "adapter")
    edit_json(root / "adapter_config.json", base_model_name_or_path="org/base")
    return root


@pytest.fixture
def base(pico, copied):
    root = copied(pico(), "base")
    (root / "pytorch_model.bin").write_bytes(b"not to be fetched")
    return root


@pytest.mark.skipif(INSTALLED, reason="modelscope is installed")
def test_without_modelscope_the_package_to_install_is_named(hub, command, adapter, tmp_path):
    result = command("--base", "ms://org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE
    assert "ms://org/base: is on ModelScope, but the package modelscope is not installed" in result.stderr
    assert "pip install 'lora-merge[modelscope]'" in result.stderr
    assert hub.requests == []


@needs_modelscope
def test_an_adapter_on_modelscope_brings_its_base_from_there(hub, command, cli, base, adapter, tmp_path):
    hub.add("org/base", base)
    hub.add("org/adapter", adapter, v2=adapter)
    out = tmp_path / "out"

    result = command("--adapter", "ms://org/adapter@v2:0.5", "--out", out)

    assert result.returncode == exits.OK, result.stderr
    local = cli("--base", base, "--adapter", f"{adapter}:0.5", "--out", tmp_path / "local")
    assert local.exit_code == exits.OK
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    fetched = " ".join(hub.fetched())
    assert "model.safetensors" in fetched
    assert "pytorch_model.bin" not in fetched
    recorded = json.loads((out / "merge_manifest.json").read_text())
    assert recorded["base"]["hub"] == "ModelScope"
    assert recorded["adapters"][0]["revision"] == "v2"


@needs_modelscope
def test_a_base_that_ms_swift_took_from_modelscope_is_taken_from_there(hub, command, base, adapter, tmp_path):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/root/.cache/modelscope/org/base")
    (adapter / "args.json").write_text(json.dumps({"model": "org/base", "use_hf": False}))
    hub.add("org/base", base)

    result = command("--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    recorded = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert recorded["base"]["path"] == "ms://org/base"


@needs_modelscope
def test_offline_takes_the_cache_of_modelscope(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    arguments = ("--base", "ms://org/base", "--adapter", adapter, "--overwrite", "--out", tmp_path / "out")

    before = command(*arguments, "--offline")
    assert command(*arguments).returncode == exits.OK
    hub.requests.clear()
    after = command(*arguments, "--offline")

    assert before.returncode == exits.RESOLVE
    assert "ms://org/base: not found in ModelScope's local cache" in before.stderr
    assert after.returncode == exits.OK, after.stderr
    assert hub.requests == []


@needs_modelscope
@pytest.mark.parametrize("source", ["ms://org/nothing", "ms://org/base@v9"])
def test_what_modelscope_has_not_is_named(source, hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)

    result = command("--base", source, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE, result.stderr
    assert f"{source}: ModelScope has no such repo, or it has no revision" in result.stderr
    assert "Traceback" not in result.stderr


@needs_modelscope
def test_modelscope_out_of_reach_is_named(hub, command, adapter, tmp_path):
    result = command(
        "--base", "ms://org/base", "--adapter", adapter, "--out", tmp_path / "out",
        env={"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip

    assert result.returncode == exits.RESOLVE, result.stderr
    assert "ms://org/base: ModelScope cannot be reached" in result.stderr
