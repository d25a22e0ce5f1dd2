"""The hub that takes uploads, asked by the Hub's own client: repos, commits, pull requests, transfers, and each fault once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from tests.hub import asking
from tests.hub.conftest import ROOT
from tests.hub.taking import READ_TOKEN, WRITE_TOKEN, TakingHub

REPO, WEIGHTS = "me/merged", "model.safetensors"
CONTENT = os.urandom(300_001)
over_lfs = pytest.mark.parametrize("taking", ["lfs"], indirect=True)


@pytest.fixture
def api(taking):
    return HfApi()


@pytest.fixture
def repo(taking, api):
    api.create_repo(REPO, private=True)
    return taking.written[REPO]


@pytest.fixture
def waits(monkeypatch):
    """Wait for no time between tries; return how long each would have been."""
    seconds: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", seconds.append)
    return seconds


def add(name, content=CONTENT):
    return CommitOperationAdd(name, content)


def commit(api, *operations, **options):
    return api.create_commit(REPO, list(operations), commit_message="Weights", **options)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def download(name, **options):
    with open(hf_hub_download(REPO, name, **options), "rb") as file:  # noqa: PTH123
        return file.read()


def test_what_was_uploaded_is_listed_and_comes_back(taking, api, repo, request):
    made = commit(api, add(WEIGHTS), add("config.json", b"{}"), add("deep/er/a.txt", b"text"))
    entries = {each.path: each for each in api.list_repo_tree(REPO, recursive=True)}
    assert set(entries) == {".gitattributes", WEIGHTS, "config.json", "deep", "deep/er", "deep/er/a.txt"}
    weights = entries[WEIGHTS]
    assert (weights.lfs.sha256, weights.lfs.size, weights.size) == (
        sha256(CONTENT),
        len(CONTENT),
        len(CONTENT),
    )
    assert bool(weights.xet_hash) == ("[xet]" in request.node.name) == (not taking.asked("put"))
    assert entries["config.json"].lfs is None
    assert {each.path for each in api.list_repo_tree(REPO, "deep")} == {"deep/er"}
    assert download(WEIGHTS) == download(WEIGHTS, revision=made.oid) == CONTENT
    assert download("deep/er/a.txt") == b"text"
    assert taking.state()["repos"][REPO]["commits"][-1]["operations"] == 3


def test_a_file_is_sent_once_and_a_commit_names_it_later(taking, api, repo):
    operation = add(WEIGHTS)
    api.preupload_lfs_files(REPO, [operation])
    assert operation.path_or_fileobj == b""
    transfers = len(taking.asked("put") + taking.asked("xet-token"))
    commit(api, operation)
    assert len(taking.asked("put") + taking.asked("xet-token")) == transfers == 1
    assert download(WEIGHTS) == CONTENT
    assert commit(api, add(WEIGHTS)).oid == repo.refs["main"]
    assert taking.asked("commit") == [200]


def test_a_pull_request_is_filled_and_merged(taking, api, repo):
    pull = commit(api, add("a.safetensors"), create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    commit(api, add("b.safetensors", CONTENT[::-1]), revision=pull.pr_revision)
    state = taking.state()["repos"][REPO]
    assert set(state["refs"]["main"]) == {".gitattributes"}
    assert state["refs"]["refs/pr/1"].items() > {"a.safetensors": sha256(CONTENT)}.items()
    assert api.model_info(REPO, revision="refs/pr/1").sha == repo.refs["refs/pr/1"] != repo.refs["main"]
    assert download("b.safetensors", revision="refs/pr/1") == CONTENT[::-1]
    (found,) = api.get_repo_discussions(
        REPO, author="me", discussion_type="pull_request", discussion_status="open"
    )
    assert (found.num, found.title, found.status) == (1, "Weights", "open")
    api.merge_pull_request(REPO, 1, comment="whole and verified")
    details = api.get_discussion_details(REPO, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", repo.refs["main"])
    assert [each.type for each in details.events] == [
        "comment",
        "commit",
        "commit",
        "comment",
        "status-change",
    ]
    assert download("a.safetensors") == CONTENT
    assert taking.state()["repos"][REPO]["commits"][-1]["title"] == "Weights (#1)"
    with pytest.raises(HfHubHTTPError, match="the status is merged"):
        api.merge_pull_request(REPO, 1)
    assert list(api.get_repo_discussions(REPO, discussion_status="open")) == []


@over_lfs
def test_a_pull_request_is_closed_opened_again_named_and_commented(api, repo):
    assert api.create_pull_request(REPO, "Later").status == "draft"
    with pytest.raises(HfHubHTTPError, match="the status is draft"):
        api.merge_pull_request(REPO, 1)
    assert api.change_discussion_status(REPO, 1, "closed", comment="no").new_status == "closed"
    assert [each.num for each in api.get_repo_discussions(REPO, discussion_status="closed")] == [1]
    with pytest.raises(HfHubHTTPError, match="The pull request is closed"):
        commit(api, add(WEIGHTS), revision="refs/pr/1")
    assert api.change_discussion_status(REPO, 1, "open").new_status == "open"
    assert api.rename_discussion(REPO, 1, "Now").new_title == "Now"
    assert api.comment_discussion(REPO, 1, "a word").content == "a word"
    assert [each.title for each in api.get_repo_discussions(REPO, author="else")] == []


@over_lfs
def test_a_pull_request_whose_files_the_target_has_changed_cannot_be_merged(api, repo):
    commit(api, add("a.txt", b"mine"), create_pr=True)
    commit(api, add("a.txt", b"theirs"))
    assert api.get_discussion_details(REPO, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"files with conflicts: a\.txt") as error:
        api.merge_pull_request(REPO, 1)
    assert error.value.response.status_code == 409
    commit(api, add("b.txt", b"mine"), create_pr=True)
    api.merge_pull_request(REPO, 2)
    assert download("a.txt") == b"theirs"
    assert download("b.txt") == b"mine"


@over_lfs
def test_a_commit_on_another_parent_is_refused(api, repo):
    first = repo.refs["main"]
    made = commit(api, add("a.txt", b"1"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        commit(api, add("a.txt", b"2"), parent_commit=first)
    assert error.value.response.status_code == 412
    assert commit(api, add("a.txt", b"2"), parent_commit=made.oid).oid == repo.refs["main"]
    assert download("a.txt", revision=made.oid) == b"1"


@over_lfs
def test_files_are_deleted_and_copied(taking, api, repo):
    commit(api, add("a.safetensors"), add("b.txt", b"b"), add("d/c.txt", b"c"))
    copies = [CommitOperationCopy("a.safetensors", "e.safetensors"), CommitOperationCopy("b.txt", "f.txt")]
    commit(api, *copies, CommitOperationDelete("b.txt"), CommitOperationDelete("d/"))
    assert set(api.list_repo_files(REPO)) == {".gitattributes", "a.safetensors", "e.safetensors", "f.txt"}
    assert download("e.safetensors") == CONTENT
    with pytest.raises(EntryNotFoundError):
        commit(api, CommitOperationDelete("b.txt"))


@over_lfs
def test_branches_are_made_and_listed(taking, api, repo):
    taking.page = 2
    api.create_branch(REPO, branch="next/one")
    api.create_branch(REPO, branch="next/one", exist_ok=True)
    commit(api, *(add(f"{number}.txt", b"x") for number in range(4)), revision="next/one")
    assert len(list(api.list_repo_tree(REPO, revision="next/one"))) == 5
    assert {each.name for each in api.list_repo_refs(REPO).branches} == {"main", "next/one"}
    assert [each.title for each in api.list_repo_commits(REPO, revision="next/one")] == [
        "Weights",
        "initial commit",
    ]
    api.delete_branch(REPO, branch="next/one")
    with pytest.raises(RevisionNotFoundError):
        commit(api, add("a.txt", b"x"), revision="next/one")


@over_lfs
def test_a_repo_is_created_once_and_deleted(taking, api, repo):
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.model_info(REPO).private
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    with pytest.raises(HfHubHTTPError, match="under the namespace"):
        api.create_repo("others/model")
    assert TakingHub(root=taking.root).written == {}


@over_lfs
def test_a_token_that_can_only_read_writes_nothing(taking, api, repo):
    assert (api.whoami()["name"], api.whoami(READ_TOKEN)["auth"]["accessToken"]["role"]) == ("me", "read")
    api.auth_check(REPO, write=True)
    api.auth_check(REPO, token=READ_TOKEN)
    for refused in (
        lambda: api.auth_check(REPO, token=READ_TOKEN, write=True),
        lambda: commit(api, add(WEIGHTS), token=READ_TOKEN),
    ):
        with pytest.raises(HfHubHTTPError, match=f"403 Forbidden: {asking.READ_ONLY}"):
            refused()
    with pytest.raises(HfHubHTTPError, match=asking.NO_CREDENTIALS) as error:
        commit(api, add(WEIGHTS), token="hf_unknown")
    assert error.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    assert len(repo.commits) == 1


@over_lfs
@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("license: mine", '"license" must be one of'),
        ("base_model: /models/base", '"base_model" with value "/models/base" is not valid'),
    ],
)
def test_a_card_whose_front_matter_is_wrong_is_refused(card, message, api, repo):
    with pytest.raises(ValueError, match=message):
        commit(api, add("README.md", f"---\n{card}\n---\n# Model\n".encode()))
    commit(api, add("README.md", b"---\nlicense: mit\nbase_model: org/base\n---\n# Model\n"))


def test_no_more_fits_than_the_quota(taking, api, repo, request):
    is_xet = "[xet]" in request.node.name
    commit(api, add(WEIGHTS))
    taking.quota = len(CONTENT) - 1 if is_xet else len(CONTENT)
    message = "403 Forbidden" if is_xet else asking.FULL  # hf_xet does not say what the Hub said
    with pytest.raises(Exception, match=message):
        commit(api, add(WEIGHTS, CONTENT[::-1]))
    taking.quota = 0
    with pytest.raises(HfHubHTTPError, match=asking.FULL):
        commit(api, add("a.txt", b"x"))
    assert len(repo.commits) == 2


@over_lfs
def test_a_large_file_goes_in_parts(taking, api, repo):
    taking.part_size = 100_000
    commit(api, add(WEIGHTS))
    assert (taking.asked("part"), taking.asked("complete"), taking.asked("put")) == ([200] * 4, [200], [])
    assert download(WEIGHTS) == CONTENT


@over_lfs
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transfer_that_is_refused_for_a_moment_is_tried_again(status, taking, api, repo, waits):
    taking.plan("put", status=status, times=2, retry_after=7 if status == 429 else None)
    commit(api, add(WEIGHTS))
    assert (taking.asked("put"), waits) == ([status, status, 200], [8, 8] if status == 429 else [1, 2])


@over_lfs
def test_a_commit_that_is_refused_for_a_moment_is_an_error(taking, api, repo):
    taking.plan("commit", status=429, retry_after=7)
    with pytest.raises(HfHubHTTPError, match="429 Too Many Requests") as error:
        commit(api, add("a.txt", b"x"))
    assert error.value.response.headers["Retry-After"] == "7"


@over_lfs
def test_an_upload_that_is_cut_is_sent_again(taking, api, repo, waits):
    taking.plan("put", cut=True)
    commit(api, add(WEIGHTS))
    assert taking.asked("put") == [0, 200]
    assert download(WEIGHTS) == CONTENT


@over_lfs
def test_bytes_that_arrive_as_others_are_found(taking, api, repo):
    taking.plan("put", damage=True)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        commit(api, add(WEIGHTS))
    assert taking.asked("verify") == [422]


@over_lfs
def test_a_commit_whose_answer_is_lost_was_made(taking, api, repo):
    taking.plan("commit", lose=True)
    with pytest.raises(Exception, match="disconnected"):
        commit(api, add("a.txt", b"x"))
    assert len(repo.commits) == 2


@over_lfs
@pytest.mark.parametrize(("when", "commits"), [("stall", 1), ("stall_after", 2)])
def test_a_commit_waits_until_it_is_released(when, commits, taking, api, repo):
    taking.plan("commit", **{when: True})
    thread = threading.Thread(target=commit, args=(api, add("a.txt", b"x")))
    thread.start()
    assert taking.stalled.wait(10)
    assert len(repo.commits) == commits
    taking.release()
    thread.join(10)
    assert (len(repo.commits), thread.is_alive()) == (2, False)


@over_lfs
def test_a_commit_of_a_file_that_was_not_uploaded_is_refused(api, repo):
    operation = add(WEIGHTS)
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
    with pytest.raises(HfHubHTTPError, match="LFS pointer pointed to a file that does not exist"):
        commit(api, operation)


@over_lfs
def test_requests_are_kept_and_repos_that_are_read_are_served_besides(taking, api, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(b"{}")
    taking.add("org/base", tmp_path / "base")
    assert api.model_info("org/base").siblings[0].rfilename == "config.json"
    assert taking.requests == [("GET", "/api/models/org/base")]
    assert taking.headers[0]["Authorization"] == f"Bearer {WRITE_TOKEN}"


def started(root):
    """Start a hub in a process of its own; return the process, and its URL."""
    line = [sys.executable, "-m", "tests.hub.uploads", "--root", root, "--port", "0"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def asked(url, table=None):
    """Ask a hub in another process what only tests ask."""
    data = None if table is None else json.dumps(table).encode()
    with urllib.request.urlopen(url, data) as answer:
        return json.load(answer)


def test_a_hub_of_its_own_process_is_started_again_with_what_it_has(taking, tmp_path):
    process, url = started(tmp_path / "own")
    api = HfApi(endpoint=url)
    api.create_repo(REPO)

    def send():
        commit(api, add(WEIGHTS), create_pr=True)

    def send_to_the_killed():
        with contextlib.suppress(Exception):
            send()

    asked(f"{url}/_test/plan", {"commit": {"status": 503}})
    with pytest.raises(HfHubHTTPError, match="503"):
        send()
    asked(f"{url}/_test/plan", {"commit": {"stall_after": True}})
    thread = threading.Thread(target=send_to_the_killed)
    thread.start()
    while not asked(f"{url}/_test/state")["stalled"]:
        time.sleep(0.01)
    before = asked(f"{url}/_test/state")["repos"]
    process.kill()
    process.wait()
    process, url = started(tmp_path / "own")
    assert asked(f"{url}/_test/state")["repos"] == before
    assert before[REPO]["refs"]["refs/pr/1"][WEIGHTS] == sha256(CONTENT)
    assert before[REPO]["pull_requests"]["1"]["status"] == "open"
    assert download(WEIGHTS, endpoint=url, revision="refs/pr/1") == CONTENT
    process.kill()
    process.wait()
    thread.join()
