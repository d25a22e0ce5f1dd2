"""A hub on loopback, a cache in a temporary directory, and the real command in a process of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_merge import api
from tests.hub.server import Hub, start
from tests.hub.taking import WRITE_TOKEN, TakingHub
from tests.hub.uploads import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
REPO = "me/merged"

QUICK = frozenset({"test_remote_file.py", "test_stream_base.py", "test_uploads.py"})
"""Files whose tests run in this process, and take no time."""


def sums(root: Path) -> dict[str, str]:
    """Return name → SHA-256 of every file of a directory."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow the tests of this folder to speak to a hub of their own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.loopback)
            if item.path.name not in QUICK:
                item.add_marker(pytest.mark.system)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repos."""
    state = Hub()
    server = start(state)
    yield state
    for event in state.stall.values():
        event.set()
    server.shutdown()
    server.server_close()


def ask_here(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask the hub at an address, with an empty cache and without a token."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(hub, tmp_path, monkeypatch) -> Hub:
    """The same hub, asked by this process with an empty cache and without a token."""
    ask_here(hub.url, tmp_path / "hf", monkeypatch)
    return hub


@pytest.fixture
def uploads(tmp_path) -> Iterator[TakingHub]:
    """A hub that takes uploads, and has no repos."""
    state = TakingHub(root=tmp_path / "uploads")
    server = serve(state)
    yield state
    state.release()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["lfs", "xet"])
def taking(request, uploads, tmp_path, monkeypatch) -> TakingHub:
    """The hub that takes uploads, asked by this process with a token that can write; over LFS, then over xet."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _xet

    if request.param == "xet":
        pytest.importorskip("hf_xet")
    ask_here(uploads.url, tmp_path / "hf", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param != "xet")
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "hf" / "xet"))
    monkeypatch.setattr(hf_api.api, "endpoint", uploads.url)
    if hasattr(_xet, "XetSessionHolder"):  # a session keeps the folders that it was made with
        monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    settings = {"HF_HOME": tmp_path / "hf", "HF_XET_CACHE": tmp_path / "hf" / "xet", "HF_TOKEN": WRITE_TOKEN}
    for name, value in {**settings, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, str(value))
    return uploads


@pytest.fixture
def network(here) -> Iterator[Hub]:
    """The same hub, which redirects requests for weights to a storage network: another server."""
    server = start(here, is_network=True)
    yield here
    server.shutdown()
    server.server_close()


def settings_of(url: str, folder: Path) -> dict[str, str]:
    """Return the environment of a command: a hub, an empty cache, and no token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_"))}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(folder / "ms"),
        "HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """The environment of a command: this hub, an empty cache, nobody's token."""
    return settings_of(hub.url, tmp_path)


@pytest.fixture(params=["lfs", "xet"])
def pushing(request, uploads, tmp_path) -> dict[str, str]:
    """The environment of a command: the hub that takes uploads, and a token that can write; over LFS, then over xet."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")
    transfer = {"HF_HUB_DISABLE_XET": "1"} if request.param == "lfs" else {}
    return settings_of(uploads.url, tmp_path) | transfer | {"HF_TOKEN": WRITE_TOKEN}


def run_in(work: Path, environment: dict[str, str]) -> Callable[..., Any]:
    """Return a function that runs the real command in a directory, to its end."""
    work.mkdir()

    def run(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> Any:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "lora_merge", *map(str, arguments)],
            env=environment | (env or {}), cwd=work, capture_output=True, text=True, check=False, timeout=120, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def command(environment, tmp_path) -> Callable[..., Any]:
    """Return a function that runs the real command in an empty directory, to its end."""
    return run_in(tmp_path / "work", environment)


@pytest.fixture
def push_command(pushing, tmp_path) -> Callable[..., Any]:
    """Return the same function, for the hub that takes uploads."""
    return run_in(tmp_path / "work", pushing)


@pytest.fixture
def copied(tmp_path) -> Callable[..., Path]:
    """Return a function that copies a directory, so that files can be added to it."""

    def copy(source: Path, name: str) -> Path:
        target = tmp_path / "repos" / name
        shutil.copytree(source, target)
        return target

    return copy


@pytest.fixture
def branch(taking):
    """Return a function: name → SHA-256 of the files of a branch, without the one that each repo has."""

    def look(repo: str = REPO, revision: str = "main") -> dict[str, str]:
        files = taking.state()["repos"][repo]["refs"][revision]
        return {name: digest for name, digest in files.items() if name != ".gitattributes"}

    return look


@pytest.fixture
def base(pico):
    """Return a base in several shards."""
    return pico("llama", "bfloat16", "60KB")


@pytest.fixture
def options(base, pico_adapter):
    return ("--base", base, "--adapter", pico_adapter(base))


@pytest.fixture
def on_disk(options, tmp_path):
    """Return the files of the same merge on this disk, by a name whose end is that of the repo."""
    api.merge(base=options[1], adapter=options[3], out=tmp_path / "disk" / "merged")
    return sums(tmp_path / "disk" / "merged")
