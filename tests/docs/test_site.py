"""The website builds without a warning, and asks nothing of any other server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(
    r"<(?:script|img|source|iframe)[^>]*\ssrc=[\"']?(https?:)?//|<link[^>]*\shref=[\"']?(https?:)?//[^>]*stylesheet"
)


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    sys.path.insert(0, str(ROOT / "scripts"))
    import site_hooks

    return site_hooks


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_no_page_loads_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))

    assert len(pages) > 30
    assert not [page for page in pages if LOADED.search(page.read_text(encoding="utf-8"))]


def test_the_home_page_is_the_readme(site):
    text = (site / "index.html").read_text(encoding="utf-8")

    assert "Compared with other tools" in text
    assert 'href="faq/#which-base-for-qlora"' in text
    assert 'href="contributing/"' in text


def test_files_outside_of_docs_are_published(site):
    assert (site / "configs" / "batch.yaml").read_bytes() == (ROOT / "configs" / "batch.yaml").read_bytes()
    assert (site / "notebooks" / "first_merge.ipynb").is_file()
    assert (
        "largest difference of two logits" in (site / "notebooks" / "first_merge" / "index.html").read_text()
    )


@pytest.mark.parametrize(
    ("markdown", "written_in", "shown_as", "expected"),
    [
        ("[a](docs/faq.md#which)", "README.md", "index.md", "[a](faq.md#which)"),
        ("[a](../CONTRIBUTING.md)", "docs/design.md", "design.md", "[a](contributing.md)"),
        ("[a](../../README.md)", "docs/from/trl.md", "from/trl.md", "[a](../index.md)"),
        ("![a](picture.png)", "docs/x.md", "x.md", "![a](picture.png)"),
        ("[a](https://x.org/a.md)", "docs/x.md", "x.md", "[a](https://x.org/a.md)"),
        ("[a](#here)", "docs/x.md", "x.md", "[a](#here)"),
    ],
)
def test_a_link_leads_to_the_page_of_its_file(hooks, markdown, written_in, shown_as, expected):
    assert hooks.relinked(markdown, written_in, shown_as) == expected


def test_a_notebook_is_a_page_with_its_code_and_what_it_printed(hooks):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1\n"]}]},
        {"cell_type": "code", "source": [""], "outputs": []},
    ]

    page = hooks.notebook_page({"cells": cells}, "x.ipynb")

    assert (
        page
        == "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n[Download this notebook](x.ipynb)\n"
    )
