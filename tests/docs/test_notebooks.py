"""The notebooks run, on the demo's model after a few steps of training, and print what they say."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
STEPS = 4
"""Steps of training: no text of a notebook depends on how well the model answers."""

HOLDS = {
    "first_merge": "report.verdict.ok and 0 < difference < 0.1 and answer(merged)",
    "inspect_an_adapter": "verdicts['LMDeploy'] == 'yes' and dict(found.rank_counts) == {8: 28}",
    "several_adapters": "total.verdict.ok and ties.verdict.ok and proof.ok and not damaged.ok",
}
"""Notebook → what holds after its last cell."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a directory that looks like a clone after ``make demo``."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import demo

    root = tmp_path_factory.mktemp("clone")
    base, adapter = root / ".demo" / "base", root / ".demo" / "adapter"
    demo.build_base(base, n_steps=STEPS)
    demo.train_adapter(base, adapter, n_steps=STEPS)
    return root


def test_every_notebook_is_listed_and_run():
    names = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    page = (NOTEBOOKS / "README.md").read_text()

    assert names == set(HOLDS)
    assert all(f"({name}.ipynb)" in page for name in names)


@pytest.mark.system
@pytest.mark.loopback  # the kernel's own sockets, on this machine
@pytest.mark.parametrize("name", HOLDS)
def test_a_notebook_runs(name, clone, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"assert {HOLDS[name]}"))

    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(clone)}}).execute()


@pytest.mark.parametrize("name", HOLDS)
def test_a_notebook_is_stored_without_outputs(name):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert not any(cell.outputs or cell.execution_count for cell in code)
