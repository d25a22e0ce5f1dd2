"""A real browser, and pages of real runs for it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",  # tests may run as root, and open their own files alone
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str:
    """Return what these tests need and do not find, in a sentence; empty if all is there."""
    if importlib.util.find_spec("playwright") is None:
        return 'playwright is not installed (pip install "lora-merge[dev]")'
    if program() is None:
        return f"no browser found (looked for {', '.join(PROGRAMS)}; CHROMIUM=PATH names one)"
    return ""


def program() -> str | None:
    """Return the path of a Chromium."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, PROGRAMS)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Yield a browser without a window. Without one the tests are skipped; ``make browser`` makes that an error."""
    if why := missing():
        (pytest.fail if os.environ.get("LORA_MERGE_BROWSER") == "needed" else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program(), args=list(FLAGS))
        yield made
        made.close()


@pytest.fixture
def opened(browser) -> Iterator[Callable]:
    """Return a function that opens a page file. At the end, no page may have asked for anything or complained of anything."""
    contexts, complaints = [], []

    def open_page(path: Path, *, width: int = 1200, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    allowed = [one for one in complaints if not one.startswith("request: file:") or "/pages-" not in one]
    assert not allowed


@pytest.fixture(scope="session")
def base(pico) -> Path:
    return pico("llama")


@pytest.fixture(scope="session")
def adapter(base, pico_adapter) -> Path:
    return pico_adapter(base, target_modules=["q_proj", "down_proj", "lm_head"])


@pytest.fixture(scope="session")
def pages(base, adapter, cli, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Return name → the page of a run, and what --json printed in the same run."""
    root = tmp_path_factory.mktemp("pages-")
    out, broken = root / "merged", root / "broken"
    made: dict[str, tuple[Path, dict]] = {}

    def run(name: str, *arguments: object, code: int = 0) -> None:
        page = root / f"{name}.html"
        result = cli(*arguments, "--report", page, "--json")
        assert result.exit_code == code, result.output
        made[name] = page, json.loads(result.stdout)

    merge = ("merge", "--base", base, "--adapter", adapter, "--rounding", "adapter")
    run("merge", *merge, "--out", out)
    run("plan", "merge", "--base", base, "--adapter", adapter, "--out", root / "planned", "--dry-run")
    run("verification", "verify", out)
    shutil.copytree(out, broken)
    edit_tensors(
        broken / "model.safetensors", lambda found: found["model.layers.1.mlp.down_proj.weight"].add_(1)
    )
    run("failed-verification", "verify", broken, code=6)
    run("inspection", "inspect", adapter, "--base", base)
    misfit = root / "misfit"
    shutil.copytree(adapter, misfit)
    edit_json(misfit / "adapter_config.json", peft_type="NO_SUCH")
    run("failed-merge", *merge[:3], "--adapter", misfit, "--out", root / "none", code=4)
    jobs = [
        {"adapter": str(adapter), "out": str(out), "rounding": "adapter"},
        {"adapter": str(adapter), "out": str(root / "two")},
        {"adapter": str(root / "nothing"), "out": str(root / "three")},
    ]
    (root / "batch.yaml").write_text(json.dumps({"defaults": {"base": str(base)}, "jobs": jobs}))
    run("batch", "batch", root / "batch.yaml", "--keep-going", code=7)
    return made
