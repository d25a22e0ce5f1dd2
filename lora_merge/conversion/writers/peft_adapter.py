"""Writes a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.shards import place
from lora_merge.core.tensor import TORCH_CODES, TensorRef
from lora_merge.formats.repo_files import ADAPTER_WEIGHTS
from lora_merge.formats.safetensors import load
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.storage.copying import copy_range
from lora_merge.storage.output_files import reserve
from lora_merge.storage.sources import open_source
from lora_merge.storage.writing import tensor_bytes, write_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lora_merge.conversion.lora import Lora, LoraModule, Made
    from lora_merge.conversion.writers.lora_writer import LoadFactors
    from lora_merge.storage.folder import Folder

Produce = "Callable[[], torch.Tensor]"


def write_peft(folder: Folder, lora: Lora, factors: LoadFactors) -> tuple[str, ...]:
    """Write a LoRA as PEFT saves one; return the names of the files.

    Raises:
        WriteError: the disk is full or cannot be written.

    Reference:
        ``peft.PeftModel.save_pretrained`` (PEFT 0.21.2).
    """
    refs: dict[str, TensorRef] = {}
    for made in lora.made:
        refs |= _slots(made)
    refs |= {name: _named(ref, name) for name, ref in lora.whole.items()}
    file = place(ADAPTER_WEIGHTS, [refs[name] for name in sorted(refs)], {})
    path = folder.path / ADAPTER_WEIGHTS
    reserve(folder, file)
    slots = {slot.name: slot for slot in file.slots}
    with folder.writing(ADAPTER_WEIGHTS) as fd:
        for made in lora.made:
            for name, tensor in _tensors(made, factors):
                write_from(fd, tensor_bytes(tensor), slots[name].start, path)
        for name, ref in lora.whole.items():
            with open_source(ref.file) as source:
                copy_range(source, ref.start, ref.nbytes, fd, slots[name].start, str(path))
    folder.write_text(ADAPTER_CONFIG, json.dumps(lora.config, indent=2, ensure_ascii=False) + "\n")
    return ADAPTER_CONFIG, ADAPTER_WEIGHTS


def tensor_names(module: LoraModule) -> dict[str, str]:
    """Return role → name of a module's tensors in a PEFT file: ``A``, ``B``, and others by the end of their name.

    Reference:
        ``peft.utils.save_and_load.get_peft_model_state_dict`` (PEFT 0.21.2).
    """
    # PEFT nests LoRA on several parameters of a module, each in the ``base_layer`` of the next.
    stem = f"{PREFIX}{module.owner}{'.base_layer' * module.depth}"
    kept = {end: f"{stem}.{end}" for end in module.kept}
    if module.form == "embedding":
        return {"A": f"{stem}.lora_embedding_A", "B": f"{stem}.lora_embedding_B", **kept}
    return {"A": f"{stem}.lora_A.weight", "B": f"{stem}.lora_B.weight", **kept}


def _slots(made: Made) -> dict[str, TensorRef]:
    """Return name, dtype and shape of each tensor of a module, without places."""
    module, names = made.module, tensor_names(made.module)
    a, b = _shapes(made)
    found = {
        names["A"]: TensorRef(names["A"], made.a.dtype, a, "", 0, 0),
        names["B"]: TensorRef(names["B"], made.b.dtype, b, "", 0, 0),
    }
    for end, ref in module.kept.items():
        dtype = TORCH_CODES[str(_kept(made, end, ref).dtype)]
        found[names[end]] = TensorRef(names[end], dtype, ref.shape, "", 0, 0)
    return found


def _shapes(made: Made) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B in the file: kernels unfolded, experts folded into the rank."""
    rank, shape = made.rank, made.module.shape
    if made.module.form == "experts" and len(shape) == 3:
        n_experts, n_out, n_in = shape
        return (n_experts * rank, n_in), (n_out, rank * n_experts)
    # A convolution's A has the kernel; its B is a convolution of kernel size 1.
    ones = (1,) * (len(shape) - 2)
    return (rank, *shape[1:]), (shape[0], rank, *ones)


def _tensors(made: Made, factors: LoadFactors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor for each tensor of a module, in the shapes of the file."""
    names, (a_shape, b_shape) = tensor_names(made.module), _shapes(made)
    a, b = factors(made)
    if b.dim() == 3:
        # [experts, out, r] → [out, r, experts]: in PEFT's flat B the index of the expert changes fastest.
        b = b.permute(1, 2, 0)
    yield names["A"], a.reshape(a_shape)
    yield names["B"], b.reshape(b_shape)
    for end, ref in made.module.kept.items():
        yield names[end], _kept(made, end, ref)


def _kept(made: Made, end: str, ref: TensorRef) -> torch.Tensor:
    """Return a tensor that goes along with the factors: unchanged, except that a bias of B gets B's scale."""
    tensor = load(ref)
    if end != "lora_B.bias" or made.scale == made.module.scale:
        return tensor
    import torch

    scaled = tensor.float() * (made.module.scale / made.scale)
    # Its own dtype where that is exact, else float32: the same rule as for factors.
    back = scaled.to(tensor.dtype)
    return back if torch.equal(back.float(), scaled) else scaled


def _named(ref: TensorRef, name: str) -> TensorRef:
    return TensorRef(name, ref.dtype, ref.shape, ref.file, ref.start, ref.nbytes)
