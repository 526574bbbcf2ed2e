"""Phone-like segments without labels: where α should fire.

Teacher frames x_1 … x_S are quantised by k-means. A path z_1 … z_S gives each frame a code, and it
is made smooth by a price γ on every change of code:

    minimise over z   Σ_(s >= 1) |x_s - code(z_s)|² + γ Σ_(s >= 2) [z_s ≠ z_(s-1)]

The cheapest path is found by Viterbi's search, and a segment is a run of one code in it. γ is
bisected until the mean segment lasts as long as a phone, ~90 ms. In a segment of n frames the
pseudo-α is 1/n, so it adds up to 1 over the segment:

    frames      1    2  |  3    4    5    6  |  7
    pseudo-α   1/2  1/2 | 1/4  1/4  1/4  1/4 |  1      (S,)
    its sum         1   |                2   |  3      after segment i it is i

Pre-training guides α by this, and always *before* λ changes it. One unit of mass a segment is what
λ then scales: at λ = 1 a token is a segment, whatever λ was drawn at the step. If α′ were guided
instead, it would be asked for one token a segment at every λ, and λ could not set the rate.

A file of boundaries has a line for each utterance: its id, a tab, and the ends of its segments in
seconds, separated by spaces. A recording that data.py cuts into pieces has a line for each piece,
with ids NAME#0, NAME#1, … and times from the start of the piece. `segment` writes such a file, and
pretrain.py --boundaries reads one from anywhere (forced alignments, say).

Sources: guidance: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech
models", ICASSP 2023. Segments: Kamper and van Niekerk, "Towards unsupervised phone and word
segmentation using self-supervised vector-quantized neural networks", Interspeech 2021.
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

CODES = 100  # of k-means
SAMPLE = 400  # utterances from which the codes and γ are found
HALVINGS = 14  # of the interval in which γ lies, to 1/16,384 of it


# 1. Finding segments.


@torch.no_grad()
def segment(speech: Speech, teacher, path: Path, period_ms=90.0, device="cpu"):
    """Write the file of boundaries of every utterance of speech, from the teacher's last layer.

    period_ms: how long the mean segment lasts. device: where the teacher is.
    """
    # The codes and γ are found in a sample.
    drawn = np.random.default_rng(0).permutation(len(speech))[:SAMPLE]
    plan = [drawn[k : k + 16].tolist() for k in range(0, len(drawn), 16)]
    sample = [(x, frames) for _, x, frames in _teacher_frames(speech, teacher, plan, device)]
    valid = []  # (S, D) of each utterance, without padding
    for x, frames in sample:
        valid += [row[:n] for row, n in zip(x, frames.tolist())]
    vectors = torch.cat(valid)  # (N, D)
    codes = kmeans(vectors, min(CODES, len(vectors)))
    distances = [(_distances(x, codes), frames) for x, frames in sample]
    # At 20 times a frame's mean distance from its code, segments are far longer than phones.
    mean_distance = _distances(vectors[:1000], codes).min(1).values.mean()
    gamma = _find_gamma(distances, 20 * float(mean_distance), period_ms)

    # Then all utterances are segmented, those of similar length together.
    order = np.argsort([u.samples for u in speech.utterances])
    plan = [order[k : k + 64].tolist() for k in range(0, len(order), 64)]
    arriving = _teacher_frames(speech, teacher, plan, device)
    ends_of = {}
    for indices, x, frames in tqdm(
        arriving, desc="pseudo-boundaries", unit=" batches", total=len(plan)
    ):
        found = cheapest_path(_distances(x, codes), frames, gamma)
        for i, ends in zip(indices, found):
            ends_of[i] = ends

    with atomic_write(path) as file:
        for i, u in enumerate(speech.utterances):
            # One that could not be read still needs a line. It is a single segment here; training
            # won't be able to read it either.
            ends = ends_of.get(i, [frames_of(u.samples)])
            times = " ".join(f"{end * FRAME_MS / 1000:.2f}" for end in ends)
            file.write(f"{u.id}\t{times}\n".encode())


def _teacher_frames(speech, teacher, plan, device):
    """For each list of indices in plan: those that could be read, the teacher's vectors
    (B, S, D), and how many of them are not padding (B,)."""
    for indices, waveforms, lengths in loader(speech, plan):
        x = teacher(waveforms.to(device), lengths.to(device))[-1].float()
        frames = torch.tensor([frames_of(n) for n in lengths.tolist()], device=device)
        yield indices, x, frames


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of x (…, D) from codes (K, D): (…, K)."""
    return torch.cdist(x, codes).square()


def kmeans(x: Tensor, k: int, rounds=20, seed=0) -> Tensor:
    """Lloyd's algorithm on x (N, D), from k of its rows: codes (k, D)."""
    codes = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(x, codes).argmin(1)  # (N,)
        sums = torch.zeros_like(codes).index_add_(0, nearest, x)  # (k, D)
        counts = nearest.bincount(minlength=len(codes))[:, None]  # (k, 1)
        # A code that is nearest to nothing stays where it is.
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    return codes


def _find_gamma(distances, highest: float, period_ms: float) -> float:
    """The price γ, between 0 and highest, at which the mean segment lasts period_ms.

    distances: of each batch, those from the codes (B, S, K) and the numbers of frames (B,).
    """
    total_frames = sum(int(frames.sum()) for _, frames in distances)
    low = 0.0
    high = highest
    # The dearer a change, the fewer the changes, so the mean length never falls as γ rises. Each
    # round tries the middle of the interval and keeps the half in which the right γ lies.
    for _ in range(HALVINGS):
        gamma = (low + high) / 2
        segments = 0
        for batch, frames in distances:
            segments += sum(len(ends) for ends in cheapest_path(batch, frames, gamma))
        if FRAME_MS * total_frames / segments < period_ms:
            low = gamma
        else:
            high = gamma
    return gamma


def cheapest_path(distances: Tensor, frames: Tensor, gamma: float) -> list[np.ndarray]:
    """The cheapest path of each utterance: the ends of its segments, in frames.

    distances (B, S, K): of each frame from each code. frames (B,): how many are not padding.

    Viterbi's search. Let cost_s(k) be the price of the cheapest path through frames 1 … s that ends
    in code k. That path was in k already, or it was in the cheapest code of all and changed:

        cost_s(k) = distance_s(k) + min(cost_(s-1)(k), min_j cost_(s-1)(j) + γ)
    """
    B, S, K = distances.shape
    padding = torch.arange(S, device=distances.device) >= frames[:, None]  # (B, S)
    # Forwards: the costs, and for each step which of the two terms was the smaller.
    cost = distances[:, 0]  # (B, K)
    stays = []  # (B, K) for each step: whether the path that ends in k was in k before
    origins = []  # (B,) for each step: the code from which a path that changes has come
    for s in range(1, S):
        # Through the padding every path goes on for nothing, so the cheapest one at the end of the
        # batch is the cheapest at the end of the utterance.
        distance = distances[:, s].masked_fill(padding[:, s, None], 0)  # (B, K)
        cheapest, origin = cost.min(1)  # (B,)
        change = cheapest[:, None] + gamma  # (B, 1)
        stay = cost <= change  # (B, K)
        cost = torch.where(stay, cost, change) + distance
        stays.append(stay)
        origins.append(origin)

    # Backwards from the cheapest end: a segment starts wherever the path changed.
    code = cost.argmin(1)  # (B,)
    starts = torch.zeros(B, S, dtype=torch.bool, device=distances.device)
    for s in range(S - 1, 0, -1):
        changed = ~stays[s - 1].gather(1, code[:, None])[:, 0]  # (B,)
        starts[:, s] = changed
        code = torch.where(changed, origins[s - 1], code)

    # Counted from 0, the start of a segment is the end of the one before. The last one ends with
    # the utterance.
    result = []
    for row, n in zip(starts.cpu().numpy(), frames.tolist()):
        result.append(np.append(row[:n].nonzero()[0], n))
    return result


# 2. Keeping them.


def cache_path(speech: Speech, teacher: str, period_ms: float, root) -> Path:
    """Where the result of `segment` is kept under root.

    teacher: its fingerprint (teachers.py). Another corpus, teacher or period has another name.
    """
    utterances = [(u.id, u.samples) for u in speech.utterances]
    key = json.dumps([utterances, teacher, period_ms])
    return Path(root) / f"boundaries-{hashlib.sha1(key.encode()).hexdigest()[:12]}.tsv"


def read_boundaries(path, speech: Speech) -> list[np.ndarray]:
    """The ends of every utterance's segments, in frames; the last one is its last frame.

    Raises ValueError that names a bad line, or an utterance that the file lacks.
    """
    ends_of = _read_ends(path)
    missing = [u.id for u in speech.utterances if u.id not in ends_of]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(speech)} utterances, among them {missing[0]}"
        )
    result = []
    for u in speech.utterances:
        # Times from elsewhere may repeat, or lie past the last frame; and the last segment ends
        # with the utterance, whether the file says so or not.
        last = frames_of(u.samples)
        ends = ends_of[u.id]
        inside = ends[(ends > 0) & (ends < last)]
        result.append(np.unique(np.append(inside, np.int32(last))))  # sorted
    return result


def _read_ends(path) -> dict[str, np.ndarray]:
    """The times in a file of boundaries, by id and rounded to frames, as they stand there."""
    ends_of = {}
    number = 0
    with open(path, encoding="utf-8") as file:
        try:
            for line in file:
                number += 1
                id, _, times = line.rstrip("\n").partition("\t")
                seconds = np.array([float(time) for time in times.split()])
                usable = len(seconds) > 0 and np.isfinite(seconds).all() and seconds.min() >= 0
                if id and not usable:  # without an id: an empty line
                    raise ValueError
                ends_of[id] = np.round(seconds * 1000 / FRAME_MS).astype(np.int32)
        except UnicodeDecodeError:
            raise ValueError(f"{path}, after line {number}: not UTF-8") from None
        except ValueError:
            raise ValueError(
                f"{path}, line {number} ({id}): expected an id, a tab, and times >= 0 in seconds, "
                "separated by spaces"
            ) from None
    return ends_of


# 3. Guidance.


def pseudo_alpha(ends: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pseudo-α and segment numbers of a batch, from the ends of its segments in frames.

    Returns pseudo-α (B, S), 0 in the padding; and (B, S), which at each segment's last frame is the
    number of that segment, counted from 1, and 0 at all other frames. The number is what pseudo-α
    adds up to there. No utterances give (0, 1).
    """
    S = max((int(e[-1]) for e in ends), default=1)
    alpha = torch.zeros(len(ends), S)
    segment_number = torch.zeros(len(ends), S)
    for b, e in enumerate(ends):
        lengths = np.diff(e, prepend=0)  # of the segments, in frames
        alpha[b, : e[-1]] = torch.from_numpy(np.repeat(1 / lengths, lengths))
        segment_number[b, e - 1] = torch.arange(1.0, len(e) + 1)
    return alpha, segment_number
