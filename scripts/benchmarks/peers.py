"""Other tools that merge: how they are installed, how they are run, what they leave.

Each has a virtual environment of its own in the cache, `<cache>/peers/NAME`, and takes part once that is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import ROOT

TORCH = "torch==2.13.0"
"""Ours, so that all multiply with the same library; newer ones bring gigabytes of CUDA."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
"""Environment of every other tool: no network, no device, no packages but its own."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge: what is read, and where is written."""

    base: Path
    adapter: Path
    out: Path
    scratch: Path
    """A directory for configuration and what else is needed on the way; removed with the output."""

    dtype: str
    rank: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool that merges."""

    name: str
    package: str
    """What its version is read from."""

    requirements: tuple[str, ...]
    command: Callable[[Path, Job], list[str]]
    """From the directory of its programs and a job; it may write a configuration into the job's scratch."""

    output: str
    """What it leaves, in words."""

    n_copies: int = 1
    """How often the model is on the disk at the end of a run, output included."""

    memory_factor: float = 1.3
    """Of the base's size: how much memory it may take."""

    weights: str = "."
    """Where the checkpoint is in its output."""

    environment: Mapping[str, str] = field(default_factory=dict)
    unusable: str | None = None
    """Why it takes no part, where it does not."""

    def directory(self, cache: Path) -> Path:
        """Return its virtual environment."""
        return cache / "peers" / self.name

    def installed(self, cache: Path) -> bool:
        """Whether its virtual environment is there and whole."""
        python = self.directory(cache) / "bin" / "python"
        return python.exists() and bool(self.versions(cache).get(self.package))

    def versions(self, cache: Path) -> dict[str, str]:
        """Return the versions of its package, torch, transformers and PEFT, as far as they are installed."""
        code = (
            "import sys, json; from importlib.metadata import distributions;"
            "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}))"
        )
        python = self.directory(cache) / "bin" / "python"
        if not python.exists():
            return {}
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        found: dict[str, str] = json.loads(run.stdout) if run.returncode == 0 else {}
        wanted = (self.package, "torch", "transformers", "peft")
        return {name: found[name] for name in wanted if name in found}


def mergekit(programs: Path, job: Job) -> list[str]:
    """Merge base+adapter as mergekit's own notation has it."""
    config = job.scratch / "mergekit.json"
    model = f"{job.base}+{job.adapter}"
    config.write_text(
        json.dumps({"merge_method": "passthrough", "models": [{"model": model}], "dtype": job.dtype})
    )
    merged = str(job.scratch / "lora")
    return [
        str(programs / "mergekit-yaml"), str(config), str(job.out), "--lora-merge-cache", merged, "--quiet",
    ]  # fmt: skip


def swift(programs: Path, job: Job) -> list[str]:
    """Merge as the documentation of ms-swift does it."""
    model = ["--model", str(job.base), "--model_type", "llama", "--template", "dummy"]
    how = ["--merge_lora", "true", "--torch_dtype", job.dtype, "--device_map", "cpu"]
    where = ["--adapters", str(job.adapter), "--output_dir", str(job.out)]
    return [str(programs / "swift"), "export", *model, *how, *where]


def llamafactory(programs: Path, job: Job) -> list[str]:
    """Merge as the documentation of LLaMA-Factory does it."""
    model = ["--model_name_or_path", str(job.base), "--adapter_name_or_path", str(job.adapter)]
    how = ["--template", "default", "--infer_dtype", job.dtype, "--export_device", "cpu"]
    where = ["--export_dir", str(job.out), "--export_size", "5"]
    return [str(programs / "llamafactory-cli"), "export", *model, *how, *where]


def axolotl(programs: Path, job: Job) -> list[str]:
    """Merge with axolotl's default, shard by shard; its configuration has to be one for training."""
    config = job.scratch / "axolotl.yaml"  # JSON is YAML
    about = {
        "base_model": str(job.base),
        "lora_model_dir": str(job.adapter),
        "output_dir": str(job.out),
        "adapter": "lora",
        "lora_r": job.rank,
        "lora_alpha": 2 * job.rank,
        "lora_target_linear": True,
        "bf16": job.dtype == "bfloat16",
        "fp16": job.dtype == "float16",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "datasets": [{"path": "none", "type": "completion"}],
    }
    config.write_text(json.dumps(about))
    return [str(programs / "axolotl"), "merge-lora", str(config)]


def unsloth(programs: Path, job: Job) -> list[str]:
    """Merge as the documentation of Unsloth does it, which has a way for CPUs."""
    script = Path(__file__).with_name("unsloth_merge.py")
    return [
        str(programs / "python"), str(script), str(job.base), str(job.adapter), str(job.out), job.dtype,
    ]  # fmt: skip


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "mergekit",
            "mergekit",
            ("mergekit",),
            mergekit,
            "a checkpoint, and the merged model once more in its cache",
            n_copies=2,
        ),
        Peer("ms-swift", "ms-swift", ("ms-swift",), swift, "a checkpoint saved by transformers"),
        Peer(
            "llamafactory",
            "llamafactory",
            ("llamafactory",),
            llamafactory,
            "a checkpoint saved by transformers",
        ),
        Peer(
            "axolotl",
            "axolotl",
            ("axolotl",),
            axolotl,
            "the base's own shards",
            weights="merged",
            environment={"AXOLOTL_DO_NOT_TRACK": "1"},
        ),
        Peer(
            "unsloth",
            "unsloth",
            ("unsloth",),
            unsloth,
            "a checkpoint saved by transformers",
            environment={"UNSLOTH_SKIP_TORCHVISION_CHECK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
        ),
    )
}
"""By name; what is unusable says why."""


def install(peer: Peer, cache: Path) -> None:
    """Make a peer's virtual environment anew.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    directory = peer.directory(cache)
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, TORCH, *peer.requirements], check=True)
    fit_to_cpu(python)


def fit_to_cpu(python: Path) -> None:
    """Let torchvision and torchaudio, which indexes have only for CUDA, be imported beside a torch for CPUs.

    The one gets operators that exist and do nothing, the other loses its compiled part, which it can do without. A
    text model needs neither, but LLaMA-Factory imports both.
    """
    code = (
        "import torch, importlib.util as u, os;"
        "s = u.find_spec('torchaudio');"
        "print(torch.version.cuda or '', os.path.dirname(s.origin) if s else '', sep='\\n')"
    )
    run = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    cuda, torchaudio = run.stdout.split("\n")[:2]
    if cuda:
        return
    subprocess.run([python, ROOT / "tests" / "engines" / "torchvision_on_cpu.py"], check=True)
    if torchaudio:
        for compiled in (Path(torchaudio) / "lib").glob("*.so"):
            compiled.unlink()
