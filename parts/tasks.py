"""What is asked of the encoder: utterances, and what to say about each.

    ctc      text, one symbol a character; scored by CER (character error rate)
    seq2seq  text, one symbol a word; scored by WER
    pool     a label (scored by accuracy), or the set of those that apply (mean average precision, mAP)

Data for each of the three come with the embedded corpus (--data asterisk), split as data.py splits it, every language of a
prompt on one side:

    ctc      what was said, in English and Spanish
    seq2seq  a small translation: speech in any of the five languages to the English content words of the prompt, as far as
             four prompts or more of train have them: what two or three have can't be learned
    pool     which of eight concepts the prompt mentions, in any of the five languages

Your own: a TSV with a header row and columns `path`, `text` (ctc, seq2seq) or `label` (pool), and optionally `split` (train,
valid, test; else drawn at random by seed 0, 70 / 10 / 20 % of the files, and about that of each
label, which is in train in any case). Paths are absolute or relative to the TSV. Text is put into
lower case.

"""

import csv
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from parts.data import SPLITS, Speech, from_files, load

KINDS = {"ctc": "CER", "seq2seq": "WER", "pool": "accuracy"}
CONCEPTS = {  # what an English prompt must contain to mention the concept; its other languages are taken to do so too
    "press a key": r"\b(press|dial|key)\b",
    "conference": r"\bconference\b",
    "message": r"\b(message|messages|mail|voicemail)\b",
    "number": r"\bnumbers?\b",
    "call": r"\b(call|calls|caller|calling)\b",
    "please": r"\bplease\b",
    "person": r"\b(person|participants?|users?|leader|operator|agent)\b",
    "not": r"\b(not|no|cannot|can't|invalid|incorrect)\b",
}
FUNCTION_WORDS = set(
    "a an the to of in on at by for from with and or is are was were be been am has have had will would can this that "
    "it its you your i i'm we our there when while who which if as so then now not no do does did".split()
)


@dataclass
class Task:
    kind: str  # ctc, seq2seq or pool
    metric: str  # CER, WER, accuracy or mAP; in superb.py also PER and slot-type F1
    speech: Speech
    targets: list  # for each utterance: a list of symbols (ctc, seq2seq), a symbol, one for each group, or a set (pool)
    splits: list[str]  # for each utterance: train, valid or test
    symbols: list[str]  # all that occur in train, or the whole data set's
    groups: tuple = ()  # pool: how many of the symbols answer each of several questions; (): one question, or a set of symbols
    second: str = ""  # a further metric to report on test

    def indices(self, split: str) -> list[int]:
        return [i for i, s in enumerate(self.splits) if s == split]


def load_task(kind: str, data="asterisk", root="data", seed=0) -> Task:
    """The task of that kind on data: "asterisk" or a TSV. Raises ValueError, with the line at fault, before anything is computed."""
    if kind not in KINDS:
        raise ValueError(f"unknown task {kind!r}, expected one of {', '.join(KINDS)}")
    if data == "asterisk":
        return _asterisk(kind, root)
    if not str(data).endswith(".tsv"):
        raise ValueError(f"--data {data}: expected asterisk, or a file that ends in .tsv")
    return _tsv(kind, Path(data), seed)


def _asterisk(kind, root):
    speech = load("asterisk", root)
    split_of = {u.id: split for split in SPLITS for u in speech.part(split).utterances}
    prompt = lambda u: u.id.split("/", 1)[1]
    english = {prompt(u): u.text for u in speech.utterances if u.language == "en"}
    languages = {}
    for u in speech.utterances:
        languages.setdefault(prompt(u), set()).add(u.language)
    in_all = lambda u: len(languages[prompt(u)]) == 5
    said = {
        (u.group, w)
        for u in speech.utterances
        if u.language == "en" and split_of[u.id] == "train" and in_all(u)
        for w in u.text.split()
    }
    prompts = Counter(word for _, word in said)  # how many have it
    kept, targets = [], []
    for u in speech.utterances:
        if kind == "ctc" and u.language in ("en", "es"):
            target = list(u.text)
        elif kind == "seq2seq" and in_all(u):
            target = [
                w for w in english[prompt(u)].split() if prompts[w] >= 4 and w not in FUNCTION_WORDS
            ]
        elif kind == "pool" and prompt(u) in english:
            target = {
                name for name, pattern in CONCEPTS.items() if re.search(pattern, english[prompt(u)])
            }
        else:
            continue
        if target or kind == "pool":
            kept.append(u)
            targets.append(target)
    metric = "mAP" if kind == "pool" else KINDS[kind]
    return make_task(
        kind, metric, Speech(kept, sound=speech.sound), targets, [split_of[u.id] for u in kept]
    )


def _tsv(kind, path, seed):
    column = "label" if kind == "pool" else "text"
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            numbered = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a TSV in UTF-8 ({error})") from None
    rows = [row for _, row in numbered]
    missing = {"path", column} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(
            f"{path}: "
            + (
                f"no column {', '.join(sorted(missing))} in its header; columns are separated by tabs"
                if rows
                else "no rows under a header"
            )
        )
    for number, row in numbered:
        if not row["path"] or not (row[column] or "").strip():
            raise ValueError(f"{path}, line {number}: path or {column} is empty")
        if not (path.parent / row["path"]).is_file():
            raise ValueError(f"{path}, line {number}: no such file: {path.parent / row['path']}")
        if row.get("split", "train") not in SPLITS:
            raise ValueError(
                f"{path}, line {number}: split is {row['split']!r}, expected one of {', '.join(SPLITS)}"
            )
    files = [str((path.parent / row["path"]).resolve()) for row in rows]
    if "split" in rows[0]:
        splits = [row["split"] for row in rows]
    elif kind == "pool":
        splits = draw_splits_by_label(files, [row[column].strip() for row in rows], seed)
    else:
        splits = draw_splits(files, seed)
    side = {}
    for (number, row), file, split in zip(numbered, files, splits):
        if side.setdefault(file, split) != split:
            raise ValueError(
                f"{path}, line {number}: {row['path']} is in {split} and in {side[file]}"
            )
    speech = from_files(
        [
            (path.parent / row["path"], str(n), row["path"], row[column].strip())
            for n, row in enumerate(rows)
        ],
        held_out=(0.1, 0.2),
        where=path,
        cut=False,
    )
    rows_left = [
        int(u.id) for u in speech.utterances
    ]  # a file that can't be used was named and left out
    texts = [u.text for u in speech.utterances]
    targets = (
        texts
        if kind == "pool"
        else [t.lower().split() if kind == "seq2seq" else list(t.lower()) for t in texts]
    )
    return make_task(kind, KINDS[kind], speech, targets, [splits[n] for n in rows_left])


def draw_splits(paths, seed):
    """70 / 10 / 20 % of the files, at random; a file listed twice stays on one side."""
    files = sorted(set(paths))
    random.Random(seed).shuffle(files)
    tenth = max(1, round(len(files) / 10))
    side = {
        f: "valid" if k < tenth else "test" if k < 3 * tenth else "train"
        for k, f in enumerate(files)
    }
    return [side[p] for p in paths]


def draw_splits_by_label(paths, labels, seed):
    """70 / 10 / 20 % of the files, and about that of each label, at random; but the first file of a
    label is for train. A file listed twice stays on one side, and its first label counts."""
    label_of = {}
    for path, label in zip(paths, labels):
        label_of.setdefault(path, label)
    files = sorted(label_of)
    random.Random(seed).shuffle(files)
    files.sort(key=label_of.get)  # label by label, each as shuffled
    side = dict.fromkeys(files, "train")
    others = [f for before, f in zip(files, files[1:]) if label_of[f] == label_of[before]]
    held_out = min(len(others), 3 * max(1, round(len(files) / 10)))
    for k in range(held_out):  # at equal distances
        side[others[k * len(others) // held_out]] = "valid" if k % 3 == 0 else "test"
    return [side[p] for p in paths]


def make_task(kind, metric, speech, targets, splits, symbols=(), **more) -> Task:
    """Checked: every split has an utterance, and every label is in train. symbols: if they are to be others than those of train."""
    task = Task(kind, metric, speech, targets, splits, list(symbols), **more)
    for split in SPLITS:
        if not task.indices(split):
            raise ValueError(
                f"no utterance is left for {split}: at least one each is needed for {', '.join(SPLITS)}. "
                "Without a column split they are drawn: that takes ten files or more, "
                "and at least two more files than labels"
            )
    symbols_of = lambda target: {target} if isinstance(target, str) else set(target)
    task.symbols = task.symbols or sorted(
        set().union(*(symbols_of(targets[i]) for i in task.indices("train")))
    )
    if kind == "pool":
        for i in task.indices("valid") + task.indices("test"):
            unseen = symbols_of(targets[i]) - set(task.symbols)
            if unseen:
                raise ValueError(
                    f"label {unseen.pop()!r} of {speech.utterances[i].path or speech.utterances[i].id} ({splits[i]}) never occurs in train"
                )
    return task
