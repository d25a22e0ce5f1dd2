"""Merge as PEFT's documentation does it: ``peft_merge.py BASE ADAPTER OUT DTYPE``."""

from __future__ import annotations

import sys


def main(base: str, adapter: str, out: str, dtype: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
