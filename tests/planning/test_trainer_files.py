"""Which files of an adapter's folder may hold weights, which are training state, and what is said of those nothing reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.adapters import read
from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.formats.trainer_files import chosen, unread_files
from tests.tampering import to_pickles

WEIGHTS = (
    "new_embeddings.safetensors", "value_head.bin", "value_head.safetensors", "v_head.pt", "projector.pt",
    "model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth",
    "ema.ckpt", "adapters.npz", "adapter_0.pt", "flax_model.msgpack", "tf_model.h5",
    "vision_tower/pytorch_model.bin", "merged/model.safetensors",
)  # fmt: skip

NO_WEIGHTS = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "random_states_0.pkl", "training_args.bin", "trainer_state.json", "tokenizer.model", "tokenizer.bin",
    "model.gguf", "events.out.tfevents.1", "checkpoint-500/non_lora_state_dict.bin",
    "checkpoint-500/adapter_model.safetensors", "global_step500/mp_rank_00_model_states.pt",
    "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp",
    "0000100_adapters.safetensors", "extra_state_world_size_1_rank_0.pt", "model_world_size_1_rank_0.pt",
    "default/adapter_model.safetensors", "2_Dense/model.safetensors", "onnx/model.bin", "ggml-adapter-model.bin",
    "mlruns/0/model.pth", "predictions.npy",
)  # fmt: skip


def test_files_that_may_hold_weights_are_told_from_training_state_and_from_what_belongs_to_others():
    around = {"default/adapter_config.json", "2_Dense/config.json", "README.md"}
    names = {*WEIGHTS, *NO_WEIGHTS, *around}
    assert set(unread_files(names, read=(), ignored=())) == set(WEIGHTS)


def test_a_file_is_chosen_by_name_by_pattern_by_folder_or_by_its_name_in_a_folder():
    names = {"a.bin", "model-1.bin", "model-2.bin", "merged/model-1.bin", "merged/x.pt"}
    assert chosen(names, ["a.bin"]) == {"a.bin"}
    assert chosen(names, ["model-*.bin"]) == {"model-1.bin", "model-2.bin"}
    assert chosen(names, ["merged/"]) == {"merged/model-1.bin", "merged/x.pt"}
    assert chosen(names, ["x.pt"]) == {"merged/x.pt"}
    assert chosen(names, ["absent.bin"]) == frozenset()


def errors(adapter):
    return [(issue.code, issue.subject) for issue in adapter.issues if issue.severity == "error"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_file_that_nothing_reads_is_an_error_until_it_is_ignored(name, pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"weights")
    (issue,) = (issue for issue in read(root).issues if issue.severity == "error")
    assert (issue.code, issue.subject) == ("unread-file", name)
    assert issue.hint.endswith(f"leave it out with --ignore-file {name} if the merge does not need it")
    left_out = read(root, frozenset({name}))
    assert errors(left_out) == []
    assert [issue.subject for issue in left_out.issues] == [name]


def test_training_state_beside_an_adapter_is_passed_over(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    for name in NO_WEIGHTS:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(b"state")
    for folder in ("default", "2_Dense"):
        (root / folder / "config.json").write_text("{}")
        (root / folder / "adapter_config.json").write_text("{}")
    assert read(root).issues == ()


def test_an_adapter_saved_twice_may_stay_where_both_files_hold_the_same(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    tensors = load_file(root / "adapter_model.safetensors")
    torch.save(tensors, root / "adapter_model.bin")
    adapter = read(root)
    assert [(issue.severity, issue.code) for issue in adapter.issues] == [("note", "adapter-copy")]
    first = next(iter(tensors))
    torch.save(tensors | {first: tensors[first] + 1}, root / "adapter_model.bin")
    assert errors(read(root)) == [("unread-file", "adapter_model.bin")]
    assert errors(read(root, frozenset({"adapter_model.bin"}))) == []


def sharded(root, suffix, *, index=True):
    """Take an adapter's file apart into two shards."""
    whole = root / f"adapter_model{suffix}"
    is_pickle = suffix == ".bin"
    tensors = torch.load(whole) if is_pickle else load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"adapter_model-{n:05}-of-00002{suffix}"
        (torch.save if is_pickle else save_file)({name: tensors[name] for name in part}, root / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (root / f"adapter_model{suffix}.index.json").write_text(text)
    whole.unlink()


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_adapter_in_shards_is_the_adapter_in_one_file(suffix, index, pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico(), modules_to_save=["lm_head"]))
    if suffix == ".bin":
        to_pickles(root)
    wanted = read(root)
    sharded(root, suffix, index=index)
    adapter = read(root)
    assert errors(adapter) == []
    assert {delta.parameter: delta.scale for delta in adapter.deltas} == {
        delta.parameter: delta.scale for delta in wanted.deltas
    }
    assert adapter.replacements.keys() == wanted.replacements.keys()
    assert len(adapter.files) == 2


def test_a_missing_shard_is_named(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    sharded(root, ".safetensors", index=False)
    (root / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"does not have adapter_model-00002-of-00002\.safetensors"):
        read(root)


def test_an_index_that_leads_out_of_the_folder_is_refused(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    sharded(root, ".safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a file inside the model's directory"):
        read(root)


@pytest.mark.parametrize(
    ("names", "trainer", "tool"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "DeepSpeed ZeRO", "zero_to_fp32.py"),
        (["global_step100/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed ZeRO", "zero_to_fp32.py"),
        (["model_world_size_8_rank_0.pt"], "verl (FSDP)", "verl.model_merger"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], "FSDP", "accelerate merge-weights"),
        (["pytorch_model_fsdp.bin"], "FSDP", "accelerate merge-weights"),
        (["iter_0000100/__0_0.distcp", "iter_0000100/common.pt"], "Megatron", "export_adapter_ckpt"),
    ],
)  # fmt: skip
def test_an_adapter_left_in_a_trainers_shards_names_the_trainers_own_tool(
    names, trainer, tool, pico, pico_adapter, tampered
):
    root = tampered(pico_adapter(pico()))
    (root / "adapter_model.safetensors").unlink()
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(b"")
    with pytest.raises(ResolveError, match="only a sharded training state of") as caught:
        read(root)
    assert trainer in str(caught.value)
    assert tool in caught.value.hint


def test_the_flat_parameters_of_fsdp_are_refused(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    save_file({"_fsdp_wrapped_module._flat_param": torch.ones(8)}, root / "adapter_model.safetensors")
    assert errors(read(root)) == [("sharded-state", "adapter_model.safetensors")]


@pytest.mark.parametrize(
    ("shape", "says"), [((0,), "have no values"), ((16,), "are flat pieces of matrices")]
)
def test_factors_that_are_one_processs_part_are_refused_once(shape, says, pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    tensors = load_file(root / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros(shape) if "lora_A" in name else tensor for name, tensor in tensors.items()},
        root / "adapter_model.safetensors",
    )
    (issue,) = read(root).issues
    assert (issue.code, issue.subject) == ("sharded-state", "adapter_model.safetensors")
    assert says in issue.sentence
    for tool in ("zero_to_fp32.py", "accelerate merge-weights", "verl.model_merger"):
        assert tool in issue.hint


def test_parameters_beside_the_adapter_without_values_are_refused(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    torch.save({"base_model.model.model.norm.weight": torch.empty(0)}, root / "non_lora_trainables.bin")
    assert errors(read(root)) == [("sharded-state", "non_lora_trainables.bin")]


def test_a_file_beside_the_only_adapter_in_a_subfolder_is_not_lost(pico, pico_adapter, tmp_path):
    shutil.copytree(pico_adapter(pico()), tmp_path / "default")
    torch.save({"x": torch.ones(1)}, tmp_path / "non_lora_trainables.bin")
    assert errors(read(tmp_path)) == [("unread-file", "non_lora_trainables.bin")]
    assert errors(read(tmp_path, frozenset({"non_lora_trainables.bin"}))) == []


def test_a_file_beside_the_adapter_that_is_no_table_of_tensors_is_named(pico, pico_adapter, tampered):
    root = tampered(pico_adapter(pico()))
    torch.save({"state_dict": {"x": torch.ones(1)}}, root / "mm_projector.bin")
    (issue,) = (issue for issue in read(root).issues if issue.severity == "error")
    assert (issue.code, issue.subject) == ("unread-file", "mm_projector.bin")
    assert "--ignore-file mm_projector.bin" in issue.hint
