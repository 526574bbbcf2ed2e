"""What a downstream head hears of an utterance, computed once and kept; and what that costs.

    waveform ─ CNN ─ frames (S, C) ─ encoder at λ ─ hidden states (L + 1, T, D)
                     kept for every λ (FrameCache)      kept for every seed (HiddenStateCache)

The encoder is frozen, so neither changes while heads are trained, and the CNN, most of the cost, runs once for a whole sweep.
Where the encoder is trained too (UnfrozenEncoder), or the corpus is larger than the memory (--keep nothing), it runs at every batch.

Baselines hear something else: logmel (80 log-mel channels, a frame every 20 ms), random (the encoder with untrained
weights), deaf (one zero vector, whatever was said: what the head knows without hearing).

"""

import time

import torch
import torchaudio
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ofa_encoder import FRAME_MS, SAMPLE_RATE, frames_of, transformer_gflops
from parts.data import Speech, by_length, pad

FEATURES = ("encoder", "random", "logmel", "deaf")


class FrameCache:
    """What the CNN makes of each utterance, which λ does not change: frames(indices) gives x (B, S, C), zero past each length,
    and the number of frames (B,). Kept in half precision, or computed at every call (keep=False: the corpus exceeds the memory)."""

    def __init__(self, speech: Speech, encoder, device, keep=True):
        self.speech, self.encoder, self.device, self.x, started = (
            speech,
            encoder,
            device,
            None,
            time.time(),
        )
        kept = {}
        for indices in tqdm(
            by_length(speech) if keep else [], desc="frames", unit=" batches", leave=False
        ):
            for i, x, n in zip(indices, *self(indices)):
                kept[i] = x[:n].half().cpu()
        self.x, self.seconds = kept or None, time.time() - started

    @torch.no_grad()
    def __call__(self, indices):
        if self.x is None:
            return self.encoder.features(
                *(t.to(self.device) for t in pad([self.speech[i] for i in indices]))
            )
        rows = [self.x[i] for i in indices]
        return pad_sequence(rows, batch_first=True).to(self.device).float(), torch.tensor(
            [len(x) for x in rows], device=self.device
        )


class HiddenStateCache:
    """What the head hears of each utterance: heard(indices) gives hidden states (B, L + 1, T, D), zero past each length, and the
    number of tokens (B,); and what that costs. Kept like FrameCache; if not, the cost is measured on a sample."""

    def __init__(
        self, speech: Speech, features, encoder, lam, device, frames: FrameCache | None, keep=True
    ):
        self.speech, self.features, self.encoder, self.lam, self.device, self.frames = (
            speech,
            features,
            encoder,
            lam,
            device,
            frames,
        )
        self.states, self.tokens, n_frames, started, kept = None, 0, 0, time.time(), {}
        order = by_length(speech)
        for indices in tqdm(
            order if keep else order[:: max(1, len(order) // 13)],
            desc=f"{features} at λ = {lam:g}",
            unit=" batches",
            leave=False,
        ):
            states, tokens = self(indices)
            if keep:
                kept |= {i: x[:, :n].half().cpu() for i, x, n in zip(indices, states, tokens)}
            n_frames += sum(frames_of(speech.utterances[i].samples) for i in indices)
            self.tokens += tokens.sum().item()
        self.states, self.period_ms, self.seconds = (
            kept or None,
            FRAME_MS * n_frames / self.tokens,
            time.time() - started,
        )
        order = sum(order, [])
        few = [speech[i] for i in order[:: max(1, len(order) // 20)]]
        self.gflops = transformer_gflops(encoder, few, lam, device) if encoder else 0.0

    @torch.no_grad()
    def __call__(self, indices):
        if self.states is None and self.encoder:
            out = self.encoder.encode(*self.frames(indices), self.lam)
            return torch.stack(out.hidden_states, 1), out.lengths
        if self.states is not None:
            rows = [self.states[i].transpose(0, 1) for i in indices]  # (T, L + 1, D) each
        else:
            rows = [
                (log_mel(self.speech[i]) if self.features == "logmel" else torch.zeros(1, 8))[
                    :, None
                ]
                for i in indices
            ]
        hidden = pad_sequence(rows, batch_first=True).to(self.device).float().transpose(1, 2)
        return hidden, torch.tensor([len(row) for row in rows], device=self.device)


class TrainableSource(nn.Module):
    """As HiddenStateCache, but something in it is trained with the head. What finetune.train asks of it beyond hidden states:"""

    groups = ()  # its parameters, as groups for the optimiser
    cost = 0.0  # of the last batch, added to the head's loss
    keep_last = False  # keep the last epoch, instead of the one with the best validation score

    def watch(self) -> dict:
        """What to write into the history of each epoch."""
        return {}


class UnfrozenEncoder(TrainableSource):
    """The encoder is run anew, and trained, at every batch (--unfreeze)."""

    def __init__(self, speech: Speech, encoder, lam, device, lr):
        super().__init__()
        self.speech, self.encoder, self.lam, self.device = speech, encoder, lam, device
        self.groups = [{"params": encoder.parameters(), "lr": lr}]

    def forward(self, indices):
        waveforms, lengths = (t.to(self.device) for t in pad([self.speech[i] for i in indices]))
        out = self.encoder(waveforms, lengths, self.lam)
        return torch.stack(out.hidden_states, 1), out.lengths


def log_mel(waveform):
    """80 log-mel channels at the CNN's frames: (samples,) -> (S, 80)."""
    mel = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=320, n_mels=80, center=False
    )
    return (mel(waveform) + 1e-6).log().T
