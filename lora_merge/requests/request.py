"""Requests, one class for each verb.

Made from the table of options by `scripts/docs.py --write`; do not edit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lora_merge.requests.choices import (
    AdapterFormat,
    BaseIs,
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
    """Adapter to merge (a directory, or org/name[/folder][@revision] on the Hub), and how much of it; repeat
    it to merge several."""

    out: str
    """Directory to create."""

    base: str | None = None
    """Base model: a directory, or org/name[@revision] on the Hub. Default: the one that the adapter names."""

    base_is: BaseIs | None = None
    """What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter: the model as published, or what
    the initialisation left of it."""

    expert_layout: tuple[str, ...] = ()
    """What cannot be seen of stacked experts: how the base stores a square one in the adapter's terms;
    Unsloth's packing of B. May be repeated."""

    ignore_file: tuple[str, ...] = ()
    """Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern
    such as 'model-*'. May be repeated."""

    combine: str = "linear"
    """How several adapters become one change of each weight. Default: linear, their weighted sum."""

    density: float = 0.5
    """Share of each change that ties and dare keep. Default: 0.5."""

    seed: int = 0
    """Of what dare drops, and of stochastic rounding. Default: 0."""

    dtype: OutputDtype | None = None
    """Store the weights in this dtype. Default: the base's, tensor by tensor."""

    out_storage: OutputStorage | None = None
    """How a quantised base's weights are stored: all dense; dense where they change and as they are elsewhere
    (mixed); or as the base stores them, with new codes on its own scales (base). Default: dense, unless no
    quantised weight changes: then all are copied."""

    quantize: str | None = None
    """Quantise the linear layers: fp8 (all engines load it), fp8-block, fp8-channel, int8, int4, int4-g32,
    int4-asym, int4-asym-g32, mxfp4, mxfp8 or nvfp4. Default: they stay as they are."""

    ignore: tuple[str, ...] = ()
    """With --quantize, leave these modules dense: a name, or a pattern such as '*.o_proj'."""

    rounding: RoundingMethod | None = None
    """Which number a merged value becomes: the nearest; one that keeps the adapter's effect (adapter); or a
    neighbour at random (stochastic). Default: nearest; with --out-storage base, adapter."""

    allow_loss: bool = False
    """Write the output even if rounding loses more than half of the adapter's change."""

    max_shard_size: str | int | None = None
    """Split the weights into files of at most this size, such as 5GB. Default: the base's own files."""

    allow_untie: bool = False
    """Untie the embeddings even of a family that engines tie whatever its config says."""

    allow_svd: bool = False
    """Merge OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise."""

    allow_again: bool = False
    """Merge an adapter into a base that has it merged into it already."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows. Default:
    HF_TOKEN, or the login."""

    offline: bool = False
    """Take models and adapters from the local cache, and ask no hub."""

    strict: bool = False
    """Treat warnings as errors."""

    device: str = "auto"
    """Do the arithmetic here. Default: auto, the CPU."""

    workers: int | None = None
    """Workers, at most. Default: the usable cores, up to 8."""

    executor: str = "auto"
    """What runs the workers. Each process loads torch for itself, which takes seconds and memory. The output
    is the same. Default: auto, threads."""

    memory_limit: str | int | None = None
    """Hold no more than this in memory, such as 2GB: fewer workers and smaller tiles, or a refusal. Default:
    what is free."""

    link: Link | None = None
    """How weight files that nothing changes come into the output; a hard link is the base's own file under a
    second name. Default: reflink where the filesystem has it, else copy."""

    verify: VerifyLevel = "sample"
    """Check the output before it gets its name: three rows of each merged tensor, or everything. Default:
    sample."""

    overwrite: bool = False
    """Replace an existing output, once the new one is whole."""

    resume: bool = False
    """Go on where an interrupted run to this output stopped, if it was the same merge; what it has written is
    checked first."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Which output to hold to what, and how far to go."""

    out: str
    """Directory of the output."""

    base: str | None = None
    """What it was merged into. Default: what its manifest names."""

    adapter: tuple[str, ...] = ()
    """What was merged into it; repeat it for several. Default: what its manifest names."""

    level: ProofLevel = "sample"
    """sample: check every merged row by random projections, and recompute some; full: recompute all;
    structure: compare nothing. Default: sample."""

    forward: bool = False
    """Run base and adapter, unmerged, and the merged checkpoint, and compare what they compute."""

    engine: Engine | None = None
    """Ask this engine too, with no LoRA support."""

    engine_python: str | None = None
    """Python interpreter that has the engine. Default: this one, or LORA_MERGE_ENGINE_PYTHON."""

    prompt: tuple[str, ...] = ()
    """Ask this; may be repeated. Default: three texts, and tokens drawn from the vocabulary."""

    n_tokens: int = 8
    """Tokens that each prompt is answered with. Default: 8."""

    tolerance: float | None = None
    """Largest difference of two logits that passes. Default: what rounding to the stored dtype explains,
    measured."""

    dtype: OutputDtype = "float32"
    """What the models compute in; a half dtype takes half the memory and hides more. Default: float32."""

    trust_remote_code: bool = False
    """Run the code that the checkpoint carries, where transformers has no class for the model."""

    ignore_file: tuple[str, ...] = ()
    """Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern
    such as 'model-*'. May be repeated."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows. Default:
    HF_TOKEN, or the login."""

    offline: bool = False
    """Take models and adapters from the local cache, and ask no hub."""

    strict: bool = False
    """Treat warnings as errors."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """Which adapter to describe, and against which base."""

    adapter: str
    """Adapter: a directory or a repo."""

    base: str | None = None
    """Base model: a directory, or org/name[@revision] on the Hub. Default: none, or where one is needed the
    one that the adapter names."""

    base_is: BaseIs | None = None
    """What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter."""

    expert_layout: tuple[str, ...] = ()
    """What cannot be seen of stacked experts."""

    ignore_file: tuple[str, ...] = ()
    """Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern
    such as 'model-*'. May be repeated."""

    serving: str | None = None
    """Report on this engine only."""

    plot: str | None = None
    """Draw a heat map of layers and modules into a .png, .svg or .html file: rank, and with a base how large
    the change is."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows. Default:
    HF_TOKEN, or the login."""

    offline: bool = False
    """Take models and adapters from the local cache, and ask no hub."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """Which adapter to rewrite, and how."""

    adapter: str
    """Adapter: a directory or a repo."""

    out: str
    """Directory to create."""

    serving: str | None = None
    """Do whatever this engine needs, by the rules that inspect reports, and check that it is enough."""

    expand_targets: bool = False
    """List the modules in place of a regex, layers and exclusions."""

    bake_scale: bool = False
    """Fold rsLoRA, α and its patterns into B: α/r is 1 then."""

    rank: int | None = None
    """Keep the N largest singular values of each module's change, at most; says what is lost. A smaller rank
    stays: see --pad-rank."""

    energy: float | None = None
    """Keep as many as make up this share of the sum of their squares, such as 0.99."""

    pad_rank: int | None = None
    """Give every module the rank N, with zeros."""

    to_lora: bool = False
    """Make plain LoRA of any other kind: AdaLoRA exactly; DoRA, LoHa, IA3, OFT, whole modules and so on by
    --rank or --energy of what they change in the base."""

    rename: Naming | None = None
    """Name modules as transformers 4 or 5 does."""

    experts: ExpertForm | None = None
    """``split``: LoRA on every expert by itself. ``fuse``: LoRA on the parameters that hold all experts."""

    dtype: OutputDtype | None = None
    """Store the factors in this dtype. Default: the adapter's, where it holds them exactly, else float32."""

    format: AdapterFormat = "peft"
    """Write PEFT's files, a GGUF file for llama.cpp, or mlx-lm's files. Default: peft."""

    base: str | None = None
    """Base model: a directory, or org/name[@revision] on the Hub. Default: none, or where one is needed the
    one that the adapter names."""

    base_is: BaseIs | None = None
    """What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter."""

    expert_layout: tuple[str, ...] = ()
    """What cannot be seen of stacked experts."""

    ignore_file: tuple[str, ...] = ()
    """Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern
    such as 'model-*'. May be repeated."""

    allow_svd: bool = False
    """Take apart OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it
    otherwise."""

    overwrite: bool = False
    """Replace an existing output, once the new one is whole."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows. Default:
    HF_TOKEN, or the login."""

    offline: bool = False
    """Take models and adapters from the local cache, and ask no hub."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """Which training to take apart into a LoRA."""

    base: str
    """What was trained."""

    tuned: str
    """What came of it."""

    out: str
    """Directory to create."""

    rank: int | None = None
    """Keep the N largest singular values of each change."""

    energy: float | None = None
    """Keep as many as make up this share of the sum of their squares, such as 0.9; with --rank, at most N."""

    target: tuple[str, ...] = ()
    """Take modules whose paths end in this, such as q_proj; may be repeated. Default: all that LoRA can
    hold."""

    save_modules: bool = False
    """Carry whole what no LoRA holds: embeddings, norms, biases."""

    dtype: OutputDtype | None = None
    """Store the factors in this dtype. Default: float32."""

    overwrite: bool = False
    """Replace an existing output, once the new one is whole."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows. Default:
    HF_TOKEN, or the login."""

    offline: bool = False
    """Take models and adapters from the local cache, and ask no hub."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}
