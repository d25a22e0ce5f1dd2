"""Asks vLLM what checkpoints with quantised weights generate, and which kernels it made for these.

A job also has the ``dtype`` to compute in. A line also has ``kernels``, and those of `tests.engines.vllm_on_cpu` that are
among them as ``plain``.
"""

from __future__ import annotations

import os

from lora_merge.verification.engines import vllm_script
from tests.engines.answering import Job, Line, answer_all


def answer(job: Job, _: str) -> Line:
    """Return what is said about a job."""
    from tests.engines import vllm_on_cpu

    vllm_script._free()  # what the job before left, be it an error
    vllm_on_cpu.USED.clear()
    answers = vllm_script._answers(job, job["dtype"])
    used = vllm_on_cpu.USED
    return {"answers": answers, "kernels": sorted(used), "plain": sorted(used & vllm_on_cpu.PLAIN)}


if __name__ == "__main__":
    vllm_script._set_environment()
    vllm_script._leave_out_amx()
    from tests.engines.vllm_on_cpu import install

    install()
    answer_all(answer)
    os._exit(0)  # as there: taking its worker threads down can hang
