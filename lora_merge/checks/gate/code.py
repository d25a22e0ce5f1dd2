"""Is the code there that the configuration refers to?"""

from __future__ import annotations

import ast
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.errors import CheckpointError
from lora_merge.storage.small_files import read_bytes, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output

_CARRIERS = (
    CONFIG_FILE,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files that may have an ``auto_map``."""

_MOST_BYTES = 4_000_000
"""The most bytes of a Python file; the longest of transformers has 300 kB."""


def code(output: Output) -> Iterator[Issue]:
    """Yield an issue for each module that an ``auto_map`` names, or such a module imports, and that is not there.

    The code is parsed, and never run.
    """
    for carrier in _CARRIERS:
        for reference in _references(output, carrier):
            # ``repo--module.Class`` is code of another repo, which engines would fetch.
            repo, elsewhere, path = reference.rpartition("--")
            name = f"{path.rpartition('.')[0].replace('.', '/')}.py"
            if elsewhere:
                yield note("remote-code", carrier, f"auto_map makes engines load {path} from the repo {repo}")
            elif name not in output.names:
                sentence = f"auto_map names {reference}, but {name} is missing"
                yield error("missing-code", carrier, sentence, f"copy {name} from the original model")
            else:
                yield from _imports(output, name)


def _references(output: Output, carrier: str) -> list[str]:
    """Return the class references of an ``auto_map``: ``module.Class``, or ``repo--module.Class``."""
    if carrier not in output.names:
        return []
    try:
        table = read_json(Path(output.root, carrier)).get("auto_map")
    except CheckpointError:
        return []  # the rule for that file says so
    found = table.values() if isinstance(table, dict) else ()
    flat = [one for entry in found for one in (entry if isinstance(entry, list) else [entry])]
    return [one for one in flat if isinstance(one, str) and "." in one]


def _imports(output: Output, name: str) -> Iterator[Issue]:
    """Yield an issue for each relative import that leads to no file, followed through all modules."""
    # Imports may be circular.
    seen, waiting = {name}, [name]
    while waiting:
        current = waiting.pop()
        try:
            tree = _parsed(read_bytes(Path(output.root, current), _MOST_BYTES))
        except CheckpointError as exc:
            yield error("broken-code", current, str(exc))
            continue
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            why = str(exc) or "it is nested too deeply"  # Python 3.11 raises a MemoryError without a message
            yield error("broken-code", current, f"is not valid Python ({why})"[:200])
            continue
        for candidates in _relative(tree, PurePosixPath(current).parent):
            found = next((module for module in candidates if module in output.names), None)
            if found is None:
                yield error("missing-code", current, f"imports {candidates[0]}, which is missing")
            elif found not in seen:
                seen.add(found)
                waiting.append(found)


def _parsed(content: bytes) -> ast.Module:
    """Return the syntax tree of Python code; warnings of the parser are not printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(content.decode("utf-8"))


def _relative(tree: ast.Module, folder: PurePosixPath) -> Iterator[tuple[str, ...]]:
    """Yield, for each relative import, the files that it may mean."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder
        for _ in range(node.level - 1):
            base = base.parent
        modules = [node.module] if node.module else [alias.name for alias in node.names]
        for module in modules:
            path = base / module.replace(".", "/")
            yield f"{path}.py", f"{path}/__init__.py"
