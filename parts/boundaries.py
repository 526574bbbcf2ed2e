"""Phone-like segments without labels: where α should fire.

The teacher's frames x_1 … x_S are cut into segments in which they hardly change. Each segment is
stood for by the mean of its frames, and costs a price γ besides:

    minimise over the cuts   Σ_segments (Σ_(s in segment) |x_s - mean of the segment|² + γ)

The cheapest cuts into segments of at most a second are found exactly, by dynamic programming. γ is
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
models", ICASSP 2023. Segments: Bellman, "On the approximation of curves by line segments using
dynamic programming", CACM 1961; with a price on each cut as in Kamper and van Niekerk, "Towards
unsupervised phone and word segmentation using self-supervised vector-quantized neural networks",
Interspeech 2021, but without a codebook.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from cif import widest_float
from ofa_encoder import FRAME_MS, frames_of
from parts.data import Speech, identity, loader, pack
from parts.runs import atomic_write
from parts.targets import targets_of

SEGMENT_MS = 90.0  # how long the mean segment lasts, if nothing else is asked for
BATCH_SECONDS = 300  # of utterances that are segmented together, once padded
LONGEST = 50  # frames in a segment: a second
SAMPLE = 400  # utterances from which γ is found
HALVINGS = 14  # of the interval in which γ lies, to 1/16,384 of it


# 1. Finding segments.


@torch.no_grad()
def segment(speech: Speech, teacher, path: Path, period_ms=SEGMENT_MS, device="cpu"):
    """Write the file of boundaries of every utterance of speech, from the teacher's last layer.

    Of each of its vectors the first teacher.boundary_dims numbers count (None: all). teacher may be
    its kept targets (targets.py).
    period_ms: how long the mean segment lasts. device: where the teacher is.
    """
    # Utterances of similar length share a batch. γ is found in a sample of them.
    order = np.argsort([u.samples for u in speech.utterances], kind="stable")
    some = order[:: max(1, len(order) // SAMPLE)]
    sample = list(_spreads(speech, teacher, some, device))
    gamma = _find_gamma(sample, period_ms)

    # Then all utterances are segmented.
    ends_of = {}
    bar = tqdm(desc="pseudo-boundaries", unit=" utterances", total=len(order))
    for indices, spread, frames in _spreads(speech, teacher, order, device):
        for i, ends in zip(indices, cheapest_cuts(spread, frames, gamma)):
            ends_of[i] = ends
        bar.update(len(indices))
    bar.close()

    with atomic_write(path) as file:
        for i, u in enumerate(speech.utterances):
            # One that could not be read still needs a line. It is a single segment here; training
            # won't be able to read it either.
            ends = ends_of.get(i, [frames_of(u.samples)])
            times = " ".join(f"{end * FRAME_MS / 1000:.2f}" for end in ends)
            file.write(f"{u.id}\t{times}\n".encode())


def _spreads(speech, teacher, order, device):
    """For each batch of the utterances in order: those that could be read, the spreads of their
    possible segments (B, S, LONGEST), and their numbers of frames (B,)."""
    samples = [u.samples for u in speech.utterances]
    plan = pack(order, samples, BATCH_SECONDS)
    for indices, waveforms, lengths in loader(speech, plan):
        waveforms, lengths = waveforms.to(device), lengths.to(device)
        x = targets_of(teacher, speech, indices, waveforms, lengths)[-1]  # (B, S, D)
        frames = torch.tensor([frames_of(n) for n in lengths.tolist()], device=device)
        yield indices, spreads(x[:, :, : teacher.boundary_dims], LONGEST), frames


def spreads(x: Tensor, longest: int) -> Tensor:
    """What each possible segment costs without γ: x (B, S, D) -> (B, S, longest).

    At [b, s, n - 1] is Σ |x - mean|² over the n frames that end with frame s, which is
    Σ |x|² - |Σ x|² / n; infinite if n frames would begin before the first.

    The second term is the sum of the products x_i · x_j of all pairs in the segment: a square on
    the diagonal of the matrix of all products. A summed-area table (Crow, SIGGRAPH 1984) gives the
    sum of any square from four corners, at a cost that hardly depends on D.
    """
    x = x.to(widest_float(x.device))  # differences of long sums
    x = x - x.mean(1, keepdim=True)  # no spread changes, and the sums stay small
    products = x @ x.transpose(1, 2)  # (B, S, S)
    table = pad(products.cumsum(1).cumsum(2), (1, 0, 1, 0))  # (B, S + 1, S + 1), from 0 on
    diagonal = table.diagonal(0, 1, 2)  # (B, S + 1)
    squares = pad(x.square().sum(2).cumsum(1), (1, 0))  # (B, S + 1)
    B, S, _ = x.shape
    result = torch.full((B, S, longest), torch.inf, device=x.device)
    for n in range(1, min(S, longest) + 1):
        # The table is symmetric, so two of the corners are alike.
        total = diagonal[:, n:] + diagonal[:, :-n] - 2 * table.diagonal(n, 1, 2)  # (B, S - n + 1)
        spread = squares[:, n:] - squares[:, :-n] - total / n
        result[:, n - 1 :, n - 1] = spread.float()
    return result


def cheapest_cuts(spread: Tensor, frames: Tensor, gamma: float) -> list[np.ndarray]:
    """The cheapest cuts of each utterance: the ends of its segments, in frames.

    spread (B, S, longest): as `spreads` returns it; frames (B,): how many are not padding.

    Let cost_s be the price of the cheapest cuts of frames 1 … s. Their last segment has n frames,
    and what is before it is cut as cheaply as can be:

        cost_s = min over n of  cost_(s-n) + spread of n frames that end with s + γ
    """
    B, S, longest = spread.shape
    # Forwards. Before the first frame nothing has been paid; the row is filled up on the left so
    # that every frame has `longest` places before it.
    cost = torch.full((B, longest + S), torch.inf, device=spread.device)
    cost[:, longest - 1] = 0
    length = torch.zeros(B, S, dtype=torch.int64, device=spread.device)  # of the last segment
    for s in range(S):
        before = cost[:, s : s + longest].flip(1)  # (B, longest): for n = 1, 2, …
        price, best = (before + spread[:, s]).min(1)  # (B,)
        cost[:, longest + s] = price + gamma
        length[:, s] = best + 1

    # Backwards from each utterance's last frame, segment by segment. What is behind it, padding
    # included, has not touched its cost.
    result = []
    for row, end in zip(length.cpu().numpy(), frames.tolist()):
        ends = []
        while end > 0:
            ends.append(end)
            end -= row[end - 1]
        result.append(np.array(ends[::-1]))
    return result


def _find_gamma(sample, period_ms: float) -> float:
    """The price γ at which the mean segment lasts period_ms. sample: batches of `_spreads`."""
    total_frames = sum(int(frames.sum()) for _, _, frames in sample)
    # The dearer a segment, the fewer there are, so the mean length never falls as γ rises. Each
    # round tries the middle of the interval and keeps the half in which the right γ lies. At its
    # upper end, a cut would have to save more than whole seconds of speech differ from their mean.
    low = 0.0
    high = max(float(spread[spread.isfinite()].max()) for _, spread, _ in sample)
    for _ in range(HALVINGS):
        gamma = (low + high) / 2
        segments = 0
        for _, spread, frames in sample:
            segments += sum(len(ends) for ends in cheapest_cuts(spread, frames, gamma))
        if FRAME_MS * total_frames / segments < period_ms:
            low = gamma
        else:
            high = gamma
    return gamma


# 2. Keeping them.


def cache_path(speech: Speech, teacher: str, period_ms: float, root) -> Path:
    """Where the result of `segment` is kept under root.

    teacher: its fingerprint (teachers.py). Another corpus, teacher, period or way of finding the
    segments has another name.
    """
    key = json.dumps([identity(speech), teacher, period_ms, "piecewise constant"])
    return Path(root) / f"boundaries-{hashlib.sha1(key.encode()).hexdigest()[:12]}.tsv"


def found_boundaries(
    speech: Speech, teacher, teacher_id: str, period_ms: float, root, device="cpu"
) -> list[np.ndarray]:
    """What `segment` finds, as `read_boundaries` returns it; kept under root, and found only once.

    teacher, period_ms, device: as of `segment`; teacher_id: its fingerprint.
    """
    path = cache_path(speech, teacher_id, period_ms, root)
    if not path.exists():
        segment(speech, teacher, path, period_ms, device)
    return read_boundaries(path, speech)


def read_boundaries(path, speech: Speech) -> list[np.ndarray]:
    """The ends of every utterance's segments, in frames; the last one is its last frame.

    Raises ValueError that names a bad line, or an utterance that the file lacks, or says that the
    times can't be seconds.
    """
    ends_of = _read_ends(path)
    missing = [u.id for u in speech.utterances if u.id not in ends_of]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(speech)} utterances, among them {missing[0]}"
        )
    result = []
    times = 0
    past_the_end = 0
    for u in speech.utterances:
        # Times from elsewhere may repeat, or lie past the last frame; and the last segment ends
        # with the utterance, whether the file says so or not.
        last = frames_of(u.samples)
        ends = ends_of[u.id]
        times += len(ends)
        past_the_end += np.count_nonzero(ends > last)
        inside = ends[(ends > 0) & (ends < last)]
        result.append(np.unique(np.append(inside, np.int32(last))))  # sorted
    if past_the_end > times / 2:
        raise ValueError(
            f"{path}: {past_the_end} of {times} times lie past the end of their utterance; "
            "are they in seconds?"
        )
    frames = sum(int(ends[-1]) for ends in result)
    mean_ms = FRAME_MS * frames / sum(len(ends) for ends in result)
    if mean_ms > 2000:
        raise ValueError(
            f"{path}: segments last {mean_ms:.0f} ms on average; are its times in seconds?"
        )
    return result


def _read_ends(path) -> dict[str, np.ndarray]:
    """The times in a file of boundaries, by id and rounded to frames, as they stand there."""
    ends_of = {}
    number = 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                number += 1
                id, _, times = line.rstrip("\n").partition("\t")
                seconds = np.array([float(time) for time in times.split()])
                usable = len(seconds) > 0 and np.isfinite(seconds).all() and seconds.min() >= 0
                if id and (not usable or id in ends_of):  # without an id: an empty line
                    raise ValueError
                frames = np.round(seconds * 1000 / FRAME_MS)
                ends_of[id] = frames.clip(max=2**30).astype(np.int32)  # what is past is past
        except UnicodeDecodeError:
            raise ValueError(f"{path}, after line {number}: not UTF-8") from None
        except ValueError:
            raise ValueError(
                f"{path}, line {number} ({id}): expected an id that no line before it has, a tab, "
                "and times >= 0 in seconds, separated by spaces"
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
