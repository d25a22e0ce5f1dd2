"""Ranges of a file of the Hub: which bytes come, who gets the token, and what is said when they do not come."""

from __future__ import annotations

import pytest

from lora_merge.errors import ChangedError, CheckpointError
from lora_merge.storage.hub import remote_file as module
from lora_merge.storage.hub.remote_file import RemoteFile, use_token
from lora_merge.storage.source import HubFile
from lora_merge.storage.sources import open_source, version_at

TOKEN = "hf_" + "secretword" * 3
NAME = "model.safetensors"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Wait for no time between tries."""
    monkeypatch.setattr(module, "WAITS", (0, 0))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    return folder


@pytest.fixture
def remote(here, root):
    repo = here.add("org/base", root)
    use_token("org/base", None)
    return RemoteFile(HubFile("org/base", repo.commits["main"], NAME))


def test_a_range_has_its_bytes_and_nothing_else_is_sent(remote, here):
    version = remote.version()
    assert (version.size, bool(version.tag)) == (len(CONTENT), True)
    assert bytes(remote.fetch(version, 300, 1000)) == CONTENT[300:1000]
    assert here.sent == {NAME: 700}


@pytest.mark.parametrize("fault", ["cut", "busy"])
def test_an_answer_that_breaks_off_or_is_refused_for_a_moment_is_asked_for_again(fault, remote, here):
    version = remote.version()
    getattr(here, fault)[NAME] = 2
    assert bytes(remote.fetch(version, 0, 500)) == CONTENT[:500]
    assert getattr(here, fault)[NAME] == 0


def test_a_server_that_stays_busy_is_named_with_the_number_of_tries(remote, here):
    version = remote.version()
    here.failing[NAME] = 503
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1 answered with status 503, after 2 retries"):
        remote.fetch(version, 0, 5)


def test_an_answer_that_never_comes_whole_is_named(remote, here):
    version = remote.version()
    here.cut[NAME] = 9
    with pytest.raises(
        CheckpointError, match=rf"{NAME}: .* does not answer \(RemoteProtocolError\), after 2"
    ):
        remote.fetch(version, 0, 500)


def test_an_answer_with_fewer_bytes_than_were_asked_for_is_not_filled_up(remote, here):
    version = remote.version()
    here.short.add(NAME)
    with pytest.raises(CheckpointError, match="the answer has 250 bytes, expected 500, after 2 retries"):
        remote.fetch(version, 0, 500)


@pytest.mark.parametrize("content", [CONTENT[:100], CONTENT + b"more"], ids=["shorter", "longer"])
def test_a_file_of_another_size_has_changed(content, remote, root):
    version = remote.version()
    (root / NAME).write_bytes(content)
    with pytest.raises(ChangedError, match="changed while it was read"):
        remote.fetch(version, 200, 300)


def test_a_file_with_another_tag_has_changed_where_it_is_looked_up_again(network, root):
    commit = network.add("org/base", root).commits["main"]
    remote = RemoteFile(HubFile("org/base", commit, NAME))
    version = remote.version()
    (root / NAME).write_bytes(CONTENT[::-1])
    network.signature += 1
    with pytest.raises(ChangedError, match="changed while it was read"):
        remote.fetch(version, 200, 300)
    (root / NAME).unlink()
    network.signature += 1
    with pytest.raises(ChangedError, match="disappeared while it was read"):
        remote.fetch(version, 200, 300)


def test_a_server_without_ranges_is_named(remote, here):
    version = remote.version()
    here.rangeless.add(NAME)
    with pytest.raises(CheckpointError, match=r"does not serve ranges of it, expected .* 206") as caught:
        remote.fetch(version, 0, 5)
    assert "leave out --stream-base" in caught.value.hint
    # A file that is wanted as a whole may come so.
    assert bytes(remote.fetch(version, 0, len(CONTENT))) == CONTENT


def test_the_token_is_sent_to_the_hub_and_not_to_its_storage_network(network, root):
    commit = network.add("org/private", root, token=TOKEN).commits["main"]
    remote = RemoteFile(HubFile("org/private", commit, NAME))
    use_token("org/private", TOKEN)
    version = remote.version()
    assert bytes(remote.fetch(version, 10, 20)) == CONTENT[10:20]
    assert network.headers[-1]["Authorization"] == f"Bearer {TOKEN}"
    assert network.network_headers
    assert not any(TOKEN in repr(headers) for headers in network.network_headers)


def test_the_token_is_sent_where_the_hub_serves_the_bytes_itself(here, root):
    commit = here.add("org/private", root, token=TOKEN).commits["main"]
    remote = RemoteFile(HubFile("org/private", commit, NAME))
    use_token("org/private", TOKEN)
    assert bytes(remote.fetch(remote.version(), 10, 20)) == CONTENT[10:20]


def test_where_a_file_is_is_asked_once_and_again_when_its_address_has_expired(network, root):
    commit = network.add("org/base", root).commits["main"]
    remote = RemoteFile(HubFile("org/base", commit, NAME))
    use_token("org/base", None)
    version = remote.version()
    for start in (0, 50, 100):
        remote.fetch(version, start, start + 50)
    assert len(network.requests) == 1
    network.signature += 1
    assert bytes(remote.fetch(version, 10, 20)) == CONTENT[10:20]
    assert len(network.requests) == 2


def test_a_storage_network_that_refuses_every_address_is_named_without_the_signature(network, root):
    commit = network.add("org/base", root).commits["main"]
    remote = RemoteFile(HubFile("org/base", commit, NAME))
    version = remote.version()
    network.failing[NAME] = 403
    with pytest.raises(CheckpointError, match="answered with status 403") as caught:
        remote.fetch(version, 0, 5)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(None, "the Hub has no such repo, or it is private"), ("hf_wrong", "the Hub does not accept the token")],
)
def test_a_refusal_of_the_hub_is_said_in_its_words_without_the_token(given, sentence, here, root):
    commit = here.add("org/private", root, token=TOKEN).commits["main"]
    use_token("org/private", given)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        RemoteFile(HubFile("org/private", commit, NAME)).version()
    assert "hf_wrong" not in str(caught.value)


def test_a_text_names_a_file_and_a_missing_one_is_said(here, root):
    commit = here.add("org/base", root).commits["main"]
    with open_source(f"hf://org/base@{commit}/{NAME}") as source:
        buffer = memoryview(bytearray(8))
        assert source.read_into(buffer, 256) == 8
        assert (bytes(buffer), source.fd) == (CONTENT[:8], None)
        assert version_at(source.text) == source.version
    with (
        pytest.raises(CheckpointError, match="other: does not exist"),
        open_source(f"hf://org/base@{commit}/other"),
    ):
        pass
    with pytest.raises(FileNotFoundError):
        version_at(f"hf://org/base@{commit}/other")
