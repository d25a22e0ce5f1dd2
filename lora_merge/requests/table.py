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

_VERIFY: tuple[Option, ...] = (
    Option("out", ("verify",), kinds.PLACE, "Directory of the output.", default=REQUIRED, is_positional=True),
    Option("base", ("verify",), kinds.PLACE, "What it was merged into.", "default: what its manifest names"),
    Option(
        "adapter",
        ("verify",),
        kinds.ADAPTERS,
        "What was merged into it; repeat it for several.",
        "default: what its manifest names",
        default=(),
    ),
    Option(
        "level",
        ("verify",),
        kinds.LEVEL,
        "sample: check every merged row by random projections, and recompute some; full: recompute all; structure: compare nothing.",
        "default: sample",
        default="sample",
    ),
    Option(
        "forward",
        ("verify",),
        kinds.SWITCH,
        "Run base and adapter, unmerged, and the merged checkpoint, and compare what they compute.",
        default=False,
    ),
    Option("engine", ("verify",), kinds.ENGINE, "Ask this engine too, with no LoRA support."),
    Option(
        "engine_python",
        ("verify",),
        kinds.INTERPRETER,
        "Python interpreter that has the engine.",
        "default: this one, or LORA_MERGE_ENGINE_PYTHON",
        environment="LORA_MERGE_ENGINE_PYTHON",
    ),
    Option(
        "prompt",
        ("verify",),
        kinds.TEXTS,
        "Ask this; may be repeated.",
        "default: three texts, and tokens drawn from the vocabulary",
        default=(),
    ),
    Option(
        "n_tokens",
        ("verify",),
        kinds.N_TOKENS,
        "Tokens that each prompt is answered with.",
        "default: 8",
        default=8,
    ),
    Option(
        "tolerance",
        ("verify",),
        kinds.TOLERANCE,
        "Largest difference of two logits that passes.",
        "default: what rounding to the stored dtype explains, measured",
    ),
    Option(
        "dtype",
        ("verify",),
        kinds.DTYPE,
        "What the models compute in; a half dtype takes half the memory and hides more.",
        "default: float32",
        default="float32",
    ),
    Option(
        "trust_remote_code",
        ("verify",),
        kinds.SWITCH,
        "Run the code that the checkpoint carries, where transformers has no class for the model.",
        default=False,
    ),
)

_ADAPTERS: tuple[Option, ...] = (
    Option(
        "adapter",
        ("inspect", "convert"),
        kinds.PLACE,
        "Adapter: a directory or a repo.",
        default=REQUIRED,
        is_positional=True,
        has_wildcards=True,
        yaml_key="convert",
    ),
    Option("base", ("extract",), kinds.PLACE, "What was trained.", default=REQUIRED),
    Option("tuned", ("extract",), kinds.PLACE, "What came of it.", default=REQUIRED),
    Option("out", ("convert", "extract"), kinds.FOLDER, "Directory to create.", default=REQUIRED),
    Option(
        "serving",
        ("convert",),
        kinds.SERVING,
        "Do whatever this engine needs, by the rules that inspect reports, and check that it is enough.",
        recorded="given",
        flag="--for",
        yaml_key="for",
        keyword="engine",
    ),
    Option(
        "expand_targets",
        ("convert",),
        kinds.SWITCH,
        "List the modules in place of a regex, layers and exclusions.",
        recorded="given",
        default=False,
    ),
    Option(
        "bake_scale",
        ("convert",),
        kinds.SWITCH,
        "Fold rsLoRA, α and its patterns into B: α/r is 1 then.",
        recorded="given",
        default=False,
    ),
    Option(
        "rank",
        ("convert",),
        kinds.RANK,
        "Keep the N largest singular values of each module's change, at most; says what is lost. A smaller rank stays: see --pad-rank.",
        recorded="given",
    ),
    Option("rank", ("extract",), kinds.RANK, "Keep the N largest singular values of each change."),
    Option(
        "energy",
        ("convert",),
        kinds.ENERGY,
        "Keep as many as make up this share of the sum of their squares, such as 0.99.",
        recorded="given",
    ),
    Option(
        "energy",
        ("extract",),
        kinds.ENERGY,
        "Keep as many as make up this share of the sum of their squares, such as 0.9; with --rank, at most N.",
    ),
    Option(
        "pad_rank", ("convert",), kinds.RANK, "Give every module the rank N, with zeros.", recorded="given"
    ),
    Option(
        "to_lora",
        ("convert",),
        kinds.SWITCH,
        "Make plain LoRA of any other kind: AdaLoRA exactly; DoRA, LoHa, IA3, OFT, whole modules and so on by --rank or --energy of what they change in the base.",
        recorded="given",
        default=False,
    ),
    Option(
        "rename", ("convert",), kinds.NAMING, "Name modules as transformers 4 or 5 does.", recorded="given"
    ),
    Option(
        "experts",
        ("convert",),
        kinds.EXPERTS,
        "LoRA on every expert by itself.",
        recorded="given",
        flag="--split-experts",
        sets="split",
    ),
    Option(
        "experts",
        ("convert",),
        kinds.EXPERTS,
        "LoRA on the parameters that hold all experts.",
        recorded="given",
        flag="--fuse-experts",
        sets="fuse",
    ),
    Option(
        "target",
        ("extract",),
        kinds.NAMES,
        "Take modules whose paths end in this, such as q_proj; may be repeated.",
        "default: all that LoRA can hold",
        default=(),
    ),
    Option(
        "save_modules",
        ("extract",),
        kinds.SWITCH,
        "Carry whole what no LoRA holds: embeddings, norms, biases.",
        default=False,
    ),
    Option(
        "dtype",
        ("convert",),
        kinds.DTYPE,
        "Store the factors in this dtype.",
        "default: the adapter's, where it holds them exactly, else float32",
        recorded="given",
    ),
    Option("dtype", ("extract",), kinds.DTYPE, "Store the factors in this dtype.", "default: float32"),
    Option(
        "format",
        ("convert",),
        kinds.FORMAT,
        "Write PEFT's files, a GGUF file for llama.cpp, or mlx-lm's files.",
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
        "Base model: a directory, or org/name[@revision] on the Hub.",
        "default: the one that the adapter names",
        has_wildcards=True,
    ),
    Option(
        "adapter",
        _MERGES,
        kinds.ADAPTERS,
        "Adapter to merge (a directory, or org/name[/folder][@revision] on the Hub), and how much of it; repeat it to merge several.",
        "required; WEIGHT: 1",
        default=REQUIRED,
        has_wildcards=True,
    ),
    Option(
        "base",
        ("inspect", "convert"),
        kinds.PLACE,
        "Base model: a directory, or org/name[@revision] on the Hub.",
        "default: none, or where one is needed the one that the adapter names",
        has_wildcards=True,
    ),
    Option(
        "config",
        _MERGES,
        kinds.READ_FILE,
        "Read these options from a YAML file; those given here win.",
        scope="command",
    ),
    Option(
        "base_is",
        _MERGES,
        kinds.BASE_IS,
        "What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter: the model as published, or what the initialisation left of it.",
        recorded="always",
    ),
    Option(
        "base_is",
        ("inspect", "convert"),
        kinds.BASE_IS,
        "What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter.",
        recorded="given",
    ),
    Option(
        "expert_layout",
        _MERGES,
        kinds.LAYOUTS,
        "What cannot be seen of stacked experts: how the base stores a square one in the adapter's terms; Unsloth's packing of B. May be repeated.",
        default=(),
        recorded="given",
    ),
    Option(
        "expert_layout",
        ("inspect", "convert"),
        kinds.LAYOUTS,
        "What cannot be seen of stacked experts.",
        default=(),
        recorded="given",
    ),
    Option(
        "ignore_file",
        ("merge", "plan", "verify", "inspect", "convert"),
        kinds.FILE_NAMES,
        "Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern such as 'model-*'. May be repeated.",
        default=(),
        recorded="given",
    ),
)

_MERGING: tuple[Option, ...] = (
    Option(
        "combine",
        _MERGES,
        kinds.COMBINE,
        "How several adapters become one change of each weight.",
        "default: linear, their weighted sum",
        default="linear",
        recorded="given",
    ),
    Option(
        "density",
        _MERGES,
        kinds.DENSITY,
        "Share of each change that ties and dare keep.",
        "default: 0.5",
        default=0.5,
        recorded="given",
        recorded_with=("combine",),
    ),
    Option(
        "seed",
        _MERGES,
        kinds.SEED,
        "Of what dare drops, and of stochastic rounding.",
        "default: 0",
        default=0,
        recorded="given",
        recorded_with=("combine", "rounding"),
    ),
    Option(
        "dtype",
        _MERGES,
        kinds.DTYPE,
        "Store the weights in this dtype.",
        "default: the base's, tensor by tensor",
        recorded="always",
    ),
    Option(
        "out_storage",
        _MERGES,
        kinds.OUT_STORAGE,
        "How a quantised base's weights are stored: all dense; dense where they change and as they are elsewhere (mixed); or as the base stores them, with new codes on its own scales (base).",
        "default: dense, unless no quantised weight changes: then all are copied",
        recorded="given",
    ),
    Option(
        "quantize",
        _MERGES,
        kinds.SCHEME,
        "Quantise the linear layers: fp8 (all engines load it), fp8-block, fp8-channel, int8, int4, int4-g32, int4-asym, int4-asym-g32, mxfp4, mxfp8 or nvfp4.",
        "default: they stay as they are",
        recorded="given",
    ),
    Option(
        "ignore",
        _MERGES,
        kinds.NAMES,
        "With --quantize, leave these modules dense: a name, or a pattern such as '*.o_proj'.",
        default=(),
        recorded="given",
        recorded_with=("quantize",),
    ),
    Option(
        "rounding",
        _MERGES,
        kinds.ROUNDING,
        "Which number a merged value becomes: the nearest; one that keeps the adapter's effect (adapter); or a neighbour at random (stochastic).",
        "default: nearest; with --out-storage base, adapter",
        recorded="given",
    ),
    Option(
        "allow_loss",
        _MERGES,
        kinds.SWITCH,
        "Write the output even if rounding loses more than half of the adapter's change.",
        default=False,
    ),
    Option(
        "max_shard_size",
        _MERGES,
        kinds.SIZE,
        "Split the weights into files of at most this size, such as 5GB.",
        "default: the base's own files",
        recorded="always",
    ),
    Option(
        "allow_untie",
        _MERGES,
        kinds.SWITCH,
        "Untie the embeddings even of a family that engines tie whatever its config says.",
        default=False,
    ),
    Option(
        "allow_svd",
        _MERGES,
        kinds.SWITCH,
        "Merge OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise.",
        default=False,
    ),
    Option(
        "allow_svd",
        ("convert",),
        kinds.SWITCH,
        "Take apart OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise.",
        recorded="given",
        default=False,
    ),
    Option(
        "allow_again",
        _MERGES,
        kinds.SWITCH,
        "Merge an adapter into a base that has it merged into it already.",
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
        "List every module, not groups of them.",
        scope="command",
        default=False,
    ),
    Option(
        "plot",
        ("inspect",),
        kinds.NEW_FILE,
        "Draw a heat map of layers and modules into a .png, .svg or .html file: rank, and with a base how large the change is.",
    ),
)

_RUNNING_A_BATCH: tuple[Option, ...] = (
    Option(
        "file",
        ("batch",),
        kinds.READ_FILE,
        "File of jobs.",
        scope="command",
        default=REQUIRED,
        is_positional=True,
    ),
    Option(
        "keep_going",
        ("batch",),
        kinds.SWITCH,
        "Do what can be done, whatever is wrong with some jobs; else one that cannot be planned keeps all from being begun.",
        scope="command",
        default=False,
    ),
    Option(
        "jobs",
        ("batch",),
        kinds.WORKERS,
        "Bases to work on at a time, each in a process of its own.",
        "default: 1",
        scope="command",
        default=1,
    ),
    Option(
        "dry_run",
        ("batch",),
        kinds.SWITCH,
        "Plan every job and stop; nothing is written.",
        scope="command",
        default=False,
    ),
)

_EVERYWHERE: tuple[Option, ...] = (
    Option(
        "overwrite",
        ("convert", "extract"),
        kinds.SWITCH,
        "Replace an existing output, once the new one is whole.",
        default=False,
    ),
    Option(
        "overwrite",
        ("batch",),
        kinds.SWITCH,
        "Replace outputs that exist and are other ones.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "log_file",
        ("batch",),
        kinds.LOG_FILE,
        "Add a line of JSON to this file for each thing that happens.",
        scope="command",
    ),
    Option(
        "strict", ("inspect", "convert", "extract"), kinds.SWITCH, "Treat warnings as errors.", default=False
    ),
    Option(
        "token",
        _ALL,
        kinds.TOKEN,
        "For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows.",
        "default: HF_TOKEN, or the login",
        is_secret=True,
    ),
    Option(
        "offline",
        _ALL,
        kinds.SWITCH,
        "Take models and adapters from the local cache, and ask no hub.",
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
    Option("out", ("merge",), kinds.OUTPUT, "Directory to create.", "required", default=REQUIRED),
    Option(
        "device",
        ("merge",),
        kinds.DEVICE,
        "Do the arithmetic here.",
        "default: auto, the CPU",
        default="auto",
        recorded="always",
    ),
    Option("workers", ("merge",), kinds.WORKERS, "Workers, at most.", "default: the usable cores, up to 8"),
    Option(
        "executor",
        ("merge",),
        kinds.EXECUTOR,
        "What runs the workers. Each process loads torch for itself, which takes seconds and memory. The output is the same.",
        "default: auto, threads",
        default="auto",
    ),
    Option(
        "memory_limit",
        ("merge",),
        kinds.SIZE,
        "Hold no more than this in memory, such as 2GB: fewer workers and smaller tiles, or a refusal.",
        "default: what is free",
    ),
    Option(
        "link",
        ("merge",),
        kinds.LINK,
        "How weight files that nothing changes come into the output; a hard link is the base's own file under a second name.",
        "default: reflink where the filesystem has it, else copy",
    ),
    Option(
        "verify",
        ("merge",),
        kinds.VERIFY,
        "Check the output before it gets its name: three rows of each merged tensor, or everything.",
        "default: sample",
        default="sample",
    ),
    Option("no_verify", ("merge",), kinds.SWITCH, "Do not check the output.", scope="command", default=False),
    Option(
        "overwrite",
        ("merge",),
        kinds.SWITCH,
        "Replace an existing output, once the new one is whole.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "resume",
        ("merge",),
        kinds.SWITCH,
        "Go on where an interrupted run to this output stopped, if it was the same merge; what it has written is checked first.",
        can_be_off=True,
        default=False,
    ),
    Option(
        "dry_run",
        ("merge",),
        kinds.SWITCH,
        "Print the plan and stop; nothing is written.",
        scope="command",
        default=False,
    ),
    Option(
        "profile", ("merge",), kinds.SWITCH, "Print where each second went.", scope="command", default=False
    ),
    Option(
        "explain",
        ("plan",),
        kinds.MODULES,
        "Say how this module or parameter was matched, by its name in the adapter or on disk. May be repeated.",
        scope="command",
        default=(),
    ),
    Option(
        "survival",
        ("plan",),
        kinds.SWITCH,
        "Look at a sample of the weights, and say how much of the adapter's change each rounding would keep.",
        scope="command",
        default=False,
    ),
)

_SPEAKING: tuple[Option, ...] = (
    Option("json", _ALL, kinds.SWITCH, "Print the result as JSON on stdout.", scope="command", default=False),
    Option("quiet", _ALL, kinds.SWITCH, "Print errors only.", scope="command", short="-q", default=False),
    Option(
        "verbose",
        _ALL,
        kinds.SWITCH,
        "Name every tensor as it is done; time each phase.",
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
