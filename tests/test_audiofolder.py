"""Folders for finetune.py --data, laid out as Hugging Face's AudioFolder, against a TSV that says
the same, and against splits and labels written by hand."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import finetune
from parts.tasks import KINDS, SPLIT_WORDS, data_sha1, load_task

SPLIT_NAMES = {"train": "train", "validation": "valid", "test": "test"}  # as they are on the hub
TEXTS = ["Hold the line, please", 'press "one"', "Ja", "привет"]


def sound(path):
    """Half a second of a tone, in the format of path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(8_000)), 16_000)


def metadata(path, rows, header=("file_name", "text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def found(task):
    """What a task says of each file: (its name, target, split), in order."""
    names = [Path(u.path).name for u in task.speech.utterances]
    return sorted(zip(names, map(str, task.targets), task.splits))


@pytest.fixture
def table(tmp_path):
    """Twelve files beside a metadata.csv; and outside the folder a TSV that lists them, too."""
    rows = [(f"{k}.flac", TEXTS[k % 4], f"label {k % 2}") for k in range(12)]
    for name, *_ in rows:
        sound(tmp_path / "table" / name)
    metadata(tmp_path / "table/metadata.csv", rows)
    lines = ["path\ttext\tlabel", *(f"table/{name}\t{text}\t{label}" for name, text, label in rows)]
    (tmp_path / "same.tsv").write_text("\n".join(lines))
    return tmp_path / "table"


# With a table.


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_read_as_a_tsv_is(table, kind):
    """Commas, quotes and Cyrillic letters included; and the same files are drawn for each split."""
    task = load_task(kind, table)
    assert found(task) == found(load_task(kind, table.parent / "same.tsv"))
    assert len(task.targets) == 12


def test_a_column_split_comes_before_a_folders_name(tmp_path):
    expected = [("a.wav", "x", "train"), ("b.wav", "x", "valid"), ("c.wav", "x", "test")]
    for name, *_ in expected:
        sound(tmp_path / "train" / name)
    metadata(tmp_path / "train/metadata.csv", expected, ("file_name", "label", "split"))
    assert found(load_task("pool", tmp_path)) == expected


def in_split_folders(folder, one_table):
    """Two files a, b in each of the folders train, validation and test. one_table: list them in one
    metadata.csv, else in one a folder."""
    listed = []
    for name in SPLIT_NAMES:
        rows = [(f"{file}.wav", f"{file} in {name}", "") for file in "ab"]
        for file, *_ in rows:
            sound(folder / name / file)
        if not one_table:
            metadata(folder / name / "metadata.csv", rows)
        listed += [(f"{name}/{file}", *rest) for file, *rest in rows]
    if one_table:
        metadata(folder / "metadata.csv", listed)


@pytest.mark.parametrize("one_table", [True, False])
def test_sub_folders_are_splits(tmp_path, one_table):
    in_split_folders(tmp_path, one_table)
    task = load_task("seq2seq", tmp_path)
    expected = []
    for name, split in SPLIT_NAMES.items():
        expected += [(f"{file}.wav", str([file, "in", name]), split) for file in "ab"]
    assert found(task) == sorted(expected)
    assert len({u.group for u in task.speech.utterances}) == 6  # a file of each name is its own


# Without.


def test_folders_are_labels(tmp_path):
    """The splits are drawn, label by label; hidden files are none of the data."""
    for label in ("yes", "no"):
        for k in range(10):
            sound(tmp_path / label / f"{label}{k}.wav")
    sound(tmp_path / ".cache/hidden.wav")
    sound(tmp_path / "no/.hidden.wav")
    (tmp_path / "README.md").write_text("no sound")
    task = load_task("pool", tmp_path)
    assert task.symbols == ["no", "yes"]
    for name, label, _ in found(task):
        assert name.startswith(label)
    assert sorted(task.splits) == ["test"] * 4 + ["train"] * 14 + ["valid"] * 2
    for label in ("yes", "no"):
        splits = {split for _, other, split in found(task) if other == label}
        assert splits == {"train", "valid", "test"}


def test_folders_of_labels_lie_in_splits(tmp_path):
    expected = []
    for name, split in SPLIT_NAMES.items():
        for label in ("yes", "no"):
            sound(tmp_path / name / label / f"{name}-{label}.wav")
            expected.append((f"{name}-{label}.wav", label, split))
    assert found(load_task("pool", tmp_path)) == sorted(expected)


def test_folders_of_splits_have_the_names_of_the_hub(tmp_path):
    for name in SPLIT_WORDS:
        sound(tmp_path / name.capitalize() / "x" / f"{name}.wav")
    expected = [(f"{name}.wav", "x", split) for name, split in SPLIT_WORDS.items()]
    assert found(load_task("pool", tmp_path)) == sorted(expected)
    # A column split knows the same words.
    lines = [f"{name.capitalize()}/x/{name}.wav\tx\t{name.upper()} " for name in SPLIT_WORDS]
    (tmp_path / "same.tsv").write_text("\n".join(["path\tlabel\tsplit", *lines]))
    assert found(load_task("pool", tmp_path / "same.tsv")) == sorted(expected)


def test_a_label_may_be_called_train(tmp_path):
    """As in ESC-50, among other sounds."""
    for label in ("train", "rain"):
        for k in range(8):
            sound(tmp_path / label / f"{label}{k}.wav")
    assert load_task("pool", tmp_path).symbols == ["rain", "train"]


# The configuration of a point.


def test_a_point_knows_the_folder_by_what_it_lists(table, tmp_path, monkeypatch):
    """Another label is another configuration; a file that is not listed is not."""
    monkeypatch.chdir(tmp_path)
    flags = ["--features", "logmel", "--task", "pool", "--data", "table", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags, "--out", "out"])
    finetune.main()
    (point,) = Path("out").glob("*.json")
    before = json.loads(point.read_text())["config"]["data_sha1"]
    assert before == data_sha1("pool", "table")

    sound(table / "more.wav")
    finetune.main()
    listed = (table / "metadata.csv").read_text()
    (table / "metadata.csv").write_text(listed.replace("label 1", "label 2"))
    with pytest.raises(ValueError, match="another configuration .data_sha1 differ"):
        finetune.main()
