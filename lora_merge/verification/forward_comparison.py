"""What models answer to prompts, and how far two of them are apart. Pure arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.comparison import Comparison

if TYPE_CHECKING:
    import numpy as np

NOISE_MARGIN = 4.0
"""How many times the largest difference that rounding made in a rehearsal may be met again. Two draws of the same
noise have largest values within a factor of two of each other; the rest is for what a rehearsal does not redraw."""

LEAST_TOLERANCE = 2.0**-18
"""Of the largest score: sums of float32 in another order differ by as much (64 roundings), whatever was merged."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked."""

    label: str
    """Short, for tables: ``"text 1"``."""

    ids: tuple[int, ...]
    """Tokens; empty for a model that is asked something else than text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model makes of a prompt."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """What it says, the likeliest token each time; empty for a model that says nothing."""

    scores: Any = field(repr=False)
    """float32 ``[positions, width]``: of prompt and answer but for the last token, the logits that each position gives."""

    is_text: bool = True
    """False where the scores are no logits over a vocabulary."""

    def logprobs(self) -> np.ndarray:
        """Return the log-probabilities, float64 ``[positions, width]``."""
        return _log_softmax(self.scores)


def compare(engine: str, wanted: Answer, scores: Any, tolerance: float) -> Comparison:
    """Return how far the scores of the merged checkpoint are from base and adapter's.

    Args:
        engine: whose scores they are.
        wanted: of base and adapter.
        scores: of the merged checkpoint, of the same tokens; float32 ``[positions, width]``.
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
        kl=max(float((np.exp(p) * (p - q)).sum(-1).max()), 0.0),  # this way round NaN stays NaN
        top1=float((said == wanted.scores.argmax(-1)).mean()),
        first_diverging=first_difference(wanted.tokens, own),
        n_tokens=n,
    )


def compare_logprobs(
    engine: str, wanted: Answer, tokens: tuple[int, ...], logprobs: tuple[float, ...], tolerance: float
) -> Comparison:
    """Return how far the log-probabilities of an engine are from base and adapter's.

    They are compared as far as both say the same, and where they part: what the engine says there has to be as likely to
    base and adapter. After that they are about something else.

    Args:
        engine: which it is.
        wanted: of base and adapter, of a model that continues its prompt.
        tokens: what the engine says.
        logprobs: of each token of the prompt after the first, and of those it says, given the ones before.
        tolerance: the largest difference of two log-probabilities that passes.
    """
    import numpy as np

    first = first_difference(wanted.tokens, tokens)
    heard = (*wanted.prompt.ids, *tokens)[1:]
    n = len(wanted.prompt.ids) - 1 + (len(tokens) if first is None else first + 1)
    table = wanted.logprobs()
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
    """Return where two sequences differ first; None when they do not.

    Example:
        >>> first_difference((4, 8, 1), (4, 9, 1)), first_difference((4, 8), (4, 8))
        (1, None)
    """
    pairs = zip(wanted, got, strict=False)
    found = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    return min(len(wanted), len(got)) if found is None and len(wanted) != len(got) else found


def _log_softmax(scores: Any) -> np.ndarray:
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    values = values - values.max(-1, keepdims=True)
    result: np.ndarray = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result
