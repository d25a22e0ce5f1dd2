"""How the tests ask engines: programs in the engines' environment, each a process that gets all its jobs at once."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.adapters import VLLM_RANKS
from tests.engines.building import N_TOKENS, PROMPTS
from tests.engines.serving import Served, needed_rank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1800
"""Of one engine for everything; it takes minutes."""

Job = dict[str, Any]
Line = dict[str, Any]
Key = tuple[str, str]
"""An adapter by its name, and how it is served."""


def job(checkpoint: Path, **more: Any) -> Job:
    """Return what a program is told about a checkpoint."""
    return {"checkpoint": str(checkpoint), "prompts": PROMPTS, "n_tokens": N_TOKENS, **more}


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks the programs of the engines' environment."""

    python: Path
    cache: Path
    """A directory for what an engine keeps."""

    def ask(self, program: Sequence[str], dtype: str, jobs: Sequence[Job]) -> list[Line]:
        """Run a program; return its lines, of which there has to be one for each job."""
        run = subprocess.run(
            [self.python, *program],
            cwd=ROOT,
            env={
                **os.environ,
                "VLLM_CACHE_ROOT": str(self.cache),
                "OMP_NUM_THREADS": "1",  # the products are tiny
            },
            input=json.dumps({"dtype": dtype, "jobs": jobs}),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        lines = run.stdout.splitlines()
        failed = f"{program}: {run.returncode}\n{run.stderr[-3000:]}"
        assert (run.returncode, len(lines)) == (0, len(jobs)), failed
        return [json.loads(line) for line in lines]

    def vllm(self, served: Mapping[str, Served]) -> dict[Key, Line]:
        """Ask vLLM, which has one limit of the rank for an engine: one job for each base and limit."""
        groups: dict[tuple[Path, int], dict[Key, Path]] = {}
        for name, one in served.items():
            groups.setdefault((one.base, VLLM_RANKS[0]), {})[name, "original"] = one.original
            rank = needed_rank(one.original)
            if rank > VLLM_RANKS[0]:
                groups.setdefault((one.base, rank), {})[name, "told"] = one.original
            if "vllm" in one.converted:
                converted = one.converted["vllm"]
                groups.setdefault((one.base, needed_rank(converted)), {})[name, "converted"] = converted
        jobs = [
            job(base, adapters=list(map(str, adapters.values())), **_limit(rank))
            for (base, rank), adapters in groups.items()
        ]
        return self._with_adapters("tests.engines.vllm_adapters_script", jobs, list(groups.values()))

    def lmdeploy(self, served: Mapping[str, Served]) -> dict[Key, Line]:
        """Ask LMDeploy: with each adapter alone, since one that it fails on costs all others their answers.

        Then with all of a base that were converted together.
        """
        groups: list[tuple[Path, dict[Key, Path]]] = []
        together: dict[Path, dict[Key, Path]] = {}
        for name, one in served.items():
            groups.append((one.base, {(name, "original"): one.original}))
            if "lmdeploy" in one.converted:
                converted = one.converted["lmdeploy"]
                groups.append((one.base, {(name, "converted"): converted}))
                together.setdefault(one.base, {})[name, "together"] = converted
        groups += together.items()
        jobs = [job(base, adapters=list(map(str, adapters.values()))) for base, adapters in groups]
        return self._with_adapters("tests.engines.lmdeploy_script", jobs, [keyed for _, keyed in groups])

    def _with_adapters(
        self, module: str, jobs: Sequence[Job], groups: Sequence[Mapping[Key, Path]]
    ) -> dict[Key, Line]:
        """Return what is said with each adapter, of which every job has a group."""
        lines = self.ask(["-m", module], "float32", jobs)
        return {
            key: said
            for keyed, line in zip(groups, lines, strict=True)
            for key, said in zip(keyed, _of_each(line, len(keyed)), strict=True)
        }


def _limit(rank: int) -> Job:
    """Return what is said of the rank to vLLM: nothing where its default will do."""
    return {} if rank == VLLM_RANKS[0] else {"max_lora_rank": rank}


def _of_each(line: Line, n_adapters: int) -> list[Line]:
    """Return what a line says of each adapter; an error is that of all."""
    common = {key: value for key, value in line.items() if key != "of_adapters"}
    return [{**common, **one} for one in line.get("of_adapters", [{}] * n_adapters)]
