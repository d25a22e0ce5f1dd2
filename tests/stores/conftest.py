"""Object stores for tests: files of this machine, and a server of S3 in this process (moto)."""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.client
import logging
import os
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from lora_merge.storage.objects import StoreUrl, s3_client, store_at
from tests.stores import servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from lora_merge.storage.objects import Store

BUCKET = "models"
KEY_ID, SECRET = "AKIATESTTESTTESTTEST", "wJalrXUtnFEMIK7MDENGbPxRfiCYtestsecret"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite: its documentation has it."""


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


@pytest.fixture(scope="session")
def seaweed_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start SeaweedFS, a real server that keeps checksums, with one bucket; return its URL."""
    with allowed(), servers.seaweed(tmp_path_factory.mktemp("seaweed"), KEY_ID, SECRET) as endpoint:
        made_within(30, lambda: client(endpoint).create_bucket(Bucket=BUCKET))
        yield endpoint


@pytest.fixture
def seaweed(seaweed_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set this process and its children up for SeaweedFS; return boto3's client of it."""
    for name, value in environment_of(seaweed_endpoint).items():
        monkeypatch.setenv(name, value)
    return client(seaweed_endpoint)


@pytest.fixture
def seaweed_url(seaweed: Any) -> StoreUrl:
    """Return a folder of SeaweedFS's bucket that no other test uses."""
    return StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def azure_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Azurite, the emulator of Azure's blobs, with one container; return the URL of its account."""
    with allowed(), servers.azure(tmp_path_factory.mktemp("azurite")) as endpoint:
        make_container(endpoint, BUCKET)
        yield endpoint


@pytest.fixture
def azure_url(azure_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> StoreUrl:
    """Set this process up for Azurite; return a folder of its container that no other test uses."""
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_endpoint)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURITE_KEY)
    return StoreUrl("az", BUCKET, f"t/{uuid4().hex[:12]}")


def made_within(seconds: float, make: Callable[[], object]) -> None:
    """Call a function until it succeeds: a server listens some time before it works."""
    end = time.monotonic() + seconds
    while True:
        try:
            make()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return


def make_container(endpoint: str, name: str) -> None:
    """Create a container of Azure, which obstore cannot: one request, signed with the emulator's key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    path = urlsplit(endpoint).path
    lines = [
        "PUT",
        *[""] * 11,
        f"x-ms-date:{date}",
        f"x-ms-version:{version}",
        f"/devstoreaccount1{path}/{name}",
        "restype:container",
    ]
    signature = hmac.new(base64.b64decode(AZURITE_KEY), "\n".join(lines).encode(), "sha256").digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Content-Length": "0",
        "Authorization": f"SharedKey devstoreaccount1:{base64.b64encode(signature).decode()}",
    }
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=30)
    connection.request("PUT", f"{path}/{name}?restype=container", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 201, answer.read()


@pytest.fixture
def s3_url(moto: Any) -> StoreUrl:
    """Return a folder of moto's bucket that no other test uses."""
    return StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}")


SLOW = (pytest.mark.loopback, pytest.mark.slow)


@pytest.fixture(
    params=[
        "file",
        pytest.param("s3_url", marks=pytest.mark.loopback),
        pytest.param("s3_url without boto3", marks=(pytest.mark.loopback, pytest.mark.crossed)),
        pytest.param("seaweed_url", marks=SLOW),
        pytest.param("seaweed_url without boto3", marks=SLOW),
        pytest.param("azure_url", marks=SLOW),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreUrl:
    """Return an empty folder in a store of each kind."""
    fixture, _, without = request.param.partition(" without ")
    if without:
        monkeypatch.setattr(s3_client, "is_installed", lambda: False)
        # Another variable, another connection: those that boto3 has credentials for are kept.
        monkeypatch.setenv("AWS_TESTED_WITHOUT", "boto3")
    if fixture != "file":
        found: StoreUrl = request.getfixturevalue(fixture)
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
