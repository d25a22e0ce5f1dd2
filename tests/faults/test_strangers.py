"""What others put beside an output, or into staging, is neither followed nor overwritten, removed or published."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from lora_merge.cli import exits
from lora_merge.cli.progress import _Lines
from tests.faults.other_users import in_python, open_to_all
from tests.faults.table import NOBODY
from tests.faults.trial import content

ANOTHER = NOBODY - 1
"""A second user who may do nothing."""


@pytest.fixture(scope="module")
def inputs(pico, pico_adapter):
    base = pico("llama", "bfloat16", "60KB")
    return ["--base", base, "--adapter", pico_adapter(base)]


@pytest.fixture
def merge(inputs, cli, tmp_path):
    """Return a function: options → the result of a merge to ``out``."""
    return lambda *options: cli(*inputs, "--out", tmp_path / "out", *options)


@pytest.fixture(scope="module")
def whole(inputs, cli, tmp_path_factory):
    """The content of an output that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli(*inputs, "--out", out).exit_code == 0
    return content(out)


@pytest.fixture
def victim(tmp_path):
    root = tmp_path / "home" / "thesis"
    (root / "sub").mkdir(parents=True)
    (root / "thesis.txt").write_text("the only copy")
    (root / "sub" / "data.csv").write_text("1")
    return root


def at_phase(monkeypatch, name, do):
    """Have something happen once, when a phase begins."""
    real, done = _Lines.phase, []

    def phase(self, phase_name, total_bytes):
        if phase_name == name and not done:
            done.append(name)
            do()
        real(self, phase_name, total_bytes)

    monkeypatch.setattr(_Lines, "phase", phase)
    return done


def interrupt(monkeypatch, merge):
    """Leave what an interrupted merge leaves."""
    n_done = 0

    def done(self, name):
        nonlocal n_done
        n_done += 1
        if n_done == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Lines, "done", done)
        assert merge().exit_code == exits.INTERRUPTED


def instead(path, victim, name):
    """Put a link in the place of a file, to a copy of it in the victim's directory."""
    shutil.copy(path, victim / name)
    path.unlink()
    path.symlink_to(victim / name)


def second_name(path, victim):
    instead(path, victim, "weights")
    path.unlink()
    os.link(victim / "weights", path)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def linked_output(home, victim):
    (home / "output").rename(home.parent / "moved")
    (home / "output").symlink_to(victim)


def shard(home):
    return min((home / "output").glob("*.safetensors"))


PLANTED = {
    "a link for the output": linked_output,
    "a link for a weight file": lambda home, victim: instead(shard(home), victim, "weights"),
    "a second name of a file": lambda home, victim: second_name(shard(home), victim),
    "a link to a folder": lambda home, victim: (home / "output" / "sub").symlink_to(victim / "sub"),
    "a link for a side file": lambda home, victim: (home / "output" / "README.md").symlink_to(
        victim / "thesis.txt"
    ),
    "a link for the journal": lambda home, victim: instead(home / "journal.jsonl", victim, "journal"),
    "a link for the next journal": lambda home, victim: (home / "journal.new").symlink_to(
        victim / "thesis.txt"
    ),
    "a pipe for the journal": lambda home, victim: pipe(home / "journal.jsonl"),
    "a pipe for a weight file": lambda home, victim: pipe(shard(home)),
}
"""What is put into what an interrupted run has left."""


@pytest.mark.parametrize(
    ("what", "options"), [*((what, ["--resume"]) for what in PLANTED), ("a link for the output", [])]
)
def test_what_is_planted_in_staging_is_not_followed(
    what, options, merge, whole, victim, tmp_path, monkeypatch
):
    interrupt(monkeypatch, merge)
    PLANTED[what](tmp_path / "out.lora-merge-staging", victim)
    before = content(victim)

    result = merge(*options)

    assert result.exit_code == 0, (result.stderr, result.exception)
    assert content(victim) == before
    assert content(tmp_path / "out") == whole
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in (tmp_path / "out").glob("*"))
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("job", ["merge", "convert"])
def test_a_batch_resumes_by_itself_and_follows_nothing_either(job, pico, pico_adapter, victim, cli, tmp_path):
    home = tmp_path / "out.lora-merge-staging"
    home.mkdir()
    (home / "output").symlink_to(victim)
    before = content(victim)
    lines = {
        "merge": f"base: {pico()}, adapter: {pico_adapter(pico())}",
        "convert": f"convert: {pico_adapter(pico())}",
    }
    (tmp_path / "batch.yaml").write_text(f"jobs:\n  - {{{lines[job]}, out: {tmp_path}/out}}\n")

    result = cli("batch", tmp_path / "batch.yaml")

    assert result.exit_code == 0, (result.stderr, result.stdout)
    assert content(victim) == before
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").is_symlink()


# -------------------------------------------------------------------- between verification and the name


def theirs(home):
    shutil.copytree(home / "output", home.parent / "copy")
    (home / "output").rename(home.parent / "stolen")
    (home.parent / "copy").rename(home / "output")


def another_file(home):
    shard = min((home / "output").glob("*.safetensors"))
    shutil.copy(shard, home.parent / "copy")
    (home.parent / "copy").rename(shard)


def a_byte(home):
    shard = max((home / "output").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x7f\x7f\x7f\x7f")


@pytest.mark.parametrize(
    ("phase", "do", "words", "code"),
    [
        ("verifying", theirs, "another program replaced the directory of this run", exits.WRITE),
        ("publishing", theirs, "another program replaced the directory of this run", exits.WRITE),
        ("flushing", another_file, "changed while it was being verified", exits.WRITE),
        ("flushing", a_byte, "", exits.VERIFY),
    ],
)
def test_what_is_not_what_was_verified_gets_no_name(phase, do, words, code, merge, tmp_path, monkeypatch):
    done = at_phase(monkeypatch, phase, lambda: do(tmp_path / "out.lora-merge-staging"))
    result = merge()

    assert done
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_time_that_a_filesystem_sets_late_costs_a_second_look_and_no_more(
    merge, whole, tmp_path, monkeypatch
):
    def touch():
        for path in (tmp_path / "out.lora-merge-staging" / "output").iterdir():
            os.utime(path)

    done = at_phase(monkeypatch, "flushing", touch)
    result = merge()

    assert done
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("verifying …") == 2
    assert content(tmp_path / "out") == whole


def test_a_file_that_changes_again_and_again_gets_no_name(merge, tmp_path, monkeypatch):
    real = _Lines.phase

    def phase(self, name, total_bytes):
        if name == "flushing":
            os.utime(tmp_path / "out.lora-merge-staging" / "output" / "config.json")
        real(self, name, total_bytes)

    monkeypatch.setattr(_Lines, "phase", phase)
    result = merge()
    assert result.exit_code == exits.WRITE
    assert "changed while it was being verified" in result.stderr


# ----------------------------------------------------------------------------------------- two users


def as_user(uid, arguments, warm):
    """Run the command as another user, who need not be able to read Python's own files: a merge before it reads them all."""
    program = (
        "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from lora_merge.cli import main\n"
        "def run(*more):\n"
        "    try: main(sys.argv[3:] + list(more), prog_name='lora-merge')\n"
        "    except SystemExit as exc: return exc.code\n"
        "assert not run('--out', sys.argv[2], '--overwrite')\n"
        f"os.setgid({uid}); os.setuid({uid}); sys.exit(run())"
    )
    return in_python(program, warm, *arguments)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be two users")
def test_the_staging_directory_of_another_user_is_refused_and_a_private_base_stays_private(
    pico, pico_adapter, tampered, tmp_path, tmp_path_factory
):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    shared = tmp_path / "shared"
    shared.mkdir()
    open_to_all(tmp_path, tmp_path_factory)
    shared.chmod(0o1777)
    home = shared / "out.lora-merge-staging"
    home.mkdir(mode=0o777)
    (home / "output").mkdir()
    for path in (home, home / "output"):
        os.chown(path, ANOTHER, ANOTHER)
    arguments = ["--base", base, "--adapter", adapter, "--resume", "--out", shared / "out"]
    done = as_user(NOBODY, arguments, tmp_path / "warm")
    assert done.returncode == exits.WRITE, done.stderr
    assert f"{home}: belongs to user {ANOTHER}, but this run is " in done.stderr
    assert [path.name for path in home.rglob("*")] == ["output"]
    assert home.stat().st_uid == ANOTHER

    shutil.rmtree(home)
    for path in (base, *base.iterdir()):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700 if path.is_dir() else 0o600)
    done = as_user(NOBODY, arguments, tmp_path / "warm")
    assert done.returncode == 0, done.stderr
    out = shared / "out"
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
    assert (stat.S_IMODE(out.stat().st_mode), out.stat().st_uid) == (0o700, NOBODY)


# ------------------------------------------------------------------------------------------- in an input


@pytest.mark.parametrize("verb", ["merge", "batch", "convert", "extract"])
@pytest.mark.parametrize("way", ["plain", "by a link"])
def test_no_output_lies_in_the_base(verb, way, pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "base"), pico_adapter(pico())
    (tmp_path / "link").symlink_to(base)
    out = (tmp_path / "link" if way == "by a link" else base) / "merged"
    (tmp_path / "batch.yaml").write_text(f"jobs:\n  - {{base: {base}, adapter: {adapter}, out: {out}}}\n")
    before = content(base)
    arguments = {
        "merge": ["--base", base, "--adapter", adapter, "--out", out],
        "batch": ["batch", tmp_path / "batch.yaml"],
        "convert": ["convert", adapter, "--base", base, "--bake-scale", "--out", out],
        "extract": ["extract", "--base", pico(), "--tuned", base, "--rank", 2, "--out", out],
    }[verb]
    if verb == "extract":
        shutil.rmtree(base)
        cli("--base", pico(), "--adapter", adapter, "--out", base)
        before = content(base)

    result = cli(*arguments)

    assert result.exit_code != 0
    assert "is inside the input" in result.stderr + result.stdout, result.stderr
    assert content(base) == before
    assert not list(base.glob("merged*"))


def test_an_output_does_not_replace_the_folder_that_the_bases_links_lead_to(
    merge, pico, pico_adapter, cli, tmp_path
):
    """As where a cache or a store holds the files, and the base is a folder of links to them."""
    store, base = shutil.copytree(pico(), tmp_path / "store"), tmp_path / "base"
    base.mkdir()
    for path in store.iterdir():
        (base / path.name).symlink_to(path) if path.suffix == ".safetensors" else shutil.copy(path, base)
    before = content(store)

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", store, "--overwrite")

    assert result.exit_code == exits.WRITE
    assert f"{store}: contains the input {base}/model.safetensors" in result.stderr
    assert content(store) == before


def test_an_output_that_lies_in_a_base_is_no_part_of_it(pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "base"), pico_adapter(pico())
    for name in ("merged", "out.lora-merge-staging/output"):
        assert cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "made").exit_code == 0
        shutil.copytree(tmp_path / "made", base / name)
        shutil.rmtree(tmp_path / "made")

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    assert "merged/ is the output of another merge and was not copied" in result.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_a_private_input_makes_a_private_output(verb, pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    for path in (base, adapter, *base.iterdir(), *adapter.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    arguments = {
        "merge": ["--base", base, "--adapter", adapter],
        "convert": ["convert", adapter, "--bake-scale"],
    }[verb]
    before = os.umask(0o022)
    try:
        assert cli(*arguments, "--out", tmp_path / "open").exit_code == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (adapter / name).chmod(0o600)
        closed = cli(*arguments, "--out", tmp_path / "closed")
        assert closed.exit_code == 0
    finally:
        os.umask(before)
    modes = {
        name: {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / name, *(tmp_path / name).iterdir())}
        for name in ("open", "closed")
    }
    assert modes == {"open": {0o755, 0o644}, "closed": {0o700, 0o600}}
    # A server that runs as another user would say "Permission denied" only.
    assert (f"chmod -R a+rX {tmp_path / 'closed'}" in closed.stderr) == (verb == "merge")


@pytest.mark.parametrize("way", ["by a URL", "in parts"])
def test_an_output_that_is_written_file_by_file_is_in_a_folder_as_closed_as_its_inputs(
    way, pico, pico_adapter, tampered, cli, tmp_path
):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    for path in (base, adapter, *base.iterdir(), *adapter.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    merge = ("--base", base, "--adapter", adapter, "--out")
    runs = {"by a URL": [()], "in parts": [("--part", "1/1"), ("--seal",)]}[way]
    found = []
    for closed in (False, True):
        out = tmp_path / f"out-{closed}"
        base.chmod(0o700 if closed else 0o755)
        before = os.umask(0o022)
        try:
            for options in runs:
                result = cli(*merge, f"file://{out}" if way == "by a URL" else out, *options)
                assert result.exit_code == 0, result.stderr
        finally:
            os.umask(before)
        found.append((stat.S_IMODE(out.stat().st_mode), f"chmod -R a+rX {out}" in result.stderr))
    assert found == [(0o755, False), (0o700, True)]


@pytest.mark.parametrize(("umask", "modes"), [(0o022, {0o755, 0o644}), (0o002, {0o775, 0o664})])
def test_the_mode_that_safetensors_gives_to_every_file_does_not_make_an_output_private(
    umask, modes, pico, pico_adapter, tampered, cli, tmp_path
):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    for path in (base, adapter, *base.iterdir(), *adapter.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o600 if path.suffix == ".safetensors" else 0o644)
    before = os.umask(umask)
    try:
        result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out, *out.iterdir())} == modes
    assert "chmod" not in result.stderr
