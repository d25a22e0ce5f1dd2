"""Tasks on a Ray cluster: one piece of work each, on any node.

`cluster` connects to it; `driving` hands out tasks and takes their results; `task` is what runs on a node.
"""

from lora_merge.executors.ray.cluster import address_for_children, connect, held
from lora_merge.executors.ray.demand import Demand
from lora_merge.executors.ray.driving import run_ray

__all__ = ["Demand", "address_for_children", "connect", "held", "run_ray"]
