"""What folders, files and paths are that are not what they were named as: a sentence that sends people the right way."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.formats.pickles import read_pickle
from lora_merge.formats.recognise import fault_of, in_order, names_in
from lora_merge.formats.safetensors import read_header
from lora_merge.storage.instead import instead_of, is_pointer
from lora_merge.storage.paths import missing_hint
from lora_merge.storage.small_files import read_json
from tests.tampering import edit_json

BASE, ADAPTER = ["config.json", "model.safetensors"], ["adapter_config.json", "adapter_model.safetensors"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


@pytest.mark.parametrize(
    ("names", "role", "says", "hint"),
    [
        ([], "base", "is an empty folder", "check the path"),
        (BASE, "adapter", "is a whole model, not an adapter", "pass it as --base"),
        (ADAPTER, "base", "is an adapter, not a model (it has adapter_config.json)", "pass both with --adapter"),
        ([*ADAPTER, "config.json"], "base", "is an adapter, not a model", "as --base"),
        (["adapter_config.json", "README.md"], "adapter", "has adapter_config.json and no weights: adapter_model.safetensors", "download"),
        (["adapter_config.json", "training_args.bin"], "adapter", "has adapter_config.json and no weights", "download"),
        (["adapter_model.bin"], "adapter", "has adapter_model.bin and no adapter_config.json", "download adapter_config"),
        (["model.safetensors"], "base", "has model.safetensors and no config.json", "download config.json"),
        (["config.json", "tokenizer.json"], "base", "has config.json and no weights", "download the weights too"),
        (["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "base", "their index model.safetensors.index.json is missing", "download model.safetensors.index.json"),
        (["config.json", "pytorch_model-00001-of-00003.bin"], "base", "has 1 of 3 weight files", "and the other files"),
        (["zero_to_fp32.py", "latest", "global_step9/mp_rank_00_model_states.pt"], "base", "has a sharded training state of DeepSpeed ZeRO", "zero_to_fp32.py FOLDER"),
        (["adapter_config.json", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "adapter", "has a sharded training state of DeepSpeed ZeRO", "zero_to_fp32.py"),
        (["config.json", "pytorch_model_fsdp_0/__0_0.distcp"], "base", "has a sharded training state of FSDP", "accelerate merge-weights"),
        (["model_world_size_2_rank_0.pt"], "adapter", "has a sharded training state of verl (FSDP)", "verl.model_merger"),
        (["latest_checkpointed_iteration.txt", "global_step_10/actor"], "adapter", "has a sharded training state of verl (FSDP)", "verl.model_merger"),
        (["actor/model_world_size_2_rank_0.pt", "data.pt"], "base", "has a sharded training state of verl (FSDP)", "verl.model_merger"),
        (["global_step_9/model_world_size_2_rank_0.pt"], "base", "has a sharded training state of verl (FSDP)", "verl.model_merger"),
        (["latest_checkpointed_iteration.txt", "iter_0000010/common.pt"], "base", "has a sharded training state of Megatron", "export"),
        (["config.json", "consolidated.safetensors", "params.json"], "base", "in Mistral's or Meta's own format", "model*.safetensors"),
        (["consolidated.00.pth", "params.json"], "base", "in Mistral's or Meta's own format", "config.json"),
        (["llama.Q4_K_M.gguf"], "base", "has the model as GGUF (llama.Q4_K_M.gguf)", "converted from"),
        (["lora.gguf"], "adapter", "has the model as GGUF", "converted from"),
        (["my-lora.zip"], "adapter", "contains an archive (my-lora.zip)", "unpack it"),
        (["model.tar.gz", "README.md"], "base", "contains an archive", "unpack it"),
        (["config.json", "tf_model.h5"], "base", "another framework than PyTorch (tf_model.h5)", "save_pretrained()"),
        (["config.json", "flax_model.msgpack"], "base", "another framework", "save_pretrained()"),
        (["model.safetensors.incomplete", "config.json"], "base", "contains an incomplete download", "download it again"),
        (["pytorch_lora_weights.safetensors"], "adapter", "is a LoRA for diffusers", "fuse_lora"),
        (["model_index.json", "unet/config.json"], "base", "is a diffusers pipeline", "text_encoder"),
        (["adapter_config.json", "pytorch_adapter.bin", "head_config.json"], "adapter", "AdapterHub", "merge_adapter"),
        (["adapters.npz", "adapter_config.json"], "adapter", "mlx-lm under another name (adapters.npz)", "adapters.safetensors"),
        (["0000100_adapters.safetensors", "adapter_config.json"], "adapter", "mlx-lm under another name", "adapters.safetensors"),
        (["lit_model.pth.lora"], "adapter", "LitGPT", "litgpt merge_lora"),
        (["adapter_0.pt", "recipe_state.pt"], "adapter", "torchtune", "adapter_model.safetensors"),
        (["optimizer.pt", "trainer_state.json"], "adapter", "has a training state", "another folder"),
        (["checkpoint-10/config.json", "checkpoint-9/config.json"], "base", "2 folders in it may have one: checkpoint-9, checkpoint-10", "pass one of them: runs/checkpoint-10"),
    ],
)  # fmt: skip
def test_a_folder_is_called_what_it_is(names, role, says, hint):
    fault = fault_of(names, role, "runs/")

    assert fault is not None
    assert says in fault.sentence
    assert hint in fault.hint


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_a_folder_of_anything_is_called_nothing(role):
    assert fault_of(["thesis.tex", "figures/one.png"], role) is None


def test_names_are_those_of_a_folder_and_of_the_folders_in_it(tmp_path):
    for name in ("b-10/x/deep", "b-9/one", "a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    assert names_in(tmp_path) == ("a", "b-9/one", "b-10/x")
    assert sorted(["c-10", "c-9", "c"], key=in_order) == ["c", "c-9", "c-10"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"\n <html lang=en>", "is a web page"),
        (b'<?xml version="1.0"?><Error>', "is a web page"),
        (b"Repository not found", "is an error message of a server"),
        (b"Invalid username or password.", "is an error message of a server"),
        (b"", "is empty (0 bytes)"),
        (bytes(600), "begins with zeros only"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"\x1f\x8b\x08", "is a gzip archive"),
        (b"x" * 257 + b"ustar", "is a tar archive"),
        (b"\xff\xfe{\0", "is UTF-16 text"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ],
)
@pytest.mark.parametrize("read", [read_header, read_pickle, read_json])
def test_a_file_is_called_what_it_is(content, says, read, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}: {says}")
    assert caught.value.hint


def test_json_that_breaks_off_says_so_and_other_faults_do_not(tmp_path):
    path = tmp_path / "config.json"
    hints = []
    for text in ('{"a": [1, 2', '{"a": 1, "b"', '{"a": 1,, "b": 2}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="is not valid JSON") as caught:
            read_json(path)
        hints.append("is incomplete" in caught.value.hint)

    assert hints == [True, True, False]


def test_weights_that_are_what_they_should_be_are_called_nothing_else(pico, tmp_path):
    assert instead_of(pico() / "model.safetensors") is None
    assert instead_of(tmp_path / "nothing") is None
    assert not is_pointer(pico() / "config.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("'DIR'", "remove the quotes"),
        ('"DIR"', "remove the quotes"),
        ("DIR ", "remove the space at the start or end"),
        ("https://huggingface.co/org/name", "pass the repo instead of the web page: --base org/name"),
        ("huggingface.co/org/name/tree/v1/sub", "pass the repo instead of the web page: --base org/name/sub@v1"),
        ("https://modelscope.cn/models/org/name", "pass the repo instead of the web page: --base ms://org/name"),
        ("https://example.org/x.zip", "download it"),
        ("oss://bucket/x", "download it"),
        ("s3:/bucket/x", "write :// behind the scheme"),
        ("gs//bucket/x", "write :// behind the scheme"),
        ("az:bucket/x", "write :// behind the scheme"),
        ("s3a://bucket/x", "URLs that work begin with s3://"),
        ("$HOME/model", "shell variables are not expanded"),
        ("%USERPROFILE%/model", "shell variables are not expanded"),
        ("C:\\models\\x", "this is a Windows path"),
        ("models/*", "wildcards work in batch files only"),
        ("./~/model", "write ~ only at the start"),
        ("DIR:0,5", "write the weight with a point: DIR:0.5"),
        ("DIR:0.5", "leave out :0.5; only a merge takes weights"),
        ("DIR:half", "'half' is not a number"),
        ("DIR:50%", "'50%' is not a number"),
        ("DIR/llama", "did you mean DIR/llama-3?"),
        ("DIR/none/of/it", "check the path: only DIR exists"),
        ("DIR/link", "repair the link: its target"),
        ("nothing", "pass a directory, or a repo"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_answered_with_what_it_may_mean(text, says, tmp_path):
    (tmp_path / "llama-3").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")

    found = missing_hint(text.replace("DIR", str(tmp_path)), "base")

    assert says.replace("DIR", str(tmp_path)) in found


def test_inputs_are_called_what_they_are_by_the_command(pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = pico(), pico_adapter(pico())
    broken = tampered(base, "broken")
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").symlink_to("../blobs/gone")
    pointed = tampered(base, "pointed")
    (pointed / "tokenizer.json").write_bytes(POINTER)
    beside = tampered(adapter, "beside")
    (beside / "tokenizer.json").write_bytes(POINTER)
    pages = tampered(adapter, "pages")
    (pages / "tokenizer.json").write_text("<!DOCTYPE html><html></html>")
    archive = tmp_path / "base.zip"
    archive.write_bytes(b"PK\3\4")
    cases = {
        (adapter, base): "--base and --adapter are swapped",
        (adapter, adapter): "is an adapter, not a model",
        (base, base): "is a whole model, not an adapter",
        (broken, adapter): "is a link to ../blobs/gone, which does not exist",
        (pointed, adapter): "tokenizer.json: is a Git LFS pointer",
        (base, beside): "tokenizer.json: is a Git LFS pointer",
        (base, pages): "tokenizer.json: is a web page",
        (base / "model.safetensors", adapter): f"pass its folder: {base}",
        (base, adapter / "adapter_model.safetensors"): f"pass its folder: {adapter}",
        (archive, adapter): "unpack it",
    }

    for (one, other), says in cases.items():
        result = cli("--base", one, "--adapter", other, "--out", tmp_path / "out")
        assert result.exit_code == 3, result.stderr
        assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_pointer_that_no_model_is_loaded_from_is_a_note(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    (base / "logo.png").write_bytes(POINTER)

    result = cli("plan", "--base", base, "--adapter", pico_adapter(pico()))

    assert result.exit_code == 0, result.stderr
    assert "logo.png is a Git LFS pointer, and was copied as it is" in result.stderr


def test_a_base_that_was_saved_unmerged_is_refused(pico, pico_adapter, tampered, cli, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base = tampered(pico(), "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    for role, shape in (("lora_A", (4, 64)), ("lora_B", (32, 4))):
        tensors[f"{name}.{role}.default.weight"] = torch.ones(shape)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == 3
    assert f"{name}.base_layer.weight: is a layer of PEFT" in result.stderr
    assert "the model was saved without merging" in result.stderr


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 4, "target_modules": ["q_proj"]}, "is missing, so adapter_config.json is not PEFT's (it has the fields r, target_modules)"),
        ({}, "it has no fields"),
        ({"framework": "jax-tunix-qwix", "lora_rank": 4}, "it looks like one of tunix"),
        ({"config": {}, "model_name": "bert", "hidden_size": 8, "name": "x"}, "AdapterHub's library adapters"),
        ({"model_type": "llama", "hidden_size": 8}, "the config.json of a whole model"),
        ({"error": "Repository not found"}, "it has the fields error"),
        ({"peft_type": None, "r": 4}, "is missing"),
        ({"peft_type": "lora"}, "is 'lora', which is not a type of PEFT 0.21\nhint: write LORA, as PEFT does"),
        ({"peft_type": "SORA"}, "update lora-merge: a newer release may support it"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_pefts_is_called_so(config, says, pico, pico_adapter, tampered, cli):
    adapter = tampered(pico_adapter(pico()))
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    result = cli("plan", "--base", pico(), "--adapter", adapter)

    assert result.exit_code == 4, result.stderr
    assert f"peft_type: {says}" in result.stderr or says in result.stderr


def test_folders_that_may_not_be_searched_are_a_sentence(tmp_path, monkeypatch):
    from pathlib import Path

    from lora_merge.planning.locate import find

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ResolveError, match=r"cannot be read \(permission denied\)"):
        find(str(tmp_path / "x"), "base")
    with pytest.raises(ResolveError, match="cannot be read"):
        find("n" * 5000, "base")


def test_the_last_of_numbered_adapters_is_offered(pico_adapter, pico, tmp_path):
    from lora_merge.adapters import read

    for n in (9, 10, 100):
        shutil.copytree(pico_adapter(pico()), tmp_path / f"checkpoint-{n}")

    with pytest.raises(ResolveError, match="checkpoint-9, checkpoint-10, checkpoint-100") as caught:
        read(tmp_path)

    assert caught.value.hint.endswith(f"{os.sep}checkpoint-100")


def test_a_name_that_is_too_long_is_a_sentence_and_no_traceback(pico, pico_adapter, tampered, cli, tmp_path):
    base, long = pico(), "x" * 300
    adapter = tampered(pico_adapter(base))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=f"./{long}")
    cases = {
        ("--base", base, "--adapter", long, "--out", tmp_path / "out"): (3, "cannot be read (file name too long)"),
        ("--adapter", adapter, "--out", tmp_path / "out"): (3, "this directory does not exist here"),
        ("--base", base, "--adapter", adapter, "--out", tmp_path / long): (5, "choose a shorter --out"),
        ("verify", tmp_path / long): (3, "cannot be read (file name too long)"),
    }  # fmt: skip

    for arguments, (code, says) in cases.items():
        result = cli(*arguments)
        assert result.exit_code == code, result.output
        assert says in result.stderr


def test_adapters_two_folders_down_are_listed_and_one_of_them_is_proposed(pico_adapter, pico, cli, tmp_path):
    for step in (9, 10):
        shutil.copytree(pico_adapter(pico()), tmp_path / "runs" / "a" / f"checkpoint-{step}")

    result = cli("inspect", tmp_path / "runs")

    assert result.exit_code == 3
    assert (
        "has no adapter at its top level; deeper folders have a/checkpoint-9, a/checkpoint-10"
        in result.stderr
    )
    assert f"hint: pass the folder of one of them: {tmp_path}/runs/a/checkpoint-10" in result.stderr


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "is an empty folder"),
        (ADAPTER, "is an adapter, not a model"),
        (["a.gguf"], "has the model as GGUF"),
    ],
)
def test_what_never_was_an_output_is_not_verified_as_a_damaged_one(files, says, cli, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")

    result = cli("verify", tmp_path)

    assert result.exit_code == 3
    assert f"{tmp_path}: {says}" in result.stderr
