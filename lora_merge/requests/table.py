"""The table of options. Each option is defined once, here.

The order of the rows is the order of the command's help. To add an option, add a row and run
``python scripts/docs.py --write``. The request then has a field of that name, for the code that needs it.
"""

from __future__ import annotations

from typing import Final

from lora_merge.requests import kinds
from lora_merge.requests.option import REQUIRED, Option, Verb

_ALL: Final[tuple[Verb, ...]] = ("merge", "plan", "verify", "inspect", "convert", "extract", "batch")
_MERGES: Final[tuple[Verb, ...]] = ("merge", "plan")
_PUSHES: Final[tuple[Verb, ...]] = ("merge", "convert", "extract")

_VERIFY: tuple[Option, ...] = (
    Option(
        "out",
        ("verify",),
        kinds.PLACE,
        "Merged checkpoint to verify: directory or URL.",
        default=REQUIRED,
        is_positional=True,
    ),
    Option(
        "base",
        ("verify",),
        kinds.PLACE,
        "Base model that it was made from.",
        "default: the one in its manifest",
    ),
    Option(
        "adapter",
        ("verify",),
        kinds.ADAPTERS,
        "Adapter that was merged. May be repeated.",
        "default: the one in its manifest",
        default=(),
    ),
    Option(
        "level",
        ("verify",),
        kinds.LEVEL,
        "How much to check. sample: part of every merged row by random projections, and some rows recomputed. full: all rows recomputed. structure: names, shapes and files only.",
        "default: sample",
        default="sample",
    ),
    Option(
        "rounding",
        ("verify",),
        kinds.ROUNDING,
        "How merged values were rounded, of an output without a manifest. nearest: to the nearest number. adapter: so that the adapter's effect is kept. stochastic: to a random neighbour.",
        "default: the one in its manifest; without it nearest, or adapter on a quantised base's scales",
    ),
    Option(
        "forward",
        ("verify",),
        kinds.SWITCH,
        "Compare the logits of base + adapter (unmerged) with those of the merged checkpoint.",
        default=False,
    ),
    Option("engine", ("verify",), kinds.ENGINE, "Also run the checkpoint in this engine, without LoRA."),
    Option(
        "engine_python",
        ("verify",),
        kinds.INTERPRETER,
        "Python interpreter of the engine's environment.",
        "default: the current one",
        environment="LORA_MERGE_ENGINE_PYTHON",
    ),
    Option(
        "prompt",
        ("verify",),
        kinds.TEXTS,
        "Prompt for --forward. May be repeated.",
        "default: three texts and random tokens",
        default=(),
    ),
    Option(
        "n_tokens",
        ("verify",),
        kinds.N_TOKENS,
        "Tokens to generate for each prompt.",
        "default: 8",
        default=8,
    ),
    Option(
        "tolerance",
        ("verify",),
        kinds.TOLERANCE,
        "Largest difference between logits that passes.",
        "default: measured from the rounding of the stored dtype",
    ),
    Option(
        "dtype",
        ("verify",),
        kinds.DTYPE,
        "Dtype for --forward. bfloat16 and float16 need half the memory and find fewer differences.",
        "default: float32",
        default="float32",
    ),
    Option(
        "trust_remote_code",
        ("verify",),
        kinds.SWITCH,
        "Run the checkpoint's own Python code. For models that transformers does not support.",
        default=False,
    ),
)

_ADAPTERS: tuple[Option, ...] = (
    Option(
        "adapter",
        ("inspect", "convert"),
        kinds.PLACE,
        "Adapter: directory, Hub repo (org/name) or URL (s3://bucket/folder).",
        default=REQUIRED,
        is_positional=True,
        has_wildcards=True,
        yaml_key="convert",
    ),
    Option(
        "base", ("extract",), kinds.PLACE, "Base model, before the fine-tuning.", "required", default=REQUIRED
    ),
    Option("tuned", ("extract",), kinds.PLACE, "Fine-tuned model.", "required", default=REQUIRED),
    Option(
        "out",
        ("convert", "extract"),
        kinds.FOLDER,
        "Directory to create.",
        "required, unless --push-to-hub is given",
        short="-o",
        default=REQUIRED,
        instead="push_to_hub",
    ),
    Option(
        "serving",
        ("convert",),
        kinds.SERVING,
        "Make all changes that this engine needs. The rules are those that inspect reports; the result is checked against them.",
        recorded="given",
        flag="--for",
        yaml_key="for",
        keyword="engine",
    ),
    Option(
        "expand_targets",
        ("convert",),
        kinds.SWITCH,
        "Write target_modules as a plain list. It replaces a regex, layers_to_transform and exclude_modules.",
        recorded="given",
        default=False,
    ),
    Option(
        "bake_scale",
        ("convert",),
        kinds.SWITCH,
        "Fold the scale into B, so that α/r is 1. Covers rsLoRA, lora_alpha and alpha_pattern.",
        recorded="given",
        default=False,
    ),
    Option(
        "rank",
        ("convert",),
        kinds.RANK,
        "Reduce every module to at most rank N, by SVD. The loss is reported. Smaller ranks stay: see --pad-rank.",
        recorded="given",
    ),
    Option("rank", ("extract",), kinds.RANK, "Rank of the LoRA: singular values kept per module."),
    Option(
        "energy",
        ("convert",),
        kinds.ENERGY,
        "Choose each rank to keep this share of the squared singular values. Example: 0.99.",
        recorded="given",
    ),
    Option(
        "energy",
        ("extract",),
        kinds.ENERGY,
        "Choose each rank to keep this share of the squared singular values. Example: 0.9; with --rank N, at most N.",
    ),
    Option("pad_rank", ("convert",), kinds.RANK, "Pad every module to rank N with zeros.", recorded="given"),
    Option(
        "to_lora",
        ("convert",),
        kinds.SWITCH,
        "Turn another kind of adapter into a plain LoRA. AdaLoRA is exact. DoRA, LoHa, IA3, OFT and full modules are approximated: give --rank or --energy, and --base.",
        recorded="given",
        default=False,
    ),
    Option(
        "rename", ("convert",), kinds.NAMING, "Use the module names of transformers 4 or 5.", recorded="given"
    ),
    Option(
        "experts",
        ("convert",),
        kinds.EXPERTS,
        "Write one LoRA per MoE expert.",
        recorded="given",
        flag="--split-experts",
        sets="split",
    ),
    Option(
        "experts",
        ("convert",),
        kinds.EXPERTS,
        "Write one LoRA for the fused weights of all MoE experts.",
        recorded="given",
        flag="--fuse-experts",
        sets="fuse",
    ),
    Option(
        "target",
        ("extract",),
        kinds.NAMES,
        "Extract only modules with this name, such as q_proj. May be repeated.",
        "default: every layer that LoRA supports",
        default=(),
    ),
    Option(
        "save_modules",
        ("extract",),
        kinds.SWITCH,
        "Store changed embeddings, norms and biases in full.",
        default=False,
    ),
    Option(
        "dtype",
        ("convert",),
        kinds.DTYPE,
        "Dtype of the LoRA weights.",
        "default: the adapter's if exact, else float32",
        recorded="given",
    ),
    Option("dtype", ("extract",), kinds.DTYPE, "Dtype of the LoRA weights.", "default: float32"),
    Option(
        "format",
        ("convert",),
        kinds.FORMAT,
        "Format of the output: PEFT, GGUF for llama.cpp, or mlx-lm.",
        "default: peft",
        default="peft",
        recorded="given",
    ),
)

_INPUTS: tuple[Option, ...] = (
    Option(
        "base",
        _MERGES,
        kinds.PLACE,
        "Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as s3://bucket/folder.",
        "default: the adapter's",
        has_wildcards=True,
    ),
    Option(
        "adapter",
        _MERGES,
        kinds.ADAPTERS,
        "Adapter: directory, repo or URL. A repo is written as org/name, org/name/folder or org/name@revision, a URL as s3://bucket/folder. A weight may follow: my-lora:0.5. May be repeated, see --combine.",
        "required",
        default=REQUIRED,
        has_wildcards=True,
    ),
    Option(
        "base",
        ("inspect", "convert"),
        kinds.PLACE,
        "Base model: directory, repo or URL. A repo is written as org/name or org/name@revision, a URL as s3://bucket/folder.",
        "default: the adapter's, if one is needed",
        has_wildcards=True,
    ),
    Option(
        "config",
        _MERGES,
        kinds.READ_FILE,
        "Read options from a YAML file. Options on the command line win.",
        scope="command",
    ),
    Option(
        "base_is",
        _MERGES,
        kinds.BASE_IS,
        "State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual: the model that the initialisation saved.",
        recorded="always",
    ),
    Option(
        "base_is",
        ("inspect", "convert"),
        kinds.BASE_IS,
        "State of the base for PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA. original: the published model. residual: the model that the initialisation saved.",
        recorded="given",
    ),
    Option(
        "expert_layout",
        _MERGES,
        kinds.LAYOUTS,
        "Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or in-out), or adapters trained with Unsloth before September 2026. May be repeated.",
        default=(),
        recorded="given",
    ),
    Option(
        "expert_layout",
        ("inspect", "convert"),
        kinds.LAYOUTS,
        "Layout of fused MoE expert weights. Needed when it cannot be detected: square matrices (out-in or in-out), or adapters trained with Unsloth before September 2026. May be repeated.",
        default=(),
        recorded="given",
    ),
    Option(
        "ignore_file",
        ("merge", "plan", "verify", "inspect", "convert"),
        kinds.FILE_NAMES,
        "Ignore this file in the adapter's folder. A name, a folder, or a pattern such as 'model-*'. May be repeated.",
        default=(),
        recorded="given",
    ),
)

_MERGING: tuple[Option, ...] = (
    Option(
        "combine",
        _MERGES,
        kinds.COMBINE,
        "Method to combine several adapters.",
        "default: linear, the weighted sum",
        default="linear",
        recorded="given",
    ),
    Option(
        "density",
        _MERGES,
        kinds.DENSITY,
        "Share of each delta that TIES and DARE keep.",
        "default: 0.5",
        default=0.5,
        recorded="given",
        recorded_with=("combine",),
    ),
    Option(
        "seed",
        _MERGES,
        kinds.SEED,
        "Random seed for DARE and stochastic rounding.",
        "default: 0",
        default=0,
        recorded="given",
        recorded_with=("combine", "rounding"),
    ),
    Option(
        "dtype",
        _MERGES,
        kinds.DTYPE,
        "Dtype of the merged weights.",
        "default: the base's",
        recorded="always",
    ),
    Option(
        "out_storage",
        _MERGES,
        kinds.OUT_STORAGE,
        "Storage of a quantised base's weights. dense: all dequantised. mixed: only the merged ones dequantised. base: all stay quantised, on the base's scales.",
        "default: dense if a quantised weight changes, else base",
        recorded="given",
    ),
    Option(
        "quantize",
        _MERGES,
        kinds.SCHEME,
        "Quantise the merged linear layers. Schemes: fp8 (every engine loads it), fp8-block, fp8-channel, int8, int4, int4-g32, int4-asym, int4-asym-g32, mxfp4, mxfp8, nvfp4.",
        "default: no quantisation",
        recorded="given",
    ),
    Option(
        "ignore",
        _MERGES,
        kinds.NAMES,
        "With --quantize, keep these modules dense. A name, or a pattern such as '*.o_proj'. May be repeated.",
        default=(),
        recorded="given",
        recorded_with=("quantize",),
    ),
    Option(
        "rounding",
        _MERGES,
        kinds.ROUNDING,
        "How merged values are rounded. nearest: to the nearest number. adapter: so that the adapter's effect is kept. stochastic: to a random neighbour.",
        "default: nearest; adapter with --out-storage base",
        recorded="given",
    ),
    Option(
        "allow_loss",
        _MERGES,
        kinds.SWITCH,
        "Allow an output that keeps less than half of the adapter's effect after rounding.",
        default=False,
    ),
    Option(
        "max_shard_size",
        _MERGES,
        kinds.SIZE,
        "Largest size of a weight file, such as 5GB.",
        "default: the base's files",
        recorded="always",
    ),
    Option(
        "allow_untie",
        _MERGES,
        kinds.SWITCH,
        "Untie the embeddings of a model family that engines always tie.",
        default=False,
    ),
    Option(
        "allow_svd",
        _MERGES,
        kinds.SWITCH,
        "Merge OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ between machines.",
        default=False,
    ),
    Option(
        "allow_svd",
        ("convert",),
        kinds.SWITCH,
        "Convert OSF, PSOFT and AdaMSS adapters. They decompose the base by SVD, and the result may differ between machines.",
        recorded="given",
        default=False,
    ),
    Option(
        "allow_again",
        _MERGES,
        kinds.SWITCH,
        "Merge an adapter a second time into a base that already contains it.",
        default=False,
    ),
)

_SHOWING: tuple[Option, ...] = (
    Option(
        "serving",
        ("inspect",),
        kinds.SERVING,
        "Report on this engine only.",
        flag="--engine",
        keyword="engine",
    ),
    Option(
        "full",
        ("inspect",),
        kinds.SWITCH,
        "List every module, not groups.",
        scope="command",
        default=False,
    ),
    Option(
        "plot",
        ("inspect",),
        kinds.NEW_FILE,
        "Draw a heat map of layers and modules to a .png, .svg or .html file. It shows ranks, and with --base the size of each delta.",
    ),
)

_RUNNING_A_BATCH: tuple[Option, ...] = (
    Option(
        "file",
        ("batch",),
        kinds.READ_FILE,
        "YAML file with the jobs.",
        scope="command",
        default=REQUIRED,
        is_positional=True,
    ),
    Option(
        "keep_going",
        ("batch",),
        kinds.SWITCH,
        "Run the other jobs if some cannot be planned. By default one such job stops the batch before it begins.",
        scope="command",
        default=False,
    ),
    Option(
        "jobs",
        ("batch",),
        kinds.WORKERS,
        "Number of bases to process in parallel. Each gets a separate process.",
        "default: 1",
        scope="command",
        default=1,
    ),
    Option(
        "dry_run",
        ("batch",),
        kinds.SWITCH,
        "Plan every job and stop. Nothing is written.",
        scope="command",
        default=False,
    ),
)

_EVERYWHERE: tuple[Option, ...] = (
    Option(
        "overwrite",
        ("convert", "extract"),
        kinds.SWITCH,
        "Replace an existing output. The old one is removed when the new one is complete.",
        default=False,
    ),
    Option(
        "overwrite",
        ("batch",),
        kinds.SWITCH,
        "Replace existing outputs that are not up to date.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "log_file",
        ("batch",),
        kinds.LOG_FILE,
        "Append events to this file, one JSON object per line.",
        scope="command",
    ),
    Option(
        "strict", ("inspect", "convert", "extract"), kinds.SWITCH, "Treat warnings as errors.", default=False
    ),
    Option(
        "token",
        _ALL,
        kinds.TOKEN,
        "Hub token for private and gated repos. The environment variable HF_TOKEN is safer: process lists do not show it.",
        "default: HF_TOKEN, or the login",
        is_secret=True,
    ),
    Option(
        "offline",
        _ALL,
        kinds.SWITCH,
        "Use the local cache only. No network access.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "stream_base",
        (*_MERGES, "verify", "inspect"),
        kinds.SWITCH,
        "Read the weights of a base on the Hub by ranges, without storing them on this machine.",
        can_be_off=True,
        default=False,
    ),
    Option("strict", ("merge",), kinds.SWITCH, "Treat warnings as errors.", can_be_off=True, default=False),
    Option(
        "strict",
        ("plan",),
        kinds.SWITCH,
        "Treat warnings as errors.",
        can_be_off=True,
        in_python=False,
        default=False,
    ),
    Option("strict", ("verify",), kinds.SWITCH, "Treat warnings as errors.", in_python=False, default=False),
)

_WRITING: tuple[Option, ...] = (
    Option(
        "out",
        ("merge",),
        kinds.OUTPUT,
        "Directory to create, or a URL. It begins with s3://, gs://, az://, hf:// or file:///.",
        "required, unless --push-to-hub is given",
        short="-o",
        default=REQUIRED,
        instead="push_to_hub",
    ),
    Option(
        "device",
        ("merge",),
        kinds.DEVICE,
        "Device for the arithmetic.",
        "default: auto, the CPU or a GPU where it pays",
        default="auto",
        recorded="always",
    ),
    Option(
        "workers",
        ("merge",),
        kinds.WORKERS,
        "Largest number of workers.",
        "default: cores, while more get more done",
    ),
    Option(
        "executor",
        ("merge",),
        kinds.EXECUTOR,
        "How workers run. Processes each load torch if it is needed, which takes seconds and memory. ray: as tasks on a Ray cluster, one output file each. The output is the same.",
        "default: auto, threads",
        default="auto",
    ),
    Option(
        "ray_address",
        ("merge",),
        kinds.RAY_ADDRESS,
        "Cluster of --executor ray. auto: the one that runs here, or that RAY_ADDRESS names. local: one that is started on this machine for the run.",
        "default: auto",
        default="auto",
    ),
    Option(
        "retries",
        ("merge",),
        kinds.RETRIES,
        "How often --executor ray makes a file again after its process or its node was lost.",
        "default: 3",
        default=3,
    ),
    Option(
        "memory_limit",
        ("merge",),
        kinds.SIZE,
        "Memory to use at most, such as 2GB. It leads to fewer workers and smaller tiles, or an error if it is too little.",
        "default: free memory",
    ),
    Option(
        "link",
        ("merge",),
        kinds.LINK,
        "How unchanged weight files get into the output. A hard link shares the file with the base.",
        "default: reflink if the filesystem supports it, else copy",
    ),
    Option(
        "verify",
        ("merge",),
        kinds.VERIFY,
        "How much to verify before publishing. sample: part of every merged row, and some rows completely. full: everything.",
        "default: sample",
        default="sample",
    ),
    Option(
        "no_verify", ("merge",), kinds.SWITCH, "Do not verify the output.", scope="command", default=False
    ),
    Option(
        "overwrite",
        ("merge",),
        kinds.SWITCH,
        "Replace an existing output. The old one is removed when the new one is complete; in a store, it cannot be loaded meanwhile.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "resume",
        ("merge",),
        kinds.SWITCH,
        "Continue an interrupted run. If it was the same merge, its finished tensors, or files in a store, are checked and kept.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "copies",
        ("merge",),
        kinds.COPIES,
        "How unchanged bytes get from a store to a store. store: the store copies them by itself. stream: they are read and written.",
        "default: auto, store where the store states checksums",
        default="auto",
    ),
    Option(
        "part",
        ("merge",),
        kinds.PART,
        "Make only some files of the output: part I of N, the same split in every process. auto: by a SLURM job array; auto/N: "
        "by a Kubernetes indexed job. Then --seal.",
        "default: all of it",
    ),
    Option(
        "seal",
        ("merge",),
        kinds.SWITCH,
        "Verify and publish an output whose parts are all made.",
        default=False,
    ),
    Option(
        "dry_run",
        ("merge",),
        kinds.SWITCH,
        "Print the plan and stop. Nothing is written.",
        scope="command",
        default=False,
    ),
    Option(
        "profile", ("merge",), kinds.SWITCH, "Print how long each stage took.", scope="command", default=False
    ),
    Option(
        "explain",
        ("plan",),
        kinds.MODULES,
        "Explain how this module or parameter was matched. Give its name in the adapter or in the base. May be repeated.",
        scope="command",
        default=(),
    ),
    Option(
        "survival",
        ("plan",),
        kinds.SWITCH,
        "Estimate how much of the adapter's effect each rounding keeps. Reads a sample of the weights.",
        scope="command",
        default=False,
    ),
)

_PUSHING: tuple[Option, ...] = (
    Option(
        "push_to_hub",
        ("merge",),
        kinds.REPO,
        "Push the output to this repo of the Hub. A branch may follow: ORG/NAME@BRANCH. Without --out, nothing stays on this "
        "machine.",
    ),
    Option(
        "push_to_hub",
        ("convert", "extract"),
        kinds.REPO,
        "Push the adapter to this repo of the Hub. A branch may follow: ORG/NAME@BRANCH. Without --out, nothing stays on "
        "this machine.",
    ),
    Option(
        "revision",
        _PUSHES,
        kinds.BRANCH,
        "Branch to push to. It is created if it does not exist.",
        "default: main",
    ),
    Option(
        "visibility",
        _PUSHES,
        kinds.VISIBILITY,
        "A repo that does not exist is created as a private one. This is the default.",
        flag="--private",
        sets="private",
    ),
    Option(
        "visibility",
        _PUSHES,
        kinds.VISIBILITY,
        "A repo that does not exist is created as a public one.",
        flag="--public",
        sets="public",
    ),
    Option(
        "create_pr",
        _PUSHES,
        kinds.SWITCH,
        "Leave a pull request open. By default it is merged when the output is complete.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "commit_message",
        _PUSHES,
        kinds.MESSAGE,
        "Message of the commit.",
        "default: what was merged",
    ),
    Option(
        "upload",
        ("merge",),
        kinds.UPLOAD,
        "How weight files get to the Hub. spool: each one is written to this disk, uploaded and removed. stream: uploaded "
        "while they are made.",
        "default: spool",
        default="spool",
    ),
    Option(
        "spool_limit",
        ("merge",),
        kinds.SIZE,
        "Disk to use at most for the spool, such as 20GB. TMPDIR moves it.",
        "default: 20GB, or one file",
    ),
)

_HELPING: tuple[Option, ...] = (
    Option(
        "shell",
        ("completion",),
        kinds.SHELL,
        "Shell to complete in.",
        scope="command",
        default=REQUIRED,
        is_positional=True,
    ),
    Option(
        "json",
        ("doctor",),
        kinds.SWITCH,
        "Print the result as JSON on stdout.",
        scope="command",
        default=False,
    ),
)

_REPORTING: tuple[Option, ...] = (
    Option(
        "report",
        ("merge", "verify", "inspect"),
        kinds.NEW_FILE,
        "Write the result as an HTML page. It includes errors, and needs no network to be shown.",
    ),
    Option(
        "report",
        ("batch",),
        kinds.NEW_FILE,
        "Write the results of all jobs as one HTML page. It needs no network to be shown.",
        scope="command",
    ),
)

_SPEAKING: tuple[Option, ...] = (
    Option("json", _ALL, kinds.SWITCH, "Print the result as JSON on stdout.", scope="command", default=False),
    Option("quiet", _ALL, kinds.SWITCH, "Print errors only.", scope="command", short="-q", default=False),
    Option(
        "verbose",
        _ALL,
        kinds.SWITCH,
        "Print every tensor and the time per phase.",
        scope="command",
        short="-v",
        default=False,
    ),
)

OPTIONS: Final[tuple[Option, ...]] = (
    *_VERIFY,
    *_ADAPTERS,
    *_INPUTS,
    *_MERGING,
    *_SHOWING,
    *_RUNNING_A_BATCH,
    *_EVERYWHERE,
    *_WRITING,
    *_PUSHING,
    *_HELPING,
    *_REPORTING,
    *_SPEAKING,
)


def options_of(verb: Verb) -> tuple[Option, ...]:
    """Return the rows of a verb, in the order of its help."""
    return tuple(option for option in OPTIONS if verb in option.verbs)


def fields_of(verb: Verb) -> tuple[Option, ...]:
    """Return one row for each field of a verb's request, in the order of the fields: those without a default first."""
    rows: dict[str, Option] = {}
    for option in options_of(verb):
        if option.scope == "request":
            rows.setdefault(option.name, option)
    return tuple(sorted(rows.values(), key=lambda option: not option.is_required))


def default_of(verb: Verb, name: str) -> object:
    """Return the default of a field of a verb's request; `REQUIRED` if it has none."""
    return next(option.default for option in fields_of(verb) if option.name == name)
