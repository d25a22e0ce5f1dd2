"""Models and adapters on the Hub: what is fetched, what is recorded, and what is said when it cannot be had."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from lora_merge.cli import exits
from tests import twins
from tests.hub.conftest import ROOT
from tests.tampering import edit_json, edit_tensors
from tests.toys import adapter_format

TOKEN = "hf_" + "secretword" * 3


@pytest.fixture
def base(pico, copied):
    """A base beside what people put into such repos."""
    root = copied(pico(), "base")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    (root / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (root / "modeling_pico.py").write_text("# custom code\n")
    for name in (
        "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "pico.Q4_K_M.gguf", "consolidated.safetensors",
        "onnx/model.onnx", "original/consolidated.00.pth", "int8/model.onnx", "training_args.bin",
    ):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not to be fetched")
    return root


@pytest.fixture
def adapter(pico, pico_adapter, copied):
    """An adapter that names a base on the Hub, beside what training leaves."""
    root = copied(pico_adapter(pico()), "adapter")
    edit_json(root / "adapter_config.json", base_model_name_or_path="org/base", revision=None)
    torch.save(load_file(root / "adapter_model.safetensors"), root / "adapter_model.bin")  # not to be fetched
    for name in ("optimizer.pt", "runs/events"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not to be fetched")
    return root


BASE_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "modeling_pico.py", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "README.md",
}  # fmt: skip
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def merged(cli, base, adapter, out):
    """Merge local directories in this process; return the output's weights."""
    result = cli("--base", base, "--adapter", adapter, "--out", out)
    assert result.exit_code == exits.OK, result.stderr
    return weights(out)


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def manifest(out):
    return json.loads((out / "merge_manifest.json").read_text())


def test_a_base_and_an_adapter_by_their_ids_merge_as_from_directories(
    hub, command, cli, base, adapter, pico, tmp_path
):
    repos = {name: hub.add(name, root) for name, root in (("org/base", base), ("org/adapter", adapter))}
    out = tmp_path / "out"

    result = command("--base", "org/base", "--adapter", "org/adapter", "--out", out)

    assert result.returncode == exits.OK, result.stderr
    assert set(hub.fetched()) == BASE_FILES | ADAPTER_FILES
    assert weights(out) == merged(cli, pico(), adapter, tmp_path / "local")
    assert (out / "modeling_pico.py").read_text() == "# custom code\n"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert "downloading org/base" in result.stderr
    recorded = manifest(out)
    commit = repos["org/base"].commits["main"]
    assert recorded["base"] == {
        "path": "org/base", "hub": "Hugging Face", "id": "org/base", "revision": None, "commit": commit,
    }  # fmt: skip
    assert recorded["adapters"][0]["commit"] == repos["org/adapter"].commits["main"]
    card = (out / "README.md").read_text()
    assert "base_model: org/base\n" in card
    assert "adapters:\n- org/adapter\nlicense: mit\n" in card
    assert f"| base | `org/base`, commit `{commit}` |" in card


WITH_TOY = """\
from lora_merge.adapters import FORMATS
from lora_merge.cli import main
from tests.toys.adapter_format import CRATE

FORMATS["crate"] = CRATE
main()
"""


def test_an_adapter_of_a_format_that_is_one_line_more_is_fetched(
    hub, environment, cli, pico, pico_adapter, tmp_path
):
    """The table of formats says which file of tensors a repo has."""
    adapter = pico_adapter(pico())
    hub.add("org/crate", adapter_format.pack(adapter, tmp_path / "crate"))
    out = tmp_path / "out"
    arguments = ("--base", pico(), "--adapter", "org/crate", "--out", out)
    command = [sys.executable, "-W", "ignore", "-c", WITH_TOY, *map(str, arguments)]

    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == exits.OK, result.stderr
    assert set(hub.fetched()) == {"adapter_config.json", adapter_format.WEIGHTS}
    assert weights(out) == merged(cli, pico(), adapter, tmp_path / "local")


def test_a_second_run_fetches_nothing_and_writes_the_same_manifest(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    arguments = ("--base", "org/base", "--adapter", "org/adapter", "--out")
    assert command(*arguments, tmp_path / "one").returncode == exits.OK
    hub.requests.clear()

    again = command(*arguments, tmp_path / "two")

    assert again.returncode == exits.OK, again.stderr
    assert hub.fetched() == []
    assert "downloading" not in again.stderr
    one, two = ((tmp_path / name / "merge_manifest.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_only_the_shards_of_the_index_are_fetched(hub, command, cli, pico, adapter, copied, tmp_path):
    sharded = copied(pico("llama", "bfloat16", "20KB"), "sharded")
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 2
    (sharded / "model.safetensors").write_bytes(b"not to be fetched")
    (sharded / "model-00001-of-00099.safetensors").write_bytes(b"not to be fetched")
    hub.add("org/base", sharded)
    hub.add("org/adapter", adapter)

    result = command("--base", "hf://org/base", "--adapter", "hf://org/adapter", "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    files = (BASE_FILES - {"model.safetensors", "modeling_pico.py"}) | {"model.safetensors.index.json"}
    assert set(hub.fetched()) == files | ADAPTER_FILES | shards
    assert weights(tmp_path / "out") == merged(
        cli, pico("llama", "bfloat16", "20KB"), adapter, tmp_path / "local"
    )


def test_pickled_weights_are_fetched_only_where_there_are_no_others(
    hub, command, base, adapter, copied, tmp_path
):
    (base / "model.safetensors").unlink()
    old = copied(adapter, "old")
    (old / "adapter_model.safetensors").unlink()
    hub.add("org/base", base)
    hub.add("org/adapter", old)

    command("--base", "org/base", "--adapter", "org/adapter", "--out", tmp_path / "out")
    command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert {name for name in hub.fetched() if name.endswith(".bin")} == {
        "adapter_model.bin",
        "pytorch_model.bin",
    }


def test_whole_parameters_beside_an_adapter_are_fetched_and_merged(hub, command, base, adapter, tmp_path):
    norm = torch.rand(64, dtype=torch.bfloat16)
    torch.save({"base_model.model.model.norm.weight": norm}, adapter / "non_lora_trainables.bin")
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)

    result = command("--base", "org/base", "--adapter", "org/adapter", "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    assert "non_lora_trainables.bin" in hub.fetched()
    assert "adapter_model.bin: is a second copy of the adapter and was not downloaded" in result.stderr
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], norm)


def test_a_weight_file_that_nothing_reads_is_refused_before_any_weight_is_fetched(
    hub, command, base, adapter, tmp_path
):
    (adapter / "value_head.safetensors").write_bytes(b"weights")
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    arguments = ("--base", "org/base", "--adapter", "org/adapter", "--out", tmp_path / "out")

    result = command(*arguments)

    assert result.returncode == exits.PLAN
    assert "value_head.safetensors: has the value head of a reward model" in result.stderr
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))]
    again = command(*arguments, "--ignore-file", "value_head.safetensors")
    assert again.returncode == exits.OK, again.stderr
    assert manifest(tmp_path / "out")["options"]["ignore_file"] == ["value_head.safetensors"]
    absent = command(*arguments[:-1], tmp_path / "other", "--ignore-file", "absent.bin")
    assert absent.returncode != exits.OK
    assert "ignore_file: no adapter has a file absent.bin; looked in org/adapter" in absent.stderr


@pytest.fixture
def moved(adapter, base, copied):
    """Another version of base and adapter each."""
    new_base, new_adapter = copied(base, "new-base"), copied(adapter, "new-adapter")
    (new_adapter / "adapter_model.bin").unlink()
    edit_tensors(
        new_base / "model.safetensors", lambda table: table.update({k: 2 * v for k, v in table.items()})
    )
    edit_tensors(
        new_adapter / "adapter_model.safetensors",
        lambda table: table.update({k: -v for k, v in table.items()}),
    )
    return new_base, new_adapter


def test_base_and_adapter_have_revisions_of_their_own(hub, command, cli, base, adapter, moved, tmp_path):
    new_base, new_adapter = moved
    tagged = hub.add("org/base", base, v2=new_base)
    hub.add("org/adapter", adapter, **{"refs/pr/1": new_adapter})
    out = tmp_path / "out"

    result = command(
        "--base", f"org/base@{tagged.commits['v2']}", "--adapter", "org/adapter@refs/pr/1:0.5", "--out", out
    )

    assert result.returncode == exits.OK, result.stderr
    assert weights(out) == merged(cli, new_base, f"{new_adapter}:0.5", tmp_path / "local")
    recorded = manifest(out)
    assert recorded["base"]["revision"] == recorded["base"]["commit"] == tagged.commits["v2"]
    assert recorded["adapters"][0]["revision"] == "refs/pr/1"
    assert recorded["adapters"][0]["weight"] == 0.5


def test_the_base_and_its_revision_may_be_left_to_the_adapter(
    hub, command, cli, base, adapter, moved, tmp_path
):
    edit_json(adapter / "adapter_config.json", revision="v2")
    hub.add("org/base", base, v2=moved[0])
    hub.add("org/adapter", adapter)

    result = command("--adapter", "org/adapter", "--out", tmp_path / "out", "--strict")

    assert result.returncode == exits.OK, result.stderr
    assert weights(tmp_path / "out") == merged(cli, moved[0], adapter, tmp_path / "local")
    assert manifest(tmp_path / "out")["base"]["path"] == "org/base@v2"


def test_the_base_may_be_left_to_what_ms_swift_was_called_with(hub, command, base, adapter, moved, tmp_path):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/root/.cache/models/org/base")
    arguments = {"model": "org/base", "model_revision": "v2", "use_hf": True}
    (adapter / "args.json").write_text(json.dumps(arguments))
    hub.add("org/base", base, v2=moved[0])

    result = command("--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    assert manifest(tmp_path / "out")["base"]["path"] == "org/base@v2"


def test_a_base_of_another_revision_than_the_adapter_names_is_a_warning(
    hub, command, base, adapter, moved, tmp_path
):
    edit_json(adapter / "adapter_config.json", revision="v2")
    hub.add("org/base", base, v2=moved[0])

    result = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")
    strict = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "strict", "--strict")
    same = command("--base", "org/base@v2", "--adapter", adapter, "--out", tmp_path / "same", "--strict")

    assert result.returncode == exits.OK, result.stderr
    assert "warning: org/base: the base is at revision main" in result.stderr
    assert (
        "names revision v2: the base may have changed since the training\nhint: use the revision that the adapter names: --base org/base@v2"
        in result.stderr
    )
    assert strict.returncode == exits.PLAN
    assert same.returncode == exits.OK, same.stderr


def test_an_adapter_may_lie_in_a_folder_of_its_repo(hub, command, cli, base, adapter, moved, tmp_path):
    repo = adapter.parent / "run"
    (repo / "steps").mkdir(parents=True)
    adapter.rename(repo / "steps" / "checkpoint-9")
    moved[1].rename(repo / "steps" / "checkpoint-18")
    hub.add("org/base", base)
    hub.add("org/run", repo)
    out = tmp_path / "out"

    result = command("--adapter", "org/run/steps/checkpoint-9@main:2", "--out", out)
    above = command("--adapter", "org/run", "--out", tmp_path / "above")
    beside = command("--adapter", "org/run/steps/checkpoint-10", "--out", tmp_path / "beside")

    assert result.returncode == exits.OK, result.stderr
    assert weights(out) == merged(cli, base, f"{repo}/steps/checkpoint-9:2", tmp_path / "local")
    assert not any("checkpoint-18" in name for name in hub.fetched())
    assert manifest(out)["adapters"][0]["folder"] == "steps/checkpoint-9"
    assert above.returncode == beside.returncode == exits.RESOLVE
    assert "org/run: has no adapter_config.json" in above.stderr
    assert (
        "pass one of its folders with an adapter, as org/name/FOLDER: steps/checkpoint-18, steps/checkpoint-9"
        in above.stderr
    )
    assert "the repo has no folder steps/checkpoint-10" in beside.stderr
    assert "steps/checkpoint-9" in beside.stderr


def test_what_ms_swift_saved_beside_the_folder_comes_along(hub, command, cli, base, adapter, tmp_path):
    root = tmp_path / "swift"
    folder = twins.swift(adapter, root)
    norm = load_file(base / "model.safetensors")["model.norm.weight"] * 2
    keys = {"extra_state_keys": [r"model\.norm\..*"]}
    twins.save(root / "extra_states", keys, {"model.norm.weight": norm}, "adapter_model.safetensors")
    (root / "other").mkdir()
    (root / "other" / "adapter_config.json").write_text("{}")
    hub.add("org/base", base)
    hub.add("org/swift", root)
    out = tmp_path / "out"

    result = command("--base", "org/base", "--adapter", "org/swift/default", "--out", out)

    assert result.returncode == exits.OK, result.stderr
    assert weights(out) == merged(cli, base, folder, tmp_path / "local")
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], norm)
    assert not any("other" in name for name in hub.fetched())


def test_a_directory_of_the_name_wins_without_a_request(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    base.rename(tmp_path / "work" / "base")
    (tmp_path / "work" / "org").mkdir()
    (tmp_path / "work" / "base").rename(tmp_path / "work" / "org" / "base")

    result = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    assert hub.requests == []
    assert manifest(tmp_path / "out")["base"] == {"path": "org/base"}


def test_a_private_repo_takes_a_token_which_is_written_nowhere(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base, token=TOKEN)
    arguments = ("--base", "org/base", "--adapter", adapter, "--json", "--out")

    none = command(*arguments, tmp_path / "none")
    wrong = command(*arguments, tmp_path / "wrong", "--token", "hf_wrongword")
    flag = command(*arguments, tmp_path / "flag", "--token", TOKEN)
    variable = command(*arguments, tmp_path / "variable", env={"HF_TOKEN": TOKEN})

    assert none.returncode == wrong.returncode == exits.RESOLVE
    assert (
        "org/base: this directory does not exist, and the Hub has no such repo, or it is private"
        in none.stderr
    )
    assert "--token" in none.stderr
    assert "the Hub does not accept the token" in wrong.stderr
    assert flag.returncode == variable.returncode == exits.OK, flag.stderr + variable.stderr
    for result in (wrong, flag, variable):
        assert "secretword" not in result.stdout + result.stderr
        assert "wrongword" not in result.stdout + result.stderr
    written = [
        path for name in ("flag", "variable") for path in (tmp_path / name).rglob("*") if path.is_file()
    ]
    assert written
    assert not [path for path in written if b"secretword" in path.read_bytes()]


def test_a_token_that_cannot_be_one_is_not_repeated(hub, command, adapter, tmp_path):
    request = tmp_path / "request.yaml"
    request.write_text(f"base: org/base\nadapter: {adapter}\nout: out\ntoken: [secretword]\n")

    flag = command("--base", "org/base", "--adapter", adapter, "--out", "out", "--token", "secretword\nx: y")
    file = command("--config", request)

    assert flag.returncode == file.returncode == exits.USAGE
    assert "is not a token" in flag.stderr
    assert "request.yaml:4: token: is not a token" in file.stderr
    assert "secretword" not in flag.stderr + file.stderr
    assert hub.requests == []


def test_a_request_shows_no_token():
    from lora_merge.requests.request import Request

    assert "secretword" not in repr(Request(adapter=("a",), out="b", token=TOKEN))


def test_a_request_file_names_repos_a_token_and_offline(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base, token=TOKEN)
    hub.add("org/adapter", adapter)
    request = tmp_path / "request.yaml"
    request.write_text(
        f"base: org/base\nadapter: [org/adapter@main:0.5]\nout: {tmp_path / 'out'}\ntoken: {TOKEN}\n"
    )

    result = command("--config", request)
    again = command("--config", request, "--offline", "--overwrite")

    assert result.returncode == again.returncode == exits.OK, result.stderr + again.stderr


def test_a_gated_repo_says_where_its_licence_is_accepted(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base, token=TOKEN, gated=True)

    result = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE
    assert "org/base: is gated or private, and you have no access" in result.stderr
    assert "accept the licence at https://huggingface.co/org/base" in result.stderr


@pytest.fixture
def repos(hub, base, adapter, pico, copied):
    """Repos that are whole, of GGUF alone, and without one of their shards."""
    empty, holed = copied(pico(), "empty"), copied(pico("llama", "bfloat16", "20KB"), "holed")
    (empty / "model.safetensors").rename(empty / "pico.gguf")
    next(holed.glob("model-00002-of-*")).unlink()
    for name, root in (("base", base), ("adapter", adapter), ("empty", empty), ("holed", holed)):
        hub.add(f"org/{name}", root)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--base", "org/base@v9"), "org/base@v9: the repo has no revision v9"),
        (("--base", "org/base@main/sub"), "write a folder before the @"),
        (("--base", "hf://org/nothing"), "error: org/nothing: the Hub has no such repo"),
        (
            ("--base", "org/nothing"),
            "org/nothing: this directory does not exist, and the Hub has no such repo",
        ),
        (
            ("--base", "org/adapter"),
            "org/adapter: is an adapter, not a model (it has adapter_config.json)",
        ),
        (("--base", "org/adapter"), "hint: pass the model that it was trained on as --base"),
        (("--base", "org/empty"), "org/empty: has no weights that can be merged into (it has pico.gguf)"),
        (("--base", "org/holed"), "org/holed: does not have model-00002-of"),
        (("--base", "./nothing"), "./nothing: this directory does not exist"),
    ],
)
def test_what_is_not_there_is_one_sentence(arguments, words, repos, hub, command, adapter, tmp_path):
    result = command(*arguments, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(name.endswith((".safetensors", ".gguf")) for name in hub.fetched())


def test_a_model_passed_as_an_adapter_is_named(hub, command, base, tmp_path):
    hub.add("org/base", base)

    result = command("--base", "org/base", "--adapter", "org/base", "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE
    assert "pass it as --base" in result.stderr
    assert hub.fetched() in ([], ["config.json"])


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_takes_the_cache_and_asks_nobody(how, hub, command, base, adapter, tmp_path):
    hub.add("org/base", base, v2=base)
    hub.add("org/adapter", adapter)
    arguments = ["--base", "org/base@v2", "--adapter", "org/adapter", "--out"]
    assert command(*arguments, tmp_path / "online").returncode == exits.OK
    hub.requests.clear()
    flags, env = (["--offline"], {}) if how == "flag" else ([], {"HF_HUB_OFFLINE": "1"})

    result = command(*arguments, tmp_path / "out", *flags, "--strict", env=env)

    assert result.returncode == exits.OK, result.stderr
    assert hub.requests == []
    assert manifest(tmp_path / "out") == manifest(tmp_path / "online")


def test_offline_says_what_the_cache_lacks(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    arguments = ("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out", "--overwrite")

    nothing = command(*arguments, "--offline")
    command(*arguments)
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--org--base" / "snapshots").iterdir()
    (snapshot / "tokenizer.json").unlink()
    side_file = command(*arguments, "--offline")
    (snapshot / "model.safetensors").unlink()
    weight_file = command(*arguments, "--offline")
    other = command("--base", "org/base@v2", *arguments[2:], "--offline")

    assert nothing.returncode == weight_file.returncode == other.returncode == exits.RESOLVE
    assert "and the repo is not found in the local cache (revision main)" in nothing.stderr
    assert side_file.returncode == exits.OK, side_file.stderr
    assert (
        "warning: org/base: the local cache does not have tokenizer.json, so the output will not have it either"
        in side_file.stderr
    )
    assert (
        "org/base: model.safetensors not found in the local cache, and offline mode is on"
        in weight_file.stderr
    )
    assert "not found in the local cache (revision v2)" in other.stderr
    for result in (nothing, weight_file, other):
        assert "hint: run once without --offline (and without HF_HUB_OFFLINE)" in result.stderr


def test_a_hub_that_cannot_be_reached_is_named_and_so_is_the_cache(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    arguments = ("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out", "--overwrite")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}

    fresh = command(*arguments, env=nowhere)
    command(*arguments)
    cached = command(*arguments, env=nowhere)

    assert fresh.returncode == cached.returncode == exits.RESOLVE
    assert "the Hub cannot be reached (ConnectError)" in fresh.stderr
    assert "check the network" in fresh.stderr
    assert (
        f"pass --offline to use commit {hub.repos['org/base'].commits['main']} from the local cache"
        in cached.stderr
    )
    assert "--offline" in cached.stderr


def test_a_download_that_breaks_off_is_taken_up_where_it_was(hub, command, base, adapter, tmp_path):
    """huggingface_hub keeps what it has in blocks of 10 MiB."""
    (base / "speakers.npy").write_bytes(bytes(range(256)) * (96 << 10))
    hub.add("org/base", base)
    hub.cut |= {"speakers.npy": 1, "model.safetensors": 1}

    result = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.OK, result.stderr
    assert [headers["Range"] for headers in hub.headers if "Range" in headers] == ["bytes=10485760-"]
    assert (tmp_path / "out" / "speakers.npy").read_bytes() == (base / "speakers.npy").read_bytes()
    assert (
        len([path for method, path in hub.requests if method == "GET" and path.endswith("model.safetensors")])
        == 2
    )


def test_a_server_that_fails_leaves_no_output_and_no_half_file(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    hub.failing["model.safetensors"] = 500

    result = command("--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out")

    assert result.returncode == exits.RESOLVE, result.stderr
    assert "org/base: the Hub answered with status 500" in result.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_a_cache_that_cannot_take_the_weights_is_named(hub, command, base, adapter, tmp_path):
    hub.add("org/base", base)
    limit = (base / "model.safetensors").stat().st_size // 2

    result = command(
        "--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip

    assert result.returncode == exits.RESOLVE, result.stderr
    assert "org/base: cannot be stored in the cache (File too large)" in result.stderr
    assert "HF_HOME" in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_download_at_once(signum, hub, environment, base, adapter, tmp_path):
    hub.add("org/base", base)
    hub.stall["model.safetensors"] = threading.Event()
    arguments = ["--base", "org/base", "--adapter", adapter, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "lora_merge", *map(str, arguments)],
        env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert hub.stalled.wait(60)

    began = time.monotonic()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)

    assert process.returncode == exits.INTERRUPTED, stderr
    assert time.monotonic() - began < 10
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("Qwen/Qwen3-8B-GGUF", "Qwen/Qwen3-8B"),
        ("ggml-org/Qwen3-8B-Q4_K_M-GGUF", "ggml-org/Qwen3-8B"),
        ("org/Qwen3-8B-HQQ-4bit", "org/Qwen3-8B"),
        ("org/Qwen3-8B-exl2", "org/Qwen3-8B"),
    ],
)
def test_a_name_of_weights_that_are_not_read_is_refused_without_a_request(
    name, parent, cli, pico, pico_adapter, tampered
):
    adapter = tampered(pico_adapter(pico()), "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)

    for arguments in (("--base", name, "--adapter", "org/adapter"), ("--adapter", adapter)):
        result = cli(*arguments, "--out", "nowhere")

        assert result.exit_code == exits.PLAN, result.stderr
        assert f"{name}: the base is stored as" in result.stderr
        assert f"probably --base {parent}\n" in result.stderr


def test_a_name_of_weights_that_are_not_read_is_refused_before_any_request(hub, command, tmp_path):
    result = command("--base", "org/base-GGUF", "--adapter", "org/adapter", "--out", tmp_path / "out")

    assert result.returncode == exits.PLAN
    assert hub.requests == []


def test_a_directory_with_such_a_name_is_judged_by_its_content(cli, pico, pico_adapter, tampered, tmp_path):
    base = tampered(pico(), "pico-4bit")

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr


def test_a_quantised_base_is_refused_before_weights_are_fetched(hub, command, base, adapter, tmp_path):
    edit_json(base / "config.json", quantization_config={"quant_method": "hqq"})
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)

    result = command("--base", "org/base", "--adapter", "org/adapter", "--out", tmp_path / "out")

    assert result.returncode == exits.PLAN
    assert "the base is stored quantised with HQQ" in result.stderr
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_base_is_fetched(
    hub, command, base, adapter, tmp_path
):
    edit_json(adapter / "adapter_config.json", peft_type="PROMPT_TUNING")
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)

    result = command("--base", "org/base", "--adapter", "org/adapter", "--out", tmp_path / "out")

    assert result.returncode == exits.PLAN
    assert "model.safetensors" not in hub.fetched()


def test_a_dry_run_and_the_python_functions_take_repos(hub, command, environment, base, adapter, tmp_path):
    hub.add("org/base", base, token=TOKEN)
    hub.add("org/adapter", adapter)
    code = (
        "import lora_merge; "
        f"plan = lora_merge.plan(base='org/base', adapter='org/adapter', token={TOKEN!r}); "
        f"report = lora_merge.merge(base='org/base', adapter='org/adapter', out={str(tmp_path / 'out')!r}, offline=True); "
        "print(report.summary.n_merged == plan.summary(1, 0).n_merged > 0)"
    )

    dry = command("--adapter", "org/adapter", "--out", tmp_path / "dry", "--dry-run", "--token", TOKEN)
    python = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert dry.returncode == exits.OK, dry.stderr
    assert not (tmp_path / "dry").exists()
    assert python.stdout.strip().endswith("True"), python.stderr


def test_processes_read_a_streamed_base_by_themselves_with_the_token_of_the_environment(
    hub, command, base, pico, pico_adapter, tmp_path
):
    hub.add("org/private", base, token=TOKEN)
    options = ("--base", "org/private", "--adapter", pico_adapter(pico()))
    env = {"HF_TOKEN": TOKEN}
    processes = ("--stream-base", "--executor", "processes", "--workers", "2")
    streamed = command(*options, *processes, "--out", tmp_path / "one" / "out", env=env)
    assert streamed.returncode == exits.OK, streamed.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    downloaded = command(*options, "--out", tmp_path / "two" / "out", env=env)
    assert downloaded.returncode == exits.OK, downloaded.stderr
    assert weights(tmp_path / "one" / "out") == weights(tmp_path / "two" / "out")
