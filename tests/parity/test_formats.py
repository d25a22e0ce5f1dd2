"""Other trainers' adapters against their PEFT twins, whose merge the other suites prove; and mlx-lm's own layers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from tests import twins
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json, edit_tensors

PREFIX = twins.PREFIX
FLOAT32_TOLERANCE = 1e-5
"""Derived in test_kinds.py."""

ATTENTION = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def merged_alike(cli, tmp_path, stored):
    """Return a function (base, adapter, twin, *options): both merge, fully verified, to the same bytes."""

    def check(base, adapter, twin, *options):
        results = []
        for name, source in (("by-peft", adapter), ("by-twin", twin)):
            out = tmp_path / name
            result = cli("--base", base, "--adapter", source, "--out", out, "--verify", "full", *options)
            assert result.exit_code == exits.OK, result.output
            results.append(stored(out))
        assert results[0] == results[1]
        assert results[0] != stored(base)
        return tmp_path / "by-twin"

    return check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [twins.mlx, twins.swift])
def test_the_same_factors_in_another_format_merge_to_the_same_bytes(
    make, dora, dtype, pico, pico_adapter, merged_alike, tmp_path
):
    base = pico("llama", dtype)
    adapter = pico_adapter(base, **ATTENTION, use_dora=dora)
    merged_alike(base, adapter, make(adapter, tmp_path / "twin"))


@pytest.mark.parametrize("make", [twins.mlx, twins.swift])
def test_the_merge_computes_what_base_and_adapter_compute(
    make, pico, pico_adapter, merged, load, logits, tmp_path
):
    from peft import PeftModel

    base = pico("llama", "float32")
    adapter = pico_adapter(base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    if make is twins.mlx:  # PEFT saves what the embeddings were, too
        adapter = _without_whole_weights(adapter, tmp_path / "factors")
    out = merged(base, make(adapter, tmp_path / "twin"))
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    assert (logits(load(base)) - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert (logits(load(out)) - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()


def _without_whole_weights(adapter, root):
    shutil.copytree(adapter, root)

    def drop(tensors):
        for name in [name for name in tensors if "lora_" not in name]:
            del tensors[name]

    edit_tensors(root / "adapter_model.safetensors", drop)
    return root


@pytest.mark.parametrize("adapter_name", ["mine", "default"])
@pytest.mark.parametrize(
    "fields", [ATTENTION, {**ATTENTION, "use_dora": True, "modules_to_save": ["lm_head"]}]
)
def test_tensors_that_carry_their_adapters_name_merge_alike(
    fields, adapter_name, pico, pico_adapter, merged_alike, tmp_path
):
    adapter = pico_adapter(pico(), **fields)
    edited = tmp_path / "edited"
    shutil.copytree(adapter, edited)
    if "modules_to_save" in fields:
        edit_tensors(edited / "adapter_model.safetensors", _double_the_head)
    twin = twins.respelled(edited, tmp_path / "twin", lambda name: twins.named(name, adapter_name))
    merged_alike(pico(), edited, twin)
    merged_in_half = ("--dtype", "float16")  # a replacement is cast there, and recomputed
    for out in ("by-peft", "by-twin"):
        shutil.rmtree(tmp_path / out)
    merged_alike(pico(), edited, twin, *merged_in_half)


def _double_the_head(tensors):
    (head,) = [name for name in tensors if "lm_head" in name]
    tensors[head] = tensors[head] * 2


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda name: f"module.{name}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    ],
)
def test_the_names_of_a_compiled_or_parallel_model_merge_alike(
    spell, pico, pico_adapter, merged_alike, tmp_path
):
    adapter = pico_adapter(pico(), **ATTENTION)
    merged_alike(pico(), adapter, twins.respelled(adapter, tmp_path / "twin", spell))


def test_a_method_of_pefts_layers_may_carry_its_adapters_name(merged_alike, tmp_path):
    kind = next(kind for kind in KINDS if kind.name == "LoHa")
    case = building.case(tmp_path, kind, "llama", "bfloat16")
    twin = twins.respelled(case.adapter, tmp_path / "twin", lambda name: twins.named(name, "mine"))
    merged_alike(case.base, case.adapter, twin)


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_mlx(root, tensors, *, rank=4, scale=1.5, kind="lora", keys=None, num_layers=2):
    """Write an adapter of mlx-lm that has no PEFT twin."""
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0} | ({"keys": keys} if keys else {})
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "model": "none",
    }
    return twins.save(root, config, tensors, "adapters.safetensors")


def test_mlx_reads_a_tied_embedding_at_both_ends_so_the_tie_is_kept(pico, merged, tmp_path):
    base = pico("llama_tied", "float32")
    a, b = drawn(96, 4), drawn(4, 64, seed=2)
    name = "model.embed_tokens"
    adapter = write_mlx(tmp_path / "mlx", {f"{name}.lora_a": a, f"{name}.lora_b": b}, keys=[name])
    out = merged(base, adapter, "--verify", "full")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    wanted = before[f"{name}.weight"].double() + 1.5 * a.double() @ b.double()
    assert torch.allclose(after[f"{name}.weight"].double(), wanted, rtol=0, atol=1e-5)


def test_mlx_stacks_experts_that_the_base_stores_one_by_one(merged, tmp_path):
    base = tmp_path / "base"
    model = building.make("qwen3_moe")
    model.save_pretrained(base, save_original_format=True)
    module = "model.layers.1.mlp.switch_mlp.gate_proj"
    a, b = drawn(4, 3, 64), drawn(4, 40, 3, seed=2)
    adapter = write_mlx(
        tmp_path / "mlx", {f"{module}.lora_a": a, f"{module}.lora_b": b}, rank=3, num_layers=1
    )
    out = merged(base, adapter, "--verify", "full")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == [f"model.layers.1.mlp.experts.{n}.gate_proj.weight" for n in range(4)]
    for n, name in enumerate(sorted(changed)):
        wanted = before[name].double() + 1.5 * b[n].double() @ a[n].double()
        assert torch.allclose(after[name].double(), wanted, rtol=0, atol=1e-5)


def test_mlx_full_training_of_layers_replaces_their_parameters(pico, merged, tmp_path):
    base = pico("llama", "bfloat16")
    before = load_file(base / "model.safetensors")
    trained = {name: tensor * 2 for name, tensor in before.items() if ".layers.1." in name}
    adapter = write_mlx(tmp_path / "mlx", trained, kind="full", num_layers=1)
    after = load_file(merged(base, adapter) / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trained)
    assert all(torch.equal(after[name], tensor) for name, tensor in trained.items())


def test_an_old_mlx_config_says_lora_layers_and_may_repeat_the_rank_as_alpha(
    pico, pico_adapter, merged_alike, tmp_path
):
    adapter = pico_adapter(pico(), **ATTENTION)
    twin = twins.mlx(adapter, tmp_path / "twin")
    config = json.loads((twin / "adapter_config.json").read_text())
    parameters = config["lora_parameters"] | {"alpha": 4}
    del parameters["keys"]
    edit_json(
        twin / "adapter_config.json",
        lora_layers=2,
        num_layers=...,
        fine_tune_type=...,
        lora_parameters=parameters,
    )
    merged_alike(pico(), adapter, twin)


def mlx_layers():
    """Return mlx and the modules of mlx-lm's layers."""
    return (
        pytest.importorskip("mlx.core"),
        pytest.importorskip("mlx_lm.tuner.lora"),
        pytest.importorskip("mlx_lm.tuner.dora"),
        pytest.importorskip("mlx.nn"),
    )


PLACES = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj", "lm_head", "model.embed_tokens")


def mlx_layer(layers, name, weight, seed):
    """Return a weight in mlx-lm's own layer, as if it had been trained."""
    mx, lora, dora, nn, kind = layers
    is_embedding = name.endswith("embed_tokens")
    plain = nn.Embedding(*weight.shape) if is_embedding else nn.Linear(*weight.shape[::-1], bias=False)
    plain.weight = mx.array(weight.numpy())
    owner, stem = (lora, "LoRA") if kind == "lora" else (dora, "DoRA")
    adapted = getattr(owner, f"{stem}{'Embedding' if is_embedding else 'Linear'}")
    made = adapted.from_base(plain, r=4, dropout=0.0, scale=1.5)
    for n, leaf in enumerate(["lora_a", "lora_b"]):
        setattr(made, leaf, mx.array(drawn(*getattr(made, leaf).shape, seed=2 * seed + n).numpy()))
    if kind == "dora":
        made.m = made.m * mx.array(drawn(*made.m.shape, seed=seed + 20).abs().numpy())
    return made


def answer(x, weight):
    """Return what a linear layer or an embedding of a weight answers."""
    return x @ weight.T if x.is_floating_point() else weight[x]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_own_layers_answer_as_the_merged_weights_do(kind, pico, merged, tmp_path):
    mx, *_ = modules = (*mlx_layers(), kind)
    base = pico("llama", "float32")
    before = load_file(base / "model.safetensors")
    layers = {name: mlx_layer(modules, name, before[f"{name}.weight"], n) for n, name in enumerate(PLACES)}
    adapter = write_mlx(tmp_path / "mlx", {}, kind=kind, keys=list(PLACES))
    leaves = ("lora_a", "lora_b", "m")[: 3 if kind == "dora" else 2]
    tensors = {f"{name}.{leaf}": layer[leaf] for name, layer in layers.items() for leaf in leaves}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    after = load_file(merged(base, adapter, "--verify", "full") / "model.safetensors")
    for name, layer in layers.items():
        weight, plain = after[f"{name}.weight"], before[f"{name}.weight"]
        x = torch.arange(96) if name.endswith("embed_tokens") else drawn(8, weight.shape[1])
        wanted = torch.tensor(layer(mx.array(x.numpy())).tolist())
        assert (answer(x, weight) - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()
        assert (answer(x, plain) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_the_vision_weights_beside_an_adapter_of_ms_swift_are_merged(pico, pico_adapter, merged, tmp_path):
    adapter = tmp_path / "adapter"
    base = building.base(tmp_path, "llava_tied", "bfloat16")
    before = load_file(base / "model.safetensors")
    (name,) = [name for name in before if name.endswith("vision_tower.encoder.layers.0.mlp.fc1.weight")] or [
        name for name in before if name.endswith("encoder.layers.0.mlp.fc1.weight")
    ]
    targets = [
        name.removesuffix(".weight")
        for name in before
        if name.endswith("self_attn.q_proj.weight") and "language" in name
    ]
    tensors = {}
    for n, module in enumerate(targets):
        rows, columns = before[f"{module}.weight"].shape
        tensors[f"{PREFIX}{module}.lora_A.weight"] = drawn(4, columns, seed=n)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = drawn(rows, 4, seed=n + 9)
    stem = targets[0].partition(".layers.")[0].replace(".", r"\.")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8,
        "target_modules": rf"^({stem}(?=\.).*\.(self_attn|q_proj))$",  # matches containers as well
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "/root/models/llava",
    }  # fmt: skip
    twins.save(adapter, config, tensors, "adapter_model.safetensors")
    (adapter / "additional_config.json").write_text(
        json.dumps({"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-6})
    )
    save_file({f"{PREFIX}{name}": before[name] * 2}, adapter / "vit.safetensors")
    after = load_file(merged(base, adapter) / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name} | {f"{module}.weight" for module in targets}
    assert torch.equal(after[name], before[name] * 2)


@pytest.mark.parametrize("from_subfolder", [True, False])
def test_the_extra_states_of_a_swift_model_are_merged(from_subfolder, pico, pico_adapter, merged, tmp_path):
    root = tmp_path / "swift"
    adapter = twins.swift(pico_adapter(pico(), **ATTENTION), root)
    before = load_file(pico() / "model.safetensors")
    twins.save(
        root / "extra_states",
        {"extra_state_keys": [r"model\.norm\..*", r".*q_proj\.base_layer\.weight"]},
        {
            "model.norm.weight": before["model.norm.weight"] * 2,
            "model.layers.0.self_attn.q_proj.base_layer.weight": before[
                "model.layers.0.self_attn.q_proj.weight"
            ]
            * 0,
        },
        "adapter_model.safetensors",
    )
    after = load_file(merged(pico(), adapter if from_subfolder else root) / "model.safetensors")
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"] * 2)
    # the delta goes on top of the trained weight, which is zero
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"model.layers.0.self_attn.q_proj.lora_{role}.default.weight"].double() for role in "AB")
    wanted = 1.5 * b @ a
    got = after["model.layers.0.self_attn.q_proj.weight"].double()
    assert (got - wanted).abs().max() <= 2.0**-8 * wanted.abs().max()


def test_an_adapter_with_its_vision_weights_has_another_digest(pico, pico_adapter, tampered):
    from lora_merge.adapters import read

    root = tampered(pico_adapter(pico()))
    before = read(root).digest
    for value in (1.0, 2.0):
        save_file({f"{PREFIX}model.norm.weight": torch.full((64,), value)}, root / "vit.safetensors")
        assert read(root).digest != before
        before = read(root).digest


def test_a_swift_model_names_its_base_in_the_arguments_of_the_training(pico, pico_adapter, cli, tmp_path):
    adapter = twins.swift(pico_adapter(pico()), tmp_path / "swift")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    (tmp_path / "swift" / "args.json").write_text(json.dumps({"model": str(pico()), "template": "llama3"}))
    result = cli("--adapter", tmp_path / "swift", "--out", tmp_path / "out")
    assert result.exit_code == exits.OK, result.output
    assert "the one in its subfolder default was used" in result.stderr


def test_what_ms_swift_does_not_adapt_is_not_missed_though_its_regex_matches(tmp_path, cli):
    kind = next(kind for kind in KINDS if kind.name == "LoRA on Conv3d")
    case = building.case(tmp_path, kind, "videomae", "bfloat16")
    adapter = tmp_path / "swift"
    before = load_file(case.base / "model.safetensors")
    (module,) = [
        name.removesuffix(".weight") for name in before if name.endswith("intermediate.dense.weight")
    ]
    rows, columns = before[f"{module}.weight"].shape
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": drawn(4, columns),
        f"{PREFIX}{module}.lora_B.weight": drawn(rows, 4),
    }
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*(projection|intermediate\.dense)",
    }
    twins.save(adapter, config, tensors, "adapter_model.safetensors")
    arguments = ("--base", case.base, "--adapter", adapter, "--out", tmp_path / "out")
    refused = cli(*arguments)
    assert refused.exit_code == exits.PLAN
    assert "projection: the config targets it, and the adapter has no tensors for it" in refused.stderr
    (adapter / "additional_config.json").write_text("{}")
    accepted = cli(*arguments)
    assert accepted.exit_code == exits.OK, accepted.output


def test_an_embedding_of_mlx_counts_at_both_ends_beside_an_adapter_of_the_head(
    pico, pico_adapter, cli, tmp_path
):
    """In mlx-lm the head of a tied model is the embedding itself; another adapter's head is its own affair."""
    base = pico("llama_tied", "float32")
    inputs = pico_adapter(base, target_modules=["embed_tokens"])
    heads = pico_adapter(base, target_modules=["lm_head"])
    mlx = twins.mlx(inputs, tmp_path / "mlx")
    out = tmp_path / "out"
    result = cli("--base", base, "--adapter", mlx, "--adapter", heads, "--out", out)
    assert result.exit_code == 0, result.output
    shared = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    one, two = (load_file(root / "adapter_model.safetensors") for root in (inputs, heads))
    stem = f"{PREFIX}model.embed_tokens"
    both = (one[f"{stem}.lora_embedding_B"] @ one[f"{stem}.lora_embedding_A"]).T * 1.5
    head = two[f"{PREFIX}lm_head.lora_B.weight"] @ two[f"{PREFIX}lm_head.lora_A.weight"] * 1.5
    after = load_file(out / "model.safetensors")
    torch.testing.assert_close(after["model.embed_tokens.weight"], shared + both)
    torch.testing.assert_close(after["lm_head.weight"], shared + both + head)
