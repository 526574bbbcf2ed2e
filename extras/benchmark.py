"""How fast: CIF against torch-cif and a plain copy, the encoder at λ = 0 and 1, and pre-training; each beside its goal.

    cif           `cif`, torch-cif 0.2.0 and x.clone(): forward, forward and backward, peak memory; time per frame over length
    encoder       its parts (CNN; α and CIF; positions and Transformer), the whole, and what Amdahl's law makes of the parts
    pretraining   pretrain.py's own loop by its parts; a step at HuBERT Base's sizes against the same step by somebody else

If only the Transformer gets faster, from t_0 seconds at λ = 0 to t_1 at λ = 1, the whole can gain no more than (Amdahl)

    bound = whole_0 / (whole_0 - (t_0 - t_1))

How it is timed: timing.py. Goals stand beside what is measured. The parts of a pre-training step are timed inside pretrain.py's own
loop, and add up to the whole: what no part accounts for is listed as other.

`python benchmark.py [cif] [encoder] [pretraining]` prints tables and writes a JSON. After `pip install --no-deps s3prl`, the peer is
DistilHuBERT's own code; before, plain torchaudio modules.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
import torchaudio
from torch import nn
from torch.nn.functional import cosine_similarity, l1_loss, logsigmoid
from torch_cif import cif_function

import ofa_encoder
import pretrain
from cif import cif
from extras.timing import interleaved, mib, ms, peak_bytes, show, wait
from ofa_encoder import PRESETS, SAMPLE_RATE, OFAEncoder, modify_alpha
from parts import boundaries
from parts.data import batches, load
from parts.runs import pick_device, use_bf16
from parts.teachers import Wav2Vec2Teacher, load_teacher

CIF_SIZES = [
    (8, 750, 512),
    (1, 1500, 768),
    (16, 1500, 768),
    (1, 30_000, 512),
    (1, 100_000, 512),
]  # (B, S, C)
LENGTHS = [750, 3_000, 12_000, 30_000, 100_000]
ENCODERS = {
    "tiny": PRESETS["tiny"],
    "base-2": PRESETS["base"],
    "base-12": replace(PRESETS["base"], layers=12),
}
SECONDS = [5, 15, 60]
FLAGS, STEPS = [], 20  # of pretrain.py: its defaults; steps in a round
STEP = PRESETS["base"], 4, 4  # student, utterances and seconds of the step against a peer


def cif_section(device, repeats) -> dict:
    def inputs(
        B, S, C, mean
    ):  # α is spread evenly around its mean, within the [0, 1] that torch-cif takes
        generator = torch.Generator().manual_seed(0)
        alpha = mean + min(mean, 1 - mean) * (2 * torch.rand(B, S, generator=generator) - 1)
        return torch.randn(B, S, C, generator=generator).to(device), alpha.to(device)

    def backward(function, x, alpha):
        leaves = x.requires_grad_(), alpha.requires_grad_()
        tokens = function(*leaves)
        torch.autograd.grad(tokens, leaves, tokens.detach())

    ours, theirs = (
        lambda x, alpha: cif(x, alpha).tokens,
        lambda x, alpha: cif_function(x, alpha)["cif_out"][0],
    )
    sizes, lengths, cells, largest = [], [], [], sorted({S for _, S, _ in CIF_SIZES})[-2:]
    for B, S, C in CIF_SIZES:
        for mean in (0.25, 0.9):
            x, alpha = inputs(B, S, C, mean)
            calls = {
                "cif": lambda: ours(x, alpha),
                "torch-cif": lambda: theirs(x, alpha),
                "clone": lambda: x.clone(),
            }
            f = interleaved(calls, repeats, device)
            calls = {
                "cif": lambda: backward(ours, x, alpha),
                "torch-cif": lambda: backward(theirs, x, alpha),
            }
            both, peak = (
                interleaved(calls, repeats, device),
                {name: peak_bytes(call, device) for name, call in calls.items()},
            )
            sizes.append(
                {
                    "B": B,
                    "S": S,
                    "C": C,
                    "alpha": mean,
                    "forward_s": f,
                    "both_s": both,
                    "peak_bytes": peak,
                }
            )
            cells.append(
                [
                    (B, S, C),
                    mean,
                    ms(f["cif"]),
                    f"{f['torch-cif'] / f['cif']:.1f} (≥ {10 if S in largest else 6})",
                    f"{f['cif'] / f['clone']:.2f} (≤ 1.5)",
                    ms(both["cif"]),
                    f"{both['torch-cif'] / both['cif']:.1f} (≥ 5)",
                    mib(peak["cif"]),
                    f"{peak['cif'] / peak['torch-cif']:.2f} (≤ 1)",
                ]
            )
    show(
        "CIF: milliseconds, how many times faster than torch-cif, time over that of x.clone(), peak memory with backward; goals in brackets",
        [
            "(B, S, C)",
            "mean α",
            "forward ms",
            "× faster",
            "/ clone",
            "and backward ms",
            "× faster",
            "peak MiB",
            "/ torch-cif",
        ],
        cells,
    )
    for S in LENGTHS:
        x, alpha = inputs(1, S, CIF_SIZES[0][2], 0.25)
        s = interleaved(
            {"forward": lambda: ours(x, alpha), "both": lambda: backward(ours, x, alpha)},
            repeats,
            device,
        )
        lengths.append(
            {
                "S": S,
                "forward_ns_per_frame": 1e9 * s["forward"] / S,
                "both_ns_per_frame": 1e9 * s["both"] / S,
            }
        )
    show(
        "CIF over length, one utterance: nanoseconds a frame, and over those of the shortest",
        ["S", "forward ns", "ratio", "and backward ns", "ratio"],
        [
            [
                r["S"],
                *(
                    cell
                    for k in list(r)[1:]
                    for cell in (f"{r[k]:.0f}", f"{r[k] / lengths[0][k]:.2f} (≤ 1.2)")
                ),
            ]
            for r in lengths
        ],
    )
    return {"sizes": sizes, "lengths": lengths}


@torch.no_grad()
def encoder_section(device, repeats) -> list:
    rows, cells = [], []
    for name, config in ENCODERS.items():
        torch.manual_seed(0)
        encoder = OFAEncoder(config).to(device).eval()
        for seconds in SECONDS:
            waveform = 0.1 * torch.randn(1, seconds * SAMPLE_RATE, device=device)
            length = torch.tensor([waveform.shape[1]], device=device)
            x, frames = encoder.features(waveform, length)
            compress = lambda lam: (
                cif(x, modify_alpha(encoder.alpha_predictor(x), lam), frames).tokens
            )
            tokens = compress(0), compress(1)

            def transform(lam):
                valid = torch.ones(tokens[lam].shape[:2], dtype=torch.bool, device=device)
                encoder.transform(encoder.encoder.feature_projection.projection(tokens[lam]), valid)

            parts = {
                "cif": compress,
                "transformer": transform,
                "whole": lambda lam: encoder(waveform, lam=lam),
            }
            calls = {
                f"{part}_{lam}": lambda call=call, lam=lam: call(lam)
                for part, call in parts.items()
                for lam in (0, 1)
            }
            s = interleaved(
                {"cnn": lambda: encoder.features(waveform, length), **calls}, repeats, device
            )
            peak = {k: peak_bytes(call, device) for k, call in calls.items()}
            measured = s["whole_0"] / s["whole_1"]
            bound = s["whole_0"] / (s["whole_0"] - (s["transformer_0"] - s["transformer_1"]))
            rows.append(
                {
                    "encoder": name,
                    "seconds": seconds,
                    "tokens": [t.shape[1] for t in tokens],
                    "s": s,
                    "measured": measured,
                    "bound": bound,
                    "peak_bytes": peak,
                }
            )
            cells.append(
                [
                    name,
                    seconds,
                    f"{tokens[0].shape[1]} → {tokens[1].shape[1]}",
                    ms(s["cnn"]),
                    *(f"{ms(s[k + '_0'])} → {ms(s[k + '_1'])}" for k in parts),
                    f"{s['transformer_0'] / s['transformer_1']:.1f}",
                    f"{bound:.2f}",
                    f"{measured:.2f} ({100 * (measured / bound - 1):+.0f} %)",
                    *(
                        f"{mib(peak[k + '_0'])} → {mib(peak[k + '_1'])}"
                        for k in ("transformer", "whole")
                    ),
                ]
            )
    show(
        "The encoder, untrained (α about 1/4), one utterance, λ = 0 → 1: ms, and how many times faster. Goal: the whole within 10 % of the bound",
        [
            "encoder",
            "s",
            "tokens",
            "CNN",
            "α, CIF",
            "Transformer",
            "whole",
            "Transformer ×",
            "bound ×",
            "whole ×",
            "MiB Transformer",
            "MiB whole",
        ],
        cells,
    )
    return rows


def pretraining_section(device, repeats) -> dict:
    """pretrain.py's loop with its pieces replaced by timed ones, which do not call one another. Without evaluation and checkpoints.
    Rounds go on through the data; the first, for warm-up, is not counted. Sums over rounds, so that parts add up to the whole."""
    args = pretrain.arguments([*FLAGS, "--device", device.type])
    train, teacher = (
        load(args.data, args.root).part("train"),
        load_teacher(args.teacher, args.teacher_layers, args.teacher_heads).to(device),
    )
    path = boundaries.cache_path(
        train, args.teacher, teacher.layers[-1], args.segment_ms, args.root
    )
    if not path.exists():
        boundaries.segment(train, teacher, path, args.segment_ms, device=device)
    ends = boundaries.read_boundaries(path, train)
    torch.manual_seed(args.seed)
    encoder = OFAEncoder(replace(PRESETS[args.preset], layers=args.layers))
    model = pretrain.Distiller(encoder, teacher.dims).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    seconds = {}

    def timed(part, function):
        def timed(*args, **keywords):
            wait(device)
            start = time.perf_counter()
            result = function(*args, **keywords)
            wait(device)
            seconds[part] = seconds.get(part, 0) + time.perf_counter() - start
            return result

        return timed

    pieces = [
        ("data", boundaries, "pseudo_alpha"),
        ("teacher", teacher, "forward"),
        ("CNN", encoder, "features"),
        ("α, CIF", encoder.alpha_predictor, "forward"),
        ("α, CIF", ofa_encoder, "cif"),
        ("α, CIF", pretrain, "expand"),
        ("Transformer", encoder, "transform"),
        ("backward", torch.Tensor, "backward"),
        ("optimiser", nn.utils, "clip_grad_norm_"),
        ("optimiser", optimizer, "step"),
    ]
    replaced = [(owner, name, timed(part, getattr(owner, name))) for part, owner, name in pieces]
    replaced += [
        (
            pretrain,
            "loader",
            lambda *a, loader=pretrain.loader: iter(timed("data", loader(*a).__next__), None),
        ),
        (pretrain, "evaluate", lambda *a: ([], 0.22)),
        (pretrain, "save", lambda *a: None),
    ]
    rounds = []
    with (
        contextlib.ExitStack() as stack,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        for first in range(0, STEPS * (repeats + 1), STEPS):
            args.steps = first + STEPS
            seconds.clear()
            start = time.perf_counter()
            pretrain.train_loop(
                args, model, optimizer, teacher, train, None, ends, first, device, 0, 1, None
            )
            wait(device)
            whole = time.perf_counter() - start
            heard = islice(batches(train, args.batch_seconds, args.seed), first, args.steps)
            audio = sum(train.utterances[i].samples for batch in heard for i in batch) / SAMPLE_RATE
            rounds.append(
                {"audio": audio, "whole": whole, **seconds, "other": whole - sum(seconds.values())}
            )
    total = {k: sum(r[k] for r in rounds[1:]) for k in rounds[0]}
    speed, speeds = total["audio"] / total["whole"], [r["audio"] / r["whole"] for r in rounds[1:]]
    step_s, split = (
        total["whole"] / (STEPS * repeats),
        {k: total[k] / total["whole"] for k in list(total)[2:]},
    )
    show(
        f"pretrain.py {' '.join(FLAGS)}: {speed:.0f} s of audio a second ({min(speeds):.0f} to {max(speeds):.0f} in rounds of {STEPS} steps), "
        f"{ms(step_s)} ms a step, of which in % (other: heads, losses, moving data)",
        list(split),
        [[f"{100 * v:.1f}" for v in split.values()]],
    )
    return {
        "step_s": step_s,
        "audio_s_per_s": speed,
        "of_rounds": speeds,
        "split": split,
        "against_peer": step_against_peer(device, repeats, use_bf16(args, device)),
    }


def plain(config, layers):
    """Torchaudio's wav2vec 2.0 model of these sizes, without compression."""
    encoder = OFAEncoder(replace(config, layers=layers, compression="none"))
    return torchaudio.models.Wav2Vec2Model(encoder.feature_extractor, encoder.encoder)


def peer(config, waveforms, dims):
    """Somebody else's student of these sizes: its name, module, and a function that predicts all taught layers, (B, layers, S, D)."""
    try:
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
    except ImportError:
        student, heads = (
            plain(config, config.layers),
            nn.ModuleList(nn.Linear(config.dim, dim) for dim in dims),
        )
        module = nn.ModuleList([student, heads]).to(waveforms.device)
        return (
            "plain torchaudio",
            module,
            lambda: torch.stack(
                [head(hidden) for hidden in [student(waveforms)[0]] for head in heads], 1
            ),
        )
    sizes = {
        "extractor_conv_feature_layers": str(
            list(zip(config.channels, ofa_encoder.KERNELS, ofa_encoder.STRIDES))
        ),
        "encoder_layers": config.layers,
        "encoder_embed_dim": config.dim,
        "encoder_ffn_embed_dim": config.ff,
        "final_dim": dims[0],
        "encoder_attention_heads": config.heads,
        "conv_pos": config.pos_kernel,
        "n_tasks": len(dims),
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": 0.0,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        student = DistillerModel(DistillerConfig(sizes)).to(waveforms.device)
    return "s3prl's distiller", student, lambda: student(waveforms, torch.ones_like(waveforms))[2]


def step_against_peer(device, repeats, bf16) -> dict:
    """Seconds of a step (forward, loss, backward, optimiser) on noise, with random weights. The teacher is the same for all."""
    config, B, seconds = STEP
    torch.manual_seed(0)
    waveforms = 0.1 * torch.randn(B, seconds * SAMPLE_RATE, device=device)
    lengths = torch.full((B,), waveforms.shape[1], device=device)
    teacher = Wav2Vec2Teacher(plain(config, 12), [4, 8, 12]).to(device)
    targets = teacher(waveforms, lengths)
    model = pretrain.Distiller(OFAEncoder(config), teacher.dims).to(device)
    name, student, predict = peer(config, waveforms, teacher.dims)

    def ours(lam):
        _, distillation, covered = model(waveforms, lengths, targets, lam)
        return (distillation * covered).sum() / covered.sum()

    def theirs():
        predicted, target = predict().float(), torch.stack(targets, 1)
        return (
            l1_loss(predicted, target)
            - logsigmoid(cosine_similarity(predicted, target, dim=-1)).mean()
        )

    def step(module, optimizer, loss):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    optimizer = lambda module: torch.optim.AdamW(module.parameters(), lr=1e-4)
    of_ours, of_theirs = optimizer(model), optimizer(student)
    steps = {
        "λ = 0": lambda: step(model, of_ours, lambda: ours(0.0)),
        "λ = 1": lambda: step(model, of_ours, lambda: ours(1.0)),
        name: lambda: step(student, of_theirs, theirs),
    }
    s = interleaved({"teacher": lambda: teacher(waveforms, lengths), **steps}, repeats, device)
    peak = {key: peak_bytes(call, device) for key, call in steps.items()}
    with_teacher = {key: s[key] + s["teacher"] for key in steps}
    show(
        f"A step at HuBERT Base's sizes, {B} x {seconds} s, {'bf16' if bf16 else 'fp32'}; the teacher takes {ms(s['teacher'])} ms. "
        "Goal: at λ = 0 no slower than the peer",
        ["student", "step ms", "/ peer", "with the teacher ms", "/ peer", "peak MiB", "/ peer"],
        [
            [
                key,
                ms(s[key]),
                f"{s[key] / s[name]:.2f}",
                ms(with_teacher[key]),
                f"{with_teacher[key] / with_teacher[name]:.2f}",
                mib(peak[key]),
                f"{peak[key] / peak[name]:.2f}",
            ]
            for key in steps
        ],
    )
    return {"peer": name, "bf16": bf16, "s": s, "peak_bytes": peak}


SECTIONS = {"cif": cif_section, "encoder": encoder_section, "pretraining": pretraining_section}


def main():
    parser = argparse.ArgumentParser(
        description="Measure how fast this is, beside the goals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"what to measure, of {', '.join(SECTIONS)}; none: all",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds of which the median is taken"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: the best there is",
    )
    parser.add_argument("--json", default="runs/benchmark.json", help="file for all numbers")
    args = parser.parse_args()
    if args.repeats < 1 or not set(args.sections) <= SECTIONS.keys():
        raise ValueError(
            f"--repeats is {args.repeats} and the sections are {args.sections}, expected 1 or more, and some of {', '.join(SECTIONS)}"
        )
    device = pick_device(args.device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    result = {
        "machine": f"{name}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "repeats": args.repeats,
    }
    print(f"{result['machine']}, {result['date']}; medians of {args.repeats} rounds")
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    for section in args.sections or SECTIONS:
        result[section] = SECTIONS[section](device, args.repeats)
        Path(args.json).write_text(
            json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    print(f"\nwrote {args.json}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
