"""Answers of models to prompts, and the distance between two of them. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.comparison import Comparison

if TYPE_CHECKING:
    import numpy as np

NOISE_MARGIN = 4.0
"""Factor between the largest difference that rounding made in a rehearsal and the tolerance. The largest values of two
draws of the same noise are within a factor of two; the rest is for effects that a rehearsal does not redraw."""

LEAST_TOLERANCE = 2.0**-18
"""Smallest tolerance, relative to the largest score: 64 roundings of float32, by which sums in another order differ."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input of a model."""

    label: str
    """Short name for tables: ``"text 1"``."""

    ids: tuple[int, ...]
    """Ids of tokens; empty for a model that takes other input than text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The output of a model for a prompt."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """Generated tokens, greedy; empty for a model that generates none."""

    scores: Any = field(repr=False)
    """float32 ``[positions, width]``: the logits at each position of prompt and answer, without the last token."""

    is_text: bool = True
    """False if the scores are not logits over a vocabulary."""

    def logprobs(self) -> np.ndarray:
        """Return log-probabilities from the scores, float64 ``[positions, width]``."""
        return _log_softmax(self.scores)


def compare(engine: str, wanted: Answer, scores: Any, tolerance: float) -> Comparison:
    """Return the distance between the scores of the merged checkpoint and those of base and adapter.

    Args:
        engine: name of the engine that computed the scores.
        wanted: the answer of base and adapter.
        scores: of the merged checkpoint for the same tokens, float32 ``[positions, width]``.
        tolerance: the largest difference of two scores that passes.
    """
    import numpy as np

    if scores.shape != wanted.scores.shape:
        return Comparison(engine, wanted.prompt.label, float("inf"), tolerance)
    difference = np.abs(scores.astype(np.float64) - wanted.scores.astype(np.float64))
    largest = float(difference.max()) if difference.size else 0.0
    if not wanted.is_text:
        return Comparison(engine, wanted.prompt.label, largest, tolerance)
    said = scores.argmax(-1)
    p, q = wanted.logprobs(), _log_softmax(scores)
    n = len(wanted.tokens)
    own = [int(token) for token in said[-n:]] if n else []
    return Comparison(
        engine,
        wanted.prompt.label,
        largest,
        tolerance,
        # `max` with NaN first returns NaN; the other way round it would return 0.
        kl=max(float((np.exp(p) * (p - q)).sum(-1).max()), 0.0),
        top1=float((said == wanted.scores.argmax(-1)).mean()),
        first_diverging=first_difference(wanted.tokens, own),
        n_tokens=n,
    )


def compare_logprobs(
    engine: str, wanted: Answer, tokens: tuple[int, ...], logprobs: tuple[float, ...], tolerance: float
) -> Comparison:
    """Return the distance between an engine's log-probabilities and those of base and adapter.

    They are compared up to and including the first token that differs: what the engine generates there has to be as
    likely to base and adapter. After it the texts differ, and a comparison would mean nothing.

    Args:
        engine: name of the engine.
        wanted: the answer of base and adapter, of a model that continues its prompt.
        tokens: tokens that the engine generated.
        logprobs: of each token of the prompt from the second on, then of each generated token.
        tolerance: the largest difference of two log-probabilities that passes.
    """
    import numpy as np

    first = first_difference(wanted.tokens, tokens)
    heard = (*wanted.prompt.ids, *tokens)[1:]
    n = len(wanted.prompt.ids) - 1 + (len(tokens) if first is None else first + 1)
    table = wanted.logprobs()
    # An engine that reported fewer values than were asked for fails the comparison.
    complete = 0 < n <= min(len(heard), len(logprobs), len(table))
    ours = table[np.arange(n), list(heard[:n])] if complete else np.zeros(1)
    theirs = np.array(logprobs[:n]) if complete else np.full(1, np.inf)
    return Comparison(
        engine,
        wanted.prompt.label,
        float(np.abs(theirs - ours).max()),
        tolerance,
        first_diverging=first,
        n_tokens=len(wanted.tokens),
    )


def first_difference(wanted: tuple[int, ...], got: tuple[int, ...] | list[int]) -> int | None:
    """Return the first index at which two sequences differ; None if they are equal.

    Example:
        >>> first_difference((4, 8, 1), (4, 9, 1)), first_difference((4, 8), (4, 8))
        (1, None)
    """
    pairs = zip(wanted, got, strict=False)
    found = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    return min(len(wanted), len(got)) if found is None and len(wanted) != len(got) else found


def _log_softmax(scores: Any) -> np.ndarray:
    """Return log-probabilities, float64, computed without overflow."""
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    values = values - values.max(-1, keepdims=True)
    result: np.ndarray = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result
