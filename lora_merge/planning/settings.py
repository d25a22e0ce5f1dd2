"""What the user decides about a merge: how base and adapters are read, and how they are merged."""

from __future__ import annotations

from dataclasses import dataclass

from lora_merge.requests.choices import BaseIs, OutputDtype, OutputStorage, RoundingMethod


@dataclass(frozen=True, slots=True)
class Reading:
    """How adapters and their base are read where their files do not tell; every verb that joins the two has one.

    The fields are those of `lora_merge.requests.request.Request`.
    """

    base_is: BaseIs | None = None
    expert_layout: tuple[str, ...] = ()
    allow_svd: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """What only a merge decides. The fields are those of `lora_merge.requests.request.Request`."""

    combine: str = "linear"
    density: float = 0.5
    seed: int = 0
    dtype: OutputDtype | None = None
    max_shard_size: str | int | None = None
    out_storage: OutputStorage | None = None
    quantize: str | None = None
    ignore: tuple[str, ...] = ()
    rounding: RoundingMethod | None = None
    allow_untie: bool = False
    allow_again: bool = False
