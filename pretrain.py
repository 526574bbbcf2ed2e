"""Once-for-all pre-training: distil a teacher at a λ that is drawn anew at every step.

The student encodes a batch at λ, which shortens it; `expand` spreads its last hidden states back over the frames, and one
linear head per taught layer predicts the teacher's vectors h there. α is guided by pseudo-boundaries (boundaries.py):

    loss = Σ_layers mean over frames of  |ĥ - h|₁ / D - log σ(cos(ĥ, h))            distillation (DistilHuBERT, section 3)
         + 0.5  · mean over frames of    |α_s - pseudo-α_s|                         frame guidance (OFA, section 2.2)
         + 0.05 · mean over segments of  |α_1 + … + α_e(i) - i|                     i-th segment, which ends at frame e(i)
         + q    · mean over utterances of |mean α - target|                         quantity, optional (--quantity q)

The guidance acts on α before λ changes it. Frames of a dropped tail belong to no token: they carry no distillation loss.

One loop serves a CPU, a GPU, and many (torchrun). Everything random at a step, λ and data order included, is a function of
(seed, step), so that a run that was stopped goes on exactly (--resume), and all processes draw the same λ. A step's batch is
dealt out among processes and accumulated parts; losses are divided by the whole batch's counts, so the deal does not matter.

Sources: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models", ICASSP 2023;
Chang, Yang and Lee, "DistilHuBERT", ICASSP 2022.

    python pretrain.py --out runs/demo                                     two CPU cores, the embedded corpus
    torchrun --nproc-per-node 8 pretrain.py --preset base --teacher hubert_base --data librispeech:train-clean-100 ...
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, logsigmoid
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import boundaries
from cif import expand
from data import Speech, batches, load, loader, pad
from figures import utterance_figure
from ofa_encoder import COMPRESSIONS, FRAME_MS, PRESETS, SAMPLE_RATE, OFAEncoder, check_lam, load_checkpoint, period_from_lam, save
from teachers import initialise, load_teacher

TABLE_LAMS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


def arguments():
    parser = argparse.ArgumentParser(description="Pre-train a once-for-all encoder, or a fixed-rate peer of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="asterisk", help="asterisk, librispeech:SUBSET[+SUBSET], or a folder of sound files")
    add("--root", default="data", help="folder for what is downloaded and cached")
    add("--teacher", default="mfcc", help="mfcc, hubert_base, or a file with the state_dict of a torchaudio HuBERT / wav2vec 2.0")
    add("--teacher-layers", type=int, nargs="+", help="layers to distil; None: at a third, two thirds and the end")
    add("--teacher-heads", type=int, help="attention heads of a teacher from a file; None: its width / 64")
    add("--boundaries", help="file of segment boundaries (see boundaries.py); None: found from the teacher's codes")
    add("--segment-ms", type=float, default=90.0, help="mean length of the segments that are found")
    add("--preset", choices=PRESETS, default="tiny", help="sizes of the encoder")
    add("--layers", type=int, default=2, help="its Transformer layers")
    add("--compression", choices=COMPRESSIONS, default="cif", help="cif follows λ; the others are fixed-rate peers")
    add("--lam", type=float, help="train at this λ alone (a single-rate peer); None: draw λ at each step")
    add("--lam-distribution", choices=("uniform", "uniform-period"), default="uniform", help="draw λ, or the period in ms, uniformly")
    add("--lam-max", type=float, default=1.5, help="largest λ drawn, at most 2")
    add("--quantity", type=float, default=0.0, help="weight of the loss that pulls mean α to 20 / segment-ms")
    add("--out", default="runs/pretrain", help="folder for the checkpoint, table and figure")
    add("--steps", type=int, default=1500, help="optimiser steps")
    add("--batch-seconds", type=float, default=32.0, help="audio in a step's batch, over all processes and accumulated parts")
    add("--accumulate", type=int, default=1, help="parts in which each process takes its share of a batch")
    add("--lr", type=float, default=1e-3, help="peak learning rate; it falls linearly to 0")
    add("--warmup", type=int, default=60, help="steps over which it rises")
    add("--clip", type=float, default=5.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of weights, data order and λ")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the best there is")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="bf16 autocast, or not; auto: where it is fast")
    add("--workers", type=int, default=0, help="processes that read sound ahead of time")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args()
    if args.lam is not None:
        check_lam(args.lam)
    if not 0 < args.lam_max <= 2:
        raise ValueError(f"--lam-max is {args.lam_max}, expected a number over 0, at most 2")
    if args.compression != "cif":
        if args.lam:
            raise ValueError(f"--lam is for --compression cif; {args.compression} has one rate")
        args.lam = 0.0
    for name in ("steps", "layers", "accumulate", "batch_seconds", "lr", "clip", "segment_ms", "save_every"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number over 0")
    return args


class Distiller(nn.Module):
    """Encoder and heads; forward returns the summed losses of a batch, to be divided by counts."""

    def __init__(self, encoder: OFAEncoder, teacher_dims: list[int]):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.dim, dim) for dim in teacher_dims)

    def forward(self, waveforms, lengths, targets, lam):
        """targets: list of (B, S, D_teacher). Returns the encoder's output, and for each layer the distillation loss of
        each frame, with the part of the frame that some token covers: (layers, B, S), (B, S)."""
        out = self.encoder(waveforms, lengths, lam)
        hidden = out.hidden_states[-1].float()
        frames = expand(hidden, out.fired)                                       # (B, S, D)
        covered = expand(torch.ones_like(hidden[:, :, :1]), out.fired)[:, :, 0]  # (B, S), zero in the padding
        losses = []
        for head, target in zip(self.heads, targets):
            predicted = head(frames).float()
            losses.append((predicted - target).abs().mean(2) - logsigmoid(cosine_similarity(predicted, target, dim=2)))
        return out, torch.stack(losses), covered


def guidance(alpha, pseudo, number):
    """Summed frame and segment losses of α (B, S); pseudo-α and segment numbers (B, S) from boundaries.pseudo_alpha."""
    in_utterance, at_end = pseudo > 0, number > 0
    return ((alpha - pseudo).abs() * in_utterance).sum(), ((alpha.cumsum(1) - number).abs() * at_end).sum()


def draw_lam(args, step, mean_alpha) -> float:
    u = np.random.default_rng([args.seed, step]).uniform()
    if args.lam is not None:
        return args.lam
    lam_max = min(args.lam_max, 1.99)
    if args.lam_distribution == "uniform":
        return u * lam_max
    from ofa_encoder import lam_from_period
    return lam_from_period(FRAME_MS + u * (period_from_lam(lam_max, mean_alpha) - FRAME_MS), mean_alpha)


@torch.no_grad()
def evaluate(distiller, teacher, speech: Speech, lams, device, count_flops=False):
    """Rows of a table, one a λ: measured frame period, distillation loss per layer, cost; and mean α over all frames."""
    distiller.eval()
    encoder, rows = distiller.encoder, []
    order = np.argsort([u.samples for u in speech.utterances])
    for lam in lams:
        losses, covered_frames, frames, tokens, mass = 0, 0, 0, 0, 0
        for k in range(0, len(order), 16):
            waveforms, lengths = (t.to(device) for t in pad([speech[i] for i in order[k : k + 16]]))
            out, loss, covered = distiller(waveforms, lengths, teacher(waveforms, lengths), lam)
            losses, covered_frames = losses + (loss * covered).sum((1, 2)), covered_frames + covered.sum()
            valid = torch.arange(out.alpha.shape[1], device=device) < out.frames[:, None]
            frames, tokens, mass = frames + out.frames.sum().item(), tokens + out.lengths.sum().item(), mass + (out.alpha * valid).sum().item()
        row = {"lam": lam, "period_ms": FRAME_MS * frames / tokens, "closed_form_ms": None,
               "tokens_per_s": 1000 / FRAME_MS * tokens / frames, "distillation": (losses / covered_frames).tolist()}
        if count_flops:
            row["transformer_gflops_per_s"] = transformer_gflops(encoder, [speech[i] for i in order[:: max(1, len(order) // 20)]], lam, device)
        rows.append(row)
    distiller.train()
    for row in rows:
        row["closed_form_ms"] = period_from_lam(row["lam"], mass / frames) if encoder.config.compression == "cif" else FRAME_MS * frames / mass
    return rows, mass / frames


def transformer_gflops(encoder, waveforms, lam, device):
    """GFLOPs (a multiply-add is two) in positions and Transformer layers, per second of speech, each utterance alone."""
    flops = 0
    for waveform in waveforms:
        x = encoder.encoder.feature_projection.projection(encoder(waveform[None].to(device), lam=lam).fired.tokens)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on CPUs
            encoder.transform(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device))
        flops += counter.get_total_flops()
    return flops / 1e9 / (sum(map(len, waveforms)) / SAMPLE_RATE)


def print_table(rows, mean_alpha, layers):
    print(f"held-out speech, mean α = {mean_alpha:.4f}\n"
          f"    λ   period  closed form  tokens  {'  '.join(f'loss {layer}' for layer in layers)}  Transformer\n"
          f"            ms           ms    a second  {'          ' * (len(layers) - 1)}          GFLOPs / s of speech")
    for row in rows:
        print(f" {row['lam']:4.2f} {row['period_ms']:8.1f} {row['closed_form_ms']:12.1f} {row['tokens_per_s']:7.1f} "
              + "".join(f"{loss:10.3f}" for loss in row["distillation"]) + f"{row['transformer_gflops_per_s']:13.3f}")
