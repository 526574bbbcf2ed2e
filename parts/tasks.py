"""Tasks: utterances, and what a head is to answer for each.

    kind     target of an utterance                           metric
    ctc      text, one symbol a character                     CER, character error rate
    seq2seq  text, one symbol a word                          WER, word error rate
    pool     one label, or the set of those that apply        accuracy, or mAP for a set (mean
                                                              average precision)

The embedded corpus has a task of each kind (--data asterisk). It is split as data.py splits it, so
that a prompt is on one side in all its languages.

    ctc      the transcript, in English and Spanish
    seq2seq  a small translation: speech in any of the five languages to the content words of the
             English prompt. A word is kept if four or more of the prompts in train have it: a
             rarer one can't be learned.
    pool     which of eight concepts the prompt mentions, in any of the five languages

Your own data: a TSV with a header row and the columns

    path     of a sound file, absolute or relative to the TSV
    text     for ctc and seq2seq; it is put into lower case
    label    for pool, one for each file
    split    optional: train, valid or test (or validation, dev, …: SPLIT_WORDS)

or a folder as Hugging Face's AudioFolder has it: with a table metadata.csv, whose columns are
separated by commas and called file_name (relative to the table), and text or label; or for pool
without a table, with the files in folders named after their labels. Sub-folders train, validation
and test, each with a table of its own or with folders of labels, are the splits:

    FOLDER/metadata.csv        FOLDER/train/metadata.csv        FOLDER/LABEL/a.wav
    FOLDER/a.wav               FOLDER/train/a.wav               FOLDER/train/LABEL/a.wav

Without a column split or such folders, 70 / 10 / 20 % of the files are drawn at random, by seed 0.
For pool that holds for each label too, as nearly as possible, and every label is in train.
"""

import csv
import hashlib
import os
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from parts.asterisk import LANGUAGES
from parts.data import SPLITS, Speech, from_files, load, sound_files

KINDS = {"ctc": "CER", "seq2seq": "WER", "pool": "accuracy"}  # and the metric of each
COLUMNS = {"ctc": "text", "seq2seq": "text", "pool": "label"}  # of a table, that holds the answers

# Words for splits, in a column or as names of sub-folders: those that Hugging Face knows.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass
class Task:
    kind: str  # one of KINDS
    metric: str  # CER, WER, accuracy or mAP; in superb.py also PER and slot-type F1
    speech: Speech
    # For each utterance: a list of symbols (ctc, seq2seq); and for pool a symbol, a set of symbols
    # (mAP), or a list with a symbol for each group.
    targets: list
    splits: list[str]  # for each utterance: train, valid or test
    symbols: list[str] = field(default_factory=list)  # that a head can answer
    groups: tuple = ()  # pool: if several questions are asked, how many symbols answer each
    second: str = ""  # a further metric to report on test
    # Where segments end in each utterance, in frames, if the encoder is not to detect it itself.
    ends: list | None = None

    def indices(self, split: str) -> list[int]:
        return [i for i, s in enumerate(self.splits) if s == split]


def load_task(kind: str, data="asterisk", root="data", seed=0) -> Task:
    """The task of that kind on data: "asterisk", which lies under root, a TSV, or a folder.

    seed: of the splits, where they are drawn. Raises ValueError, which names the line or file at
    fault, before anything is computed.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown task {kind!r}, expected one of {', '.join(KINDS)}")
    if data == "asterisk":
        return asterisk_task(kind, root)
    return task_of_rows(kind, read_rows(kind, Path(data)), data, seed)


def make_task(kind, metric, speech, targets, splits, **more) -> Task:
    """A task that can be trained and tested on; more: the further fields of Task.

    Without symbols, they are those of the targets in train. Raises ValueError if a split is empty,
    or a label of valid or test is not among the symbols.
    """
    task = Task(kind, metric, speech, targets, splits, **more)
    for split in SPLITS:
        if not task.indices(split):
            raise ValueError(
                f"no utterance is left for {split}: at least one each is needed for "
                f"{', '.join(SPLITS)}. Without a column split, or folders train, validation and "
                "test, they are drawn: that takes ten files or more, and at least two more files "
                "than labels"
            )
    if not task.symbols:
        in_train = set()
        for i in task.indices("train"):
            in_train |= symbols_of(targets[i])
        task.symbols = sorted(in_train)
    if kind == "pool":
        for i in task.indices("valid") + task.indices("test"):
            unseen = symbols_of(targets[i]) - set(task.symbols)
            if unseen:
                name = speech.utterances[i].path or speech.utterances[i].id
                raise ValueError(
                    f"label {unseen.pop()!r} of {name} ({splits[i]}) never occurs in train"
                )
    return task


def symbols_of(target) -> set[str]:
    """The symbols of a target of any kind."""
    return {target} if isinstance(target, str) else set(target)


# 1. The embedded corpus.

# A prompt mentions a concept if its English version has one of these words. Its versions in other
# languages are taken to mention it too.
CONCEPTS = {
    "press a key": r"\b(press|dial|key)\b",
    "conference": r"\bconference\b",
    "message": r"\b(message|messages|mail|voicemail)\b",
    "number": r"\bnumbers?\b",
    "call": r"\b(call|calls|caller|calling)\b",
    "please": r"\bplease\b",
    "person": r"\b(person|participants?|users?|leader|operator|agent)\b",
    "not": r"\b(not|no|cannot|can't|invalid|incorrect)\b",
}

# Left out of translations, which thus consist of content words.
FUNCTION_WORDS = set(
    "a an the to of in on at by for from with and or is are was were be been am has have had will "
    "would can this that it its you your i i'm we our there when while who which if as so then now "
    "not no do does did".split()
)
FEWEST_PROMPTS = 4  # of train that must have a word for it to be in translations


def asterisk_task(kind, root) -> Task:
    speech = load("asterisk", root)
    split_of = {u.id: split for split in SPLITS for u in speech.part(split).utterances}
    metric = KINDS[kind]
    if kind == "ctc":
        target_of = transcripts(speech)
    elif kind == "seq2seq":
        target_of = translations(speech, split_of)
    else:
        target_of = concepts(speech)
        metric = "mAP"  # of a set of labels
    kept = [u for u in speech.utterances if u.id in target_of]
    targets = [target_of[u.id] for u in kept]
    splits = [split_of[u.id] for u in kept]
    return make_task(kind, metric, Speech(kept, sound=speech.sound), targets, splits)


def prompt_of(utterance) -> str:
    """Which prompt it is: the same in every language."""
    return utterance.id.split("/", 1)[1]


def english_texts(speech) -> dict[str, str]:
    """The English text of each prompt that has one."""
    return {prompt_of(u): u.text for u in speech.utterances if u.language == "en"}


def transcripts(speech) -> dict[str, list[str]]:
    """The characters of each English and Spanish utterance, by its id."""
    return {u.id: list(u.text) for u in speech.utterances if u.language in ("en", "es") and u.text}


def translations(speech, split_of) -> dict[str, list[str]]:
    """The English content words of each utterance whose prompt is there in all languages."""
    english = english_texts(speech)
    languages = {}  # of each prompt
    for u in speech.utterances:
        languages.setdefault(prompt_of(u), set()).add(u.language)
    complete = {prompt for prompt, found in languages.items() if len(found) == len(LANGUAGES)}

    # Which groups of train have each word. A group is a prompt, or several with the same text.
    groups_with = {}
    for u in speech.utterances:
        if u.language == "en" and split_of[u.id] == "train" and prompt_of(u) in complete:
            for word in u.text.split():
                groups_with.setdefault(word, set()).add(u.group)
    frequent = {word for word, groups in groups_with.items() if len(groups) >= FEWEST_PROMPTS}
    vocabulary = frequent - FUNCTION_WORDS

    target_of = {}
    for u in speech.utterances:
        if prompt_of(u) in complete:
            words = [word for word in english[prompt_of(u)].split() if word in vocabulary]
            if words:
                target_of[u.id] = words
    return target_of


def concepts(speech) -> dict[str, set[str]]:
    """The concepts of each utterance whose prompt has an English version; there may be none."""
    english = english_texts(speech)
    target_of = {}
    for u in speech.utterances:
        if prompt_of(u) in english:
            text = english[prompt_of(u)]
            target_of[u.id] = {
                name for name, pattern in CONCEPTS.items() if re.search(pattern, text)
            }
    return target_of


# 2. A TSV, or a folder.


@dataclass
class Row:
    """A sound file and its answer, checked."""

    where: str  # it is listed: the table and line, or the file itself
    path: str  # as it is listed
    file: Path  # the sound file
    answer: str  # its text or label
    split: str  # "" if it is to be drawn


def task_of_rows(kind, rows, name, seed) -> Task:
    """name: what to call the data in an error."""
    splits = splits_of(rows, kind, seed)
    check_one_side(rows, splits)

    # A file that can't be used is named and left out. At first the id says which row an utterance
    # is of, then it is the path that stands there.
    entries = [(row.file, str(n), row.path, row.answer) for n, row in enumerate(rows)]
    speech = from_files(entries, held_out=(0.1, 0.2), where=name, cut=False)
    left = [int(u.id) for u in speech.utterances]
    for utterance, n in zip(speech.utterances, left):
        utterance.id = " ".join(rows[n].path.split())
    targets = [target_from(kind, rows[n].answer) for n in left]
    return make_task(kind, KINDS[kind], speech, targets, [splits[n] for n in left])


def read_rows(kind, data) -> list[Row]:
    """What a TSV or folder lists for a kind of task. Raises ValueError if anything is wrong."""
    column = COLUMNS[kind]
    if data.suffix == ".tsv":
        return read_table(data, "path", column, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not data.is_dir():
        raise ValueError(
            f"--data {data}: expected asterisk, a file that ends in .tsv, or a folder that is there"
        )
    tables = [table for table in (data, *sorted(data.iterdir())) if table.is_dir()]
    tables = [folder / "metadata.csv" for folder in tables if (folder / "metadata.csv").is_file()]
    if not tables:
        return read_label_folders(data, column)
    rows = []
    for table in tables:
        rows += read_table(table, "file_name", column, delimiter=",")
    return split_by_folder(rows, data)


def data_sha1(kind, data) -> str | None:
    """A hash of what a TSV or folder lists for a kind of task; None for other data."""
    if kind not in KINDS or data == "asterisk":
        return None
    data = Path(data)
    if data.is_file():
        content = data.read_bytes()
    else:
        rows = read_rows(kind, data)
        content = repr([(row.path, row.answer, row.split) for row in rows]).encode()
    return hashlib.sha1(content).hexdigest()[:12]


def read_table(path, file_column, column, **dialect) -> list[Row]:
    """The rows of a table whose sound files are in `file_column` and whose answers in `column`.

    dialect: of csv. Raises ValueError if anything is wrong.
    """
    kind = path.suffix[1:].upper()  # TSV or CSV
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, **dialect)  # no quote is left open
            numbered = [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a {kind} in UTF-8 ({error})") from None
    if not numbered:
        raise ValueError(f"{path}: no rows under a header")
    names = reader.fieldnames
    missing = {file_column, column} - set(names)
    if missing:
        separator = "tabs" if kind == "TSV" else "commas"
        raise ValueError(
            f"{path}: no column {', '.join(sorted(missing))} in its header; "
            f"columns are separated by {separator}"
        )
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{path}: more than one column {', '.join(sorted(twice))} in its header")
    return [check_row(path, line, cells, file_column, column) for line, cells in numbered]


def check_row(path, line, cells: dict, file_column, column) -> Row:
    """cells: what is in each column; None, if the line is too short to have it. What a line has
    beyond the last column is under None."""
    where = f"{path}, line {line}"
    if None in cells:
        raise ValueError(
            f"{where}: more cells than the header has; in a CSV, put a text with commas into quotes"
        )
    answer = (cells[column] or "").strip()
    if not cells[file_column] or not answer:
        raise ValueError(f"{where}: {file_column} or {column} is empty")
    file = path.parent / cells[file_column]
    if not file.is_file():
        raise ValueError(f"{where}: no such file: {file}")
    split = ""
    if "split" in cells:
        word = cells["split"] or ""
        split = SPLIT_WORDS.get(word.strip().lower())
        if not split:
            raise ValueError(f"{where}: split is {word!r}, expected one of {', '.join(SPLITS)}")
    return Row(where, cells[file_column], file, answer, split)


def read_label_folders(folder, column) -> list[Row]:
    """The sound files of a folder without metadata.csv: each in a folder named after its label."""
    if column != "label":
        raise ValueError(
            f"{folder} has no metadata.csv: a table with the columns file_name and {column}, "
            "separated by commas (other forms, such as metadata.jsonl, are not read)"
        )
    inside = [file.relative_to(folder) for file in sound_files(folder)]
    inside = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    if not inside:
        raise ValueError(f"no sound file in {folder}, and no metadata.csv")

    # A label may be called "train", if others are not called like splits.
    by_split = all(path.parts[0].lower() in SPLIT_WORDS for path in inside)
    depth = 3 if by_split else 2
    rows = []
    for path in inside:
        if len(path.parts) != depth:
            raise ValueError(
                f"{folder / path}: without a metadata.csv, every file lies in {folder}/LABEL, or "
                f"every file in {folder}/train/LABEL, validation/LABEL or test/LABEL"
            )
        split = SPLIT_WORDS[path.parts[0].lower()] if by_split else ""
        rows.append(Row(str(folder / path), str(path), folder / path, path.parts[-2], split))
    return rows


def split_by_folder(rows, folder) -> list[Row]:
    """Rows of metadata.csv, with the splits that their folders under `folder` are named after, and
    with paths that begin there.

    A column split comes first. Raises ValueError if only some of the files have a split.
    """
    for row in rows:
        row.path = os.path.relpath(row.file, folder)
        parts = Path(row.path).parts
        if not row.split and len(parts) > 1:
            row.split = SPLIT_WORDS.get(parts[0].lower(), "")
    without = [row for row in rows if not row.split]
    if without and len(without) < len(rows):
        raise ValueError(
            f"{without[0].where}: {without[0].path} lies in no folder named train, validation or "
            "test, while others do"
        )
    return rows


def splits_of(rows, kind, seed) -> list[str]:
    """The split of each row: its own, or drawn."""
    if rows[0].split:
        return [row.split for row in rows]
    files = [str(row.file.resolve()) for row in rows]
    if kind == "pool":
        return draw_splits_by_label(files, [row.answer for row in rows], seed)
    return draw_splits(files, seed)


def check_one_side(rows, splits):
    """Raise ValueError if a file that is listed twice is in two splits."""
    side = {}
    for row, split in zip(rows, splits):
        before = side.setdefault(row.file.resolve(), split)
        if before != split:
            raise ValueError(f"{row.where}: {row.path} is in {split} and in {before}")


def target_from(kind, answer):
    """The target that a text or label stands for. A letter is one character, however it was
    written: macOS may write é as e and an accent."""
    text = unicodedata.normalize("NFC", answer)
    if kind == "pool":
        return text
    text = text.lower()
    return text.split() if kind == "seq2seq" else list(text)


# 3. Splits, where none are given.


def draw_splits(paths, seed) -> list[str]:
    """The split of each path: 70 / 10 / 20 % of the files, at random.

    A file listed twice stays on one side.
    """
    files = sorted(set(paths))
    random.Random(seed).shuffle(files)
    tenth = max(1, round(len(files) / 10))
    side = dict.fromkeys(files, "train")
    side |= dict.fromkeys(files[: 3 * tenth], "test")
    side |= dict.fromkeys(files[:tenth], "valid")
    return [side[path] for path in paths]


def draw_splits_by_label(paths, labels, seed) -> list[str]:
    """The split of each path: 70 / 10 / 20 % of the files, and about that of each label, at random.

    One file of each label is in train in any case. A file listed twice stays on one side, and its
    first label counts.
    """
    label_of = {}
    for path, label in zip(paths, labels):
        label_of.setdefault(path, label)

    # Label by label, and within a label at random.
    files = sorted(label_of)
    random.Random(seed).shuffle(files)
    files.sort(key=label_of.get)

    # The first file of each label is for train. From the others, 30 % of all files are taken at
    # equal distances, so that every label gives its share; every third of them is for validation.
    others = [file for before, file in zip(files, files[1:]) if label_of[file] == label_of[before]]
    tenth = max(1, round(len(files) / 10))
    held_out = min(len(others), 3 * tenth)
    side = dict.fromkeys(files, "train")
    for k in range(held_out):
        file = others[k * len(others) // held_out]
        side[file] = "valid" if k % 3 == 0 else "test"
    return [side[path] for path in paths]
