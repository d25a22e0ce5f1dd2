"""Chooses prompts: the user's texts or built-in ones, and tokens drawn from the whole vocabulary."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.errors import RequestError
from lora_merge.formats.tokenizer_file import TokenizerError, n_tokens, without_panics
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.verification.engines.hf import quiet
from lora_merge.verification.forward_comparison import Prompt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

TEXTS = (
    "The quick brown fox jumps over the lazy dog. Once upon a time, in a village by the sea,",
    "def merge(weight, a, b, scale):\n    return weight + scale * (b @ a)\n\n\nclass Adapter:",
    "La capitale de la France est Paris. Die Hauptstadt von Japan ist 東京. 2 + 2 = 4, 17 × 3 =",
)
"""Prose, code, several languages and numbers. A difference may show in only one of them."""

_FAST = "tokenizer.json"
_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

_N_TOKENS = 48
"""Most tokens of a prompt."""

_N_DRAWN = 32
_SEED = 0


def choose(
    root: Path,
    config: Mapping[str, Any],
    texts: Sequence[str],
    trained: Collection[int],
    n_said: int,
    *,
    trust_remote_code: bool,
) -> tuple[Prompt, ...]:
    """Return the prompts for a checkpoint; one without tokens if the model has no vocabulary.

    Args:
        root: its directory, with the tokenizer.
        config: its ``config.json``.
        texts: the user's texts; the built-in ones if empty.
        trained: tokens whose embeddings the adapter trained; some of them are always in a prompt.
        n_said: tokens that will be generated; prompt and answer have to fit into the model's positions.
        trust_remote_code: whether code of the tokenizer may be run.

    Raises:
        RequestError: there are texts, and no tokenizer for them.
    """
    n_words = _smallest(config, "vocab_size")
    if n_words is None:
        return (Prompt("random input", ()),)
    # The size comes from a config, and may be too large for Python to draw from.
    n_words = min(n_words, 1 << 31)
    n_positions = _smallest(config, "max_position_embeddings", "n_positions", "max_target_positions")
    longest = max(1, min(_N_TOKENS, (n_positions or 1 << 20) - n_said - 1))
    tokenize = _tokenizer(root, needed=bool(texts), trust_remote_code=trust_remote_code)
    found = []
    for n, text in enumerate(texts or TEXTS, 1):
        ids = [token for token in tokenize(text) if 0 <= token < n_words][:longest] if tokenize else []
        if ids:
            found.append(Prompt(f"text {n}", tuple(ids)))
    chance = random.Random(_SEED)  # noqa: S311 - no secret: always the same
    special = _special(config)
    # Twice as many as needed, since special tokens are left out.
    words = [
        token for token in chance.sample(range(n_words), min(n_words, 2 * _N_DRAWN)) if token not in special
    ]
    found.append(Prompt("random tokens", tuple(words[: min(longest, _N_DRAWN)])))
    rows = sorted(token for token in trained if token < n_words and token not in special)
    if rows:
        some = chance.sample(rows, min(len(rows), longest))
        found.append(Prompt("trained tokens", tuple(some)))
    return tuple(found)


def _tokenizer(root: Path, *, needed: bool, trust_remote_code: bool) -> Any:
    """Return a function text → tokens; None if the checkpoint has no tokenizer that loads."""
    from transformers import AutoTokenizer

    # Without any file, transformers makes an empty tokenizer for some families.
    is_there = any(next(root.glob(pattern), None) for pattern in _FILES)
    if not is_there and not needed:
        return None
    try:
        if (root / _FAST).is_file():
            # A damaged file may end the process that loads it; this one is loaded in another process first.
            n_tokens(root / _FAST)
        with quiet(), without_panics():
            loaded = AutoTokenizer.from_pretrained(
                root, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as exc:  # tokenizers raise Exception itself, and code that they carry anything
        raise_if_out_of_memory(exc)
        if needed:
            raise _no_tokenizer(root, "its tokenizer does not load", exc) from exc
        return None

    def tokens(text: str) -> list[int]:
        try:
            with without_panics():
                return list(loaded(text)["input_ids"])
        except TokenizerError as exc:
            if needed:
                raise _no_tokenizer(root, "its tokenizer fails", exc) from exc
            return []

    return tokens


def _no_tokenizer(root: Path, what: str, exc: Exception) -> RequestError:
    first = str(exc).partition("\n")[0] or repr(exc)
    sentence = f"{root}: {what} ({first})"[:300]
    return RequestError("", 0, "prompt", sentence, hint="leave out --prompt to use random tokens")


def _smallest(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the smallest of some fields, at any level of the config; None if no level has one."""
    found = [
        level[key] for _, level in config_levels(config) for key in keys if isinstance(level.get(key), int)
    ]
    return min(found, default=None)


def _special(config: Mapping[str, Any]) -> frozenset[int]:
    """Return ids of tokens that stand for something else than text, such as an image or padding."""
    return frozenset(
        value
        for _, level in config_levels(config)
        for key, value in level.items()
        for value in _tokens(key, value)
    )


def _tokens(key: str, value: object) -> Iterator[int]:
    """Yield the ids in a field whose name says that it holds ids of tokens."""
    if key.endswith(("_token_id", "_token_index", "_token_ids")):
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
