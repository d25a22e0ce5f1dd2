"""A file that tensors wait in until all of them are computed: only then is each one's place in the output known."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_CODES, TensorRef
from lora_merge.storage.writing import tensor_bytes, write_from

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from lora_merge.storage.folder import Folder

FACTORS = "factors"
"""The name of the file, in staging."""


class Spool:
    """Tensors back to back in one file, in the order in which they are added."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd, self._end = path, fd, 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, home: Folder) -> Iterator[Spool]:
        """Yield a new spool in a directory. Its file stays until staging is cleared.

        Raises:
            WriteError: the file exists, or cannot be made.
        """
        with home.writing(FACTORS, create=True) as fd:
            yield cls(home.path / FACTORS, fd)

    def add(self, name: str, tensor: torch.Tensor) -> TensorRef:
        """Append a tensor; return where it is stored.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        buffer = tensor_bytes(tensor)
        write_from(self._fd, buffer, self._end, self._path)
        shape = tuple(tensor.shape)
        ref = TensorRef(name, TORCH_CODES[str(tensor.dtype)], shape, str(self._path), self._end, len(buffer))
        self._end += len(buffer)
        return ref
