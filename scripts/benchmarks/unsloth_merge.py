"""Merge as Unsloth's documentation does it: ``unsloth_merge.py BASE ADAPTER OUT DTYPE``. The adapter's config names the base."""

from __future__ import annotations

import os
import sys
import tempfile


def main(base: str, adapter: str, out: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as compiled:
        # Otherwise it writes the code that it compiles into the current directory.
        os.environ["UNSLOTH_COMPILE_LOCATION"] = compiled
        merge(base, adapter, out, dtype)


def merge(base: str, adapter: str, out: str, dtype: str) -> None:
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        adapter, load_in_4bit=False, dtype=getattr(torch, dtype), max_seq_length=128
    )
    assert model.peft_config["default"].base_model_name_or_path == base
    model.save_pretrained_merged(out, tokenizer, save_method="merged_16bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
