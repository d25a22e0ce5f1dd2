"""Torch's library, loaded beside Python's work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_merge.runtime import libtorch

PROGRAM = """
import sys
from pathlib import Path
from lora_merge.runtime import libtorch

libtorch.load_beside()
libtorch.wait()
maps = Path("/proc/self/maps").read_text()
assert "libtorch_cpu.so" in maps
assert "torch" not in sys.modules
import torch
# One copy of it, and the one that `import torch` uses.
loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtorch_cpu" in line}
assert loaded == {str(Path(torch.__file__).parent.resolve() / "lib" / "libtorch_cpu.so")}, loaded
assert (torch.eye(3) @ torch.ones(3)).tolist() == [1, 1, 1]
"""

FILES = ("libtorch_global_deps.so", "libtorch_cpu.so")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return a function that puts a torch with some libraries before the installed one."""

    def made(*libraries: str):
        folder = tmp_path / "torch" / "lib"
        folder.mkdir(parents=True)
        (tmp_path / "torch" / "__init__.py").touch()
        for name in libraries:
            (folder / name).touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        return [folder / name for name in FILES]

    return made


@pytest.mark.skipif(sys.platform != "linux" or not libtorch._paths(), reason="another build of torch")
def test_import_torch_finds_the_library_loaded():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_a_build_for_the_cpu_is_loaded_in_the_order_of_torch(build):
    assert build(*FILES) == libtorch._paths()


def test_under_a_limit_of_memory_nothing_is_begun():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36));"
        "from lora_merge.runtime import libtorch; libtorch.load_beside(); assert not libtorch._loading"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("other", libtorch._OTHERS)
def test_builds_for_devices_are_left_to_torch(build, other):
    build(*FILES, other)
    assert libtorch._paths() == []


def test_a_build_without_these_libraries_is_left_to_torch(build):
    build(FILES[1])
    assert libtorch._paths() == []


def test_where_torch_is_loaded_nothing_is_begun():
    import torch  # noqa: F401

    libtorch.load_beside()
    assert libtorch._loading == []


WATCHED = """
import importlib.machinery, sys
from lora_merge.runtime import libtorch

loaded, before = [], len(sys.modules)
create = importlib.machinery.ExtensionFileLoader.create_module
def noted(self, spec):
    loaded.append(spec.name)
    return create(self, spec)
importlib.machinery.ExtensionFileLoader.create_module = noted
load, wait = libtorch._load, libtorch.wait
def loading(paths):
    loaded.append("libtorch")
    load(paths)
def waiting():
    loaded.append("waiting")
    wait()
libtorch._load, libtorch.wait = loading, waiting

from lora_merge.cli import main
try:
    main()
finally:
    between = loaded[loaded.index("libtorch") + 1 : loaded.index("waiting")]
    # These are large packages, which not every command needs, and numpy is the last before torch.
    print("BETWEEN", *(name for name in between if not name.startswith(("numpy", "yaml"))), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux" or not libtorch._paths(), reason="another build of torch")
def test_meanwhile_no_module_waits_for_the_dynamic_linker(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16", "40KB")
    command = ["--base", base, "--adapter", pico_adapter(base, use_dora=True), "--out", tmp_path / "out"]
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, command)], check=True, capture_output=True, text=True
    )
    assert found.stderr.splitlines()[-1].split() == ["BETWEEN"]
