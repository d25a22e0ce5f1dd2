"""Products of quantised weights for which vLLM has kernels on GPUs, or on CPUs with AMX, in plain torch.

Everything before the product is vLLM's own: its reading of the configuration, its choice of a method for each layer,
its loader, and what it fuses. A kernel of its own comes first where it can run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.platforms import PlatformEnum

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
USED: set[str] = set()
"""Names of the kernels that were made for quantised weights."""


class _Anywhere:
    """What is in plain torch runs wherever torch does."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        # As its own kernels for weights alone do, this takes inputs as they are.
        return True, None


class _Decoded(_Anywhere):
    """A product with weights [out, in] that were decoded once, when the layer was loaded."""

    def apply_weights(self, layer: torch.nn.Module, x: Any, bias: Any = None) -> Any:
        return linear(x, layer.decoded.to(x.dtype), bias)


class PlainBlocks(_Anywhere, Fp8BlockScaledMMLinearKernel):
    """FP8 with a scale for each block; what it multiplies is not rounded."""

    apply_input_quant = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:  # noqa: N803 - its names
        block = self.weight_group_shape
        scales = Bs.float().repeat_interleave(block.row, 0).repeat_interleave(block.col, 1)
        return linear(A, (B.float() * scales[: B.shape[0], : B.shape[1]]).to(A.dtype))


class PlainMxfp4(_Decoded, kernels.MxFp4LinearKernel):
    """MXFP4: weight [out, in/2], exponents [out, in/32]."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.decoded = _mxfp4(layer.weight.data, layer.weight_scale.data)


class PlainNvfp4(_Decoded, kernels.NvFp4LinearKernel):
    """NVFP4: weight [out, in/2], scales [out, in/16] in FP8, and one factor for all."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        scales = layer.weight_scale.data.float() * layer.weight_global_scale.data
        layer.decoded = _e2m1(layer.weight.data) * scales.repeat_interleave(16, -1)


class PlainExperts(cpu_moe.CPUExpertsMxfp4):
    """MXFP4 experts of gpt-oss: gate_up [experts, 2·width, hidden] with rows in turn gate and up, down [experts, hidden, width]."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    def apply(
        self,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        settings = self.quant_config
        alpha, limit = settings.gemm1_alpha, settings.gemm1_clamp_limit
        inputs, total = hidden_states.float(), torch.zeros_like(hidden_states, dtype=torch.float32)
        for e in range(len(w1)):
            rows, ranks = (topk_ids == e).nonzero(as_tuple=True)
            inner = linear(inputs[rows], _mxfp4(w1[e], self.w1_scale[e]), settings.w1_bias[e].float())
            gate, up = inner[:, ::2].clamp(max=limit), inner[:, 1::2].clamp(-limit, limit)
            gated = (up + 1) * gate * torch.sigmoid(alpha * gate)
            outer = linear(gated, _mxfp4(w2[e], self.w2_scale[e]), settings.w2_bias[e].float())
            total.index_add_(0, rows, outer * topk_weights[rows, ranks, None])
        output.copy_(total)


def _mxfp4(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return the values [out, in] of nibbles [out, in/2], low ones first, and exponents [out, in/32]."""
    return _e2m1(packed) * torch.exp2(exponents.float() - 127).repeat_interleave(32, -1)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers [out, in] of nibbles [out, in/2], low ones first."""
    return E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


PLAIN = {
    one.__name__
    for one in (PlainBlocks, PlainExperts, PlainMxfp4, PlainNvfp4, kernels.EmulationMxfp8LinearKernel)
}


def install() -> None:
    """Let vLLM use these where it has nothing that can run, and note every kernel for quantised weights."""
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(PlainBlocks)
    kernels._POSSIBLE_MXFP4_KERNELS.setdefault(PlatformEnum.CPU, []).append(PlainMxfp4)
    # Plain torch of its own, which it does not take on CPUs.
    kernels._POSSIBLE_MXFP8_KERNELS.setdefault(PlatformEnum.CPU, []).append(
        kernels.EmulationMxfp8LinearKernel
    )
    # It names one kernel for weights alone, whatever the platform.
    kernels.MarlinNvFp4LinearKernel = PlainNvfp4
    if not cpu_moe.CPUExpertsMxfp4._supports_current_device():
        cpu_moe.CPUExpertsMxfp4 = PlainExperts
        cpu_moe.prepare_mxfp4_moe_layer_for_cpu = lambda *tensors: tensors
    quantised = (
        kernels.MPLinearKernel,
        kernels.MMLinearKernel,
        kernels.ScaledMMLinearKernel,
        kernels.MxFp4LinearKernel,
        kernels.Mxfp8LinearKernel,
        kernels.NvFp4LinearKernel,
    )
    for kind in (*quantised, modular_kernel.FusedMoEExperts):
        _note(kind)


def _note(kind: type) -> None:
    """Let a class note the names of what is made of it."""
    make = kind.__init__

    def noting(self: Any, *args: Any, **more: Any) -> None:
        if "Unquantized" not in type(self).__name__:
            USED.add(type(self).__name__)
        make(self, *args, **more)

    kind.__init__ = noting
