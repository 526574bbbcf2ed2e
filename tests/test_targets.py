"""targets.py against the teacher asked directly, on real speech: what is kept, kills while it is
written, damage, full disks, and pretrain.py that trains from it.

The teacher is a random wav2vec 2.0 model of two layers, in a FILE.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import pretrain
from ofa_encoder import KERNELS, PRESETS, STRIDES, OFAEncoder, frames_of, load_checkpoint
from parts import boundaries, targets
from parts.data import Speech, load, pad
from parts.runs import save
from parts.targets import MODES, KeptTargets, cache_path, targets_of
from parts.teachers import MFCCTeacher, Wav2Vec2Teacher, fingerprint, load_teacher

REPO = Path(__file__).parent.parent
HALF = 2.0**-11  # the largest relative error of rounding to float16
DISK = namedtuple("DISK", "total used free")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """--teacher FILE."""
    torch.manual_seed(0)
    channels = [(32, kernel, stride) for kernel, stride in zip(KERNELS, STRIDES)]
    model = torchaudio.models.wav2vec2_model(
        "group_norm", channels, False, 128, 0.0, 16, 4, 2, 2, 0.0, 64, 0.0, 0.0, False, 0.0, None
    )
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture
def teacher(file):
    return load_teacher(file)


@pytest.fixture(scope="module")
def speech(asterisk):
    """Sixty prompts of all lengths: some five batches."""
    return asterisk.subset(60)


@pytest.fixture(scope="module")
def written(file, speech, tmp_path_factory):
    """The complete file of the teacher's targets of speech; not to be changed."""
    path = tmp_path_factory.mktemp("written") / "targets.f16"
    KeptTargets(path, speech, load_teacher(file)).write(load_teacher(file))
    return path


@pytest.fixture
def asked(monkeypatch):
    """A list that grows by the lengths of a batch whenever a wav2vec 2.0 teacher is asked."""
    batches = []
    forward = Wav2Vec2Teacher.forward

    def counted(self, waveforms, lengths):
        batches.append(lengths.tolist())
        return forward(self, waveforms, lengths)

    monkeypatch.setattr(Wav2Vec2Teacher, "forward", counted)
    return batches


def set_free(monkeypatch, free):
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda path: DISK(1e12, 1e12 - free, free))


# What is kept.


def test_what_is_read_is_what_the_teacher_says(teacher, speech, written):
    """Up to float16, and the rounding of batches that are padded otherwise."""
    kept = KeptTargets(written, speech, teacher)
    batch = [40, 3, 17]
    found = kept([speech.utterances[i].id for i in batch])
    for b, i in enumerate(batch):
        asked = teacher(speech[i][None], torch.tensor([len(speech[i])]))
        for target, expected, dim in zip(found, asked, teacher.dims, strict=True):
            n = frames_of(len(speech[i]))
            assert target.dtype == torch.float32 and target.shape[2] == dim
            torch.testing.assert_close(target[b, :n], expected[0], rtol=HALF + 1e-4, atol=1e-5)
            assert not target[b, n:].any()
    assert found[0].shape[1] == max(frames_of(len(speech[i])) for i in batch)


def test_every_utterance_has_its_own(speech, tmp_path):
    """MFCCs do not depend on the batch, so that every single number is known."""
    teacher = MFCCTeacher()
    kept = KeptTargets(tmp_path / "targets.f16", speech, teacher)
    kept.write(teacher)
    for i, utterance in enumerate(speech.utterances):
        (expected,) = teacher(speech[i][None], torch.tensor([len(speech[i])]))
        (found,) = kept([utterance.id])
        assert torch.equal(found, expected.half().float())


def test_the_file_is_as_large_as_announced(teacher, speech, tmp_path, monkeypatch, capsys):
    """Announced before the first batch is asked for."""
    said = []
    forward = Wav2Vec2Teacher.forward

    def listen(self, waveforms, lengths):
        said.append(capsys.readouterr().out)
        return forward(self, waveforms, lengths)

    monkeypatch.setattr(Wav2Vec2Teacher, "forward", listen)
    path = tmp_path / "targets.f16"
    kept = KeptTargets(path, speech, teacher)
    kept.write(teacher)
    frames = sum(frames_of(u.samples) for u in speech.utterances)
    size = frames * 2 * 128 * 2 + 4 * len(speech)  # two layers of 128 numbers of two bytes
    assert path.stat().st_size == kept.size == size
    assert said[0] == (
        f"the teacher is asked once: its targets, {size / 1e9:.2f} GB, go into {path}\n"
    )


def test_an_hour_with_hubert_base_takes_less_than_a_gigabyte(asterisk, tmp_path):
    teacher = Wav2Vec2Teacher(torchaudio.models.hubert_base(), [4, 8, 12])
    size = KeptTargets(tmp_path / "targets.f16", asterisk, teacher).size
    assert size / (asterisk.seconds / 3600) == pytest.approx(0.83e9, rel=0.02)


def test_no_utterances_give_a_frame_of_zeros(teacher, speech, written):
    """As for a process that got none of a batch: the loader gives one frame of silence."""
    found = KeptTargets(written, speech, teacher)([])
    assert [target.shape for target in found] == [(1, 1, 128), (1, 1, 128)]
    assert not any(target.any() for target in found)


def test_a_batch_is_read_by_the_indices_of_its_part(teacher, speech, written):
    """The train, valid and test parts are read from one file."""
    kept = KeptTargets(written, speech, teacher)
    part = Speech(speech.utterances[::-7], sound=speech.sound)
    waveforms, lengths = pad([part[i] for i in (0, 5)])
    found = targets_of(kept, part, [0, 5], waveforms, lengths)
    for target, expected in zip(found, targets_of(teacher, part, [0, 5], waveforms, lengths)):
        for b, n in enumerate(frames_of(n) for n in lengths.tolist()):
            found, wanted = target[b, :n], expected[b, :n]
            torch.testing.assert_close(found, wanted, rtol=HALF + 1e-4, atol=1e-5)


def test_rounding_changes_the_loss_by_no_more_than_it_can(teacher, speech, written):
    """The bound at the top of targets.py."""
    torch.manual_seed(0)
    model = pretrain.Distiller(OFAEncoder(PRESETS["tiny"]), teacher.dims)
    kept = KeptTargets(written, speech, teacher)
    lams = (0.0, 0.5, 1.0)
    read, _ = pretrain.evaluate(model, kept, speech, lams, "cpu")
    asked, _ = pretrain.evaluate(model, teacher, speech, lams, "cpu")
    mean = np.zeros(2)
    for i in range(len(speech)):
        layers = teacher(speech[i][None], torch.tensor([len(speech[i])]))
        mean += [layer.abs().mean().item() / len(speech) for layer in layers]
    bound = HALF * (mean + 1)
    for a, b in zip(read, asked, strict=True):
        difference = np.abs(np.array(a["distillation"]) - b["distillation"])
        assert (difference <= bound).all()
        assert difference.any()  # they are rounded


def test_boundaries_are_found_from_kept_targets(speech, tmp_path, monkeypatch):
    """They are the teacher's own where it says nothing that float16 can't hold."""
    forward = MFCCTeacher.forward
    monkeypatch.setattr(
        MFCCTeacher,
        "forward",
        lambda self, *batch: [target.half().float() for target in forward(self, *batch)],
    )
    teacher = MFCCTeacher()
    kept = KeptTargets(tmp_path / "targets.f16", speech, teacher)
    kept.write(teacher)
    part = Speech(speech.utterances[::2], sound=speech.sound)
    boundaries.segment(part, teacher, tmp_path / "asked.tsv")
    boundaries.segment(part, kept, tmp_path / "read.tsv")
    assert (tmp_path / "read.tsv").read_text() == (tmp_path / "asked.tsv").read_text()


def test_another_teacher_or_corpus_never_finds_the_file(file, speech, asterisk):
    teachers = [load_teacher(file), load_teacher(file, [1]), load_teacher("mfcc")]
    other = Speech(speech.utterances[1:], sound=speech.sound)
    keys = [(speech, fingerprint(teacher)) for teacher in teachers]
    keys += [(other, fingerprint(teachers[0])), (asterisk, fingerprint(teachers[0]))]
    assert len({cache_path(*key, "data") for key in keys}) == 5
    assert cache_path(*keys[0], "data") == cache_path(*keys[0], "data")


# Kills, and other writers.


KILLED = """
# Writes targets, and is killed when it asks the teacher for the third time.
import os, signal, sys
from pathlib import Path
from parts.data import load
from parts.targets import KeptTargets
from parts.teachers import load_teacher

teacher = load_teacher(sys.argv[1])
speech = load("asterisk", sys.argv[3]).subset(60)
forward = teacher.forward
calls = []

def deadly(*batch):
    calls.append(batch)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*batch)

teacher.forward = deadly
KeptTargets(Path(sys.argv[2]), speech, teacher).write(teacher)
"""


def as_it_is(partial):
    return 2


def lost_its_end(partial):
    """A batch that was not written to its end; after a power failure, say."""
    os.truncate(partial, partial.stat().st_size - 5)
    return 1


def ends_in_zeros(partial):
    os.truncate(partial, partial.stat().st_size + 5000)
    return 2


def begins_with_zeros(partial):
    with open(partial, "r+b") as file:
        file.write(bytes(1000))
    return 0


@pytest.mark.parametrize(
    "then",
    [as_it_is, lost_its_end, ends_in_zeros, begins_with_zeros],
)
def test_killed_while_it_is_written_it_goes_on(
    file, teacher, speech, written, tmp_path, asked, then
):
    path = tmp_path / "targets.f16"
    command = [sys.executable, "-c", KILLED, file, str(path), str(REPO / "data")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL

    kept = KeptTargets(path, speech, teacher)
    assert len(kept.plan) >= 4
    assert not kept.complete()  # half a file is none
    intact = then(kept.partial)
    kept.write(teacher)
    assert len(asked) == len(kept.plan) - intact
    assert kept.complete()
    assert path.read_bytes() == written.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_complete_is_not_written_again(teacher, speech, written, asked):
    before = written.stat()
    KeptTargets(written, speech, teacher).write(teacher)
    assert not asked
    assert written.stat() == before
    assert list(written.parent.iterdir()) == [written]


def test_two_runs_at_once_ask_only_once(teacher, speech, written, tmp_path, monkeypatch):
    """The second waits until the first has written the file."""
    path = tmp_path / "targets.f16"
    kept = KeptTargets(path, speech, teacher)
    second = threading.Thread(target=KeptTargets(path, speech, teacher).write, args=(teacher,))
    forward = Wav2Vec2Teacher.forward
    asked = []

    def slow(self, waveforms, lengths):
        asked.append(lengths)
        if len(asked) == 1:
            second.start()
            time.sleep(0.3)  # long enough for the second to begin
        return forward(self, waveforms, lengths)

    monkeypatch.setattr(Wav2Vec2Teacher, "forward", slow)
    kept.write(teacher)
    second.join()
    assert len(asked) == len(kept.plan)
    assert path.read_bytes() == written.read_bytes()


# Damage, and disks.


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_file_of_another_size_is_refused(teacher, speech, written, tmp_path, size):
    path = tmp_path / "targets.f16"
    path.write_bytes(written.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"targets.f16 is damaged \(\d+ bytes, .*: delete it"):
        KeptTargets(path, speech, teacher).complete()


def test_a_damaged_block_is_refused_and_the_others_are_read(teacher, speech, written, tmp_path):
    path = tmp_path / "targets.f16"
    content = bytearray(written.read_bytes())
    shortest = min(speech.utterances, key=lambda u: u.samples)  # whose block is the first
    content[1234] ^= 1
    path.write_bytes(content)
    kept = KeptTargets(path, speech, teacher)
    assert kept.complete()
    with pytest.raises(ValueError, match=f"f16 is damaged, or {shortest.id} could .*: delete it"):
        kept([shortest.id])
    kept([u.id for u in speech.utterances if u is not shortest])


def test_sound_that_could_not_be_read_has_no_targets(teacher, asterisk, tmp_path, capsys):
    """Its place in the file is kept, so that all others are where they belong."""
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", asterisk[i].numpy(), 16_000)
    speech = load(str(tmp_path))
    sound = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(b"")
    kept = KeptTargets(tmp_path / "targets.f16", speech, teacher)
    kept.write(teacher)
    assert "left out: " in capsys.readouterr().err
    (tmp_path / "1.wav").write_bytes(sound)
    for i in (0, 2, 3):
        asked = teacher(speech[i][None], torch.tensor([len(speech[i])]))
        for target, expected in zip(kept([speech.utterances[i].id]), asked, strict=True):
            torch.testing.assert_close(target, expected, rtol=HALF + 1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1.wav could not be read when it was written: delete it"):
        kept(["1.wav"])


@pytest.mark.parametrize("number", [70_000.0, float("nan")])
def test_targets_that_float16_cannot_hold_are_refused(speech, tmp_path, monkeypatch, number):
    def loud(self, waveforms, lengths):
        return [torch.full((len(lengths), frames_of(max(lengths.tolist())), 39), number)]

    monkeypatch.setattr(MFCCTeacher, "forward", loud)
    path = tmp_path / "targets.f16"
    with pytest.raises(ValueError, match="NaN or beyond 65,504.*--keep-targets never"):
        KeptTargets(path, speech, MFCCTeacher()).write(MFCCTeacher())
    assert not path.exists()


def test_a_disk_that_is_too_small_is_refused(teacher, speech, tmp_path, monkeypatch, asked):
    """What a killed run has written counts as free: it need not be written again."""
    kept = KeptTargets(tmp_path / "targets.f16", speech, teacher)
    set_free(monkeypatch, kept.size - 1)
    with pytest.raises(OSError, match="targets take 0.0. GB, and 0.0. GB are free in .*make room"):
        kept.write(teacher)
    assert not asked and not list(tmp_path.iterdir())
    kept.partial.write_bytes(bytes(1))
    kept.write(teacher)
    assert kept.complete()


def test_a_disk_that_fills_up_leaves_what_can_be_gone_on_with(
    teacher, speech, written, tmp_path, unwritable, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = Path("root")
    root.mkdir()
    kept = KeptTargets(root / "targets.f16", speech, teacher)
    with pytest.raises(OSError, match="f16.partial could not be written .*(too large|denied)"):
        with unwritable(root):
            kept.write(teacher)
    assert not kept.complete()
    kept.write(teacher)
    assert kept.path.read_bytes() == written.read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_whether_targets_are_kept(teacher, speech, written, tmp_path, monkeypatch, capsys, mode):
    """auto: what is there; else of a costly teacher, up to a tenth of the free disk and 2 GB."""
    kept = KeptTargets(tmp_path / "targets.f16", speech, teacher)
    auto = mode == "auto"
    always = mode == "always"
    assert KeptTargets(written, speech, teacher).wanted(mode, teacher) == (auto or always)
    assert kept.wanted(mode, MFCCTeacher()) == always

    set_free(monkeypatch, 10 * kept.size)
    assert kept.wanted(mode, teacher) == (auto or always)
    assert not capsys.readouterr().out
    set_free(monkeypatch, 10 * kept.size - 1)
    assert kept.wanted(mode, teacher) == always
    assert ("the teacher is asked at every step" in capsys.readouterr().out) == auto

    set_free(monkeypatch, 1e12)
    kept.size = 2_000_000_001
    assert kept.wanted(mode, teacher) == always


# pretrain.py.


@pytest.fixture
def run(folder, file, tmp_path, monkeypatch):
    """run("--out", "a", …) pre-trains on forty real prompts for six quick steps."""
    monkeypatch.chdir(tmp_path)
    flags = f"--data {folder} --root root --teacher {file} --steps 6 --batch-seconds 8 --warmup 2"
    flags += " --device cpu"

    def run(*more):
        argv = ["pretrain.py", *flags.split(), *more]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            pretrain.main()
        except ValueError as error:
            if "has learned nothing" not in str(error):  # six steps teach next to nothing
                raise

    run.flags = flags.split()
    return run


def same_end(a, b):
    """Whether two runs came to the same end, bit for bit."""
    a, b = (load_checkpoint(f"{out}/checkpoint.pt") for out in (a, b))
    assert a["step"] == b["step"]
    return all(
        torch.equal(a[part][key], b[part][key]) for part in ("encoder", "heads") for key in a[part]
    )


def losses(out):
    """Held-out losses at each λ, for each layer: (λ, layers)."""
    rows = json.loads(Path(out, "table.json").read_text())["rows"]
    return np.array([row["distillation"] for row in rows])


def test_pretraining_asks_the_teacher_once(run, folder, asked):
    """For a fingerprint, then for each utterance; and by a second run for a fingerprint alone."""
    run("--out", "first", "--keep-targets", "always")
    utterances = len(load(str(folder)))
    assert len(asked[0]) == 1 and sum(map(len, asked[1:])) == utterances
    run("--out", "second", "--steps", "2")  # auto: it is there
    assert sum(map(len, asked)) == 1 + utterances + 1
    assert len(list(Path("root").glob("targets-*"))) == 1
    run("--out", "never", "--steps", "2", "--keep-targets", "never")
    assert sum(map(len, asked)) > 2 + utterances + 1


def test_what_is_learned_from_kept_targets_is_the_same(run):
    """Rounding moves the weights too, step by step. After six steps the held-out losses differ by
    less than a hundredth of what was learned."""
    run("--out", "read", "--keep-targets", "always")
    run("--out", "asked", "--keep-targets", "never")
    run("--out", "start", "--keep-targets", "never", "--lr", "1e-9")
    learned = losses("start") - losses("asked")
    assert (learned > 0).all()
    assert (np.abs(losses("read") - losses("asked")) < 0.01 * learned).all()
    assert not same_end("read", "asked")  # bit for bit they are not


def test_stopped_and_resumed_is_bit_for_bit_the_same(run, monkeypatch):
    """What --keep-targets auto once decided must not be decided anew."""
    run("--out", "straight", "--save-every", "3")

    def stop_after_saving(content, path):
        save(content, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "save", stop_after_saving)
        run("--out", "stopped", "--save-every", "3")
    assert load_checkpoint("stopped/checkpoint.pt")["step"] == 3
    with pytest.raises(ValueError, match="another run .*'keep_targets': .'never', 'always'"):
        run("--out", "stopped", "--save-every", "3", "--resume", "--keep-targets", "never")
    set_free(monkeypatch, 0)  # the disk has filled up meanwhile
    run("--out", "stopped", "--save-every", "3", "--resume")
    assert same_end("straight", "stopped")


def test_a_run_that_kept_nothing_goes_on_when_targets_are_there(run):
    run("--out", "a", "--keep-targets", "never", "--steps", "2")
    run("--out", "b", "--keep-targets", "always", "--steps", "2")
    run("--out", "a", "--steps", "2", "--resume")
    assert load_checkpoint("a/checkpoint.pt")["args"]["keep_targets"] == "never"


def test_a_small_disk_ends_the_script_in_one_line_or_is_done_without(run, monkeypatch, capsys):
    set_free(monkeypatch, 1000)
    argv = ["pretrain.py", *run.flags, "--out", "a", "--keep-targets", "always"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "pretrain.py"), run_name="__main__")
    message = str(end.value)
    assert message.startswith("pretrain.py: the teacher's targets take ") and "\n" not in message
    run("--out", "b", "--steps", "1")
    assert "the teacher is asked at every step" in capsys.readouterr().out
    assert not list(Path("root").glob("targets-*"))


SPY = """
# Runs pretrain.py as it is, and notes of each process how often it asks the teacher.
import os, runpy, sys
from parts.teachers import Wav2Vec2Teacher

forward = Wav2Vec2Teacher.forward

def noted(self, waveforms, lengths):
    with open("asked" + os.environ["RANK"], "a") as file:
        print(len(lengths), file=file)
    return forward(self, waveforms, lengths)

Wav2Vec2Teacher.forward = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_of_two_processes_writes_and_both_read(run, folder, tmp_path):
    Path("spy.py").write_text(SPY)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["spy.py", str(REPO / "pretrain.py"), *run.flags, "--steps", "2", "--out", "two"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0 or "has learned nothing" in done.stderr, done.stderr[-2000:]
    assert done.stdout.count("the teacher is asked once") == 1
    asked = [[int(n) for n in Path(f"asked{rank}").read_text().split()] for rank in (0, 1)]
    assert sum(asked[0]) == 1 + len(load(str(folder)))  # one is for the fingerprint
    assert asked[1] == [1]


# Makefile.


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], '--teacher "mfcc" --steps 1200 --out "runs/demo" --resume'),
        (
            ["TEACHER=hubert_base"],
            '--teacher "hubert_base" --steps 400 --out "runs/demo-hubert_base" --resume',
        ),
        (
            ["TEACHER=my own/x.pt", "STEPS=900"],
            '--teacher "my own/x.pt" --steps 900 --out "runs/demo-my own-x.pt" --resume',
        ),
    ],
)
def test_each_teacher_of_make_demo_has_a_folder(flags, expected):
    """Otherwise --resume would find another teacher's run there."""
    done = subprocess.run(
        ["make", "--dry-run", "demo", *flags], cwd=REPO, capture_output=True, text=True
    )
    assert f"pretrain.py {expected}\n" in done.stdout
