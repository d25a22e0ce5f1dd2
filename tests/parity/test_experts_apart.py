"""Experts one by one in the adapter and stacked in the base, as copies of a model for 4-bit training have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_merge.cli import exits
from tests.conftest import COMMON, VOCAB
from tests.parity.building import one_thread, perturb
from tests.tampering import edit_json, edit_tensors

N_EXPERTS = 4
TOLERANCE = 3e-5  # as in test_families.py


@dataclass(frozen=True)
class Family:
    """A family with stacked experts, and how a copy of it has them one by one."""

    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    alternates: bool = False
    """Gate and up take turns, row by row."""
    halves: bool = False
    """The copy has gate and up apart."""
    transposed: bool = False
    """The base stores an expert ``[in, out]``."""
    biased: bool = False
    single: bool = False
    """The copy has a module per expert, not a list per matrix."""


MIXTURE = {**COMMON, "tie_word_embeddings": False, "head_dim": 16, "num_experts_per_tok": 2}
GPT_OSS = {**MIXTURE, "num_local_experts": N_EXPERTS, "sliding_window": 8}
QWEN = {
    **MIXTURE, "num_experts": N_EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
LLAMA4 = {
    **MIXTURE, "num_local_experts": N_EXPERTS, "intermediate_size": 40, "intermediate_size_mlp": 80,
    "moe_layers": [0, 1],
}  # fmt: skip
FAMILIES = {
    "gpt-oss": Family("GptOssForCausalLM", "GptOssConfig", GPT_OSS, alternates=True, transposed=True, biased=True),
    "gpt-oss, square": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GPT_OSS, "intermediate_size": 64},
        alternates=True, transposed=True, biased=True,
    ),
    "gpt-oss, square gate": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GPT_OSS, "intermediate_size": 32},
        alternates=True, transposed=True, biased=True,
    ),
    "Qwen3.5-MoE": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", QWEN),
    "Qwen3.5-MoE, gate and up apart": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", QWEN, halves=True),
    "Qwen3.5-MoE, square": Family(
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**QWEN, "moe_intermediate_size": 64}, halves=True
    ),
    "Llama 4": Family("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, halves=True, transposed=True),
    "Llama 4, a module per expert": Family(
        "Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, halves=True, transposed=True, single=True
    ),
}  # fmt: skip


class Apart(nn.Module):
    """Experts as linear layers, computed one after the other for every token."""

    def __init__(self, stacked: Any, family: Family) -> None:
        super().__init__()
        self._family, self._gate = family, getattr(stacked, "_apply_gate", None)
        matrices = {
            "gate_up_proj": self._linear(stacked, "gate_up_proj"),
            "down_proj": self._linear(stacked, "down_proj"),
        }
        if family.halves:
            whole = matrices.pop("gate_up_proj")
            for n, name in enumerate(("gate_proj", "up_proj")):
                matrices[name] = [_half(one, n) for one in whole]
        for name, layers in matrices.items():
            if family.single:
                for n, layer in enumerate(layers):
                    if not hasattr(self, str(n)):
                        self.add_module(str(n), nn.Module())
                    getattr(self, str(n)).add_module(name, layer)
            else:
                self.add_module(f"{name}s", nn.ModuleList(layers))

    def _linear(self, stacked: Any, name: str) -> list[nn.Linear]:
        layers = []
        for n, matrix in enumerate(getattr(stacked, name)):
            weight = matrix.T if self._family.transposed else matrix
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=self._family.biased)
            layer.weight.data = weight.detach().clone().contiguous()
            if self._family.biased:
                layer.bias.data = getattr(stacked, f"{name}_bias")[n].detach().clone()
            layers.append(layer)
        return layers

    def _of(self, name: str, n: int) -> Any:
        return getattr(getattr(self, str(n)), name) if self._family.single else getattr(self, f"{name}s")[n]

    def _expert(self, n: int, x: torch.Tensor) -> torch.Tensor:
        if self._family.halves:
            gate, up = self._of("gate_proj", n)(x), self._of("up_proj", n)(x)
        else:
            both = self._of("gate_up_proj", n)(x)
            if self._family.alternates:
                return self._of("down_proj", n)(self._gate(both))
            gate, up = both.chunk(2, dim=-1)
        return self._of("down_proj", n)(up * nn.functional.silu(gate))

    def forward(self, x: torch.Tensor, indices: Any = None, weights: Any = None) -> torch.Tensor:
        """Compute what the stack computes; Llama 4 hands every expert its tokens, one block after the other."""
        if indices is None:
            blocks = x.view(N_EXPERTS, -1, x.shape[-1])
            return torch.stack([self._expert(n, block) for n, block in enumerate(blocks)]).view_as(x)
        out = torch.zeros_like(x)
        for n in range(N_EXPERTS):
            share = (weights * (indices == n)).sum(-1, keepdim=True)
            out += self._expert(n, x) * share
        return out


def _half(whole: nn.Linear, n: int) -> nn.Linear:
    rows = whole.weight.shape[0] // 2
    layer = nn.Linear(whole.weight.shape[1], rows, bias=False)
    layer.weight.data = whole.weight.data[n * rows : (n + 1) * rows].clone()
    return layer


def make(family: Family) -> Any:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, family.config)(**family.fields)
    model = getattr(transformers, family.architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def taken_apart(model: Any, family: Family) -> Any:
    """Return the model with each stack of experts taken apart, in place."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], Apart(module, family))
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(16).view(2, 8) * 5 % VOCAB
    with one_thread(), torch.no_grad():
        return model.eval()(input_ids=ids).logits


ALL = r".*(q_proj|experts\.(\w+projs\.\d+|\d+\.\w+proj))"


def trained(tmp_path, family: Family, **fields: Any) -> tuple[Any, Any, torch.Tensor]:
    """Return the directories of a base and an adapter, and what PEFT makes of both, unmerged."""
    model = make(family)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    peft_model = get_peft_model(
        taken_apart(model, family), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **fields})
    )
    perturb(peft_model, 0.1)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(peft_model)


def off_by(root, family: Family, wanted: torch.Tensor) -> float:
    import transformers

    got = logits(getattr(transformers, family.architecture).from_pretrained(root, dtype="auto"))
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_their_own_are_merged_into_the_stack(name, cli, tmp_path):
    family = FAMILIES[name]
    base, adapter, wanted = trained(tmp_path, family)
    assert off_by(base, family, wanted) > 0.05

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.output
    assert off_by(tmp_path / "out", family, wanted) < TOLERANCE
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"use_rslora": True, "alpha_pattern": {r"experts\.down_projs\.2": 3}}, id="scales"),
        pytest.param({"rank_pattern": {r"experts\.gate_up_projs\.1": 2}}, id="ranks"),
        pytest.param({"bias": "lora_only"}, id="trained biases"),
        pytest.param({"bias": "all"}, id="all biases"),
        pytest.param({"lora_bias": True}, id="a bias of lora_B"),
        pytest.param({"use_dora": True}, id="DoRA"),
    ],
)
def test_what_else_an_experts_lora_may_have(fields, cli, tmp_path):
    family = FAMILIES["gpt-oss, square"]
    targets = r".*experts\.(gate_up|down)_projs\.\d+"
    base, adapter, wanted = trained(tmp_path, family, target_modules=targets, **fields)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.output
    assert off_by(tmp_path / "out", family, wanted) < TOLERANCE


ROUTER = r".*(experts\.\w+projs\.\d+|router\.linear)"


def with_router_apart(root) -> None:
    """Rewrite an adapter that was trained on expert 0's matrix into one on a router of Unsloth's copy."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"base_model.model.model.layers.{layer}.mlp.router.linear.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        * 0.3
        for layer in (0, 1)
        for side, shape in (("A", (4, 64)), ("B", (N_EXPERTS, 4)))
    }
    edit_tensors(root / "adapter_model.safetensors", lambda tensors: tensors.update(factors))
    edit_json(root / "adapter_config.json", target_modules=ROUTER)


def test_the_router_of_a_copy_is_a_linear_layer_in_a_module(cli, tmp_path):
    family = FAMILIES["gpt-oss"]
    base, adapter, _ = trained(tmp_path, family, target_modules=ROUTER)
    with_router_apart(adapter)
    before = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.output
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for layer in (0, 1):
        a, b = (
            factors[f"base_model.model.model.layers.{layer}.mlp.router.linear.lora_{side}.weight"]
            for side in "AB"
        )
        name = f"model.layers.{layer}.mlp.router.weight"
        torch.testing.assert_close(merged[name], before[name] + 1.5 * b @ a)


@pytest.mark.parametrize(
    ("name", "drop", "says"),
    [
        pytest.param("gpt-oss", ".0.mlp.experts.down_projs.2.", "layers.0.mlp.experts.down_projs.2", id="expert"),
        pytest.param("gpt-oss", ".layers.1.mlp.", "layers.1.mlp.experts.down_projs.0", id="layer"),
    ],
)  # fmt: skip
def test_an_expert_that_the_adapter_lost_is_missed(name, drop, says, cli, tmp_path):
    base, adapter, _ = trained(tmp_path, FAMILIES[name])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for lost in [tensor for tensor in tensors if drop in tensor]:
            del tensors[lost]

    edit_tensors(adapter / "adapter_model.safetensors", change)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert f"{says}: the config targets it, and the adapter has no tensors for it" in result.stderr


def test_half_an_expert_of_gpt_oss_is_refused_since_gate_and_up_take_turns(cli, tmp_path):
    family = FAMILIES["gpt-oss"]
    base, adapter, _ = trained(tmp_path, family)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "gate_up_projs" in name:
                tensor = tensors.pop(name)
                half = tensor[: len(tensor) // 2] if "lora_B" in name else tensor
                tensors[name.replace("gate_up_projs", "gate_projs")] = half.contiguous()

    edit_tensors(adapter / "adapter_model.safetensors", change)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "gate and up alternate in model.layers.{0-1}.mlp.experts.gate_up_proj" in result.stderr
    assert "merge it with the tool of the trainer" in result.stderr
    assert "save_original_format" not in result.stderr


def test_an_expert_beyond_the_last_has_no_place(cli, tmp_path):
    base, adapter, _ = trained(tmp_path, FAMILIES["gpt-oss"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "down_projs.3." in name]:
            tensors[name.replace("projs.3", "projs.4")] = tensors.pop(name)

    edit_tensors(adapter / "adapter_model.safetensors", change)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "the base has no model.layers.0.mlp.experts.down_projs.4.weight" in result.stderr


def test_an_adapter_of_the_stack_is_merged_into_a_base_with_experts_one_by_one(cli, tmp_path):
    """Both ways of storing the base end in the same numbers."""
    family = FAMILIES["gpt-oss, square"]
    model = make(family)
    model.save_pretrained(tmp_path / "stacked")
    peft_model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]),
    )
    perturb(peft_model, 0.1)
    peft_model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    taken = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith(("_proj", "_proj_bias")) or "experts" not in name
    }
    for name in stored.keys() - taken.keys():
        for n, tensor in enumerate(stored[name]):
            stem, end = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
            taken[f"{stem}s.{n}.{end}"] = tensor.T.contiguous()
    (tmp_path / "listed").mkdir()
    save_file(taken, tmp_path / "listed" / "model.safetensors", {"format": "pt"})
    (tmp_path / "listed" / "config.json").write_bytes((tmp_path / "stacked" / "config.json").read_bytes())

    for base in ("stacked", "listed"):
        result = cli(
            "--base", tmp_path / base, "--adapter", tmp_path / "adapter", "--out", tmp_path / f"{base}-out"
        )
        assert result.exit_code == exits.OK, result.output

    one, other = (load_file(tmp_path / f"{base}-out" / "model.safetensors") for base in ("stacked", "listed"))
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            again = torch.stack([other[f"{stem}s.{n}.weight"].T for n in range(N_EXPERTS)])
            torch.testing.assert_close(again, one[stem])
            assert not torch.equal(one[stem], stored[stem])


@pytest.mark.parametrize("name", ["gpt-oss", "Llama 4"])
def test_experts_of_their_own_are_fused_and_no_engine_is_told_to_have_them(name, cli, tmp_path):
    family = FAMILIES[name]
    base, adapter, wanted = trained(tmp_path, family)

    fused = cli("convert", adapter, "--fuse-experts", "--base", base, "--out", tmp_path / "fused")
    served = cli("convert", adapter, "--for", "vllm", "--base", base, "--out", tmp_path / "vllm")
    renamed = cli("convert", adapter, "--rename", "v5", "--base", base, "--out", tmp_path / "v5")
    mlx = cli("convert", adapter, "--format", "mlx", "--base", base, "--out", tmp_path / "mlx")
    merged = cli("--base", base, "--adapter", tmp_path / "fused", "--out", tmp_path / "out", "--strict")

    assert fused.exit_code == merged.exit_code == exits.OK, fused.output + merged.output
    assert off_by(tmp_path / "out", family, wanted) < TOLERANCE
    for refused in (served, renamed, mlx):
        assert refused.exit_code == exits.PLAN, refused.output
    assert "vLLM has no modules with these names" in served.stderr
    assert "--fuse-experts" in renamed.stderr
    assert "a family whose module names in mlx-lm are not known" in mlx.stderr
