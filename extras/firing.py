"""Do tokens fire where phones change? Agreement of fire times with pseudo-boundaries, beside tokens of constant length.

A fire time and a boundary agree if they lie within the tolerance (20 ms); each is used once. The ends of utterances do not count.

    precision = agreeing / fire times,   recall = agreeing / boundaries,   F1 = their harmonic mean
    R-value = 1 - (|r₁| + |r₂|) / 2,   r₁ = √((1 - recall)² + OS²),   r₂ = (recall - 1 - OS) / √2,   OS = fire times / boundaries - 1

Firing often raises recall by chance; the R-value charges for it: OS is how many too many were fired (1: perfect, and below 0 for
many too many). The constant-α baseline fires as often in each utterance, at equal distances, so that what it lacks is the knowledge
of *where* alone. At 33 ms and ± 20 ms nearly every boundary is met by both, so look at 90 ms. The pseudo-boundaries are those that α was
taught (boundaries.py), found here in held-out speech: changes in the teacher's codes, not a phonetician's.

Source of the R-value: Räsänen, Laine and Altosaar, "An improved speech segmentation quality measure: the R-value", Interspeech 2009.

    python firing.py checkpoints/ofa-tiny.pt results/firing.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from ofa_encoder import FRAME_MS, OFAEncoder
from parts import boundaries
from parts.data import loader

TOLERANCE_MS = 20
FIRING_PERIODS_MS = (33, 50, 90)


def agreeing(fires, ends, tolerance) -> int:
    """How many pairs can be made of ascending fires and ends that lie within the tolerance, each used once."""
    pairs, f, e = 0, 0, 0
    while f < len(fires) and e < len(ends):
        if abs(fires[f] - ends[e]) <= tolerance + 1e-6:
            pairs, f, e = pairs + 1, f + 1, e + 1
        elif fires[f] < ends[e]:
            f += 1
        else:
            e += 1
    return pairs


def scores(pairs, fires, ends) -> dict:
    """Precision, recall, F1 and R-value from the number of agreeing pairs, fire times and boundaries."""
    precision, recall = pairs / max(fires, 1), pairs / max(ends, 1)
    over = fires / max(ends, 1) - 1
    r1, r2 = np.hypot(1 - recall, over), (recall - 1 - over) / np.sqrt(2)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * pairs / max(fires + ends, 1),
        "r_value": float(1 - (abs(r1) + abs(r2)) / 2),
    }


@torch.no_grad()
def firing(encoder, speech, ends, periods_ms=FIRING_PERIODS_MS) -> list[dict]:
    """Two rows, α's and the constant one's, for each period. ends: the boundaries of every utterance in frames, the last its end."""
    order, rows = np.argsort([u.samples for u in speech.utterances]), []
    for lam in map(encoder.lam_for, periods_ms):
        counts = {"learned α": np.zeros(3, int), "constant α": np.zeros(3, int)}
        frames = tokens = 0
        for used, waveforms, lengths in loader(
            speech, [order[k : k + 16].tolist() for k in range(0, len(order), 16)]
        ):
            out = encoder(waveforms, lengths, lam)
            frames, tokens = frames + out.frames.sum().item(), tokens + out.lengths.sum().item()
            for b, i in enumerate(used):
                S, T, inner = int(out.frames[b]), int(out.lengths[b]), ends[i][:-1]
                times = out.fired.fire_times[b, :T].numpy()
                times = times[times < S]
                even = np.arange(1, len(times) + 1) * S / (len(times) + 1)
                for what, fires in (("learned α", times), ("constant α", even)):
                    counts[what] += (
                        agreeing(fires, inner, TOLERANCE_MS / FRAME_MS),
                        len(fires),
                        len(inner),
                    )
        rows += [
            {
                "lam": round(lam, 2),
                "period_ms": FRAME_MS * frames / tokens,
                "what": what,
                **scores(*map(int, n)),
            }
            for what, n in counts.items()
        ]
    return rows


def table(header, rows):
    return "\n".join(
        [
            "| " + " | ".join(header) + " |",
            "|" + " --- |" * len(header),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        ]
    )


def firing_table(rows):
    return table(
        ["λ", "ms / token", "tokens fire by", "precision", "recall", "F1", "R-value"],
        [
            [
                f"{r['lam']:g}",
                f"{r['period_ms']:.0f}",
                r["what"],
                *(f"{r[k]:.3f}" for k in ("precision", "recall", "f1", "r_value")),
            ]
            for r in rows
        ],
    )


def main():
    from parts.data import load
    from parts.teachers import load_teacher

    parser = argparse.ArgumentParser(
        description="Do tokens fire where phones change?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", nargs="?", default="checkpoints/ofa-tiny.pt", help="encoder.pt of pretrain.py"
    )
    parser.add_argument("out", nargs="?", default="results/firing.json", help="file for the table")
    args = parser.parse_args()
    checkpoint, out = args.checkpoint, args.out
    encoder = OFAEncoder.from_checkpoint(checkpoint)
    speech = load("asterisk").part("test")
    path = boundaries.cache_path(speech, "mfcc", "mfcc", 90.0, "data")
    if not path.exists():
        boundaries.segment(speech, load_teacher("mfcc"), path)
    rows = firing(encoder, speech, boundaries.read_boundaries(path, speech))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(
        json.dumps(
            {"checkpoint": checkpoint, "tolerance_ms": TOLERANCE_MS, "rows": rows},
            indent=1,
            ensure_ascii=False,
        ),
        encoding="utf-8",
    )
    print(firing_table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"firing.py: {error}")
