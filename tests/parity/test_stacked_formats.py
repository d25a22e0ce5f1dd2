"""LoRA on experts as large trainers store it, against the same change written out in plain torch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from tests.parity import building

PREFIX = "base_model.model."
FLOAT32_TOLERANCE = 1e-5
"""Derived in test_kinds.py."""

RANK, ALPHA, EXPERTS, HIDDEN, INNER = 4, 6, 4, 64, 40


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return one mixture of experts as it is published, one by one, and as transformers has it, stacked."""
    root = tmp_path_factory.mktemp("experts")
    building.make("qwen3_moe").save_pretrained(root / "single")
    stacked = building.base(root, "qwen3_moe", "float32")
    return {"single": root / "single", "stacked": stacked}


def write(root, tensors, **fields):
    root.mkdir()
    save_file({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()},
              root / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM", **fields}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def factors(projection, shared, seed):
    """Return A [1 or experts, r, in] and B [1 or experts, out, r] of a projection."""
    n_out, n_in = (HIDDEN, INNER) if projection == "down" else (INNER, HIDDEN)
    n_a, n_b = (1 if shared == "A" else EXPERTS), (1 if shared == "B" else EXPERTS)
    return drawn(n_a, RANK, n_in, seed=seed), drawn(n_b, n_out, RANK, seed=seed + 1)


def layers(*, outer):
    """Return the factors of both layers: of gate, up and down, one side of each shared where that is asked for."""
    sides = {"gate": "A", "up": "A", "down": "B"} if outer else {}
    return {
        (layer, projection): factors(projection, sides.get(projection), 10 * layer + 3 * n)
        for layer in range(2)
        for n, projection in enumerate(("gate", "up", "down"))
    }


def compute(model):
    with building.one_thread(), torch.no_grad():
        return model.eval()(**building._tokens()).logits


def wanted(base, changes, head=None):
    """Return what the base computes with the changes of its experts, and of its head, written into its weights."""
    model = building.load_afresh(base, "qwen3_moe")
    with torch.no_grad():
        for (layer, projection), (a, b) in changes.items():
            delta = ALPHA / RANK * (b @ a)  # broadcasts what is shared
            experts = model.model.layers[layer].mlp.experts
            if projection == "down":
                experts.down_proj += delta
            else:
                start = 0 if projection == "gate" else INNER
                experts.gate_up_proj[:, start : start + INNER] += delta
        if head is not None:
            model.lm_head.weight += ALPHA / RANK * head[1] @ head[0]
    return compute(model)


@pytest.fixture
def agrees(bases, merged):
    """Return a function (kind of base, adapter, what is expected): merge, and compare the answers."""

    def check(kind, adapter, expected):
        out = merged(bases[kind], adapter, "--verify", "full")
        got = compute(building.load_afresh(out, "qwen3_moe"))
        plain = compute(building.load_afresh(bases[kind], "qwen3_moe"))
        assert (expected - plain).abs().max() > 0.05 * expected.abs().max()
        assert (got - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()

    return check


TINKER = {"gate": "w1", "down": "w2", "up": "w3"}


@pytest.mark.parametrize("kind", ["single", "stacked"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
    "targets", [["w1", "w2", "w3", "unembed_tokens"], "all-linear"], ids=["list", "all-linear"]
)
def test_tinkers_names_and_shared_factors_are_merged(targets, outer, kind, bases, agrees, tmp_path):
    changes = layers(outer=outer)
    head = drawn(RANK, HIDDEN, seed=91), drawn(96, RANK, seed=92)
    tensors = {"model.unembed_tokens.lora_A.weight": head[0], "model.unembed_tokens.lora_B.weight": head[1]}
    for (layer, projection), (a, b) in changes.items():
        path = f"model.layers.{layer}.mlp.experts.{TINKER[projection]}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    adapter = write(tmp_path / "tinker", tensors, target_modules=targets)
    agrees(kind, adapter, wanted(bases[kind], changes, head))


@pytest.mark.parametrize("kind", ["single", "stacked"])
def test_a_shared_factor_may_stand_beside_those_of_single_experts(kind, bases, agrees, tmp_path):
    changes = layers(outer=True)
    tensors = {}
    for (layer, projection), pair in changes.items():
        path = f"model.layers.{layer}.mlp.experts"
        for role, factor in zip("AB", pair, strict=True):
            if len(factor) == 1:
                tensors[f"{path}.{projection}_proj.lora_{role}.weight"] = factor
            else:
                tensors |= {
                    f"{path}.{n}.{projection}_proj.lora_{role}.weight": factor[n] for n in range(EXPERTS)
                }
    adapter = write(tmp_path / "bridge", tensors, target_modules=["gate_proj", "up_proj", "down_proj"])
    agrees(kind, adapter, wanted(bases[kind], changes))


@pytest.mark.parametrize("kind", ["single", "stacked"])
def test_gate_and_up_in_one_are_halves_of_b(kind, bases, agrees, tmp_path):
    changes = layers(outer=True)
    tensors = {}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        a, gate = changes[layer, "gate"]
        changes[layer, "up"] = (a, changes[layer, "up"][1])
        down_a, down_b = changes[layer, "down"]
        tensors |= {
            f"{path}.gate_up_proj.lora_A.weight": a,
            f"{path}.gate_up_proj.lora_B.weight": torch.cat([gate, changes[layer, "up"][1]], dim=1),
            f"{path}.down_proj.lora_A.weight": down_a,
            f"{path}.down_proj.lora_B.weight": down_b,
        }
    adapter = write(tmp_path / "sglang", tensors, target_modules=["gate_up_proj", "down_proj"])
    agrees(kind, adapter, wanted(bases[kind], changes))


def grouped(changes):
    """Return the tensors of NeMo Automodel's GroupedExpertsLoRA; gate and up have one A."""
    tensors = {}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        a, gate = changes[layer, "gate"]
        changes[layer, "up"] = (a, changes[layer, "up"][1])
        down_a, down_b = changes[layer, "down"]
        tensors |= {
            f"{path}.lora_gate_and_up_A": a.mT,
            f"{path}.lora_gate_and_up_B": torch.cat([gate, changes[layer, "up"][1]], dim=1).mT,
            f"{path}.lora_down_A": down_a.mT,
            f"{path}.lora_down_B": down_b.mT,
        }
    return tensors


@pytest.mark.parametrize("target", ["experts", "mlp.experts"])
def test_a_target_may_mean_the_module_that_holds_the_experts(target, bases, agrees, tmp_path):
    changes = layers(outer=False)
    adapter = write(tmp_path / "nemo", grouped(changes), target_modules=[target])
    agrees("single", adapter, wanted(bases["single"], changes))


@pytest.mark.parametrize("kind", ["single", "stacked"])
def test_nemos_grouped_experts_are_merged(kind, bases, agrees, tmp_path):
    changes = layers(outer=False)
    targets = [
        f"model.layers.{layer}.mlp.experts.{n}.{name}_proj"
        for layer in range(2)
        for n in range(EXPERTS)
        for name in ("gate", "up", "down")
    ]
    adapter = write(tmp_path / "nemo", grouped(changes), target_modules=targets)
    agrees(kind, adapter, wanted(bases[kind], changes))


def test_the_pairs_of_stacked_experts_merge_as_single_ones_do(bases, merged, cli, tmp_path):
    changes = layers(outer=False)
    stacks, singles = {}, {}
    for (layer, projection), (a, b) in changes.items():
        path = f"model.layers.{layer}.mlp.experts"
        stacks |= {f"{path}.{projection}_proj.lora_A.weight": a, f"{path}.{projection}_proj.lora_B.weight": b}
        for n in range(EXPERTS):
            singles |= {
                f"{path}.{n}.{projection}_proj.lora_A.weight": a[n],
                f"{path}.{n}.{projection}_proj.lora_B.weight": b[n],
            }
    targets = ["gate_proj", "up_proj", "down_proj"]
    one = write(tmp_path / "stacks", stacks, target_modules=targets)
    other = write(tmp_path / "singles", singles, target_modules=targets)
    ours = load_file(merged(bases["single"], one) / "model.safetensors")
    result = cli("--base", bases["single"], "--adapter", other, "--out", tmp_path / "by-singles")
    assert result.exit_code == exits.OK, result.output
    theirs = load_file(tmp_path / "by-singles" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(cli, base, adapter):
    result = cli("plan", "--base", base, "--adapter", adapter)
    assert result.exit_code == exits.PLAN, result.output
    return result.output


def test_factors_that_say_nowhere_how_many_experts_there_are_are_refused(bases, cli, tmp_path):
    path = "model.layers.0.mlp.experts.gate_proj"
    tensors = {f"{path}.lora_A.weight": drawn(1, RANK, HIDDEN, seed=1), f"{path}.lora_B.weight": drawn(1, INNER, RANK, seed=2)}  # fmt: skip
    adapter = write(tmp_path / "shared", tensors, target_modules=["gate_proj"])
    assert "no tensor in the file shows how many experts there are" in refused(cli, bases["single"], adapter)


def test_a_stack_of_another_number_of_experts_is_refused(bases, cli, tmp_path):
    path = "model.layers.0.mlp.experts.gate_proj"
    tensors = {f"{path}.lora_A.weight": drawn(3, RANK, HIDDEN, seed=1), f"{path}.lora_B.weight": drawn(4, INNER, RANK, seed=2)}  # fmt: skip
    adapter = write(tmp_path / "uneven", tensors, target_modules=["gate_proj"])
    assert "expected one factor, or one for each of 4 experts" in refused(cli, bases["single"], adapter)


def test_a_half_of_nemos_pair_is_refused(bases, cli, tmp_path):
    tensors = grouped(layers(outer=False))
    del tensors["model.layers.1.mlp.experts.lora_down_B"]
    adapter = write(tmp_path / "half", tensors, target_modules=["experts"])
    assert "model.layers.1.mlp.experts: has no lora_down_B" in refused(cli, bases["single"], adapter)


@pytest.mark.parametrize("original", [True, False])
def test_nemos_square_experts_need_no_shape_to_tell_their_axes(original, cli, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = {**building.MODELS["qwen3_moe"].fields, "hidden_size": 2 * INNER, "num_hidden_layers": 1}
    torch.manual_seed(5)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).save_pretrained(
        tmp_path / "base", save_original_format=original
    )
    a, b = drawn(EXPERTS, 2 * INNER, RANK, seed=1), drawn(EXPERTS, RANK, 2 * INNER, seed=2)
    path = "model.layers.0.mlp.experts"
    tensors = {f"{path}.lora_gate_and_up_A": a, f"{path}.lora_gate_and_up_B": b}
    adapter = write(tmp_path / "nemo", tensors, target_modules=["experts"])
    result = cli(
        "--base", tmp_path / "base", "--adapter", adapter, "--out", tmp_path / "out", "--verify", "full"
    )
    assert result.exit_code == exits.OK, result.output
    before, after = (
        Qwen3MoeForCausalLM.from_pretrained(tmp_path / name).model.layers[0].mlp.experts.gate_up_proj
        for name in ("base", "out")
    )
    delta = ALPHA / RANK * (a @ b).mT  # [experts, out, in]
    assert (after - before - delta).abs().max() <= 1e-6
