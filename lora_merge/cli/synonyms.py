"""Names that other tools have for options and commands, and what to write here instead.

Other tools: PEFT's and transformers' examples, TRL, LLaMA-Factory, ms-swift, Axolotl, Unsloth, mlx-lm, mergekit,
llama.cpp, vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Values = tuple[str, ...]
Write = Callable[[Values], list[str]]
"""Values of the other tool's option → arguments of this command."""


@dataclass(frozen=True, slots=True)
class Synonym:
    """Names with one meaning."""

    names: str
    """With spaces between them; in lower case, with ``-`` for ``_``."""

    option: str = ""
    """The option with this meaning; empty if there is none."""

    why: str = ""
    """Why there is no such option, or what else to know. A sentence without its full stop."""

    n_values: int = 1
    """Number of values: 0, 1, or -1 for several."""

    onto: str = ""
    """The option whose value gets this one as a suffix: ``--adapter``."""

    mark: str = ""
    """Character between that value and the suffix: ``:``."""

    write: Write | None = None
    """Arguments to write instead. None repeats the option for each value, or leaves the option out if there is none."""

    def arguments(self, values: Values) -> list[str]:
        """Return what to write instead of the option with these values."""
        if self.write is not None:
            return self.write(values)
        if not self.option:
            return []
        if self.n_values == 0:
            return [] if values and values[0].lower() in {"false", "no", "0", "off"} else [self.option]
        return [text for value in values for text in (self.option, value)]


def _each(values: Values) -> list[str]:
    """Adapters, of which LLaMA-Factory takes several with commas."""
    return [text for value in values for part in value.split(",") if part for text in ("--adapter", part)]


def _dtype(values: Values) -> list[str]:
    """``auto`` means the base's dtype, which is the default here."""
    names = {"half": "float16", "float": "float32", "f16": "float16", "f32": "float32"}
    value = values[0].lower().removeprefix("torch.") if values else "auto"
    return [] if value in {"auto", "none"} else ["--dtype", names.get(value, value)]


def _cuda(values: Values) -> list[str]:
    return ["--device", f"cuda:{values[0]}" if values and values[0].isdecimal() else "cuda"]


def _device(values: Values) -> list[str]:
    value = values[0] if values else "auto"
    known = {"balanced": "auto", "sequential": "auto", "gpu": "cuda"}
    return ["--device", f"cuda:{value}" if value.isdecimal() else known.get(value, value)]


def _gigabytes(values: Values) -> list[str]:
    return ["--max-shard-size", f"{values[0]}GB" if values[0].isdecimal() else values[0]] if values else []


def _bits(values: Values) -> list[str]:
    value = values[0] if values else "8"
    return ["--quantize", f"int{value}" if value in {"4", "8"} else value]


def _fixed(*arguments: str) -> Write:
    """Return a function that writes the same for any value."""
    return lambda _values: list(arguments)


SYNONYMS: Final[tuple[Synonym, ...]] = (
    Synonym(
        "--model --base-model --model-name-or-path --model-path --model-name --model-id "
        "--base-model-path --base-model-name --base-model-name-or-path "
        "--pretrained-model-name-or-path --base-path --base-dir --model-dir --model-id-or-path "
        "--pretrained --hf-path --ckpt-dir --checkpoint --llm -m -b",
        "--base",
    ),
    Synonym(
        "--lora --lora-path --lora-dir --lora-model --lora-model-dir --lora-model-path "
        "--lora-weights --lora-modules --lora-adapter --adapters --adapter-path --adapter-dir "
        "--adapter-name-or-path --adapter-model --adapter-model-name --adapter-file --adapter-id "
        "--adapter-folder --peft-model --peft-model-path --peft-model-id --peft-path --peft-dir "
        "--peft --resume-from-checkpoint --finetuned-model -a -l",
        "--adapter",
        n_values=-1,
        write=_each,
    ),
    Synonym(
        "--output --output-dir --output-path --output-directory --output-folder --output-name "
        "--export-dir --save-path --save-dir --save-directory --save --save-to --save-model-path "
        "--out-path --out-dir --outfile --outdir --merged-model-path --merged-path --merged-dir "
        "--target-dir --dest --destination --to --export",
        "--out",
    ),
    Synonym(
        "--torch-dtype --out-dtype --output-dtype --outtype --precision --infer-dtype --data-type "
        "--merge-dtype --save-dtype",
        "--dtype",
        write=_dtype,
    ),
    Synonym("--bf16 --bfloat16", "--dtype bfloat16", n_values=0, write=_fixed("--dtype", "bfloat16")),
    Synonym("--fp16 --float16 --half", "--dtype float16", n_values=0, write=_fixed("--dtype", "float16")),
    Synonym("--fp32 --float32", "--dtype float32", n_values=0, write=_fixed("--dtype", "float32")),
    Synonym(
        "--gpu --cuda --use-gpu --use-cuda --gpu-id --gpus --on-gpu", "--device cuda", n_values=0, write=_cuda
    ),
    Synonym(
        "--cpu --use-cpu --no-cuda --no-gpu --cpu-only",
        "--device cpu",
        n_values=0,
        write=_fixed("--device", "cpu"),
    ),
    Synonym("--device-map --export-device --device-id --merge-device", "--device", write=_device),
    Synonym(
        "--force --force-overwrite --overwrite-output-dir --exist-ok --replace --clobber "
        "--overwrite-output -f",
        "--overwrite",
        n_values=0,
    ),
    Synonym(
        "--yes --no-confirm --assume-yes -y",
        why="lora-merge never asks a question, so leave it out",
        n_values=0,
    ),
    Synonym("--no-progress --no-progress-bar --disable-tqdm --silent --no-tqdm", "--quiet", n_values=0),
    Synonym("--debug --log-level --loglevel", "--verbose", write=_fixed("--verbose")),
    Synonym("--local-files-only --local-only --no-download --offline-mode", "--offline", n_values=0),
    Synonym(
        "--hf-token --hub-token --use-auth-token --auth-token --api-token --access-token --hf-hub-token",
        "--token",
    ),
    Synonym(
        "--shard-size --max-shard --out-shard-size --maximum-shard-size --max-file-size "
        "--split-size --split-max-size",
        "--max-shard-size",
    ),
    Synonym("--export-size", "--max-shard-size", write=_gigabytes),
    Synonym("--max-memory --max-ram --memory --ram --mem-limit", "--memory-limit"),
    Synonym(
        "--num-workers --n-workers --threads --num-threads --n-jobs --num-proc --nproc --max-workers -j",
        "--workers",
    ),
    Synonym(
        "--merge-method --method --combination-type --combination --combine-method --merge-strategy",
        "--combine",
    ),
    Synonym("--random-seed", "--seed"),
    Synonym("--dry --simulate --no-write --plan --preview -n", "--dry-run", n_values=0),
    Synonym("--continue --restart --keep-going-from", "--resume", n_values=0),
    Synonym(
        "--skip-verify --skip-verification --no-check --no-checks --no-validate --no-verification "
        "--skip-checks",
        "--no-verify",
        n_values=0,
    ),
    Synonym("--config-file --config-path --yaml --recipe", "--config"),
    Synonym(
        "--quantization --quantisation --quantise --quant --quant-method --quantization-method --qtype",
        "--quantize",
    ),
    Synonym(
        "--bits --export-quantization-bit --quantization-bit --quant-bits --q-bits --wbits",
        "--quantize",
        write=_bits,
    ),
    Synonym(
        "--dequantize --de-quantize --dequantise",
        "--out-storage dense",
        n_values=0,
        write=_fixed("--out-storage", "dense"),
    ),
    Synonym("--lora-rank --max-rank -r", "--rank"),
    Synonym(
        "--model-revision --base-revision --branch --commit",
        why="the revision is part of the repo's name: --base org/name@REVISION",
        onto="--base",
        mark="@",
    ),
    Synonym(
        "--adapter-revision --lora-revision",
        why="the revision is part of the repo's name: --adapter org/name@REVISION",
        onto="--adapter",
        mark="@",
    ),
    Synonym(
        "--subfolder --adapter-subfolder",
        why="the folder is part of the repo's name: --adapter org/name/FOLDER",
        onto="--adapter",
        mark="/",
    ),
    Synonym(
        "--weights --weight --scale --alpha --lora-scale --lora-weight --scaling --strength --lora-scaled "
        "--adapter-weight --adapter-weights --adapter-scale --merge-weight --ratio",
        why="the weight of an adapter follows its name: --adapter DIR:0.5",
        n_values=-1,
        onto="--adapter",
        mark=":",
    ),
    Synonym(
        "--trust-remote-code --remote-code --allow-remote-code",
        why="lora-merge never runs code from a checkpoint, so leave it out",
        n_values=0,
    ),
    Synonym(
        "--hub-model-id --export-hub-model-id --upload-repo --repo-id --push-to-hub-model-id --push-to",
        "--push-to-hub",
    ),
    Synonym("--hub-private --hub-private-repo", "--private", n_values=0),
    Synonym("--push", why="name the repo: --push-to-hub org/name", n_values=0),
    Synonym(
        "--safe-serialization --safe-serialisation --save-safetensors --safetensors "
        "--export-legacy-format --use-safetensors --write-safetensors",
        why="the output is always safetensors, so leave it out",
        n_values=0,
    ),
    Synonym(
        "--cache-dir --hf-home --lora-merge-cache --download-dir --transformers-cache --hf-cache --hub-cache",
        why="the cache is the Hub's: set the environment variable HF_HUB_CACHE to move it",
    ),
    Synonym(
        "--load-in-4bit --load-in-8bit --use-4bit --use-8bit --load-4bit --load-8bit",
        why="a base is read as it is stored, so leave it out, or use --quantize to store the output quantised",
        n_values=0,
    ),
    Synonym(
        "--tokenizer --tokenizer-path --tokenizer-name --tokenizer-name-or-path --template --chat-template",
        why="tokenizer and chat template are copied from the adapter's folder or the base, so leave it out",
    ),
    Synonym(
        "--copy-tokenizer --save-tokenizer --write-model-card",
        why="it is always written, so leave it out",
        n_values=0,
    ),
    Synonym(
        "--finetuning-type --adapter-type --peft-type --train-type --lora-type --tuner-type "
        "--task-type --model-type",
        why="it is read from the files of base and adapter, so leave it out",
    ),
    Synonym(
        "--target-modules --lora-target --modules-to-save --lora-dropout --lora-alpha",
        why="it is read from the adapter's adapter_config.json, so leave it out",
        n_values=-1,
    ),
    Synonym(
        "--merge --merge-lora --merge-and-unload --merge-adapter --unload --do-merge",
        why="merging is what the command does, so leave it out",
        n_values=0,
    ),
    Synonym(
        "--low-cpu-mem-usage --lazy-unpickle --low-memory --lazy --use-temp-dir --offload --mmap",
        why="the base is always streamed in small pieces, so leave it out, or set --memory-limit",
        n_values=0,
    ),
    Synonym(
        "--offload-folder --offload-dir --max-cpu-memory",
        why="the base is always streamed in small pieces, so leave it out, or set --memory-limit",
    ),
    Synonym(
        "--export-gguf --gguf",
        why="the output is a Hugging Face checkpoint: run llama.cpp's convert_hf_to_gguf.py on it",
        n_values=0,
    ),
    Synonym(
        "--gguf-path",
        why="the output is a Hugging Face checkpoint: run llama.cpp's convert_hf_to_gguf.py on it",
    ),
    Synonym(
        "--allow-crimes --safe-merge --check-nan",
        why="every merge is checked, and NaN is refused, so leave it out",
        n_values=0,
    ),
    Synonym(
        "--attn-implementation --attn-impl --flash-attn --max-seq-length --max-length "
        "--batch-size --rope-scaling",
        why="a merge does not run the model, so leave it out",
    ),
)

OPTIONS: Final = {name: row for row in SYNONYMS for name in row.names.split()}


@dataclass(frozen=True, slots=True)
class VerbSynonym:
    """Names that other tools have for a command."""

    names: str
    """With spaces between them."""

    verb: str = ""
    """The command with this meaning; empty if there is none."""

    why: str = ""
    """What to do instead. A sentence without its full stop."""

    arguments: tuple[str, ...] = ()
    """Arguments to add."""


VERB_SYNONYMS: Final[tuple[VerbSynonym, ...]] = (
    VerbSynonym(
        "export fuse merge-lora merge_lora merge-adapter merge-adapters merge-and-unload merge_and_unload "
        "merge_to_base_model apply combine bake join export-lora",
        "merge",
    ),
    VerbSynonym("dry-run preview estimate", "plan"),
    VerbSynonym("check validate test compare eval prove", "verify"),
    VerbSynonym("info show describe ls list stats analyze analyse ranks print", "inspect"),
    VerbSynonym("resize shrink svd reduce transform to-gguf rewrite prune", "convert"),
    VerbSynonym("subtract extract-lora mergekit-extract-lora distill", "extract"),
    VerbSynonym("run jobs many queue", "batch"),
    VerbSynonym("env collect-env sysinfo system report-bug debug", "doctor"),
    VerbSynonym("install-completion completions", "completion"),
    VerbSynonym(
        "quantize quantise quant",
        "merge",
        "the merge quantises its output: --quantize fp8 (or int8, int4, …)",
        ("--quantize", "fp8"),
    ),
    VerbSynonym("serve chat generate infer", why="an engine runs the merged checkpoint: vllm serve OUT"),
    VerbSynonym("train sft finetune fine-tune", why="lora-merge merges adapters that are trained already"),
    VerbSynonym("download pull fetch get", why="a repo is downloaded when it is used: --base org/name"),
    VerbSynonym("upload push publish", why="a merge uploads its output: --push-to-hub org/name"),
    VerbSynonym("unmerge split undo", why="a merge cannot be undone; keep the base and the adapter"),
)

VERBS: Final = {name: row for row in VERB_SYNONYMS for name in row.names.split()}
