"""The benchmark measures what it says it measures, and its page says what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import click
import pytest
from benchmarks import machine, measure, plot, results, running, tables
from benchmarks.cases import Case, cases, listed
from benchmarks.compare import Difference, difference
from benchmarks.contenders import GROUPS, contenders, ours_with
from benchmarks.inputs import shape_for
from benchmarks.measure import RunError, Sample, timed
from benchmarks.peers import PEERS, Job
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
CASE = Case(3.0, "bfloat16", "all", 16)
MACHINE = {
    "system": "Linux",
    "architecture": "x86_64",
    "cpu": "A Processor",
    "cores": 2,
    "memory_bytes": 8 * 2**30,
    "filesystem": "ext4",
    "python": "3.11.7",
    "lora-merge": "0.1.0",
    "torch": "2.13.0",
    "peft": "0.21.2",
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(wall, copying, merging, peak=260e6):
    return Sample(wall, wall, wall, int(peak), {"plan": 0.1, "copy": copying, "load": 9.0, "merge": merging})


def other(wall, peak=2e6):
    return Sample(wall, wall + 1, wall, int(peak))


def outcome(case=CASE):
    rounds = [
        {"cp": other(1), "ours-1w": ours(4, 1, 2), "ours-2w": ours(3, 1, 1), "peft": other(10, 4e9)},
        {"cp": other(2), "ours-1w": ours(9, 1, 3), "ours-2w": ours(4, 1, 1), "peft": other(20, 4e9)},
        {"cp": other(4), "ours-1w": ours(5, 2, 2), "ours-2w": ours(6, 1, 2)},
    ]
    same = Difference(10, (), (), (), 1000, 0, 0.0, 0.0, "bfloat16")
    return results.Outcome(case, 3_000_000_000, 0.9, rounds, {"peft": same}, {"axolotl": "it has no room"})


def made(*outcomes):
    versions = {"mergekit": {"mergekit": "0.1.5"}, "peft": {"peft": "0.21.2"}}
    command = "python scripts/bench.py --size 3"
    return results.Results(command, "2026-01-31", "warm", MACHINE, versions, list(outcomes or [outcome()]))


# Cases


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (("1,2",), (1, 2)),
        (("1", "2"), (1, 2)),
        (("2, 1,", "1,3"), (2, 1, 3)),
        ((), ()),
    ],
)
def test_a_list_is_split_at_commas_and_may_be_repeated(texts, values):
    assert listed(click.INT)(click.Context(click.Command("x")), click.Option(["--x"]), texts) == values


@pytest.mark.parametrize("texts", [("1,x",), (",",), ("",)])
def test_what_is_no_list_of_these_values_is_refused(texts):
    with pytest.raises(click.BadParameter):
        listed(click.INT)(click.Context(click.Command("x")), click.Option(["--x"]), texts)


def test_cases_are_the_product_and_those_of_one_base_stand_together():
    made_cases = cases((1.0, 3.0), ("bfloat16", "float32"), ("all", "qv"), (8, 16))
    assert len(made_cases) == len(set(made_cases)) == 16
    bases = [(case.size_gb, case.dtype) for case in made_cases]
    assert bases == sorted(bases, key=bases.index)
    assert made_cases[1] == Case(1.0, "bfloat16", "all", 16)


@pytest.mark.parametrize("size_gb", [0.005, 0.05, 0.3, 0.5, 1, 3, 12])
def test_a_base_has_about_the_size_that_was_asked_for(size_gb):
    assert 2e-9 * shape_for(size_gb, "bfloat16").n_values() == pytest.approx(size_gb, rel=0.1)


def test_the_merged_share_counts_what_the_adapter_changes():
    shape = shape_for(3, "bfloat16")
    changed = 2 * shape.hidden**2 * shape.n_layers
    assert shape.merged_share(("q_proj", "o_proj")) == changed / shape.n_values()


# Contenders


def test_each_number_of_workers_and_kind_of_adapter_is_a_contender(tmp_path):
    entrants = contenders(GROUPS, ("lora", "dora"), (1, 2), tmp_path)
    names = [entrant.name for entrant in entrants]
    assert names == ["cp", "ours-1w", "ours-2w", "ours-dora-1w", "ours-dora-2w", "peft"]
    job = Job(Path("b"), Path("a"), Path("o"), Path("s"), "bfloat16", 16)
    assert entrants[2].command(job)[-2:] == ["--workers", "2"]
    assert {"--json", "--quiet"} <= set(entrants[1].command(job))
    assert ours_with("dora", None) == "ours-dora"


def test_another_checkout_takes_part_with_its_own_code(tmp_path):
    job = Job(Path("/base"), Path("/adapter"), Path("/out"), Path("/scratch"), "bfloat16", 16)
    ours, before = contenders(("ours",), ("lora",), (), tmp_path, before=tmp_path / "old")
    assert before.name == "ours-before"
    assert before.environment == {"PYTHONPATH": str(tmp_path / "old")}
    assert (before.command(job), "PYTHONPATH" in ours.environment) == (ours.command(job), False)


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_a_peer_is_run_with_everything_that_a_job_names(peer, tmp_path):
    job = Job(Path("/base"), Path("/adapter"), Path("/out"), tmp_path, "bfloat16", 16)
    command = peer.command(Path("/programs"), job)
    said = " ".join(command) + "".join(file.read_text() for file in tmp_path.iterdir())
    assert command[0].startswith("/programs/")
    assert all(text in said for text in ("/base", "/adapter", "/out"))
    assert not peer.installed(tmp_path)


# Measuring


def child(tmp_path, code):
    out = tmp_path / "out"
    out.mkdir()
    return timed([sys.executable, "-c", code], out=out, log=tmp_path / "child.log")


def test_peak_memory_is_what_the_child_holds_whatever_its_parent_holds(tmp_path):
    ballast = bytearray(os.urandom(1)) * 200_000_000  # of the parent: it must not count
    small = child(tmp_path, "pass")
    (tmp_path / "out").rmdir()
    large = child(tmp_path, "held = bytearray(b'x') * 100_000_000")
    assert len(ballast) > small.peak_rss_bytes * 2
    assert large.peak_rss_bytes - small.peak_rss_bytes == pytest.approx(100e6, rel=0.1)


def test_a_run_has_its_time_and_the_phases_that_it_tells(tmp_path):
    sample = child(
        tmp_path,
        "import time, json; time.sleep(0.2); print(json.dumps({'seconds': {'copy': 1, 'new': 2, 'merge': 4}}))",
    )
    assert 0.2 <= sample.wall_s <= sample.durable_s < 5
    assert sample.phases == {"copy": 1.0, "new": 2.0, "merge": 4.0}
    assert sample.merge_phase_s == 5
    assert sample.merge_part_s == 4


def test_a_run_that_tells_no_phases_has_no_merge_phase(tmp_path):
    assert child(tmp_path, "print('[1]')").merge_phase_s is None


def test_a_failure_is_told_with_its_last_line(tmp_path):
    with pytest.raises(RunError, match="failed with exit code 1: out of luck"):
        child(tmp_path, "raise SystemExit('out of luck')")


def test_a_failure_does_not_tell_where_files_are(tmp_path):
    with pytest.raises(RunError, match=r"exit code 1: cannot open …/here or …/there \(see"):
        child(tmp_path, "raise SystemExit('cannot open /secret/place/here or /other/there')")


def test_a_program_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RunError, match="no-such-program cannot be started"):
        timed(["no-such-program"], out=tmp_path, log=tmp_path / "log")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_both_states_of_the_page_cache_leave_the_files_alone(tmp_path):
    file = tmp_path / "in" / "weights"
    file.parent.mkdir()
    file.write_bytes(b"x" * 10_000)
    for prepare in measure.CACHES.values():
        prepare([file.parent])
        assert file.read_bytes() == b"x" * 10_000


def test_what_does_not_fit_on_the_disk_is_refused_in_one_sentence(tmp_path):
    entrants = contenders(("cp", "ours"), ("lora",), (), tmp_path)
    options = running.Options(("lora",), 1, 1, (), "warm", tmp_path, keep=False, settle_s=0)
    case = Case(1e9, "bfloat16", "all", 16)
    with pytest.raises(running.RoomError, match=r"1e\+09 GB.* needs \d+\.\d GB of disk .* GB are free$"):
        running.check_disk(case, entrants, running.places_of(options, case), int(1e18))


def test_other_tools_take_part_at_the_sizes_that_are_named(tmp_path):
    cp, peft = contenders(("cp", "peft"), ("lora",), (), tmp_path)
    options = running.Options(("lora",), 1, 1, (1.0,), "warm", tmp_path, keep=False, settle_s=0)
    assert running.takes_part(options, CASE, cp)
    assert not running.takes_part(options, CASE, peft)
    assert running.takes_part(options, Case(1.0, "bfloat16", "all", 16), peft)


# Results


def test_a_median_is_over_the_rounds_that_have_the_contender():
    found = outcome()
    assert found.middle("cp", "wall_s") == 2
    assert found.middle("peft", "wall_s") == 15
    assert found.middle("ours-1w", "merge_phase_s") == 4
    assert found.middle("cp", "merge_phase_s") is None
    assert found.phases("ours-2w") == {"plan": 0.1, "copy": 1, "load": 9, "merge": 1}


def test_a_ratio_is_taken_round_by_round():
    found = outcome()
    assert found.ratio("ours-1w", "cp", "wall_s") == 4  # of 4, 4.5 and 1.25; the medians' would be 2.5
    assert found.ratio("ours-1w", "cp", "merge_phase_s", "wall_s") == 2  # of 3, 2 and 1
    assert found.ratio("peft", "ours-1w", "wall_s") == pytest.approx((10 / 4 + 20 / 9) / 2)
    assert found.ratio("cp", "ours-1w", "merge_phase_s") is None
    assert found.ratio("cp", "nobody", "wall_s") is None


def test_results_come_back_from_json_as_they_went(tmp_path):
    written = made(outcome(), outcome(Case(6.0, "bfloat16", "qv", 8)))
    written.write(tmp_path / "new" / "results.json")
    assert results.read(tmp_path / "new" / "results.json") == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outcomes": [{}]}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json has no results"):
        results.read(tmp_path / "r.json")


# Tables


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rows]


def test_the_table_of_sizes_has_every_contender_with_its_ratios():
    rows = cells(tables.markdown("sizes", made()))
    assert [row["contender"] for row in rows] == ["cp", "ours-1w", "ours-2w", "peft"]
    assert rows[1] == {
        "base, GB": "3.00",
        "contender": "ours-1w",
        "whole process, s": "5.00",
        "× cp": "4.00",
        "merge phase, s": "4.00",
        "merge phase × cp": "2.00",
        "on the disk, s": "5.00",
        "on the disk × cp": "2.00",
        "peak memory, MB": "260",
    }


def test_the_table_of_workers_tells_how_much_faster_more_of_them_are():
    rows = cells(tables.markdown("workers", made()))
    assert [row["contender"] for row in rows] == ["ours-1w", "ours-2w"]
    assert [row["merge phase, speed-up"] for row in rows] == ["1.00", "1.50"]  # of 1.5, 2 and 4/3
    assert [row["merge part, speed-up"] for row in rows] == ["1.00", "2.00"]  # of 2, 3 and 1


def test_the_table_of_peers_says_what_their_output_is_beside_ours():
    text = tables.markdown("peers", made())
    assert cells(text)[-1]["output, compared with ours"] == "the same 10 tensors, value for value"
    assert "- axolotl at 3 GB, bfloat16, targets all, rank 16: it has no room." in text
    assert "mergekit 0.1.5" not in text  # it took no part


def test_columns_stand_in_a_table_where_they_vary_and_in_its_notes_where_not():
    text = tables.markdown("targets", made(outcome(), outcome(Case(3.0, "bfloat16", "qv", 16))))
    assert {row["targets"] for row in cells(text)} == {"all", "qv"}
    assert "base, GB" not in cells(text)[0]
    assert "- All rows: base, GB 3.00; dtype bfloat16." in text


@pytest.mark.parametrize("name", tables.KINDS)
def test_every_table_says_what_made_it(name):
    text = tables.markdown(name, made())
    assert "- `python scripts/bench.py --size 3`, 2026-01-31." in text
    assert (
        "2 cores of A Processor, 8 GiB of memory, ext4, Linux; Python 3.11.7, torch 2.13.0, PEFT 0.21.2"
        in text
    )
    assert "The whole process includes start-up, and for lora-merge verification" in text
    assert "- Medians of 3 rounds" in text
    assert "Page cache warm" in text


def test_memory_that_grows_is_not_called_flat():
    larger = outcome(Case(6.0, "bfloat16", "all", 16))
    assert "Peak memory of ours-1w is flat" in tables.markdown("sizes", made(outcome(), larger))
    for samples in larger.rounds:
        samples["ours-1w"] = ours(1, 1, 1, peak=300e6)
    assert "Peak memory of ours-1w is not flat" in tables.markdown("sizes", made(outcome(), larger))


def test_a_block_is_put_between_its_markers_and_nothing_else_changes():
    page = "a\n<!-- bench:sizes -->\nold\n<!-- /bench:sizes -->\nb\n<!-- bench:peers -->\n<!-- /bench:peers -->\n"
    once = tables.replace_block(page, "sizes", "new")
    assert once == page.replace("\nold\n", "\n\nnew\n\n")
    assert tables.replace_block(once, "sizes", "new") == once


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!-- bench:x -->",
        "<!-- /bench:x --><!-- bench:x -->",
        "<!-- bench:x --><!-- bench:x --><!-- /bench:x -->",
        "<!-- bench:x --><!-- /bench:x --><!-- /bench:x -->",
    ],
)
def test_a_page_without_its_two_markers_is_refused(page):
    with pytest.raises(ValueError, match="once each and in this order"):
        tables.replace_block(page, "x", "new")


def test_the_page_has_the_markers_of_every_table():
    page = (ROOT / "docs" / "performance.md").read_text()
    for name in tables.KINDS:
        assert "new block" in tables.replace_block(page, name, "new block")


# Comparing


def test_a_difference_is_counted_in_steps_of_our_dtype(tmp_path):
    import torch
    from safetensors.torch import save_file

    one = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    moved = one.clone()
    moved[0, 0] += 2**-7  # the neighbour of 1
    for name, tensors in {
        "ours": {"w": one, "only": one.clone(), "cast": one.clone()},
        "other": {"w": moved, "new": one.clone(), "cast": one.float()},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = difference(tmp_path / "ours", tmp_path / "other")
    assert (found.missing, found.extra, found.changed) == (("only",), ("new",), ("cast",))
    assert (found.n_different_values, found.max_steps, found.max_difference) == (1, 1.0, 2**-7)
    assert "6.2 % of the values differ, by at most 1 × the step of bfloat16" in str(found)
    assert difference(tmp_path / "ours", tmp_path / "ours").identical


# The whole


def test_the_plot_has_a_line_for_every_contender(tmp_path):
    found = outcome()
    smaller = results.Outcome(Case(1.0, "bfloat16", "all", 16), 1_000_000_000, 0.9, found.rounds)
    stranger = results.Outcome(Case(2.0, "bfloat16", "qv", 16), 2_000_000_000, 0.9, found.rounds)
    alike = plot.comparable([made(found), made(stranger, smaller)])
    assert plot.series(alike, "wall_s")["cp"] == [(1.0, 2), (3.0, 2)]
    assert set(plot.series(alike, "wall_s")) == {"cp", "ours-1w", "ours-2w", "peft"}


def test_the_plot_is_a_picture(bench, tmp_path):
    pytest.importorskip("matplotlib")
    made().write(tmp_path / "r.json")
    run = CliRunner().invoke(bench.main, ["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "p.png")])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_is_described_without_saying_whose_it_is(tmp_path):
    said = json.dumps(machine.machine(tmp_path))
    assert os.uname().nodename not in said
    assert str(tmp_path) not in said
    assert machine.filesystem_of(tmp_path) in said


def test_a_missing_peer_is_refused_with_the_command_that_installs_it(bench, tmp_path):
    run = CliRunner().invoke(bench.main, ["--only", "mergekit", "--cache-dir", str(tmp_path)])
    assert run.exit_code == 1
    assert "mergekit is not installed: python scripts/bench.py install-peer mergekit" in run.output


@pytest.mark.system
@pytest.mark.slow
def test_a_tiny_merge_is_measured_and_put_into_the_page(bench, tmp_path):
    cache, file, page = tmp_path / "cache", tmp_path / "results.json", tmp_path / "page.md"
    words = ["--size", "0.005", "--only", "cp,ours", "--workers", "1", "--runs", "1", "--settle", "0"]
    run = CliRunner().invoke(bench.main, [*words, "--cache-dir", str(cache), "--json", str(file)])
    assert run.exit_code == 0, run.output
    saved = results.read(file)
    assert (
        saved.command == "python scripts/bench.py --size 0.005 --workers 1 --runs 1 --only cp,ours --settle 0"
    )
    (found,) = saved.outcomes
    assert found.names() == ["cp", "ours-1w"]
    assert found.middle("ours-1w", "merge_phase_s") > 0
    assert str(tmp_path) not in file.read_text()
    assert not [path for path in cache.iterdir() if path.is_dir()], "inputs and outputs are removed"
    page.write_text("<!-- bench:sizes -->\n<!-- /bench:sizes -->\n")
    run = CliRunner().invoke(bench.main, ["table", "sizes", str(file), "--page", str(page)])
    assert run.exit_code == 0, run.output
    assert [row["contender"] for row in cells(page.read_text())] == ["cp", "ours-1w"]
