"""The notebooks run from top to bottom, and are committed with what they print and draw."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_committed_executed(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": path.parent}}
    ).execute()  # raises at the first error
    assert [
        bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"
    ] == committed, "run `make notebooks`"
    assert any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
