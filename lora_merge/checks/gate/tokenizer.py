"""Can an engine load the tokenizer, and does the embedding have a row for every token?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, config_levels, owner_name
from lora_merge.core.report import error, note, warning
from lora_merge.errors import CheckpointError
from lora_merge.formats.tokenizer_file import TokenizerError, n_tokens
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output

_FAST = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_TABLES = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "generation_config.json")
_NEW_CLASS = "TokenizersBackend"


def tokenizer(output: Output) -> Iterator[Issue]:
    """Yield an issue for what keeps the tokenizer from loading, for what older engines refuse, and for tokens without
    an embedding.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name in _TABLES:
        if name in output.names:
            try:
                tables[name] = read_json(Path(output.root, name))
            except CheckpointError as exc:
                sentence = f"{exc.got}, expected {exc.wanted}" if exc.wanted else exc.got
                yield error("tokenizer", name, sentence, "copy it from the original model")
    if _FAST in output.names:
        yield from _fast(output)
    yield from _settings(tables.get(_SETTINGS, {}))


def _fast(output: Output) -> Iterator[Issue]:
    """Yield an issue for what is wrong with ``tokenizer.json``, as the library that engines use sees it."""
    try:
        n = n_tokens(Path(output.root, _FAST))
    except TokenizerError as exc:
        yield error("tokenizer", _FAST, f"does not load ({exc})"[:300], "copy it from the original model")
        return
    except OSError as exc:
        yield note("not-loaded", _FAST, f"was not checked: cannot start a process for it ({exc.strerror})")
        return
    rows = max(
        (
            ref.shape[0]
            for ref in output.tensors().values()
            if len(ref.shape) == 2 and owner_name(ref.name) in INPUT_NAMES
        ),
        default=None,
    )
    if rows is not None and n > rows and _counts_tokens(output):
        last = rows - 1
        sentence = (
            f"has {n} tokens, but the embedding has {rows} rows: token ids above {last} will crash the engine"
        )
        yield warning("token-beyond", _FAST, sentence)


def _counts_tokens(output: Output) -> bool:
    """Return True when the configuration states a ``vocab_size``, at any level."""
    return any("vocab_size" in level for _, level in config_levels(output.config or {}))


def _settings(table: dict[str, Any]) -> Iterator[Issue]:
    """Yield a note about settings that engines on transformers 4 cannot read."""
    new = table.get("tokenizer_class") == _NEW_CLASS
    if new or isinstance(table.get("extra_special_tokens"), list):
        what = f"tokenizer_class {_NEW_CLASS}" if new else "a list of extra_special_tokens"
        sentence = f"has {what}, written by transformers 5: engines that use transformers 4 refuse it"
        yield note("new-tokenizer", _SETTINGS, sentence)
