"""Hidden states for the heads: computed once and kept, since the encoder is frozen.

    waveform ─ CNN ─ frames (S, C) ─ encoder at λ ─ hidden states (L + 1, T, D)
                     FrameCache                     HiddenStateCache
                     one for every λ                one for every seed at that λ

Neither changes while heads are trained, and the CNN, most of the cost, does not depend on λ: it
runs once for a whole sweep. A corpus that exceeds the memory is encoded anew for every batch
(keep=False), and so is one whose encoder is trained with the head (UnfrozenEncoder).

Whatever gives a head its input is called with a list of utterances and returns

    states (B, L + 1, T, D)     the Transformer's input and the output of each of its L layers,
                                zero past the end of each utterance
    lengths (B,)                the number of tokens of each

Baselines replace the encoder (--features). `average` and `merge` are one without compression, whose
frames are merged as they are (parts/rivals.py). `random` has the encoder's shape and untrained
weights, `logmel` is 80 log-mel channels every 20 ms, and `deaf` is one zero vector, whatever the
recording: what the head knows without it.
"""

import time

import torch
import torchaudio
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ofa_encoder import FRAME_MS, SAMPLE_RATE, frames_of, transformer_gflops
from parts.boundaries import pseudo_alpha
from parts.data import Speech, by_length, pad
from parts.heads import tell
from parts.rivals import RIVALS

NO_ENCODER = ("logmel", "deaf")
FEATURES = ("encoder", *RIVALS, "random", *NO_ENCODER)


class FrameCache:
    """The CNN's frames of each utterance, which λ does not change.

    frames(indices) returns x (B, S, C), zero past each length, and the numbers of frames (B,).
    keep: keep them, in half precision; else they are computed at every call. ends: as of Task.
    """

    def __init__(self, speech: Speech, encoder, device, keep=True, ends=None):
        self.speech = speech
        self.encoder = encoder
        self.device = device
        self.ends = ends
        self.kept = {}  # utterance: its frames (S, C)
        started = time.time()
        order = by_length(speech) if keep else []
        for indices in tqdm(order, desc="frames", unit=" batches", leave=False):
            x, lengths = self.compute(indices)
            for i, row, n in zip(indices, x, lengths):
                self.kept[i] = row[:n].half().cpu()
        self.seconds = time.time() - started  # what computing them all took

    def __call__(self, indices):
        if not self.kept:
            return self.compute(indices)
        rows = [self.kept[i] for i in indices]
        x = pad_sequence(rows, batch_first=True).to(self.device).float()  # (B, S, C)
        return x, torch.tensor([len(row) for row in rows], device=self.device)

    def marks(self, indices):
        """For OFAEncoder.encode: the frames with which segments end, (B, S) bool, if known."""
        if self.ends is None:
            return None
        _, number = pseudo_alpha([self.ends[i] for i in indices])
        return number.to(self.device) > 0

    @torch.no_grad()
    def compute(self, indices):
        waveforms, lengths = pad([self.speech[i] for i in indices])
        return self.encoder.features(waveforms.to(self.device), lengths.to(self.device))


class HiddenStateCache:
    """The hidden states of each utterance at one λ, or a baseline's features; and what they cost.

    states(indices) returns what the head gets, see the top of this file. keep: as of FrameCache;
    without it the cost is measured on a sample of the utterances.

    features: one of FEATURES; encoder, frames: None for logmel and deaf. told: the hidden states
    carry the durations of tokens (heads.tell).
    """

    def __init__(
        self,
        speech: Speech,
        features,
        encoder,
        lam,
        device,
        frames: FrameCache | None,
        keep=True,
        told=False,
    ):
        self.speech = speech
        self.features = features
        self.encoder = encoder
        self.lam = lam
        self.device = device
        self.frames = frames
        self.told = told
        self.kept = {}  # utterance: its hidden states (L + 1, T, D)
        self.tokens = 0  # of all utterances, or of the sample

        started = time.time()
        n_frames = 0
        order = by_length(speech)
        used = order if keep else order[:: max(1, len(order) // 13)]
        name = f"{features} at λ = {lam:g}"
        for indices in tqdm(used, desc=name, unit=" batches", leave=False):
            states, lengths = self.compute(indices)
            if keep:
                for i, row, n in zip(indices, states, lengths):
                    self.kept[i] = row[:, :n].half().cpu()
            n_frames += sum(frames_of(speech.utterances[i].samples) for i in indices)
            self.tokens += lengths.sum().item()
        self.seconds = time.time() - started
        self.period_ms = FRAME_MS * n_frames / self.tokens

        # The work is counted on some twenty utterances, each encoded alone.
        self.gflops = 0.0
        if encoder:
            flat = [i for indices in order for i in indices]
            some = flat[:: max(1, len(flat) // 20)]
            waveforms = [speech[i] for i in some]
            ends = [frames.marks([i]) for i in some]
            self.gflops = transformer_gflops(encoder, waveforms, lam, device, ends)

    def __call__(self, indices):
        if not self.kept:
            return self.compute(indices)
        return self.stack([self.kept[i] for i in indices])

    @torch.no_grad()
    def compute(self, indices):
        if self.encoder:
            x, frames = self.frames(indices)
            out = self.encoder.encode(x, frames, self.lam, self.frames.marks(indices))
            states = torch.stack(out.hidden_states, 1)  # (B, L + 1, T, D)
            if self.told:
                states = tell(states, out.durations())
            return states, out.lengths
        if self.features == "logmel":
            return self.stack([log_mel_frames(self.speech[i])[None] for i in indices])
        return self.stack([torch.zeros(1, 1, 8) for _ in indices])

    def stack(self, rows):
        """Hidden states (L + 1, T, D) of each utterance, to the padded batch and its lengths."""
        by_time = [row.transpose(0, 1) for row in rows]  # (T, L + 1, D)
        states = pad_sequence(by_time, batch_first=True).to(self.device).float()
        lengths = torch.tensor([len(row) for row in by_time], device=self.device)
        return states.transpose(1, 2), lengths  # (B, L + 1, T, D)


class TrainableSource(nn.Module):
    """Hidden states, like HiddenStateCache, from something that is trained with the head.

    What finetune.train asks of it, besides the hidden states:
    """

    groups = ()  # its parameters, as groups for the optimiser
    cost = 0.0  # of the last batch: added to the head's loss
    told = False  # the hidden states do not carry the durations of tokens

    def begin(self, lesson):
        """Before the first step: lesson is finetune's, with the head and the targets."""

    def watch(self) -> dict:
        """What to write into the history of each epoch."""
        return {}


class UnfrozenEncoder(TrainableSource):
    """The encoder, which runs at every batch and is trained with the head (--unfreeze)."""

    def __init__(self, speech: Speech, encoder, lam, device, lr):
        super().__init__()
        self.speech = speech
        self.encoder = encoder
        self.lam = lam
        self.device = device
        self.groups = [{"params": encoder.parameters(), "lr": lr}]

    def forward(self, indices):
        waveforms, lengths = pad([self.speech[i] for i in indices])
        out = self.encoder(waveforms.to(self.device), lengths.to(self.device), self.lam)
        return torch.stack(out.hidden_states, 1), out.lengths


def log_mel_frames(waveform):
    """80 log-mel channels at the CNN's frames: (samples,) -> (S, 80)."""
    mel = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=320, n_mels=80, center=False
    )
    return (mel(waveform) + 1e-6).log().T
