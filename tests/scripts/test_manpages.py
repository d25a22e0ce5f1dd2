"""Man pages are made of what ``--help`` is made of, and `man` shows them without a complaint."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lora_merge.cli import exits
from lora_merge.cli import main as app

ROOT = Path(__file__).parents[2]
MAN = ROOT / "man"
PAGES = ["lora-merge", *(f"lora-merge-{name}" for name in app.commands)]


def shown(page, columns=400):
    """Return a page as ``man`` shows it, with its complaints."""
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man or groff is not installed")
    environment = {
        **os.environ,
        "MANWIDTH": str(columns),
        "LC_ALL": "C.UTF-8",
        "MANROFFOPT": "-ww",
        "MANPAGER": "cat",
        "GROFF_NO_SGR": "1",
    }
    result = subprocess.run(
        ["man", "--warnings", "-l", MAN / f"{page}.1"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return re.sub(r".\x08", "", result.stdout), result.stderr


def test_the_pages_are_current():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "manpages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr


def test_there_is_a_page_for_each_command_and_no_other():
    assert {path.stem for path in MAN.iterdir()} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_man_shows_a_page_without_a_complaint(page):
    text, complaints = shown(page)

    assert complaints == ""
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"):
        assert re.search(rf"^{heading}$", text, re.MULTILINE), heading


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_every_option_with_its_sentence(page):
    name = page.removeprefix("lora-merge").removeprefix("-") or "merge"
    text = " ".join(shown(page)[0].split())

    for option in app.commands[name].params:
        if isinstance(option, click.Option):
            assert all(one in text for one in (*option.opts, *option.secondary_opts))
            assert " ".join(option.help.split()) in text


@pytest.mark.parametrize("name", app.commands)
def test_a_page_has_the_examples_of_the_help(name):
    text, _ = shown(f"lora-merge-{name}")
    lines = inspect.cleandoc(app.commands[name].help).splitlines()
    examples = [line.strip() for line in lines if line.startswith("  ")]

    assert examples
    for example in examples:
        assert example in text


def test_the_main_page_has_the_exit_codes():
    text = " ".join(shown("lora-merge")[0].split())

    for code, meaning in exits.MEANINGS.items():
        assert f"{code} {meaning}." in text


def test_mandoc_finds_no_error():
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")

    result = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "error", *sorted(MAN.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout


def test_a_page_that_is_not_current_is_named(tmp_path):
    """A copy of the pages and the script, in which a page was edited and one is left over."""
    for folder in ("lora_merge", "scripts", "man"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "man" / "lora-merge-merge.1").write_text("edited\n")
    (tmp_path / "man" / "lora-merge-gone.1").write_text("left over\n")

    result = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "manpages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"},
    )

    assert result.returncode == 1
    assert "lora-merge-gone.1" in result.stderr
    assert "lora-merge-merge.1" in result.stderr
    assert "lora-merge-plan.1" not in result.stderr
