"""Real servers of object stores for tests, as processes on loopback: SeaweedFS for S3, Azurite for Azure.

``make stores-servers`` installs them. A test that needs one is skipped where it is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
HOW = "make stores-servers installs it"
SECONDS = 60


def weed() -> Path:
    """Return the program of SeaweedFS, or skip the test."""
    named = os.environ.get("LORA_MERGE_WEED") or str(ROOT / ".venv-stores" / "bin" / "weed")
    if not Path(named).is_file():
        pytest.skip(f"SeaweedFS is not installed ({HOW})")
    return Path(named)


def azurite() -> Path:
    """Return the program of Azurite, or skip the test."""
    default = ROOT / ".venv-stores" / "node_modules" / ".bin" / "azurite-blob"
    named = Path(os.environ.get("LORA_MERGE_AZURITE") or default)
    if not named.exists() or shutil.which("node") is None:
        pytest.skip(f"Azurite is not installed ({HOW})")
    return named


def free_ports(count: int, most: int = 50_000) -> list[int]:
    """Return ports that nothing listens on; SeaweedFS adds 10 000 for a second protocol."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            found += [port] if port < most else []
    return found


@contextlib.contextmanager
def running(command: Sequence[object], port: int, log: Path) -> Iterator[None]:
    """Run a server, from when it listens to the end of the block.

    Raises:
        RuntimeError: it does not listen.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=output, cwd=log.parent
        )
        try:
            _wait_for(port, process, log)
            yield
        finally:
            # Its data go with the test's directory.
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"no server on port {port}:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def seaweed(root: Path, key_id: str, secret: str, n_volumes: int = 100) -> Iterator[str]:
    """Run SeaweedFS, which keeps volumes of 256 MB; yield the URL of its S3."""
    credentials = [{"accessKey": key_id, "secretKey": secret}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (root / "data").mkdir()
    (root / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = dict(zip(names, free_ports(4), strict=True))
    command: list[object] = [
        weed(), "server", f"-dir={root / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
        f"-s3.config={root / 's3.json'}", f"-volume.max={n_volumes}", "-master.volumeSizeLimitMB=256",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port + 10_000}" for name, port in ports.items()),
    ]  # fmt: skip
    with running(command, ports["s3"], root / "log"):
        yield f"http://127.0.0.1:{ports['s3']}"


@contextlib.contextmanager
def azure(root: Path) -> Iterator[str]:
    """Run Azurite; yield the URL of its account."""
    (port,) = free_ports(1)
    command = [
        "node",
        azurite(),
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        port,
        "--location",
        root,
        "--skipApiVersionCheck",
    ]
    with running([*command, "--silent"], port, root / "log"):
        yield f"http://127.0.0.1:{port}/devstoreaccount1"
