"""The notebooks run from top to bottom, and are committed with what they print and draw."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_committed_executed(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [bool(cell.outputs) for cell in code_cells(notebook)]
    resources = {"metadata": {"path": path.parent}}
    # Raises at the first error.
    NotebookClient(notebook, timeout=None, resources=resources).execute()
    executed = [bool(cell.outputs) for cell in code_cells(notebook)]
    assert executed == committed, "run `make notebooks`"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_threads_are_set_before_torch_is_loaded(path):
    """The first cell imports parts before anything that imports torch: see parts/__init__.py."""
    lines = code_cells(nbformat.read(path, as_version=4))[0].source.splitlines()
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert set(imports[: imports.index("parts")]) <= {"os", "sys"}
