"""What one encoder does at each λ, on held-out speech: measured frame period, distillation loss, and cost.

    period = 20 ms · frames / tokens         compared with the closed form 20 ms / mean α′ (ofa_encoder.py)
    cost   = GFLOPs of positions and Transformer layers per second of speech; a multiply-add counts as two

`python evaluate.py [runs/demo/checkpoint.pt]` prints the table of a pre-trained checkpoint; pretrain.py prints it at its end.
"""

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Speech, loader
from ofa_encoder import CONSTANT_ALPHA, FRAME_MS, SAMPLE_RATE, period_from_lam

PERIODS_MS = (20, 25, 33, 50, 90, 180)  # asked of the encoder, which answers with λ


@torch.no_grad()
def evaluate(distiller, teacher, speech: Speech, lams, device="cpu"):
    """A row (dict) for each λ, and mean α over all frames of speech. distiller is pretrain.py's: encoder and heads."""
    distiller.eval()
    order = np.argsort([u.samples for u in speech.utterances])
    few = order[::8][:: max(1, len(order[::8]) // 20)]            # some twenty, on which the work is counted
    _, waveforms, lengths = next(loader(speech, [few.tolist()]))
    some, rows = [w[:n] for w, n in zip(waveforms, lengths)], []
    for lam in lams:
        loss, covered, frames, tokens, mass = 0, 0, 0, 0, 0
        for used, waveforms, lengths in loader(speech, [order[k : k + 16].tolist() for k in range(0, len(order), 16)]):
            waveforms, lengths = waveforms.to(device), lengths.to(device)
            if not used:
                continue
            out, batch_loss, batch_covered = distiller(waveforms, lengths, teacher(waveforms, lengths), lam)
            loss, covered = loss + (batch_loss * batch_covered).sum((1, 2)), covered + batch_covered.sum()
            valid = torch.arange(out.alpha.shape[1], device=device) < out.frames[:, None]
            frames, tokens = frames + out.frames.sum().item(), tokens + out.lengths.sum().item()
            mass += (out.alpha * valid).sum().item()
        rows.append({"lam": lam, "period_ms": FRAME_MS * frames / tokens, "tokens_per_s": 1000 / FRAME_MS * tokens / frames,
                     "distillation": (loss / covered).tolist(),
                     "transformer_gflops_per_s": transformer_gflops(distiller.encoder, some, lam, device)})
    mean_alpha = mass / frames
    constant = CONSTANT_ALPHA.get(distiller.encoder.config.compression)
    for row in rows:
        row["closed_form_ms"] = FRAME_MS / constant if constant else period_from_lam(row["lam"], mean_alpha)
    distiller.train()
    return rows, mean_alpha


def transformer_gflops(encoder, waveforms, lam, device="cpu") -> float:
    """GFLOPs in positions and Transformer layers per second of speech, each utterance encoded alone."""
    flops = 0
    for waveform in waveforms:
        tokens = encoder(waveform[None].to(device), lam=lam).fired.tokens
        x = encoder.encoder.feature_projection.projection(tokens)
        # Fused attention kernels are not counted on CPUs, the plain one is.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder.transform(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device))
        flops += counter.get_total_flops()
    return flops / 1e9 / (sum(map(len, waveforms)) / SAMPLE_RATE)


def print_table(rows, mean_alpha, layers):
    """layers: a name for each distillation loss."""
    print(f"held-out speech, mean α = {mean_alpha:.4f}")
    columns = ["λ", "ms / token", "closed form", "tokens / s", *(f"loss {layer}" for layer in layers), "Transformer GFLOPs / s of speech"]
    print("  ".join(f"{column:>11}" for column in columns))
    for row in rows:
        cells = [f"{row['lam']:.2f}", f"{row['period_ms']:.1f}", f"{row['closed_form_ms']:.1f}", f"{row['tokens_per_s']:.1f}",
                 *(f"{loss:.3f}" for loss in row["distillation"]), f"{row['transformer_gflops_per_s']:.3f}"]
        print("  ".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    import sys

    from data import load
    from pretrain import Distiller
    from teachers import load_teacher

    path = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/checkpoint.pt"
    try:
        distiller, args = Distiller.from_checkpoint(path)
        teacher = load_teacher(args["teacher"], args["teacher_layers"], args["teacher_heads"])
        lams = [distiller.encoder.lam_for(ms) for ms in PERIODS_MS] if args["lam"] is None else (args["lam"],)
        print_table(*evaluate(distiller, teacher, load(args["data"], args["root"]).part("test"), lams), teacher.layers)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
