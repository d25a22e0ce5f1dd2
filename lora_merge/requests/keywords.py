"""Keywords of the public functions that have a default.

Made from the table of options by `scripts/docs.py --write`; do not edit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from lora_merge.requests.choices import (
        AdapterFormat,
        BaseIs,
        Copies,
        Engine,
        ExpertForm,
        Link,
        Naming,
        OutputDtype,
        OutputStorage,
        ProofLevel,
        RoundingMethod,
        VerifyLevel,
    )
    from lora_merge.requests.inputs import AdapterPaths


class PlanOptions(TypedDict, total=False):
    """Keywords of `lora_merge.plan`."""

    base: str | PathLike[str] | None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's."""

    base_is: BaseIs | None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: str | Sequence[str]
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: str | Sequence[str]
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    combine: Literal["linear", "ties", "dare_linear", "dare_ties", "svd"]
    """Method to combine several adapters. Default: linear, the weighted sum."""

    density: float
    """Share of each delta that TIES and DARE keep. Default: 0.5."""

    seed: int
    """Random seed for DARE and stochastic rounding. Default: 0."""

    dtype: OutputDtype | None
    """Dtype of the merged weights. Default: the base's."""

    out_storage: OutputStorage | None
    """Storage of a quantised base's weights. dense: all dequantised. mixed: only the merged ones dequantised.
    base: all stay quantised, on the base's scales. Default: dense if a quantised weight changes, else
    base."""

    quantize: str | None
    """Quantise the merged linear layers. Schemes: fp8 (every engine loads it), fp8-block, fp8-channel, int8,
    int4, int4-g32, int4-asym, int4-asym-g32, mxfp4, mxfp8, nvfp4. Default: no quantisation."""

    ignore: str | Sequence[str]
    """With --quantize, keep these modules dense. A name, or a pattern such as '*.o_proj'. May be repeated."""

    rounding: RoundingMethod | None
    """How merged values are rounded. nearest: to the nearest number. adapter: so that the adapter's effect is
    kept. stochastic: to a random neighbour. Default: nearest; adapter with --out-storage base."""

    allow_loss: bool
    """Allow an output that keeps less than half of the adapter's effect after rounding."""

    max_shard_size: str | int | None
    """Largest size of a weight file, such as 5GB. Default: the base's files."""

    allow_untie: bool
    """Untie the embeddings of a model family that engines always tie."""

    allow_svd: bool
    """Merge OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ between
    machines."""

    allow_again: bool
    """Merge an adapter a second time into a base that already contains it."""

    token: str | None
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool
    """Use the local cache only. No network access."""

    stream_base: bool
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""


class MergeOptions(PlanOptions, total=False):
    """Keywords of `lora_merge.merge`."""

    strict: bool
    """Treat warnings as errors."""

    device: str
    """Device for the arithmetic. Default: auto, the CPU."""

    workers: int | None
    """Largest number of workers. Default: cores, at most 8."""

    executor: Literal["auto", "serial", "threads", "processes"]
    """How workers run. Processes each load torch, which takes seconds and memory. The output is the same.
    Default: auto, threads."""

    memory_limit: str | int | None
    """Memory to use at most, such as 2GB. It leads to fewer workers and smaller tiles, or an error if it is
    too little. Default: free memory."""

    link: Link | None
    """How unchanged weight files get into the output. A hard link shares the file with the base. Default:
    reflink if the filesystem supports it, else copy."""

    verify: VerifyLevel
    """How much to verify before publishing. sample: part of every merged row, and some rows completely. full:
    everything. Default: sample."""

    overwrite: bool
    """Replace an existing output. The old one is removed when the new one is complete; in a store, it cannot
    be loaded meanwhile."""

    resume: bool
    """Continue an interrupted run. If it was the same merge, its finished tensors, or files in a store, are
    checked and kept."""

    copies: Copies
    """How unchanged bytes get from a store to a store. store: the store copies them by itself. stream: they
    are read and written. Default: auto, store where the store states checksums."""

    part: str | None
    """Make only some files of the output: part I of N, the same split in every process. auto: by a SLURM job
    array; auto/N: by a Kubernetes indexed job. Then --seal. Default: all of it."""

    seal: bool
    """Verify and publish an output whose parts are all made."""

    report: str | PathLike[str] | None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""


class VerifyOptions(TypedDict, total=False):
    """Keywords of `lora_merge.verify`."""

    base: str | PathLike[str] | None
    """Base model that it was made from. Default: the one in its manifest."""

    adapter: AdapterPaths
    """Adapter that was merged. May be repeated. Default: the one in its manifest."""

    level: ProofLevel
    """How much to check. sample: part of every merged row by random projections, and some rows recomputed.
    full: all rows recomputed. structure: names, shapes and files only. Default: sample."""

    forward: bool
    """Compare the logits of base + adapter (unmerged) with those of the merged checkpoint."""

    engine: Engine | None
    """Also run the checkpoint in this engine, without LoRA."""

    engine_python: str | PathLike[str] | None
    """Python interpreter of the engine's environment. Default: the current one."""

    prompt: str | Sequence[str]
    """Prompt for --forward. May be repeated. Default: three texts and random tokens."""

    n_tokens: int
    """Tokens to generate for each prompt. Default: 8."""

    tolerance: float | None
    """Largest difference between logits that passes. Default: measured from the rounding of the stored
    dtype."""

    dtype: OutputDtype
    """Dtype for --forward. bfloat16 and float16 need half the memory and find fewer differences. Default:
    float32."""

    trust_remote_code: bool
    """Run the checkpoint's own Python code. For models that transformers does not support."""

    ignore_file: str | Sequence[str]
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    token: str | None
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool
    """Use the local cache only. No network access."""

    stream_base: bool
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""

    report: str | PathLike[str] | None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""


class InspectOptions(TypedDict, total=False):
    """Keywords of `lora_merge.inspect`."""

    base: str | PathLike[str] | None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's, if one is needed."""

    base_is: BaseIs | None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: str | Sequence[str]
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: str | Sequence[str]
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    engine: Literal["vllm", "lmdeploy", "lorax", "sglang", "tgi", "llamacpp"] | None
    """Report on this engine only."""

    plot: str | PathLike[str] | None
    """Draw a heat map of layers and modules to a .png, .svg or .html file. It shows ranks, and with --base
    the size of each delta."""

    strict: bool
    """Treat warnings as errors."""

    token: str | None
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool
    """Use the local cache only. No network access."""

    stream_base: bool
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""

    report: str | PathLike[str] | None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""


class ConvertOptions(TypedDict, total=False):
    """Keywords of `lora_merge.convert`."""

    engine: Literal["vllm", "lmdeploy", "lorax", "sglang", "tgi", "llamacpp"] | None
    """Make all changes that this engine needs. The rules are those that inspect reports; the result is
    checked against them."""

    expand_targets: bool
    """Write target_modules as a plain list. It replaces a regex, layers_to_transform and exclude_modules."""

    bake_scale: bool
    """Fold the scale into B, so that α/r is 1. Covers rsLoRA, lora_alpha and alpha_pattern."""

    rank: int | None
    """Reduce every module to at most rank N, by SVD. The loss is reported. Smaller ranks stay: see
    --pad-rank."""

    energy: float | None
    """Choose each rank to keep this share of the squared singular values. Example: 0.99."""

    pad_rank: int | None
    """Pad every module to rank N with zeros."""

    to_lora: bool
    """Turn another kind of adapter into a plain LoRA. AdaLoRA is exact. DoRA, LoHa, IA3, OFT and full modules
    are approximated: give --rank or --energy, and --base."""

    rename: Naming | None
    """Use the module names of transformers 4 or 5."""

    experts: ExpertForm | None
    """``split``: Write one LoRA per MoE expert. ``fuse``: Write one LoRA for the fused weights of all MoE
    experts."""

    dtype: OutputDtype | None
    """Dtype of the LoRA weights. Default: the adapter's if exact, else float32."""

    format: AdapterFormat
    """Format of the output: PEFT, GGUF for llama.cpp, or mlx-lm. Default: peft."""

    base: str | PathLike[str] | None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's, if one is needed."""

    base_is: BaseIs | None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: str | Sequence[str]
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: str | Sequence[str]
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    allow_svd: bool
    """Convert OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ
    between machines."""

    overwrite: bool
    """Replace an existing output. The old one is removed when the new one is complete."""

    strict: bool
    """Treat warnings as errors."""

    token: str | None
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool
    """Use the local cache only. No network access."""


class ExtractOptions(TypedDict, total=False):
    """Keywords of `lora_merge.extract`."""

    rank: int | None
    """Rank of the LoRA: singular values kept per module."""

    energy: float | None
    """Choose each rank to keep this share of the squared singular values. Example: 0.9; with --rank N, at
    most N."""

    target: str | Sequence[str]
    """Extract only modules with this name, such as q_proj. May be repeated. Default: every layer that LoRA
    supports."""

    save_modules: bool
    """Store changed embeddings, norms and biases in full."""

    dtype: OutputDtype | None
    """Dtype of the LoRA weights. Default: float32."""

    overwrite: bool
    """Replace an existing output. The old one is removed when the new one is complete."""

    strict: bool
    """Treat warnings as errors."""

    token: str | None
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool
    """Use the local cache only. No network access."""
