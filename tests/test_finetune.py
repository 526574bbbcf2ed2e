"""finetune.py, tasks.py and predict.py on real speech: tasks, metrics, sweeps, kept heads."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import finetune
from extras import predict
from ofa_encoder import PRESETS, OFAEncoder
from parts.cache import HiddenStateCache, UnfrozenEncoder
from parts.data import SPLITS
from parts.runs import save
from parts.scores import average_precision, bootstrap, guessing, score
from parts.tasks import (
    KINDS,
    Task,
    draw_splits,
    draw_splits_by_label,
    load_task,
    target_from,
)

REPO = Path(__file__).parent.parent
OFA_TINY = str(REPO / "checkpoints/ofa-tiny.pt")


@pytest.fixture(scope="module")
def spoken(asterisk, tmp_path_factory):
    """A TSV of sixty real prompts, English or Russian, in files of three rates, with text and
    label."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = ["path\ttext\tlabel\tsplit"]
    for language in ("en", "ru"):
        chosen = []
        for i, utterance in enumerate(asterisk.utterances):
            if utterance.language == language and 8_000 < utterance.samples < 24_000:
                chosen.append(i)
        for k, i in enumerate(chosen[:30]):
            name = f"{language}{k}.flac"
            rate = (16_000, 8_000, 22_050)[k % 3]
            soundfile.write(folder / name, resampled(asterisk[i].numpy(), rate), rate)
            split = ("test", "valid", "train", "train", "train")[k % 5]
            rows.append(f"{name}\t{asterisk.utterances[i].text}\t{language}\t{split}")
    (folder / "spoken.tsv").write_text("\n".join(rows) + "\n")
    return folder / "spoken.tsv"


def resampled(sound, rate):
    """Sound at 16 kHz to another rate, by linear interpolation."""
    times = np.arange(int(len(sound) * rate / 16_000)) * 16_000 / rate
    return np.interp(times, np.arange(len(sound)), sound)


@pytest.fixture
def run(spoken, tmp_path, monkeypatch):
    """run("--task", "pool", …) trains heads for three epochs in tmp_path; later flags win."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(OFAEncoder(PRESETS["tiny"]).checkpoint(), "encoder.pt")
    none = OFAEncoder(replace(PRESETS["tiny"], compression="none"))
    save(none.checkpoint(), "none.pt")
    base = ["finetune.py", "--checkpoint", "encoder.pt", "--data", str(spoken)]
    base += ["--epochs", "3", "--out", "out"]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [*base, *flags])
        finetune.main()

    return run


@pytest.fixture
def run_predict(monkeypatch, capsys):
    """run_predict(head, file, …) returns the lines that extras.predict prints."""

    def run_predict(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
        predict.main()
        return capsys.readouterr().out.splitlines()

    return run_predict


def points(folder="out"):
    """The points in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def rows_of(tsv):
    """path, text, label and split of each row, as strings."""
    return [line.split("\t") for line in tsv.read_text().splitlines()[1:]]


# Tasks of the embedded corpus.


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_split_as_the_corpus_is(asterisk, kind):
    split_of = {u.id: split for split in SPLITS for u in asterisk.part(split).utterances}
    task = load_task(kind)
    assert task.splits == [split_of[u.id] for u in task.speech.utterances]
    assert len(task.targets) == len(task.speech) > 900


def test_characters_are_english_and_spanish():
    task = load_task("ctc")
    assert {u.language for u in task.speech.utterances} == {"en", "es"}
    assert task.metric == "CER"


def test_translations_are_those_of_the_prompt():
    task = load_task("seq2seq")
    target = {u.id: words for u, words in zip(task.speech.utterances, task.targets)}
    assert target["ru/conf-getpin"] == ["please", "enter", "conference", "number"]
    assert target["it/conf-getpin"] == target["ru/conf-getpin"]


def test_each_word_of_the_translation_is_in_four_prompts_of_train():
    task = load_task("seq2seq")
    prompts = {word: set() for word in task.symbols}
    for i in task.indices("train"):
        for word in task.targets[i]:
            prompts[word].add(task.speech.utterances[i].group)
    assert all(len(groups) >= 4 for groups in prompts.values())


def test_concepts_are_those_of_the_prompt():
    task = load_task("pool")
    target = {u.id: concepts for u, concepts in zip(task.speech.utterances, task.targets)}
    assert target["es/conf-enteringno"] == {"conference", "number"}
    assert len(task.symbols) == 8


# Splits that are drawn.


def test_split_is_drawn_by_seed_if_not_given(spoken, tmp_path):
    lines = ["path\tlabel"]
    for path, _, label, _ in rows_of(spoken):
        lines.append(f"{spoken.parent / path}\t{label}")
    (tmp_path / "n.tsv").write_text("\n".join(lines))
    first, again, other = (load_task("pool", tmp_path / "n.tsv", seed=s).splits for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert [first.count(split) for split in SPLITS] == [42, 6, 12]


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pool"])
def test_a_split_for_texts_is_drawn_without_looking_at_them(spoken, tmp_path, kind):
    files = [str((spoken.parent / path).resolve()) for path, *_ in rows_of(spoken)]
    lines = [f"{file}\t{text}" for file, (_, text, *_) in zip(files, rows_of(spoken))]
    (tmp_path / "n.tsv").write_text("\n".join(["path\ttext", *lines]))
    assert load_task(kind, tmp_path / "n.tsv").splits == draw_splits(files, 0)


# Metrics, by hand.


def a_task(kind, metric, **more):
    return Task(kind, metric, None, [], [], [], **more)


def test_error_rates_are_edits_per_symbol():
    task = a_task("ctc", "CER")
    assert score(task, [[1, 2, 3], []], [[1, 3], [4, 5]]) == pytest.approx(100 * (1 + 2) / 4)


def test_a_symbol_that_train_lacks_cannot_be_right():
    assert score(a_task("ctc", "CER"), [[0]], [[-1]]) == 100


def test_accuracy():
    scores = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]
    assert score(a_task("pool", "accuracy"), scores, [[1], [1]]) == 50


def test_average_precision():
    one_of_two = average_precision(np.ones(4), np.array([True, False, False, True]))
    assert one_of_two == 0.5  # all are tied
    scores = np.array([0.9, 0.8, 0.7, 0.1])
    first_and_third = average_precision(scores, np.array([True, False, True, False]))
    assert first_and_third == pytest.approx((1 + 2 / 3) / 2)


def test_mean_average_precision_is_over_the_labels_that_occur():
    scores = [torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])]
    assert score(a_task("pool", "mAP"), scores, [[0], [1]]) == 100
    assert score(a_task("pool", "mAP"), scores, [[0, 1], [0]]) == 75  # (1 + 1/2) / 2


def test_a_letter_with_an_accent_is_one_symbol():
    for written in ("\u00c9t\u00e9", "E\u0301te\u0301"):  # the second is how macOS writes it
        assert target_from("ctc", written) == ["\u00e9", "t", "\u00e9"]
        assert target_from("seq2seq", written) == ["\u00e9t\u00e9"]
        assert target_from("pool", written) == "\u00c9t\u00e9"


def test_guessing_is_what_the_labels_reach_when_shuffled():
    task = a_task("pool", "accuracy")
    targets = [[n % 2] for n in range(40)]
    right = [torch.tensor([1.0 - n % 2, n % 2]) for n in range(40)]
    assert score(task, right, targets) == 100
    assert 50 <= guessing(task, right, targets) <= 90
    assert guessing(task, right[:2], targets[:2]) == 100  # as half of the deals of two
    always_the_same = [torch.tensor([1.0, 0.0])] * 40
    assert guessing(task, always_the_same, targets) == 50


def test_guessing_is_what_the_texts_reach_when_shuffled():
    task = a_task("ctc", "CER")
    targets = [[n, n + 1, n + 2] for n in range(0, 60, 3)]
    assert score(task, targets, targets) == 0
    assert 50 <= guessing(task, targets, targets) <= 100
    assert guessing(task, targets[:2], targets[:2]) == 0
    always_the_same = [[0, 1]] * 20
    assert guessing(task, always_the_same, targets) == score(task, always_the_same, targets)
    targets = [list(range(n)) for n in range(1, 40)]
    assert guessing(task, targets, targets) == guessing(task, targets, targets)  # the same deals


def in_groups(kind, metric, groups):
    """A task whose utterances are in these groups."""
    utterances = [SimpleNamespace(group=group) for group in groups]
    return Task(kind, metric, SimpleNamespace(utterances=utterances), [], [], [])


def test_bootstrap_draws_whole_groups():
    """Two of three utterances share a group, one of them right: an error rate between is possible
    only for draws of both groups."""
    task = in_groups("ctc", "CER", ["a", "a", "b"])
    draws = bootstrap(task, [[1], [2], [3]], [[1], [1], [3]], [0, 1, 2])
    assert len(draws) == 200
    assert {round(draw) for draw in draws} == {0, 33, 50}  # b b, a b, a a
    assert np.mean(draws) == pytest.approx(30, abs=5)  # a quarter, a half, a quarter of the draws


def test_bootstrap_counts_errors_as_the_score_does():
    """The same draws, by edits of groups and by scores of whole splits."""
    random = np.random.default_rng(1)
    texts = [random.integers(5, size=random.integers(1, 9)).tolist() for _ in range(60)]
    predicted = [text[1:] if k % 3 else text for k, text in enumerate(texts)]
    groups = [str(k // 4) for k in range(60)]
    task = in_groups("seq2seq", "WER", groups)
    draws = bootstrap(task, predicted, texts, list(range(60)))
    members = [[k for k in range(60) if groups[k] == group] for group in sorted(set(groups))]
    some = np.random.default_rng(0).integers(15, size=(200, 15))[7]
    drawn = [k for g in some for k in members[g]]
    expected = score(task, [predicted[k] for k in drawn], [texts[k] for k in drawn])
    assert draws[7] == pytest.approx(expected)
    assert np.std(draws) > 0.5


def test_bootstrap_of_labels():
    task = in_groups("pool", "accuracy", [str(k) for k in range(40)])
    right = [torch.tensor([1.0 - n % 2, n % 2]) for n in range(40)]
    targets = [[n % 2] for n in range(40)]
    assert set(bootstrap(task, right, targets, list(range(40)))) == {100.0}
    targets[0] = [1]
    draws = bootstrap(task, right, targets, list(range(40)))
    assert np.mean(draws) == pytest.approx(97.5, abs=0.7)


# Heads, and the points that they leave.


def test_log_mels_tell_which_language_is_spoken(run):
    """Each of the two languages has one voice: easy, even without an encoder."""
    run("--task", "pool", "--features", "logmel", "--epochs", "60")
    (point,) = points()
    assert point["metric"] == "accuracy"
    assert point["test"] >= 75


def test_the_encoder_tells_which_language_is_spoken_at_each_lam(run):
    flags = ("--checkpoint", OFA_TINY, "--task", "pool", "--epochs", "20")
    run(*flags, "--lam", "0", "0.5", "--seeds", "2")
    found = points()
    which = [(point["config"]["lam"], point["config"]["seed"]) for point in found]
    assert which == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]
    assert np.mean([point["test"] for point in found]) >= 85
    slow, fast = found[0], found[2]
    assert slow["frame_period_ms"] == 20
    assert fast["frame_period_ms"] > 25
    assert fast["tokens"] < slow["tokens"]
    assert fast["transformer_gflops_per_s"] < slow["transformer_gflops_per_s"]


EVERY_TASK_AND_BASELINE = [
    ("--task", "ctc", "--symbols-per-token", "2"),
    ("--task", "ctc", "--head", "linear", "--features", "logmel"),
    ("--task", "seq2seq", "--beam", "2"),
    ("--task", "seq2seq", "--features", "deaf", "--ctc-weight", "0"),
    ("--task", "pool", "--features", "random"),
    ("--task", "pool", "--features", "merge", "--checkpoint", "none.pt", "--lam", "0.7"),
    ("--task", "pool", "--unfreeze", "--epochs", "1"),
]


@pytest.mark.parametrize("flags", EVERY_TASK_AND_BASELINE, ids=" ".join)
def test_every_task_and_baseline_runs(run, flags, capsys):
    run(*flags)
    (point,) = points()
    assert point["test"] >= 0
    assert point["epochs"] >= 1
    assert point["test_utterances"] == 12
    has_encoder = "logmel" not in flags and "deaf" not in flags
    assert (point["transformer_gflops_per_s"] > 0) == has_encoder
    printed = capsys.readouterr().out.rstrip()
    if "deaf" in flags:  # its answer is always the same
        assert point["guessing"] == point["test"]
        assert printed.endswith(f"reach {point['guessing']:.1f} %)")

    # A point that exists is not computed again; one of another configuration is refused.
    run(*flags)
    there = f"is there: test {point['metric']} {point['test']:.1f} % at"
    assert f"{there} {point['frame_period_ms']:.1f} ms a token" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration .lr differ"):
        run(*flags, "--lr", "0.1")


def test_all_points_are_looked_at_before_a_head_is_trained(run):
    run("--task", "pool", "--lam", "0.5")
    with pytest.raises(ValueError, match="lam0.5-seed0.json is of another configuration"):
        run("--task", "pool", "--lam", "0", "0.5", "--lr", "0.1")
    assert len(points()) == 1


def test_boundaries_from_a_file_or_found(run, spoken):
    """At λ = 1 each segment is a token, whatever the encoder would detect."""
    segments = OFAEncoder(replace(PRESETS["tiny"], alpha="segments"))
    save(segments.checkpoint(), "segments.pt")
    names = [path for path, *_ in rows_of(spoken)]  # as the file of boundaries lists them, too
    Path("ends.tsv").write_text("".join(f"{name}\t0.1 0.3\n" for name in names))
    flags = ["--checkpoint", "segments.pt", "--task", "pool", "--epochs", "1", "--lam", "1"]
    run(*flags, "--boundaries", "ends.tsv")
    (by_file,) = points()
    assert by_file["tokens"] == 3 * len(names)
    run(*flags, "--boundaries", "pseudo", "--root", "root", "--out", "found")
    (found,) = points("found")
    assert found["frame_period_ms"] == pytest.approx(90, rel=0.1)
    assert found["config"]["boundaries"] == "pseudo"

    # A point is known by what the file holds.
    Path("ends.tsv").write_text("".join(f"{name}\t0.1\n" for name in names))
    with pytest.raises(ValueError, match="another configuration .boundaries differ"):
        run(*flags, "--boundaries", "ends.tsv")


def test_points_have_the_configuration_of_those_in_results(run):
    run("--task", "pool", "--epochs", "1")
    (point,) = points()
    committed = json.loads((REPO / "results/ofa/pool-encoder-lam0-seed0.json").read_text())
    assert point["config"].keys() == committed["config"].keys()


def test_an_encoder_of_one_rate_has_no_lam(run):
    fixed = OFAEncoder(replace(PRESETS["tiny"], compression="average2"))
    save(fixed.checkpoint(), "fixed.pt")
    flags = ("--checkpoint", "fixed.pt", "--task", "pool", "--epochs", "1")
    run(*flags)
    assert points()[0]["frame_period_ms"] == pytest.approx(40, rel=0.05)
    with pytest.raises(ValueError, match=r"one fixed rate \(average2\)"):
        run(*flags, "--lam", "0.5")


@pytest.mark.parametrize(
    "source, flags, under_bf16",
    [(HiddenStateCache, ["--keep", "nothing"], False), (UnfrozenEncoder, ["--unfreeze"], True)],
)
def test_only_an_encoder_that_is_trained_runs_under_bf16(
    run, monkeypatch, source, flags, under_bf16
):
    """Else a head would be trained on other hidden states than it is tested on."""
    seen = set()
    call = source.__call__

    def noted(self, indices):
        if torch.is_grad_enabled():
            seen.add(torch.is_autocast_enabled(self.device))
        return call(self, indices)

    monkeypatch.setattr(source, "__call__", noted)
    monkeypatch.setattr(finetune, "use_bf16", lambda *_: True)  # on a CPU, for once
    run("--task", "pool", "--epochs", "1", *flags)
    assert seen == {under_bf16}


def test_too_short_for_ctc_is_counted(run):
    run("--task", "ctc", "--lam", "0", "1.5", "--epochs", "1")
    slow, fast = points()
    assert slow["infeasible_test"] == 0
    assert 0 < fast["infeasible_test"] <= 12


def test_what_cannot_be_written_leaves_the_points(run, unwritable, monkeypatch, capsys):
    save_point = finetune.save_point
    saved = []

    def full_at_the_second(path, point, device):
        saved.append(path)
        with unwritable(path.parent) if len(saved) == 2 else nullcontext():
            save_point(path, point, device)

    flags = ("--task", "pool", "--seeds", "2", "--epochs", "1", "--features", "deaf")
    said = r"seed1.json could not be written \(.*(too large|denied)"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=said):
        patch.setattr(finetune, "save_point", full_at_the_second)
        run(*flags)
    (first,) = Path("out").iterdir()
    before = first.read_bytes()

    # The same command goes on from there.
    run(*flags)
    assert f"{first} is there" in capsys.readouterr().out
    assert first.read_bytes() == before
    assert len(list(Path("out").iterdir())) == 2


def test_same_seed_same_result(run):
    run("--task", "pool", "--out", "a")
    run("--task", "pool", "--out", "b")
    (a,), (b,) = points("a"), points("b")
    assert a["test"] == b["test"]
    assert a["history"] == b["history"]


def test_the_cost_of_an_unfrozen_encoder_is_its_own(run):
    """Training moves α, and with it the frame period."""
    flags = ("--task", "pool", "--lam", "1", "--epochs", "1")
    run(*flags, "--unfreeze", "--encoder-lr", "0.01", "--out", "unfrozen")
    run(*flags, "--out", "frozen")
    (unfrozen,), (frozen,) = points("unfrozen"), points("frozen")
    assert abs(unfrozen["frame_period_ms"] - frozen["frame_period_ms"]) > 1


# One head for any rate.


class Noted:
    """A source that notes when it is asked."""

    def __init__(self, name):
        self.name = name


def test_a_step_takes_one_lam_near_0_and_0_or_one_beyond():
    sources = [Noted(k) for k in range(12)]
    lesson = finetune.Lesson(None, [], {}, sources, None, None, None)
    random = np.random.default_rng(0)
    drawn = np.array([[source.name for source in lesson.draw(random)] for _ in range(500)])
    assert set(drawn[:, 0]) == {1, 2, 3, 4, 5, 6}
    assert set(drawn[:, 1]) == {0, 7, 8, 9, 10, 11}
    assert 200 < (drawn[:, 1] == 0).sum() < 300


def test_one_head_for_any_rate(run, run_predict, tested, monkeypatch, capsys):
    """It tells two languages apart at every rate, and its file serves rates that are none of those
    it was tested at."""
    monkeypatch.setattr(finetune, "LAMS_KEPT", 5)
    monkeypatch.setattr(finetune, "RATES", 12)
    flags = ("--checkpoint", OFA_TINY, "--task", "pool", "--lam", "any", "--epochs", "15")
    run(*flags, "--save-heads", "--keep", "nothing")
    (point,) = points()
    rows = point["rows"]
    periods = np.array([row["frame_period_ms"] for row in rows])
    assert len(rows) == 12
    assert periods[0] == 20
    assert 180 < periods[-1] < 280
    assert (np.diff(periods) > -1).all()  # each of so few utterances has whole tokens
    assert np.mean([row["test"] for row in rows]) >= 85
    assert point["test"] == rows[0]["test"]
    assert point["config"]["lam"] == "any"

    # The same answers as in the test, at the rate of one of its rows, by λ or by milliseconds.
    head = "out/pool-any-seed0.pt"
    for row in (rows[0], rows[6]):
        lines = run_predict(head, *tested, "--lam", str(row["lam"]))
        assert share_right(lines, tested) == pytest.approx(row["test"])
    assert run_predict(head, *tested) == run_predict(head, "--ms", "20", *tested)
    assert share_right(run_predict(head, "--ms", "77", *tested), tested) >= 80
    assert len(run_predict(head, "--lam", str(finetune.LAM_MAX), *tested)) == len(tested)
    assert rows[-1]["lam"] >= finetune.LAM_MAX
    run_predict(head, "--lam", str(rows[-1]["lam"]), *tested)
    with pytest.raises(ValueError, match="can't be had"):
        run_predict(head, "--ms", "5", *tested)
    with pytest.raises(
        ValueError, match="was trained up to λ = 1.6, that is .* λ = 1.95 is beyond"
    ):
        run_predict(head, "--lam", "1.95", *tested)
    with pytest.raises(ValueError, match="give one of them"):
        run_predict(head, "--ms", "50", "--lam", "0.5", *tested)

    run(*flags)
    assert "is there: test accuracy" in capsys.readouterr().out


def share_right(lines, tested) -> float:
    """How many of the labels that were predicted are right, in %."""
    right = 0
    for line, (path, (_, label)) in zip(lines, tested.items(), strict=True):
        answer, _ = line.removeprefix(f"{path}: ").split()
        right += answer == label
    return 100 * right / len(tested)


@pytest.mark.parametrize("task", ["ctc", "seq2seq"])
def test_every_kind_of_head_serves_any_rate(run, run_predict, tested, monkeypatch, task):
    monkeypatch.setattr(finetune, "LAMS_KEPT", 3)
    monkeypatch.setattr(finetune, "RATES", 3)
    run("--task", task, "--lam", "any", "--save-heads")
    (point,) = points()
    assert len(point["rows"]) == 3
    assert len(run_predict(f"out/{task}-any-seed0.pt", "--ms", "60", *tested)) == len(tested)
    _, head, _ = predict.load_head(f"out/{task}-any-seed0.pt")
    assert head.mix.told is not None


# Heads that are kept, for extras/predict.py.

# Kept in memory, hidden states are in half precision, and an answer might differ by a symbol.
KEEP_HEAD = ("--checkpoint", OFA_TINY, "--lam", "0.3", "--epochs", "12")
KEEP_HEAD += ("--save-heads", "--keep", "nothing")


@pytest.fixture
def tested(spoken):
    """{path: (text, label)} of the test split."""
    rows = [row for row in rows_of(spoken) if row[3] == "test"]
    return {str(spoken.parent / path): (text, label) for path, text, label, _ in rows}


def test_a_kept_head_labels_files_as_in_the_test(run, run_predict, tested):
    run(*KEEP_HEAD, "--task", "pool")
    (point,) = points()
    head = "out/pool-encoder-lam0.3-seed0.pt"
    lines = run_predict(head, *tested)
    for line in lines:
        probability = line.split()[-1]
        assert 50 <= int(probability.strip("(%)")) <= 100  # of two labels, the likelier one
    assert share_right(lines, tested) == pytest.approx(point["test"])
    assert point["test"] > 60
    with pytest.raises(ValueError, match="was trained at λ = 0.3 and serves no other"):
        run_predict(head, "--ms", "50", *tested)


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("ctc", ("--symbols-per-token", "2")),
        ("seq2seq", ("--unfreeze", "--beam", "2")),
    ],
)
def test_a_kept_head_spells_files_as_in_the_test(run, run_predict, tested, kind, flags):
    run(*KEEP_HEAD, "--task", kind, *flags)
    (point,) = points()
    (example,) = point["examples"]  # the shortest utterance, whichever file it is
    lines = run_predict(f"out/{kind}-encoder-lam0.3-seed0.pt", *tested)
    assert len(lines) == len(tested)
    answers = []
    for line, (path, (text, _)) in zip(lines, tested.items()):
        if text == example["wanted"]:
            answers.append(line.removeprefix(f"{path}: "))
    assert example["predicted"] in answers


def test_a_head_that_is_asked_for_later_is_trained_again(run):
    run("--task", "pool", "--epochs", "1", "--features", "random")
    head = Path("out/pool-random-lam0-seed0.pt")
    assert not head.exists()
    run("--task", "pool", "--epochs", "1", "--features", "random", "--save-heads")
    assert head.exists()


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
