"""tasks.py and finetune.py on real speech: tasks, metrics, sweeps, and mistakes."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import finetune
from extras import predict
from finetune import average_precision, guessing, score
from ofa_encoder import PRESETS, OFAEncoder
from parts.data import SPLITS
from parts.runs import already_done, read_point, save, warning
from parts.tasks import KINDS, Task, draw_splits, draw_splits_by_label, load_task

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def spoken(asterisk, tmp_path_factory):
    """A TSV of sixty real prompts, English or Russian, at several rates, with text and label."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = ["path\ttext\tlabel\tsplit"]
    for language in ("en", "ru"):
        chosen = [
            i
            for i, u in enumerate(asterisk.utterances)
            if u.language == language and 8_000 < u.samples < 24_000
        ][:30]
        for k, i in enumerate(chosen):
            rate = (16_000, 8_000, 22_050)[k % 3]
            sound = asterisk[i].numpy()
            sound = np.interp(
                np.arange(int(len(sound) * rate / 16_000)) * 16_000 / rate,
                np.arange(len(sound)),
                sound,
            )
            soundfile.write(folder / f"{language}{k}.flac", sound, rate)
            split = "test" if k % 5 == 0 else "valid" if k % 5 == 1 else "train"
            rows.append(f"{language}{k}.flac\t{asterisk.utterances[i].text}\t{language}\t{split}")
    (folder / "spoken.tsv").write_text("\n".join(rows) + "\n")
    return folder / "spoken.tsv"


@pytest.fixture
def run(spoken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(OFAEncoder(PRESETS["tiny"]).checkpoint(), "encoder.pt")
    save(OFAEncoder(replace(PRESETS["tiny"], compression="average2")).checkpoint(), "fixed.pt")

    def run(*flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "finetune.py",
                "--checkpoint",
                "encoder.pt",
                "--data",
                str(spoken),
                "--epochs",
                "3",
                "--out",
                "out",
                *flags,
            ],
        )
        finetune.main()

    return run


def test_embedded_tasks(asterisk):
    tasks = {kind: load_task(kind) for kind in KINDS}
    split_of = {u.id: split for split in SPLITS for u in asterisk.part(split).utterances}
    for task in tasks.values():
        assert all(
            split_of[u.id] == split
            for u, split in zip(task.speech.utterances, task.splits, strict=True)
        )
        assert len(task.targets) == len(task.speech) > 900
    assert {u.language for u in tasks["ctc"].speech.utterances} == {"en", "es"} and tasks[
        "ctc"
    ].metric == "CER"
    translated = {
        u.id: t for u, t in zip(tasks["seq2seq"].speech.utterances, tasks["seq2seq"].targets)
    }
    assert (
        translated["ru/conf-getpin"]
        == translated["it/conf-getpin"]
        == ["please", "enter", "conference", "number"]
    )
    heard_in = {
        w: {
            u.group
            for u, t, s in zip(
                tasks["seq2seq"].speech.utterances,
                tasks["seq2seq"].targets,
                tasks["seq2seq"].splits,
            )
            if s == "train" and w in t
        }
        for w in tasks["seq2seq"].symbols
    }
    assert all(len(groups) >= 4 for groups in heard_in.values())
    concepts = {u.id: t for u, t in zip(tasks["pool"].speech.utterances, tasks["pool"].targets)}
    assert (
        concepts["es/conf-enteringno"] == {"conference", "number"}
        and len(tasks["pool"].symbols) == 8
    )


def test_metrics_by_hand():
    task = Task("ctc", "CER", None, [], [], [])
    assert score(task, [[1, 2, 3], []], [[1, 3], [4, 5]]) == pytest.approx(100 * (1 + 2) / 4)
    assert score(task, [[0]], [[-1]]) == 100  # a symbol that train does not have can't be right
    task = Task("pool", "accuracy", None, [], [], [])
    assert score(task, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], [[1], [1]]) == 50
    assert average_precision(np.ones(4), np.array([True, False, False, True])) == 0.5
    assert average_precision(
        np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    ) == pytest.approx((1 + 2 / 3) / 2)
    task = Task("pool", "mAP", None, [], [], [])
    assert score(task, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [[0], [1]]) == 100


def test_split_is_drawn_by_seed_if_not_given(spoken, tmp_path):
    lines = spoken.read_text().splitlines()
    for line in lines[1:]:
        name = line.split("\t")[0]
        (tmp_path / name).symlink_to(spoken.parent / name)
    (tmp_path / "n.tsv").write_text("\n".join("\t".join(line.split("\t")[:3]) for line in lines))
    a, b, c = (load_task("pool", tmp_path / "n.tsv", seed=s).splits for s in (0, 0, 1))
    assert a == b != c and (a.count("train"), a.count("valid"), a.count("test")) == (42, 6, 12)


@pytest.mark.parametrize("seed", range(5))
def test_every_label_is_in_train_if_a_split_is_drawn(seed):
    sizes = {"once": 1, "twice": 2, "thrice": 3, "often": 34, "mostly": 60}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    paths = [f"{n}.wav" for n in range(100)]
    splits = draw_splits_by_label(paths, labels, seed)
    assert [splits.count(split) for split in SPLITS] == [70, 10, 20]
    parts = {label: [s for s, other in zip(splits, labels) if other == label] for label in sizes}
    assert all("train" in part for part in parts.values())
    for label in ("often", "mostly"):
        for split, share in zip(SPLITS, (0.7, 0.1, 0.2)):
            assert abs(parts[label].count(split) - share * sizes[label]) <= 2
    assert splits == draw_splits_by_label(paths, labels, seed)
    assert splits != draw_splits_by_label(paths, labels, seed + 1)

    # A file that is listed again stays on its side, and changes nothing for the others.
    again = draw_splits_by_label([*paths, *paths], [*labels, *["other"] * 100], seed)
    assert again == [*splits, *splits]


def test_few_files_and_many_labels_can_be_split():
    paths = [f"{n}.wav" for n in range(12)]
    splits = draw_splits_by_label(paths, [str(n % 10) for n in range(12)], 0)
    assert sorted(splits) == ["test"] + ["train"] * 10 + ["valid"]


def test_a_split_for_texts_is_drawn_without_looking_at_them(spoken, tmp_path):
    lines = [line.split("\t") for line in spoken.read_text().splitlines()]
    rows = [f"{spoken.parent / path}\t{text}" for path, text, *_ in lines[1:]]
    (tmp_path / "n.tsv").write_text("\n".join(["path\ttext", *rows]))
    files = [str((spoken.parent / path).resolve()) for path, *_ in lines[1:]]
    assert load_task("ctc", tmp_path / "n.tsv").splits == draw_splits(files, 0)
    assert load_task("seq2seq", tmp_path / "n.tsv").splits == draw_splits(files, 0)


def test_guessing_is_what_the_answers_reach_when_shuffled():
    labels = Task("pool", "accuracy", None, [], [], [])
    targets = [[n % 2] for n in range(40)]
    right = [torch.tensor([1.0 - n % 2, n % 2]) for n in range(40)]
    assert score(labels, right, targets) == 100
    assert 50 <= guessing(labels, right, targets) <= 90
    assert guessing(labels, right[:2], targets[:2]) == 100  # as half of the deals of two
    always_the_same = [torch.tensor([1.0, 0.0])] * 40
    assert guessing(labels, always_the_same, targets) == 50

    texts = Task("ctc", "CER", None, [], [], [])
    targets = [[n, n + 1, n + 2] for n in range(0, 60, 3)]
    assert score(texts, targets, targets) == 0
    assert 50 <= guessing(texts, targets, targets) <= 100
    assert guessing(texts, targets[:2], targets[:2]) == 0
    assert guessing(texts, [[0, 1]] * 20, targets) == score(texts, [[0, 1]] * 20, targets)
    targets = [list(range(n)) for n in range(1, 40)]  # always the same deals
    assert guessing(texts, targets, targets) == guessing(texts, targets, targets)


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


def test_points_from_before_guessing_can_be_read(tmp_path, capsys):
    point = read_point(REPO / "results/ofa/pool-encoder-lam0-seed0.json")
    point.pop("guessing", None)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(point))
    assert already_done(path, point["config"])
    there = f"{path} is there: test mAP {point['test']:.1f} % at 20.0 ms a token\n"
    assert capsys.readouterr().out == there


def test_a_tsv_task_is_learned(run):
    """Which language is spoken, by which of two voices: easy, even from log-mels."""
    run("--task", "pool", "--features", "logmel", "--epochs", "60")
    run(
        "--checkpoint",
        str(REPO / "checkpoints/ofa-tiny.pt"),
        "--task",
        "pool",
        "--lam",
        "0",
        "0.5",
        "--seeds",
        "2",
        "--epochs",
        "20",
    )
    logmel, *points = [
        json.loads(p.read_text())
        for p in sorted(Path("out").glob("*.json"), key=lambda p: ("encoder" in p.name, p.name))
    ]
    assert logmel["test"] >= 75 and logmel["metric"] == "accuracy"
    assert [(p["config"]["lam"], p["config"]["seed"]) for p in points] == [
        (0, 0),
        (0, 1),
        (0.5, 0),
        (0.5, 1),
    ]
    assert np.mean([p["test"] for p in points]) >= 85
    assert points[0]["frame_period_ms"] == 20 and points[2]["frame_period_ms"] > 25
    assert (
        points[2]["transformer_gflops_per_s"] < points[0]["transformer_gflops_per_s"]
        and points[2]["tokens"] < points[0]["tokens"]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--task", "ctc", "--symbols-per-token", "2"),
        ("--task", "ctc", "--head", "linear", "--features", "logmel"),
        ("--task", "seq2seq", "--beam", "2"),
        ("--task", "seq2seq", "--features", "deaf", "--ctc-weight", "0"),
        ("--task", "pool", "--features", "random"),
        ("--task", "pool", "--unfreeze", "--epochs", "1"),
    ],
)
def test_every_task_and_baseline_runs(run, flags, capsys):
    run(*flags)
    (path,) = Path("out").glob("*.json")
    point = json.loads(path.read_text())
    assert 0 <= point["test"] and point["epochs"] >= 1 and point["test_utterances"] == 12
    assert (point["transformer_gflops_per_s"] == 0) == ("logmel" in flags or "deaf" in flags)
    printed = capsys.readouterr().out.rstrip()
    if "deaf" in flags:  # it says the same of every utterance
        assert point["guessing"] == point["test"]
        assert printed.endswith(f"reach {point['guessing']:.1f} %)")
    run(*flags)
    there = f"is there: test {point['metric']} {point['test']:.1f} % at"
    assert f"{there} {point['frame_period_ms']:.1f} ms a token" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration .lr differ"):
        run(*flags, "--lr", "0.1")


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("pool", ()),
        ("ctc", ("--symbols-per-token", "2")),
        ("seq2seq", ("--unfreeze", "--beam", "2")),
    ],
)
def test_a_kept_head_says_of_the_files_what_it_said_in_the_test(
    run, spoken, kind, flags, monkeypatch, capsys
):
    # Kept, hidden states would be in half precision, and an answer might differ by a symbol.
    flags = (
        "--checkpoint",
        str(REPO / "checkpoints/ofa-tiny.pt"),
        "--task",
        kind,
        "--lam",
        "0.3",
        "--epochs",
        "12",
        "--save-heads",
        "--keep",
        "nothing",
        *flags,
    )
    run(*flags)
    point = json.loads(Path(f"out/{kind}-encoder-lam0.3-seed0.json").read_text())
    rows = [line.split("\t") for line in spoken.read_text().splitlines()[1:]]
    wanted = {
        str(spoken.parent / path): (text, label)
        for path, text, label, split in rows
        if split == "test"
    }
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["predict.py", f"out/{kind}-encoder-lam0.3-seed0.pt", *wanted])
    predict.main()
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said.keys() == wanted.keys()
    if kind == "pool":
        right = [
            said[path].startswith(label) and 0.5 <= int(said[path][4:-2]) / 100 <= 1
            for path, (_, label) in wanted.items()
        ]
        assert 100 * np.mean(right) == pytest.approx(point["test"]) and point["test"] > 60
    else:
        (example,) = point["examples"]  # the shortest one
        assert example["predicted"] in [
            said[path] for path, (text, _) in wanted.items() if text == example["wanted"]
        ]
    run(*flags)
    assert "is there" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_named_and_the_others_done(run, spoken, monkeypatch, capsys):
    run("--task", "pool", "--epochs", "1", "--save-heads")
    good = [str(spoken.parent / f"en{k}.flac") for k in range(2)]
    Path("noise.wav").write_bytes(b"RIFF and then nothing")
    capsys.readouterr()
    files = [good[0], "nowhere.wav", "noise.wav", good[1]]
    monkeypatch.setattr(sys, "argv", ["predict.py", "out/pool-encoder-lam0-seed0.pt", *files])
    with pytest.raises(SystemExit) as stop:
        predict.main()
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == good
    first, second = printed.err.splitlines()
    assert first.startswith("predict.py: nowhere.wav: ")
    assert second.startswith("predict.py: noise.wav: ")


def test_too_short_for_ctc_is_counted(run):
    run("--task", "ctc", "--lam", "0", "1.5", "--epochs", "1")
    slow, fast = (json.loads(p.read_text()) for p in sorted(Path("out").glob("*.json")))
    assert slow["infeasible_test"] == 0 < fast["infeasible_test"] <= 12


def test_what_cannot_be_written_leaves_the_points(run, unwritable, monkeypatch, capsys):
    save_point, saved = finetune.save_point, []

    def full_at_the_second(path, point):
        saved.append(path)
        with unwritable(path.parent) if len(saved) == 2 else nullcontext():
            save_point(path, point)

    flags = ("--task", "pool", "--seeds", "2", "--epochs", "1", "--features", "deaf")
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"seed1.json could not be written \(.*(too large|denied)"),
    ):
        patch.setattr(finetune, "save_point", full_at_the_second)
        run(*flags)
    (first,) = Path("out").iterdir()
    before = first.read_bytes()
    run(*flags)
    assert (
        f"{first} is there" in capsys.readouterr().out
        and first.read_bytes() == before
        and len(list(Path("out").iterdir())) == 2
    )


def test_same_seed_same_result(run):
    for out in ("a", "b"):
        run("--task", "pool", "--out", out)
    a, b = (json.loads(next(Path(out).glob("*.json")).read_text()) for out in ("a", "b"))
    assert a["test"] == b["test"] and a["valid"] == b["valid"]


def test_the_cost_of_an_unfrozen_encoder_is_its_own(run, monkeypatch):
    """Training moves α, and with it the frame period."""
    run("--task", "pool", "--lam", "1", "--epochs", "1", "--unfreeze", "--encoder-lr", "0.01")
    run("--task", "pool", "--lam", "1", "--epochs", "1", "--out", "frozen")
    unfrozen, frozen = (
        json.loads(next(Path(out).glob("*.json")).read_text()) for out in ("out", "frozen")
    )
    assert abs(unfrozen["frame_period_ms"] - frozen["frame_period_ms"]) > 1
