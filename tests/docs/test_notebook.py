"""docs/notebook.ipynb: valid and without stored output, and (slow) run from its first cell to its last."""

import json
from pathlib import Path

import pytest

from benchmarks.update_figures import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_it_compiles_and_stores_no_output():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    for cell in code:
        compile("".join(cell["source"]), cell["id"], "exec")
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_it_runs(tmp_path: Path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    said = "".join(output.get("text", "") for output in shown)
    assert "bits per byte: 'import os" in said
    assert "model.gguf" in said
    assert (tmp_path / "runs" / "notebook" / "model.gguf").is_file()
