"""extras/s3prl_expert.py inside s3prl's own classes, against a plain loop over overlaps in time."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from extras import s3prl_expert
from extras.s3prl_expert import UpstreamExpert, register
from ofa_encoder import ALPHAS, MIN_SAMPLES, PRESETS, OFAEncoder
from parts.data import pad
from parts.runs import save

register()
from s3prl import hub  # noqa: E402
from s3prl import nn as s3prl_nn  # noqa: E402
from s3prl.nn.upstream import UpstreamDownstreamModel  # noqa: E402
from s3prl.upstream import interfaces  # noqa: E402

REPO = Path(__file__).parent.parent
LAMS = (0.0, 0.7, 1.5)

# s3prl gives no upstream less than 800 samples, unless there is a longer one in the batch. The CNN
# makes one frame of 719 samples, where s3prl counts three.
LENGTHS = (16_000, 23_456, 800, 719, MIN_SAMPLES, 100)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """An untrained encoder for each way to α."""
    folder = tmp_path_factory.mktemp("encoders")
    for alpha in ALPHAS:
        torch.manual_seed(0)
        encoder = OFAEncoder(replace(PRESETS["tiny"], alpha=alpha))
        save(encoder.checkpoint(), folder / f"{alpha}.pt")
    return {alpha: str(folder / f"{alpha}.pt") for alpha in ALPHAS}


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints["regression"]


@pytest.fixture(scope="module")
def waveforms(asterisk):
    long = [i for i, u in enumerate(asterisk.utterances) if u.samples > max(LENGTHS)]
    return [asterisk[i][:n] for i, n in zip(long[::100], LENGTHS)]


def upstream_at(lam, checkpoint):
    return s3prl_nn.S3PRLUpstream("ofa", checkpoint, extra_conf={"lam": lam}).eval()


def by_overlap(hidden, times, frames):
    """hidden (T, D), and times at which the tokens fired, in frames -> (frames, D).

    Within a frame, α is spread evenly. So a frame is a mean of the tokens during it, weighted by
    how long each of them lasts there; the last one lasts for good.
    """
    begins = [0.0, *times[:-1]]
    ends = [*times[:-1], math.inf]
    rows = []
    for f in range(frames):
        overlaps = [max(0.0, min(f + 1, end) - max(f, begin)) for begin, end in zip(begins, ends)]
        rows.append(sum(overlap * token for overlap, token in zip(overlaps, hidden)))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("lam", LAMS)
def test_every_frame_that_s3prl_counts(checkpoints, waveforms, alpha, lam):
    """Utterances of several lengths in one batch: each as if it were alone."""
    checkpoint = checkpoints[alpha]
    upstream = upstream_at(lam, checkpoint)
    encoder = OFAEncoder.from_checkpoint(checkpoint)
    all_states, all_lengths = upstream(*pad(waveforms))
    assert len(all_states) == upstream.num_layers == 1 + PRESETS["tiny"].layers
    assert set(upstream.hidden_sizes) == {PRESETS["tiny"].dim}
    assert set(upstream.downsample_rates) == {320}
    assert len(waveforms) == len(LENGTHS)
    for b, waveform in enumerate(waveforms):
        filled = torch.nn.functional.pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform))))
        alone = encoder(filled[None], lam=lam)
        for states, lengths, hidden in zip(all_states, all_lengths, alone.hidden_states):
            assert lengths[b] == math.ceil(len(waveform) / 320)
            expected = by_overlap(hidden[0], alone.fired.fire_times[0].tolist(), lengths[b].item())
            torch.testing.assert_close(states[b, : lengths[b]], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_featurizers(checkpoint, waveforms):
    """That of s3prl.nn, and the older one that s3prl's runner uses."""
    upstream = upstream_at(0.7, checkpoint)
    states, lengths = upstream(*pad(waveforms))
    featurizer = s3prl_nn.Featurizer(upstream)
    mean, mean_lengths = featurizer(states, lengths)
    torch.testing.assert_close(mean, torch.stack(states).mean(0))  # its weights are equal at first
    assert mean_lengths.tolist() == lengths[0].tolist()

    older = interfaces.Featurizer(upstream.upstream, upstream_device="cpu")
    rows = older(waveforms, upstream.upstream(waveforms))
    assert [len(row) for row in rows] == [round(len(waveform) / 320) for waveform in waveforms]
    for row, expected in zip(rows, mean):
        torch.testing.assert_close(row, expected[: len(row)])


def test_a_head_of_s3prl_learns(checkpoint, asterisk):
    """MeanPoolingLinear on frozen features, from twenty prompts: in which of five languages?"""
    languages = sorted({u.language for u in asterisk.utterances})
    chosen = []
    for language in languages:
        short = [i for i, u in enumerate(asterisk.utterances) if u.samples <= 20_000]
        chosen += [i for i in short if asterisk.utterances[i].language == language][:4]
    waveforms, lengths = pad([asterisk[i] for i in chosen])
    labels = torch.tensor([languages.index(asterisk.utterances[i].language) for i in chosen])
    upstream = upstream_at(0.7, checkpoint)
    featurizer = s3prl_nn.Featurizer(upstream, normalize=True)
    torch.manual_seed(0)
    head = s3prl_nn.MeanPoolingLinear(featurizer.output_size, len(languages))
    optimizer = torch.optim.Adam([*featurizer.parameters(), *head.parameters()], lr=1e-2)
    with torch.no_grad():
        states = upstream(waveforms, lengths)
    for _ in range(60):
        loss = cross_entropy(head(*featurizer(*states)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert featurizer.weights.abs().max() > 0  # the mixture of layers is trained as well
    with torch.no_grad():
        scores = UpstreamDownstreamModel(upstream, featurizer, head)(waveforms, lengths)
    assert (scores.argmax(1) == labels).float().mean() > 0.8


def test_ways_to_say_lam(checkpoint, tmp_path):
    file = tmp_path / "lam.yaml"
    file.write_text("lam: 0.5\n")
    for config in (None, {"ms": 60}, "lam: 1", str(file)):
        assert UpstreamExpert(checkpoint, config, lam=0.25).lam == 0.25  # a keyword goes first
    assert UpstreamExpert(checkpoint).lam == 0
    assert UpstreamExpert(checkpoint, str(file)).lam == 0.5
    assert UpstreamExpert(checkpoint, "lam: 1").lam == 1
    expected = OFAEncoder.from_checkpoint(checkpoint).lam_for(60)
    for expert in (
        UpstreamExpert(checkpoint, {"ms": 60}),
        UpstreamExpert(checkpoint, "ms: 60"),
        hub.ofa(ckpt=checkpoint, model_config=None, refresh=False, ms=60),
    ):
        assert expert.lam == pytest.approx(expected)


@pytest.mark.parametrize(
    "config, words",
    [
        ("gone.yaml", "expected a YAML file"),
        (Path("gone.yaml"), "expected a YAML file"),
        ("gone" * 100, "expected a YAML file"),
        (5, "expected a YAML file"),
        ({"lam": True}, "expected a YAML file"),
        ("lam: half", "expected a YAML file"),
        ("rate: 2", "expected a YAML file"),
        ("lam: [", "expected a YAML file"),
        ("lam: 2", "expected 0 <= λ < 2"),
        ("ms: 10", "a frame period of 10 ms can't be had"),
        ({"lam": 0.5, "ms": 60}, "give one of them"),
    ],
)
def test_lam_that_cannot_be(checkpoint, config, words):
    with pytest.raises(ValueError, match=words):
        UpstreamExpert(checkpoint, config)


def test_an_encoder_of_one_rate_has_no_lam(tmp_path):
    peer = OFAEncoder(replace(PRESETS["tiny"], compression="average2"))
    save(peer.checkpoint(), tmp_path / "peer.pt")
    assert UpstreamExpert(str(tmp_path / "peer.pt")).lam == 0
    with pytest.raises(ValueError, match="peer.pt has one fixed rate .average2. and no λ"):
        UpstreamExpert(str(tmp_path / "peer.pt"), lam=0.5)


def test_without_a_checkpoint():
    with pytest.raises(ValueError, match="give its checkpoint"):
        UpstreamExpert()


RECIPE = """
runner: {total_steps: 2, gradient_clipping: 1, gradient_accumulate_steps: 1, log_step: 1,
         eval_step: 9, save_step: 2, max_keep: 1, eval_dataloaders: []}
optimizer: {name: AdamW, lr: 1.0e-3}
downstream_expert:
  datarc: {train_batch_size: 1, eval_batch_size: 1, num_workers: 0}
  modelrc: {input_dim: 16}
"""


def test_s3prls_runner(checkpoint, tmp_path):
    """The command in the docstring with s3prl's own example, which trains on noise."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    flags = ["-m", "train", "-p", str(tmp_path / "exp"), "-d", "example", "-c", str(recipe)]
    flags += ["-u", "ofa", "-k", checkpoint, "-g", "ms: 60", "--device", "cpu"]
    command = [sys.executable, "-m", "extras.s3prl_expert", *flags]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exp/states-2.ckpt").exists()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3prl", None)
    with pytest.raises(ValueError, match="s3prl is missing: pip install"):
        s3prl_expert.main()
