"""Models that only their own code could build: names and shapes on disk have to do, and the code is never run.

The oracle is each stored matrix with s·B·A added to it; nothing else may change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.families import SWIFT
from tests.parity.family_building import EXTRAS, write_config

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, WIDE, KEYS_AND_VALUES, TOWER = 32, 48, 16, 24
N_LAYERS = 2
RANK, ALPHA = 4, 6
TOLERANCE = 1e-6
"""A product of rank four and a sum, in float32: some 2⁻²⁴ each."""

CODE = """\
from pathlib import Path

Path(__file__).with_name("executed").touch()
raise RuntimeError("the code of the model was executed")
"""


@dataclass(frozen=True)
class Remote:
    """A published layout that transformers has no class for."""

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    targets: str | list[str]
    adapted: str
    """A pattern of the modules that the adapter has tensors of."""

    n_adapted: int


def _internvl2() -> Remote:
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (64, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,),
        "language_model.output.weight": (64, HIDDEN),
        "mlp1.0.weight": (4 * TOWER,), "mlp1.0.bias": (4 * TOWER,),
        "mlp1.1.weight": (HIDDEN, 4 * TOWER), "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN), "mlp1.3.bias": (HIDDEN,),
        "vision_model.embeddings.class_embedding": (1, 1, TOWER),
        "vision_model.embeddings.patch_embedding.weight": (TOWER, 3, 4, 4),
        "vision_model.embeddings.position_embedding": (1, 5, TOWER),
    }  # fmt: skip
    for n in range(N_LAYERS):
        layer, block = f"language_model.model.layers.{n}", f"vision_model.encoder.layers.{n}"
        shapes |= {
            f"{layer}.attention.wqkv.weight": (HIDDEN + 2 * KEYS_AND_VALUES, HIDDEN),
            f"{layer}.attention.wo.weight": (HIDDEN, HIDDEN),
            f"{layer}.attention_norm.weight": (HIDDEN,),
            f"{layer}.feed_forward.w1.weight": (WIDE, HIDDEN),
            f"{layer}.feed_forward.w2.weight": (HIDDEN, WIDE),
            f"{layer}.feed_forward.w3.weight": (WIDE, HIDDEN),
            f"{layer}.ffn_norm.weight": (HIDDEN,),
            f"{block}.attn.qkv.weight": (3 * TOWER, TOWER),
            f"{block}.attn.qkv.bias": (3 * TOWER,),
            f"{block}.attn.proj.weight": (TOWER, TOWER),
            f"{block}.mlp.fc1.weight": (2 * TOWER, TOWER),
            f"{block}.mlp.fc2.weight": (TOWER, 2 * TOWER),
            f"{block}.ls1": (TOWER,), f"{block}.ls2": (TOWER,), f"{block}.norm1.weight": (TOWER,),
        }  # fmt: skip
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {
            "AutoConfig": "modeling_custom.InternVLChatConfig",
            "AutoModel": "modeling_custom.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_custom.InternVLChatModel",
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "num_hidden_layers": N_LAYERS,
            "hidden_size": HIDDEN,
        },
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"},
        "torch_dtype": "float32",
    }
    adapted = r"language_model\..*\.(wqkv|wo|w1|w2|w3)|mlp1\.[13]"
    return Remote("InternVL2", config, shapes, SWIFT.format("language_model|mlp1"), adapted, 5 * N_LAYERS + 2)


def _chatglm() -> Remote:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (64, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (4,),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (64, HIDDEN),
    }
    for n in range(N_LAYERS):
        layer = f"transformer.encoder.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attention.query_key_value.weight": (HIDDEN + 2 * KEYS_AND_VALUES, HIDDEN),
            f"{layer}.self_attention.query_key_value.bias": (HIDDEN + 2 * KEYS_AND_VALUES,),
            f"{layer}.self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * WIDE, HIDDEN),
            f"{layer}.mlp.dense_4h_to_h.weight": (HIDDEN, WIDE),
        }
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "auto_map": {
            "AutoConfig": "modeling_custom.ChatGLMConfig",
            "AutoModelForCausalLM": "modeling_custom.ChatGLMForConditionalGeneration",
        },
        "num_layers": N_LAYERS,
        "torch_dtype": "float32",
    }
    targets = ["query_key_value", "dense", "dense_4h_to_h"]
    adapted = r".*\.(query_key_value|dense|dense_4h_to_h)"
    return Remote("ChatGLM", config, shapes, targets, adapted, 3 * N_LAYERS)


def _qwen1() -> Remote:
    # GPT-2's names, but linear layers: a square c_proj is [out, in] here.
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (64, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (64, HIDDEN),
    }
    for n in range(N_LAYERS):
        layer = f"transformer.h.{n}"
        shapes |= {
            f"{layer}.ln_1.weight": (HIDDEN,),
            f"{layer}.attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            f"{layer}.attn.c_attn.bias": (3 * HIDDEN,),
            f"{layer}.attn.c_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.w1.weight": (WIDE, HIDDEN),
            f"{layer}.mlp.w2.weight": (WIDE, HIDDEN),
            f"{layer}.mlp.c_proj.weight": (HIDDEN, WIDE),
        }
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "auto_map": {
            "AutoConfig": "modeling_custom.QWenConfig",
            "AutoModelForCausalLM": "modeling_custom.QWenLMHeadModel",
        },
        "num_hidden_layers": N_LAYERS,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    targets = ["c_attn", "attn.c_proj", "w1", "w2"]
    adapted = r".*\.(c_attn|attn\.c_proj|w1|w2)"
    return Remote("Qwen1", config, shapes, targets, adapted, 4 * N_LAYERS)


REMOTES = (_internvl2(), _chatglm(), _qwen1())


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(31)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write_base(root: Path, remote: Remote) -> Path:
    """Write the checkpoint, with code that leaves a mark when somebody runs it."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(remote.config))
    (root / "modeling_custom.py").write_text(CODE)
    save_file(tensors({**remote.shapes, **EXTRAS}), root / "model.safetensors", {"format": "pt"})
    return root


def write_adapter(root: Path, targets: str | list[str], modules: Mapping[str, tuple[int, int]]) -> Path:
    """Write an adapter of modules, each with the sizes of its output and its input."""
    root.mkdir()
    generator = torch.Generator().manual_seed(37)
    factors = {}
    for module, (n_out, n_in) in modules.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator)
    save_file(factors, root / "adapter_model.safetensors", {"format": "pt"})
    write_config(root, r=RANK, lora_alpha=ALPHA, target_modules=targets)
    return root


def adapted(remote: Remote) -> dict[str, tuple[int, int]]:
    """Return the modules of an adapter, with their sizes."""
    found = {name.removesuffix(".weight"): shape for name, shape in remote.shapes.items()}
    return {
        name: (s[0], s[1]) for name, s in found.items() if re.fullmatch(remote.adapted, name) and len(s) == 2
    }


@pytest.mark.parametrize("remote", REMOTES, ids=lambda remote: remote.name)
def test_every_adapted_matrix_gets_its_change_and_no_code_of_the_model_is_run(
    remote, tmp_path, merged, stored
):
    base = write_base(tmp_path / "base", remote)
    modules = adapted(remote)
    assert len(modules) == remote.n_adapted
    adapter = write_adapter(tmp_path / "adapter", remote.targets, modules)
    out = merged(base, adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    for module in modules:
        name = f"{module}.weight"
        a, b = (factors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        wanted = before[name] + ALPHA / RANK * (b @ a)
        assert (after[name] - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), name
    raw_before, raw_after = stored(base), stored(out)
    assert list(raw_after) == list(raw_before)
    changed = {name for name in raw_before if raw_after[name] != raw_before[name]}
    assert changed == {f"{module}.weight" for module in modules}
    assert (out / "modeling_custom.py").read_text() == CODE
    assert not list(tmp_path.rglob("executed"))


WRONG = {
    "names of the vision tower": (r"^language_model\.model", "vision_model.encoder"),
    "a layer that is not there": (r"\.layers\.1\.", ".layers.9."),
    "shapes of the vision tower": (r"^language_model\.model\.(layers\.\d+)\.attention\.wqkv", r"vision_model.encoder.\1.attn.qkv"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_an_adapter_that_points_at_the_wrong_tower_is_refused(wrong, tmp_path, cli):
    remote = _internvl2()
    pattern, replacement = WRONG[wrong]
    moved = {re.sub(pattern, replacement, name): sizes for name, sizes in adapted(remote).items()}
    assert moved != adapted(remote)
    base = write_base(tmp_path / "base", remote)
    adapter = write_adapter(tmp_path / "adapter", SWIFT.format("language_model|mlp1|vision_model"), moved)
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    (first, *_) = sorted(set(moved) - set(adapted(remote)))
    assert first in result.output
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("executed"))


def test_a_name_that_ends_like_two_stored_ones_is_refused_with_both(tmp_path, cli):
    remote = _internvl2()
    ear = {
        n.replace("vision_model", "audio_model"): s for n, s in remote.shapes.items() if "vision_model" in n
    }
    remote = Remote(remote.name, remote.config, {**remote.shapes, **ear}, [], "", 0)
    base = write_base(tmp_path / "base", remote)
    modules = {"encoder.layers.0.attn.qkv": (3 * TOWER, TOWER)}
    adapter = write_adapter(tmp_path / "adapter", ["qkv"], modules)
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    for tower in ("vision_model", "audio_model"):
        assert tower in result.output
    assert not (tmp_path / "out").exists()
