"""Groups of options: the order and the headings of every help page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Group:
    """Options under one heading."""

    title: str

    names: tuple[str, ...]
    """Options by their fields. ``verify:dtype`` is ``dtype`` of the command ``verify`` alone."""

    rare: tuple[str, ...] = ()
    """Options that the short help names without an explanation."""


_HELP: Final = ("help", "_click_default_help")
"""The name of ``--help``, in the versions of click."""

GROUPS: Final[tuple[Group, ...]] = (
    Group(
        "Base and adapters",
        ("base", "adapter", "tuned", "combine"),
        ("config", "density", "seed", "base_is", "expert_layout", "ignore_file"),
    ),
    Group(
        "LoRA",
        ("rank", "energy", "pad_rank", "to_lora", "target", "save_modules", "bake_scale", "expand_targets"),
        ("rename", "experts"),
    ),
    Group(
        "Forward pass",
        (
            "forward",
            "verify:dtype",
            "verify:engine",
            "engine_python",
            "prompt",
            "n_tokens",
            "tolerance",
            "trust_remote_code",
        ),
    ),
    Group(
        "Output",
        ("out", "push_to_hub", "serving", "format", "dtype", "overwrite", "resume"),
        (
            "max_shard_size",
            "link",
            "copies",
            "revision",
            "visibility",
            "create_pr",
            "commit_message",
            "upload",
            "spool_limit",
        ),
    ),
    Group("Quantised models", ("quantize", "out_storage"), ("ignore", "merge:rounding", "plan:rounding")),
    Group(
        "Checks",
        ("dry_run", "explain", "survival", "keep_going", "level", "verify"),
        ("verify:rounding", "no_verify", "allow_loss", "allow_untie", "allow_svd", "allow_again"),
    ),
    Group(
        "Machine, cluster and Hub",
        ("device", "jobs"),
        (
            "offline",
            "stream_base",
            "token",
            "memory_limit",
            "workers",
            "executor",
            "ray_address",
            "retries",
            "part",
            "seal",
        ),
    ),
    Group(
        "Messages",
        ("full", "plot", "report", "json", "log_file", "quiet", "verbose"),
        ("profile", "strict", *_HELP),
    ),
)
"""Every option is in one group. One that no group names is listed last, as "Other"."""

OTHER: Final = "Other"


OF_THE_GROUP: Final = ("--help-all", "--version")
"""Options of ``lora-merge`` itself; the short help names them at its end."""


@dataclass(frozen=True, slots=True)
class Listed:
    """The options of one command in one group."""

    title: str
    common: tuple[click.Parameter, ...]
    rare: tuple[click.Parameter, ...]

    @property
    def all(self) -> tuple[click.Parameter, ...]:
        """The common options, then the others."""
        return self.common + self.rare


def grouped(verb: str, parameters: Sequence[click.Parameter]) -> list[Listed]:
    """Return the options of a command in groups, in the order of `GROUPS`; groups without an option are left out."""
    left = list(parameters)
    found = []
    for group in GROUPS:
        common, rare = (_taken(verb, names, left) for names in (group.names, group.rare))
        if common or rare:
            found.append(Listed(group.title, common, rare))
    return [*found, Listed(OTHER, tuple(left), ())] if left else found


def _taken(verb: str, names: Iterable[str], left: list[click.Parameter]) -> tuple[click.Parameter, ...]:
    """Return the options with these names, in the order of the names, and remove them from the list."""
    found = []
    for name in names:
        only, _, field = name.rpartition(":")
        if only in {"", verb}:
            found += [one for one in left if one.name == field]
            left[:] = [one for one in left if one.name != field]
    return tuple(found)
