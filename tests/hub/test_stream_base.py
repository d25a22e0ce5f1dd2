"""--stream-base: the bytes of a merge of the downloaded base, and no weights on this machine."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from safetensors import safe_open

import lora_merge
from lora_merge.cli import exits
from lora_merge.storage import ranged
from lora_merge.storage.hub import remote_file
from tests.rounding import adapter_for
from tests.tampering import edit_json

TOKEN = "hf_" + "secretword" * 3
FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"


def ok(result):
    assert result.exit_code == exits.OK, result.stdout + result.stderr
    return result


def refused(result):
    assert result.exit_code not in {exits.OK, exits.BUG}, result.stdout + result.stderr
    return result.stderr


def files_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.fixture
def cached(tmp_path):
    """Return a function: the weight files in the Hub's cache."""
    return lambda: sorted(path.name for path in (tmp_path / "hf").rglob("*.safetensors"))


@pytest.fixture
def base(pico, copied, network):
    """Return a base in shards, on a hub that redirects requests for weights."""
    root = copied(pico("llama", "bfloat16", "60KB"), "base")
    (root / "pytorch_model.bin").write_bytes(b"not to be read")
    network.add("org/base", root)
    return root


@pytest.fixture
def adapter(base, pico, pico_adapter):
    return pico_adapter(pico("llama", "bfloat16", "60KB"))


@pytest.fixture
def options(adapter):
    return ("--base", "org/base", "--adapter", adapter, "--stream-base")


@pytest.mark.parametrize("how", [(), ("--verify", "full"), ("--base", "hf://org/base@main")])
def test_the_output_has_the_bytes_of_a_merge_of_the_downloaded_base(
    how, options, cli, cached, network, tmp_path
):
    done = ok(cli(*options, *how, "--out", tmp_path / "streamed" / "out"))
    assert cached() == []
    assert "pytorch_model.bin" not in network.fetched()
    ok(cli(*options, *how, "--no-stream-base", "--out", tmp_path / "downloaded" / "out"))
    assert cached() != []
    assert files_of(tmp_path / "streamed" / "out") == files_of(tmp_path / "downloaded" / "out")
    assert "lora-merge-copy" not in done.stdout + done.stderr
    commit = network.repos["org/base"].commits["main"]
    recorded = json.loads((tmp_path / "streamed" / "out" / "merge_manifest.json").read_text())["base"]
    assert (recorded["id"], recorded["commit"]) == ("org/base", commit)
    assert f"commit `{commit}`" in (tmp_path / "streamed" / "out" / "README.md").read_text()


@pytest.mark.parametrize("fixture", ["fp8-block", "ct-int4"])
def test_a_quantised_base_is_streamed_alike(fixture, cli, cached, network, tmp_path):
    network.add("org/small", FIXTURES / fixture)
    adapter = adapter_for(FIXTURES / fixture, tmp_path / "adapter")
    for name, switch in (("one", "--stream-base"), ("two", "--no-stream-base")):
        ok(cli("--base", "org/small", "--adapter", adapter, switch, "--out", tmp_path / name / "out"))
        assert bool(cached()) == (name == "two")
    assert files_of(tmp_path / "one" / "out") == files_of(tmp_path / "two" / "out")


def test_the_bytes_that_come_are_those_of_the_tensors_and_of_the_headers(
    options, base, cli, network, tmp_path, monkeypatch
):
    """Each tensor comes once, and each header once. A read that nothing announced asks for `SMALL_BYTES` at least, so that
    a header is one request: that much may come twice for each tensor and each header.
    """
    monkeypatch.setattr(ranged, "SMALL_BYTES", 64)
    ok(cli(*options, "--no-verify", "--out", tmp_path / "out"))
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            n_reads = len(file.keys()) + 1
        size = path.stat().st_size
        assert size <= network.sent[path.name] <= size + n_reads * 64, path.name


def test_a_plan_is_made_of_headers_and_holds_texts_that_other_processes_can_open(base, adapter, here, cached):
    plan = lora_merge.plan(base="org/base", adapter=adapter, stream_base=True)
    commit = here.repos["org/base"].commits["main"]
    assert plan.base == f"hf://org/base@{commit}"
    assert cached() == []
    files = {ref.file for step in plan.steps for ref in step.reads.values() if ref.file.startswith("hf:")}
    assert files == {f"{plan.base}/{path.name}" for path in base.glob("*.safetensors")}
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert lora_merge.plan(base="org/base", adapter=adapter, stream_base=True) == plan


def test_a_folder_of_a_repo_is_streamed(pico, copied, adapter, cli, cached, here, tmp_path):
    root = tmp_path / "repos" / "nested"
    root.mkdir(parents=True)
    copied(pico("llama", "bfloat16", "60KB"), "nested/inner")
    here.add("org/nested", root)
    shown = ok(cli("plan", "--base", "org/nested/inner", "--adapter", adapter, "--stream-base", "--json"))
    assert (
        json.loads(shown.stdout)["base"]
        == f"hf://org/nested@{here.repos['org/nested'].commits['main']}/inner"
    )
    assert cached() == []


def test_a_body_that_breaks_off_is_asked_for_again(options, cli, network, base, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "WAITS", (0, 0, 0))
    names = [path.name for path in base.glob("*.safetensors")]
    network.cut = dict.fromkeys(names, 2)
    network.busy = dict.fromkeys(names, 1)
    ok(cli(*options, "--out", tmp_path / "out"))
    assert set(network.cut.values()) == set(network.busy.values()) == {0}


def test_a_run_that_the_hub_ended_is_resumed(
    options, base, cli, network, before_writing, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote_file, "WAITS", ())
    last = max(path.name for path in base.glob("*.safetensors"))
    ok(cli(*options, "--out", tmp_path / "one" / "out"))
    statuses = [500]
    before_writing(lambda: network.failing.update({last: statuses.pop()} if statuses else {}))
    said = refused(cli(*options, "--out", tmp_path / "two" / "out"))
    assert f"{last}: 127.0.0.1 answered with status 500" in " ".join(said.split())
    network.failing.clear()
    ok(cli(*options, "--out", tmp_path / "two" / "out", "--resume"))
    assert files_of(tmp_path / "one" / "out") == files_of(tmp_path / "two" / "out")


@pytest.fixture
def before_writing(monkeypatch):
    """Return a function that has something done between planning and the first byte of the output."""
    from lora_merge.merging import run

    write = run.write

    def put(act):
        def written(*arguments):
            act()
            return write(*arguments)

        monkeypatch.setattr(run, "write", written)

    return put


def test_a_branch_that_moves_meanwhile_changes_nothing(
    options, base, copied, cli, network, before_writing, tmp_path
):
    ok(cli(*options, "--out", tmp_path / "one" / "out"))
    repo = network.repos["org/base"]
    other = copied(base, "other")
    for path in other.glob("*.safetensors"):
        path.write_bytes(b"other weights")

    def move():
        repo.commits |= {"main": "0" * 40, "old": repo.commits["main"]}
        repo.revisions |= {"main": other, "old": base}

    before_writing(move)
    ok(cli(*options, "--out", tmp_path / "two" / "out"))
    assert repo.commits["main"] == "0" * 40
    assert files_of(tmp_path / "one" / "out") == files_of(tmp_path / "two" / "out")


@pytest.mark.parametrize("kind", ["bytes", "size", "config"])
def test_a_file_that_changes_meanwhile_is_refused_and_nothing_is_made(
    kind, options, base, cli, before_writing, tmp_path
):
    path = base / "config.json" if kind == "config" else max(base.glob("*.safetensors"))
    content = path.read_bytes()
    before_writing(lambda: path.write_bytes(content[:-1] + b"\0" * (2 if kind == "size" else 1)))
    said = refused(cli(*options, "--out", tmp_path / "out"))
    assert f"{path.name}: changed while it was read" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.system
def test_an_output_in_a_store_in_parts_and_of_a_batch_is_made_of_a_streamed_base(
    options, adapter, cli, cached, tmp_path
):
    pytest.importorskip("obstore")
    ok(cli(*options, "--out", tmp_path / "here" / "out"))
    ok(cli(*options, "--out", f"file://{tmp_path}/store/out"))
    for how in (("--part", "1/2"), ("--part", "2/2"), ("--seal",)):
        ok(cli(*options, *how, "--out", f"file://{tmp_path}/parts/out"))
    assert weights(tmp_path / "here" / "out") == weights(tmp_path / "parts" / "out")
    jobs = tmp_path / "jobs.yaml"
    job = {
        "base": "org/base",
        "adapter": str(adapter),
        "stream_base": True,
        "out": str(tmp_path / "batch" / "out"),
    }
    jobs.write_text(json.dumps({"jobs": [job]}))
    ok(cli("batch", jobs))
    again = ok(cli("batch", jobs))
    assert "1 kept" in again.stderr
    assert (
        weights(tmp_path / "here" / "out")
        == weights(tmp_path / "store" / "out")
        == weights(tmp_path / "batch" / "out")
    )
    assert cached() == []


def test_verify_and_inspect_read_the_base_where_it_is(options, adapter, cli, cached, tmp_path):
    ok(cli(*options, "--out", tmp_path / "out", "--report", tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "org/base" in page
    assert "lora-merge-copy" not in page
    proved = ok(cli("verify", tmp_path / "out", *options))
    assert "recompute" in proved.stdout
    shown = ok(cli("inspect", adapter, "--base", "org/base", "--stream-base"))
    assert "hf://" not in shown.stderr
    assert cached() == []


def test_a_base_that_only_files_of_others_name_is_not_asked_for(
    options, adapter, copied, cli, base, network, tmp_path
):
    ok(cli(*options, "--out", tmp_path / "out"))
    commit = network.repos["org/base"].commits["main"]
    edit_json(tmp_path / "out" / "merge_manifest.json", base={"path": f"hf://org/base@{commit}"})
    own = copied(adapter, "own")
    edit_json(own / "adapter_config.json", base_model_name_or_path=f"hf://org/base@{commit}", revision=None)
    network.requests.clear()
    cli("verify", tmp_path / "out", "--report", tmp_path / "page.html")
    cli("inspect", own)
    cli("convert", own, "--for", "vllm", "--out", tmp_path / "converted")
    assert network.requests == []


def test_a_private_base_is_streamed_with_its_token_and_nothing_keeps_it(
    base, adapter, cli, network, tmp_path
):
    network.add("org/private", base, token=TOKEN)
    done = ok(
        cli(
            "--base",
            "org/private",
            "--adapter",
            adapter,
            "--stream-base",
            "--token",
            TOKEN,
            "--out",
            tmp_path / "out",
        )
    )
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in data for data in files_of(tmp_path / "out").values())
    assert not any(TOKEN in repr(headers) for headers in network.network_headers)


def test_processes_without_the_token_are_refused_before_anything_is_made(base, adapter, cli, here, tmp_path):
    here.add("org/private", base, token=TOKEN)
    options = ("--base", "org/private", "--adapter", adapter, "--stream-base", "--token", TOKEN)
    said = refused(cli(*options, "--executor", "processes", "--out", tmp_path / "out"))
    assert "executor: is processes, whose workers are not given the token" in said
    assert "set HF_TOKEN instead of --token" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        (
            "directory",
            "is a directory of this machine, and --stream-base is for a base on the Hugging Face Hub",
        ),
        ("file", "is in an object store, where weights are read by ranges without --stream-base"),
        ("ms://org/base", "is on ModelScope, and --stream-base reads from the Hugging Face Hub only"),
    ],
)
def test_a_base_that_is_elsewhere_is_refused(named, sentence, base, adapter, cli, tmp_path):
    text = {"directory": base, "file": f"file://{base}"}.get(named, named)
    said = refused(cli("--base", text, "--adapter", adapter, "--stream-base", "--out", tmp_path / "out"))
    assert sentence in " ".join(said.split())
    assert "leave out --stream-base" in said


def test_offline_mode_and_a_missing_base_are_refused(options, adapter, cli, base, tmp_path):
    said = refused(cli(*options, "--offline", "--out", tmp_path / "out"))
    assert "offline mode is on, and --stream-base reads the base from the Hub" in " ".join(said.split())
    assert "needs --base" in refused(cli("verify", tmp_path, "--stream-base"))
    assert "needs --base" in refused(cli("inspect", adapter, "--stream-base"))
    assert "no such repo" in refused(cli("--base", "org/other", *options[2:], "--out", tmp_path / "out"))


def test_pickled_weights_are_refused_before_any_is_read(base, adapter, cli, here, tmp_path, options):
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        path.unlink()
    said = refused(cli(*options, "--out", tmp_path / "out"))
    assert "has its weights in pytorch_model.bin, expected safetensors" in said


def test_links_and_forward_passes_need_files_of_this_machine(options, cli, tmp_path):
    said = refused(cli(*options, "--link", "hard", "--out", tmp_path / "out"))
    assert "the base is read by its URL" in " ".join(said.split())
    ok(cli(*options, "--out", tmp_path / "out"))
    said = refused(cli("verify", tmp_path / "out", *options, "--forward"))
    assert "runs models from local directories only" in " ".join(said.split())


def test_a_base_that_only_the_adapter_names_is_streamed_too(base, adapter, copied, cli, cached, tmp_path):
    own = copied(adapter, "own")
    edit_json(own / "adapter_config.json", base_model_name_or_path="org/base", revision=None)
    ok(cli("--adapter", own, "--stream-base", "--out", tmp_path / "out"))
    assert cached() == []
