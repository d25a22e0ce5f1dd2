"""What sentence-transformers saves around a model: further modules (pooling, dense layers), prompts, settings.

``modules.json`` lists the modules of a model in order, each with the folder it is saved in; the transformer itself
is usually saved at the top (folder ``""``). PyLate, SPLADE and CrossEncoder models are saved in the same way.

Reference: ``sentence_transformers.base.model.BaseModel.save`` and ``…base.modules.router.Router.save`` (6.2).
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError
from lora_merge.storage.small_files import parse_json, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES_FILE = "modules.json"
_ROUTER_FILE = "router_config.json"

_SETTINGS = (MODULES_FILE, _ROUTER_FILE, "config_sentence_transformers.json", "sentence_*_config.json")
"""Files at the top: modules, routes, prompts and similarity, and the transformer's settings
(``sentence_bert_config.json``, for every model).
"""

_FOLDER = re.compile(r"\d+_\w+|\w+_\d+_\w+")
"""Name of a module's folder: ``2_Dense``; behind a router ``query_0_Dense``."""

_FILELESS = ("Normalize",)
"""Modules that have no files."""

_ADAPTER_FILE = "adapter_config.json"


def may_be_module_file(name: str) -> bool:
    """Return True for a name in a repo's listing that `module_files` might find in a local copy.

    Example:
        >>> [may_be_module_file(name) for name in ("modules.json", "2_Dense/model.safetensors", "runs/a.json")]
        [True, True, False]
    """
    folder, *rest = PurePosixPath(name).parts
    return bool(_FOLDER.fullmatch(folder)) if rest else _is_setting(name)


def module_files(root: Path) -> tuple[str, ...]:
    """Return the files that sentence-transformers saved around the transformer, relative to the directory.

    Raises:
        CheckpointError: the list of modules is not JSON, or leads out of the directory.
    """
    modules = _modules(root)
    if not modules:
        return ()
    found = {entry.name for entry in root.iterdir() if entry.is_file() and _is_setting(entry.name)}
    # A module may be a class of the repo's own code, in a Python file at the top.
    code = (f"{kind.partition('.')[0]}.py" for kind in modules.values())
    found |= {name for name in code if (root / name).is_file()}
    for folder in modules.keys() - {""}:
        found.update(_inside(root, folder))
    return tuple(sorted(found))


def module_folders(root: Path) -> frozenset[str]:
    """Return the folders of the modules that a directory lists, without the top itself.

    Raises:
        CheckpointError: as for `module_files`.
    """
    return frozenset(_modules(root)) - {""}


def absent_modules(root: Path, found: frozenset[str]) -> tuple[str, ...]:
    """Return listed folders that need files and are not among those found."""
    return tuple(
        folder
        for folder, kind in _modules(root).items()
        if folder and folder not in found and not kind.endswith(_FILELESS)
    )


def whole_model(root: Path) -> Path | None:
    """Return the directory of the sentence-transformers model that a directory is a module of; None where it is not
    one.
    """
    here = root.resolve()
    try:
        return here.parent if here.name in _modules(here.parent) else None
    except CheckpointError:
        return None  # that directory was not asked for


def _modules(root: Path) -> dict[str, str]:
    """Return folder → class of each module, in order; a router at the top adds its own folders.

    A ``modules.json`` of another shape belongs to some other tool, and counts for none.
    """
    found: dict[str, str] = {}
    listing, routes = root / MODULES_FILE, root / _ROUTER_FILE
    if listing.is_file():
        modules = _read(listing)
        # Other tools have a ``modules.json`` too: one of another shape is theirs.
        if isinstance(modules, list) and all(_is_module(module) for module in modules):
            found |= {_checked(listing, module["path"]): module["type"] for module in modules}
    if routes.is_file():
        table = _read(routes)
        types = table.get("types") if isinstance(table, dict) else None
        if isinstance(types, dict):
            found |= {_checked(routes, name): str(kind) for name, kind in types.items()}
    return found


def _read(file: Path) -> Any:
    try:
        return parse_json(read_text(file).encode())
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(str(file), "", f"is not valid JSON ({exc})") from exc


def _is_module(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("path", "type"))


def _checked(file: Path, folder: str) -> str:
    """Return the folder of a module, which must be inside the directory.

    Raises:
        CheckpointError: it is not.
    """
    path = PurePosixPath(folder)
    # An untrusted path: nothing outside the directory may be copied into the output.
    if path.is_absolute() or ".." in path.parts or "\\" in folder or "\0" in folder:
        raise CheckpointError(str(file), folder, "is the folder of a module", "a folder inside the directory")
    return "" if folder in {"", "."} else path.as_posix()


def _inside(root: Path, folder: str) -> Iterator[str]:
    """Yield the files of a module. A folder with an adapter has none: that is merged, not copied."""
    home = root / folder
    if not home.is_dir() or (home / _ADAPTER_FILE).is_file():
        return
    for path in home.rglob("*"):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
            yield name.as_posix()


def _is_setting(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _SETTINGS)
