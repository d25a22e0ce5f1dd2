"""One job of a batch: a request with a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lora_merge import executors
from lora_merge.merging.on_cluster import cluster_for_others
from lora_merge.requests.request import ConvertRequest, Request


@dataclass(frozen=True, slots=True)
class Job:
    """One merge or one conversion."""

    name: str
    """Its name in reports; by default the path of its output."""

    request: Request | ConvertRequest
    line: int = 0
    """Line in the batch file, from 1; 0 if it is from no file."""

    @property
    def kind(self) -> Literal["merge", "convert"]:
        """The kind of its request."""
        return "merge" if isinstance(self.request, Request) else "convert"


def job_elsewhere(job: Job, n_workers: int) -> Job:
    """Return a job for another process of this machine, which has a share of the threads, or the same cluster.

    Args:
        job: as it was asked for.
        n_workers: threads, unless the job says how many.
    """
    match job.request:
        case Request(executor=executors.RAY) as request:
            return replace(job, request=replace(request, ray_address=cluster_for_others(request)))
        case Request() as request:
            return replace(job, request=replace(request, workers=request.workers or n_workers))
    return job
