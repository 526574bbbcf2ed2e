"""The README tells the truth: its Python runs, and its table of files is complete."""

import re
import shutil
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()


def test_python_blocks_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(sorted(folder.glob("*.wav"))[0], "my.wav")
    (tmp_path / "checkpoints").symlink_to(REPO / "checkpoints")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    values = {}
    for block in blocks:
        exec(block, values)
    assert values["out"].frame_period() == pytest.approx(60, rel=0.15)
    assert values["fired"].tokens.flatten().tolist() == [1.5, 3.0, 5.0]
    assert (
        values["out"].lengths.item() == values["out"].fired.fire_times.shape[1]
        and "a token every" in capsys.readouterr().out
    )


def test_numbers_are_those_of_the_results():
    found = re.findall(r"\d+\.\d+ ± \d+\.\d+", README)
    assert len(found) >= 10 and not set(found) - set(
        re.findall(r"\d+\.\d+ ± \d+\.\d+", (REPO / "results/results.md").read_text())
    )


def test_table_of_files():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert rows == {p.name: str(len(p.read_text().splitlines())) for p in REPO.glob("*.py")}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((docs/[^)]+)\)", README))))
def test_pictures_exist(path):
    assert (REPO / path).stat().st_size > 10_000
