"""What the best device of this machine computes, beside what its CPU does: `--device auto` takes a
GPU where there is one. finetune.py and adaptive_lambda.py run on it in their own tests."""

import json
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from cif import cif, expand
from ofa_encoder import OFAEncoder, load_checkpoint
from parts.data import load, pad
from parts.runs import pick_device

REPO = Path(__file__).parent.parent
DEVICE = pick_device("auto")


def random_frames(B, S):
    """x (B, S, 8), alpha (B, S), lengths (B,) on the CPU. A fifth of α is 0."""
    generator = torch.Generator().manual_seed(B * S)
    x = torch.randn(B, S, 8, generator=generator)
    alpha = torch.rand(B, S, generator=generator) * 1.2
    alpha = alpha * (torch.rand(B, S, generator=generator) > 0.2)
    return x, alpha, torch.randint(1, S + 1, (B,), generator=generator)


def everything(x, alpha, lengths, **keywords):
    """What cif and expand return, and both gradients: computed where x is, and as x is; then moved
    to the CPU as float64."""
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    fired = cif(x, alpha, lengths, **keywords)
    back = expand(fired.tokens, fired)
    (fired.tokens.square().sum() + back.square().sum()).backward()
    results = (fired.tokens, fired.fire_times, back, x.grad, alpha.grad)
    return fired.lengths.tolist(), [result.detach().cpu().double() for result in results]


@pytest.mark.parametrize("tail_threshold", [None, 0.0, 0.5])
@pytest.mark.parametrize("B, S", [(1, 9), (3, 50), (2, 1000)])
def test_cif_in_float32_is_cif_in_float64_on_the_cpu(B, S, tail_threshold):
    x, alpha, lengths = random_frames(B, S)
    expected = everything(x.double(), alpha.double(), lengths, tail_threshold=tail_threshold)
    found = everything(
        x.to(DEVICE), alpha.to(DEVICE), lengths.to(DEVICE), tail_threshold=tail_threshold
    )
    assert found[0] == expected[0]
    for ours, exact in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cif_under_autocast(dtype):
    x, alpha, lengths = (value.to(DEVICE) for value in random_frames(3, 50))
    project = torch.nn.Linear(8, 8, device=DEVICE)
    exact = cif(project(x), alpha, lengths).tokens
    with torch.autocast(DEVICE.type, dtype):
        fired = cif(project(x), alpha, lengths)
        back = expand(fired.tokens, fired)
    assert fired.tokens.dtype == back.dtype == dtype
    torch.testing.assert_close(fired.tokens.float(), exact, rtol=0, atol=0.05)
    back.float().sum().backward()
    assert project.weight.grad.isfinite().all() and project.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["ofa-tiny", "segments-tiny"])
def test_the_encoder_on_real_speech(asterisk, name):
    """Convolutions in tf32, as CUDA does them, move α by a thousandth: a token may come or go."""
    waveforms, lengths = pad([asterisk[i] for i in (0, 200, 400)])
    on_cpu = OFAEncoder.from_checkpoint(REPO / f"checkpoints/{name}.pt")
    on_device = OFAEncoder.from_checkpoint(REPO / f"checkpoints/{name}.pt").to(DEVICE)
    for lam in (0.0, 0.7, 1.0, 1.5):
        exact = on_cpu(waveforms, lengths, lam)
        found = on_device(waveforms.to(DEVICE), lengths.to(DEVICE), lam)
        assert (found.lengths.cpu() - exact.lengths).abs().max() <= 1
        torch.testing.assert_close(found.alpha.cpu(), exact.alpha, rtol=0, atol=0.05)
        if lam == 0:
            away = found.hidden_states[-1].cpu() - exact.hidden_states[-1]
            assert away.norm() < 0.02 * exact.hidden_states[-1].norm()


@pytest.mark.parametrize("kind", ["regression", "segments"])
def test_pretraining_stops_and_goes_on(folder, tmp_path, tmp_path_factory, monkeypatch, kind):
    """Under bf16 on CUDA. The encoder that it leaves is for any machine."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path_factory.getbasetemp() / "root-of-devices"  # boundaries are found once
    flags = ["--data", str(folder), "--root", str(root), "--batch-seconds", "8", "--steps", "60"]
    flags += ["--warmup", "10", "--save-every", "30", "--alpha", kind, "--out", "out"]
    save = pretrain.save

    def stop_after_saving(content, path):
        save(content, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "save", stop_after_saving)
        pretrain.main()
    assert load_checkpoint("out/checkpoint.pt")["step"] == 30
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags, "--resume"])
    pretrain.main()  # raises if the encoder has learned nothing
    assert load_checkpoint("out/checkpoint.pt")["step"] == 60
    table = json.loads(Path("out/table.json").read_text())
    assert f", {DEVICE}, torch" in table["machine"]
    encoder = OFAEncoder.from_checkpoint("out/encoder.pt")
    waveform = load(str(folder))[0][None]
    assert encoder(waveform, lam=encoder.lam_for(60)).hidden_states[-1].isfinite().all()
