"""pretrain.py on forty real prompts: what a run leaves, what it learns, resuming, dealing batches
out, kills, full disks, memory."""

import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

import pretrain
from ofa_encoder import (
    PRESETS,
    OFAEncoder,
    frames_of,
    load_checkpoint,
    period_from_lam,
    transformer_gflops,
)
from parts import data
from parts.boundaries import pseudo_alpha
from parts.data import batches, by_length, load, loader, pad
from parts.teachers import MFCCTeacher, load_teacher
from pretrain import Distiller, constant_loss, draw_lams, evaluate, guidance

REPO = Path(__file__).parent.parent


@contextmanager
def suppress_nothing_learned():
    """Six steps teach next to nothing. pretrain.py says so at its end, with all files written."""
    try:
        yield
    except ValueError as error:
        if "has learned nothing" not in str(error):
            raise


@pytest.fixture
def run(folder, tmp_path, tmp_path_factory, monkeypatch):
    """run("--out", "a", …) pre-trains in tmp_path for six quick steps; later flags win."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path_factory.getbasetemp() / "root"  # boundaries are found once
    base = [
        "--data",
        str(folder),
        "--root",
        str(root),
        "--steps",
        "6",
        "--batch-seconds",
        "8",
        "--warmup",
        "2",
        "--device",
        "cpu",
    ]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *base, *flags])
        with suppress_nothing_learned():
            pretrain.main()

    run.flags = base
    return run


def weights(path):
    content = load_checkpoint(path)
    return {**content["encoder"], **{f"heads.{k}": v for k, v in content["heads"].items()}}


def test_a_run_leaves_encoder_table_and_figure(run, folder, capsys):
    run("--out", "a", "--quantity", "0.1", "--lam-distribution", "uniform-period", "--workers", "1")
    table = json.loads(Path("a/table.json").read_text())
    assert table["rows"][0]["lam"] == 0 and len(table["rows"]) == 6
    for row, asked in zip(table["rows"], (20, 25, 33, 50, 90, 180)):
        # λ is found by the mean α of held-out speech, which is not that of so little test speech.
        assert row["closed_form_ms"] == pytest.approx(asked, rel=0.1)
        assert row["closed_form_ms"] == pytest.approx(
            period_from_lam(row["lam"], table["mean_alpha"])
        )
        assert row["period_ms"] == pytest.approx(
            row["closed_form_ms"], rel=0.15
        )  # a hundred frames are few
        assert (
            row["tokens_per_s"] == pytest.approx(1000 / row["period_ms"])
            and len(row["distillation"]) == 1
        )
    gflops = [row["transformer_gflops_per_s"] for row in table["rows"]]
    assert gflops == sorted(gflops, reverse=True)
    encoder = OFAEncoder.from_checkpoint("a/encoder.pt")
    assert encoder.mean_alpha.item() == pytest.approx(table["mean_alpha"], rel=0.1)
    assert (
        encoder(load(str(folder))[0][None], lam=encoder.lam_for(60))
        .hidden_states[-1]
        .isfinite()
        .all()
    )
    assert Path("a/figure.png").stat().st_size > 20_000 and "closed form" in capsys.readouterr().out
    assert not list(Path("a").glob("*.partial"))
    run(
        "--out", "a", "--quantity", "0.1", "--lam-distribution", "uniform-period", "--resume"
    )  # finished: the table again
    assert json.loads(Path("a/table.json").read_text())["rows"] == table["rows"]


def test_segments_are_detected(run, folder):
    """The threshold is set so that segments of held-out speech last as long as asked; and a run
    that goes on ends with the weights of one that was not stopped."""
    run("--alpha", "segments", "--segment-ms", "120", "--out", "straight")
    encoder = OFAEncoder.from_checkpoint("straight/encoder.pt")
    assert encoder.config.alpha == "segments"
    assert 0 < encoder.end_threshold < 1 and encoder.end_threshold != 0.5
    assert 20 / encoder.mean_alpha.item() == pytest.approx(120, rel=0.05)
    held_out = load(str(folder)).part("valid")
    out = encoder(held_out[0][None], lam=1.0)
    (alpha,) = out.alpha
    assert (1 / alpha).round().tolist() == pytest.approx((1 / alpha).tolist())
    assert out.lengths.item() == round(alpha.sum().item())


def test_guidance_of_segments_is_the_cross_entropy_of_ends(asterisk, run):
    """By hand, on one utterance whose segments are given: the only loss that is left when the
    distillation is taken out."""
    parsed = pretrain.parse_arguments(["--alpha", "segments"])
    encoder = OFAEncoder(replace(PRESETS["tiny"], alpha="segments"))
    waveforms = asterisk[0][None]
    lengths = torch.tensor([waveforms.shape[1]])
    x, frames = encoder.features(waveforms, lengths)
    ends = [np.array([3, 10, frames.item()])]
    pseudo, number = pseudo_alpha(ends)
    encoded = encoder.encode(x, frames, 0.5, number > 0)
    nothing = torch.zeros(1, *pseudo.shape)
    loss = pretrain.step_loss(parsed, [(encoded, nothing, pseudo)], pseudo, number, [0], ends)
    p = encoded.predicted[0].double()
    expected = -(p[[2, 9, -1]].log().sum() + (1 - p).log().sum() - (1 - p[[2, 9, -1]]).log().sum())
    assert loss.item() == pytest.approx(expected.item() / len(p), rel=1e-4)
    # α is 1/n between the ends that were given, and has no gradient: the detector learns alone.
    assert encoded.alpha[0, :3].tolist() == pytest.approx([1 / 3] * 3)
    assert not encoded.alpha.requires_grad


def runpy_main(script, *flags):
    argv, sys.argv = sys.argv, [script, *map(str, flags)]
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.parametrize(
    "flags, period",
    [
        (("--compression", "none"), 20),
        (("--compression", "average2"), 40),
        (("--compression", "average4"), 80),
        (("--lam", "0.5"), None),
    ],
)
def test_single_rate_peers(run, flags, period):
    run("--out", "peer", "--steps", "2", *flags)
    (row,) = json.loads(Path("peer/table.json").read_text())["rows"]
    assert row["closed_form_ms"] == pytest.approx(period or row["period_ms"], rel=0.06)
    assert row["period_ms"] == pytest.approx(
        row["closed_form_ms"], rel=0.12
    )  # the last token of two short utterances
    assert OFAEncoder.from_checkpoint("peer/encoder.pt").config.compression == (
        flags[1] if "--compression" in flags else "cif"
    )


def test_a_hundred_steps_teach_more_than_a_constant_answer(run, capsys, monkeypatch):
    """From a teacher whose vectors were shuffled over time nothing can be learned: it says so."""
    flags = ("--steps", "100", "--lr", "2e-3")
    run("--out", "learned", *flags)
    table = json.loads(Path("learned/table.json").read_text())
    losses = [row["distillation"][0] for row in table["rows"]]
    assert losses[0] < 0.9 * table["constant"][0] and losses[4] < table["constant"][0]

    forward = MFCCTeacher.forward

    def shuffled(self, waveforms, lengths):
        (target,) = forward(self, waveforms, lengths)
        for row, n in zip(target, (frames_of(n) for n in lengths.tolist())):
            row[:n] = row[torch.randperm(n)]
        return [target]

    monkeypatch.setattr(MFCCTeacher, "forward", shuffled)
    with pytest.raises(
        SystemExit,
        match="has learned nothing: its held-out loss at λ = 0 is 1.*one constant answer gets",
    ):
        runpy_main("pretrain.py", *run.flags, *flags, "--out", "shuffled")
    assert Path("shuffled/encoder.pt").exists()


def test_the_best_constant_answer_by_hand(folder):
    """Against the definition, on all frames at once; padding and batches make no difference."""
    speech, teacher = load(str(folder)).subset(7), load_teacher("mfcc")
    rows = torch.cat(
        [teacher(speech[i][None], torch.tensor([len(speech[i])]))[0][0] for i in range(7)]
    ).numpy()
    mean = rows.mean(0)
    cosine = rows @ mean / (np.linalg.norm(rows, axis=1) * np.linalg.norm(mean))
    expected = np.abs(rows - mean).mean() + np.log(1 + np.exp(-cosine)).mean()
    # MFCCs are normalised to mean 0: of a mean that is all rounding the direction says nothing.
    assert constant_loss(teacher, speech, "cpu")[0] == pytest.approx(expected, abs=0.05)


def assert_same(*outs):
    """Two runs came to the same end, bit for bit: weights, heads and optimiser."""
    a, b = (load_checkpoint(f"{out}/checkpoint.pt") for out in outs)
    assert a["step"] == b["step"] == a["args"]["steps"]
    for part in ("encoder", "heads"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert a["optimizer"]["state"]
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][i][k]) for k in state)


def test_stopped_and_resumed_is_bit_for_bit_the_same(run, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], dropout=0.1))
    run("--out", "straight", "--save-every", "3")
    save = pretrain.save

    def stop_after_saving(content, path):
        save(content, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "save", stop_after_saving)
        run("--out", "stopped", "--save-every", "3")
    assert load_checkpoint("stopped/checkpoint.pt")["step"] == 3
    run("--out", "stopped", "--save-every", "3", "--resume")
    assert_same("straight", "stopped")

    # It may go on elsewhere, in smaller parts where memory is short.
    run("--out", "stopped", "--save-every", "2", "--accumulate", "2", "--resume")


def test_what_can_be_refused_is_refused_before_the_teacher_is_asked(run, monkeypatch):
    def asked(*_):
        raise AssertionError("the teacher was asked")

    run("--out", "a", "--steps", "1")
    Path("no-utterances.tsv").touch()
    monkeypatch.setattr(pretrain, "keep_targets", asked)
    with pytest.raises(ValueError, match="is of another run .*'lr'"):
        run("--out", "a", "--steps", "1", "--lr", "0.5", "--resume")
    with pytest.raises(ValueError, match="no-utterances.tsv lacks"):
        run("--out", "b", "--boundaries", "no-utterances.tsv")


def test_several_processes_do_not_share_mps(run, monkeypatch):
    monkeypatch.setattr(pretrain, "pick_device", torch.device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes can't share MPS"):
        run("--device", "mps")


@pytest.mark.parametrize("alpha", ["regression", "segments"])
def test_parts_of_a_batch_add_up(run, monkeypatch, alpha):
    """The gradient of a step does not depend on the parts in which its batch was taken.

    Weights would not do: Adam turns the last digit of a gradient near zero into a full step.
    """
    gradients = {}
    clip = pretrain.nn.utils.clip_grad_norm_

    def keep(parameters, norm):
        parameters = list(parameters)
        gradients[out] = torch.cat([p.grad.flatten() for p in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(pretrain.nn.utils, "clip_grad_norm_", keep)
    for out, parts in (("whole", "1"), ("parts", "2"), ("crumbs", "12")):  # in 12, some are empty
        run("--out", out, "--steps", "1", "--accumulate", parts, "--alpha", alpha)
    for out in ("parts", "crumbs"):
        assert (gradients["whole"] - gradients[out]).norm() < 1e-3 * gradients["whole"].norm()


SPY = """
# Runs pretrain.py as it is. This process notes which utterances it reads, at which λ it encodes,
# and which files it writes. Rank 1 can be made to die.
import json, os, runpy, signal, sys
from parts import boundaries  # before data.loader is replaced: it reads sound too
from parts import data
import ofa_encoder

script, log, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = [script, *sys.argv[4:]]
rank = os.environ["RANK"]
file = open(log + rank, "w")
loader = data.loader
encode = ofa_encoder.OFAEncoder.encode
lams = []

def note(what, value):
    print(json.dumps([what, value]), file=file, flush=True)

def noted_loader(speech, *rest):
    for used, *sound in loader(speech, *rest):
        note("read", [speech.utterances[i].id for i in used])
        yield used, *sound

def noted_encode(self, x, frames, lam=0.0, ends=None):
    if self.training:
        note("lam", lam)
        if rank == "1" and len(lams) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        lams.append(lam)
    return encode(self, x, frames, lam, ends)

def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            note("wrote", os.path.abspath(arguments[0]))
    if event == "os.rename":
        note("wrote", os.path.abspath(arguments[1]))

data.loader = noted_loader
ofa_encoder.OFAEncoder.encode = noted_encode
sys.addaudithook(audit)
runpy.run_path(script, run_name="__main__")
"""


def test_two_processes_train_as_one_and_one_that_dies_ends_the_job(run, folder, tmp_path):
    """An epoch in batches of odd sizes, which each process takes in two parts. One batch is a
    single utterance: nothing of it is left for rank 1. In the first start rank 1 dies in the
    fourth step, the second after a checkpoint; the second start goes on from there."""
    train = load(str(folder)).part("train")
    plan = batches(train, 8, 0)
    epoch = []
    while sum(map(len, epoch)) < len(train):
        epoch.append(next(plan))
    assert any(len(batch) % 2 for batch in epoch) and min(map(len, epoch)) == 1
    trained = {u.id for u in train.utterances}  # what else is read, is read in evaluation
    flags = ["--steps", str(len(epoch)), "--lr", "1e-4", "--save-every", "2"]
    run("--out", "one", *flags)
    Path("spy.py").write_text(SPY)

    def start(log, dies_at, *more):
        """The process, and the notes of each rank: a list for each of "read", "lam", "wrote"."""
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            + ["--nproc-per-node", "2", "spy.py", str(REPO / "pretrain.py"), log, str(dies_at)]
            + [*run.flags, *flags, "--accumulate", "2", "--out", "two", *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        )
        notes = []
        for rank in (0, 1):
            noted = {"read": [], "lam": [], "wrote": []}
            for line in Path(f"{log}{rank}").read_text().splitlines():
                what, value = json.loads(line)
                if what != "read" or trained >= set(value):
                    noted[what].append(value)
            notes.append(noted)
        return done, notes

    # A step encodes its two parts at three λ each: the nineteenth time is in the fourth step.
    done, before = start("before", 18)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert load_checkpoint("two/checkpoint.pt")["step"] == 2 and len(before[1]["lam"]) == 19
    done, after = start("after", -1, "--resume")
    assert done.returncode == 0 or "has learned nothing" in done.stderr, done.stderr[-2000:]
    assert done.stdout.count("closed form") == 1  # only rank 0 reports

    # Adam turns the last digit of a gradient near zero into a full step, so that a few weights may
    # differ by one. All in all they are apart by less than a tenth of a step.
    one, two = weights("one/checkpoint.pt"), weights("two/checkpoint.pt")
    apart = torch.cat([(one[k] - v).flatten() for k, v in two.items()])
    assert apart.square().mean().sqrt() < 0.1 * 1e-4

    # In the steps that counted, both ranks drew the same λ, and together read each utterance once.
    lams = [before[rank]["lam"][:12] + after[rank]["lam"] for rank in (0, 1)]
    read = [before[rank]["read"][:4] + after[rank]["read"] for rank in (0, 1)]
    args = SimpleNamespace(
        seed=0, lam=None, lams_per_step=3, lam_max=1.6, lam_distribution="uniform"
    )
    drawn = [lam for step in range(len(epoch)) for lam in 2 * draw_lams(args, step, 0.2)]
    assert lams[0] == lams[1] == drawn
    assert [] in read[1] and sorted(sum(read[0] + read[1], [])) == sorted(trained)

    # Only rank 0 writes.
    wrote = [
        {Path(path).name.split(".")[0] for path in rank["wrote"] if path.startswith(str(tmp_path))}
        for rank in after
    ]
    assert wrote == [{"checkpoint", "encoder", "table", "figure"}, set()]


def test_the_death_of_another_process_is_told_from_a_bug(run, monkeypatch):
    """Of the message that the others end with, if torchrun leaves them the time."""
    for message, end, words in (
        (
            "[/gloo/transport/tcp/pair.cc:545] Connection reset by peer",
            SystemExit,
            "another process has died",
        ),
        ("shapes do not fit", RuntimeError, "shapes do not fit"),
    ):

        def stop(*arguments, message=message, **more):
            raise RuntimeError(message)

        monkeypatch.setattr(data, "load", stop)
        with pytest.raises(end, match=words):
            runpy_main("pretrain.py", *run.flags, "--out", "new")


@pytest.mark.fuzz
def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(run):
    """SIGKILL, in turn while a checkpoint is being written and at any moment of the run."""
    kills = 20 if settings.get_current_profile_name() == "fuzz" else 3
    flags = ["--steps", str(6 * kills), "--save-every", "1"]
    run("--out", "straight", *flags)
    command = [
        sys.executable,
        str(REPO / "pretrain.py"),
        *run.flags,
        *flags,
        "--out",
        "killed",
        "--resume",
    ]
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }
    chance, checkpoint, boot, steps, half_written = (
        random.Random(0),
        Path("killed/checkpoint.pt"),
        0,
        [],
        0,
    )
    for kill in range(kills):
        process, began = subprocess.Popen(command, **quiet), time.time()
        partial, there, writes = (
            checkpoint.with_name(f"{checkpoint.name}.{process.pid}.partial"),
            False,
            0,
        )
        wanted, moment = (
            (chance.randint(1, 3), math.inf)
            if kill % 2 == 0
            else (math.inf, chance.uniform(0.3, 1.5) * boot)
        )
        while process.poll() is None and writes < wanted and time.time() - began < moment:
            time.sleep(0.001)
            before, there = there, partial.exists()
            writes += there and not before
            boot = boot or there * (time.time() - began)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        steps.append(
            load_checkpoint(checkpoint)["step"] if checkpoint.exists() else 0
        )  # never a corrupt one
        half_written += partial.exists()
    print(
        f"killed {kills} times, at steps {steps} of {6 * kills}; "
        f"{half_written} times a half-written file was left"
    )
    assert half_written and steps == sorted(steps) and steps[-1] < 6 * kills
    run("--out", "killed", *flags, "--resume")
    assert_same("straight", "killed")
    assert not list(Path("killed").glob("*.partial"))


def test_what_cannot_be_written_leaves_the_last_checkpoint(run, unwritable, monkeypatch):
    run("--out", "straight", "--save-every", "2")
    save, saved = pretrain.save, []

    def full_at_the_second(content, path):
        saved.append(path)
        with unwritable(path.parent) if len(saved) == 2 else nullcontext():
            save(content, path)

    message = r"stopped/checkpoint.pt could not be written \(.*(too large|denied).*before is intact"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(pretrain, "save", full_at_the_second)
        run("--out", "stopped", "--save-every", "2")
    assert load_checkpoint("stopped/checkpoint.pt")["step"] == 2 and [
        p.name for p in Path("stopped").iterdir()
    ] == ["checkpoint.pt"]
    run("--out", "stopped", "--save-every", "2", "--resume")
    assert_same("straight", "stopped")


def test_memory_does_not_grow_with_the_corpus(folder, tmp_path):
    """Peak memory of whole runs on links to one second of speech: ten times as many are 140 MB more
    of sound, and must cost less than 30. What grows is some kilobytes an utterance for its name and
    boundaries and, up to 400 utterances, the sample on which γ is found.
    """
    peaks, whole = [], load(str(folder))[0]
    soundfile.write(tmp_path / "second.wav", whole.repeat(2)[:16_000].numpy(), 16_000)
    for count in (240, 2400):
        (tmp_path / f"{count}").mkdir()
        for n in range(count):
            (tmp_path / f"{count}/{n}.wav").symlink_to(tmp_path / "second.wav")
        process = subprocess.Popen(
            [
                sys.executable,
                str(REPO / "pretrain.py"),
                "--data",
                f"{count}",
                "--root",
                "root",
                "--out",
                f"out-{count}",
                "--workers",
                "1",
                "--steps",
                "4",
                "--batch-seconds",
                "8",
                "--lam",
                "0.5",
                "--device",
                "cpu",
            ],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(process.pid, 0)
        assert (
            os.waitstatus_to_exitcode(status) in (0, 1)
            and Path(tmp_path, f"out-{count}/table.json").exists()
        )
        peaks.append(used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
    print(f"peak memory: {peaks[0]:.0f} MB with 240 files, {peaks[1]:.0f} MB with 2,400")
    assert peaks[1] < peaks[0] + 30


def test_evaluation_does_not_keep_what_it_has_heard(asterisk, monkeypatch):
    """No more than two batches are in memory at once: this one and the one before."""
    arrays, most = [], []

    def watched_loader(speech, plan):
        for used, waveforms, lengths in loader(speech, plan):
            array = waveforms.numpy().copy()
            arrays.append(weakref.ref(array))
            most.append(sum(a() is not None for a in arrays))
            waveforms, array = torch.from_numpy(array), None
            yield used, waveforms, lengths

    monkeypatch.setattr(pretrain, "loader", watched_loader)
    few = asterisk.subset(160)
    evaluate(Distiller(OFAEncoder(PRESETS["tiny"]), [39]), load_teacher("mfcc"), few, (1.0,), "cpu")
    assert len(arrays) == len(by_length(few)) > 5 and max(most) <= 2


def test_guidance_by_hand():
    alpha = torch.tensor([[0.6, 0.5, 0.25, 9.0]])
    pseudo, number = torch.tensor([[0.5, 0.5, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    frame, segment = guidance(alpha, pseudo, number)  # the fourth frame is padding
    assert frame.item() == pytest.approx(0.1 + 0 + 0.75) and segment.item() == pytest.approx(
        abs(1.1 - 1) + abs(1.35 - 2)
    )


@torch.no_grad()
def test_distillation_loss_is_the_formula(asterisk):
    torch.manual_seed(0)
    distiller = Distiller(OFAEncoder(PRESETS["tiny"]), [39]).eval()
    waveforms, lengths = pad([asterisk[3], asterisk[500]])
    (target,) = load_teacher("mfcc")(waveforms, lengths)
    (out, losses, covered), (_, _, at_the_end) = distiller(waveforms, lengths, [target], [0.0, 1.9])
    predicted = distiller.heads[0](out.hidden_states[-1])
    for b, s in ((0, 0), (0, 7), (1, 11)):
        p, h = predicted[b, s].numpy(), target[b, s].numpy()
        cosine = p @ h / (np.linalg.norm(p) * np.linalg.norm(h))
        assert losses[0, b, s].item() == pytest.approx(
            np.abs(p - h).mean() + math.log(1 + math.exp(-cosine)), rel=1e-4
        )
    assert torch.equal(covered > 0, torch.arange(covered.shape[1]) < out.frames[:, None])
    # At λ = 1.9 a tail that fires no token is not covered.
    assert (
        0.5 < at_the_end[0, : out.frames[0]].mean() <= 1 + 1e-6
        and not at_the_end[1, out.frames[1] :].any()
    )


def test_dropping_a_tail_is_not_rewarded(asterisk):
    """What is covered weighs the loss, and has no gradient."""
    torch.manual_seed(0)
    distiller = Distiller(OFAEncoder(PRESETS["tiny"]), [39])
    waveforms, lengths = pad([asterisk[3], asterisk[500]])
    ((out, losses, covered),) = distiller(
        waveforms, lengths, load_teacher("mfcc")(waveforms, lengths), [1.0]
    )
    assert out.fired.width.requires_grad and losses.requires_grad and not covered.requires_grad


def test_lams_are_drawn_as_asked():
    args = SimpleNamespace(
        seed=1, lam=None, lams_per_step=1, lam_max=1.5, lam_distribution="uniform"
    )
    drawn = [lam for step in range(2000) for lam in draw_lams(args, step, 0.22)]
    assert (
        0 <= min(drawn) < 0.01
        and 1.49 < max(drawn) <= 1.5
        and np.mean(drawn) == pytest.approx(0.75, abs=0.03)
    )
    assert (
        drawn[:3]
        == [draw_lams(args, step, 0.22)[0] for step in range(3)]
        != [draw_lams(args, step + 1, 0.22)[0] for step in range(3)]
    )
    args.lams_per_step = 3
    drawn = np.array(
        [draw_lams(args, step, 0.22) for step in range(2000)]
    )  # 0, then one from each half
    assert (
        (drawn[:, 0] == 0).all()
        and drawn[:, 1].max() <= 0.75 <= drawn[:, 2].min()
        and drawn.max() <= 1.5
    )
    assert drawn.mean(0) == pytest.approx([0, 0.375, 1.125], abs=0.03)
    args.lams_per_step, args.lam_distribution = 1, "uniform-period"
    periods = [period_from_lam(draw_lams(args, step, 0.22)[0], 0.22) for step in range(2000)]
    assert np.mean(periods) == pytest.approx((20 + period_from_lam(1.5, 0.22)) / 2, rel=0.03)
    args.lam = 0.4
    assert draw_lams(args, 5, 0.22) == [0.4]


def test_bf16_on_a_gpu_alone(run, monkeypatch):
    """On a CPU it is refused. The code that only a GPU reaches is exercised all the same."""
    with pytest.raises(ValueError, match="--precision bf16 is for CUDA, and this is cpu"):
        run("--out", "bf16", "--precision", "bf16")
    assert not Path("bf16").exists()
    monkeypatch.setattr(pretrain, "use_bf16", lambda args, device: True)
    run("--out", "bf16", "--steps", "2")
    assert all(v.isfinite().all() for v in weights("bf16/checkpoint.pt").values())


@torch.no_grad()
def test_flops_are_those_of_the_formula():
    encoder = OFAEncoder(PRESETS["tiny"]).eval()
    c, T = encoder.config, 99  # two seconds
    layer = 2 * T * (4 * c.dim**2 + 2 * c.dim * c.ff) + 4 * T**2 * c.dim
    positions = 2 * (T + 1) * c.dim * c.dim // 16 * c.pos_kernel
    assert transformer_gflops(encoder, [torch.randn(32_000)] * 2, 0.0) == pytest.approx(
        (c.layers * layer + positions) / 2e9, rel=0.01
    )


def test_non_finite_loss_stops_with_its_cause(run, monkeypatch):
    real = pretrain.load_teacher

    def poisoned(*a):
        teacher = real(*a)
        forward = teacher.forward
        teacher.forward = lambda *b: [
            t * (math.nan if counter.append(0) or len(counter) > 7 else 1) for t in forward(*b)
        ]
        return teacher

    # Calls: the fingerprint, two steps, evaluation, two steps, evaluation again; then step 4.
    counter = []
    run("--out", "warm", "--steps", "1")  # finds the boundaries
    monkeypatch.setattr(pretrain, "load_teacher", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"step 4, λ = .*utterances \['.*\.wav'.*last good checkpoint"
    ):
        run("--out", "bad", "--save-every", "2")
    content = load_checkpoint("bad/checkpoint.pt")
    assert content["step"] == 4 and all(v.isfinite().all() for v in content["encoder"].values())


def test_nan_in_alpha_stops_with_its_cause(run, monkeypatch):
    monkeypatch.setattr(
        pretrain,
        "initialise",
        lambda encoder, teacher: encoder.alpha_predictor.linear.bias.data.fill_(math.nan).numel(),
    )
    with pytest.raises(
        FloatingPointError,
        match=r"step 0, λ = .*: alpha .*NaN.*, utterances \['.*\.wav'.*there is no checkpoint yet",
    ):
        run("--out", "bad")
