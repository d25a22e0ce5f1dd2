"""A field of any type in any file of a stranger ends in an answer, or in an error with a sentence."""

from __future__ import annotations

import os
import random

import pytest

from lora_merge.errors import LoraMergeError
from tests.faults.odd_values import KINDS

EVERY = os.environ.get("LORA_MERGE_VALUES") == "all"
N_SHORT = 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_any_type_ends_in_an_answer_or_a_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempts = list(KINDS[kind](tmp_path))
    chosen = attempts if EVERY else random.Random(20).sample(attempts, N_SHORT)
    broken = []
    for name, act in chosen:
        try:
            act()
        except LoraMergeError as exc:
            if not str(exc):
                broken.append(f"{name}: no sentence")
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            broken.append(f"{name}: {type(exc).__name__}: {ascii(exc)[:200]}")
    assert not broken, f"{len(broken)} of {len(chosen)}:\n" + "\n".join(broken[:20])
