"""The six kernels that LMDeploy has for GPUs only, in plain torch; everything else is its own.

One sequence at a time, always from its first token: there is no cache to be wrong about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import lmdeploy.pytorch.config
import lmdeploy.pytorch.configurations.deepseek_v2
import torch
from lmdeploy.pytorch.backends import selector
from lmdeploy.pytorch.backends.attention import AttentionImpl, PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec, LinearW4A16Impl
from lmdeploy.pytorch.backends.blockedf8_modules import LinearBlockedF8BuildSpec, LinearBlockedF8Impl
from lmdeploy.pytorch.backends.default.op_backend import DefaultOpsBackend
from lmdeploy.pytorch.backends.flash_attention import FlashAttentionBuildSpec
from lmdeploy.pytorch.backends.lora import AdapterInfo, LoRABuildSpec, LoRAImpl
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec, FusedMoEImpl
from torch.nn.functional import linear, silu


class Attention(AttentionImpl):
    """Causal attention: query [n, heads, width], key and value [n, groups, width]."""

    def forward(
        self, query: Any, key: Any, value: Any, *_: Any, learnable_sink: Any = None, **__: Any
    ) -> Any:
        if value is None or value.shape[-1] != self.v_head_size:
            value = key[..., : self.v_head_size]  # of latent attention the values are a part of the keys
        n_repeats = query.shape[1] // key.shape[1]
        keys, values = (tensor.repeat_interleave(n_repeats, 1).float() for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * self.scale
        if self.logit_softcapping:
            scores = torch.tanh(scores / self.logit_softcapping) * self.logit_softcapping
        scores = scores.masked_fill(~self._seen(len(query)), float("-inf"))
        if learnable_sink is None:
            weights = scores.softmax(-1)
        else:
            sinks = learnable_sink.float().view(-1, 1, 1).expand(-1, len(query), 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)

    def _seen(self, n_tokens: int) -> torch.Tensor:
        """Return which token [query, key] sees which."""
        at = torch.arange(n_tokens)
        seen = at[None, :] <= at[:, None]
        window = self.sliding_window
        window = window[0] if isinstance(window, tuple | list) else window
        return seen & (at[None, :] > at[:, None] - window) if window and window > 0 else seen


class Experts(FusedMoEImpl):
    """Experts one after the other: gate_up [experts, 2·width, hidden], down [experts, hidden, width]."""

    def __init__(self, spec: FusedMoEBuildSpec) -> None:
        self.spec = spec

    def ep_expert_list(self, world_size: int, rank: int) -> list[int]:
        return list(range(self.spec.num_experts))

    def forward(
        self, hidden_states: Any, topk_weights: Any, topk_ids: Any, *weights: Any, act_func: Any = None
    ) -> Any:
        gate_up_weights, down_weights, gate_up_bias, down_bias, _ = weights
        if self.spec.renormalize:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        out = torch.zeros_like(hidden_states)
        for e in range(self.spec.num_experts):
            rows, ranks = (topk_ids == e).nonzero(as_tuple=True)
            inner = linear(hidden_states[rows], gate_up_weights[e], _of(gate_up_bias, e))
            inner = act_func(inner) if act_func else _gated(inner)
            outer = linear(inner, down_weights[e], _of(down_bias, e))
            out.index_add_(0, rows, (outer * topk_weights[rows, ranks, None]).to(out.dtype))
        return out


def _of(biases: Any, e: int) -> Any:
    return None if biases is None else biases[e]


def _gated(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, -1)
    return silu(gate) * up


class Adapters(LoRAImpl):
    """The adapter of one sequence: A [rank, in] and B [rank, out], of all adapters one below the other."""

    def forward(
        self, x: Any, a: Any, b: Any, output: Any, info: AdapterInfo, *, ctx_mgr: Any, **_: Any
    ) -> Any:
        (number,) = ctx_mgr.current_context().local_adapter_ids.tolist()
        first, rank, scale = (of[number].item() for of in (info.rank_offsets, info.ranks, info.scalings))
        own = slice(first, first + rank)
        output[..., info.base_slice] += scale * (x @ a[own].T @ b[own])
        return output


class Blocks(LinearBlockedF8Impl):
    """FP8 with a scale for each block: weight [out, in], scale [out/128, in/128], rounded up."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any, weight: Any, scale: Any, bias: Any = None, *_: Any, **__: Any) -> Any:
        scales = scale.float().repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        values = weight.float() * scales[: weight.shape[0], : weight.shape[1]]
        return linear(x, values.to(x.dtype), bias)


class Fours(LinearW4A16Impl):
    """AWQ: weight [in, out/8], scales [in/group, out], zeros [in/group, out/8], outputs of eight in an order of their own."""

    def __init__(self, group: int) -> None:
        self.group = group

    def forward(
        self, x: Any, qweight: Any, scales: Any, qzeros: Any, bias: Any = None, *_: Any, **__: Any
    ) -> Any:
        zeros, factors = (of.repeat_interleave(self.group, 0) for of in (_nibbles(qzeros), scales.float()))
        values = (_nibbles(qweight) - zeros) * factors
        return linear(x, values.T.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the eight numbers of each word, in AWQ's order."""
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2).float()


class Backend(DefaultOpsBackend):
    """LMDeploy's own operators of no device, and the above."""

    @staticmethod
    def get_name() -> str:
        return "plain torch"

    @classmethod
    def build_op(cls, spec: Any, *, enable_deterministic: bool = False) -> Any:
        make = MAKERS.get(type(spec))
        return make(spec) if make else super().build_op(spec, enable_deterministic=enable_deterministic)


def _attention(spec: PagedAttentionBuildSpec) -> Attention:
    return Attention(
        spec.num_heads,
        spec.head_dim,
        scale=spec.scale,
        num_kv_heads=spec.num_kv_heads,
        v_head_size=spec.v_head_dim,
        alibi=spec.alibi,
        sliding_window=spec.sliding_window,
        logit_softcapping=spec.logit_softcapping,
        causal=spec.causal,
        use_flash_mla=spec.use_flash_mla,
    )


MAKERS: Mapping[type, Callable[[Any], Any]] = {
    PagedAttentionBuildSpec: _attention,
    FlashAttentionBuildSpec: lambda _: SimpleNamespace(forward=None),  # a tower's: loaded, and shown no image
    FusedMoEBuildSpec: Experts,
    LoRABuildSpec: lambda _: Adapters(),
    LinearBlockedF8BuildSpec: lambda spec: Blocks(spec.block_size),
    LinearW4A16BuildSpec: lambda spec: Fours(spec.group_size),
}
"""What an operator is asked for with → what makes it."""


def install() -> None:
    """Let LMDeploy build its models with this backend."""
    selector._get_backend = lambda: Backend
    lmdeploy.pytorch.config.is_bf16_supported = lambda *_, **__: True
    lmdeploy.pytorch.configurations.deepseek_v2.flash_mla_available = lambda: False
    torch.Tensor.cuda = lambda self, *_, **__: self  # experts are moved to a GPU to be transposed there
