"""How far two answers to one prompt differ: that of the merged checkpoint, and that of base and adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far an engine's answer to a prompt, from the merged checkpoint, is from base and adapter's."""

    engine: str
    prompt: str
    """Label of the prompt, or the module that was asked alone."""

    max_difference: float
    """The largest |Δlogit|, or |Δ log-probability| where an engine tells no logits."""

    tolerance: float
    kl: float | None = None
    """The largest Kullback-Leibler divergence of a position, in nats: Σ p·(log p - log q), p from base and adapter."""

    top1: float | None = None
    """Share of positions at which both find the same token likeliest."""

    first_diverging: int | None = None
    """The first token said that differs, counted from 0; None when none does."""

    n_tokens: int = 0
    """How many tokens were generated and compared; 0 where none were asked for."""

    @property
    def ok(self) -> bool:
        """True when rounding explains the difference; False for NaN."""
        # Every comparison with NaN is False, so an answer of NaN fails.
        return self.max_difference <= self.tolerance

    def sentence(self) -> str:
        """Return what differs, as the rest of a sentence that begins with the prompt or the module."""
        said = (
            ""
            if not self.n_tokens
            else f"; all {self.n_tokens} generated tokens agree"
            if self.first_diverging is None
            else f"; of {self.n_tokens} generated tokens, number {self.first_diverging + 1} is the first that differs"
        )
        return (
            f"differs by {self.max_difference:.3g}, expected at most {self.tolerance:.3g} from rounding{said}"
        )
