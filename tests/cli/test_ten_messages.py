"""The ten most frequent messages, as the real command prints them, in one file that a person can read and judge.

Each must say what happened, name the thing it is about, and say in a line ``hint: …`` what to do. After a change of a
message, write the file again and review it: ``WRITE_MESSAGES=1 pytest tests/cli/test_ten_messages.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json, edit_tensors

GOLDEN = Path(__file__).with_name("ten_messages.txt")
MERGE = ("--base", "base", "--adapter", "adapter", "--out", "merged")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong, in a directory with ``base`` and ``adapter``."""

    title: str
    cause: Callable[[Path], object]
    names: str
    """What the message has to name."""

    code: int
    arguments: tuple[str, ...] = MERGE
    strike: bool = False
    """True where the command gets SIGINT once the output is being written."""


def _of_another_size(root: Path) -> None:
    edit_json(root / "adapter" / "adapter_config.json", base_model_name_or_path="acme/small-3b")
    edit_tensors(root / "adapter" / "adapter_model.safetensors", _narrower)


def _narrower(tensors: dict) -> None:
    """Have every factor be as of a hidden size of 48, not 64."""
    for name, value in list(tensors.items()):
        rows, columns = (48 if size == 64 else size for size in value.shape)
        tensors[name] = value[:rows, :columns].contiguous()


def _one_narrower(tensors: dict) -> None:
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:, :48].contiguous()


def _renamed(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn.q_proj", "attention.query")] = tensors.pop(name)


def _unknown_modules(root: Path) -> None:
    edit_tensors(root / "adapter" / "adapter_model.safetensors", _renamed)
    edit_json(root / "adapter" / "adapter_config.json", target_modules=["query", "down_proj"])


def _larger_than_the_disk(root: Path) -> None:
    """Give the base a tensor of 8 TB in a sparse file: no disk of a test has room for its copy."""
    import struct

    shape = [1 << 21, 1 << 21]
    nbytes = 2 * shape[0] * shape[1]
    header = json.dumps({"extra": {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    (root / "base" / "model.safetensors").rename(root / "base" / "model-00001-of-00002.safetensors")
    with (root / "base" / "model-00002-of-00002.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + nbytes)
        except OSError as exc:
            pytest.skip(f"the filesystem has no sparse files of 8 TB ({exc.strerror})")
    from safetensors import safe_open

    with safe_open(root / "base" / "model-00001-of-00002.safetensors", "pt") as tensors:
        weight_map = dict.fromkeys(tensors.keys(), "model-00001-of-00002.safetensors")
    weight_map["extra"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


CASES = (
    Case("The base is not the one of the training", _of_another_size, "acme/small-3b", exits.PLAN),
    Case(
        "The adapter's weights are missing",
        lambda root: (root / "adapter" / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors",
        exits.RESOLVE,
    ),
    Case("The output exists", lambda root: shutil.copytree(root / "base", root / "merged"), "merged", exits.WRITE),
    Case("The disk has no room", _larger_than_the_disk, "merged", exits.WRITE),
    Case(
        "One tensor has another shape",
        lambda root: edit_tensors(root / "adapter" / "adapter_model.safetensors", _one_narrower),
        "model.layers.0.self_attn.q_proj",
        exits.PLAN,
    ),
    Case("The base has no such modules", _unknown_modules, "attention.query", exits.PLAN),
    Case(
        "The method cannot be merged",
        lambda root: edit_json(root / "adapter" / "adapter_config.json", peft_type="PROMPT_TUNING"),
        "PROMPT_TUNING",
        exits.PLAN,
    ),
    Case(
        "The base is quantised in a way that is not supported",
        lambda root: edit_json(root / "base" / "config.json", quantization_config={"quant_method": "eetq"}),
        "EETQ",
        exits.PLAN,
    ),
    Case(
        "Offline, and the base is not in the cache",
        lambda root: None,
        "acme/small-3b",
        exits.RESOLVE,
        ("--base", "acme/small-3b", "--adapter", "adapter", "--out", "merged", "--offline"),
    ),
    Case("Interrupted", lambda root: None, "no output was created", exits.INTERRUPTED, strike=True),
)  # fmt: skip


@pytest.fixture(scope="module")
def messages(pico, pico_adapter, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Return title → exit code and stderr of each case, once all were run."""
    found = {}
    for n, case in enumerate(CASES):
        root = tmp_path_factory.mktemp(f"case{n}")
        shutil.copytree(pico(), root / "base")
        shutil.copytree(pico_adapter(pico()), root / "adapter")
        edit_json(root / "adapter" / "adapter_config.json", base_model_name_or_path=None)
        case.cause(root)
        code, text = _run(case, root)
        while case.strike and "--resume" in text:  # a tensor was finished before the signal came
            shutil.rmtree(root / "merged.lora-merge-staging")
            code, text = _run(case, root)
        found[case.title] = (code, text)
    return found


def _run(case: Case, root: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "lora_merge", *case.arguments]
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if case.strike:
            # The directory appears before the first tensor: whatever is finished then, the output is not.
            staging = root / "merged.lora-merge-staging"
            while not staging.exists() and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def _errors(text: str) -> str:
    """Return the error and what follows it, without what was said before."""
    return text[text.index("error: ") :] if "error: " in text else text


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_frequent_message_says_what_happened_names_the_thing_and_says_what_to_do(case, messages):
    code, text = messages[case.title]

    assert code == case.code, text
    first, *rest = _errors(text).strip().split("\n")
    assert first.startswith("error: ")
    assert case.names in text
    hints = [line.strip() for line in rest if line.strip().startswith("hint: ")]
    assert hints, text
    assert all(re.match(r"hint: [a-z-]+ \S+", hint) for hint in hints), hints
    assert "Traceback" not in text


def test_the_messages_are_those_of_the_file_that_was_reviewed(messages):
    said = "".join(f"# {title}\n\n{_masked(_errors(text))}\n" for title, (_, text) in messages.items())
    if os.environ.get("WRITE_MESSAGES"):
        GOLDEN.write_text(said, encoding="utf-8")

    assert said == GOLDEN.read_text(encoding="utf-8")


def _masked(text: str) -> str:
    """Return a text without what differs between machines: sizes of disks, numbers of processes."""
    return re.sub(r"\d[\d.]* (?:[kMGT]?B)\b", "N GB", text)
