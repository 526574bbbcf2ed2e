"""How fast: CIF beside torch-cif and a plain copy, the encoder, pre-training, and finding a rate.

    cif           `cif`, torch-cif 0.2.0, FunASR's cif_v1 and x.clone(): forward, forward and
                  backward, peak memory, how exact they are; time per frame over length
    encoder       its parts (CNN; α and CIF; positions and Transformer), all of it, and what
                  Amdahl's law makes of the parts
    pretraining   a step by its parts; K values of λ a step; pretrain.py as it is, idle and beside
                  a busy process; a step at HuBERT Base's sizes beside the same step by a peer
    heads         a grid of heads at five λ beside one head for all rates, and beside λ learned
                  (benchmark_heads.py)

If only the Transformer gets faster, from t_0 seconds at λ = 0 to t_1 at λ = 1, the encoder as a
whole can gain no more than (Amdahl)

    bound = whole_0 / (whole_0 - (t_0 - t_1))

Goals stand in brackets beside what is measured. Ratios hold on other machines too, seconds do
not: what is compared runs in one process, on the same tensors, interleaved.
torch.utils.benchmark keeps the clock. After `pip install --no-deps s3prl`, the peer of the last
table is DistilHuBERT's own code; otherwise it is made of torchaudio's modules. cif_v1 is there
after `pip install --no-deps funasr` alone.

Large results cost time even before they are computed: Linux' C library gives large blocks back
at once, so that mapping them again can cost more than the sums. It keeps them with
MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment.

    python -m extras.benchmark                     all of it, minutes: leave the machine alone
    python -m extras.benchmark cif --repeats 3
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import contextlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torchaudio
from torch import nn
from torch.nn.functional import cosine_similarity, l1_loss, logsigmoid
from torch.utils.benchmark import timer
from torch_cif import cif_function

import ofa_encoder
import pretrain
from cif import cif
from extras.benchmark_heads import heads_section
from extras.clock import interleaved, mib, ms, peak_bytes, show
from ofa_encoder import PRESETS, SAMPLE_RATE, OFAEncoder, modify_alpha
from parts import boundaries
from parts.data import batches
from parts.runs import machine, pick_device, save_text, use_bf16
from parts.teachers import Wav2Vec2Teacher

REPO = Path(__file__).parent.parent

# (B, S, C): a training batch, an utterance, a batch at HuBERT Base's width, two long recordings.
CIF_SIZES = [(8, 750, 512), (1, 1500, 768), (16, 1500, 768), (1, 30_000, 512), (1, 100_000, 512)]
LENGTHS = [750, 3_000, 12_000, 30_000, 100_000]  # S, in frames
ENCODERS = {
    "tiny": PRESETS["tiny"],
    "base-2": PRESETS["base"],
    "base-12": replace(PRESETS["base"], layers=12),
}
SECONDS = [5, 15, 60]  # of sound given to the encoders
PARTS = ("cif", "transformer", "whole")  # of an encoder, that depend on λ
FLAGS = []  # of pretrain.py: its defaults
STEPS = 20  # of pre-training in a round
RUN_STEPS = 60  # of pre-training in a run of its own
STEP = (PRESETS["base"], 4, 4)  # student, utterances and seconds of the step beside a peer
STEP_ON_CUDA = (PRESETS["base"], 24, 12)  # a batch of its own size: 4 x 4 s only waits for launches

# What the libraries do unless told otherwise, to compare with what parts/__init__.py tells them.
LIBRARY_DEFAULTS = {"GOMP_SPINCOUNT": "300000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}


# 1. CIF.


def cif_section(device, repeats) -> dict:
    sizes = []
    for size in CIF_SIZES:
        for mean_alpha in (0.25, 0.9):
            sizes.append(measure_cif(size, mean_alpha, device, repeats))
    show(
        "CIF: milliseconds, how many times faster than torch-cif, time over that of x.clone(), "
        "peak memory with backward; goals in brackets",
        [
            *("(B, S, C)", "mean α", "forward ms", "× faster", "/ clone"),
            *("and backward ms", "× faster", "peak MiB", "/ torch-cif"),
        ],
        [cif_cells(row) for row in sizes],
    )
    if "cif_v1" in sizes[0]["error"]:
        show(
            "CIF beside FunASR's cif_v1: how many times faster; and the largest error of a full "
            "token, in float32 beside float64",
            [
                *("(B, S, C)", "mean α", "forward ×", "and backward ×"),
                *("error of cif", "of torch-cif", "of cif_v1"),
            ],
            [cif_v1_cells(row) for row in sizes],
        )
    lengths = []
    for S in LENGTHS:
        x, alpha = cif_inputs((1, S, CIF_SIZES[0][2]), 0.25, device)
        seconds = interleaved(
            {"forward": partial(our_cif, x, alpha), "both": partial(backward, our_cif, x, alpha)},
            repeats,
        )
        nanoseconds = {f"{name}_ns_per_frame": 1e9 * s / S for name, s in seconds.items()}
        lengths.append({"S": S, **nanoseconds})
    rows = []
    for row in lengths:
        cells = [row["S"]]
        for name in ("forward_ns_per_frame", "both_ns_per_frame"):
            cells += [f"{row[name]:.0f}", f"{row[name] / lengths[0][name]:.2f} (≤ 1.2)"]
        rows.append(cells)
    show(
        "CIF over length, one utterance: nanoseconds a frame, and over those of the shortest",
        ["S", "forward ns", "ratio", "and backward ns", "ratio"],
        rows,
    )
    return {"sizes": sizes, "lengths": lengths}


def cif_inputs(size, mean_alpha, device):
    """x (B, S, C), and α (B, S) spread evenly around its mean within the [0, 1] of torch-cif."""
    generator = torch.Generator().manual_seed(0)
    around = 2 * torch.rand(size[:2], generator=generator) - 1
    alpha = mean_alpha + min(mean_alpha, 1 - mean_alpha) * around
    return torch.randn(size, generator=generator).to(device), alpha.to(device)


def our_cif(x, alpha):
    return cif(x, alpha).tokens


def torch_cif(x, alpha):
    return cif_function(x, alpha)["cif_out"][0]


def funasr_cif():
    """FunASR's cif_v1 as a function of x and alpha, by prefix sums of α·x; None if not installed.

    It gives the tokens that are full, and at most one a frame.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it lists what else could be installed
            from funasr.models.paraformer.cif_predictor import cif_v1
    except ImportError:
        return None
    return lambda x, alpha: cif_v1(x, alpha, 1.0)[0]


def error(function, x, alpha) -> float:
    """How far full tokens are from those of `cif` in float64, at most."""
    exact = cif(x.double(), alpha.double(), tail_threshold=None)
    T = exact.tokens.shape[1]
    is_full = torch.arange(T, device=x.device) < exact.lengths[:, None]  # (B, T)
    apart = function(x, alpha)[:, :T].double() - exact.tokens
    return apart[is_full].abs().max().item()


def backward(function, x, alpha):
    """Forward, and the gradients of x and α."""
    x = x.detach().requires_grad_()
    alpha = alpha.detach().requires_grad_()
    tokens = function(x, alpha)
    torch.autograd.grad(tokens, (x, alpha), tokens.detach())


def measure_cif(size, mean_alpha, device, repeats) -> dict:
    x, alpha = cif_inputs(size, mean_alpha, device)
    forward = {
        "cif": partial(our_cif, x, alpha),
        "torch-cif": partial(torch_cif, x, alpha),
        "clone": x.clone,
    }
    both = {
        "cif": partial(backward, our_cif, x, alpha),
        "torch-cif": partial(backward, torch_cif, x, alpha),
    }
    errors = {"cif": error(our_cif, x, alpha), "torch-cif": error(torch_cif, x, alpha)}
    if cif_v1 := funasr_cif():
        forward["cif_v1"] = partial(cif_v1, x, alpha)
        both["cif_v1"] = partial(backward, cif_v1, x, alpha)
        errors["cif_v1"] = error(cif_v1, x, alpha)
    B, S, C = size
    return {
        "B": B,
        "S": S,
        "C": C,
        "alpha": mean_alpha,
        "forward_s": interleaved(forward, repeats),
        "both_s": interleaved(both, repeats),
        "peak_bytes": {name: peak_bytes(call, device) for name, call in both.items()},
        "error": errors,
    }


def cif_v1_cells(row) -> list[str]:
    forward, both, errors = row["forward_s"], row["both_s"], row["error"]
    return [
        f"({row['B']}, {row['S']}, {row['C']})",
        row["alpha"],
        f"{forward['cif_v1'] / forward['cif']:.1f}",
        f"{both['cif_v1'] / both['cif']:.1f}",
        *(f"{errors[name]:.0e}" for name in ("cif", "torch-cif", "cif_v1")),
    ]


def cif_cells(row) -> list[str]:
    forward, both, peak = row["forward_s"], row["both_s"], row["peak_bytes"]
    long = row["S"] > 10_000
    return [
        f"({row['B']}, {row['S']}, {row['C']})",
        row["alpha"],
        ms(forward["cif"]),
        f"{forward['torch-cif'] / forward['cif']:.1f} (≥ {10 if long else 6})",
        f"{forward['cif'] / forward['clone']:.2f} (≤ 1.5)",
        ms(both["cif"]),
        f"{both['torch-cif'] / both['cif']:.1f} (≥ 5)",
        mib(peak["cif"]),
        f"{peak['cif'] / peak['torch-cif']:.2f} (≤ 1)",
    ]


# 2. The encoder.


@torch.no_grad()
def encoder_section(device, repeats) -> list:
    rows = []
    for name, config in ENCODERS.items():
        torch.manual_seed(0)
        encoder = OFAEncoder(config).to(device).eval()
        for seconds in SECONDS:
            waveform = 0.1 * torch.randn(1, seconds * SAMPLE_RATE, device=device)
            row = measure_encoder(encoder, waveform, device, repeats)
            rows.append({"encoder": name, "seconds": seconds, **row})
    show(
        "The encoder, untrained (α about 1/4), one utterance, λ = 0 → 1: ms, and how many times "
        "faster. Goal: the whole within 10 % of the bound",
        [
            *("encoder", "s", "tokens", "CNN", "α, CIF", "Transformer", "whole"),
            *("Transformer ×", "bound ×", "whole ×", "MiB Transformer", "MiB whole"),
        ],
        [encoder_cells(row) for row in rows],
    )
    return rows


def compress(encoder, x, frames, lam):
    """α and CIF: frames x (1, S, C) -> tokens (1, T, C)."""
    return cif(x, modify_alpha(encoder.alpha_predictor(x), lam), frames).tokens


def transform(encoder, tokens):
    """Projection, positions and Transformer: tokens (1, T, C) -> hidden states."""
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return encoder.transform(encoder.encoder.feature_projection.projection(tokens), valid)


def measure_encoder(encoder, waveform, device, repeats) -> dict:
    """waveform (1, samples)."""
    length = torch.tensor([waveform.shape[1]], device=device)
    x, frames = encoder.features(waveform, length)
    tokens = [compress(encoder, x, frames, lam) for lam in (0, 1)]
    calls = {}
    for lam in (0, 1):
        calls[f"cif_{lam}"] = partial(compress, encoder, x, frames, lam)
        calls[f"transformer_{lam}"] = partial(transform, encoder, tokens[lam])
        calls[f"whole_{lam}"] = partial(encoder, waveform, lam=lam)
    peak = {name: peak_bytes(call, device) for name, call in calls.items()}
    calls["cnn"] = partial(encoder.features, waveform, length)
    s = interleaved(calls, repeats)
    return {
        "tokens": [t.shape[1] for t in tokens],
        "s": s,
        "measured": s["whole_0"] / s["whole_1"],
        "bound": s["whole_0"] / (s["whole_0"] - (s["transformer_0"] - s["transformer_1"])),
        "peak_bytes": peak,
    }


def encoder_cells(row) -> list[str]:
    s, peak = row["s"], row["peak_bytes"]
    off = 100 * (row["measured"] / row["bound"] - 1)
    times = [f"{ms(s[f'{part}_0'])} → {ms(s[f'{part}_1'])}" for part in PARTS]
    sizes = [f"{mib(peak[f'{part}_0'])} → {mib(peak[f'{part}_1'])}" for part in PARTS[1:]]
    return [
        row["encoder"],
        row["seconds"],
        f"{row['tokens'][0]} → {row['tokens'][1]}",
        ms(s["cnn"]),
        *times,
        f"{s['transformer_0'] / s['transformer_1']:.1f}",
        f"{row['bound']:.2f}",
        f"{row['measured']:.2f} ({off:+.0f} %)",
        *sizes,
    ]


# 3. Pre-training.


def pretraining_section(device, repeats) -> dict:
    pretraining = prepare(device)
    bf16 = use_bf16(pretraining.args, device)
    return {
        **split_steps(pretraining, repeats),
        "lams_per_step": cost_of_lams(pretraining, repeats),
        "runs": idle_and_busy(),
        "against_peer": step_against_peer(device, repeats, bf16),
    }


@dataclass
class Pretraining:
    """What pretrain.main makes before its loop starts."""

    args: argparse.Namespace
    place: pretrain.Place
    lesson: pretrain.Lesson
    model: pretrain.Distiller
    optimizer: torch.optim.Optimizer


def prepare(device) -> Pretraining:
    args = pretrain.parse_arguments([*FLAGS, "--device", device.type])
    place = pretrain.Place(device, rank=0, world=1)
    lesson, _ = pretrain.prepare(args, place)
    torch.manual_seed(args.seed)
    config = replace(PRESETS[args.preset], layers=args.layers, compression=args.compression)
    model = pretrain.Distiller(OFAEncoder(config), lesson.teacher.dims).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    return Pretraining(args, place, lesson, model, optimizer)


def run_steps(pretraining, first) -> dict:
    """STEPS steps of pretrain.py's own loop from step `first`: seconds, and seconds of audio.

    The check on held-out speech and the checkpoint at the end of the loop are left out.
    """
    args, lesson = pretraining.args, pretraining.lesson
    args.steps = first + STEPS
    models = (pretraining.model, pretraining.optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pretrain, "check_held_out", return_value=""))
        stack.enter_context(mock.patch.object(pretrain, "save"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        start = timer()
        pretrain.train_loop(args, pretraining.place, lesson, *models, first, Path("none"))
        seconds = timer() - start
    samples = 0
    for batch in islice(batches(lesson.train, args.batch_seconds, args.seed), first, args.steps):
        samples += sum(lesson.train.utterances[i].samples for i in batch)
    return {"whole": seconds, "audio": samples / SAMPLE_RATE}


class Stopwatch:
    """Adds up the seconds that are spent in each part."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def timed(self, part, function):
        """The function, with its time added to the part's."""

        def call(*args, **keywords):
            start = timer()
            result = function(*args, **keywords)
            self.seconds[part] += timer() - start
            return result

        return call

    def timed_loader(self, loader):
        """The loader, with the time to wait for each batch added to the data's."""

        def call(*args):
            fetch = self.timed("data", loader(*args).__next__)
            return iter(fetch, None)  # until the loader stops

        return call


def split_steps(pretraining, repeats) -> dict:
    """The share of each part in a step, timed inside pretrain.py's own loop.

    Its pieces are replaced by timed ones, none of which calls another. Rounds go on through the
    data. Times are summed over rounds, so that the parts add up to the whole; what no part
    accounts for is called other. The first round warms up and is not counted.
    """
    encoder, teacher = pretraining.model.encoder, pretraining.lesson.teacher
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
        ("optimiser", pretraining.optimizer, "step"),
    ]
    watch = Stopwatch()
    rounds = []
    with contextlib.ExitStack() as stack:
        loader = watch.timed_loader(pretrain.loader)
        stack.enter_context(mock.patch.object(pretrain, "loader", loader))
        for part, owner, name in pieces:
            timed = watch.timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        for k in range(repeats + 1):
            watch.seconds.clear()
            whole = run_steps(pretraining, k * STEPS)
            other = whole["whole"] - sum(watch.seconds.values())
            rounds.append({**whole, **watch.seconds, "other": other})
    rounds = rounds[1:]
    total = {name: sum(r[name] for r in rounds) for name in rounds[0]}
    parts_of_step = [name for name in total if name not in ("whole", "audio")]
    split = {part: total[part] / total["whole"] for part in parts_of_step}
    speeds = [r["audio"] / r["whole"] for r in rounds]
    speed = total["audio"] / total["whole"]
    step_s = total["whole"] / (STEPS * repeats)
    show(
        f"pretrain.py {' '.join(FLAGS)}: {speed:.0f} s of audio a second ({min(speeds):.0f} to "
        f"{max(speeds):.0f} in rounds of {STEPS} steps), {ms(step_s)} ms a step, of which in % "
        "(other: heads, losses, moving data)",
        list(split),
        [[f"{100 * share:.1f}" for share in split.values()]],
    )
    return {"step_s": step_s, "audio_s_per_s": speed, "of_rounds": speeds, "split": split}


def cost_of_lams(pretraining, repeats) -> dict:
    """Seconds of a step that encodes its batch at K values of λ, for K = 1 and 3, interleaved."""
    times = {1: [], 3: []}
    for k in range(repeats + 1):  # the first round warms up
        for K in random.Random(k).sample(list(times), len(times)):
            pretraining.args.lams_per_step = K
            times[K].append(run_steps(pretraining, k * STEPS)["whole"] / STEPS)
    step_s = {K: median(times[K][1:]) for K in times}
    show(
        "K values of λ a step (--lams-per-step), on one pass of the CNN and the teacher",
        ["K", "step ms", "/ K = 1"],
        [[K, ms(s), f"{s / step_s[1]:.2f}"] for K, s in step_s.items()],
    )
    return {"step_s": step_s, "ratio": step_s[3] / step_s[1]}


# 4. pretrain.py in a process of its own.


def idle_and_busy() -> dict:
    """Speed and memory of pretrain.py on the CPU, with and without what parts/__init__.py sets."""
    settings = {"as parts/ sets them": {}, "the libraries' own": LIBRARY_DEFAULTS}
    results = {}
    for name, environment in settings.items():
        idle = run_pretrain(environment)
        with busy_process():
            busy = run_pretrain(environment)
        results[name] = {"idle": idle, "busy": busy}
    rows = []
    for name, result in results.items():
        idle = result["idle"]["audio_s_per_s"]
        busy = result["busy"]["audio_s_per_s"]
        memory = f"{result['idle']['memory_gb']:.2f} (≤ 1.6)"
        rows.append([name, f"{idle:.0f}", f"{busy:.0f}", f"{idle / busy:.1f} (≤ 2)", memory])
    show(
        f"A run of pretrain.py on the CPU, {RUN_STEPS} steps and the table: s of audio a second, "
        "idle and beside one busy process, and the most memory it held by the kernel's account",
        ["threads and kernel cache", "idle s / s", "busy s / s", "idle / busy", "peak GB"],
        rows,
    )
    return results


def run_pretrain(environment) -> dict:
    """Run pretrain.py with its default flags, but RUN_STEPS steps: audio_s_per_s and memory_gb.

    Raises ValueError if it fails. An encoder that has learned nothing in so few steps is fine.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(REPO / "pretrain.py"), *FLAGS, "--device", "cpu"]
        command += ["--steps", str(RUN_STEPS), "--out", out]
        # On Linux a program's peak begins at that of the process that started it. So a small shell
        # starts this one; with a command left to do, it does not turn into the program itself.
        done = subprocess.run(
            ["sh", "-c", f"{shlex.join(command)}; exit $?"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        table_path = Path(out, "table.json")
        if not table_path.exists():
            raise ValueError(f"{shlex.join(command)} has failed: {done.stderr[-500:]}")
        memory_gb = json.loads(table_path.read_text())["memory_gb"]
    # The progress bar ends with the mean speed over all steps.
    speeds = re.findall(r"(\d+) s/s", done.stderr)
    return {"audio_s_per_s": int(speeds[-1]), "memory_gb": memory_gb}


@contextlib.contextmanager
def busy_process():
    """Another program keeps one core busy meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# 5. A step at HuBERT Base's sizes, beside the same step by a peer.


def plain(config, layers):
    """Torchaudio's wav2vec 2.0 model of these sizes, without compression."""
    encoder = OFAEncoder(replace(config, layers=layers, compression="none"))
    return torchaudio.models.Wav2Vec2Model(encoder.feature_extractor, encoder.encoder)


class TorchaudioStudent(nn.Module):
    """A plain model and a linear head for each layer: (B, samples) -> (B, layers, S, D)."""

    name = "plain torchaudio"

    def __init__(self, config, dims):
        super().__init__()
        self.model = plain(config, config.layers)
        self.heads = nn.ModuleList(nn.Linear(config.dim, dim) for dim in dims)

    def forward(self, waveforms):
        hidden = self.model(waveforms)[0]
        return torch.stack([head(hidden) for head in self.heads], 1)


class S3prlStudent(nn.Module):
    """DistilHuBERT as s3prl has it: (B, samples) -> (B, layers, S, D). ImportError without it."""

    name = "s3prl's distiller"

    def __init__(self, config, dims):
        super().__init__()
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

        layers = list(zip(config.channels, ofa_encoder.KERNELS, ofa_encoder.STRIDES))
        sizes = {
            "extractor_conv_feature_layers": str(layers),
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
            self.model = DistillerModel(DistillerConfig(sizes))

    def forward(self, waveforms):
        return self.model(waveforms, torch.ones_like(waveforms))[2]


def peer(config, dims):
    try:
        return S3prlStudent(config, dims)
    except ImportError:
        return TorchaudioStudent(config, dims)


def our_loss(model, waveforms, lengths, targets, lam):
    [(_, losses, covered)] = model(waveforms, lengths, targets, [lam])
    return (losses * covered).sum() / covered.sum()


def peer_loss(student, waveforms, targets):
    predicted = student(waveforms).float()
    targets = torch.stack(targets, 1)  # (B, layers, S, D)
    cosine = cosine_similarity(predicted, targets, dim=-1)
    return l1_loss(predicted, targets) - logsigmoid(cosine).mean()


def step(module, optimizer, loss, device, bf16):
    """loss: a function without arguments."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        value = loss()
    value.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def step_against_peer(device, repeats, bf16) -> dict:
    """Seconds of a step (forward, loss, backward, optimiser) on noise, with random weights.

    The teacher is the same for all.
    """
    config, B, seconds = STEP_ON_CUDA if device.type == "cuda" else STEP
    torch.manual_seed(0)
    waveforms = 0.1 * torch.randn(B, seconds * SAMPLE_RATE, device=device)
    lengths = torch.full((B,), waveforms.shape[1], device=device)
    teacher = Wav2Vec2Teacher(plain(config, 12), [4, 8, 12]).to(device)
    targets = teacher(waveforms, lengths)
    model = pretrain.Distiller(OFAEncoder(config), teacher.dims).to(device)
    student = peer(config, teacher.dims).to(device)
    steps = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for lam in (0.0, 1.0):
        loss = partial(our_loss, model, waveforms, lengths, targets, lam)
        steps[f"λ = {lam:g}"] = partial(step, model, optimizer, loss, device, bf16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    loss = partial(peer_loss, student, waveforms, targets)
    steps[student.name] = partial(step, student, optimizer, loss, device, bf16)
    s = interleaved({"teacher": partial(teacher, waveforms, lengths), **steps}, repeats)
    peak = {name: peak_bytes(call, device) for name, call in steps.items()}
    rows = []
    for name in steps:
        cells = [name, ms(s[name]), f"{s[name] / s[student.name]:.2f}"]
        with_teacher = s[name] + s["teacher"]
        ratio = with_teacher / (s[student.name] + s["teacher"])
        cells += [ms(with_teacher), f"{ratio:.2f}"]
        cells += [mib(peak[name]), f"{peak[name] / peak[student.name]:.2f}"]
        rows.append(cells)
    show(
        f"A step at HuBERT Base's sizes, {B} x {seconds} s, {'bf16' if bf16 else 'fp32'}; the "
        f"teacher takes {ms(s['teacher'])} ms. Goal: at λ = 0 no slower than the peer",
        ["student", "step ms", "/ peer", "with the teacher ms", "/ peer", "peak MiB", "/ peer"],
        rows,
    )
    return {"peer": student.name, "bf16": bf16, "s": s, "peak_bytes": peak}


SECTIONS = {
    "cif": cif_section,
    "encoder": encoder_section,
    "pretraining": pretraining_section,
    "heads": heads_section,
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.benchmark",
        description="Measure how fast this is, beside the goals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    what = f"what to measure, of {', '.join(SECTIONS)}; none: all"
    add("sections", nargs="*", metavar="SECTION", help=what)
    add("--repeats", type=int, default=7, help="rounds of which the median is taken")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best")
    add("--json", default="runs/benchmark.json", help="file for all numbers")
    args = parser.parse_args()
    if args.repeats < 1 or not set(args.sections) <= SECTIONS.keys():
        raise ValueError(
            f"--repeats is {args.repeats} and the sections are {args.sections}, expected 1 or "
            f"more, and some of {', '.join(SECTIONS)}"
        )
    device = pick_device(args.device)
    result = {
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "repeats": args.repeats,
    }
    print(f"{result['machine']}, {result['date']}; medians of {args.repeats} rounds")
    for section in args.sections or SECTIONS:
        result[section] = SECTIONS[section](device, args.repeats)
        save_text(json.dumps(result, indent=1, ensure_ascii=False), args.json)
    print(f"\nwrote {args.json}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
