"""extras/slopes.py on the committed encoder, real speech, and heads that know nothing."""

import json
import sys

import numpy as np
import pytest
import torch

import finetune
from extras import slopes
from extras.slopes import KINDS, Utterance, slopes_over, slopes_table
from ofa_encoder import OFAEncoder
from parts.heads import HEADS
from parts.tasks import load_task

CHECKPOINT = "checkpoints/ofa-tiny.pt"
SIZES = {"layers": 3, "dim": 192, "symbols": 5, "told": True}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Of a saved head, six utterances and one short step."""
    monkeypatch.setattr(slopes, "UTTERANCES", 6)
    monkeypatch.setattr(slopes, "STEPS", [(0.1, 0.15)])


def make_utterance(asterisk, kind="pool", name="as they are", i=0):
    """About a second of speech, and an untrained head. name: of KINDS."""
    torch.manual_seed(i)
    encoder, tail = KINDS[name]
    encoder = encoder.from_checkpoint(CHECKPOINT).requires_grad_(False)
    head = HEADS[kind](**SIZES).eval().requires_grad_(False)
    order = sorted(range(len(asterisk)), key=lambda j: abs(asterisk.utterances[j].samples - 16_000))
    waveform = asterisk[order[i]]
    frames = encoder.features(waveform[None], torch.tensor([len(waveform)]))
    return Utterance(encoder, head, *frames, [1, 3], tail)


def count_tokens(utterance, lam):
    return utterance.loss(torch.tensor([lam]))[1].item()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("low, high", [(0.01, 0.3), (0.5, 0.9), (0.3, 0.301)])
def test_tokens_are_lost_where_it_says(asterisk, name, low, high):
    for i in range(3):
        utterance = make_utterance(asterisk, name=name, i=i)
        lost = utterance.where_tokens_are_lost(low, high)
        assert len(lost) == count_tokens(utterance, low) - count_tokens(utterance, high)
        assert ((lost > low) & (lost <= high)).all()
        for lam in lost.tolist():
            before = count_tokens(utterance, lam - slopes.BESIDE)
            assert count_tokens(utterance, lam + slopes.BESIDE) == before - 1


@pytest.mark.parametrize("kind", ["ctc", "pool"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_is_what_autograd_adds_up_to(asterisk, kind, name):
    """Against autograd's slopes at many λ, by trapezoids, from one lost token to the next."""
    low, high = 0.4, 0.45
    utterance = make_utterance(asterisk, kind, name)
    lost = utterance.where_tokens_are_lost(low, high).tolist()
    assert len(lost) >= 2
    seen = 0.0
    for start, end in zip([low, *lost], [*lost, high]):
        lams = np.linspace(start + slopes.BESIDE, end - slopes.BESIDE, 60)
        seen += np.trapezoid([utterance.autograd(float(lam)) for lam in lams], lams)
    change, jumps = utterance.change(low, high)
    assert change - jumps == pytest.approx(seen, abs=0.02 * abs(jumps) + 1e-4)
    assert abs(jumps) > 1e-4


@pytest.mark.parametrize("name", ["without a tail", "number held"])
def test_tokens_are_whole(asterisk, name):
    """Cut off, the tokens before the tail stay as they are; held, their number does."""
    for lam in (0.1, 0.5, 0.77):
        utterance = make_utterance(asterisk, name=name)
        fired = utterance.encoder.encode(utterance.frames, utterance.n, lam).fired
        n = fired.lengths.item()
        assert fired.alpha.sum().item() == pytest.approx(n, abs=1e-4)
        as_it_is = make_utterance(asterisk).encoder.encode(utterance.frames, utterance.n, lam).fired
        if name == "number held":
            assert as_it_is.lengths == n
        else:
            assert n == int(as_it_is.alpha.sum())
            torch.testing.assert_close(fired.tokens, as_it_is.tokens[:, :n])


def test_edges_slide_unless_the_number_is_held(asterisk):
    """From one λ to another between which no token is lost."""
    moved = {}
    for name in KINDS:
        utterance = make_utterance(asterisk, name=name)
        low = utterance.where_tokens_are_lost(0.4, 0.5)[0].item() + 0.002
        times = []
        for lam in (low, low + 0.005):
            fired = utterance.encoder.encode(utterance.frames, utterance.n, lam).fired
            times.append(fired.fire_times[0, :-1])
        moved[name] = (times[1] - times[0]).abs().mean().item()
    assert moved["as they are"] > 20 * moved["number held"]
    assert moved["without a tail"] > 20 * moved["number held"]


def test_slopes_over_utterances_by_hand(monkeypatch):
    """Two utterances whose losses change by 0.1 and 0.3 over a step of 0.2, of which 0.1 jumps."""

    class Made:
        def __init__(self, change, slope):
            self.slope = slope
            self.change = lambda low, high: (change, 0.1)

        def autograd(self, lam):
            assert lam == pytest.approx(0.4)
            return self.slope

    row = slopes_over([Made(0.1, 5.0), Made(0.3, -5.0)], 0.3, 0.5)
    assert row["loss"] == pytest.approx([1.0, 1.96 / 2])
    assert row["jumps"] == pytest.approx([0.5, 0])
    assert row["autograd"] == pytest.approx([0.5, 1.96 / 2])
    assert row["scatter"]["autograd"] == pytest.approx(50**0.5)
    assert row["scatter"]["difference"] == pytest.approx(0.5**0.5)
    line = slopes_table([{"tokens": "as they are", **row}]).splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["as they are", "0.3 to 0.5", "2"]
    assert cells[3:] == ["+1.00 ± 0.98", "+0.50 ± 0.98", "+0.50 ± 0.00", "7.1", "0.7"]


def save_head(path, kind, lam, checkpoint=CHECKPOINT):
    """A head for a task of the embedded corpus, as finetune.py saves it, untrained."""
    task = load_task(kind)
    args = finetune.build_parser().parse_args(["--task", kind])
    head = finetune.build_head(args, task, 3, 192, told=True)
    finetune.save_head(path, head, OFAEncoder.from_checkpoint(checkpoint), lam, task)


@pytest.mark.parametrize("kind", ["ctc", "seq2seq", "pool"])
def test_a_table_of_a_saved_head(kind, tmp_path, monkeypatch, capsys):
    save_head(tmp_path / "head.pt", kind, "any")
    out = tmp_path / "slopes.json"
    monkeypatch.setattr(sys, "argv", ["slopes.py", str(tmp_path / "head.pt"), str(out)])
    slopes.main()
    written = json.loads(out.read_text())
    assert [row["tokens"] for row in written["rows"]] == list(KINDS)
    assert all(4 <= row["utterances"] <= 6 for row in written["rows"])
    assert slopes_table(written["rows"]) in capsys.readouterr().out


def test_a_head_of_one_rate_is_refused(tmp_path):
    save_head(tmp_path / "head.pt", "pool", 0.5)
    with pytest.raises(ValueError, match="head.pt serves λ = 0.5 alone: train one by --lam any"):
        slopes.slopes(tmp_path / "head.pt")


def test_an_encoder_of_segments_is_refused(tmp_path):
    """Its lock moves edges by a factor of which autograd is not told."""
    save_head(tmp_path / "head.pt", "pool", "any", "checkpoints/segments-tiny.pt")
    with pytest.raises(ValueError, match="head.pt has an encoder of segments"):
        slopes.slopes(tmp_path / "head.pt")


def test_a_head_of_other_labels_is_refused(tmp_path):
    save_head(tmp_path / "head.pt", "pool", "any")
    content = torch.load(tmp_path / "head.pt", weights_only=True)
    content["symbols"][0] = "another"
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="head.pt answers in other symbols"):
        slopes.slopes(tmp_path / "head.pt")
