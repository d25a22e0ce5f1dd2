"""Trained models: what is left of what an adapter learnt, and of what the base knew."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, Final

import demo
import torch

from rounded import merging
from rounded.measuring import gain_kept, moved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path  # noqa: TC004 - a field's type, never evaluated

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]

INTERMEDIATE: Final = 512
"""The demo's model has 688, which groups of 32 and blocks of 128 do not divide."""

TARGETS: Final = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

N_STEPS: Final = 25
SEEDS: Final = (1, 2, 3)

CASES: Final = (
    ("bf16", 3e-6),
    ("fp8", 3e-5),
    ("fp8", 3e-4),
    ("int4-g32", 3e-4),
    ("mxfp4", 3e-4),
    ("nvfp4", 3e-4),
    ("nf4", 3e-4),
)
"""Grid of the base, and the learning rate: the change that is learnt grows with it."""

WEIGHTS: Final = (1.0, 0.1, 0.03, 0.01, 0.003)
"""Of the adapter whose merge into BF16 is compared with the exact one."""

_NF4 = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import torch
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=how, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """The trained base and the texts of both tasks."""

    base: Path
    tiny: Path
    task: Batch
    """What the adapter is to learn."""

    plain: Batch
    """What the base has learnt."""


def set_up(work: Path) -> Setup:
    """Train the base, as the demo does, and an adapter that changes nothing."""
    base = work / "base"
    if not base.exists():
        demo.build_base(base, intermediate_size=INTERMEDIATE)
    tokenizer = demo.load_tokenizer(base)
    task, plain = (
        demo.as_batch(tokenizer, demo.conversations(tokenizer, texts)) for texts in (demo.PIRATE, demo.PLAIN)
    )
    width = demo.load_model(base).config.hidden_size
    tiny = torch.full((1, width), 1.0), torch.full((width, 1), merging.TINY)
    lora = merging.write_adapter(work / "tiny", {"model.layers.0.self_attn.q_proj": tiny})
    return Setup(base, lora, task, plain)


def rows(
    work: Path,
    oracles: Path,
    cases: tuple[tuple[str, float], ...] = CASES,
    seeds: tuple[int, ...] = SEEDS,
) -> Iterator[Row]:
    """Yield the losses of every merged model, for each grid, size of the change and seed.

    Args:
        work: a folder.
        oracles: a Python that has transformers and bitsandbytes, for NF4.
        cases: grids and learning rates.
        seeds: of the adapters.
    """
    setup = set_up(work)
    for grid in dict.fromkeys(grid for grid, _ in cases):
        base = _base_on(grid, setup, work, oracles)
        plain = merging.decoded(base, work / f"{grid}-decoded", setup.tiny)
        for learning_rate in [rate for name, rate in cases if name == grid]:
            for seed in seeds:
                yield {
                    "grid": grid,
                    "learning_rate": learning_rate,
                    "seed": seed,
                    **_losses(setup, work, base, plain, grid, learning_rate, seed),
                }


def _base_on(grid: str, setup: Setup, work: Path, oracles: Path) -> Path:
    """Return the base, stored on a grid."""
    if grid == "bf16":
        return setup.base
    out = work / grid
    if grid != "nf4":
        return merging.quantised(setup.base, out, grid, setup.tiny)
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([oracles, "-c", _NF4, setup.base, out], check=True, capture_output=True)
    for file in setup.base.glob("*token*"):
        shutil.copy(file, out)
    return out


def _losses(
    setup: Setup, work: Path, base: Path, plain: Path, grid: str, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Train an adapter on a decoded base, merge it with every rounding, and return what the models lose on both tasks."""
    adapter = work / f"adapter-{grid}-{learning_rate:g}-{seed}"
    adapted = trained(plain, adapter, setup.task, learning_rate, seed)
    said = {"base": Said.by(demo.load_model(plain), setup), "unmerged": Said.by(adapted, setup)}
    for rounding in merging.ROUNDINGS:
        out = merging.merged(base, adapter, work / "merged", rounding)
        model = demo.load_model(merging.decoded(out, work / "merged-decoded", setup.tiny))
        said[rounding] = Said.by(model, setup)
    first, aim = said["base"], said["unmerged"]
    by_rounding = {rounding: said[rounding] for rounding in merging.ROUNDINGS}
    return {
        "delta": delta_std(adapted),
        "loss": {name: one.loss for name, one in said.items()},
        "plain_loss": {name: one.plain_loss for name, one in said.items()},
        "gain_kept": {
            rounding: gain_kept(first.loss, aim.loss, one.loss) for rounding, one in by_rounding.items()
        },
        "off": {
            rounding: moved(first.logits, aim.logits, one.logits).error
            for rounding, one in by_rounding.items()
        },
    }


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a model computes for the texts of both tasks."""

    loss: float
    """On the adapter's task."""

    plain_loss: float
    """On the base's."""

    logits: torch.Tensor
    """For the adapter's task, ``[n_tokens, vocabulary]``."""

    @classmethod
    def by(cls, model: Any, setup: Setup) -> Said:
        """Ask a model."""
        with torch.no_grad():
            found, plain = model(**setup.task), model(**setup.plain)
        logits = found.logits[setup.task["attention_mask"].bool()]
        return cls(found.loss.item(), plain.loss.item(), logits)


def trained(
    base: Path, out: Path, batch: Batch, learning_rate: float, seed: int, n_steps: int = N_STEPS
) -> Any:
    """Return a plain checkpoint with a LoRA of rank 8, trained on a batch and written to a folder; one that was written
    before is read.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if out.exists():
        return PeftModel.from_pretrained(demo.load_model(base), out).eval()
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(demo.load_model(base), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    return model.eval()


def delta_std(model: Any) -> float:
    """Return the standard deviation of a trained change, the mean over all modules."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    return mean(float(layer.get_delta_weight("default").detach().std()) for layer in layers)


def scaled_rows(work: Path, weights: tuple[float, ...] = WEIGHTS) -> Iterator[Row]:
    """Yield how the logits of merges into BF16 compare with those of the exact merge, for an adapter that is scaled down."""
    setup = set_up(work)
    adapter = work / "adapter-scaled"
    size = delta_std(trained(setup.base, adapter, setup.task, 3e-4, 1, n_steps=40))

    def logits_of(folder: Path) -> torch.Tensor:
        return Said.by(demo.load_model(folder), setup).logits

    base = logits_of(setup.base)
    for weight in weights:
        exact = logits_of(merging.merged(setup.base, adapter, work / "merged", "exact", weight))
        for rounding in merging.ROUNDINGS:
            out = merging.merged(setup.base, adapter, work / "merged", rounding, weight)
            found = moved(base, exact, logits_of(out))
            yield {"delta": size * weight, "rounding": rounding, "kept": found.kept, "error": found.error}
