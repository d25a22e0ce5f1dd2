"""Lets the torchvision of a package index, which is built for CUDA, be imported beside a torch for CPUs.

Its Python side describes operators whose C++ side did not load; it is enough that they exist. The transforms, which
image processors use, run. As a program it puts itself into the environment of its interpreter, where a ``.pth`` file
installs it at every start.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from pathlib import Path

OPERATORS = ("nms", "qnms")
_kept: list[object] = []
"""The operators are gone when the library object is."""


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; defines the operators when torchvision is looked for."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        del path, target
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_finder = _BeforeTorchvision()


def install() -> None:
    """Stand in the way of the first import of torchvision; said twice, it holds once."""
    if not _kept and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    name = Path(__file__).stem
    shutil.copy(__file__, packages)
    (packages / f"{name}.pth").write_text(f"import {name}; {name}.install()\n")


if __name__ == "__main__":
    main()
