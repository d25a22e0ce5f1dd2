"""Tiny real models and adapters, built with transformers and PEFT; no binary fixtures.

`pico` builds a base, `pico_adapter` an adapter for it. Both are cached for the session: tests must not
write into what they return, and copy it first when they tamper.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from tests import crossing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_SOCKETS = Path(__file__).with_name("no_sockets")
SOCKET_LOG = Path(tempfile.mkdtemp(prefix="lora-merge-tests-")) / "sockets"
os.environ["SOCKET_LOG"] = str(SOCKET_LOG)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NO_SOCKETS), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(NO_SOCKETS / "sitecustomize.py"))

constants.HF_HUB_OFFLINE = (
    True  # PEFT asks when it saves; commands are to ask nobody without being told, and are not told
)
os.environ.pop("HF_HUB_OFFLINE", None)
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)  # xdist sets them for its workers, and every line would be wrapped
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch starts: products are tiny, and workers have one core each

pytest_plugins = ["tests.parity.table_plugin", "tests.engines.table_plugin"]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the rows of ``tests/crossed.txt``; ``LORA_MERGE_ROWS=all`` leaves them as others are."""
    if os.environ.get("LORA_MERGE_ROWS") != "all":
        names = frozenset(crossing.LISTED.read_text(encoding="utf-8").splitlines())
        crossing.mark_listed(items, names, are_all=not any("::" in each for each in config.args))


VOCAB = 96
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "llama_tied", "qwen2", "gpt2")


def build_model(family: str, **sizes: int) -> Any:
    """Return a tiny model of a family with random weights, always the same, large enough to matter.

    Args:
        sizes: that differ from `COMMON`.
    """
    import torch
    import transformers as t

    torch.manual_seed(sum(family.encode()))
    if family == "gpt2":
        assert not sizes
        config = t.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        model = t.GPT2LMHeadModel(config)
    elif family == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**COMMON | sizes, tie_word_embeddings=False))
    else:
        tied = family == "llama_tied"
        model = t.LlamaForCausalLM(t.LlamaConfig(**COMMON | sizes, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def write_tokenizer(root: Path) -> None:
    """Write a small real tokenizer with a chat template into a directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>"] + [f"w{n}" for n in range(VOCAB - 3)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(root)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (family, dtype, max_shard_size, **sizes) → directory of a base checkpoint."""
    built: dict[tuple[object, ...], Path] = {}

    def build(
        family: str = "llama", dtype: str = "bfloat16", max_shard_size: str | None = None, **sizes: int
    ) -> Path:
        key = (family, dtype, max_shard_size, *sorted(sizes.items()))
        if key not in built:
            import torch

            root = tmp_path_factory.mktemp(f"{family}-{dtype}")
            model = build_model(family, **sizes).to(getattr(torch, dtype))
            model.save_pretrained(root, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
            write_tokenizer(root)
            built[key] = root
        return built[key]

    return build


@pytest.fixture(scope="session")
def pico_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (base, **LoraConfig fields) → directory of a LoRA adapter with random factors."""
    built: dict[str, Path] = {}

    def build(base: Path, **fields: Any) -> Path:
        key = hashlib.sha1(json.dumps([str(base), fields], sort_keys=True).encode()).hexdigest()
        if key not in built:
            import torch
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM

            fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **fields}
            model = AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(7)
            peft_model = get_peft_model(model, LoraConfig(**fields))
            with torch.no_grad():
                for name, parameter in peft_model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0, 0.3)
            root = tmp_path_factory.mktemp("adapter")
            peft_model.peft_config["default"].base_model_name_or_path = str(base)
            peft_model.save_pretrained(root)
            built[key] = root
        return built[key]

    return build


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory in which all tests of a process build bases and adapters, each of them once."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(autouse=True)
def no_sockets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Fail each test that speaks to a network, itself or by a process that it starts; the mark ``loopback`` allows this machine."""
    if request.node.get_closest_marker("loopback"):
        monkeypatch.setenv("SOCKETS", "loopback")
    _assert_silence("a fixture")
    yield SOCKET_LOG
    _assert_silence("the test")


def _assert_silence(who: str) -> None:
    log = SOCKET_LOG
    if not os.path.exists(log):  # noqa: PTH110 - a test may have its own Path.exists
        return
    attempts = log.read_text()
    log.unlink(missing_ok=True)
    assert not attempts, f"{who} spoke to a network:\n{attempts}"


@pytest.fixture
def three_threads() -> Iterator[int]:
    """Give torch three threads: tests run with one, and what forgets the number would pass unseen."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a directory to a fresh place where it may be broken."""

    def copy(source: Path, name: str = "tampered") -> Path:
        target = tmp_path / name
        shutil.copytree(source, target)
        return target

    return copy


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Leave the signal handlers as they are. The command's own end the process when a signal comes a second time."""
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Return a function that runs the real command in this process, online: ``cli("--base", base, …)``."""
    from lora_merge.cli import main

    def run(*arguments: object) -> Result:
        with pytest.MonkeyPatch.context() as patch, _own_handlers():
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lora-merge")

    return run
