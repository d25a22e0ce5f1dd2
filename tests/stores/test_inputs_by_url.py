"""Bases and adapters by URL: the same bytes as from directories, the same words, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_merge
from lora_merge.cli import exits
from lora_merge.errors import ChangedError
from lora_merge.storage.objects import StoreUrl, store_at
from tests.crossing import diagonal
from tests.rounding import adapter_for
from tests.stores.conftest import SECRET

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
OWN_WORDS = {"merge_manifest.json", "README.md"}
"""Files that have the names of the inputs."""


def ok(result):
    assert result.exit_code == exits.OK, result.stdout + result.stderr
    return result


def refused(result):
    assert result.exit_code not in {exits.OK, exits.BUG}, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def files_of(root):
    """Return name → bytes of every file of an output that has no names of inputs in it."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name not in OWN_WORDS}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Return the folder of temporary files, which a run has to leave as it was."""
    import tempfile

    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def below(url):
    """Return a function: name → the folder of that name in the store."""
    return lambda name: StoreUrl(url.scheme, url.bucket, f"{url.prefix}/{name}")


@pytest.fixture
def placed(pico, pico_adapter, below, upload):
    """Return a base in shards and an adapter, here and in the store."""
    base = pico("llama", "bfloat16", "60KB")
    adapter = pico_adapter(base)
    for root, name in ((base, "pico-llama"), (adapter, "my-lora")):
        upload(root, below(name))
    return SimpleNamespace(
        base=base, adapter=adapter, base_url=str(below("pico-llama")), adapter_url=str(below("my-lora"))
    )


def left_in(temporary):
    """Return the local copies that are still there."""
    return sorted(temporary.glob("lora-merge-copy-*"))


def says_urls_only(text, temporary):
    """Return True where a text names no temporary folder and holds no secret."""
    return str(temporary) not in text and "lora-merge-copy" not in text and SECRET not in text


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_merge_from_a_store_has_the_bytes_of_one_from_the_disk(placed, executor, cli, tmp_path, temporary):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "here" / "out"))
    arguments = (
        "--base",
        placed.base_url,
        "--adapter",
        f"{placed.adapter_url}/",
        "--executor",
        executor,
        "--verify",
        "full",
    )
    done = ok(cli(*arguments, "--workers", 2, "--out", tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here" / "out")
    manifest, card = (Path(tmp_path, "out", name).read_text() for name in sorted(OWN_WORDS, reverse=True))
    assert json.loads(manifest)["base"]["path"] == placed.base_url
    assert json.loads(manifest)["adapters"][0]["path"] == f"{placed.adapter_url}/"
    assert all(says_urls_only(text, temporary) for text in (manifest, card, done.stdout, done.stderr))
    assert left_in(temporary) == []


@pytest.mark.parametrize("fixture", ["fp8-block", "ct-int4"])
def test_quantised_bases_in_a_store_are_merged_alike(fixture, below, upload, cli, tmp_path, temporary):
    base = FIXTURES / fixture
    adapter = adapter_for(base, tmp_path / "adapter")
    upload(base, below(fixture))
    upload(adapter, below("lora"))
    ok(cli("--base", base, "--adapter", adapter, "--out", tmp_path / "here" / "out"))
    done = ok(cli("--base", below(fixture), "--adapter", below("lora"), "--out", tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here" / "out")
    assert says_urls_only(done.stderr, temporary)
    assert left_in(temporary) == []


def test_a_plan_holds_urls_only_and_can_be_sent(placed, temporary):
    plan = lora_merge.plan(base=placed.base_url, adapter=placed.adapter_url)
    assert says_urls_only(repr(plan), temporary)
    assert plan.base == placed.base_url
    assert plan.adapters == (placed.adapter_url,)
    assert all(file.source.startswith(placed.base_url) for file in plan.side_files)
    assert pickle.loads(pickle.dumps(plan)) == plan
    again = lora_merge.plan(base=placed.base_url, adapter=placed.adapter_url)
    assert again == plan  # so that another process continues what this one began
    assert left_in(temporary) == []


def test_plan_and_inspect_show_urls(placed, cli, tmp_path, temporary):
    shown = ok(cli("plan", "--base", placed.base_url, "--adapter", placed.adapter_url))
    assert placed.base_url in shown.stdout
    assert f"--base {placed.base_url} --adapter {placed.adapter_url}" in shown.stderr
    described = ok(cli("inspect", placed.adapter_url, "--base", placed.base_url))
    alone = ok(cli("inspect", placed.adapter_url, "--json"))
    assert placed.adapter_url in described.stdout
    for result in (shown, described, alone):
        assert says_urls_only(result.stdout + result.stderr, temporary)
    assert left_in(temporary) == []


def test_json_and_the_page_show_urls(placed, cli, tmp_path, temporary):
    arguments = ("--base", placed.base_url, "--adapter", placed.adapter_url)
    page = tmp_path / "page.html"
    done = ok(cli(*arguments, "--out", tmp_path / "out", "--json", "--report", page))
    assert json.loads(done.stdout)["base"] == placed.base_url
    assert placed.base_url in page.read_text()
    assert says_urls_only(done.stdout + done.stderr + page.read_text(), temporary)


def test_an_output_in_a_store_is_verified_there(placed, below, upload, cli, tmp_path, temporary):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    upload(tmp_path / "out", below("out"))
    arguments = ("--base", placed.base_url, "--adapter", placed.adapter_url)
    done = ok(cli("verify", below("out"), *arguments, "--level", "full", "--json"))
    proof = json.loads(done.stdout)
    assert {one["check"]: one["state"] for one in proof["findings"]} == dict.fromkeys(
        ("loadable", "recorded", "planned", "placed", "untouched", "finite", "recompute"), "passed"
    )
    assert (proof["out"], proof["base"]) == (str(below("out")), placed.base_url)
    ok(cli("verify", below("out"), "--level", "structure"))
    assert says_urls_only(done.stdout + done.stderr, temporary)
    assert left_in(temporary) == []


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_damage_of_an_output_in_a_store_is_found(name, placed, below, upload, cli, tmp_path, temporary):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[-40] ^= 4
    (tmp_path / "out" / name).write_bytes(data)
    upload(tmp_path / "out", below("out"))
    result = cli("verify", below("out"), "--base", placed.base_url, "--adapter", placed.adapter_url)
    assert result.exit_code == exits.VERIFY
    assert says_urls_only(result.stdout + result.stderr, temporary)


def test_a_shard_that_an_output_in_a_store_lacks_is_found(placed, below, upload, cli, tmp_path):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    upload(tmp_path / "out", below("out"))
    result = cli("verify", below("out"), "--level", "structure")
    assert result.exit_code == exits.VERIFY
    assert "model-00002-of-00003.safetensors" in result.stdout + result.stderr


@pytest.mark.parametrize("level", ["structure", "full"])
def test_a_shard_of_an_output_that_is_cut_short_is_the_outputs_fault(
    placed, below, upload, cli, tmp_path, level
):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    upload(tmp_path / "out", below("out"))
    result = cli("verify", below("out"), "--level", level)
    assert result.exit_code == exits.VERIFY
    said = " ".join(f"{result.stdout} {result.stderr}".split())
    assert f"loadable: {shard.name}: has {shard.stat().st_size} bytes, expected" in said
    assert "hint: merge again, or restore" in said
    assert "download" not in said.replace("downloading", "")


@pytest.mark.parametrize(
    ("text", "hint"),
    [(":abc", "write a number as the weight, such as ADAPTER:0.5"), (":0,5", "with a point: ADAPTER:0.5")],
)
def test_a_weight_of_an_adapter_in_a_store_that_is_no_number_is_told(text, hint, placed, cli, tmp_path):
    out = tmp_path / "out"
    done = cli("--base", placed.base, "--adapter", f"{placed.adapter_url}{text}", "--out", out)
    assert done.exit_code == exits.RESOLVE
    assert "nothing is stored there" in done.stderr
    assert hint.replace("ADAPTER", placed.adapter_url) in " ".join(done.stderr.split())


class Hook:
    """Changes a file of the store when a phase begins."""

    def __init__(self, phase, change):
        self._phase, self._change = phase, change

    def phase(self, name, nbytes):
        if name == self._phase:
            self._change()

    def advance(self, nbytes): ...
    def done(self, name): ...


@pytest.mark.parametrize(
    ("phase", "what"),
    diagonal(
        ["copying", "merging", "verifying"],
        {
            "weights": ("pico-llama", "model-00002-of-00003.safetensors"),
            "side file": ("pico-llama", "tokenizer.json"),
            "adapter": ("my-lora", "adapter_model.safetensors"),
        },
    ),
)
def test_an_object_that_changes_during_a_merge_ends_it(what, phase, placed, below, tmp_path, temporary):
    folder, name = what
    store = store_at(below(folder))
    data = bytearray(store.get(name))
    data[-1] ^= 1
    hook = Hook(phase, lambda: store.put(name, bytes(data)))
    with pytest.raises(ChangedError) as caught:
        lora_merge.merge(
            base=placed.base_url, adapter=placed.adapter_url, out=tmp_path / "out", observer=hook
        )
    assert str(below(folder).child(name)) in str(caught.value)
    assert says_urls_only(str(caught.value), temporary)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_continues_with_other_copies(placed, cli, tmp_path, temporary):
    """The fingerprint has URLs and versions, not the temporary folder of a run."""

    class Stop(Hook):
        def phase(self, name, nbytes):
            if name == "verifying":
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(base=placed.base_url, adapter=placed.adapter_url, out=out, observer=Stop("", None))
    done = ok(cli("--base", placed.base_url, "--adapter", placed.adapter_url, "--out", out, "--resume"))
    assert re.search(r"had already written \d+ of \d+ tensors", done.stderr)


def test_convert_and_extract_read_urls(placed, cli, tmp_path, temporary):
    arguments = ("--base", placed.base_url, "--for", "vllm")
    here = ok(
        cli("convert", placed.adapter, "--base", placed.base, "--for", "vllm", "--out", tmp_path / "here")
    )
    ok(cli("convert", placed.adapter_url, *arguments, "--out", tmp_path / "out"))
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert here
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (tmp_path / "here" / name).read_bytes() for name in names
    ]
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "tuned"))
    done = ok(
        cli(
            "extract",
            "--base",
            placed.base_url,
            "--tuned",
            tmp_path / "tuned",
            "--rank",
            4,
            "--out",
            tmp_path / "lora",
        )
    )
    assert says_urls_only((tmp_path / "out" / "conversion.json").read_text() + done.stderr, temporary)
    assert left_in(temporary) == []


@pytest.mark.parametrize("verb", ["convert", "extract"])
def test_adapters_are_not_written_into_a_store(verb, cli, tmp_path):
    given = {
        "convert": ("convert", tmp_path, "--for", "vllm"),
        "extract": ("extract", "--base", tmp_path, "--tuned", tmp_path, "--rank", 4),
    }
    said = refused(cli(*given[verb], "--out", "s3://models/lora"))
    assert (
        "s3://models/lora: is in an object store, and adapters are written to local directories only" in said
    )


def test_a_batch_from_a_store_is_up_to_date_until_the_base_changes(placed, below, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [
        {"adapter": placed.adapter_url, "out": "one"},
        {"adapter": {placed.adapter_url: 0.5}, "out": "two"},
    ]
    Path("jobs.yaml").write_text(json.dumps({"defaults": {"base": placed.base_url}, "jobs": jobs}))
    assert "2 done" in ok(cli("batch", "jobs.yaml")).stderr
    assert "2 kept" in ok(cli("batch", "jobs.yaml")).stderr
    store = store_at(below("pico-llama"))
    data = bytearray(store.get("model-00002-of-00003.safetensors"))
    data[-3] ^= 1
    store.put("model-00002-of-00003.safetensors", bytes(data))
    result = cli("batch", "jobs.yaml")
    assert "the base has changed" in result.stdout + result.stderr


def test_a_file_of_options_takes_urls(placed, cli, tmp_path):
    (tmp_path / "merge.yaml").write_text(
        json.dumps({"base": placed.base_url, "adapter": placed.adapter_url, "out": str(tmp_path / "out")})
    )
    ok(cli("--config", tmp_path / "merge.yaml"))
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_adapter_beside_its_base_in_one_folder(placed, below, upload, cli, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(placed.base, both)
    shutil.copytree(placed.adapter, both, dirs_exist_ok=True)
    upload(both, below("both"))
    ok(cli("--base", both, "--adapter", both, "--out", tmp_path / "here"))
    ok(cli("--base", below("both"), "--adapter", below("both"), "--out", tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")


def test_an_output_does_not_replace_its_base(placed, below, cli, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(placed.base, base)
    arguments = ("--adapter", placed.adapter_url, "--overwrite", "--out", base)
    said = refused(cli("--base", f"file://{base}", *arguments))
    assert said.splitlines()[-2:] == refused(cli("--base", base, *arguments)).splitlines()[-2:]
    for out in ("my-lora/out", "pico-llama"):
        given = (
            "--base",
            placed.base_url,
            "--adapter",
            placed.adapter_url,
            "--overwrite",
            "--out",
            below(out),
        )
        assert "the input" in refused(cli(*given))


def test_a_directory_of_that_name_does_not_win(placed, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme, _, rest = placed.base_url.partition("://")
    shutil.copytree(placed.base, Path(f"{scheme}:", rest.lstrip("/")))
    missing = f"{placed.base_url}-none"
    shutil.copytree(placed.base, Path(f"{scheme}:", missing.partition("://")[2].lstrip("/")))
    assert f"{missing}: nothing is stored there" in refused(
        cli("--base", missing, "--adapter", placed.adapter_url, "--out", "out")
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://models", "names a whole bucket"),
        ("s3://", "has no bucket"),
        ("s3://models/a/../b", "has .. in its path"),
        ("s3://models/a?versionId=3", "has a query"),
        (f"s3://me:{SECRET}@models/a", "has credentials in it"),
        ("file://host/a", "files are read on this one only"),
    ],
)
@pytest.mark.parametrize("verb", ["merge", "verify", "inspect"])
def test_a_wrong_url_is_one_sentence(verb, text, says, cli, tmp_path):
    given = {
        "merge": ("--base", text, "--adapter", tmp_path, "--out", tmp_path / "out"),
        "verify": ("verify", text),
        "inspect": ("inspect", text),
    }
    said = refused(cli(*given[verb]))
    assert says in said
    assert SECRET not in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1


def test_what_cannot_be_read_by_ranges_is_refused(placed, below, cli, tmp_path):
    import torch

    store = store_at(below("pickled"))
    for name in ("config.json", "tokenizer.json"):
        store.put(name, (placed.base / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    store.put("pytorch_model.bin", (tmp_path / "pytorch_model.bin").read_bytes())
    said = refused(
        cli("--base", below("pickled"), "--adapter", placed.adapter_url, "--out", tmp_path / "out")
    )
    assert "has its weights in pytorch_model.bin, expected safetensors" in said


def test_links_and_forward_passes_of_what_is_not_here_are_refused(placed, below, upload, cli, tmp_path):
    arguments = ("--base", placed.base_url, "--adapter", placed.adapter_url)
    said = refused(cli(*arguments, "--link", "hard", "--out", tmp_path / "out"))
    assert "only local files have links" in said
    ok(cli(*arguments, "--out", tmp_path / "out"))
    said = refused(cli("verify", tmp_path / "out", *arguments, "--forward"))
    assert "runs models from local directories only" in said


def test_what_is_missing_in_a_store_is_named_by_its_url(placed, below, cli, tmp_path, temporary):
    store = store_at(below("pico-llama"))
    store.delete(["model-00002-of-00003.safetensors"])
    arguments = ("--adapter", placed.adapter_url, "--out", tmp_path / "out")
    said = refused(cli("--base", placed.base_url, *arguments))
    assert f"{placed.base_url}: does not have model-00002-of-00003.safetensors" in said
    store.put("model-00002-of-00003.safetensors", b"{")
    store.put("config.json", b"{")
    said = refused(cli("--base", placed.base_url, *arguments))
    assert f"{placed.base_url}/config.json: is not valid JSON" in said
    assert says_urls_only(said, temporary)
    assert left_in(temporary) == []


def test_a_base_that_only_a_file_of_others_names_is_not_read(placed, below, upload, cli, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(placed.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "s3://models/somebody-elses"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    said = refused(cli("--adapter", adapter, "--out", tmp_path / "out"))
    assert "a URL that only an adapter names is not read" in said
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    manifest["base"]["path"] = "s3://models/somebody-elses"
    (tmp_path / "out" / "merge_manifest.json").write_text(json.dumps(manifest))
    result = cli("verify", tmp_path / "out")
    assert "s3://models/somebody-elses: is in an object store that only the manifest names" in result.stderr


def test_keys_that_no_file_can_have_lead_nowhere(placed, below, cli, tmp_path, request):
    url = below("pico-llama")
    if url.scheme != "s3":
        pytest.skip("files of this machine have no such names")
    client = request.getfixturevalue("moto")
    for key in ("../../../../../../evil.json", "/etc/evil.json", "a//tokenizer.json", "folder/"):
        client.put_object(Bucket=url.bucket, Key=f"{url.prefix}/{key}", Body=b"{}")
    result = cli("--base", placed.base_url, "--adapter", placed.adapter_url, "--out", tmp_path / "out")
    assert result.exit_code != exits.BUG
    assert not list(tmp_path.rglob("evil.json"))


def test_a_killed_process_leaves_a_folder_that_the_next_run_removes(placed, cli, tmp_path, temporary):
    code = (
        "import os, lora_merge\n"
        "from lora_merge.core.report import Silence\n"
        "class Dies(Silence):\n"
        "    def phase(self, name, n):\n"
        "        if name == 'verifying': os.kill(os.getpid(), 9)\n"
        f"lora_merge.merge(base={placed.base_url!r}, adapter={placed.adapter_url!r}, out='out', observer=Dies())\n"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, check=False)
    assert died.returncode == -9
    assert len(list(temporary.glob("lora-merge-copy-*"))) >= 1
    ok(cli("plan", "--base", placed.base_url, "--adapter", placed.adapter_url))
    assert left_in(temporary) == []


def test_a_shard_that_is_cut_short_is_to_be_uploaded_again(placed, below, cli, tmp_path):
    store = store_at(below("pico-llama"))
    name = "model-00002-of-00003.safetensors"
    store.put(name, store.get(name)[:-100])
    result = cli("--base", placed.base_url, "--adapter", placed.adapter_url, "--out", tmp_path / "out")
    said = refused(result)
    assert said.splitlines()[-2].startswith(f"error: {placed.base_url}/{name}: ")
    assert "upload the file again" in said.splitlines()[-1]


def test_offline_no_store_is_asked(cli, tmp_path):
    said = refused(cli("inspect", "s3://models/lora", "--offline"))
    assert "s3://models/lora: is in an object store, and offline mode is on" in said


def test_what_serves_an_output_of_a_store_is_told(placed, below, upload, cli, tmp_path):
    ok(cli("--base", placed.base, "--adapter", placed.adapter, "--out", tmp_path / "out"))
    upload(tmp_path / "out", below("out"))
    said = ok(cli("verify", below("out"), "--base", placed.base_url, "--adapter", placed.adapter_url)).stderr
    url = below("out")
    served = f"/{url.prefix}" if url.scheme == "file" else f"{url} --load-format runai_streamer"
    assert f"vllm serve {served}" in said.replace(" \\\n   ", "")


def test_a_forward_pass_of_an_adapter_from_a_store(placed, cli, tmp_path):
    """The adapter is on this machine as a whole, so PEFT can read it."""
    ok(cli("--base", placed.base, "--adapter", placed.adapter_url, "--out", tmp_path / "out"))
    ok(cli("verify", tmp_path / "out", "--base", placed.base, "--adapter", placed.adapter_url, "--forward"))
