"""Time a merge against copying the base, and against PEFT's own merge, on a synthetic Llama.

Every measured command is a fresh process, and the contenders take turns, so a slow minute of the machine
meets all of them. Two times are taken: until the command returns, and until its output is on the disk;
lora-merge flushes before it returns, the others do not. Page cache: the base is read once beforehand.

This process never imports torch: a child's peak memory, as the kernel counts it, starts at its parent's.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("cp", "ours", "peft")
KINDS = ("lora", "dora", "adalora")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}
MAX_SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 64 * 2**20
PEFT_MEMORY_FACTOR = 1.3  # of the base; PEFT holds all of it
SPARE_BYTES = 2 * 10**9  # of memory for the libraries, of disk for everybody else
FLAT = 1.1  # peak memory that grows by less from size to size is called flat

Given = ParamSpec("Given")
Result = TypeVar("Result")


SETTLE_S = 5.0
"""Pause between removing an old output and the next run, in seconds. A virtual machine hands freed memory back
to its host within a few; without the pause a command that writes at once gets warm pages for nothing, and one
that starts up first does not."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    sizes: tuple[float, ...]
    """Of the base, GB."""

    rank: int
    targets: str
    kinds: tuple[str, ...]
    """Of adapter; each is merged by lora-merge, the first by PEFT too."""

    dtype: str
    runs: int
    peft_runs: int
    workers: int | None
    cache: Path
    json_file: Path | None
    contenders: tuple[str, ...]
    keep: bool

    def entrants(self) -> dict[str, str]:
        """Return who takes turns, and the kind of adapter that each merges."""
        ours = {ours_with(kind): kind for kind in self.kinds}
        return {
            name: kind
            for contender in self.contenders
            for name, kind in (ours if contender == "ours" else {contender: self.kinds[0]}).items()
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """A synthetic Llama in numbers."""

    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    vocab: int = 32_000

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Return [out, in] of each linear module of a layer, by its path in the layer."""
        kv = self.hidden // self.n_heads * self.n_kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every tensor of the checkpoint with its shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}"
            for module, shape in self.module_shapes().items():
                yield f"{prefix}.{module}.weight", shape
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run."""

    wall_s: float
    """Until the command returned."""

    durable_s: float
    """Until its output was on the disk."""

    cpu_s: float
    """User and system time together."""

    peak_rss_bytes: int


@dataclass(slots=True)
class Outcome:
    """What was measured at one size."""

    size_gb: float
    base_bytes: int
    kinds: tuple[str, ...]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    identical: dict[str, Any] | None = None
    """Comparison of our output with PEFT's, where both ran."""

    def middle(self, contender: str, quantity: str) -> float:
        """Return the median of a quantity over the runs of a contender."""
        return float(median(getattr(sample, quantity) for sample in self.samples[contender]))

    def ratio(self, contender: str, other: str, quantity: str = "wall_s") -> float | None:
        """Return the median over rounds of one contender against another, round by round."""
        if not (self.samples.get(contender) and self.samples.get(other)):
            return None
        pairs = zip(self.samples[contender], self.samples[other], strict=False)  # PEFT runs in fewer rounds
        return float(median(getattr(one, quantity) / getattr(two, quantity) for one, two in pairs))


def ours_with(kind: str) -> str:
    """Return what lora-merge is called with a kind of adapter."""
    return "ours" if kind == KINDS[0] else f"ours-{kind}"


# The command


def _sizes(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        sizes = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as exc:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 3,6") from exc
    if any(size <= 0 for size in sizes):
        raise click.BadParameter("a size is above 0")
    return sizes


def _kinds(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    chosen = {part.strip() for text in texts for part in text.split(",")}
    if not chosen <= set(KINDS):
        unknown = ", ".join(sorted(chosen - set(KINDS)))
        raise click.BadParameter(f"{unknown!r} is none of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in chosen)


@click.group(invoke_without_command=True, help=__doc__)
@click.option(
    "--size", type=click.FloatRange(min=0.3), default=3.0, show_default=True, help="GB of the base."
)
@click.option("--sizes", callback=_sizes, help="Several sizes in one go, such as 3,6; replaces --size.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapter.")
@click.option("--targets", type=click.Choice(list(TARGETS)), default="all", show_default=True)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    default=(KINDS[0],),
    callback=_kinds,
    help=f"Of adapter: {', '.join(KINDS)}; several, repeated or as a list, are timed side by side.",
)
@click.option("--dtype", type=click.Choice(list(ITEM_BYTES)), default="bfloat16", show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds.")
@click.option(
    "--peft-runs", type=click.IntRange(min=1), default=1, show_default=True, help="Rounds with PEFT."
)
@click.option("--workers", type=click.IntRange(min=1), help="Of lora-merge; default: its own.")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), default=ROOT / ".bench")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Results.")
@click.option("--only", type=click.Choice(CONTENDERS), multiple=True, help="Contender to run; repeatable.")
@click.option("--skip", type=click.Choice(CONTENDERS), multiple=True, help="Contender to skip; repeatable.")
@click.option("--keep", is_flag=True, help="Keep the outputs of the last round.")
@click.pass_context
def main(ctx: click.Context, /, **flags: Any) -> None:
    if ctx.invoked_subcommand is not None:
        return
    size, only, skip = (flags.pop(name) for name in ("size", "only", "skip"))
    chosen = tuple(name for name in only or CONTENDERS if name not in skip)
    flags["sizes"] = flags["sizes"] or (size,)
    flags["cache"] = flags["cache"].absolute()
    options = Options(contenders=tuple(sorted(set(chosen), key=CONTENDERS.index)), **flags)
    if not options.contenders:
        raise click.UsageError("--only and --skip leave no contender")
    bench(options)


def bench(options: Options) -> None:
    """Measure every size, print a table for each, and write the results."""
    options.cache.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(machine_line(), highlight=False, soft_wrap=True)
    outcomes = []
    for size_gb in options.sizes:
        check_room(options, size_gb)
        outcome = measure(options, size_gb)
        outcomes.append(outcome)
        console.print(table_of(outcome))
        for line in footer_of(outcome):
            console.print(line, highlight=False, soft_wrap=True)
    if len(outcomes) > 1 and "ours" in options.contenders:
        for kind in options.kinds:
            console.print(flatness(outcomes, ours_with(kind)), highlight=False, soft_wrap=True)
    console.print(f"results: {write_results(options, outcomes)}", highlight=False, soft_wrap=True)


# Building what is merged


def shape_for(size_gb: float, item_bytes: int) -> Shape:
    """Return a Llama of about this size, with the proportions of real ones near it."""
    n_parameters = size_gb * 1e9 / item_bytes
    hidden, intermediate, n_heads = 4096, 14_336, 32
    if n_parameters < 2e9:
        hidden, intermediate, n_heads = 2048, 5632, 32
    elif n_parameters < 5e9:
        hidden, intermediate, n_heads = 3072, 8192, 24
    one = Shape(hidden, intermediate, n_heads, n_kv_heads=8, n_layers=1)
    per_layer = sum(n_out * n_in for n_out, n_in in one.module_shapes().values())
    n_layers = max(1, round((n_parameters - 2 * one.vocab * hidden) / per_layer))
    return Shape(hidden, intermediate, n_heads, n_kv_heads=8, n_layers=n_layers)


def ensure(directory: Path, parameters: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return a built directory, from the cache when the marker beside it names the same parameters."""
    marker = directory.with_name(f"{directory.name}.json")
    wanted = json.dumps(parameters, sort_keys=True)
    if directory.is_dir() and marker.is_file() and marker.read_text() == wanted:
        return directory
    print(f"building {directory.name} …", flush=True)
    marker.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    build(directory)
    marker.write_text(wanted)
    return directory


def inputs_for(options: Options, size_gb: float) -> tuple[Path, dict[str, Path]]:
    """Return the base and the adapters of a size, by kind, built if they are not in the cache."""
    shape = shape_for(size_gb, ITEM_BYTES[options.dtype])
    name = f"{size_gb:g}GB-{options.dtype}"
    about_base = {"shape": asdict(shape), "dtype": options.dtype, "version": 1}
    base = ensure(
        options.cache / f"base-{name}",
        about_base,
        lambda path: apart(build_base, path, shape, options.dtype),
    )
    modules = TARGETS[options.targets]
    adapters = {}
    for kind in options.kinds:
        plain = kind == KINDS[0]
        about = {**about_base, "rank": options.rank, "modules": modules, "base": str(base)}

        def build(path: Path, kind: str = kind) -> None:
            apart(build_adapter, path, shape, options.rank, modules, str(base), kind)

        adapters[kind] = ensure(
            options.cache / f"adapter-{name}-r{options.rank}-{options.targets}{'' if plain else f'-{kind}'}",
            about if plain else {**about, "kind": kind},
            build,
        )
    return base, adapters


def apart(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Return what a function returns in a process of its own, which takes torch's memory with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def build_base(directory: Path, shape: Shape, dtype: str) -> None:
    """Write a checkpoint with random weights, never holding more than a chunk of one."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    shards = split(dict(shape.tensor_shapes()), ITEM_BYTES[dtype])
    if len(shards) == 1:
        write_shard(directory / "model.safetensors", shards[0], dtype)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": nbytes_of(shape, dtype)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def nbytes_of(shape: Shape, dtype: str) -> int:
    """Return the bytes of all tensors."""
    return sum(n_elements(dims) for _, dims in shape.tensor_shapes()) * ITEM_BYTES[dtype]


def n_elements(dims: tuple[int, ...]) -> int:
    """Return how many elements a tensor has; here it has one axis or two."""
    return dims[0] * (dims[1] if len(dims) == 2 else 1)


def split(tensors: dict[str, tuple[int, ...]], item_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Return tensors in files of at most `MAX_SHARD_BYTES`, in their order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in tensors.items():
        nbytes = n_elements(dims) * item_bytes
        if shards[-1] and filled + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += nbytes
    return shards


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Write a safetensors file: its header by hand, then random values chunk by chunk."""
    import torch

    torch.manual_seed(sum(file.name.encode()))
    codes = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + n_elements(dims) * ITEM_BYTES[dtype]
        header[name] = {"dtype": codes[dtype], "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunk = torch.empty(CHUNK_BYTES // ITEM_BYTES[dtype], dtype=getattr(torch, dtype))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            for start in range(0, n_elements(dims), len(chunk)):
                part = chunk[: n_elements(dims) - start]
                part.normal_(0, 0.02) if len(dims) == 2 else part.fill_(1)
                stream.write(part.view(torch.uint8).numpy().data)


def build_adapter(directory: Path, shape: Shape, rank: int, modules: list[str], base: str, kind: str) -> None:
    """Write an adapter as PEFT stores it: float32 factors, all of them random."""
    import torch
    from peft import AdaLoraConfig, LoraConfig
    from safetensors.torch import save_file

    common = {
        "lora_alpha": 2 * rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if kind == "adalora":
        config = AdaLoraConfig(init_r=rank, target_r=max(1, rank // 2), total_step=1000, **common)
    else:
        config = LoraConfig(r=rank, use_dora=kind == "dora", **common)
    config.save_pretrained(directory)
    torch.manual_seed(rank)
    tensors: dict[str, Any] = {}
    for layer in range(shape.n_layers):
        for module, dims in shape.module_shapes().items():
            if module.rpartition(".")[2] in modules:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors |= {f"{prefix}.{name}": made for name, made in factors(kind, rank, *dims).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def factors(kind: str, rank: int, n_out: int, n_in: int) -> dict[str, Any]:
    """Return the tensors of one module under the names that PEFT gives them."""
    import torch

    a, b = torch.randn(rank, n_in) * n_in**-0.5, torch.randn(n_out, rank) * 0.01
    match kind:
        case "adalora":
            return {"lora_A": a, "lora_B": b, "lora_E": torch.randn(rank, 1)}
        case "dora":  # the lengths of the base's rows, moved by some per cent
            lengths = 0.02 * n_in**0.5 * (1 + 0.05 * torch.randn(n_out))
            return {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": lengths}
        case _:
            return {"lora_A.weight": a, "lora_B.weight": b}


# Measuring


def measure(options: Options, size_gb: float) -> Outcome:
    """Return what every contender took at one size; their outputs are removed again unless kept."""
    base, adapters = inputs_for(options, size_gb)
    entrants = options.entrants()
    outs = {name: options.cache / f"out-{name}" for name in entrants}
    outcome = Outcome(size_gb, nbytes_in(base), options.kinds, {name: [] for name in entrants})
    pair = {ours_with(options.kinds[0]), "peft"} if "peft" in entrants else set()
    load_libraries()
    for round_number in range(1, options.runs + 1):
        for name, kind in entrants.items():
            if name == "peft" and round_number > options.peft_runs:
                continue
            command = command_of(name, options, base, adapters[kind], outs[name])
            warm_up(base, adapters[kind])
            sample = timed(command, outs[name], options.cache / f"{name}.log")
            outcome.samples[name].append(sample)
            print(f"round {round_number} of {options.runs}: {name} {sample.wall_s:.2f} s", flush=True)
            if name not in pair and not options.keep:  # so that every contender finds as much memory free
                shutil.rmtree(outs[name])
    if pair:
        outcome.identical = apart(compared, *(outs[name] for name in sorted(pair)))
    if not options.keep:
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
    return outcome


def warm_up(base: Path, adapter: Path) -> None:
    """Read the inputs, so that they are in the page cache: before every run, since some run may evict them."""
    block = bytearray(2**24)
    for path in (*base.iterdir(), *adapter.iterdir()):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def load_libraries() -> None:
    """Load the libraries once, so that nobody pays for being first."""
    subprocess.run([sys.executable, "-c", "import transformers, peft"], check=True)


def command_of(name: str, options: Options, base: Path, adapter: Path, out: Path) -> list[str]:
    """Return the command that a contender is."""
    if name == "cp":
        return ["cp", "-r", str(base), str(out)]
    if name == "peft":
        files = [str(path) for path in (base, adapter, out)]
        return [sys.executable, str(Path(__file__).resolve()), "peft-merge", *files, options.dtype]
    command = [*lora_merge(), "--base", str(base), "--adapter", str(adapter), "--out", str(out), "--quiet"]
    return command if options.workers is None else [*command, "--workers", str(options.workers)]


def lora_merge() -> list[str]:
    """Return how the command is started here."""
    script = Path(sys.executable).parent / "lora-merge"
    return [str(script)] if script.exists() else [sys.executable, "-m", "lora_merge"]


def timed(command: list[str], out: Path, log: Path) -> Sample:
    """Run a command in a process of its own and return what it took; exit when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(SETTLE_S)
    with log.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        why = (
            "killed, most likely for memory"
            if process.returncode == -9
            else f"exit code {process.returncode}"
        )
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{tail}\nbench: {Path(command[0]).name} failed ({why}); its output is in {log}")
    flush(out)
    durable_s = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    return Sample(wall_s, durable_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def flush(out: Path) -> None:
    """Wait until every file of an output is on the disk."""
    for path in out.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


@main.command("peft-merge", hidden=True)
@click.argument("base")
@click.argument("adapter")
@click.argument("out")
@click.argument("dtype")
def peft_merge(base: str, adapter: str, out: str, dtype: str) -> None:
    """Merge as PEFT's documentation does it; this is the process that is measured."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")


def compared(one: Path, other: Path) -> dict[str, Any]:
    """Return how two checkpoints differ, tensor by tensor and bit by bit."""
    import torch
    from safetensors import safe_open

    places = [tensor_files(root) for root in (one, other)]
    report: dict[str, Any] = {
        "n_tensors": len(places[0]),
        "only_in_one": sorted(places[0].keys() ^ places[1].keys()),
        "different_tensors": 0,
        "different_values": 0,
        "n_values": 0,
        "max_difference": 0.0,
    }
    for name in sorted(places[0].keys() & places[1].keys()):
        with safe_open(places[0][name], "pt") as first, safe_open(places[1][name], "pt") as second:
            a, b = first.get_tensor(name), second.get_tensor(name)
        report["n_values"] += a.numel()
        if a.dtype != b.dtype or a.shape != b.shape:
            report["different_tensors"] += 1
            report["different_values"] += a.numel()
        elif not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            report["different_tensors"] += 1
            report["different_values"] += int((a != b).sum())
            largest = float((a.float() - b.float()).abs().max())
            report["max_difference"] = max(report["max_difference"], largest)
    report["identical"] = not report["only_in_one"] and not report["different_tensors"]
    return report


def tensor_files(root: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint."""
    from safetensors import safe_open

    places = {}
    for file in sorted(root.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    return places


# The machine


def check_room(options: Options, size_gb: float) -> None:
    """Exit with a sentence when disk or memory is too small."""
    size_bytes = size_gb * 1e9
    held = sum(nbytes_in(path) for path in options.cache.glob(f"base-{size_gb:g}GB-{options.dtype}"))
    stale = sum(nbytes_in(path) for path in options.cache.glob("out-*"))
    n_outputs = len(options.entrants() if options.keep else options.contenders)
    n_outputs += len(options.kinds) > 1 and not options.keep
    disk_needed = size_bytes * (1 + n_outputs) + SPARE_BYTES - held
    disk_free = shutil.disk_usage(options.cache).free + stale
    if disk_needed > disk_free:
        sys.exit(
            f"bench: {size_gb:g} GB need {disk_needed / 1e9:.1f} GB of disk for the base and its outputs,"
            f" and {disk_free / 1e9:.1f} GB are free at {options.cache}"
        )
    memory_needed, memory_free = size_bytes * PEFT_MEMORY_FACTOR + SPARE_BYTES, available_memory()
    if "peft" in options.contenders and memory_needed > memory_free:
        sys.exit(
            f"bench: PEFT holds the whole model, {size_gb:g} GB need {memory_needed / 1e9:.1f} GB of memory,"
            f" and {memory_free / 1e9:.1f} GB are available; pass --skip peft, or a smaller --size"
        )


def nbytes_in(directory: Path) -> int:
    """Return the bytes of the files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def available_memory() -> int:
    """Return the bytes of memory that a new process may fill: all of it where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return total_memory()


def total_memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    packages = ("torch", "transformers", "peft", "safetensors", "numpy")
    ours = subprocess.run([*lora_merge(), "--version"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "python": platform.python_version(),
        "lora-merge": ours.stdout.split()[-1],
        **{package: version(package) for package in packages},
    }


def machine_line() -> str:
    about = machine()
    return (
        f"{about['cores']} cores ({about['architecture']}), {about['memory_bytes'] / 1e9:.0f} GB of memory;"
        f" lora-merge {about['lora-merge']}, torch {about['torch']}, peft {about['peft']}"
    )


# What is printed and written


def table_of(outcome: Outcome) -> Table:
    """Return the measurements of one size as a table."""
    table = Table(show_lines=True, title=f"{outcome.base_bytes / 1e9:.2f} GB, medians, least–most below")
    table.add_column("contender", no_wrap=True)
    for heading in ("runs", "returned s", "on disk s", "CPU s", "peak MB", "× cp", "× cp, disk"):
        table.add_column(heading, justify="right")
    for name, samples in outcome.samples.items():
        ratios = (outcome.ratio(name, "cp"), outcome.ratio(name, "cp", "durable_s"))
        table.add_row(
            name,
            str(len(samples)),
            spread(samples, "wall_s"),
            spread(samples, "durable_s"),
            f"{outcome.middle(name, 'cpu_s'):.1f}",
            f"{outcome.middle(name, 'peak_rss_bytes') / 1e6:.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def spread(samples: list[Sample], quantity: str) -> str:
    values = [getattr(sample, quantity) for sample in samples]
    return f"{median(values):.2f}\n{min(values):.1f}–{max(values):.1f}"


def footer_of(outcome: Outcome) -> Iterator[str]:
    """Yield what the table cannot show."""
    first = ours_with(outcome.kinds[0])
    for kind in outcome.kinds[1:]:
        quantities = ("wall_s", "durable_s", "cpu_s", "peak_rss_bytes")
        ratios = [outcome.ratio(ours_with(kind), first, quantity) for quantity in quantities]
        if None not in ratios:
            returned, durable, cpu, peak = ratios
            yield (
                f"{kind} / {outcome.kinds[0]}: {returned:.2f} until returned, {durable:.2f} until on disk,"
                f" {cpu:.2f} of CPU time, {peak:.2f} of peak memory"
            )
    returned, durable = (outcome.ratio("peft", first, quantity) for quantity in ("wall_s", "durable_s"))
    if returned is not None:
        yield f"PEFT / ours: {returned:.2f} until returned, {durable:.2f} until on disk"
    same = outcome.identical
    if same is not None and same["identical"]:
        yield f"identical: yes, all {same['n_tensors']} tensors bit for bit"
    elif same is not None:
        yield (
            f"identical: no, {same['different_tensors']} of {same['n_tensors']} tensors differ, in"
            f" {same['different_values']:,} of {same['n_values']:,} values, by at most"
            f" {same['max_difference']:.3g}; {len(same['only_in_one'])} names are in one output only"
        )


def flatness(outcomes: list[Outcome], ours: str) -> str:
    """Return whether our peak memory depends on the size of the model."""
    peaks = [outcome.middle(ours, "peak_rss_bytes") for outcome in outcomes]
    steps = [f"{out.size_gb:g} GB: {peak / 1e6:.0f} MB" for out, peak in zip(outcomes, peaks, strict=True)]
    verdict = "flat" if max(peaks) <= FLAT * min(peaks) else "NOT flat"
    return f"peak memory of {ours} is {verdict}: {', '.join(steps)}"


def write_results(options: Options, outcomes: list[Outcome]) -> Path:
    """Write everything that was measured as JSON, and return the file."""
    file = options.json_file or options.cache / time.strftime("results-%Y%m%d-%H%M%S.json")
    data = {
        "machine": machine(),
        "options": {name: plain(value) for name, value in asdict(options).items()},
        "sizes": [result_of(outcome) for outcome in outcomes],
    }
    file.write_text(json.dumps(data, indent=2) + "\n")
    return file


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def result_of(outcome: Outcome) -> dict[str, Any]:
    quantities = ("wall_s", "durable_s", "cpu_s", "peak_rss_bytes")
    first, *others = (ours_with(kind) for kind in outcome.kinds)
    pairs = [(first, "cp"), ("peft", "cp"), ("peft", first)]
    pairs += [(other, base) for other in others for base in ("cp", first)]
    return {
        **asdict(outcome),
        "medians": {
            name: {quantity: outcome.middle(name, quantity) for quantity in quantities}
            for name in outcome.samples
        },
        "ratios": {
            f"{one}/{other}": {quantity: outcome.ratio(one, other, quantity) for quantity in quantities}
            for one, other in pairs
            if outcome.ratio(one, other) is not None
        },
    }


if __name__ == "__main__":
    main()
