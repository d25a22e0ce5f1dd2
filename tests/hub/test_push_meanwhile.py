"""Pushes while something is wrong with the Hub or the network, and while others write to the same repo."""

from __future__ import annotations

import resource
import time

import pytest
from huggingface_hub import HfApi

from lora_merge import api
from lora_merge.cli import exits
from lora_merge.errors import RequestError
from tests.hub.conftest import REPO
from tests.hub.test_push import ok, refused

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    from lora_merge.storage.hub.uploads import failures

    monkeypatch.setattr(failures, "WAITS", (0.01, 0.01))


def before(monkeypatch, name, act):
    """Have something happen in front of the first call of a method of the pull request."""
    from lora_merge.storage.hub.uploads.pull_request import PullRequest

    method, calls = getattr(PullRequest, name), []

    def called(pull, *arguments, **named):
        if not calls:
            calls.append(name)
            act(pull)
        return method(pull, *arguments, **named)

    monkeypatch.setattr(PullRequest, name, called)


def commit_into(name, content=b"of somebody else"):
    def act(pull):
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, revision=pull.reference)

    return act


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestOthers:
    """What somebody else does while the run works. Nothing of it is published, and nothing is lost."""

    @pytest.mark.parametrize("when", ["add", "complete", "merge"])
    @pytest.mark.parametrize("name", ["extra.bin", SHARD])
    def test_a_commit_into_the_pull_request(self, when, name, options, cli, taking, branch, monkeypatch):
        before(monkeypatch, when, commit_into(name))
        said = refused(cli(*options, "--push-to-hub", REPO))
        assert "something else" in said or "is not the file that this run has written" in said
        assert branch() == {}

    @pytest.mark.parametrize("name", ["extra.bin", "README.md", SHARD])
    def test_a_commit_into_the_pull_request_of_an_interrupted_run(
        self, name, options, cli, taking, branch, on_disk, monkeypatch
    ):
        def stop(pull):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            before(patch, "merge", stop)
            assert cli(*options, "--push-to-hub", REPO).exit_code == exits.INTERRUPTED
        commit_into(name)(type("Pull", (), {"reference": "refs/pr/1"}))
        ok(cli(*options, "--push-to-hub", REPO, "--resume"))  # in another pull request
        assert branch() == on_disk
        pulls = taking.state()["repos"][REPO]["pull_requests"]
        assert [one["status"] for one in pulls.values()] == ["open", "merged"]

    def test_a_commit_into_the_pull_request_of_a_run_that_is_half_done(
        self, options, cli, taking, branch, monkeypatch
    ):
        def stop(pull):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            before(patch, "complete", stop)
            assert cli(*options, "--push-to-hub", REPO).exit_code == exits.INTERRUPTED
        commit_into("extra.bin")(type("Pull", (), {"reference": "refs/pr/1"}))
        said = refused(cli(*options, "--push-to-hub", REPO, "--resume"))
        assert "has other files than this run has written (extra.bin)" in said
        assert branch() == {}

    def test_a_pull_request_that_is_closed(self, options, cli, taking, branch, on_disk, monkeypatch):
        def close(pull):
            HfApi().change_discussion_status(REPO, pull.number, new_status="closed")

        with monkeypatch.context() as patch:
            before(patch, "complete", close)
            said = refused(cli(*options, "--push-to-hub", REPO))
        assert "closed" in said
        assert branch() == {}
        ok(cli(*options, "--push-to-hub", REPO, "--resume"))
        assert branch() == on_disk

    def test_a_branch_that_moves_in_the_moment_of_the_merge(self, options, cli, taking, branch, monkeypatch):
        """The merge is refused, and the branch has moved: that is no merge whose answer was lost."""
        from huggingface_hub import hf_api

        merge = hf_api.api.__class__.merge_pull_request

        def late(api, *arguments, **named):
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="README.md", repo_id=REPO)
            return merge(api, *arguments, **named)

        monkeypatch.setattr(hf_api.HfApi, "merge_pull_request", late)
        said = refused(cli(*options, "--push-to-hub", REPO))
        assert "something else writes there too" in said
        assert branch().keys() == {"README.md"}

    def test_a_file_that_comes_in_the_moment_of_the_merge_is_said(
        self, options, cli, taking, branch, on_disk, monkeypatch
    ):
        from huggingface_hub import hf_api

        merge = hf_api.api.__class__.merge_pull_request

        def late(api, *arguments, **named):
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="modeling.py", repo_id=REPO)
            return merge(api, *arguments, **named)

        monkeypatch.setattr(hf_api.HfApi, "merge_pull_request", late)
        said = refused(cli(*options, "--push-to-hub", REPO))
        assert "at the same moment (modeling.py)" in said

    def test_a_repo_that_is_deleted(self, options, cli, taking, on_disk, branch, monkeypatch):
        with monkeypatch.context() as patch:
            before(patch, "complete", lambda _pull: HfApi().delete_repo(REPO))
            said = refused(cli(*options, "--push-to-hub", REPO))
        assert "does not exist" in said
        ok(cli(*options, "--push-to-hub", REPO, "--resume"))
        assert branch() == on_disk


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestNoAnswer:
    """A Hub that cannot be reached is not waited for before anything is made."""

    def test_a_closed_port(self, options, cli, taking, monkeypatch):
        from huggingface_hub import constants, hf_api

        from lora_merge.storage.hub.uploads import failures

        monkeypatch.setattr(failures, "WAITS", (1000,))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        closed = "http://127.0.0.1:9"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(taking.url, closed)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", closed)
        monkeypatch.setattr(hf_api.api, "endpoint", closed)
        said = refused(cli(*options, "--push-to-hub", REPO))
        assert "the Hub cannot be reached" in said
        assert "HF_ENDPOINT" in said
        assert "--resume" not in said

    @pytest.mark.parametrize("endpoint", ["put", "commit", "merge"])
    def test_silence_ends_and_is_asked_again(
        self, endpoint, options, cli, taking, branch, on_disk, monkeypatch
    ):
        from huggingface_hub.utils import close_session

        from lora_merge.storage.hub.uploads import failures

        monkeypatch.setattr(failures, "SILENCE_SECONDS", 1.0)
        close_session()
        taking.plan(endpoint, stall=True)
        began = time.monotonic()
        ok(cli(*options, "--push-to-hub", REPO))
        close_session()
        assert time.monotonic() - began < 30
        assert branch() == on_disk


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
def test_python_pushes_without_a_directory(options, taking, branch, on_disk):
    report = api.merge(base=options[1], adapter=options[3], push_to_hub=REPO)
    assert report.pushed == f"{taking.url}/{REPO}"
    assert branch() == on_disk
    with pytest.raises(RequestError, match="out: is None, expected a path"):
        api.merge(base=options[1], adapter=options[3])


@pytest.mark.parametrize("way", ["spool", "stream"])
@pytest.mark.parametrize("taking", ["xet"], indirect=True)
def test_a_refusal_over_xet_names_what_it_may_be(way, options, cli, taking, branch, on_disk):
    """hf_xet does not hand on the Hub's sentence."""
    taking.plan("xet-token", status=403, times=-1, message="Private repository storage limit reached")
    said = refused(cli(*options, "--push-to-hub", REPO, "--upload", way))
    assert "no storage is left, or the token may not write there" in said
    assert "settings/billing" in said
    assert "--resume" in said
    taking.plans.clear()
    ok(cli(*options, "--push-to-hub", REPO, "--upload", way, "--resume"))
    assert branch() == on_disk


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
@pytest.mark.parametrize("folder", ["missing", "/proc"])
def test_a_folder_for_the_spool_that_cannot_be_written_to(
    folder, options, cli, taking, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path / folder))
    said = refused(cli(*options, "--push-to-hub", REPO))
    assert f"TMPDIR is {tmp_path / folder}" in said
    assert not taking.written


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
@pytest.mark.parametrize(
    ("role", "words"), [("base", "which is the repo of the base"), ("adapter", "is not an earlier output")]
)
def test_an_output_does_not_replace_what_it_is_made_of(role, words, options, cli, taking, branch):
    HfApi().create_repo(REPO)
    HfApi().upload_folder(
        repo_id=REPO, folder_path=options[1 if role == "base" else 3], ignore_patterns=["README.md"]
    )
    before = branch()
    arguments = ["--base", options[1], "--adapter", options[3]]
    arguments[1 if role == "base" else 3] = REPO
    said = refused(cli(*arguments, "--push-to-hub", REPO, "--overwrite"))
    assert words in said
    assert branch() == before
    ok(cli(*arguments, "--push-to-hub", REPO, "--revision", "merged", "--overwrite", "--dry-run"))


@pytest.mark.parametrize("pushing", ["lfs"], indirect=True)
def test_a_disk_that_takes_no_more_of_the_spool(options, push_command, uploads):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = push_command(*options, "--push-to-hub", REPO, preexec_fn=limited)
    assert done.returncode == exits.WRITE, done.stderr
    assert "File too large" in done.stderr
    assert "set TMPDIR to a disk with room" in done.stderr
    assert uploads.state()["repos"][REPO]["refs"]["main"].keys() == {".gitattributes"}
