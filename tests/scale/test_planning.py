"""A plan of the largest checkpoints there are takes seconds, and little memory: it reads headers only."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hollows.tensors import Stored, write

NO_SOCKETS = str(Path(__file__).parents[1] / "no_sockets")

pytestmark = pytest.mark.system

N_SHARDS = 1000
N_LAYERS, N_DENSE, N_EXPERTS = 132, 3, 256
HIDDEN, NARROW, WIDE, VOCAB, RANK = 256, 96, 384, 512, 2
Q_RANK, KV_RANK, NOPE, ROPE, V, N_HEADS = 48, 32, 16, 16, 16, 4
N_ADAPTED_LAYERS = 61
"""As many as DeepSeek-V3 has: an adapter of all their matrices has some 90 000 tensors."""

CPU_SECONDS = 10
"""On a machine that does the `reference` in a second; a slower one has as much more.

An adapter that has a hundred thousand tensors itself takes as long again, and so does joining as many stored experts to
stacked ones, for which transformers has to be imported.
"""

BYTES = 1_000_000_000

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": WIDE, "moe_intermediate_size": NARROW, "vocab_size": VOCAB,
    "num_hidden_layers": N_LAYERS, "first_k_dense_replace": N_DENSE, "n_routed_experts": N_EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": V, "tie_word_embeddings": False,
}  # fmt: skip

MLP = {"gate_proj": (0, 1), "up_proj": (0, 1), "down_proj": (1, 0)}


def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = (width, HIDDEN)
    for name, (n_out, n_in) in MLP.items():
        yield f"{prefix}.{name}", (sizes[n_out], sizes[n_in])


def matrices(n: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the linear layers of a layer with their sizes."""
    layer = f"model.layers.{n}"
    yield f"{layer}.self_attn.q_a_proj", (Q_RANK, HIDDEN)
    yield f"{layer}.self_attn.q_b_proj", (N_HEADS * (NOPE + ROPE), Q_RANK)
    yield f"{layer}.self_attn.kv_a_proj_with_mqa", (KV_RANK + ROPE, HIDDEN)
    yield f"{layer}.self_attn.kv_b_proj", (N_HEADS * (NOPE + V), KV_RANK)
    yield f"{layer}.self_attn.o_proj", (HIDDEN, N_HEADS * V)
    if n < N_DENSE:
        yield from mlp(f"{layer}.mlp", WIDE)
        return
    yield from mlp(f"{layer}.mlp.shared_experts", NARROW)
    for expert in range(N_EXPERTS):
        yield from mlp(f"{layer}.mlp.experts.{expert}", NARROW)


def base_shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(N_LAYERS):
        found |= {f"{name}.weight": shape for name, shape in matrices(n)}
        layer = f"model.layers.{n}"
        found |= {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found[f"{layer}.self_attn.q_a_layernorm.weight"] = (Q_RANK,)
        found[f"{layer}.self_attn.kv_a_layernorm.weight"] = (KV_RANK,)
        if n >= N_DENSE:
            found[f"{layer}.mlp.gate.weight"] = (N_EXPERTS, HIDDEN)
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = (N_EXPERTS,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of a hundred thousand tensors in a thousand files; each file has a part of several layers."""
    root = tmp_path_factory.mktemp("huge")
    shapes = base_shapes()
    assert len(shapes) > 100_000
    files = {
        name: f"model-{n % N_SHARDS + 1:05}-of-{N_SHARDS:05}.safetensors" for n, name in enumerate(shapes)
    }
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, file in files.items():
        shards.setdefault(file, {})[name] = shapes[name]
    for file, held in shards.items():
        write(root / file, [Stored(name, "BF16", shape) for name, shape in held.items()])
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(CONFIG))
    return root


def write_adapter(root: Path, factors: Iterable[tuple[str, tuple[int, int], int]], **fields: object) -> Path:
    """Write an adapter of modules, each with its sizes and its number of experts."""
    root.mkdir()
    stored = []
    for name, (n_out, n_in), n_experts in factors:
        stored.append(Stored(f"base_model.model.{name}.lora_A.weight", "BF16", (n_experts * RANK, n_in)))
        stored.append(Stored(f"base_model.model.{name}.lora_B.weight", "BF16", (n_out, n_experts * RANK)))
    # An adapter that holds nothing but zeros is refused.
    write(root / "adapter_model.safetensors", stored, lambda one: [b"\x3c\x3c" * (one.nbytes // 2)])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "peft_version": "0.21.2", **fields}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


@dataclass(frozen=True)
class Ran:
    """What a process printed and used."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    peak_bytes: int


def reference() -> float:
    """Return the CPU seconds of a loop of plain Python; a desktop of 2023 takes one for it."""
    start, total = time.process_time(), 0
    for n in range(20_000_000):
        total += n
    assert total
    return time.process_time() - start


def run(tmp_path: Path, *arguments: object) -> Ran:
    """Run the command, and ask the kernel what it cost."""
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        command = [sys.executable, "-m", "lora_merge", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [NO_SOCKETS, *sys.path]))}
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        peak_bytes, pid = 0, 0
        while not pid:
            peak_bytes = max(peak_bytes, resident_peak_bytes(process.pid))
            time.sleep(0.02)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
    cost = usage.ru_utime + usage.ru_stime
    return Ran(process.returncode, out.read_text(), err.read_text(), cost, peak_bytes)


def resident_peak_bytes(pid: int) -> int:
    """Return the most memory that a process had so far; what ``wait4`` tells counts the test's own before ``exec``."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    is_ours = b"lora_merge" in command  # and no longer the copy of the test
    return int(lines["VmHWM"].split()[0]) * 1024 if is_ours and "VmHWM" in lines else 0


def assert_planned(base: Path, adapter: Path, tmp_path: Path, n_merged: int, times: int) -> None:
    """The plan merges that many tensors, in bounds of time and memory. Other processes do not count: CPU does."""
    ran = run(
        tmp_path, "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--dry-run", "--json"
    )
    assert ran.code == 0, ran.err[-2000:]
    summary = json.loads(ran.out)["summary"]
    assert (summary["n_merged"], summary["n_shards"]) == (n_merged, N_SHARDS)
    assert ran.peak_bytes < BYTES
    assert ran.peak_bytes > 1_000_000 or not Path("/proc").exists()
    assert ran.cpu_seconds < times * CPU_SECONDS * max(1.0, reference())


def test_an_adapter_of_the_attention(base, tmp_path):
    modules = [
        (name, shape, 1) for n in range(N_LAYERS) for name, shape in matrices(n) if ".self_attn." in name
    ]
    targets = sorted({name.rpartition(".")[2] for name, _, _ in modules})
    adapter = write_adapter(tmp_path / "adapter", modules, target_modules=targets)
    assert_planned(base, adapter, tmp_path, len(modules), times=1)


def test_an_adapter_of_every_expert_by_itself(base, tmp_path):
    modules = [(name, shape, 1) for n in range(N_ADAPTED_LAYERS) for name, shape in matrices(n)]
    adapter = write_adapter(
        tmp_path / "adapter",
        modules,
        target_modules=sorted({name.rpartition(".")[2] for name, _, _ in modules}),
        layers_to_transform=list(range(N_ADAPTED_LAYERS)),
    )
    assert_planned(base, adapter, tmp_path, len(modules), times=2)


def test_an_adapter_of_stacked_experts(base, tmp_path):
    stacks = [
        stack
        for n in range(N_DENSE, N_LAYERS)
        for stack in (
            (f"model.layers.{n}.mlp.experts.base_layer", (2 * NARROW, HIDDEN), N_EXPERTS),
            (f"model.layers.{n}.mlp.experts", (HIDDEN, NARROW), N_EXPERTS),
        )
    ]
    adapter = write_adapter(
        tmp_path / "adapter",
        stacks,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    assert_planned(base, adapter, tmp_path, (N_LAYERS - N_DENSE) * N_EXPERTS * 3, times=3)
