"""What is known of a Ray cluster without Ray: addresses, demands, and the errors of nodes."""

from __future__ import annotations

import sys

import pytest

from lora_merge.core.identity import FileIdentity, InputFile, Inputs
from lora_merge.errors import PackageError
from lora_merge.executors import choices, pick
from lora_merge.executors.ray import Demand, connect, driving, run_ray
from lora_merge.executors.ray.address import parse_address
from lora_merge.merging.on_cluster import lock_of, seen_elsewhere

DEMAND = Demand(100_000_000, retries=1)


def test_the_name_can_be_asked_for():
    assert "ray" in choices()
    assert pick(4, name="ray", demand=DEMAND).func is run_ray
    assert pick(4, "cuda:0", "ray", DEMAND).keywords == {"demand": DEMAND}


@pytest.mark.parametrize("text", ["auto", "local", "10.0.0.5:6379", "head.example:6379", "[::1]:6379"])
def test_addresses_that_are_taken(text):
    assert parse_address(text) == text


@pytest.mark.parametrize("text", ["", "10.0.0.5", "a b:1", "user@host:1", 6379, None])
def test_addresses_that_are_not(text):
    with pytest.raises(ValueError, match="expected auto, local or HOST:6379"):
        parse_address(text)


def test_packages_that_a_node_lacks_are_named():
    error = driving._lost(
        _Ray, RuntimeError("x\nModuleNotFoundError: No module named 'lora_merge'"), object(), DEMAND
    )
    assert isinstance(error, PackageError)
    assert "No module named 'lora_merge'" in str(error)


class _Ray:
    class exceptions:  # noqa: N801 - as Ray calls it
        class OutOfMemoryError(Exception): ...


def test_a_package_that_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        PackageError, match="--executor ray needs the package ray, which is not installed"
    ) as caught:
        connect("auto")
    assert caught.value.hint == 'pip install "lora-merge[ray]"'


def test_a_gpu_is_asked_for_where_the_device_is_one():
    assert DEMAND.resources == {"CPU": 1, "memory": 1e8}
    assert Demand(1, device="cuda:0").resources == {"CPU": 1, "memory": 1, "GPU": 1}
    assert DEMAND.fits({"CPU": 8.0, "memory": 1e9})
    assert not DEMAND.fits({"memory": 1e9})
    assert not DEMAND.fits({"CPU": 1, "memory": 1e6})


def test_a_copy_of_an_input_on_a_node_is_the_input_where_size_and_time_are_equal():
    known = Inputs(
        {
            "/a": InputFile(FileIdentity(1, 2, 3, 4, 5)),
            "s3://b/c": InputFile(FileIdentity(0, 0, 3, 0, 0, "x")),
        }
    )
    sent = seen_elsewhere(known)
    assert sent.files["/a"].may_be(FileIdentity(9, 9, 3, 4, 9))
    assert not sent.files["/a"].may_be(FileIdentity(1, 2, 3, 9, 5))
    assert sent.files["s3://b/c"] == known.files["s3://b/c"]


def test_only_an_output_on_a_filesystem_has_to_be_seen_by_each_node():
    assert lock_of("file:///shared/out") == "/shared/out.lora-merge-staging/run.json"
    assert lock_of("s3://models/out") == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda:1"], "device: is cuda:1, but Ray gives each task a GPU, which is its first one"),
        (["--retries", "-1"], "is not a number of retries"),
        (["--ray-address", "10.0.0.5"], "is not an address of a Ray cluster"),
        (["--memory-limit", "1MB", "--dry-run"], "memory_limit: is 1.0 MB, but one task needs about"),
        (["--link", "hard", "--dry-run"], "link: is hard, but"),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(pico, pico_adapter, cli, tmp_path, options, sentence):
    base = pico()
    merge = ["--base", base, "--adapter", pico_adapter(base), "--out", tmp_path / "out", "--executor", "ray"]
    result = cli(*merge, *options)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_dry_run_needs_no_cluster(pico, pico_adapter, cli, tmp_path):
    base = pico()
    result = cli(
        "--base",
        base,
        "--adapter",
        pico_adapter(base),
        "--out",
        tmp_path / "out",
        "--executor",
        "ray",
        "--dry-run",
    )
    assert result.exit_code == 0, result.output
