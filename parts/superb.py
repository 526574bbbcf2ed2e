"""SUPERB's downstream tasks, read through torchaudio.datasets from the data sets as they are distributed.

    task  asks for                                   data set                test split (train and valid: its own)   metric
    pr    phones                                     LibriSpeech, CMUDict    test-clean (train-clean-100, dev-clean) PER
    asr   characters                                 LibriSpeech             the same                                WER
    ks    one of ten words, unknown, or silence      Speech Commands v0.01   its testing list (its validation list)  accuracy
    ic    action, object and location                Fluent Speech Commands  its own                                 accuracy, all three
    sid   speaker                                    VoxCeleb1               by its iden_split.txt                   accuracy
    er    neutral, happy (or excited), angry or sad  IEMOCAP                 session --fold (a fifth of the others)  accuracy
    sf    characters, slots as <slot>value</slot>    Audio SNIPS             its own, SUPERB's speakers              slot-type F1

load_superb(name, folder) gives a task of tasks.py; finetune.py trains its head and scores it; of sf, also by slot-value CER. Only
paths and labels come from torchaudio: sound is read by data.py. Nothing is downloaded: `python superb.py [folder]` shows what to
put where, and what is there. Where SUPERB's code (s3prl) does otherwise:

    pr   its lexicon covers every word. Here an utterance with a word that CMUDict lacks is left out, in all three splits, and counted;
         put librispeech-lexicon.txt (openslr.org/11) beside CMUDict to look such words up there. PER is over 39 phones, without stress.
    ks   it tests on a separate archive, about as many clips of each class, and balances the classes in training. Here the testing list
         is the test, over half of it unknown words, and silence is every second of the noise files, the first 80 % of each for train,
         the next 10 % for valid, the last 10 % for test.
    sid  it trains on pieces of 8 s; here on whole utterances.
    er   it draws another fifth for validation. In both, the speakers of that fifth are heard in training; those of test are not.

Sources: SUPERB: Yang et al., Interspeech 2021. LibriSpeech: Panayotov et al., ICASSP 2015. CMUDict 0.7b: Carnegie Mellon University.
Speech Commands: Warden, arXiv:1804.03209. Fluent Speech Commands: Lugosch et al., Interspeech 2019. VoxCeleb1: Nagrani et al.,
Interspeech 2017. IEMOCAP: Busso et al., LREV 2008. SNIPS: Coucke et al., arXiv:1805.10190; as audio: Lai et al., ICASSP 2021.
"""

import random
import re
import sys
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

from torchaudio import datasets
from torchaudio.functional import edit_distance

from parts.data import SAMPLE_RATE, SPLITS, from_files
from parts.tasks import Task, make_task

LIBRISPEECH = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}
LIBRISPEECH_LAYOUT = [f"LibriSpeech/{subset}/*/*/*.flac" for subset in LIBRISPEECH.values()]
SNIPS_SPEAKERS = {
    "train": "Ivy Joanna Joey Justin Kendra Kimberly Matthew Salli",
    "valid": "Aditi Amy Geraint Nicole",
    "test": "Brian Emma Raveena Russell",
}
KEYWORDS = "yes no up down left right on off stop go".split()
EMOTIONS = {
    "neu": "neutral",
    "hap": "happy",
    "exc": "happy",
    "ang": "angry",
    "sad": "sad",
}  # frustration is left out
COMMANDS, FLUENT = "SpeechCommands/speech_commands_v0.01", "fluent_speech_commands_dataset"

# layout: patterns of what must lie in the folder; flags: of finetune.py, for the head that SUPERB has; second: a further metric
Entry = namedtuple("Entry", "data page layout metric flags second", defaults=("accuracy", "", ""))
SUPERB = {
    "pr": Entry(
        "LibriSpeech train-clean-100, dev-clean and test-clean, and CMUDict 0.7b (cmudict-0.7b and cmudict-0.7b.symbols)",
        "https://www.openslr.org/12, http://www.speech.cs.cmu.edu/cgi-bin/cmudict",
        [*LIBRISPEECH_LAYOUT, "cmudict/cmudict-0.7b", "cmudict/cmudict-0.7b.symbols"],
        "PER",
        "--head linear",
    ),
    "asr": Entry(
        "LibriSpeech train-clean-100, dev-clean and test-clean",
        "https://www.openslr.org/12",
        LIBRISPEECH_LAYOUT,
        "WER",
        "--head superb",
    ),
    "ks": Entry(
        "Speech Commands v0.01",
        "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
        [
            f"{COMMANDS}/{rest}"
            for rest in (
                "validation_list.txt",
                "testing_list.txt",
                "*/*_nohash_*.wav",
                "_background_noise_/*.wav",
            )
        ],
    ),
    "ic": Entry(
        "Fluent Speech Commands",
        "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
        [
            *(f"{FLUENT}/data/{split}_data.csv" for split in SPLITS),
            f"{FLUENT}/wavs/speakers/*/*.wav",
        ],
    ),
    "sid": Entry(
        "VoxCeleb1, its dev and test speakers side by side, and iden_split.txt",
        "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
        ["VoxCeleb1/iden_split.txt", "VoxCeleb1/wav/id*/*/*.wav"],
    ),
    "er": Entry(
        "IEMOCAP (a form to fill in)",
        "https://sail.usc.edu/iemocap/",
        [
            f"IEMOCAP/Session{n}/{rest}"
            for n in range(1, 6)
            for rest in ("sentences/wav/*/*.wav", "dialog/EmoEvaluation/*.txt")
        ],
    ),
    "sf": Entry(
        "Audio SNIPS, prepared by s3prl's preprocess/snips_prepare_data.sh",
        "https://github.com/aws-samples/aws-lex-noisy-spoken-language-understanding",
        ["SNIPS/all.iob.snips.txt", *(f"SNIPS/{split}/*-snips-{split}-*" for split in SPLITS)],
        "slot-type F1",
        "--head superb",
        "slot-value CER",
    ),
}


def load_superb(name: str, folder="data", fold=1) -> Task:
    """The task of that name on the data set in folder. Raises ValueError, with what to put where, if that is not all there."""
    if name not in SUPERB:
        raise ValueError(f"unknown task {name!r}, expected one of {', '.join(SUPERB)}")
    entry, folder = SUPERB[name], Path(folder)
    wanted = f"--task {name} needs {entry.data} ({entry.page}), put so that these exist in {folder}: {', '.join(entry.layout)}"
    for pattern in entry.layout:
        if not any(folder.glob(pattern)):
            raise ValueError(f"--data {folder}: no {pattern} there. {wanted}")
    rows_of = {
        "pr": phones,
        "asr": characters,
        "ks": keywords,
        "ic": intents,
        "sid": speakers,
        "er": emotions,
        "sf": slots,
    }
    try:
        rows = rows_of[name](
            folder, *[fold] * (name == "er")
        )  # (path, split, target) of each utterance
    except (
        RuntimeError,
        OSError,
        LookupError,
        ValueError,
    ) as error:  # what torchaudio raises on a list that is cut off or edited
        raise ValueError(
            f"--data {folder}: can't be read ({type(error).__name__}: {error}). {wanted}"
        ) from None
    lost = [path for path, _, _ in rows if not path.is_file()]
    if lost:
        raise ValueError(
            f"--data {folder}: {len(lost)} of the {len(rows)} files that it lists are missing, such as {lost[0]}. {wanted}"
        )
    speech = from_files(
        [(path, str(n), "", "") for n, (path, _, _) in enumerate(rows)],
        (0.1, 0.1),
        folder,
        cut=False,
    )
    heard = [
        (u, *rows[int(u.id)][1:]) for u in speech.utterances
    ]  # a file that can't be used was named and left out
    if name == "ks":
        heard = [
            piece
            for u, split, label in heard
            for piece in (seconds(u) if label == "silence" else [(u, split, label)])
        ]
    speech.utterances, splits, targets = (list(column) for column in zip(*heard))
    if entry.metric != "accuracy":  # as in SUPERB, symbols are those of the whole data set
        return make_task(
            "ctc",
            entry.metric,
            speech,
            targets,
            splits,
            sorted(set().union(*targets)),
            second=entry.second,
        )
    if name != "ic":
        return make_task("pool", entry.metric, speech, targets, splits)
    groups = [
        sorted({t[g] for t, split in zip(targets, splits) if split == "train"}) for g in range(3)
    ]
    return make_task(
        "pool",
        entry.metric,
        speech,
        targets,
        splits,
        sum(groups, []),
        groups=tuple(map(len, groups)),
    )


def metadata(dataset):
    return (dataset.get_metadata(n) for n in range(len(dataset)))


def characters(folder):
    return [
        (folder / "LibriSpeech" / path, split, list(text.lower()))
        for split, subset in LIBRISPEECH.items()
        for path, _, text, *_ in metadata(datasets.LIBRISPEECH(folder, subset))
    ]


def phones(folder):
    lexicon = {}
    for word, sounds in datasets.CMUDict(folder / "cmudict"):
        lexicon.setdefault(word, sounds)  # as in SUPERB, the first of several pronunciations
    more = folder / "cmudict/librispeech-lexicon.txt"
    for line in more.read_text().splitlines() if more.is_file() else ():
        word, *sounds = line.split()
        lexicon.setdefault(word, sounds)
    rows, lacking, left_out, total = [], set(), Counter(), Counter()
    for path, split, text in characters(folder):
        words = "".join(text).upper().split()
        unknown = [w for w in words if w not in lexicon]
        lacking.update(unknown)
        total[split] += 1
        left_out[split] += bool(unknown)
        if not unknown:
            rows.append((path, split, [sound.rstrip("012") for w in words for sound in lexicon[w]]))
    if lacking:
        print(
            f"left out: utterances ({', '.join(f'{left_out[s]} of {total[s]} in {s}' for s in SPLITS)}) with any of {len(lacking)} words, "
            f"such as {min(lacking)}, that are neither in CMUDict nor in {more}",
            file=sys.stderr,
        )
    return rows


def keywords(folder):
    rows = [
        (path, "", "silence")
        for path in sorted((folder / COMMANDS / "_background_noise_").glob("*.wav"))
    ]
    for split, subset in zip(SPLITS, ("training", "validation", "testing")):
        for path, _, word, *_ in metadata(
            datasets.SPEECHCOMMANDS(folder, "speech_commands_v0.01", subset=subset)
        ):
            rows.append(
                (folder / "SpeechCommands" / path, split, word if word in KEYWORDS else "unknown")
            )
    return rows


def seconds(noise):
    """The seconds of a file of noise. No second is in two splits."""
    count, rate = noise.samples // SAMPLE_RATE, round(noise.stop * SAMPLE_RATE / noise.samples)
    for k in range(count):
        piece = replace(
            noise, id=f"{noise.id}#{k}", samples=SAMPLE_RATE, start=k * rate, stop=(k + 1) * rate
        )
        yield (
            piece,
            "train" if k < 0.8 * count else "valid" if k < 0.9 * count else "test",
            "silence",
        )


def intents(folder):
    return [
        (
            folder / FLUENT / path,
            split,
            [f"action {action}", f"object {object}", f"location {location}"],
        )
        for split in SPLITS
        for path, *_, action, object, location in metadata(
            datasets.FluentSpeechCommands(folder, split)
        )
    ]


def speakers(folder):
    return [
        (folder / "VoxCeleb1/wav" / path, split, Path(path).parts[0])
        for split, subset in zip(SPLITS, ("train", "dev", "test"))
        for path, *_ in metadata(datasets.VoxCeleb1Identification(folder / "VoxCeleb1", subset))
    ]


def emotions(folder, fold):
    rows = []
    for session in range(1, 6):
        for _, _, stem, label, _ in metadata(datasets.IEMOCAP(folder, (session,))):
            if label in EMOTIONS:  # its own path goes wrong where the folder's name holds "Session"
                path = (
                    folder
                    / f"IEMOCAP/Session{session}/sentences/wav"
                    / stem.rsplit("_", 1)[0]
                    / f"{stem}.wav"
                )
                rows.append((path, "test" if session == fold else "train", EMOTIONS[label]))
    rest = [n for n, row in enumerate(rows) if row[1] == "train"]
    for n in random.Random(0).sample(rest, round(len(rest) / 5)):
        rows[n] = (rows[n][0], "valid", rows[n][2])
    return rows


def slots(folder):
    rows, unlabelled = [], []
    for split in SPLITS:
        suffix = "wav" if any((folder / "SNIPS" / split).glob("*.wav")) else "mp3"
        dataset = datasets.Snips(folder, split, SNIPS_SPEAKERS[split].split(), suffix)
        unlabelled += [path for path in dataset.data if path.stem not in dataset.labels]
        dataset.data = [path for path in dataset.data if path.stem in dataset.labels]
        rows += [
            (folder / "SNIPS" / path, split, spell(text, tags))
            for path, _, _, text, tags, _ in metadata(dataset)
        ]
    if unlabelled:
        print(
            f"left out: {len(unlabelled)} files that all.iob.snips.txt lacks, such as {unlabelled[0]}",
            file=sys.stderr,
        )
    return rows


def spell(text, tags):
    """ "play JAZZ now" with "O genre O" -> p l a y _ <genre> j a z z </genre> _ n o w. A tag may begin with B- or I-."""
    pairs = zip(text.lower().split(), tags.split(), strict=True)
    pairs = [
        ("and" if word == "&" else word, tag) for word, tag in pairs if word not in "?!.,;-"
    ]  # as SUPERB does
    symbols, before = [], "O"
    for word, tag in [*pairs, ("", "O")]:
        slot = re.sub("^[BI]-", "", tag)
        if before != "O" and (slot != before or tag.startswith("B-")):
            symbols, before = [*symbols, f"</{before}>"], "O"
        symbols += [" "] * bool(symbols and word)
        symbols += [f"<{slot}>"] * (slot != before)
        symbols, before = [*symbols, *word], slot
    return symbols


# What finetune.score can't do by counting edits of symbols. Lists of symbols of each utterance, predicted and wanted -> 0 to 1, or more.


def word_error_rate(predicted, wanted):
    words = lambda symbols: "".join(symbols).split()
    return sum(edit_distance(words(p), words(w)) for p, w in zip(predicted, wanted)) / sum(
        len(words(w)) for w in wanted
    )


def slot_values(symbols) -> dict:
    """The values between <slot> and </slot>, a list for each slot that has one."""
    found = {}
    for slot, value in re.findall(r"<([^/>]+)>(.+?)</\1>", "".join(symbols)):
        value = " ".join(re.sub("<[^>]+>", "", value).split())
        if value:
            found.setdefault(slot, []).append(value)
    return found


def slot_type_f1(predicted, wanted):
    """Mean over utterances of the F1 of the set of slots, whatever their values; 1 if there are none in both."""
    pairs = [(slot_values(p).keys(), slot_values(w).keys()) for p, w in zip(predicted, wanted)]
    return sum(2 * len(p & w) / (len(p) + len(w)) if p or w else 1 for p, w in pairs) / len(pairs)


def slot_value_cer(predicted, wanted):
    """Edits per character of the wanted values, each beside the nearest of those predicted for its slot, or beside nothing."""
    edits = total = 0
    for p, w in zip(map(slot_values, predicted), map(slot_values, wanted)):
        for slot, values in w.items():
            edits += sum(
                min(edit_distance(guess, value) for guess in p.get(slot, [""])) for value in values
            )
            total += sum(map(len, values))
    return edits / max(total, 1)


SUPERB_METRICS = {
    "WER": word_error_rate,
    "slot-type F1": slot_type_f1,
    "slot-value CER": slot_value_cer,
}


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    for name, entry in SUPERB.items():
        print(
            f"--task {f'{name} {entry.flags}'.strip()}: {' and '.join(filter(None, (entry.metric, entry.second)))}",
            entry.data,
            entry.page,
            sep="\n    ",
        )
        print(
            *(
                f"    {'there  ' if any(folder.glob(pattern)) else 'missing'}  {folder / pattern}"
                for pattern in entry.layout
            ),
            sep="\n",
        )
