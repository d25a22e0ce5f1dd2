"""The page of --report: what it holds, where it may be, and that it is there however a run ends."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

import lora_merge
from lora_merge.cli import exits
from tests.pages import data_of, text_of
from tests.tampering import edit_tensors


@pytest.fixture(scope="module")
def base(pico):
    return pico("llama")


@pytest.fixture(scope="module")
def adapter(base, pico_adapter):
    return pico_adapter(base)


@pytest.fixture(scope="module")
def merged(base, adapter, cli, tmp_path_factory):
    """Return a merged output that no test may change, its page, and what --json printed in the same run."""
    root = tmp_path_factory.mktemp("reported")
    arguments = (
        "--base",
        base,
        "--adapter",
        adapter,
        "--out",
        root / "merged",
        "--report",
        root / "page.html",
    )
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return root / "merged", root / "page.html", json.loads(result.stdout)


def test_the_page_of_a_merge_has_the_data_of_its_json(merged):
    _, page, document = merged

    assert data_of(page) == document
    text = text_of(page)
    assert "Llama" in text
    assert f"<h1>{document['headline']}</h1>" in page.read_text()
    assert "Merged and verified: all checks passed." in text
    assert "low_rank" not in text
    assert f"--out {merged[0]}" in text


def test_the_page_is_made_like_any_file(merged):
    umask = os.umask(0o027)
    os.umask(umask)

    assert stat.S_IMODE(merged[1].stat().st_mode) == 0o666 & ~umask
    assert sorted(path.name for path in merged[1].parent.iterdir()) == ["merged", "page.html"]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("merged/report.html", "inside the output"),
        ("folder", "is a directory"),
        ("page.pdf", "is a .pdf file, expected .html"),
        ("page", "has no suffix, expected .html"),
        ("nowhere/page.html", "there is no directory"),
        ("s3://models/page.html", "s3://models/page.html is a URL, and a report is written to a disk only"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_work(place, why, base, adapter, cli, tmp_path):
    (tmp_path / "folder").mkdir()

    out = tmp_path / "merged"
    result = cli(
        "--base",
        base,
        "--adapter",
        adapter,
        "--out",
        out,
        "--report",
        place if "://" in place else tmp_path / place,
    )

    assert result.exit_code == exits.USAGE, result.output
    assert why in result.output
    assert "hint:" in result.output
    assert not out.exists()


def test_a_merge_that_fails_has_a_page_with_its_errors(adapter, pico, cli, tmp_path):
    page = tmp_path / "page.html"

    result = cli("--base", pico("gpt2"), "--adapter", adapter, "--out", tmp_path / "merged", "--report", page)

    assert result.exit_code == exits.PLAN, result.output
    assert not (tmp_path / "merged").exists()
    document = data_of(page)
    assert document["ok"] is False
    text = text_of(page)
    assert "Merge failed" in text
    assert "No output was created." in text
    for issue in document["issues"][:3]:
        assert issue["sentence"] in text


def test_a_failed_verification_has_a_page_and_its_exit_code(merged, tampered, cli, tmp_path):
    out = tampered(merged[0])
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(out / "model.safetensors", lambda tensors: tensors[name].add_(1))
    page = tmp_path / "page.html"

    result = cli("verify", out, "--report", page, "--json")

    assert result.exit_code == exits.VERIFY, result.output
    assert data_of(page) == json.loads(result.stdout)
    text = text_of(page)
    assert "Verification failed" in text
    assert name in text
    assert "verification found an error here" in page.read_text()


def test_an_inspection_has_a_page_with_the_verdicts_of_engines(base, adapter, cli, tmp_path):
    page = tmp_path / "page.html"

    result = cli("inspect", adapter, "--base", base, "--report", page, "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert data_of(page) == document
    text = text_of(page)
    assert document["engines"]
    for engine in document["engines"]:
        assert f"{engine['verdict']} {engine['engine']} {engine['version']}" in text


def test_a_batch_has_one_page_with_all_its_jobs(base, adapter, cli, tmp_path):
    file, page = tmp_path / "batch.yaml", tmp_path / "page.html"
    jobs = [
        {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "one")},
        {"base": str(base), "adapter": str(tmp_path / "nothing"), "out": str(tmp_path / "two")},
    ]
    file.write_text(json.dumps({"jobs": jobs}))
    cli("batch", file, "--keep-going")

    result = cli("batch", file, "--keep-going", "--report", page, "--json")

    assert result.exit_code == exits.BATCH, result.output
    assert data_of(page) == json.loads(result.stdout)
    text = text_of(page)
    assert "1 job of 2 has no output." in text
    assert "up to date" in text
    assert "this directory does not exist" in text
    inside = cli("batch", file, "--report", tmp_path / "two" / "page.html")
    assert inside.exit_code == exits.USAGE
    assert "inside the output" in inside.output
    file.write_text(json.dumps({"jobs": [{**jobs[0], "report": "one.html"}]}))
    single = cli("batch", file)
    assert single.exit_code == exits.USAGE
    assert "hint: lora-merge batch --report FILE writes one page for all jobs" in single.output


def test_a_request_file_may_name_the_page(base, adapter, cli, tmp_path):
    config, page = tmp_path / "merge.yaml", tmp_path / "page.html"
    request = {
        "base": str(base),
        "adapter": str(adapter),
        "out": str(tmp_path / "merged"),
        "report": str(page),
    }
    config.write_text(json.dumps(request))

    result = cli("--config", config, "--dry-run")

    assert result.exit_code == 0, result.output
    assert "Nothing was written." in text_of(page)
    assert not (tmp_path / "merged").exists()


def test_python_writes_pages_too(base, adapter, tmp_path):
    page, other = tmp_path / "page.html", tmp_path / "other.html"

    report = lora_merge.merge(base=base, adapter=adapter, out=tmp_path / "merged", report=page)
    lora_merge.write_report(report, other)

    assert data_of(page) == data_of(other) == json.loads(json.dumps(lora_merge_data(report)))
    assert f"lora-merge merge --base {base} --adapter {adapter}" in text_of(page)
    assert "Merged and verified" in lora_merge.report_html(report)


def lora_merge_data(report):
    from dataclasses import asdict

    return {"ok": True, **asdict(report)}


def test_a_token_is_on_no_page(base, adapter, cli, tmp_path):
    page, token = tmp_path / "page.html", "hf_aBcDeFgHiJkLmNoPqRsT"

    result = cli(
        "--base", base, "--adapter", adapter, "--out", tmp_path / "m", "--report", page, "--token", token
    )

    assert result.exit_code == 0, result.output
    assert token not in page.read_text()
    assert "--token" not in page.read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_the_right_to_write_is_refused(base, adapter, cli, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)

    place = tmp_path / "closed" / "page.html"
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "m", "--report", place)

    assert result.exit_code == exits.USAGE
    assert "you may not write in" in result.output
    assert not (tmp_path / "m").exists()


def test_a_page_that_cannot_be_written_in_the_end_says_so_and_keeps_the_result(
    merged, cli, tmp_path, monkeypatch
):
    # The directory goes away while the run is at work.
    from lora_merge.verification import verify_existing

    folder = tmp_path / "folder"
    folder.mkdir()
    output_of = verify_existing.find_output

    def remove_and_read(*arguments):
        folder.rmdir()
        return output_of(*arguments)

    monkeypatch.setattr(verify_existing, "find_output", remove_and_read)
    result = cli("verify", merged[0], "--level", "structure", "--report", folder / "page.html", "--json")

    assert result.exit_code == exits.WRITE, result.output
    assert json.loads(result.stdout)["ok"] is True
    assert "cannot be written" in result.stderr


def test_a_merge_without_a_report_loads_nothing_of_pages(pico, pico_adapter, tmp_path):
    base = pico()
    program = (
        "import sys; from lora_merge.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print([name for name in sys.modules if name.startswith(('jinja2', 'lora_merge.drawing'))])"
    )
    words = ["--base", base, "--adapter", pico_adapter(base), "--out", tmp_path / "merged"]
    loaded = {}
    for asked in ([], ["--report", tmp_path / "page.html", "--overwrite"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, [*words, *asked])],
            capture_output=True,
            text=True,
            check=True,
        )
        loaded[bool(asked)] = done.stdout

    assert loaded[False] == "[]\n"
    assert "jinja2" in loaded[True]
