"""superb.py on tiny folders that are laid out as the real data sets are, with real speech as their sound; metrics by hand; missing data."""

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
from finetune import score
from ofa_encoder import PRESETS, OFAEncoder
from parts.heads import PoolHead
from parts.runs import save
from parts.superb import SUPERB, load_superb, slot_type_f1, slot_value_cer, spell, word_error_rate
from parts.tasks import Task

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sound(asterisk):
    """sound(path): writes the next of many short prompts there; returns its samples at 16 kHz."""
    short = itertools.cycle(
        [i for i, u in enumerate(asterisk.utterances) if 12_000 < u.samples < 20_000]
    )

    def write(path, rate=16_000, waveform=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        waveform = asterisk[next(short)].numpy() if waveform is None else waveform
        soundfile.write(path, waveform, rate)
        return waveform

    return write


def librispeech(root, sound):
    for subset, speaker, texts in (
        ("train-clean-100", 19, ["HE'S READ", "A CAT", "CAT READ", "ZYZZYX CAT"]),
        ("dev-clean", 84, ["A CAT READ", "ZYZZYX"]),
        ("test-clean", 61, ["CAT", "HE'S A CAT", "A"]),
    ):
        folder = root / f"LibriSpeech/{subset}/{speaker}/198"
        for n, _ in enumerate(texts):
            sound(folder / f"{speaker}-198-{n:04d}.flac")
        (folder / f"{speaker}-198.trans.txt").write_text(
            "".join(f"{speaker}-198-{n:04d} {text}\n" for n, text in enumerate(texts))
        )


def pr(root, sound):
    librispeech(root, sound)
    (root / "cmudict").mkdir()
    (root / "cmudict/cmudict-0.7b").write_text(
        ";;; # CMUdict\n!EXCLAMATION-POINT  EH2 K S\nA  AH0\nA(1)  EY1\nCAT  K AE1 T\n"
        "HE'S  HH IY1 Z\nREAD  R EH1 D\nREAD(1)  R IY1 D\n"
    )
    (root / "cmudict/cmudict-0.7b.symbols").write_text("AH\nAH0\nAH1\n")


def ks(root, sound):
    folder, lists = root / "SpeechCommands/speech_commands_v0.01", {"validation": [], "testing": []}
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
    rng = np.random.default_rng(0)
    for name, length in (("white_noise", 168_000), ("running_tap", 320_000)):
        loudness = (1 + np.arange(length) // 16_000) / 50  # tells the seconds apart
        sound(
            folder / f"_background_noise_/{name}.wav",
            waveform=loudness * np.sign(rng.normal(size=length)),
        )
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
            sound(root / f"IEMOCAP/Session{session}/sentences/wav/{dialog}/{dialog}_F{n:03d}.wav")
            lines.append(
                f"[6.2901 - 8.2357]\t{dialog}_F{n:03d}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
            )
        folder = root / f"IEMOCAP/Session{session}/dialog/EmoEvaluation"
        folder.mkdir(parents=True)
        (folder / f"{dialog}.txt").write_text("".join(lines))


def sf(root, sound):
    lines = []
    for speaker in (
        "Ivy",
        "Nicole",
        "Brian",
    ):  # one of each split of SUPERB's; each has spoken all of it
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


LAY = {"pr": pr, "asr": librispeech, "ks": ks, "ic": ic, "sid": sid, "er": er, "sf": sf}


@pytest.fixture(scope="module")
def laid(sound, tmp_path_factory):
    """laid(name): a folder with the tiny data set of that task."""
    folders = {}

    def laid(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(
                "Session_" + name
            )  # IEMOCAP's class looks for the first Session in a path
            LAY[name](folders[name], sound)
        return folders[name]

    return laid


def of(task, split):
    return [task.targets[i] for i in task.indices(split)]


def test_pr(laid, capsys):
    task = load_superb("pr", laid("pr"))
    assert of(task, "train") == [
        "HH IY Z R EH D".split(),
        "AH K AE T".split(),
        "K AE T R EH D".split(),
    ]
    assert (
        of(task, "valid") == ["AH K AE T R EH D".split()]
        and of(task, "test")[1] == "HH IY Z AH K AE T".split()
    )
    assert task.symbols == "AE AH D EH HH IY K R T Z".split() and (task.kind, task.metric) == (
        "ctc",
        "PER",
    )
    error = capsys.readouterr().err
    assert (
        "utterances (1 of 4 in train, 1 of 2 in valid, 0 of 3 in test) with any of 1 words, such as ZYZZYX"
        in error
        and len(error.splitlines()) == 1
    )


def test_pr_looks_up_more_words(laid, tmp_path, capsys):
    shutil.copytree(laid("pr"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "cmudict/librispeech-lexicon.txt").write_text(
        "CAT\tB IH1 G\nZYZZYX\tZ IH1 Z IH0 K S\n"
    )
    task = load_superb("pr", tmp_path)
    assert (
        of(task, "train")[3] == "Z IH Z IH K S K AE T".split()
        and len(of(task, "valid")) == 2
        and capsys.readouterr().err == ""
    )


def test_asr(laid):
    task = load_superb("asr", laid("asr"))
    assert ["".join(t) for t in of(task, "train")] == [
        "he's read",
        "a cat",
        "cat read",
        "zyzzyx cat",
    ]
    assert ["".join(t) for t in of(task, "test")] == ["cat", "he's a cat", "a"] and len(
        of(task, "valid")
    ) == 2
    assert task.symbols == sorted(" '" + "acdehrstxyz") and (task.kind, task.metric) == (
        "ctc",
        "WER",
    )


def test_ks(laid):
    task = load_superb("ks", laid("ks"))
    words = "yes no up down left right on off stop go".split()
    for split, silence in (("train", 8 + 16), ("valid", 1 + 2), ("test", 1 + 2)):
        labels = of(task, split)
        assert sorted(labels) == sorted([*words, "unknown", "unknown"] + ["silence"] * silence)
        speaker = {"train": "0a7c2a8d", "valid": "1b4c9b89", "test": "2c6d3924"}[split]
        assert all(
            speaker in task.speech.utterances[i].path
            for i in task.indices(split)
            if task.targets[i] != "silence"
        )
    assert len(task.symbols) == 12
    heard = {"train": set(), "valid": set(), "test": set()}
    for i, (label, split) in enumerate(zip(task.targets, task.splits)):
        if label == "silence" and "running_tap" in task.speech.utterances[i].path:
            loud = task.speech[i].abs() * 50
            assert (
                len(loud) == task.speech.utterances[i].samples == 16_000
                and loud.max() - loud.min() < 0.01
            )
            heard[split].add(round(loud.mean().item()))
    assert heard == {"train": set(range(1, 17)), "valid": {17, 18}, "test": {19, 20}}


def test_ic(laid):
    task = load_superb("ic", laid("ic"))
    assert task.symbols == [
        "action activate",
        "action deactivate",
        "action increase",
        "object lights",
        "object volume",
        "location kitchen",
        "location none",
    ] and task.groups == (3, 2, 2)
    assert of(task, "test") == [
        ["action increase", "object lights", "location kitchen"],
        ["action activate", "object lights", "location none"],
    ]
    assert finetune.build_head(None, task, 3, 8).groups == [3, 2, 2] and of(task, "valid") == [
        ["action activate", "object volume", "location none"]
    ]
    assert task.speech.utterances[task.indices("test")[1]].path.endswith(
        "test1-4479-11e9-a9a5-5dbec3b8816a.wav"
    )


def test_sid(laid):
    task = load_superb("sid", laid("sid"))
    assert (
        task.symbols == ["id10001", "id10002", "id11251"] == of(task, "valid") == of(task, "test")
        and len(of(task, "train")) == 6
    )
    assert (
        all(task.targets[i] in task.speech.utterances[i].path for i in range(12))
        and task.metric == "accuracy"
    )
    assert {
        split: {Path(task.speech.utterances[i].path).stem for i in task.indices(split)}
        for split in ("train", "valid", "test")
    } == {"train": {"00001", "00002"}, "valid": {"00003"}, "test": {"00004"}}


def test_er(laid):
    for fold in (1, 4):
        task = load_superb("er", laid("er"), fold)
        assert {i for i in range(39) if f"Session{fold}/" in task.speech.utterances[i].path} == set(
            task.indices("test")
        )
        assert (
            of(task, "test") == "neutral happy happy angry sad neutral angry sad".split()
        )  # neither frustrated nor undecided
        assert (len(of(task, "train")), len(of(task, "valid")), task.symbols) == (
            25,
            6,
            ["angry", "happy", "neutral", "sad"],
        )
        assert task.splits == load_superb("er", laid("er"), fold).splits


def test_sf(laid):
    task = load_superb("sf", laid("sf"))
    assert ["".join(t) for t in of(task, "train")] == [
        "play <genre>cool jazz</genre> now",
        "play it",
    ]
    assert ["".join(t) for t in of(task, "valid")] == ["<genre>jazz and soul</genre>"]
    assert ["".join(t) for t in of(task, "test")] == [
        "play <artist>bo</artist> in <city>bern</city>"
    ]
    assert [Path(u.path).name.split("-")[0] for u in task.speech.utterances] == [
        "Ivy",
        "Ivy",
        "Nicole",
        "Brian",
    ]
    assert {"<artist>", "</artist>", "<city>", "</city>", "<genre>", "</genre>"} == {
        s for s in task.symbols if len(s) > 1
    }
    assert (task.kind, task.metric, task.second) == ("ctc", "slot-type F1", "slot-value CER")


def test_sf_in_mp3_and_with_a_file_too_many(laid, tmp_path, capsys):
    shutil.copytree(laid("sf"), tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("SNIPS/*/*.wav"):
        soundfile.write(path.with_suffix(".mp3"), soundfile.read(path)[0], 16_000)
        path.unlink()
    shutil.copy(
        next(tmp_path.glob("SNIPS/train/Ivy*.mp3")), tmp_path / "SNIPS/train/Ivy-snips-train-99.mp3"
    )
    task = load_superb("sf", tmp_path)
    assert (
        len(task.speech) == 4
        and len(task.speech[3]) > 10_000
        and "left out: 1 files that all.iob.snips.txt lacks" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text, tags, spelled",
    [
        ("Play it", "O O", "play it"),
        ("BIG cat runs", "a a b", "<a>big cat</a> <b>runs</b>"),
        ("one two", "B-a B-a", "<a>one</a> <a>two</a>"),
        ("one two", "B-a I-a", "<a>one two</a>"),
        ("a ?", "x x", "<x>a</x>"),
        ("a , b", "x O x", "<x>a b</x>"),
    ],
)
def test_slots_are_spelled(text, tags, spelled):
    assert "".join(spell(text, tags)) == spelled


def test_metrics_by_hand():
    assert word_error_rate(["a cat", "he  s", ""], ["a dog", "he s", "so"]) == pytest.approx(
        2 / 5
    )  # dog, so
    wanted = [
        "<a>one</a> <b>two</b>",
        "no slot",
        "<a>x</a>",
        "<a>x</a> <a>yy</a>",
        "<a>x</a>",
        "no",
        "<a>abc</a>",
    ]
    predicted = [
        "<a>won</a>",
        "no",
        "<b>x</b>",
        "<a>yy</a> <c>z</c>",
        "<a>x",
        "<a>x</a>",
        "<a>xyz</a> <a>abd</a> <a>ef</a>",
    ]
    assert slot_type_f1(predicted, wanted) == pytest.approx((2 / 3 + 1 + 0 + 2 / 3 + 0 + 0 + 1) / 7)
    # one / won 2 edits, two / nothing 3, x / nothing 1, x / yy 2 and yy / yy 0, x / nothing 1, abc / abd 1; characters: 3 + 3 + 1 + 3 + 1 + 3
    assert slot_value_cer(predicted, wanted) == pytest.approx((2 + 3 + 1 + 2 + 0 + 1 + 1) / 14)
    assert (
        slot_value_cer(["<a> o<b>n  e </a>"], ["<a>on e</a>"]) == 0
    )  # other marks inside, and spaces, do not count
    task = Task("ctc", "slot-type F1", None, [], [], ["<a>", "</a>", "x"], second="slot-value CER")
    assert (
        score(task, [[0, 2, 1]], [[0, -1, 1]]) == 100
        and score(task, [[0, 2, 2, 1]], [[0, -1, 1]], "slot-value CER") == 200
    )
    task = Task("ctc", "WER", None, [], [], [" ", "a", "b"])
    assert score(task, [[1, 0, 2]], [[1, 0, 2, 2]]) == 50
    task = Task("pool", "accuracy", None, [], [], list("abcde"), groups=(2, 3))
    scores = [torch.tensor([1.0, 0, 5, 9, 0])] * 4  # a and d
    assert score(task, scores, [[0, 3], [0, 2], [1, 3], [1, 4]]) == 25


def test_groups_are_cross_entropies_of_their_own():
    torch.manual_seed(0)
    head, hidden, lengths = (
        PoolHead(3, 8, 5, groups=(2, 3)).eval(),
        torch.randn(2, 3, 4, 8),
        torch.tensor([4, 2]),
    )
    logits = torch.stack(head.predict(hidden, lengths)).double()
    first, second = logits[:, :2].log_softmax(1), logits[:, 2:].log_softmax(1)
    expected = -(first[0, 1] + first[1, 0] + second[0, 0] + second[1, 2]).item() / 2
    assert head.loss(hidden, lengths, [[1, 2], [0, 4]]).item() == pytest.approx(expected)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(OFAEncoder(PRESETS["tiny"]).checkpoint(), "encoder.pt")

    def run(*flags):
        argv = [
            "finetune.py",
            "--checkpoint",
            "encoder.pt",
            "--epochs",
            "2",
            "--out",
            "out",
            *map(str, flags),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(REPO / "finetune.py"), run_name="__main__")
        return json.loads(
            sorted(Path("out").glob("*.json"), key=lambda p: p.stat().st_mtime)[-1].read_text()
        )

    return run


@pytest.mark.parametrize(
    "name, flags, tested",
    [
        ("pr", "--head linear", 3),
        ("asr", "", 3),
        ("ks", "", 15),
        ("ic", "", 2),
        ("sid", "", 3),
        ("er", "--fold 5", 7),
        ("sf", "", 1),
    ],
)
def test_every_task_is_finetuned(run, laid, name, flags, tested, capsys):
    point = run("--task", name, "--data", laid(name), *flags.split())
    assert (
        point["metric"] == SUPERB[name].metric
        and point["test_utterances"] == tested
        and 0 <= point["test"]
        and point["epochs"] == 2
    )
    assert point["infeasible_test"] == 0
    if name == "pr":
        assert point["examples"][0]["wanted"] in ("K AE T", "HH IY Z AH K AE T", "AH")
    if name == "sf":
        assert (
            point["test slot-value CER"] >= 0
            and point["examples"][0]["wanted"] == "play <artist>bo</artist> in <city>bern</city>"
        )


def test_what_is_too_short_for_ctc_is_counted(run, laid):
    """At λ = 1.9 nearly all is one token: of "cat", "he's a cat" and "a" only the last fits."""
    assert run("--task", "asr", "--data", laid("asr"), "--lam", "1.9")["infeasible_test"] == 2


def test_root_is_where_data_are_looked_for(run, laid):
    assert run("--task", "sid", "--root", laid("sid"))["config"]["data"] == str(laid("sid"))


def test_another_fold_is_another_configuration(run, laid):
    run("--task", "er", "--data", laid("er"), "--epochs", "1")
    with pytest.raises(SystemExit) as stop:
        run("--task", "er", "--data", laid("er"), "--epochs", "1", "--fold", "3")
    assert "(fold differ)" in str(stop.value.code)


@pytest.mark.parametrize("name, better", [("asr", min), ("sf", max)])
def test_the_better_epoch_is_kept(run, laid, monkeypatch, name, better):
    scores = iter([50.0, 60.0, 40.0, 0.0])  # on valid, after each of three epochs, and on test
    monkeypatch.setattr(
        finetune,
        "score",
        lambda task, predicted, targets, metric="": 7.0 if metric else next(scores),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        f"finetune.py --checkpoint encoder.pt --epochs 3 --task {name} --data {laid(name)} --out out".split(),
    )
    finetune.main()
    point = json.loads(next(Path("out").glob("*.json")).read_text())
    assert point["valid"] == better(50, 60, 40) and point["test"] == 0


@pytest.mark.parametrize("name", SUPERB)
def test_no_data_is_one_clear_error(run, name):
    with pytest.raises(SystemExit) as stop:
        run("--task", name, "--data", "nowhere")
    message = str(stop.value.code)
    assert message.startswith(
        f"finetune.py: --data nowhere: no {SUPERB[name].layout[0]} there. --task {name} needs "
    )
    assert (
        all(wanted in message for wanted in (*SUPERB[name].layout, SUPERB[name].page))
        and not Path("out").exists()
    )


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
def test_half_a_data_set_is_one_clear_error(run, laid, tmp_path, name, gone):
    shutil.copytree(laid(name), tmp_path / "half")
    path = tmp_path / "half" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SystemExit) as stop:
        run("--task", name, "--data", "half")
    message = str(stop.value.code)
    assert (
        message.startswith("finetune.py: --data half: ")
        and f"--task {name} needs {SUPERB[name].data}" in message
    )
    assert gone.split("/")[-1].removesuffix(".trans.txt") in message.split("--task")[0]


def test_a_broken_list_is_one_clear_error(laid, tmp_path):
    shutil.copytree(laid("sf"), tmp_path, dirs_exist_ok=True)
    labels = tmp_path / "SNIPS/all.iob.snips.txt"
    labels.write_text(
        labels.read_text()
        .replace("O O O artist", "O artist")
        .replace("O O artist O city", "O O artist O")
    )
    with pytest.raises(ValueError, match="can't be read .ValueError"):
        load_superb("sf", tmp_path)


def test_a_broken_file_is_named(laid, tmp_path, capsys):
    shutil.copytree(laid("sid"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "VoxCeleb1/wav/id10001/1zcIwhmdeo4/00001.wav").write_bytes(b"")
    assert (
        len(load_superb("sid", tmp_path).speech) == 11 and "left out: " in capsys.readouterr().err
    )


def test_the_table_shows_what_is_there(laid, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["superb.py", str(laid("sid"))])
    runpy.run_path(str(REPO / "superb.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert (
        f"there    {laid('sid') / 'VoxCeleb1/iden_split.txt'}" in shown
        and f"missing  {laid('sid') / 'SNIPS/all.iob.snips.txt'}" in shown
    )
    assert all(entry.page in shown and f"--task {name}" in shown for name, entry in SUPERB.items())
