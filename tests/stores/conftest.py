"""Object stores for tests: files of this machine, and a server of S3 in this process (moto)."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from lora_merge.storage.objects import StoreUrl, store_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from lora_merge.storage.objects import Store

BUCKET = "models"
KEY_ID, SECRET = "AKIATESTTESTTESTTEST", "wJalrXUtnFEMIK7MDENGbPxRfiCYtestsecret"


def environment_of(endpoint: str) -> Mapping[str, str]:
    """Return the variables with which a server on this machine is reached."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Let fixtures that live for the session speak to this machine, as tests with the mark ``loopback`` may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOCKETS", "loopback")
        yield


def client(endpoint: str) -> Any:
    """Return a client of boto3, to make buckets and to look at what the code under test did."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=Config(proxies={}, retries={"max_attempts": 1}),
    )


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """Start a server of S3 in this process, with one bucket; return its URL."""
    pytest.importorskip("flask_cors", reason="moto's server needs flask and flask-cors")
    server_module = pytest.importorskip("moto.server", reason="needs moto[s3]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with allowed():
        server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint
        server.stop()


@pytest.fixture
def moto(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set this process and its children up for moto; return boto3's client of it. Tests that use it are ``loopback``."""
    for name, value in environment_of(moto_endpoint).items():
        monkeypatch.setenv(name, value)
    return client(moto_endpoint)


@pytest.fixture
def s3_url(moto: Any) -> StoreUrl:
    """Return a folder of moto's bucket that no other test uses."""
    return StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.loopback)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> StoreUrl:
    """Return an empty folder in a store of each kind that runs in this process."""
    if request.param == "s3":
        found: StoreUrl = request.getfixturevalue("s3_url")
        return found
    return StoreUrl("file", "", str(tmp_path / "store").lstrip("/"))


@pytest.fixture
def store(url: StoreUrl) -> Store:
    """Return the store of `url`."""
    return store_at(url)


@pytest.fixture
def upload() -> Callable[[Path, StoreUrl], None]:
    """Return a function that puts every file of a directory into a folder of a store."""

    def put(root: Path, url: StoreUrl) -> None:
        target = store_at(url)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                target.put(path.relative_to(root).as_posix(), path.read_bytes())

    return put
