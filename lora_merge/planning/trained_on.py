"""Signs in an adapter's folder that it was trained on a base that the trainer had quantised in memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.errors import LoraMergeError
from lora_merge.formats.repo_files import TRAINING_ARGUMENTS
from lora_merge.formats.side_files import CARD_FILE
from lora_merge.storage.small_files import read_json, read_text

if TYPE_CHECKING:
    from pathlib import Path

LLAMA_FACTORY = "training_args.yaml"
"""What the web interface of LLaMA-Factory writes beside the adapter."""

_PEFT_CARD = "quantization config was used during training"
_AXOLOTL_CARD = "axolotl version"
_METHODS = {"bnb": "bitsandbytes"}
"""Short names of trainers → ``quant_method`` of transformers."""


class Sign(NamedTuple):
    """What says that a base was quantised when it was loaded for the training."""

    method: str
    """``quant_method``, as transformers has it: ``"bitsandbytes"``."""

    words: str
    """For messages: ``"bitsandbytes, 4 bits"``."""

    file: str
    """That says so."""


def sign_of(root: Path) -> Sign | None:
    """Return the sign in an adapter's folder; None where none of its files has one.

    References:
        ``PeftModel.create_or_update_model_card`` (PEFT 0.4 to 0.6; later releases find no configuration to write),
        Axolotl's ``train.create_model_card`` (0.18), ms-swift's ``QuantizeArguments`` (``args.json``) and LLaMA-Factory's
        ``webui.common.save_cmd``.
    """
    for file, read in ((TRAINING_ARGUMENTS, _swift), (LLAMA_FACTORY, _llama_factory), (CARD_FILE, _card)):
        try:
            found = read(root / file) if (root / file).is_file() else None
        except LoraMergeError:  # a file that only gives a hint
            continue
        if found is not None:
            method, bits = found
            name = _METHODS.get(method, method)
            return Sign(name, f"{name}, {bits} bits" if bits else name, file)
    return None


def _swift(path: Path) -> tuple[str, str] | None:
    arguments = read_json(path)
    method, bits = arguments.get("quant_method"), arguments.get("quant_bits")
    if not isinstance(method, str) or not method:
        return None
    return method, str(bits) if isinstance(bits, int) else ""


def _llama_factory(path: Path) -> tuple[str, str] | None:
    text = read_text(path)
    bits = re.search(r"^quantization_bit: (\d+)\s*$", text, re.MULTILINE)
    method = re.search(r"^quantization_method: (\w+)\s*$", text, re.MULTILINE)
    # bitsandbytes is what LLaMA-Factory uses where no method is named.
    return (method[1] if method else "bnb", bits[1]) if bits else None


def _card(path: Path) -> tuple[str, str] | None:
    text = read_text(path)
    patterns = []
    if _PEFT_CARD in text:
        patterns.append(r"^- load_in_([48])bit: True\s*$")
    if _AXOLOTL_CARD in text:
        patterns.append(r"^load_in_([48])bit: true\s*(?:#.*)?$")
    found = (re.search(pattern, text, re.MULTILINE) for pattern in patterns)
    return next((("bnb", match[1]) for match in found if match), None)
