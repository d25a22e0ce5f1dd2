"""Requests, one class for each verb.

Made from the table of options by `scripts/docs.py --write`; do not edit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

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


@dataclass(frozen=True, slots=True)
class Request:
    """What to merge, into what, and how: the command's options, and the keys of a request file."""

    adapter: tuple[str, ...]
    """Adapter: directory, repo or URL. A repo is written as org/name, org/name/folder or org/name@revision, a
    URL as s3://bucket/folder. A weight may follow: my-lora:0.5. May be repeated, see --combine."""

    out: str
    """Directory to create, or a URL. It begins with s3://, gs://, az:// or file:///."""

    base: str | None = None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's."""

    base_is: BaseIs | None = None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: tuple[str, ...] = ()
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: tuple[str, ...] = ()
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    combine: str = "linear"
    """Method to combine several adapters. Default: linear, the weighted sum."""

    density: float = 0.5
    """Share of each delta that TIES and DARE keep. Default: 0.5."""

    seed: int = 0
    """Random seed for DARE and stochastic rounding. Default: 0."""

    dtype: OutputDtype | None = None
    """Dtype of the merged weights. Default: the base's."""

    out_storage: OutputStorage | None = None
    """Storage of a quantised base's weights. dense: all dequantised. mixed: only the merged ones dequantised.
    base: all stay quantised, on the base's scales. Default: dense if a quantised weight changes, else
    base."""

    quantize: str | None = None
    """Quantise the merged linear layers. Schemes: fp8 (every engine loads it), fp8-block, fp8-channel, int8,
    int4, int4-g32, int4-asym, int4-asym-g32, mxfp4, mxfp8, nvfp4. Default: no quantisation."""

    ignore: tuple[str, ...] = ()
    """With --quantize, keep these modules dense. A name, or a pattern such as '*.o_proj'. May be repeated."""

    rounding: RoundingMethod | None = None
    """How merged values are rounded. nearest: to the nearest number. adapter: so that the adapter's effect is
    kept. stochastic: to a random neighbour. Default: nearest; adapter with --out-storage base."""

    allow_loss: bool = False
    """Allow an output that keeps less than half of the adapter's effect after rounding."""

    max_shard_size: str | int | None = None
    """Largest size of a weight file, such as 5GB. Default: the base's files."""

    allow_untie: bool = False
    """Untie the embeddings of a model family that engines always tie."""

    allow_svd: bool = False
    """Merge OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ between
    machines."""

    allow_again: bool = False
    """Merge an adapter a second time into a base that already contains it."""

    token: str | None = field(default=None, repr=False)
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool = False
    """Use the local cache only. No network access."""

    stream_base: bool = False
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""

    strict: bool = False
    """Treat warnings as errors."""

    device: str = "auto"
    """Device for the arithmetic. Default: auto, the CPU."""

    workers: int | None = None
    """Largest number of workers. Default: cores, at most 8."""

    executor: str = "auto"
    """How workers run. Processes each load torch, which takes seconds and memory. The output is the same.
    Default: auto, threads."""

    memory_limit: str | int | None = None
    """Memory to use at most, such as 2GB. It leads to fewer workers and smaller tiles, or an error if it is
    too little. Default: free memory."""

    link: Link | None = None
    """How unchanged weight files get into the output. A hard link shares the file with the base. Default:
    reflink if the filesystem supports it, else copy."""

    verify: VerifyLevel = "sample"
    """How much to verify before publishing. sample: part of every merged row, and some rows completely. full:
    everything. Default: sample."""

    overwrite: bool = False
    """Replace an existing output. The old one is removed when the new one is complete; in a store, it cannot
    be loaded meanwhile."""

    resume: bool = False
    """Continue an interrupted run. If it was the same merge, its finished tensors, or files in a store, are
    checked and kept."""

    copies: Copies = "auto"
    """How unchanged bytes get from a store to a store. store: the store copies them by itself. stream: they
    are read and written. Default: auto, store where the store states checksums."""

    part: str | None = None
    """Make only some files of the output: part I of N, the same split in every process. auto: by a SLURM job
    array; auto/N: by a Kubernetes indexed job. Then --seal. Default: all of it."""

    seal: bool = False
    """Verify and publish an output whose parts are all made."""

    report: str | None = None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Which output to hold to what, and how far to go."""

    out: str
    """Merged checkpoint to verify: directory or URL."""

    base: str | None = None
    """Base model that it was made from. Default: the one in its manifest."""

    adapter: tuple[str, ...] = ()
    """Adapter that was merged. May be repeated. Default: the one in its manifest."""

    level: ProofLevel = "sample"
    """How much to check. sample: part of every merged row by random projections, and some rows recomputed.
    full: all rows recomputed. structure: names, shapes and files only. Default: sample."""

    forward: bool = False
    """Compare the logits of base + adapter (unmerged) with those of the merged checkpoint."""

    engine: Engine | None = None
    """Also run the checkpoint in this engine, without LoRA."""

    engine_python: str | None = None
    """Python interpreter of the engine's environment. Default: the current one."""

    prompt: tuple[str, ...] = ()
    """Prompt for --forward. May be repeated. Default: three texts and random tokens."""

    n_tokens: int = 8
    """Tokens to generate for each prompt. Default: 8."""

    tolerance: float | None = None
    """Largest difference between logits that passes. Default: measured from the rounding of the stored
    dtype."""

    dtype: OutputDtype = "float32"
    """Dtype for --forward. bfloat16 and float16 need half the memory and find fewer differences. Default:
    float32."""

    trust_remote_code: bool = False
    """Run the checkpoint's own Python code. For models that transformers does not support."""

    ignore_file: tuple[str, ...] = ()
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    token: str | None = field(default=None, repr=False)
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool = False
    """Use the local cache only. No network access."""

    stream_base: bool = False
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""

    strict: bool = False
    """Treat warnings as errors."""

    report: str | None = None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """Which adapter to describe, and against which base."""

    adapter: str
    """Adapter: directory, Hub repo (org/name) or URL (s3://bucket/folder)."""

    base: str | None = None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's, if one is needed."""

    base_is: BaseIs | None = None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: tuple[str, ...] = ()
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: tuple[str, ...] = ()
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    serving: str | None = None
    """Report on this engine only."""

    plot: str | None = None
    """Draw a heat map of layers and modules to a .png, .svg or .html file. It shows ranks, and with --base
    the size of each delta."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool = False
    """Use the local cache only. No network access."""

    stream_base: bool = False
    """Read the weights of a base on the Hub by ranges, without storing them on this machine."""

    report: str | None = None
    """Write the result as an HTML page. It includes errors, and needs no network to be shown."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """Which adapter to rewrite, and how."""

    adapter: str
    """Adapter: directory, Hub repo (org/name) or URL (s3://bucket/folder)."""

    out: str
    """Directory to create."""

    serving: str | None = None
    """Make all changes that this engine needs. The rules are those that inspect reports; the result is
    checked against them."""

    expand_targets: bool = False
    """Write target_modules as a plain list. It replaces a regex, layers_to_transform and exclude_modules."""

    bake_scale: bool = False
    """Fold the scale into B, so that α/r is 1. Covers rsLoRA, lora_alpha and alpha_pattern."""

    rank: int | None = None
    """Reduce every module to at most rank N, by SVD. The loss is reported. Smaller ranks stay: see
    --pad-rank."""

    energy: float | None = None
    """Choose each rank to keep this share of the squared singular values. Example: 0.99."""

    pad_rank: int | None = None
    """Pad every module to rank N with zeros."""

    to_lora: bool = False
    """Turn another kind of adapter into a plain LoRA. AdaLoRA is exact. DoRA, LoHa, IA3, OFT and full modules
    are approximated: give --rank or --energy, and --base."""

    rename: Naming | None = None
    """Use the module names of transformers 4 or 5."""

    experts: ExpertForm | None = None
    """``split``: Write one LoRA per MoE expert. ``fuse``: Write one LoRA for the fused weights of all MoE
    experts."""

    dtype: OutputDtype | None = None
    """Dtype of the LoRA weights. Default: the adapter's if exact, else float32."""

    format: AdapterFormat = "peft"
    """Format of the output: PEFT, GGUF for llama.cpp, or mlx-lm. Default: peft."""

    base: str | None = None
    """Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as
    s3://bucket/folder. Default: the adapter's, if one is needed."""

    base_is: BaseIs | None = None
    """State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual:
    the model that the initialisation saved."""

    expert_layout: tuple[str, ...] = ()
    """Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or
    in-out), or adapters trained with Unsloth before September 2026. May be repeated."""

    ignore_file: tuple[str, ...] = ()
    """Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be
    repeated."""

    allow_svd: bool = False
    """Convert OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ
    between machines."""

    overwrite: bool = False
    """Replace an existing output. The old one is removed when the new one is complete."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool = False
    """Use the local cache only. No network access."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """Which training to take apart into a LoRA."""

    base: str
    """Base model, before the fine-tuning."""

    tuned: str
    """Fine-tuned model."""

    out: str
    """Directory to create."""

    rank: int | None = None
    """Rank of the LoRA: singular values kept per module."""

    energy: float | None = None
    """Choose each rank to keep this share of the squared singular values. Example: 0.9; with --rank N, at
    most N."""

    target: tuple[str, ...] = ()
    """Extract only modules with this name, such as q_proj. May be repeated. Default: every layer that LoRA
    supports."""

    save_modules: bool = False
    """Store changed embeddings, norms and biases in full."""

    dtype: OutputDtype | None = None
    """Dtype of the LoRA weights. Default: float32."""

    overwrite: bool = False
    """Replace an existing output. The old one is removed when the new one is complete."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not
    show it. Default: HF_TOKEN, or the login."""

    offline: bool = False
    """Use the local cache only. No network access."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}
