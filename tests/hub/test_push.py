"""--push-to-hub and --out hf://: what is on the hub afterwards, what was seen meanwhile, and what stays on this disk."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import HfApi

from lora_merge.cli import exits
from tests.hub.conftest import REPO, sums
from tests.hub.taking import READ_TOKEN


def ok(result):
    assert result.exit_code == exits.OK, result.stdout + result.stderr
    return result


def refused(result):
    assert result.exit_code not in {exits.OK, exits.BUG}, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("where", [("--push-to-hub", REPO), ("--out", f"hf://{REPO}")])
def test_a_repo_gets_the_files_of_a_merge_on_a_disk(where, options, cli, taking, branch, on_disk):
    done = ok(cli(*options, *where))
    assert branch() == on_disk
    assert f"on the Hub: {taking.url}/{REPO}\n" in done.stderr


@pytest.mark.parametrize("taking", ["xet"], indirect=True)
def test_a_stream_needs_no_spool_and_sends_the_same_bytes(options, cli, taking, branch, on_disk, monkeypatch):
    from lora_merge.storage.hub.uploads import output

    monkeypatch.setattr(output, "Spool", None)
    ok(cli(*options, "--push-to-hub", REPO, "--upload", "stream"))
    assert branch() == on_disk


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
def test_a_stream_is_refused_where_the_packages_cannot(options, cli, taking, monkeypatch):
    arguments = (*options, "--push-to-hub", REPO, "--upload", "stream")
    assert "which needs the package hf_xet" in refused(cli(*arguments))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.__version__", "9.9.0")
    assert "not with 9.9.0" in refused(cli(*arguments))
    assert not taking.written


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestPlace:
    """Which repo and which branch, and what was there before."""

    def test_a_directory_is_kept_and_pushed(self, options, cli, branch, tmp_path):
        ok(cli(*options, "--out", tmp_path / "merged", "--push-to-hub", REPO))
        assert branch() == sums(tmp_path / "merged")

    def test_a_directory_that_is_pushed_already_is_not_sent_again(self, options, cli, taking, tmp_path):
        arguments = (*options, "--out", tmp_path / "merged", "--push-to-hub", REPO)
        ok(cli(*arguments))
        n_commits = len(taking.asked("commit"))
        ok(cli(*arguments, "--resume"))
        assert len(taking.asked("commit")) == n_commits

    def test_a_repo_is_private_unless_it_is_to_be_public(self, options, cli, taking):
        ok(cli(*options, "--push-to-hub", REPO))
        ok(cli(*options, "--push-to-hub", "org/open", "--public"))
        assert [taking.written[name].private for name in (REPO, "org/open")] == [True, False]
        said = refused(cli(*options, "--push-to-hub", REPO, "--public", "--overwrite"))
        assert "exists and is private, but --public was given" in said

    def test_an_output_that_is_there_is_replaced_only_if_that_is_wanted(
        self, options, cli, branch, on_disk, taking
    ):
        ok(cli(*options, "--push-to-hub", REPO, "--max-shard-size", "30KB"))
        before = branch()
        assert f"hf://{REPO}: already exists" in refused(cli(*options, "--push-to-hub", REPO))
        assert branch() == before
        ok(cli(*options, "--push-to-hub", REPO, "--overwrite"))
        assert branch() == on_disk

    def test_a_repo_with_other_files_is_left_alone(self, options, cli, taking, branch):

        HfApi().create_repo(REPO)
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=REPO)
        before = branch()
        said = refused(cli(*options, "--push-to-hub", REPO, "--overwrite"))
        assert "has files (notes.txt) and is not an earlier output" in said
        assert branch() == before

    @pytest.mark.parametrize(
        "how", [("--push-to-hub", f"{REPO}@dev"), ("--push-to-hub", REPO, "--revision", "dev")]
    )
    def test_a_branch_is_created_and_main_stays_as_it_is(self, how, options, cli, branch, on_disk):
        ok(cli(*options, *how))
        assert branch(revision="dev") == on_disk
        assert branch() == {}

    def test_a_pull_request_can_be_left_open(self, options, cli, taking, branch, on_disk):
        done = ok(cli(*options, "--push-to-hub", REPO, "--create-pr", "--commit-message", "A new one"))
        assert branch() == {}
        assert branch(revision="refs/pr/1") == on_disk
        state = taking.state()["repos"][REPO]
        assert f"/{REPO}/discussions/1" in done.stderr
        assert [(one["status"], one["title"]) for one in state["pull_requests"].values()] == [
            ("open", "A new one")
        ]


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestRefused:
    """One sentence each, before a weight is sent; and nothing is on the hub."""

    def check(self, taking, result, *words):
        said = refused(result)
        for word in words:
            assert word in said, said
        assert "hf_" not in said
        assert not taking.asked("put")
        return said

    def test_a_token_that_can_only_read(self, options, cli, taking, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        self.check(taking, cli(*options, "--push-to-hub", REPO), "the token can only read", "role “write”")

    @pytest.mark.parametrize("token", ["hf_unknownunknownunknown", ""])
    def test_a_token_that_is_unknown_or_missing(self, token, options, cli, taking, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        said = self.check(taking, cli(*options, "--push-to-hub", REPO), "hf auth login")
        assert ("does not accept the token" if token else "token") in said

    def test_a_namespace_of_others(self, options, cli, taking):
        self.check(
            taking, cli(*options, "--push-to-hub", "them/merged"), "them is not among your names (me, org)"
        )

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("name", "is not a repo of the Hub"),
            ("a/b/c", "is a whole repo"),
            ("ms://a/b", "Hugging Face Hub only"),
            ("a/b@refs/pr/1", "is not a branch"),
            (f"a/b@{'0a' * 20}", "is not a branch"),
            ("a/b.git", "is not a repo of the Hub"),
        ],
    )
    def test_a_text_that_names_no_repo(self, target, words, options, cli, taking):
        self.check(taking, cli(*options, "--push-to-hub", target), words)

    def test_a_licence_that_the_hub_does_not_know(self, base, pico_adapter, copied, cli, taking):
        root = copied(base, "odd")
        (root / "README.md").write_text("---\nlicense: my-own\n---\n# Odd\n")
        arguments = ("--base", root, "--adapter", pico_adapter(base), "--push-to-hub", REPO)
        self.check(taking, cli(*arguments), "refuses the model card", "license")

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--part", "1/2"), "one process makes the whole output"),
            (("--executor", "processes"), "come together in one process"),
            (("--spool-limit", "1KB"), "but the largest file of the output has"),
            (("--offline",), "a push needs the network"),
            (("--link", "hard"), "has no links"),
            (("--revision", "a b"), "expected the name of a branch"),
            (("--out", "s3://bucket/folder"), "push an output of this disk"),
            (("--out", "hf://me/other"), "is given, and the output is hf://me/other"),
        ],
    )
    def test_options_that_do_not_go_together(self, more, words, options, cli, taking):
        self.check(taking, cli(*options, "--push-to-hub", REPO, *more), words)

    @pytest.mark.parametrize(
        "more", [("--private",), ("--revision", "dev"), ("--create-pr",), ("--spool-limit", "1GB")]
    )
    def test_an_option_of_a_push_without_one(self, more, options, cli, taking, tmp_path):
        said = self.check(taking, cli(*options, "--out", tmp_path / "out", *more), "nothing is pushed")
        assert more[0] in said
        assert not (tmp_path / "out").exists()

    def test_a_dry_run_says_what_would_stop_the_run(self, options, cli, taking, monkeypatch):
        ok(cli(*options, "--push-to-hub", REPO, "--dry-run"))
        assert not taking.written
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        self.check(taking, cli(*options, "--push-to-hub", REPO, "--dry-run"), "the token can only read")


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestFaults:
    """What fails on the way: healed, or one sentence and a run that can be continued."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        from lora_merge.storage.hub.uploads import failures

        monkeypatch.setattr(failures, "WAITS", (0.01, 0.01))

    @pytest.mark.parametrize(
        ("endpoint", "fault"),
        [
            ("commit", {"status": 503, "times": 2}),
            ("commit", {"lose": True}),
            ("preupload", {"status": 500}),
            ("batch", {"status": 502}),
            ("put", {"cut": True}),
            ("info", {"status": 504}),
            ("tree", {"status": 429, "retry_after": 1}),
            ("merge", {"lose": True}),
            ("merge", {"status": 503}),
        ],
    )
    def test_a_fault_that_passes_is_healed(self, endpoint, fault, options, cli, taking, branch, on_disk):
        taking.plan(endpoint, **fault)
        ok(cli(*options, "--push-to-hub", REPO))
        assert branch() == on_disk

    def test_a_lost_commit_in_the_middle_is_found_and_not_made_again(
        self, options, cli, taking, branch, on_disk, monkeypatch
    ):
        from lora_merge.storage.hub.uploads import pull_request

        monkeypatch.setattr(pull_request, "COMMIT_SECONDS", 0.0)
        for _ in range(2):
            taking.plan("commit", times=1)
            taking.plan("commit", lose=True)
        ok(cli(*options, "--push-to-hub", REPO))
        assert branch() == on_disk

    def test_a_full_quota_is_one_sentence_and_the_run_goes_on_when_there_is_room(
        self, options, cli, taking, branch, on_disk, monkeypatch
    ):
        from lora_merge.storage.hub.uploads import pull_request

        monkeypatch.setattr(pull_request, "COMMIT_SECONDS", 0.0)
        taking.quota = 70_000
        said = refused(cli(*options, "--push-to-hub", REPO, "--workers", "1"))
        assert "the Hub takes no more bytes" in said
        assert "--resume" in said
        assert branch() == {}
        taking.quota = None
        done = ok(cli(*options, "--push-to-hub", REPO, "--resume"))
        assert "resumed: an interrupted run had already written" in done.stderr
        assert branch() == on_disk
        state = taking.state()["repos"][REPO]
        assert [one["status"] for one in state["pull_requests"].values()] == ["merged"]

    def test_bytes_that_change_on_the_way_are_not_published(self, options, cli, taking, branch):
        taking.plan("put", damage=True, times=-1)
        refused(cli(*options, "--push-to-hub", REPO))
        assert branch() == {}

    def test_a_branch_that_moves_meanwhile_is_not_overwritten(
        self, options, cli, taking, branch, monkeypatch
    ):

        from lora_merge.storage.hub.uploads.pull_request import PullRequest

        complete = PullRequest.complete

        def moved(pull, *arguments):
            complete(pull, *arguments)
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=REPO)

        monkeypatch.setattr(PullRequest, "complete", moved)
        said = refused(cli(*options, "--push-to-hub", REPO))
        assert "has changed since this run began" in said
        assert f"{taking.url}/{REPO}/discussions/1" in said
        assert list(branch()) == ["notes.txt"]

    def test_a_verification_that_fails_closes_the_pull_request(
        self, options, cli, taking, branch, monkeypatch
    ):
        from lora_merge.checks import structure
        from lora_merge.core.report import Verdict, error
        from lora_merge.merging import staged

        bad = Verdict("sample", 0, 0, (error("wrong", "tensor", "is wrong"),))
        monkeypatch.setattr(staged, "check_output", lambda *arguments: bad)
        assert structure
        refused(cli(*options, "--push-to-hub", REPO))
        assert branch() == {}
        assert [one["status"] for one in taking.state()["repos"][REPO]["pull_requests"].values()] == [
            "closed"
        ]


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
def test_the_spool_holds_no_more_than_its_limit(options, cli, taking, branch, on_disk, monkeypatch, tmp_path):
    """Measured while it runs: the bytes of all files below the temporary folder."""
    from lora_merge.storage.hub.uploads.pull_request import PullRequest

    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setenv("TMPDIR", str(spool))
    monkeypatch.setattr("tempfile.tempdir", None)
    found, upload = [], PullRequest.upload

    def seen(pull, name, path, wanted):
        found.append(sum(one.stat().st_size for one in spool.rglob("*.safetensors")))
        upload(pull, name, path, wanted)

    monkeypatch.setattr(PullRequest, "upload", seen)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "disk" / "merged").glob("*.safetensors"))
    ok(cli(*options, "--push-to-hub", REPO, "--spool-limit", "59KB"))
    assert len(found) == len(sizes) > 1
    assert max(found) <= 59_000
    assert branch() == on_disk
    assert not list(spool.iterdir())


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
class TestAdapters:
    """Adapters of convert and extract."""

    def test_a_converted_adapter_is_pushed_with_and_without_a_directory(
        self, base, pico_adapter, cli, taking, branch, tmp_path
    ):
        adapter = pico_adapter(base)
        ok(cli("convert", adapter, "--bake-scale", "--out", tmp_path / "merged", "--push-to-hub", REPO))
        assert branch() == sums(tmp_path / "merged")
        done = ok(cli("convert", adapter, "--bake-scale", "--push-to-hub", "me/other"))
        assert branch("me/other").keys() == branch().keys()
        assert branch("me/other")["adapter_model.safetensors"] == branch()["adapter_model.safetensors"]
        assert "wrote hf://me/other" in done.stderr
        assert "hf://" not in done.stderr.splitlines()[-1]

    def test_an_extracted_adapter_is_pushed(self, base, options, cli, taking, branch, tmp_path):
        ok(cli(*options, "--out", tmp_path / "tuned"))
        ok(
            cli(
                "extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", "4", "--push-to-hub", REPO
            )
        )
        assert {"adapter_config.json", "adapter_model.safetensors"} <= branch().keys()

    def test_neither_a_directory_nor_a_repo_is_a_missing_option(self, base, pico_adapter, cli, taking):
        assert "missing option `--out`" in refused(cli("convert", pico_adapter(base)))


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
def test_a_batch_writes_to_the_hub_and_keeps_what_is_up_to_date(
    options, cli, taking, branch, on_disk, tmp_path
):
    file = tmp_path / "batch.yaml"
    job = {"base": str(options[1]), "adapter": str(options[3]), "out": f"hf://{REPO}"}
    file.write_text(json.dumps({"jobs": [job]}))
    ok(cli("batch", file))
    assert branch() == on_disk
    n_commits = len(taking.asked("commit"))
    ok(cli("batch", file))
    assert len(taking.asked("commit")) == n_commits
    file.write_text(json.dumps({"jobs": [{**job, "out": str(tmp_path / "out"), "push_to_hub": REPO}]}))
    assert "a batch does not push" in refused(cli("batch", file))


@pytest.mark.parametrize("taking", ["lfs"], indirect=True)
def test_an_output_on_the_hub_is_verified_where_it_is(options, cli, taking, tmp_path):
    ok(cli(*options, "--push-to-hub", REPO))
    done = ok(cli("verify", f"hf://{REPO}", *options))
    assert "verified" in done.stderr + done.stdout
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="model-00001-of-00003.safetensors", repo_id=REPO)
    assert cli("verify", f"hf://{REPO}", *options).exit_code == exits.VERIFY
