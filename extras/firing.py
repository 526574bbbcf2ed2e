"""Do tokens fire where phones change? Fire times against segment boundaries, beside equal spacing.

A fire time and a boundary agree if they lie within the tolerance, 20 ms; each is used once. The
ends of utterances do not count.

    precision = agreeing / fire times
    recall    = agreeing / boundaries
    F1        = 2 · agreeing / (fire times + boundaries)

    R-value   = 1 - (|r₁| + |r₂|) / 2
    r₁ = √((1 - recall)² + OS²),   r₂ = (recall - 1 - OS) / √2,   OS = fire times / boundaries - 1

Firing often raises recall by chance. The R-value charges for it: OS is the share of fire times
that are too many. It is 1 for perfect agreement, and below 0 for far too many fire times.

The rows "equal spacing" fire equally often in each utterance, but at equal distances: what they
lack is the knowledge of *where*. At 33 ms and ± 20 ms nearly every boundary is met by both, so look
at λ = 1 and around it. The boundaries are found in held-out speech as those that taught α were
found in training speech (parts/boundaries.py): they are changes in the teacher's frames, not marks
of a phonetician.

Source of the R-value: Räsänen, Laine and Altosaar, "An improved speech segmentation quality
measure: the R-value", Interspeech 2009.

    python -m extras.firing checkpoints/ofa-tiny.pt results/firing/ofa.json
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import json
import sys

import numpy as np
import torch

from ofa_encoder import FRAME_MS, OFAEncoder
from parts.boundaries import SEGMENT_MS, found_boundaries
from parts.data import by_length, load, loader
from parts.runs import save_text
from parts.teachers import fingerprint, load_teacher

TOLERANCE_MS = 20
FIRING_LAMS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0, 1.01, 1.1, 1.5)


def agreeing(fires, ends, tolerance) -> int:
    """The most pairs of one fire time and one boundary that lie within the tolerance.

    fires, ends: ascending times, in the tolerance's unit. Each is used in at most one pair.
    """
    pairs = 0
    f = 0
    e = 0
    while f < len(fires) and e < len(ends):
        if abs(fires[f] - ends[e]) <= tolerance + 1e-6:
            pairs += 1
            f += 1
            e += 1
        elif fires[f] < ends[e]:
            f += 1
        else:
            e += 1
    return pairs


def scores(pairs, fires, ends) -> dict:
    """Precision, recall, F1 and R-value, from how many pairs, fire times and boundaries there are.

    Where there is nothing to divide by, precision, recall and F1 are 0.
    """
    precision = pairs / max(fires, 1)
    recall = pairs / max(ends, 1)
    over = fires / max(ends, 1) - 1  # OS
    r1 = np.hypot(1 - recall, over)
    r2 = (recall - 1 - over) / np.sqrt(2)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * pairs / max(fires + ends, 1),
        "r_value": float(1 - (abs(r1) + abs(r2)) / 2),
    }


@torch.no_grad()
def firing(encoder, speech, ends, lams=FIRING_LAMS) -> list[dict]:
    """Two rows for each λ: of the encoder's tokens, and of equal spacing.

    ends: the boundaries of each utterance, in frames; the last is the utterance's end. Raises
    ValueError for an encoder of one fixed rate.
    """
    if encoder.config.compression != "cif":
        raise ValueError(
            f"this encoder has one fixed rate ({encoder.config.compression}): its tokens fire at "
            "equal distances"
        )
    rows = []
    for lam in lams:
        # Sums over utterances of (agreeing pairs, fire times, boundaries).
        counts = {"tokens": np.zeros(3, int), "equal spacing": np.zeros(3, int)}
        frames = 0
        tokens = 0
        for used, waveforms, lengths in loader(speech, by_length(speech)):
            if not used:
                continue
            out = encoder(waveforms, lengths, lam)
            frames += out.frames.sum().item()
            tokens += out.lengths.sum().item()
            for b, i in enumerate(used):
                fires = fire_times(out, b)
                counts["tokens"] += count(fires, ends[i])
                even = np.arange(1, len(fires) + 1) * out.frames[b].item() / (len(fires) + 1)
                counts["equal spacing"] += count(even, ends[i])
        for what, sums in counts.items():
            row = {"lam": lam, "period_ms": FRAME_MS * frames / tokens, "what": what}
            rows.append({**row, **scores(*sums.tolist())})
    return rows


def fire_times(out, b) -> np.ndarray:
    """When the tokens of the b-th utterance fire, in frames, without one at the utterance's end."""
    times = out.fired.fire_times[b, : out.lengths[b]].numpy()
    return times[times < out.frames[b].item()]


def count(fires, ends):
    """(agreeing pairs, fire times, boundaries) of an utterance. Times in frames."""
    inner = ends[:-1]  # the last is the utterance's end
    return agreeing(fires, inner, TOLERANCE_MS / FRAME_MS), len(fires), len(inner)


def table(header, rows) -> str:
    """A Markdown table whose columns also line up as plain text. Cells: anything that str takes."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def firing_table(rows) -> str:
    """The rows of `firing` as Markdown."""
    cells = []
    for row in rows:
        line = [f"{row['lam']:g}", f"{row['period_ms']:.1f}", row["what"]]
        line += [f"{row[score]:.3f}" for score in ("precision", "recall", "f1", "r_value")]
        cells.append(line)
    header = ["λ", "ms / token", "fire times of", "precision", "recall", "F1", "R-value"]
    return table(header, cells)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.firing",
        description="Do tokens fire where phones change?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", default="checkpoints/ofa-tiny.pt", help="encoder of pretrain.py")
    add("out", nargs="?", default="runs/firing.json", help="file for the table")
    args = parser.parse_args()
    encoder = OFAEncoder.from_checkpoint(args.checkpoint)
    speech = load("asterisk").part("test")

    # The same teacher and mean length as pretrain.py's defaults, on the test split.
    teacher = load_teacher("mfcc")
    ends = found_boundaries(speech, teacher, fingerprint(teacher), SEGMENT_MS, "data")
    rows = firing(encoder, speech, ends)

    content = {"checkpoint": args.checkpoint, "tolerance_ms": TOLERANCE_MS, "rows": rows}
    save_text(json.dumps(content, indent=1, ensure_ascii=False), args.out)
    print(firing_table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"firing.py: {error}")
