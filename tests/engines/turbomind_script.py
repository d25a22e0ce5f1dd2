"""Lets TurboMind, LMDeploy's other engine, take checkpoints in: names, layouts and packing, and no computing.

Its own table of architectures, reading of configurations, formats of weights, source models, checkpoint reader and
builders: what joins projections, reorders rotary rows and packs gates. Its compiled half is
`tests.engines.turbomind_recorder`'s. A line has the tensors of the checkpoint that were never asked for (``unread``), and
of the parameters that came out their number, those that are not finite, and a digest of them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from tests.engines import turbomind_recorder as recorder
from tests.engines.answering import Job, Line, answer_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def answer(job: Job, dtype: str) -> Line:
    """Return what is said about a job."""
    import lmdeploy
    from lmdeploy.turbomind.checkpoint import Prefix, create_checkpoint

    root = recorder.Module()
    model = _source_model(job["checkpoint"], dtype, root)
    checkpoint = create_checkpoint(job["checkpoint"], mappings=getattr(model, "_loader_mappings", []))
    unread = _watched(checkpoint)
    model.model(Prefix(checkpoint))
    built = dict(root.walk())
    return {
        "engine": "turbomind",
        "version": lmdeploy.__version__,
        "unread": sorted(unread),
        "n_parameters": len(built),
        "not_finite": [name for name, tensor in built.items() if not tensor.isfinite().all()],
        "digest": _digest(built),
    }


def _digest(built: Mapping[str, torch.Tensor]) -> str:
    """Return what is the same for the same parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(built.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _source_model(checkpoint: str, dtype: str, root: recorder.Module) -> Any:
    """Return the reader of an architecture, ready to build under a root."""
    import lmdeploy.turbomind.models  # noqa: F401 - fills the table of readers
    from lmdeploy.archs import get_model_arch
    from lmdeploy.messages import TurbomindEngineConfig
    from lmdeploy.turbomind import converter
    from lmdeploy.turbomind.builders._base import ParallelGroup, _torch_dtype_to_cpp

    architecture, _ = get_model_arch(checkpoint, trust_remote_code=True)
    if architecture not in converter.SUPPORTED_ARCHS:
        raise ValueError(f"TurboMind does not know {architecture}")
    converter._get_executable_dtypes = lambda *_: {dtype}  # it asks a GPU
    told = TurbomindEngineConfig(dtype=dtype, devices=[0])
    model, *_ = converter.get_tm_config(checkpoint, told, trust_remote_code=True)
    groups = ("attn_tp", "mlp_tp", "ep", "model_tp", "dense_tp")
    model.bind_runtime(
        ctx=_context(_torch_dtype_to_cpp(getattr(torch, dtype))),
        root_handles=[root],
        **{name: ParallelGroup(1, [0]) for name in groups},
    )
    return model


def _context(kind: Any) -> Any:
    """Return the description of a device whose kernels take every shape as it is."""
    from lmdeploy.turbomind.builders._base import Context

    no_type = recorder.DataType.TYPE_INVALID
    plan = SimpleNamespace(
        bridge=(1, 1, no_type, no_type),
        family="recorder",
        shape_constraints=((1, 1), (1, 1)),
        gate_up=lambda *_: 0,
    )
    gemm = SimpleNamespace(get_weight_plan=lambda _: plan)
    return Context([contextlib.nullcontext()], gemm, data_type=kind, gemm_input_dtype=no_type)


def _watched(checkpoint: Any) -> set[str]:
    """Return the names of a checkpoint's tensors; each leaves when it is read."""
    unread = set(checkpoint.keys())
    checkpoint.get = _noting(checkpoint.get, unread)
    checkpoint.pop = _noting(checkpoint.pop, unread)
    return unread


def _noting(read: Callable[..., Any], unread: set[str]) -> Callable[..., Any]:
    """Return a way of reading that takes what it reads off the list."""

    def noted(key: str, index: Any = None) -> Any:
        tensor = read(key, index=index)
        unread.discard(key)
        return tensor

    return noted


if __name__ == "__main__":
    sys.modules["lmdeploy.turbomind._turbomind"] = recorder.module()
    torch.Tensor.cuda = lambda self, *_, **__: self
    answer_all(answer)
