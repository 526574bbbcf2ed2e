"""The README tells the truth: its Python runs, its links lead somewhere, its numbers are ours."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import adaptive_lambda
import finetune
import pretrain
from extras.claims import claims_table

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
README = PAGES[0].read_text()
PLUS_MINUS = r"\d+\.\d+ ± \d+\.\d+"


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
    assert values["out"].lengths.item() == values["out"].fired.fire_times.shape[1]
    assert "a token every" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page):
    """Every indented line `python SCRIPT.py FLAGS` is one that the script takes."""
    parsers = {
        "pretrain.py": pretrain.parse_arguments,
        "finetune.py": finetune.build_parser().parse_args,
        "adaptive_lambda.py": adaptive_lambda.build_parser().parse_args,
    }
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    python (\w+\.py .*)$", text, re.M):
        script, *flags = shlex.split(line, comments=True)
        parsers[script](flags)


def test_claims_are_those_of_the_points():
    claims = json.loads((REPO / "results/claims.json").read_text())
    assert claims_table(claims) in README, "copy the first table that extras.claims prints"


def test_numbers_are_those_of_the_results():
    ours = set(re.findall(PLUS_MINUS, (REPO / "results/results.md").read_text()))
    assert re.findall(PLUS_MINUS, (REPO / "docs/findings.md").read_text())
    for page in PAGES:
        assert not set(re.findall(PLUS_MINUS, page.read_text())) - ours
