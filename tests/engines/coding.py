"""Outputs with new codes for engines, made by the real command, and what they have to compute.

The reference is the output as this project decodes it, in float32. Beside it stands what base and adapter compute, unmerged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.conftest import write_tokenizer
from tests.engines.building import Answer, Command, answer
from tests.engines.stored import WEIGHTS_ROUNDED
from tests.engines.storing import base_of, prompts_of
from tests.parity.building import one_thread
from tests.storages import dense
from tests.storages.reference import LINEAR, decoded, everywhere, model_of
from tests.storages.training import log_probabilities, task, trained
from tests.tampering import edit_tensors

if TYPE_CHECKING:
    from tests.engines.coded import Coded, Rounding

N_CANDIDATES = 2000
"""Prompts that are looked at. Where engines round inputs to eight bits, few lead to no toss of a coin."""


@dataclass(frozen=True, slots=True)
class Made:
    """An output, and what it has to compute."""

    out: Path
    prompts: list[list[int]]
    wanted: list[Answer]

    learned: list[list[int]]
    """What the adapter was trained on."""

    before: torch.Tensor
    """Log-probabilities of that in the base, ``[n, tokens]``."""

    after: torch.Tensor
    """The same of base and adapter, unmerged."""

    decoded: torch.Tensor
    """The same of the output as it is decoded."""

    def kept(self, found: torch.Tensor) -> float:
        """Return the share of what was learned that is left in some log-probabilities."""
        return float((found - self.before).mean() / (self.after - self.before).mean())


def prepare_coded(root: Path, about: Coded, command: Command) -> dict[Rounding, Made]:
    """Build a base, train an adapter by heart, make the outputs, and compute what is right."""
    here = root / about.title.replace(" ", "-").replace(",", "")
    base = base_of(here / "base", about.base) if about.base else _dense(here / "base")
    plain = model_of(decoded(base), base, here / "plain")
    sequences = task(plain.config.vocab_size)
    fields: dict[str, Any] = {"target_modules": list(LINEAR)}
    if about.base:
        fields = everywhere(about.base.fixture)
    with one_thread():
        with torch.no_grad():
            before = log_probabilities(plain, sequences)
        learned = trained(plain, here / "adapter", sequences, **fields)
        with torch.no_grad():
            after = log_probabilities(learned, sequences)
    found: dict[Rounding, Made] = {}
    for rounding in about.roundings:
        out = here / f"on-grid-{rounding}"
        how = ("--quantize", about.scheme) if about.scheme else ("--out-storage", "base", "--allow-loss")
        result = command(
            "--base", base, "--adapter", here / "adapter", "--out", out, "--rounding", rounding, *how
        )
        assert result.exit_code == 0, result.output
        model = model_of(decoded(out), out, here / "decoded")
        with one_thread(), torch.no_grad():
            prompts = prompts_of(model, max(WEIGHTS_ROUNDED, about.tolerance.largest), N_CANDIDATES)
            wanted = [answer(model, prompt) for prompt in prompts]
            of_output = log_probabilities(model, sequences)
        found[rounding] = Made(out, prompts, wanted, sequences.tolist(), before, after, of_output)
    return found


def _dense(out: Path) -> Path:
    """Write a Llama with one head of 128: TurboMind reorders the rows of a head, and with them blocks of scales."""
    dense.build(out, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=128)
    write_tokenizer(out)
    # LMDeploy clears it in some families.
    edit_tensors(out / "model.safetensors", lambda tensors: tensors["model.embed_tokens.weight"][3].zero_())
    return out
