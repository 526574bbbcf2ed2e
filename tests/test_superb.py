"""superb.py on tiny folders laid out like the real data sets, with real speech as their sound.

Metrics are checked by hand. What is missing or damaged is named in one error.
"""

import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import finetune
from ofa_encoder import PRESETS, OFAEncoder
from parts.data import Speech, Utterance
from parts.runs import save
from parts.scores import DRAWS, bootstrap, score
from parts.superb import SUPERB, load_superb, slot_type_f1, slot_value_cer, spell
from parts.tasks import Task

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sound(asterisk):
    """sound(path) writes a waveform there at 16 kHz, by default the next of many short prompts."""
    short = [i for i, u in enumerate(asterisk.utterances) if 12_000 < u.samples < 20_000]
    following = itertools.cycle(short)

    def write(path, waveform=None):
        if waveform is None:
            waveform = asterisk[next(following)].numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform, 16_000)

    return write


# What each data set looks like.


def librispeech(root, sound):
    for subset, speaker, texts in (
        ("train-clean-100", 19, ["HE'S READ", "A CAT", "CAT READ", "ZYZZYX CAT"]),
        ("dev-clean", 84, ["A CAT READ", "ZYZZYX"]),
        ("test-clean", 61, ["CAT", "HE'S A CAT", "A"]),
    ):
        folder = root / f"LibriSpeech/{subset}/{speaker}/198"
        lines = []
        for n, text in enumerate(texts):
            name = f"{speaker}-198-{n:04d}"
            sound(folder / f"{name}.flac")
            lines.append(f"{name} {text}\n")
        (folder / f"{speaker}-198.trans.txt").write_text("".join(lines))


def pr(root, sound):
    librispeech(root, sound)
    (root / "cmudict").mkdir()
    (root / "cmudict/cmudict-0.7b").write_text(
        ";;; # CMUdict\n!EXCLAMATION-POINT  EH2 K S\nA  AH0\nA(1)  EY1\nCAT  K AE1 T\n"
        "HE'S  HH IY1 Z\nREAD  R EH1 D\nREAD(1)  R IY1 D\n"
    )
    (root / "cmudict/cmudict-0.7b.symbols").write_text("AH\nAH0\nAH1\n")


def ks(root, sound):
    folder = root / "SpeechCommands/speech_commands_v0.01"
    lists = {"validation": [], "testing": []}
    for word in "yes no up down left right on off stop go bed marvin".split():
        for speaker, chosen in (
            ("0a7c2a8d", None),
            ("1b4c9b89", "validation"),
            ("2c6d3924", "testing"),
        ):
            sound(folder / f"{word}/{speaker}_nohash_0.wav")
            if chosen:
                lists[chosen].append(f"{word}/{speaker}_nohash_0.wav\n")
    for name, lines in lists.items():
        (folder / f"{name}_list.txt").write_text("".join(lines))
    random = np.random.default_rng(0)
    for name, length in (("white_noise", 168_000), ("running_tap", 320_000)):
        loudness = (1 + np.arange(length) // 16_000) / 50  # tells the seconds apart
        noise = loudness * np.sign(random.normal(size=length))
        sound(folder / f"_background_noise_/{name}.wav", noise)
    (folder / "_background_noise_/README.md").write_text("noise\n")


INTENTS = {
    "train": [
        ("activate", "lights", "kitchen"),
        ("deactivate", "lights", "none"),
        ("increase", "volume", "none"),
    ],
    "valid": [("activate", "volume", "none")],
    "test": [("increase", "lights", "kitchen"), ("activate", "lights", "none")],
}


def ic(root, sound):
    folder = root / "fluent_speech_commands_dataset"
    (folder / "data").mkdir(parents=True)
    for split, rows in INTENTS.items():
        lines = [",path,speakerId,transcription,action,object,location\n"]
        for n, row in enumerate(rows):
            path = f"wavs/speakers/2BqVo8kVB2Skwgyb/{split}{n}-4479-11e9-a9a5-5dbec3b8816a.wav"
            sound(folder / path)
            lines.append(f'{n},{path},2BqVo8kVB2Skwgyb,"Well, do it",{",".join(row)}\n')
        (folder / f"data/{split}_data.csv").write_text("".join(lines))


def sid(root, sound):
    lines = []
    for speaker in ("id10001", "id10002", "id11251"):
        for n, split in enumerate((1, 1, 2, 3)):
            sound(root / f"VoxCeleb1/wav/{speaker}/1zcIwhmdeo4/{n + 1:05d}.wav")
            lines.append(f"{split} {speaker}/1zcIwhmdeo4/{n + 1:05d}.wav\n")
    (root / "VoxCeleb1/iden_split.txt").write_text("".join(lines))


LABELS = ["neu", "hap", "exc", "ang", "sad", "fru", "xxx", "neu", "ang", "sad"]


def er(root, sound):
    for session in range(1, 6):
        dialog = f"Ses0{session}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
        for n, label in enumerate(LABELS[: 9 if session == 5 else 10]):
            name = f"{dialog}_F{n:03d}"
            sound(root / f"IEMOCAP/Session{session}/sentences/wav/{dialog}/{name}.wav")
            lines.append(f"[6.2901 - 8.2357]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\n")
            lines.append("C-E2:\tNeutral;\t()\n\n")
        folder = root / f"IEMOCAP/Session{session}/dialog/EmoEvaluation"
        folder.mkdir(parents=True)
        (folder / f"{dialog}.txt").write_text("".join(lines))


def sf(root, sound):
    # One speaker of each of SUPERB's splits, who all have spoken everything.
    lines = []
    for speaker in ("Ivy", "Nicole", "Brian"):
        for split, text, tags in (
            ("train", "PLAY COOL JAZZ , NOW", "O genre genre O O"),
            ("train", "PLAY IT", "O O"),
            ("valid", "JAZZ & SOUL", "genre genre genre"),
            ("test", "PLAY BO IN BERN", "O artist O city"),
        ):
            name = f"{speaker}-snips-{split}-{len(lines)}"
            sound(root / f"SNIPS/{split}/{name}.wav")
            lines.append(f"{name} BOS {text} EOS\tO {tags} PlayMusic\n")
    (root / "SNIPS/all.iob.snips.txt").write_text("".join(lines))


LAYOUTS = {"pr": pr, "asr": librispeech, "ks": ks, "ic": ic, "sid": sid, "er": er, "sf": sf}


@pytest.fixture(scope="module")
def laid(sound, tmp_path_factory):
    """laid(name): a folder with the tiny data set of that task."""
    folders = {}

    def laid(name):
        if name not in folders:
            # torchaudio's class for IEMOCAP looks for the first "Session" in a path.
            folders[name] = tmp_path_factory.mktemp(f"Session_{name}")
            LAYOUTS[name](folders[name], sound)
        return folders[name]

    return laid


@pytest.fixture
def copy_of(laid, tmp_path):
    """copy_of(name): a copy of that folder, to be changed."""

    def copy_of(name):
        return Path(shutil.copytree(laid(name), tmp_path / "copy"))

    return copy_of


def targets_in(task, split):
    return [task.targets[i] for i in task.indices(split)]


def texts_in(task, split):
    return ["".join(target) for target in targets_in(task, split)]


def paths_in(task, split):
    return [Path(task.speech.utterances[i].path) for i in task.indices(split)]


# Each task.

METRICS = {"pr": "PER", "asr": "WER", "sf": "slot-type F1"}


@pytest.mark.parametrize("name", SUPERB)
def test_metrics_and_heads_are_superbs(laid, name):
    task = load_superb(name, laid(name))
    assert task.metric == METRICS.get(name, "accuracy")
    assert task.second == ("slot-value CER" if name == "sf" else "")
    assert task.kind == ("ctc" if name in METRICS else "pool")


def test_pr_has_the_first_pronunciation_of_each_word(laid):
    task = load_superb("pr", laid("pr"))
    train = ["HH IY Z R EH D", "AH K AE T", "K AE T R EH D"]
    assert [" ".join(target) for target in targets_in(task, "train")] == train
    assert [" ".join(target) for target in targets_in(task, "valid")] == ["AH K AE T R EH D"]
    assert " ".join(targets_in(task, "test")[1]) == "HH IY Z AH K AE T"
    assert task.symbols == "AE AH D EH HH IY K R T Z".split()


def test_pr_counts_what_it_leaves_out(laid, capsys):
    load_superb("pr", laid("pr"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "utterances (1 of 4 in train, 1 of 2 in valid, 0 of 3 in test)" in line
    assert "with any of 1 words, such as ZYZZYX" in line


def test_pr_looks_up_more_words(copy_of, capsys):
    folder = copy_of("pr")
    lines = "CAT\tB IH1 G\nZYZZYX\tZ IH1 Z IH0 K S\n"  # CMUDict's cat comes first
    (folder / "cmudict/librispeech-lexicon.txt").write_text(lines)
    task = load_superb("pr", folder)
    assert targets_in(task, "train")[3] == "Z IH Z IH K S K AE T".split()
    assert len(targets_in(task, "valid")) == 2
    assert capsys.readouterr().err == ""


def test_asr(laid):
    task = load_superb("asr", laid("asr"))
    assert texts_in(task, "train") == ["he's read", "a cat", "cat read", "zyzzyx cat"]
    assert texts_in(task, "valid") == ["a cat read", "zyzzyx"]
    assert texts_in(task, "test") == ["cat", "he's a cat", "a"]
    assert task.symbols == sorted(" 'acdehrstxyz")


def test_ks_has_each_clip_in_its_split(laid):
    task = load_superb("ks", laid("ks"))
    speakers = {"train": "0a7c2a8d", "valid": "1b4c9b89", "test": "2c6d3924"}
    words = "yes no up down left right on off stop go".split()
    for split, speaker in speakers.items():
        labels = targets_in(task, split)
        clips = [path for path in paths_in(task, split) if speaker in path.name]
        assert len(clips) == len(labels) - labels.count("silence")
        spoken = sorted(label for label in labels if label != "silence")
        assert spoken == sorted([*words, "unknown", "unknown"])
    assert len(task.symbols) == 12


def test_ks_deals_out_the_seconds_of_noise(laid):
    """The noise grows louder every second, which tells them apart."""
    task = load_superb("ks", laid("ks"))
    white_noise = {"train": 8, "valid": 1, "test": 1}  # 10.5 s
    found = {}
    for split, expected in white_noise.items():
        found[split] = []
        noises = [i for i in task.indices(split) if task.targets[i] == "silence"]
        for i in noises:
            if "running_tap" in task.speech.utterances[i].path:
                loudness = task.speech[i].abs() * 50
                assert len(loudness) == task.speech.utterances[i].samples == 16_000
                assert loudness.max() - loudness.min() < 0.01
                found[split].append(round(loudness.mean().item()))
        assert len(noises) - len(found[split]) == expected
    assert found == {"train": list(range(1, 17)), "valid": [17, 18], "test": [19, 20]}


def test_utterances_are_groups_of_their_own(laid):
    """The bootstrap draws groups. Seconds of one noise belong together."""
    for name in ("sid", "ks"):
        task = load_superb(name, laid(name))
        groups = {}
        for utterance, target in zip(task.speech.utterances, task.targets):
            groups.setdefault(utterance.group, []).append(target == "silence")
        noises = [group for group in groups.values() if all(group)]
        assert len(noises) == (2 if name == "ks" else 0)
        assert all(len(group) == 1 for group in groups.values() if group not in noises)


def test_ids_are_paths(laid):
    folder = laid("sid")
    task = load_superb("sid", folder)
    for utterance in task.speech.utterances:
        assert (folder / utterance.id).samefile(utterance.path)


def test_ic_asks_three_questions(laid):
    task = load_superb("ic", laid("ic"))
    assert task.symbols == [
        "action activate",
        "action deactivate",
        "action increase",
        "object lights",
        "object volume",
        "location kitchen",
        "location none",
    ]
    assert task.groups == (3, 2, 2)
    assert targets_in(task, "valid") == [["action activate", "object volume", "location none"]]
    assert targets_in(task, "test") == [
        ["action increase", "object lights", "location kitchen"],
        ["action activate", "object lights", "location none"],
    ]
    assert paths_in(task, "test")[1].name == "test1-4479-11e9-a9a5-5dbec3b8816a.wav"
    assert finetune.build_head(None, task, 3, 8).groups == [3, 2, 2]


def test_sid(laid):
    task = load_superb("sid", laid("sid"))
    assert task.symbols == ["id10001", "id10002", "id11251"]
    clips = {"train": {"00001", "00002"}, "valid": {"00003"}, "test": {"00004"}}
    for split, names in clips.items():
        paths = paths_in(task, split)
        assert len(paths) == 3 * len(names)
        assert {path.stem for path in paths} == names
        assert [path.parts[-3] for path in paths] == targets_in(task, split)


@pytest.mark.parametrize("fold", [1, 4])
def test_er_is_tested_on_one_session(laid, fold):
    """Neither frustrated nor undecided speech is in it."""
    task = load_superb("er", laid("er"), fold)
    assert all(f"Session{fold}" in path.parts for path in paths_in(task, "test"))
    emotions = "neutral happy happy angry sad neutral angry sad".split()
    assert targets_in(task, "test") == emotions
    assert task.symbols == ["angry", "happy", "neutral", "sad"]
    for split in ("train", "valid"):
        assert not any(f"Session{fold}" in path.parts for path in paths_in(task, split))
    assert (task.splits.count("train"), task.splits.count("valid")) == (25, 6)
    assert load_superb("er", laid("er"), fold).splits == task.splits


def test_sf(laid):
    task = load_superb("sf", laid("sf"))
    assert texts_in(task, "train") == ["play <genre>cool jazz</genre> now", "play it"]
    assert texts_in(task, "valid") == ["<genre>jazz and soul</genre>"]
    assert texts_in(task, "test") == ["play <artist>bo</artist> in <city>bern</city>"]
    speakers = [Path(u.path).name.split("-")[0] for u in task.speech.utterances]
    assert speakers == ["Ivy", "Ivy", "Nicole", "Brian"]
    marks = {symbol for symbol in task.symbols if len(symbol) > 1}
    assert marks == {"<artist>", "</artist>", "<city>", "</city>", "<genre>", "</genre>"}


def test_sf_in_mp3(copy_of):
    folder = copy_of("sf")
    for path in folder.glob("SNIPS/*/*.wav"):
        soundfile.write(path.with_suffix(".mp3"), soundfile.read(path)[0], 16_000)
        path.unlink()
    task = load_superb("sf", folder)
    assert len(task.speech) == 4
    assert len(task.speech[3]) > 10_000


def test_sf_counts_files_without_a_text(copy_of, capsys):
    folder = copy_of("sf")
    there = next(folder.glob("SNIPS/train/Ivy*.wav"))
    shutil.copy(there, folder / "SNIPS/train/Ivy-snips-train-99.wav")
    assert len(load_superb("sf", folder).speech) == 4
    assert "left out: 1 files that all.iob.snips.txt lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, tags, spelled",
    [
        ("Play it", "O O", "play it"),
        ("BIG cat runs", "a a b", "<a>big cat</a> <b>runs</b>"),
        ("one two", "B-a B-a", "<a>one</a> <a>two</a>"),
        ("one two", "B-a I-a", "<a>one two</a>"),
        ("a ?", "x x", "<x>a</x>"),
        ("a , b", "x O x", "<x>a b</x>"),
        ("rock & roll", "g g g", "<g>rock and roll</g>"),
    ],
)
def test_slots_are_spelled(text, tags, spelled):
    assert "".join(spell(text, tags)) == spelled


# Metrics.


def test_word_error_rate_by_hand():
    wanted = ["a dog", "he s", "so"]
    predicted = ["a cat", "he  s", ""]  # dog and so are wrong, of five words
    letters = sorted(set("".join(wanted + predicted)))
    said = Utterance("x", "speaker", 16_000)
    task = Task("ctc", "WER", Speech([said] * 3), wanted, ["test"] * 3, letters)
    numbers = [
        [[letters.index(c) for c in text] for text in texts] for texts in (predicted, wanted)
    ]
    assert score(task, *numbers) == pytest.approx(40)
    assert bootstrap(task, *numbers, [0, 1, 2]) == pytest.approx([40] * DRAWS)  # one group


WANTED = [
    "<a>one</a> <b>two</b>",
    "no slot",
    "<a>x</a>",
    "<a>x</a> <a>yy</a>",
    "<a>x</a>",
    "no",
    "<a>abc</a>",
]
PREDICTED = [
    "<a>won</a>",
    "no",
    "<b>x</b>",
    "<a>yy</a> <c>z</c>",
    "<a>x",
    "<a>x</a>",
    "<a>xyz</a> <a>abd</a> <a>ef</a>",
]


def test_slot_type_f1_by_hand():
    by_hand = [2 / 3, 1, 0, 2 / 3, 0, 0, 1]
    assert slot_type_f1(PREDICTED, WANTED) == pytest.approx(np.mean(by_hand))


def test_slot_value_cer_by_hand():
    edits = [
        2 + 3,  # one, won; two, nothing
        0,
        1,  # x, nothing
        2 + 0,  # x, yy; yy, yy
        1,  # x, nothing
        0,
        1,  # abc, abd
    ]
    characters = [3 + 3, 0, 1, 1 + 2, 1, 0, 3]
    expected = sum(edits) / sum(characters)
    assert slot_value_cer(PREDICTED, WANTED) == pytest.approx(expected)


def test_other_marks_and_spaces_in_a_value_do_not_count():
    assert slot_value_cer(["<a> o<b>n  e </a>"], ["<a>on e</a>"]) == 0


def test_scores_of_slots():
    symbols = ["<a>", "</a>", "x"]
    task = Task("ctc", "slot-type F1", None, [], [], symbols, second="slot-value CER")
    assert score(task, [[0, 2, 1]], [[0, -1, 1]]) == 100
    # The wanted value is one character that is not in train; both of the predicted xx are wrong.
    assert score(task, [[0, 2, 2, 1]], [[0, -1, 1]], "slot-value CER") == 200


def test_score_of_words():
    task = Task("ctc", "WER", None, [], [], [" ", "a", "b"])
    assert score(task, [[1, 0, 2]], [[1, 0, 2, 2]]) == 50  # "a b" for "a bb"


def test_an_answer_is_right_if_every_question_is():
    task = Task("pool", "accuracy", None, [], [], list("abcde"), groups=(2, 3))
    scores = torch.tensor([1.0, 0, 5, 9, 0])  # a and d
    assert score(task, [scores] * 4, [[0, 3], [0, 2], [1, 3], [1, 4]]) == 25


# finetune.py on each task.


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("--task", "pr", …) trains two epochs of heads in tmp_path; returns the newest point."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(OFAEncoder(PRESETS["tiny"]).checkpoint(), "encoder.pt")

    def run(*flags):
        given = ["--checkpoint", "encoder.pt", "--epochs", "2", "--out", "out", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *given])
        finetune.main()
        newest = max(Path("out").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(newest.read_text())

    return run


FLAGS = {"pr": ["--head", "linear"], "er": ["--fold", "5"]}
TESTED = {"pr": 3, "asr": 3, "ks": 15, "ic": 2, "sid": 3, "er": 7, "sf": 1}  # utterances


@pytest.mark.parametrize("name", SUPERB)
def test_every_task_is_finetuned(run, laid, name):
    point = run("--task", name, "--data", laid(name), *FLAGS.get(name, []))
    assert point["metric"] == SUPERB[name].metric
    assert point["test_utterances"] == TESTED[name]
    assert point["test"] >= 0
    assert point["epochs"] == 2
    assert point["infeasible_test"] == 0
    assert len(point["bootstrap"]) == 200
    if SUPERB[name].second:
        assert point[f"test {SUPERB[name].second}"] >= 0


@pytest.mark.parametrize(
    "name, texts",
    [
        ("pr", ["K AE T", "HH IY Z AH K AE T", "AH"]),
        ("sf", ["play <artist>bo</artist> in <city>bern</city>"]),
    ],
)
def test_examples_are_spelled(run, laid, name, texts):
    point = run("--task", name, "--data", laid(name), *FLAGS.get(name, []))
    assert point["examples"][0]["wanted"] in texts


def test_what_is_too_short_for_ctc_is_counted(run, laid):
    """At λ = 1.9 nearly all is one token: of "cat", "he's a cat" and "a" only the last fits."""
    assert run("--task", "asr", "--data", laid("asr"), "--lam", "1.9")["infeasible_test"] == 2


def test_root_is_where_data_are_looked_for(run, laid):
    assert run("--task", "sid", "--root", laid("sid"))["config"]["data"] == str(laid("sid"))


def test_another_fold_is_another_configuration(run, laid):
    run("--task", "er", "--data", laid("er"), "--epochs", "1")
    with pytest.raises(ValueError, match="fold differ"):
        run("--task", "er", "--data", laid("er"), "--epochs", "1", "--fold", "3")


# What is missing or damaged.


@pytest.mark.parametrize("name", SUPERB)
def test_no_data_is_one_clear_error(tmp_path, monkeypatch, name):
    entry = SUPERB[name]
    monkeypatch.chdir(tmp_path)
    save(OFAEncoder(PRESETS["tiny"]).checkpoint(), "encoder.pt")
    flags = f"--checkpoint encoder.pt --task {name} --data nowhere --out out"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / "finetune.py"), run_name="__main__")
    message = stop.value.code
    missing = f"no {entry.layout[0]} there. --task {name} needs {entry.data}"
    assert message.startswith(f"finetune.py: --data nowhere: {missing}")
    assert entry.page in message
    assert all(pattern in message for pattern in entry.layout)
    assert not Path("out").exists()


HALVES = [
    ("pr", "LibriSpeech/dev-clean"),
    ("pr", "cmudict/cmudict-0.7b"),
    ("asr", "LibriSpeech/dev-clean"),
    ("asr", "LibriSpeech/test-clean/61/198/61-198.trans.txt"),
    ("ks", "SpeechCommands/speech_commands_v0.01/_background_noise_"),
    ("ks", "SpeechCommands/speech_commands_v0.01/testing_list.txt"),
    ("ks", "SpeechCommands/speech_commands_v0.01/bed/1b4c9b89_nohash_0.wav"),
    ("ic", "fluent_speech_commands_dataset/wavs"),
    ("ic", "fluent_speech_commands_dataset/data/valid_data.csv"),
    ("sid", "VoxCeleb1/iden_split.txt"),
    ("sid", "VoxCeleb1/wav/id11251"),
    ("er", "IEMOCAP/Session4/dialog"),
    ("er", "IEMOCAP/Session5"),
    ("sf", "SNIPS/test"),
    ("sf", "SNIPS/all.iob.snips.txt"),
]


@pytest.mark.parametrize("name, gone", HALVES)
def test_half_a_data_set_is_one_clear_error(copy_of, name, gone):
    """It names what is gone, and says what the task needs."""
    folder = copy_of(name)
    path = folder / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ValueError) as error:
        load_superb(name, folder)
    trouble, needed = str(error.value).split(f"--task {name} needs ")
    assert trouble.startswith(f"--data {folder}: ")
    assert path.name.removesuffix(".trans.txt") in trouble
    assert needed.startswith(SUPERB[name].data)


def test_a_broken_list_is_one_clear_error(copy_of):
    folder = copy_of("sf")
    labels = folder / "SNIPS/all.iob.snips.txt"
    text = labels.read_text()
    # A tag is gone from each of two texts.
    text = text.replace("O O O artist", "O artist").replace("O O artist O city", "O O artist O")
    labels.write_text(text)
    with pytest.raises(ValueError, match="can't be read .ValueError"):
        load_superb("sf", folder)


def test_a_broken_file_is_named(copy_of, capsys):
    folder = copy_of("sid")
    broken = folder / "VoxCeleb1/wav/id10001/1zcIwhmdeo4/00001.wav"
    broken.write_bytes(b"")
    assert len(load_superb("sid", folder).speech) == 11
    assert f"left out: {broken}" in capsys.readouterr().err


def test_the_table_shows_what_is_there(laid, monkeypatch, capsys):
    folder = laid("sid")
    monkeypatch.setattr(sys, "argv", ["superb.py", str(folder)])
    monkeypatch.delitem(sys.modules, "parts.superb")  # run_module warns if it is there already
    runpy.run_module("parts.superb", run_name="__main__")
    shown = capsys.readouterr().out
    assert f"there    {folder / 'VoxCeleb1/iden_split.txt'}" in shown
    assert f"missing  {folder / 'SNIPS/all.iob.snips.txt'}" in shown
    for name, entry in SUPERB.items():
        assert f"--task {name}" in shown
        assert entry.page in shown


def test_the_table_has_a_help_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["superb.py", "--help"])
    monkeypatch.delitem(sys.modules, "parts.superb")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("parts.superb", run_name="__main__")
    shown = capsys.readouterr().out
    assert "what each task needs" in shown
    assert "missing" not in shown
