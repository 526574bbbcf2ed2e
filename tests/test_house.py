"""The files lie as docs/extending.md and README say: stages on top, imports that only go down."""

import ast
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
STAGES = ["cif", "ofa_encoder", "pretrain", "finetune", "adaptive_lambda"]


def module_name(path):
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


FILES = {
    module_name(path): path
    for folder in (REPO, REPO / "parts", REPO / "extras")
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
}


def imported_by(name):
    """All modules that a file imports, in order, those of other projects included."""
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [full if full in FILES else node.module for full in names]
    return found


OURS = {name: {m for m in imported_by(name) if m in FILES} for name in FILES}


def test_the_five_stages_are_on_top():
    assert sorted(name for name in FILES if "." not in name) == sorted(STAGES)


def test_what_can_be_copied_needs_little():
    """cif.py alone; ofa_encoder.py with cif.py beside it."""
    standard = {"typing", "math", "dataclasses", "pathlib"}
    others = {name: {m.split(".")[0] for m in imported_by(name)} - standard for name in STAGES[:2]}
    assert others == {"cif": {"torch"}, "ofa_encoder": {"torch", "torchaudio", "cif"}}


def test_imports_only_go_down():
    """cif < ofa_encoder < parts < the other stages < extras; and no circle."""
    for name, imports in OURS.items():
        assert name.startswith("extras.") or not any(m.startswith("extras.") for m in imports)
        if name.startswith("parts."):
            assert not imports & {"pretrain", "finetune", "adaptive_lambda"}

    def below(name, path=()):
        assert name not in path, f"a circle of imports: {path}"
        for imported in OURS[name]:
            below(imported, (*path, name))

    for name in FILES:
        below(name)


def test_threads_are_set_before_torch_is_loaded():
    """Each script that computes for long imports parts first: see parts/__init__.py."""
    for name in ("pretrain", "finetune", "adaptive_lambda", "extras.benchmark"):
        first = next(m for m in imported_by(name))
        assert first == "parts", f"{name} imports {first} first"


def test_what_threads_are_told():
    """parts sets it, unless the user has."""
    show = "import parts, os; print(os.environ['GOMP_SPINCOUNT'], "
    show += "os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    for given, expected in (({}, "1000 8"), ({"GOMP_SPINCOUNT": "5"}, "5 8")):
        command = [sys.executable, "-c", show]
        done = subprocess.run(
            command, cwd=REPO, env={**clean, **given}, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
