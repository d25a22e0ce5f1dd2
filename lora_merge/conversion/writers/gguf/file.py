"""The GGUF file: written one weight at a time, and read back with the reader of the package gguf."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from math import prod
from typing import TYPE_CHECKING, Any

from lora_merge.conversion.lora import Lora
from lora_merge.conversion.writers.gguf.layout import Layout
from lora_merge.conversion.writers.gguf.package import gguf_package
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.storage.writing import tensor_bytes, write_error

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from lora_merge.conversion.writers.gguf.tensors import GgufTensor
    from lora_merge.conversion.writers.lora_writer import LoadFactors
    from lora_merge.storage.folder import Folder

GGUF_FILE = "adapter.gguf"


def check_ready(base_config: Mapping[str, Any]) -> None:
    """Check that an adapter of this model can be written at all, before anything is computed.

    Raises:
        RequestError: the package gguf is not installed.
        ConvertError: the family is not known.
    """
    gguf_package()
    _ = Layout(Lora((), {}, base_config=base_config)).family


def write_gguf(folder: Folder, lora: Lora, factors: LoadFactors) -> tuple[str, ...]:
    """Write a LoRA as llama.cpp reads one; return the name of the file. Scales are in B already.

    Raises:
        RequestError: the package gguf is not installed.
        ConvertError: the family is not known, or a module has no place in llama.cpp.
        WriteError: the disk is full or cannot be written.

    Reference:
        ``llama_adapter_lora_init_impl`` (src/llama-adapter.cpp) and ``convert_lora_to_gguf.py`` of llama.cpp.
    """
    gguf = gguf_package()
    layout = Layout(lora)
    tensors = layout.tensors()
    # With the commonest rank as α, most tensors are stored as they are.
    alpha = Counter(one.rank for one in tensors).most_common(1)[0][0]
    tensors = [one.under(alpha) for one in tensors]
    base = str(lora.config.get("base_model_name_or_path") or "").rstrip("/")
    writer = gguf.GGUFWriter(None, layout.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(base.rpartition("/")[2] or "adapter")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        with folder.writing(GGUF_FILE, create=True) as fd, closing(writer):
            _fill(gguf, writer, tensors, alpha, factors, fd)
    except OSError as exc:
        raise write_error(folder.path / GGUF_FILE, exc) from exc
    return (GGUF_FILE,)


def _fill(
    gguf: Any, writer: Any, tensors: Sequence[GgufTensor], alpha: int, factors: LoadFactors, fd: int
) -> None:
    """Write header, metadata and tensors, with one weight in memory at a time."""
    import torch

    for one in tensors:
        for end, shape in (("lora_a", one.a_shape), ("lora_b", one.b_shape)):
            _announce(gguf, writer, f"{one.name}.{end}", shape, one.dtype)
    # gguf opens the path that it is given, and `open` takes a descriptor too. `close` closes it, hence the copy.
    writer.write_header_to_file(os.dup(fd))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for one in tensors:
        a, b = one.produce(factors)
        if one.rank != alpha:
            b = b.float() * (one.rank / alpha)
        for tensor in (a, b):
            # gguf itself would use ``numpy.ndarray.tofile``, which reports no error when the disk is full.
            nbytes = file.write(tensor_bytes(tensor.to(getattr(torch, TORCH_NAMES[one.dtype]))))
            writer.write_padding(file, nbytes)


def check_gguf(root: Path, lora: Lora, factors: LoadFactors) -> list[Issue]:
    """Return an issue for each tensor of a written file that is missing, surplus, or has other values than were made."""
    import torch

    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(root / GGUF_FILE)
    except ValueError as exc:
        return [error("unreadable", GGUF_FILE, f"cannot be read back ({exc})")]
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {tensor.name: tensor for tensor in reader.tensors}
    issues = []
    for one in Layout(lora).tensors():
        names = (f"{one.name}.lora_a", f"{one.name}.lora_b")
        missing = [name for name in names if name not in found]
        if missing:
            issues.append(error("missing", missing[0], "is missing in the output"))
            continue
        a, b = (torch.from_numpy(_values(found.pop(name))) for name in names)
        wanted_a, wanted_b = one.produce(factors)
        # r/α and α/r are two roundings each; below the smallest normal number bits are lost
        atol = torch.finfo(torch.float32).tiny
        is_same = (
            torch.equal(a, wanted_a.float())
            and b.shape == wanted_b.shape
            and torch.allclose(b * (alpha / b.shape[-1]), wanted_b.float(), rtol=1e-6, atol=atol)
        )
        if not is_same:
            issues.append(error("differs", one.name, "has other values in the output than were written"))
    issues += [error("surplus", name, "is in the output, but was not converted") for name in sorted(found)]
    return issues


def _announce(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Register a tensor with the writer. GGUF has all names and shapes before the first value."""
    import numpy as np

    nbytes = prod(shape) * (4 if dtype == "F32" else 2)
    raw = getattr(gguf.GGMLQuantizationType, dtype)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=raw)


def _values(tensor: Any) -> np.ndarray[Any, Any]:
    """Return a tensor that gguf read, in float32 and in PyTorch's order of axes."""
    import numpy as np

    data = np.asarray(tensor.data)
    if tensor.tensor_type.name == "BF16":
        # BF16 is the upper half of float32, and numpy has no BF16.
        wide = data.view(np.uint16).astype(np.uint32) << 16
        data = wide.view(np.float32)
    # GGUF lists axes from the innermost to the outermost.
    shape = tuple(int(size) for size in tensor.shape[::-1])
    return data.astype(np.float32).reshape(shape)
