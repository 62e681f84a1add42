"""The notebook runs, and its file holds the kinds of outputs that it gives."""

from __future__ import annotations

import re

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT


def kinds(notebook) -> list[list[str]]:
    """Return the kinds of outputs of each cell, without warnings."""
    return [
        [
            "picture" if "image/png" in output.get("data", {}) else output.output_type
            for output in cell.get("outputs", ())
            if output.get("name") != "stderr"
        ]
        for cell in notebook.cells
    ]


def test_the_code_of_the_notebook_runs(monkeypatch):
    """In this process, which is faster, without a kernel and so without pictures."""
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for cell in nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(re.sub(r"^%.*", "", cell.source, flags=re.MULTILINE), names)
    plt.close("all")
    recovered = names["recovered"]
    assert recovered[0, names["CHANGED"]] == pytest.approx(1, abs=1e-3)
    assert recovered[:, : names["CHANGED"]].abs().max() < 1e-3  # attention looks back only
    assert (names["ranks"][-1] == 1).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of zmq, on the encryption of loopback
def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    stored = kinds(notebook)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    assert kinds(notebook) == stored
    assert sum(kind.count("picture") for kind in stored) == 4


def test_the_file_holds_no_warnings_and_no_paths():
    text = (ROOT / "docs/notebook.ipynb").read_text()
    assert '"stderr"' not in text
    assert "site-packages" not in text
