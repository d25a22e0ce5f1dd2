"""Disks, caches and programs of a machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_merge.diagnosis.caches import hub_cache
from lora_merge.diagnosis.facts import Cache, Disk, Engine
from lora_merge.storage.copying import link
from lora_merge.storage.user_paths import nearest_existing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PROGRAMS: Final = (
    "vllm",
    "lmdeploy",
    "sglang",
    "llama-server",
    "llama-cli",
    "llama-quantize",
    "ollama",
    "mlx_lm.server",
)


def disks(environ: Mapping[str, str] = os.environ) -> tuple[Disk, ...]:
    """Return the current directory, the directory of temporary files, and the Hub's cache."""
    found = [
        _disk("current directory", Path.cwd, is_tried=True),
        _disk("temporary files", lambda: Path(tempfile.gettempdir())),
        _disk("Hub cache", lambda: nearest_existing(hub_cache(environ))),
    ]
    return tuple(disk for disk in found if disk is not None)


def _disk(name: str, place: object, *, is_tried: bool = False) -> Disk | None:
    """Return one directory; None where it cannot be looked at, as after the current directory was removed."""
    try:
        path: Path = place()  # type: ignore[operator]
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    can_write = os.access(path, os.W_OK)
    reflinks = _has_reflinks(path) if is_tried and can_write else None
    return Disk(name, str(path), _filesystem(path), usage.free, usage.total, can_write, reflinks)


def _has_reflinks(path: Path) -> bool | None:
    """Return True if files in a directory can share their blocks. Tries it on a small file; None if that fails."""
    try:
        with tempfile.TemporaryDirectory(prefix=".lora-merge-doctor-", dir=path) as made:
            source = Path(made, "source")
            source.write_bytes(b"\0" * 4096)
            fd = os.open(made, os.O_RDONLY)
            try:
                link(source, "target", "reflink", dir_fd=fd)
            except OSError:
                return False
            finally:
                os.close(fd)
            return True
    except OSError:
        return None


def _filesystem(path: Path) -> str:
    """Return the type of the filesystem that a directory is on; empty where the platform does not say."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
        real = str(path.resolve())
    except OSError:
        return ""
    best = ("", "")
    for line in lines:
        _, mount, kind, *_ = [*line.split(" "), "", "", ""]
        mount = mount.replace("\\040", " ")
        is_above = real == mount or real.startswith(mount.rstrip("/") + "/")
        if mount and is_above and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def caches(environ: Mapping[str, str] = os.environ) -> tuple[Cache, ...]:
    """Return the caches of hubs that exist."""
    modelscope = Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    places = (
        ("Hugging Face Hub", hub_cache(environ), "models--*"),
        ("ModelScope", modelscope, "hub/models/*/*"),
    )
    return tuple(_caches(places))


def _caches(places: tuple[tuple[str, Path, str], ...]) -> Iterator[Cache]:
    for name, path, pattern in places:
        try:
            if path.is_dir():
                yield Cache(name, str(path), sum(1 for one in path.glob(pattern) if one.is_dir()))
        except OSError:
            continue


def programs() -> tuple[Engine, ...]:
    """Return the programs of engines on the PATH."""
    return tuple(Engine(name, "", place) for name in _PROGRAMS if (place := shutil.which(name)))
