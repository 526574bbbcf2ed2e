"""runs.py: files are complete or as they were; points that differ or lack something are told apart.

Full disks and kills are in test_pretrain.py, and what is refused in test_bad_input.py.
"""

import json
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch

from ofa_encoder import load_checkpoint
from parts.runs import (
    already_done,
    atomic_write,
    command,
    differing,
    pick_device,
    read_point,
    save,
    save_point,
    use_bf16,
    warning,
)

REPO = Path(__file__).parent.parent
POINT = REPO / "results/ofa/pool-encoder-lam0-seed0.json"


def test_a_file_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "x.pt"
    save({"a": torch.arange(3)}, path)
    said = r"x.pt could not be written \(no space\); what was there before is intact"
    with pytest.raises(OSError, match=said), atomic_write(path) as file:
        file.write(b"half")
        raise OSError("no space")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert load_checkpoint(path)["a"].tolist() == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_is_known_by_its_hash():
    a = {"checkpoint": "here.pt", "checkpoint_sha1": "1", "data_sha1": None}
    assert differing(a, {"checkpoint": "there.pt", "checkpoint_sha1": "1"}) == []
    assert differing(a, {"checkpoint": "here.pt", "checkpoint_sha1": "2"}) == ["checkpoint_sha1"]


def test_data_are_known_by_their_hash_if_they_have_one():
    a = {"data": "here.tsv", "data_sha1": "1"}
    assert differing(a, {"data": "there.tsv", "data_sha1": "1"}) == []
    assert differing(a, {"data": "here.tsv", "data_sha1": "2"}) == ["data_sha1"]
    assert "data" in differing(a, {"data": "asterisk", "data_sha1": None})
    assert differing({"data": "one"}, {"data": "another"}) == ["data"]


def test_a_point_that_lacks_what_guessing_reaches_can_be_read(tmp_path, capsys):
    point = read_point(POINT)
    point.pop("guessing", None)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(point))
    assert already_done(path, point["config"])
    there = f"{path} is there: test mAP {point['test']:.1f} % at 20.0 ms a token\n"
    assert capsys.readouterr().out == there


def test_a_head_for_all_rates_needs_their_rows(tmp_path):
    point = read_point(POINT)
    point["config"]["lam"] = "any"
    path = tmp_path / "any.json"
    path.write_text(json.dumps({**point, "rows": []}))
    assert read_point(path)["rows"] == []
    path.write_text(json.dumps(point))
    with pytest.raises(ValueError, match="any.json is no point"):
        read_point(path)


def test_a_point_is_not_done_without_the_head_that_is_asked_for(tmp_path):
    point = read_point(POINT)
    path = tmp_path / "point.json"
    path.write_text(json.dumps(point))
    assert already_done(path, point["config"], with_head=False)
    assert not already_done(path, point["config"], with_head=True)
    path.with_suffix(".pt").touch()
    assert already_done(path, point["config"], with_head=True)


@pytest.mark.parametrize(
    "metric, test, guess, warned",
    [
        ("CER", 30.0, 80.0, False),
        ("CER", 80.0, 80.0, True),
        ("CER", 90.0, 80.0, True),
        ("mAP", 50.0, 20.0, False),
        ("mAP", 20.0, 20.0, True),
        ("accuracy", 10.0, 20.0, True),
    ],
)
def test_a_score_no_better_than_guessing_is_named(metric, test, guess, warned):
    text = warning({"metric": metric, "test": test, "guessing": guess})
    assert text.startswith("; NO BETTER THAN GUESSING") == warned
    assert (f"reach {guess} %" in text) == warned


def test_a_point_is_saved_where_git_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    save_point(tmp_path / "point.json", {"test": 1.0}, "cpu")
    point = json.loads((tmp_path / "point.json").read_text())
    assert point["test"] == 1.0 and point["commit"] == ""
    assert f"thread, cpu, torch {torch.__version__}" in point["machine"]


def test_a_command_has_the_flags_that_are_not_at_their_defaults():
    parser = ArgumentParser()
    parser.add_argument("--lam", type=float, nargs="+", default=[0.0])
    parser.add_argument("--data", default="asterisk")
    parser.add_argument("--unfreeze", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="runs/x")
    flags = ["--lam", "0", "0.5", "--data", "my words.tsv", "--unfreeze", "--seeds", "3"]
    args = parser.parse_args(flags)
    args.device = "cpu"

    python, script, *words = shlex.split(command("x.py", parser, args, 0.5, 2))
    again = parser.parse_args(words)
    assert [python, script] == ["python", "x.py"]
    assert again.lam == [0.5] and again.seed == 2 and again.seeds == 1
    assert again.data == "my words.tsv" and again.unfreeze and again.device == "auto"
    assert again.out == "runs/again"


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == torch.device("cuda", int(rank))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than GPUs.*--nproc-per-node 2"):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_bf16_is_for_cuda_alone(precision, device):
    """On a CPU it can be wrong without a word, so nothing but CUDA ever gets it."""
    args = Namespace(precision=precision)
    if precision == "bf16" and device != "cuda":
        with pytest.raises(ValueError, match=f"--precision bf16 is for CUDA, and this is {device}"):
            use_bf16(args, torch.device(device))
    else:
        wanted = device == "cuda" and precision != "fp32"
        assert use_bf16(args, torch.device(device)) == wanted
