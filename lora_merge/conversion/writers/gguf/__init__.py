"""A LoRA for llama.cpp: one GGUF file, under llama.cpp's names and in its order of rows.

llama.cpp multiplies by α/r with one α for the file and the r of each tensor. So α is the rank that most tensors have,
and B of any other is multiplied by r/α: every product comes out with a factor of one.
"""

from lora_merge.conversion.writers.gguf.file import GGUF_FILE, check_gguf, check_ready, write_gguf

__all__ = ["GGUF_FILE", "check_gguf", "check_ready", "write_gguf"]
