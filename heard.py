"""What a downstream head hears of an utterance, computed once and kept; and what that costs.

    waveform ─ CNN ─ frames (S, C) ─ encoder at λ ─ hidden states (L + 1, T, D)
                     kept for every λ (Frames)      kept for every seed (Heard)

The encoder is frozen, so neither changes while heads are trained, and the CNN, most of the cost, runs once for a whole sweep.
Where the encoder is trained too, nothing can be kept (Live).

Baselines hear something else: logmel (80 log-mel channels, a frame every 20 ms), random (the encoder with untrained
weights), deaf (one zero vector, whatever was said: what the head knows without hearing).

`python heard.py` shows the shapes.
"""

import time

import torch
import torchaudio
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from boundaries import frames_of
from data import Speech, pad
from evaluate import transformer_gflops
from ofa_encoder import FRAME_MS, SAMPLE_RATE

FEATURES = ("encoder", "random", "logmel", "deaf")


class Frames:
    """What the CNN makes of each utterance, which λ does not change: x[i] (S, C) in half precision."""

    @torch.no_grad()
    def __init__(self, speech: Speech, encoder, device):
        self.x, self.device, started = [None] * len(speech), device, time.time()
        order = by_length(speech)
        for k in tqdm(range(0, len(order), 16), desc="frames", unit=" batches", leave=False):
            waveforms, lengths = (t.to(device) for t in pad([speech[i] for i in order[k : k + 16]]))
            for i, x, n in zip(order[k : k + 16], *encoder.features(waveforms, lengths)):
                self.x[i] = x[:n].half().cpu()
        self.seconds = time.time() - started

    def __call__(self, indices):
        """A batch: x (B, S, C), zero past each length, and frames (B,)."""
        rows = [self.x[i] for i in indices]
        return pad_sequence(rows, batch_first=True).to(self.device).float(), torch.tensor([len(x) for x in rows], device=self.device)


class Heard:
    """What the head hears of each utterance: states[i] (L + 1, T, D) in half precision, and what it cost."""

    @torch.no_grad()
    def __init__(self, speech: Speech, features, encoder, lam, device, frames: Frames | None):
        self.states, self.device, started = [None] * len(speech), device, time.time()
        order, n_frames = by_length(speech), 0
        for k in tqdm(range(0, len(order), 16), desc=f"{features} at λ = {lam:g}", unit=" batches", leave=False):
            indices = order[k : k + 16]
            if encoder:
                out = encoder.encode(*frames(indices), lam)
                states, tokens = torch.stack(out.hidden_states, 1), out.lengths.tolist()
            else:
                states = [log_mel(speech[i]) if features == "logmel" else torch.zeros(1, 8) for i in indices]
                states, tokens = pad_sequence(states, batch_first=True)[:, None], [len(x) for x in states]
            for i, x, n in zip(indices, states, tokens):
                self.states[i] = x[:, :n].half().cpu()
            n_frames += sum(frames_of(speech.utterances[i].samples) for i in indices)
        self.tokens = sum(x.shape[1] for x in self.states)
        self.period_ms, self.seconds = FRAME_MS * n_frames / self.tokens, time.time() - started
        few = [speech[i] for i in order[:: max(1, len(order) // 20)]]
        self.gflops = transformer_gflops(encoder, few, lam, device) if encoder else 0.0

    def __call__(self, indices):
        """A batch: hidden states (B, L + 1, T, D), zero past each length, and lengths (B,)."""
        rows = [self.states[i].transpose(0, 1) for i in indices]                           # (T, L + 1, D) each
        hidden = pad_sequence(rows, batch_first=True).to(self.device).float().transpose(1, 2)
        return hidden, torch.tensor([len(row) for row in rows], device=self.device)


class Live(nn.Module):
    """As Heard, but with the encoder run anew, and trained, at every batch (--unfreeze)."""

    def __init__(self, speech: Speech, encoder, lam, device):
        super().__init__()
        self.speech, self.encoder, self.lam, self.device = speech, encoder, lam, device

    def forward(self, indices):
        waveforms, lengths = (t.to(self.device) for t in pad([self.speech[i] for i in indices]))
        out = self.encoder(waveforms, lengths, self.lam)
        return torch.stack(out.hidden_states, 1), out.lengths


def by_length(speech: Speech) -> list[int]:
    return sorted(range(len(speech)), key=lambda i: speech.utterances[i].samples)


def log_mel(waveform):
    """80 log-mel channels at the CNN's frames: (samples,) -> (S, 80)."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=320, n_mels=80, center=False)
    return (mel(waveform) + 1e-6).log().T


if __name__ == "__main__":
    from data import load
    from ofa_encoder import PRESETS, OFAEncoder

    speech, encoder = load("asterisk").few(50), OFAEncoder(PRESETS["tiny"]).eval()
    frames = Frames(speech, encoder, "cpu")
    print(f"“{speech.utterances[0].text}”: frames {tuple(frames.x[0].shape)}")
    for features, lam in (("encoder", 0.0), ("encoder", 0.5), ("encoder", 1.0), ("logmel", 0.0), ("deaf", 0.0)):
        heard = Heard(speech, features, encoder if features == "encoder" else None, lam, "cpu", frames)
        print(f"{features:>7} at λ = {lam:g}: {tuple(heard.states[0].shape)}, {heard.period_ms:.1f} ms a token in all")
