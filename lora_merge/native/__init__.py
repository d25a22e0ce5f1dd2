"""Compiled loops for the CPU, optional: without them the same work is done with torch.

`kernels.c` has two functions, which `library` finds: rounding that keeps the adapter (`rounding.inc`, called by
`lora_merge.rounding.compiled`) and decoding of codes (`decoding.inc`, called by `lora_merge.codecs.compiled`). Each takes one
tile, keeps nothing, and gives the same bits on every processor that it runs on: x86-64 with AVX2 or AVX-512, and ARM64.
"""
