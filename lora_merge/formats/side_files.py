"""The small files around the weights: which belong to the model, and whose are taken."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE, SideFile
from lora_merge.errors import CheckpointError
from lora_merge.formats.sentence_modules import may_be_module_file, module_files, whole_model
from lora_merge.storage.digests import same_bytes
from lora_merge.storage.instead import instead_of, is_page, is_pointer
from lora_merge.storage.local import why_no_file
from lora_merge.storage.reading import read_blocks
from lora_merge.storage.sources import open_source
from lora_merge.storage.user_paths import is_file

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST_FILE = "merge_manifest.json"
CARD_FILE = "README.md"

_FOREIGN = (
    "*.gguf",
    "ggml-*.bin",
    "*.llamafile",  # llama.cpp
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.ort",  # ONNX Runtime
    "openvino_*.bin",
    "openvino_*.xml",  # OpenVINO, as optimum-intel names them
    "*.tflite",
    "*.task",
    "*.litertlm",  # LiteRT and MediaPipe
    "*.mnn",
    "*.mnn.weight",
    "*.pte",
    "*.dlc",
    "*.mlmodel",  # MNN, ExecuTorch, Qualcomm, Core ML
    "*.engine",
    "*.nemo",
    "*.h5",
    "*.msgpack",
    "*.ot",  # TensorRT, NeMo, TensorFlow, Flax, Rust
)
"""The weights in formats of other programs. They would stay the base's, and users of those programs would miss the
adapter.
"""

_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.bin.index.json",
    "consolidated*.pth",
    "consolidated*.pt",
    "*.ckpt",
    *_FOREIGN,
)
"""The model's weights, in this form or another. Other binaries (a speaker table, say) are kept."""

_TRAINING = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "trainer_state.json",
    "adapter_model.bin",
    "adapter_config.json",
)

_NOT_KEPT = (*_WEIGHTS, *_TRAINING, MANIFEST_FILE, CARD_FILE)

_FOREIGN_DIRECTORIES = (
    ".*",
    "original",
    "onnx",
    "openvino",
    "coreml",
    "*.mlpackage",
    "*.mlmodelc",
    "metal",
    "gguf",
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "logs",
    "__pycache__",
    "*.lora-merge-staging",
)

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tekken.json",
)
"""Tokenizer and template files, as transformers 5 names them."""


_MOST_READ_BYTES = 64 << 20
"""The most bytes of a side file that are read when it is found; the largest tokenizers have half of it."""

_NEEDED_SUFFIXES = frozenset({".json", ".py", ".jinja", ".txt"})
"""Suffixes of files that a model or its tokenizer is loaded from. A picture beside them may be missing."""


MAX_SIDE_BYTES = 16 << 30
"""The most bytes of a file around the weights. A sparse file takes no room in an archive, and fills the disk when
copied.
"""


def base_side_files(root: Path) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Return the side files of a base, and a sentence about each thing left out.

    Raises:
        CheckpointError: one is a link that leads out of the directory.
    """
    kept: list[SideFile] = []
    notes: list[str] = []
    for name, entry in _walk(root, notes):
        if not belongs_to_base(name):
            if entry.parent != root:
                notes.append(f"{name} was left out: it has the base's weights for another program")
            continue
        _check_inside(entry, root)
        _check_whole(entry)
        if is_pointer(entry):
            notes.append(
                f"{name} is a Git LFS pointer, and was copied as it is; git lfs pull downloads the file"
            )
        kept.append(SideFile(name, str(entry), _size(entry), "base"))
    whole = whole_model(root)
    if whole is not None:
        notes.append(
            f"{root.name}/ is one module of the sentence-transformers model in {whole}; the other modules "
            f"were not copied: replace {root.name}/ in a copy of that model with the output"
        )
    return tuple(sorted(kept, key=lambda file: file.name)), tuple(notes)


def adapter_side_files(root: Path) -> tuple[SideFile, ...]:
    """Return the files of an adapter's directory that belong to the merged model: tokenizer, templates, and the
    modules of sentence-transformers behind the transformer.

    Raises:
        CheckpointError: one is a link that leads out of the directory.
    """
    found = []
    paths = {
        path for pattern in _TOKENIZER for path in root.glob(pattern) if not path.is_dir() and path.exists()
    }
    for path in paths | {root / name for name in module_files(root)}:
        _check_inside(path, root)
        _check_whole(path)
        name = path.relative_to(root).as_posix()
        found.append(SideFile(name, str(path), _size(path), "adapter"))
    return tuple(sorted(found, key=lambda file: file.name))


def _size(path: Path) -> int:
    """Return the size in bytes of a file that will be copied.

    It is opened and read for that, unless it is large, so that a run knows later whether it is still the same.

    Raises:
        CheckpointError: it cannot be opened.
    """
    with open_source(path) as source:
        for _ in read_blocks(source, 0, source.nbytes if source.nbytes <= _MOST_READ_BYTES else 0):
            pass
        return source.nbytes


def _check_whole(path: Path) -> None:
    """Check that a file can be copied: it is readable and was downloaded. Asked before any weight is written.

    Raises:
        CheckpointError: it is not readable; or loading needs it, and it is a Git LFS pointer or what a server sent
            instead.
    """
    why = why_no_file(path)
    if why:
        raise CheckpointError(str(path), "", why, hint="remove it, or replace it with a copy of the file")
    nbytes = path.stat().st_size
    if nbytes > MAX_SIDE_BYTES:
        raise CheckpointError(str(path), "", f"has {nbytes} bytes", f"at most {MAX_SIDE_BYTES}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(str(path), "", "cannot be read (Permission denied)")
    is_needed = _matches(path.name, _TOKENIZER) or path.suffix in _NEEDED_SUFFIXES
    # Weights would be written beside a tokenizer that no engine can load.
    if is_needed and (is_pointer(path) or (path.suffix == ".json" and is_page(path))):
        what = instead_of(path)
        if what is not None:
            raise CheckpointError(str(path), "", what.sentence, hint=what.hint)


def _check_inside(path: Path, root: Path) -> None:
    """Check that a file to be copied really is in its directory, or in the cache of the hub behind it.

    Weights may be links to anywhere: they are read as weights or not at all.

    Raises:
        CheckpointError: it is a link to something else.
    """
    # It might be a key or another private file that was never meant to be published.
    if not is_inside(path, root):
        got = f"is a link to {path.resolve()}, outside its directory"
        raise CheckpointError(
            str(path), "", got, "a file", hint="replace the link with a copy of the file: cp -L"
        )


def is_inside(path: Path, root: Path) -> bool:
    """Return True when a file, links followed, is below a directory, or in the blobs of the hub's cache behind it."""
    real, home = path.resolve(), root.resolve()
    # A snapshot of the Hub's cache consists of links into ``blobs`` beside it.
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    return real.is_relative_to(home) or bool(snapshots and real.is_relative_to(snapshots.parent / "blobs"))


def belongs_to_base(name: str) -> bool:
    """Return True for a name in a repo's listing that `base_side_files` would keep in a local copy.

    The weights of other frameworks are not worth a download, wherever they are.

    Example:
        >>> [belongs_to_base(name) for name in ("tokenizer.json", "code/model.py", "onnx/model.json", "a.gguf")]
        [True, True, False, False]
    """
    *folders, file = PurePosixPath(name).parts
    # .git, .cache and the like are of the folder, not of the model.
    if file.startswith(".") or any(_matches(folder, _FOREIGN_DIRECTORIES) for folder in folders):
        return False
    return not _matches(file, _FOREIGN if folders else _FOREIGN + _NOT_KEPT)


def belongs_to_adapter(name: str) -> bool:
    """Return True for a name in a repo's listing that `adapter_side_files` would find in a local copy."""
    path = PurePosixPath(name)
    return may_be_module_file(name) or any(
        path.match(pattern) and len(path.parts) == pattern.count("/") + 1 for pattern in _TOKENIZER
    )


def differs(file: SideFile, root: Path) -> bool:
    """Return True when a checkpoint has no file of this name, or one with other bytes."""
    twin = root / file.name
    return not twin.is_file() or not same_bytes(file.source, twin)


def other_weights(root: Path, known: frozenset[str]) -> tuple[str, ...]:
    """Return the names of weight files at the top of a directory that are not among the known ones."""
    return tuple(
        sorted(
            entry.name
            for entry in root.iterdir()
            if entry.is_file() and entry.name not in known and _matches(entry.name, _WEIGHTS)
        )
    )


def _walk(root: Path, notes: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, path) of every file that may belong to the model. Folders of other programs go into the
    notes.
    """
    for directory, folders, names in os.walk(root):
        here = Path(directory)
        for folder in [name for name in folders if _matches(name, _FOREIGN_DIRECTORIES)]:
            folders.remove(folder)
            if not folder.startswith(".") and here == root:
                notes.append(f"{folder}/ is not a part of the checkpoint and was not copied")
        # An earlier output inside the base's folder is not part of the base.
        for folder in [name for name in folders if _is_output(here / name)]:
            folders.remove(folder)
            notes.append(f"{folder}/ is the output of another merge and was not copied")
        for name in names:
            path = here / name
            if name.startswith(".") or not path.exists():
                continue
            why = why_no_file(path)
            if why:
                raise CheckpointError(
                    str(path), "", why, hint="remove it, or replace it with a copy of the file"
                )
            yield path.relative_to(root).as_posix(), path


def _is_output(folder: Path) -> bool:
    """Return True for a folder that a merge made: a separate model."""
    return is_file(folder / MANIFEST_FILE) and is_file(folder / CONFIG_FILE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
