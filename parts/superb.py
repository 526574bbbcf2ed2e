"""SUPERB's downstream tasks, on the data sets as they are distributed.

    task  answer                     data set                test split           metric
    pr    phones                     LibriSpeech, CMUDict    test-clean           PER
    asr   characters                 LibriSpeech             test-clean           WER
    ks    one of ten words, or       Speech Commands v0.01   its testing list     accuracy
          unknown, or silence
    ic    action, object, location   Fluent Speech Commands  its own              accuracy, of all 3
    sid   speaker                    VoxCeleb1               by iden_split.txt    accuracy
    er    neutral, happy (or         IEMOCAP                 the session --fold   accuracy
          excited), angry or sad
    sf    characters, and slots as   Audio SNIPS             its own, by          slot-type F1,
          <slot>value</slot>                                 SUPERB's speakers    slot-value CER

The splits for training and validation are those of the data sets too: train-clean-100 and dev-clean
of LibriSpeech. IEMOCAP has none, so a fifth of the other four sessions is for validation.

load_superb(name, folder) gives a task of tasks.py: finetune.py trains a head on it and scores it.
The lists of files and labels are read through torchaudio.datasets, sound by data.py. Nothing is
downloaded. This says what each task needs, where to put it, and what is there:

    python -m parts.superb [folder]

Where SUPERB's own code (s3prl) does otherwise:

    pr   Its lexicon covers every word. Here an utterance with a word that CMUDict lacks is left
         out, in all three splits, and counted. Put librispeech-lexicon.txt (openslr.org/11) beside
         CMUDict to look such words up there. PER is over 39 phones, without stress.
    ks   It tests on a separate archive, with about as many clips of each class, and balances the
         classes in training. Here the testing list is the test, over half of it unknown words.
         Silence is every second of the noise files: the first 80 % of each file for train, the
         next 10 % for valid, the last 10 % for test.
    sid  It trains on pieces of 8 s; here on entire utterances.
    er   It draws another fifth for validation. In both, the speakers of that fifth are also in
         training; those of test are not.

Sources: SUPERB: Yang et al., Interspeech 2021. LibriSpeech: Panayotov et al., ICASSP 2015.
CMUDict 0.7b: Carnegie Mellon University. Speech Commands: Warden, arXiv:1804.03209. Fluent Speech
Commands: Lugosch et al., Interspeech 2019. VoxCeleb1: Nagrani et al., Interspeech 2017. IEMOCAP:
Busso et al., LREV 2008. SNIPS: Coucke et al., arXiv:1805.10190; as audio: Lai et al., ICASSP 2021.
"""

import argparse
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torchaudio import datasets
from torchaudio.functional import edit_distance

from parts.data import SAMPLE_RATE, SPLITS, from_files
from parts.tasks import Task, make_task

# 1. A reader for each data set: it takes the folder, and returns a Listed for each utterance.


class Listed(NamedTuple):
    path: Path  # the sound file
    split: str  # train, valid or test; "" for the noise of ks
    target: str | list[str]  # as in tasks.Task


def metadata(dataset):
    """What the lists of a data set say of each utterance; its sound is not read."""
    return (dataset.get_metadata(n) for n in range(len(dataset)))


LIBRISPEECH = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}


def characters(folder):
    """asr: the characters of each text, in lower case."""
    return [
        Listed(folder / "LibriSpeech" / path, split, list(text.lower()))
        for split, subset in LIBRISPEECH.items()
        for path, _, text, *_ in metadata(datasets.LIBRISPEECH(folder, subset))
    ]


def phones(folder):
    """pr: the texts of asr, each word as the phones that the lexicon has for it."""
    lexicon, more = read_lexicon(folder)
    rows = []
    lacking = set()  # words
    left_out = Counter()  # utterances, in each split
    total = Counter()
    for path, split, text in characters(folder):
        words = "".join(text).upper().split()
        unknown = [word for word in words if word not in lexicon]
        total[split] += 1
        if unknown:
            lacking.update(unknown)
            left_out[split] += 1
        else:
            stressed = [phone for word in words for phone in lexicon[word]]
            rows.append(Listed(path, split, [phone.rstrip("012") for phone in stressed]))
    if lacking:
        counts = ", ".join(f"{left_out[split]} of {total[split]} in {split}" for split in SPLITS)
        print(
            f"left out: utterances ({counts}) with any of {len(lacking)} words, such as "
            f"{min(lacking)}, that are neither in CMUDict nor in {more}",
            file=sys.stderr,
        )
    return rows


def read_lexicon(folder):
    """The phones of each word, and the path of the file that may add words to CMUDict's.

    As in SUPERB, the first of several pronunciations is taken.
    """
    lexicon = {}
    for word, pronunciation in datasets.CMUDict(folder / "cmudict"):
        lexicon.setdefault(word, pronunciation)
    more = folder / "cmudict/librispeech-lexicon.txt"
    if more.is_file():
        for line in more.read_text().splitlines():
            word, *pronunciation = line.split()
            lexicon.setdefault(word, pronunciation)
    return lexicon, more


COMMANDS = "SpeechCommands/speech_commands_v0.01"
KEYWORDS = "yes no up down left right on off stop go".split()


def keywords(folder):
    """ks. A file of noise has no split: load_superb cuts it into seconds, each with its own."""
    noises = sorted((folder / COMMANDS / "_background_noise_").glob("*.wav"))
    rows = [Listed(path, "", "silence") for path in noises]
    for split, subset in zip(SPLITS, ("training", "validation", "testing")):
        dataset = datasets.SPEECHCOMMANDS(folder, Path(COMMANDS).name, subset=subset)
        for path, _, word, *_ in metadata(dataset):
            label = word if word in KEYWORDS else "unknown"
            rows.append(Listed(folder / "SpeechCommands" / path, split, label))
    return rows


def seconds(noise):
    """The seconds of an utterance of noise, each with its split. No second is in two."""
    count = noise.samples // SAMPLE_RATE
    rate = round(noise.stop * SAMPLE_RATE / noise.samples)  # of the file itself
    pieces = []
    for k in range(count):
        name = f"{noise.id}#{k}"
        second = replace(noise, id=name, samples=SAMPLE_RATE, start=k * rate, stop=(k + 1) * rate)
        if k < 0.8 * count:
            split = "train"
        elif k < 0.9 * count:
            split = "valid"
        else:
            split = "test"
        pieces.append((second, split))
    return pieces


FLUENT = "fluent_speech_commands_dataset"


def intents(folder):
    """ic: a label for each of three questions."""
    rows = []
    for split in SPLITS:
        dataset = datasets.FluentSpeechCommands(folder, split)
        for path, *_, action, object, location in metadata(dataset):
            target = [f"action {action}", f"object {object}", f"location {location}"]
            rows.append(Listed(folder / FLUENT / path, split, target))
    return rows


def speakers(folder):
    """sid: the speaker is the first folder in a path."""
    return [
        Listed(folder / "VoxCeleb1/wav" / path, split, Path(path).parts[0])
        for split, subset in zip(SPLITS, ("train", "dev", "test"))
        for path, *_ in metadata(datasets.VoxCeleb1Identification(folder / "VoxCeleb1", subset))
    ]


EMOTIONS = {  # others are left out, frustration among them
    "neu": "neutral",
    "hap": "happy",
    "exc": "happy",
    "ang": "angry",
    "sad": "sad",
}


def emotions(folder, fold):
    """er: tested on the session `fold`, 1 to 5."""
    rows = []
    for session in range(1, 6):
        split = "test" if session == fold else "train"
        for _, _, stem, label, _ in metadata(datasets.IEMOCAP(folder, (session,))):
            if label in EMOTIONS:
                # torchaudio's path is wrong if the name of the folder contains "Session".
                dialog, _ = stem.rsplit("_", 1)
                path = folder / f"IEMOCAP/Session{session}/sentences/wav/{dialog}/{stem}.wav"
                rows.append(Listed(path, split, EMOTIONS[label]))

    # A fifth of the other sessions, always the same, is for validation.
    rest = [n for n, row in enumerate(rows) if row.split == "train"]
    for n in random.Random(0).sample(rest, round(len(rest) / 5)):
        rows[n] = rows[n]._replace(split="valid")
    return rows


SNIPS_SPEAKERS = {
    "train": "Ivy Joanna Joey Justin Kendra Kimberly Matthew Salli",
    "valid": "Aditi Amy Geraint Nicole",
    "test": "Brian Emma Raveena Russell",
}


def slots(folder):
    """sf: characters and slots, as `spell` writes them, from SUPERB's speakers of each split."""
    rows = []
    unlabelled = []
    for split in SPLITS:
        suffix = "wav" if any((folder / "SNIPS" / split).glob("*.wav")) else "mp3"
        dataset = datasets.Snips(folder, split, SNIPS_SPEAKERS[split].split(), suffix)
        unlabelled += [path for path in dataset.data if path.stem not in dataset.labels]
        dataset.data = [path for path in dataset.data if path.stem in dataset.labels]
        for path, _, _, text, tags, _ in metadata(dataset):
            rows.append(Listed(folder / "SNIPS" / path, split, spell(text, tags)))
    if unlabelled:
        print(
            f"left out: {len(unlabelled)} files that all.iob.snips.txt lacks, "
            f"such as {unlabelled[0]}",
            file=sys.stderr,
        )
    return rows


def spell(text, tags) -> list[str]:
    """Symbols of a text whose words have these tags, a slot or O for none.

    "play JAZZ now" with "O genre O" -> p l a y _ <genre> j a z z </genre> _ n o w, where _ is a
    space. A tag may begin with B- (a new slot begins here) or I- (it goes on).
    """
    # As SUPERB does, punctuation is dropped and & is spelled out.
    pairs = zip(text.lower().split(), tags.split(), strict=True)
    pairs = [(word, tag) for word, tag in pairs if word not in "?!.,;-"]
    symbols = []
    inside = "O"  # the slot that is open
    for word, tag in pairs:
        slot = re.sub("^[BI]-", "", tag)
        if inside != "O" and (slot != inside or tag.startswith("B-")):
            symbols.append(f"</{inside}>")
            inside = "O"
        if symbols:
            symbols.append(" ")
        if slot != inside:
            symbols.append(f"<{slot}>")
            inside = slot
        symbols.extend("and" if word == "&" else word)  # a symbol for each character
    if inside != "O":
        symbols.append(f"</{inside}>")
    return symbols


# 2. The tasks.


@dataclass
class Entry:
    """A task of SUPERB's."""

    read: Callable  # one of the readers above
    data: str  # what it needs, in words
    page: str  # where to get it
    layout: list[str]  # patterns of what must lie in the folder
    metric: str = "accuracy"
    second: str = ""  # a further metric
    flags: str = ""  # of finetune.py, for the head that SUPERB has


LIBRISPEECH_LAYOUT = [f"LibriSpeech/{subset}/*/*/*.flac" for subset in LIBRISPEECH.values()]
SUPERB = {
    "pr": Entry(
        phones,
        "LibriSpeech train-clean-100, dev-clean and test-clean, and CMUDict 0.7b (cmudict-0.7b "
        "and cmudict-0.7b.symbols)",
        "https://www.openslr.org/12, http://www.speech.cs.cmu.edu/cgi-bin/cmudict",
        [*LIBRISPEECH_LAYOUT, "cmudict/cmudict-0.7b", "cmudict/cmudict-0.7b.symbols"],
        metric="PER",
        flags="--head linear",
    ),
    "asr": Entry(
        characters,
        "LibriSpeech train-clean-100, dev-clean and test-clean",
        "https://www.openslr.org/12",
        LIBRISPEECH_LAYOUT,
        metric="WER",
        flags="--head superb",
    ),
    "ks": Entry(
        keywords,
        "Speech Commands v0.01",
        "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
        [
            f"{COMMANDS}/validation_list.txt",
            f"{COMMANDS}/testing_list.txt",
            f"{COMMANDS}/*/*_nohash_*.wav",
            f"{COMMANDS}/_background_noise_/*.wav",
        ],
    ),
    "ic": Entry(
        intents,
        "Fluent Speech Commands",
        "https://fluent.ai/"
        "fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
        [
            *(f"{FLUENT}/data/{split}_data.csv" for split in SPLITS),
            f"{FLUENT}/wavs/speakers/*/*.wav",
        ],
    ),
    "sid": Entry(
        speakers,
        "VoxCeleb1, its dev and test speakers side by side, and iden_split.txt",
        "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
        ["VoxCeleb1/iden_split.txt", "VoxCeleb1/wav/id*/*/*.wav"],
    ),
    "er": Entry(
        emotions,
        "IEMOCAP (a form to fill in)",
        "https://sail.usc.edu/iemocap/",
        [
            f"IEMOCAP/Session{session}/{rest}"
            for session in range(1, 6)
            for rest in ("sentences/wav/*/*.wav", "dialog/EmoEvaluation/*.txt")
        ],
    ),
    "sf": Entry(
        slots,
        "Audio SNIPS, prepared by s3prl's preprocess/snips_prepare_data.sh",
        "https://github.com/aws-samples/aws-lex-noisy-spoken-language-understanding",
        ["SNIPS/all.iob.snips.txt", *(f"SNIPS/{split}/*-snips-{split}-*" for split in SPLITS)],
        metric="slot-type F1",
        second="slot-value CER",
        flags="--head superb",
    ),
}


def load_superb(name: str, folder="data", fold=1) -> Task:
    """The task of that name on the data set in folder; fold: the session that er is tested on.

    Raises ValueError, which says what to put where, if the data set is not complete.
    """
    if name not in SUPERB:
        raise ValueError(f"unknown task {name!r}, expected one of {', '.join(SUPERB)}")
    folder = Path(folder)
    rows = read_listed(name, folder, fold)

    # A file that can't be used is named and left out. At first the id says which row an utterance
    # is of. Each is a group of its own; only the seconds of a noise share one.
    entries = [(row.path, str(n), str(n), "") for n, row in enumerate(rows)]
    speech = from_files(entries, held_out=(0.1, 0.1), where=folder, cut=False)
    utterances = []
    splits = []
    targets = []
    for utterance in speech.utterances:
        path, split, target = rows[int(utterance.id)]
        utterance.id = os.path.relpath(path, folder)
        pieces = seconds(utterance) if target == "silence" else [(utterance, split)]
        for piece, its_split in pieces:
            utterances.append(piece)
            splits.append(its_split)
            targets.append(target)
    speech.utterances = utterances

    entry = SUPERB[name]
    kind = "pool" if entry.metric == "accuracy" else "ctc"
    more = {"second": entry.second}
    if kind == "ctc":  # as in SUPERB, the symbols are those of all splits
        more["symbols"] = sorted(set().union(*targets))
    elif name == "ic":
        more["symbols"], more["groups"] = questions(targets, splits)
    return make_task(kind, entry.metric, speech, targets, splits, **more)


def questions(targets, splits):
    """The labels in train, question after question, and how many of them answer each question.

    targets: for each utterance a list with a label for each question.
    """
    symbols = []
    groups = []
    in_train = [target for target, split in zip(targets, splits) if split == "train"]
    for answers in zip(*in_train):  # all answers to one question
        labels = sorted(set(answers))
        symbols += labels
        groups.append(len(labels))
    return symbols, tuple(groups)


def read_listed(name, folder, fold) -> list[Listed]:
    """The rows of a task. Raises ValueError if anything is missing or can't be read."""
    entry = SUPERB[name]
    wanted = (
        f"--task {name} needs {entry.data} ({entry.page}), put so that these exist in {folder}: "
        f"{', '.join(entry.layout)}"
    )
    for pattern in entry.layout:
        if not any(folder.glob(pattern)):
            raise ValueError(f"--data {folder}: no {pattern} there. {wanted}")
    try:
        rows = entry.read(folder, fold) if name == "er" else entry.read(folder)
    except (RuntimeError, OSError, LookupError, ValueError) as error:
        # This is what torchaudio raises on a list that is cut off or edited.
        raise ValueError(
            f"--data {folder}: can't be read ({type(error).__name__}: {error}). {wanted}"
        ) from None
    lost = [row.path for row in rows if not row.path.is_file()]
    if lost:
        raise ValueError(
            f"--data {folder}: {len(lost)} of the {len(rows)} files that it lists are missing, "
            f"such as {lost[0]}. {wanted}"
        )
    return rows


# 3. Metrics that scores.py can't find by counting edits of symbols. Each takes two lists with
# the symbols of each utterance, and returns a share: 1 is 100 %, and error rates may exceed it.


def slot_values(symbols) -> dict[str, list[str]]:
    """The values between <slot> and </slot>, for each slot that has one that is not empty."""
    values_of = {}
    for slot, value in re.findall(r"<([^/>]+)>(.+?)</\1>", "".join(symbols)):
        value = re.sub("<[^>]+>", "", value)  # marks of other slots
        value = " ".join(value.split())
        if value:
            values_of.setdefault(slot, []).append(value)
    return values_of


def slot_type_f1(predicted, wanted) -> float:
    """Mean over utterances of the F1 of the set of slots, whatever their values.

    It is 1 where there are none to find and none were found.
    """
    total = 0.0
    for p, w in zip(predicted, wanted):
        found = slot_values(p).keys()
        right = slot_values(w).keys()
        if found or right:
            total += 2 * len(found & right) / (len(found) + len(right))
        else:
            total += 1
    return total / len(wanted)


def slot_value_cer(predicted, wanted) -> float:
    """Edits per character of the wanted values.

    Each is compared with the nearest value that was predicted for its slot, or with an empty one.
    """
    edits = 0
    total = 0
    for p, w in zip(predicted, wanted):
        guesses_of = slot_values(p)
        for slot, values in slot_values(w).items():
            guesses = guesses_of.get(slot, [""])
            for value in values:
                edits += min(edit_distance(guess, value) for guess in guesses)
                total += len(value)
    return edits / max(total, 1)


SUPERB_METRICS = {
    "slot-type F1": slot_type_f1,
    "slot-value CER": slot_value_cer,
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m parts.superb",
        description="Print what each task needs, where to put it, and what is there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", default="data", help="finetune.py's --data")
    folder = Path(parser.parse_args().folder)
    for name, entry in SUPERB.items():
        flags = f" {entry.flags}" if entry.flags else ""
        second = f" and {entry.second}" if entry.second else ""
        print(f"--task {name}{flags}: {entry.metric}{second}")
        print(f"    {entry.data}")
        print(f"    {entry.page}")
        for pattern in entry.layout:
            there = "there  " if any(folder.glob(pattern)) else "missing"
            print(f"    {there}  {folder / pattern}")


if __name__ == "__main__":
    main()
