"""Writes a LoRA for llama.cpp: one GGUF file, with llama.cpp's names and order of rows.

llama.cpp multiplies each product by α/r, with one α for the file and the r of each tensor. So α is set to the
commonest rank, and B of tensors with another rank is multiplied by r/α. Every product then has the factor one.
"""

from lora_merge.conversion.writers.gguf.file import GGUF_FILE, check_gguf, check_ready, write_gguf

__all__ = ["GGUF_FILE", "check_gguf", "check_ready", "write_gguf"]
