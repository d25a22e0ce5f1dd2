"""One step → bytes: read, decode, apply, encode, fill. It knows neither the schedule nor the destination.

`merger` is the loop over the tiles of a tensor; `host` says which weights it merges without torch, `plain` and `coded` how; `workbench` has the
buffers that a tile passes through with torch, on the CPU or on a GPU; `tiling` says how large a tile is; `changing` applies the deltas; `sample` sees what the stored dtype keeps of them; `copying` moves what
no delta touches; `devices` sets torch up, and `stopwatch` knows where the time went. `specs` has what workers
are made from, and the workers that executors run; those of `file_work` make whole files.
"""

from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.devices import (
    NoDeviceError,
    TorchLoading,
    pick_device,
    short_switch_interval,
)
from lora_merge.merging.worker.file_work import FilePiece, FileSpec
from lora_merge.merging.worker.host import is_hosted, needs_torch
from lora_merge.merging.worker.merger import Merger, Order, alike
from lora_merge.merging.worker.sample import SAMPLE_ELEMENTS
from lora_merge.merging.worker.specs import CopySpec, MergeSpec, parted
from lora_merge.merging.worker.tiling import tiles_of

__all__ = [
    "SAMPLE_ELEMENTS",
    "CopySpec",
    "FilePiece",
    "FileSpec",
    "MergeSpec",
    "Merger",
    "NoDeviceError",
    "Order",
    "TorchLoading",
    "alike",
    "copy",
    "is_hosted",
    "needs_torch",
    "parted",
    "pick_device",
    "short_switch_interval",
    "tiles_of",
]
