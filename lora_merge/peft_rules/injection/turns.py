"""PEFT runs one injection at a time, without traces in the process, with its errors as one sentence each."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from lora_merge.errors import PackageError
from lora_merge.modeling.cut_off import cut_off
from lora_merge.peft_rules.injection.targets import InjectionError
from lora_merge.runtime.shortage import raise_if_out_of_memory

_SEED = 0

_LOCK = threading.RLock()
"""Warning filters and torch's random state belong to the process, so injections take turns."""


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Run one injection at a time, cut off, without warnings, gradients or traces in torch's random state (CPU)."""
    import torch

    with _LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), cut_off():
        warnings.simplefilter("ignore")
        # What layers draw at random is overwritten by the adapter's values, or refused.
        torch.default_generator.manual_seed(_SEED)
        yield


@contextlib.contextmanager
def translated(subject: str, speaker: str = "PEFT") -> Iterator[None]:
    """Turn any error of a library into an `InjectionError` with its first line, except a lack of memory."""
    try:
        yield
    except (InjectionError, PackageError):
        raise
    except Exception as exc:
        # Raises where memory ran out: that says nothing about the adapter.
        raise_if_out_of_memory(exc)
        line = next(iter(str(exc).strip().splitlines()), "")
        raise InjectionError(subject, f"{speaker} raises {type(exc).__name__}: {line}") from exc
