"""What the processor leaves out of vLLM's CPU build: it has a library for AVX-512 and one for AVX2, with fewer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engines.asking import Line

_ABOUT = Path("/proc/cpuinfo")

_FLAGS = _ABOUT.read_text() if _ABOUT.exists() else ""

HAS_AVX512 = "avx512f" in _FLAGS

ROUNDINGS = 1.0 if "avx512_bf16" in _FLAGS else 1.5
"""How much further off vLLM's products in bfloat16 may be here than on a processor that multiplies bfloat16."""


def skip_without_kernel(line: Line) -> None:
    """Skip a test where vLLM's build for this processor has no kernel for packed INT4 weights."""
    if not HAS_AVX512 and "no attribute 'cpu_gemm_wna16'" in line.get("error", ""):
        pytest.skip("vLLM multiplies packed INT4 weights only on processors with AVX-512")
