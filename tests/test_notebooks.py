"""The notebooks run from top to bottom, and are committed with what they print and draw.

Their exercises accept the solutions that they give.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """Cells in which the reader writes a function; their last line checks it."""
    return [cell for cell in code_cells(notebook) if "# your code" in cell.source]


def solved(notebook):
    """A cell for each exercise: the solution from the end of the notebook, and its check."""
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    cells = []
    for exercise in exercises(notebook):
        function = re.search(r"^def \w+\(", exercise.source, re.M)[0]
        (solution,) = (s for s in re.findall(r"```python\n(.*?)```", text, re.S) if function in s)
        check = exercise.source.splitlines()[-1]
        cells.append(nbformat.v4.new_code_cell(solution + check))
    return cells


def printed(cell):
    """All of a cell's text, which may come in several pieces: a line, then its end."""
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_committed_executed(path):
    notebook = nbformat.read(path, as_version=4)
    lesson = code_cells(notebook)
    committed = [bool(cell.outputs) for cell in lesson]
    solutions = solved(notebook)
    notebook.cells += solutions
    resources = {"metadata": {"path": path.parent}}
    # Raises at the first error.
    NotebookClient(notebook, timeout=None, resources=resources).execute()
    executed = [bool(cell.outputs) for cell in lesson]
    assert executed == committed, "run `make notebooks`"
    outputs = [output for cell in lesson for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for solution in solutions:
        assert "right!" in printed(solution), solution.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_threads_are_set_before_torch_is_loaded(path):
    """The first cell imports parts before anything that imports torch: see parts/__init__.py."""
    lines = code_cells(nbformat.read(path, as_version=4))[0].source.splitlines()
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert set(imports[: imports.index("parts")]) <= {"os", "sys"}
