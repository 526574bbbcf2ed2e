"""Phone-like segments without labels: where α should fire.

Teacher frames x_1 .. x_S are quantised by k-means, and the path z_1 .. z_S through the codes is smoothed by a price γ on
every change of code (Viterbi):

    minimise over z   Σ_(s >= 1) |x_s - code(z_s)|² + γ Σ_(s >= 2) [z_s ≠ z_(s-1)]

A segment is a run of one code. γ is bisected until the mean segment lasts as long as a phone, ~90 ms. Inside a segment of
n frames the pseudo-α is 1/n, so that α adds up to one in every segment.

Source: Chen, Meng and Lee, ICASSP 2023 (guidance); duration-penalised segmentation: Kamper and van Niekerk,
"Towards unsupervised phone and word segmentation using self-supervised vector-quantized neural networks", Interspeech 2021.

A file of boundaries has a line an utterance: its id, a tab, and the ends of its segments in seconds, separated by spaces.
A recording that data.py cuts into pieces has a line a piece, with ids NAME#0, NAME#1, … and times from the piece's start.
`segment` writes such a file, and pretrain.py --boundaries reads one from anywhere (forced alignments, say).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ofa_encoder import FRAME_MS, frames_of
from parts.data import Speech, loader
from parts.runs import atomic_write


def kmeans(x: Tensor, k: int, rounds=20, seed=0) -> Tensor:
    """Lloyd's algorithm on x (N, D): codes (k, D)."""
    codes = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(x, codes).argmin(1)  # (N,)
        sums = torch.zeros_like(codes).index_add_(0, nearest, x)
        counts = nearest.bincount(minlength=len(codes))[:, None]
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    return codes


def cheapest_path(distances: Tensor, frames: Tensor, gamma: float) -> list[np.ndarray]:
    """The cheapest path through distances (B, S, K) at price gamma a change: the ends of its segments, in frames."""
    B, S, K = distances.shape
    padding = torch.arange(S, device=distances.device) >= frames[:, None]
    cost = distances[:, 0]  # (B, K) of the best path that ends in each code
    stays, origins = [], []
    for s in range(1, S):
        cheapest, origin = cost.min(1)  # (B,)
        stay = cost <= cheapest[:, None] + gamma  # (B, K)
        cost = torch.where(stay, cost, cheapest[:, None] + gamma) + distances[:, s].masked_fill(
            padding[:, s, None], 0
        )
        stays.append(stay)
        origins.append(origin)
    code = cost.argmin(1)  # (B,) then backwards:
    starts = torch.zeros(B, S, dtype=torch.bool, device=distances.device)
    for s in range(S - 1, 0, -1):
        change = ~stays[s - 1].gather(1, code[:, None])[:, 0]
        starts[:, s] = change
        code = torch.where(change, origins[s - 1], code)
    return [
        np.append(row[:n].nonzero()[0], n) for row, n in zip(starts.cpu().numpy(), frames.tolist())
    ]


@torch.no_grad()
def segment(speech: Speech, teacher, path: Path, period_ms=90.0, clusters=100, device="cpu"):
    """Write the file of boundaries of every utterance of speech, by the teacher's last layer."""

    def features(order, size):
        """For batches of so many: indices, teacher frames (B, S, D), and their number (B,)."""
        for indices, waveforms, lengths in loader(
            speech, [order[k : k + size].tolist() for k in range(0, len(order), size)]
        ):
            x = teacher(waveforms.to(device), lengths.to(device))[-1].float()
            yield indices, x, torch.tensor([frames_of(n) for n in lengths.tolist()], device=device)

    chosen = np.random.default_rng(0).permutation(len(speech))[:400]
    sample = [(x, lengths) for _, x, lengths in features(chosen, 16)]
    frames = torch.cat([x[b, :n] for x, lengths in sample for b, n in enumerate(lengths)])
    codes = kmeans(frames, min(clusters, len(frames)))
    distances = [(torch.cdist(x, codes).square(), lengths) for x, lengths in sample]

    low, high = 0.0, 20.0 * float(torch.cdist(frames[:1000], codes).min(1).values.square().mean())
    for _ in range(14):
        gamma = (low + high) / 2
        segments = sum(
            len(ends) for d, lengths in distances for ends in cheapest_path(d, lengths, gamma)
        )
        low, high = (gamma, high) if FRAME_MS * len(frames) / segments < period_ms else (low, gamma)

    by_length = np.argsort([u.samples for u in speech.utterances])
    found = {}
    for indices, x, lengths in tqdm(
        features(by_length, 64),
        desc="pseudo-boundaries",
        unit=" batches",
        total=-(-len(speech) // 64),
    ):
        found |= dict(zip(indices, cheapest_path(torch.cdist(x, codes).square(), lengths, gamma)))
    with atomic_write(path) as file:
        for i, u in enumerate(
            speech.utterances
        ):  # one that can't be read is one segment, and never used
            ends = found.get(i, [frames_of(u.samples)])
            file.write(
                f"{u.id}\t{' '.join(f'{end * FRAME_MS / 1000:.2f}' for end in ends)}\n".encode()
            )


def cache_path(speech: Speech, teacher: str, period_ms: float, root) -> Path:
    """Where segment's result is kept. teacher: its fingerprint (teachers.py). Another corpus, teacher
    or period has another name."""
    key = json.dumps([[(u.id, u.samples) for u in speech.utterances], teacher, period_ms])
    return Path(root) / f"boundaries-{hashlib.sha1(key.encode()).hexdigest()[:12]}.tsv"


def read_boundaries(path, speech: Speech) -> list[np.ndarray]:
    """The ends of every utterance's segments, in frames, the last one its last frame. Raises ValueError that names a bad line."""
    lines, number = {}, 0
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                id, _, times = line.rstrip("\n").partition("\t")
                seconds = np.array([float(t) for t in times.split()])
                if id and (not len(seconds) or not np.isfinite(seconds).all() or seconds.min() < 0):
                    raise ValueError
                lines[id] = np.round(seconds * 1000 / FRAME_MS).astype(np.int32)
        except UnicodeDecodeError:
            raise ValueError(f"{path}, after line {number}: not UTF-8") from None
        except ValueError:
            raise ValueError(
                f"{path}, line {number} ({id}): expected an id, a tab, and times >= 0 in seconds, separated by spaces"
            ) from None
    missing = [u.id for u in speech.utterances if u.id not in lines]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(speech)} utterances, among them {missing[0]}"
        )
    result = []
    for u in speech.utterances:
        frames = frames_of(u.samples)
        ends = lines[u.id]
        result.append(np.unique(np.append(ends[(ends > 0) & (ends < frames)], np.int32(frames))))
    return result


def pseudo_alpha(ends: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Segment ends of a batch -> pseudo-α (B, S), and the segment's number (B, S) at each segment's last frame, 0 elsewhere."""
    alpha = torch.zeros(len(ends), max((e[-1] for e in ends), default=1))
    number = torch.zeros_like(alpha)
    for b, e in enumerate(ends):
        lengths = np.diff(e, prepend=0)
        alpha[b, : e[-1]] = torch.from_numpy(np.repeat(1 / lengths, lengths))
        number[b, e - 1] = torch.arange(1.0, len(e) + 1)
    return alpha, number
