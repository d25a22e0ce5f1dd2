"""Compiled loops for the CPU, optional: without them the same work is done with torch.

`kernels.c` has four functions, which `library` finds: rounding that keeps the adapter (`rounding.inc`, called by
`lora_merge.rounding.compiled`), of values or of codes that are decoded and changed on the way (`computing.inc`); decoding of codes
(`decoding.inc`, called by `lora_merge.codecs.compiled`), a product of low rank that is added to bfloat16 (`adding.inc`, called by
`lora_merge.merging.worker.adding`), and sums of squares (`summing.inc`, called by `lora_merge.formats.safetensors`). Each keeps
nothing; the first three give the same bits on every processor that they run on: x86-64 with AVX2 or AVX-512, and ARM64.
"""
