"""Bases and adapters for engines, merged by the real command, and what base and adapter compute.

The reference is PEFT's forward pass, unmerged, in float32. Of a model that transformers has no class for, it is the
same model under the names of a family that it has one for, with ``W + s·B·A`` in its weights.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.conftest import write_tokenizer
from tests.engines import internlm2
from tests.parity.building import one_thread, perturb
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from tests.engines.families import Case, Model

PROMPTS = [[1, 17, 5, 80, 33, 9, 62], [1, 94, 3, 41], [1, 28, 70, 11, 55, 20, 63, 88, 35]]
N_TOKENS = 16
RANK = {"r": 8, "lora_alpha": 16}

LOST = "model.layers.1.mlp.down_proj.weight"
"""A tensor of a Llama's to leave out."""

TOLERANCE = 1e-5
"""How far a log-probability may be off that is computed in float32, in another order.

A sum of 192 products, the longest here, errs by about √192 · 2⁻²⁴ of its size, whatever the order. Thirteen stand one
behind the other, six in each of two layers and the head, and independent errors add up as squares do: √13 times that
is 3e-6. The logits are about 4 in size.
"""

NOTICEABLE = 1000 * TOLERANCE
"""What an adapter has to change at least, or agreeing with it says nothing."""

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generates after a prompt, greedily, and how likely it finds each token, the prompt's too."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    gap: float
    """The smallest lead of a token that was generated over the next best."""

    def numbers(self) -> list[float]:
        """Return every log-probability."""
        return [*self.prompt_logprobs, *self.logprobs]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merged checkpoint, and what it has to compute."""

    base: Path
    merged: Path
    wanted: list[Answer]
    without: list[list[float]]
    """The base's own log-probabilities of the same tokens."""


def make(model: Model) -> Any:
    """Return a model with random weights, always the same, whose answers are no coin tosses."""
    import transformers

    torch.manual_seed(zlib.crc32(model.name.encode()))
    config = getattr(transformers, model.config)(**model.fields)
    found = getattr(transformers, model.architecture)(config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        padding = found.config.get_text_config().pad_token_id
        if padding is not None:
            found.get_input_embeddings().weight[padding] = 0  # LMDeploy clears it in some families
    return found.eval()


@cache
def base(root: Path, model: Model) -> Path:
    """Return the directory of a base checkpoint."""
    out = root / model.name.replace(" ", "-").replace(",", "")
    found = make(model)
    if model.is_internlm2:
        internlm2.save(found, out)
    else:
        found.save_pretrained(out)
    if model.hub:
        edit_tensors(out / "model.safetensors", lambda tensors: _rename(tensors, model))
    edit_json(out / "config.json", **model.published)
    _write_processor(out, model)
    return out


def _write_processor(out: Path, model: Model) -> None:
    """Write a tokenizer, and what a model that sees has beside it."""
    write_tokenizer(out)
    edit_json(out / "tokenizer_config.json", extra_special_tokens=dict(model.special_tokens))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {model.words.get(word, word): n for word, n in vocabulary.items()}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in model.files.items():
        (out / name).write_text(json.dumps(content))


def _rename(tensors: dict[str, torch.Tensor], model: Model) -> None:
    """Give a checkpoint's tensors the Hub's names."""
    for name in list(tensors):
        other = name
        for pattern, replacement in model.hub:
            other = re.sub(pattern, replacement, other)
        tensors[other] = tensors.pop(name)


def load(directory: Path, model: Model) -> Any:
    """Return a checkpoint in transformers."""
    import transformers

    return getattr(transformers, model.architecture).from_pretrained(directory, dtype="auto").eval()


def prepare(root: Path, case: Case, command: Command) -> Prepared:
    """Train an adapter in the sense of this suite, merge it, and compute what is right."""
    from peft import LoraConfig

    directory = base(root, case.model)
    out = directory.with_name(f"{directory.name}-{case.adapter.replace(' ', '-')}")
    adapter = out.with_name(f"{out.name}-adapter")
    if case.model.is_internlm2:
        plain, trained = internlm2.train(make(case.model), adapter, {**RANK, **case.lora})
        unadapted: Any = nullcontext
    else:
        train(directory, case.model, LoraConfig(**{**RANK, **case.lora}), adapter)
        plain = trained = adapted(directory, case.model, adapter)
        unadapted = trained.disable_adapter
    result = command("--base", directory, "--adapter", adapter, "--out", out)
    assert result.exit_code == 0, result.output
    wanted = answers(trained)
    with unadapted():
        without = log_probabilities(plain, wanted)
    return Prepared(directory, out, wanted, without)


def train(
    directory: Path, model: Model, config: Any, out: Path, change: Callable[[Any], None] | None = None
) -> None:
    """Write an adapter with random numbers, always the same.

    Args:
        directory: of the base.
        model: what that is.
        config: PEFT's.
        out: where the adapter goes.
        change: what is done to the model in PEFT besides.
    """
    from peft import get_peft_model

    torch.manual_seed(3)
    training = get_peft_model(load(directory, model), config)
    perturb(training, 0.06)
    if change is not None:
        with torch.no_grad():
            change(training)
    training.save_pretrained(out)


def adapted(directory: Path, model: Model, adapter: Path) -> Any:
    """Return a base with an adapter, in PEFT, unmerged."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(directory, model), adapter).eval()


def answers(model: Any) -> list[Answer]:
    """Return what a model says to every prompt."""
    with one_thread(), torch.no_grad():
        return [answer(model, prompt) for prompt in PROMPTS]


def log_probabilities(model: Any, of: list[Answer]) -> list[list[float]]:
    """Return the log-probabilities that a model gives to the prompts and what another one generates."""
    with one_thread(), torch.no_grad():
        return [
            log_probabilities_of(model, [*prompt, *found.tokens])
            for prompt, found in zip(PROMPTS, of, strict=True)
        ]


def distance(one: float, other: float) -> float:
    """Return how far two numbers are apart: infinitely where one is NaN, which ``max`` may pass over."""
    found = abs(one - other)
    return math.inf if math.isnan(found) else found


def answer(model: Any, prompt: list[int]) -> Answer:
    """Return what a model says to a prompt; each token is found from the start, without a cache."""
    tokens, gaps = list(prompt), []
    for _ in range(N_TOKENS):
        best = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1).topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    found = log_probabilities_of(model, tokens)
    n = len(prompt)
    return Answer(tokens[n:], found[n - 1 :], found[: n - 1], min(gaps))


def log_probabilities_of(model: Any, tokens: list[int]) -> list[float]:
    """Return the log-probability of each token but the first."""
    rows = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)]
