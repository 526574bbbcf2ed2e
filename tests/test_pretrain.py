"""pretrain.py and evaluate.py on forty real prompts: what a run leaves, resuming, dealing batches out, and mistakes."""

import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretrain
from data import load, pad
from evaluate import evaluate, transformer_gflops
from ofa_encoder import PRESETS, OFAEncoder, load_checkpoint, period_from_lam
from pretrain import Distiller, draw_lam, guidance
from teachers import load_teacher

REPO = Path(pretrain.__file__).parent


@pytest.fixture
def run(folder, tmp_path, tmp_path_factory, monkeypatch):
    """run("--out", "a", …) pre-trains in tmp_path for six quick steps; later flags win."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path_factory.getbasetemp() / "root"  # boundaries are found once
    base = ["--data", str(folder), "--root", str(root), "--steps", "6", "--batch-seconds", "8", "--warmup", "2", "--device", "cpu",
            "--precision", "fp32"]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *base, *flags])
        pretrain.main()
    run.flags = base
    return run


def weights(path):
    content = load_checkpoint(path)
    return {**content["encoder"], **{f"heads.{k}": v for k, v in content["heads"].items()}}


def test_a_run_leaves_encoder_table_and_figure(run, folder, capsys):
    run("--out", "a", "--quantity", "0.1", "--lam-distribution", "uniform-period", "--precision", "bf16", "--workers", "1")
    table = json.loads(Path("a/table.json").read_text())
    assert table["rows"][0]["lam"] == 0 and len(table["rows"]) == 6
    for row, asked in zip(table["rows"], (20, 25, 33, 50, 90, 180)):
        assert row["closed_form_ms"] == pytest.approx(asked, rel=0.05)
        assert row["closed_form_ms"] == pytest.approx(period_from_lam(row["lam"], table["mean_alpha"]))
        assert row["period_ms"] == pytest.approx(row["closed_form_ms"], rel=0.15)  # a hundred frames are few
        assert row["tokens_per_s"] == pytest.approx(1000 / row["period_ms"]) and len(row["distillation"]) == 1
    gflops = [row["transformer_gflops_per_s"] for row in table["rows"]]
    assert gflops == sorted(gflops, reverse=True)
    encoder = OFAEncoder.from_checkpoint("a/encoder.pt")
    assert encoder.mean_alpha.item() == pytest.approx(table["mean_alpha"], rel=0.05)
    assert encoder(load(str(folder))[0][None], lam=encoder.lam_for(60)).hidden_states[-1].isfinite().all()
    assert Path("a/figure.png").stat().st_size > 20_000 and "closed form" in capsys.readouterr().out
    assert not list(Path("a").glob("*.partial"))
    runpy_main("evaluate.py", "a/checkpoint.pt")
    again = capsys.readouterr().out
    assert f"{table['rows'][2]['period_ms']:.1f}" in again


def runpy_main(script, *flags):
    argv, sys.argv = sys.argv, [script, *map(str, flags)]
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.parametrize("flags, period", [(("--compression", "none"), 20), (("--compression", "average2"), 40),
                                           (("--compression", "average4"), 80), (("--lam", "0.5"), None)])
def test_single_rate_peers(run, flags, period):
    run("--out", "peer", "--steps", "2", *flags)
    (row,) = json.loads(Path("peer/table.json").read_text())["rows"]
    assert row["closed_form_ms"] == pytest.approx(period or row["period_ms"], rel=0.06)
    assert row["period_ms"] == pytest.approx(row["closed_form_ms"], rel=0.12)  # the last token of two short utterances
    assert OFAEncoder.from_checkpoint("peer/encoder.pt").config.compression == (flags[1] if "--compression" in flags else "cif")


def test_training_brings_the_loss_down(run, folder):
    speech, teacher = load(str(folder)).part("train"), load_teacher("mfcc")
    losses = []
    for steps in (1, 60):
        run("--out", f"s{steps}", "--steps", str(steps), "--lr", "2e-3")
        distiller, _ = Distiller.from_checkpoint(f"s{steps}/checkpoint.pt")
        rows, _ = evaluate(distiller, teacher, speech, (0.25, 1.0))
        losses.append([row["distillation"][0] for row in rows])
    assert losses[1][0] < losses[0][0] - 0.2 and losses[1][1] < losses[0][1] - 0.1


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
    a, b = load_checkpoint("straight/checkpoint.pt"), load_checkpoint("stopped/checkpoint.pt")
    assert a["step"] == b["step"] == 6
    for part in ("encoder", "heads"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][i][k]) for k in state)


def test_parts_of_a_batch_add_up(run):
    flags = ("--steps", "3", "--lr", "1e-4")
    run("--out", "whole", *flags)
    run("--out", "parts", *flags, "--accumulate", "2")
    run("--out", "crumbs", *flags, "--accumulate", "12")  # more parts than utterances: some are empty
    whole = weights("whole/checkpoint.pt")
    for other in ("parts", "crumbs"):
        assert max((whole[k] - v).abs().max() for k, v in weights(f"{other}/checkpoint.pt").items()) <= 1e-5


def test_two_processes_train_as_one(run, tmp_path):
    flags = ["--steps", "3", "--lr", "1e-4"]
    run("--out", "one", *flags)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(REPO / "pretrain.py"),
                           *run.flags, *flags, "--out", "two"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("closed form") == 1          # only rank 0 reports
    one, two = weights("one/checkpoint.pt"), weights("two/checkpoint.pt")
    assert max((one[k] - v).abs().max() for k, v in two.items()) <= 1e-5


def test_guidance_by_hand():
    alpha = torch.tensor([[0.6, 0.5, 0.25, 9.0]])
    pseudo, number = torch.tensor([[0.5, 0.5, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    frame, segment = guidance(alpha, pseudo, number)  # the fourth frame is padding
    assert frame.item() == pytest.approx(0.1 + 0 + 0.75) and segment.item() == pytest.approx(abs(1.1 - 1) + abs(1.35 - 2))


@torch.no_grad()
def test_distillation_loss_is_the_formula(asterisk):
    torch.manual_seed(0)
    distiller = Distiller(OFAEncoder(PRESETS["tiny"]), [39]).eval()
    waveforms, lengths = pad([asterisk[3], asterisk[500]])
    (target,) = load_teacher("mfcc")(waveforms, lengths)
    out, losses, covered = distiller(waveforms, lengths, [target], 0.0)
    predicted = distiller.heads[0](out.hidden_states[-1])
    for b, s in ((0, 0), (0, 7), (1, 11)):
        p, h = predicted[b, s].numpy(), target[b, s].numpy()
        cosine = p @ h / (np.linalg.norm(p) * np.linalg.norm(h))
        assert losses[0, b, s].item() == pytest.approx(np.abs(p - h).mean() + math.log(1 + math.exp(-cosine)), rel=1e-4)
    assert torch.equal(covered > 0, torch.arange(covered.shape[1]) < out.frames[:, None])
    _, _, covered = distiller(waveforms, lengths, [target], 1.9)  # a tail that fires no token is not covered
    assert 0.5 < covered[0, : out.frames[0]].mean() <= 1 + 1e-6 and not covered[1, out.frames[1]:].any()


def test_lam_is_drawn_as_asked():
    args = SimpleNamespace(seed=1, lam=None, lam_max=1.5, lam_distribution="uniform")
    drawn = [draw_lam(args, step, 0.22) for step in range(2000)]
    assert 0 <= min(drawn) < 0.01 and 1.49 < max(drawn) <= 1.5 and np.mean(drawn) == pytest.approx(0.75, abs=0.03)
    assert drawn[:3] == [draw_lam(args, step, 0.22) for step in range(3)] != [draw_lam(args, step + 1, 0.22) for step in range(3)]
    args.lam_distribution = "uniform-period"
    periods = [period_from_lam(draw_lam(args, step, 0.22), 0.22) for step in range(2000)]
    assert np.mean(periods) == pytest.approx((20 + period_from_lam(1.5, 0.22)) / 2, rel=0.03)
    args.lam = 0.4
    assert draw_lam(args, 5, 0.22) == 0.4


@torch.no_grad()
def test_flops_are_those_of_the_formula():
    encoder = OFAEncoder(PRESETS["tiny"]).eval()
    c, T = encoder.config, 99  # two seconds
    layer = 2 * T * (4 * c.dim**2 + 2 * c.dim * c.ff) + 4 * T**2 * c.dim
    positions = 2 * (T + 1) * c.dim * c.dim // 16 * c.pos_kernel
    assert transformer_gflops(encoder, [torch.randn(32_000)] * 2, 0.0) == pytest.approx((c.layers * layer + positions) / 2e9, rel=0.01)


def test_non_finite_loss_stops_with_its_cause(run, monkeypatch):
    real = pretrain.load_teacher
    def poisoned(*a):
        teacher = real(*a)
        forward = teacher.forward
        teacher.forward = lambda *b: [t * (math.nan if counter.append(0) or len(counter) > 10 else 1) for t in forward(*b)]
        return teacher
    counter = []  # calls: two steps, held-out evaluation at three λ, two steps, three λ again; then step 4
    run("--out", "warm", "--steps", "1")  # finds the boundaries
    monkeypatch.setattr(pretrain, "load_teacher", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 4, λ = .*utterances \['.*\.wav'.*last good checkpoint"):
        run("--out", "bad", "--save-every", "2")
    content = load_checkpoint("bad/checkpoint.pt")
    assert content["step"] == 4 and all(v.isfinite().all() for v in content["encoder"].values())
