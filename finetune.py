"""Downstream tasks at any rate: a small head on the frozen encoder, trained to a plateau, at each λ and seed asked for.

    hidden states (L + 1, T, D) of every utterance at λ, computed once and kept  ─ head (heads.py) ─ symbols or labels

Tasks and their data are in tasks.py, those of SUPERB in superb.py. Baselines with the same head: --features logmel (80 log-mel
channels, a frame every 20 ms), random (the encoder with untrained weights), deaf (one zero vector, whatever was said: what the head
knows without hearing). An utterance that λ makes too short for its text under CTC is counted (infeasible) and scored like any other.

Every point, one λ and one seed, is a JSON file in --out with configuration, metric and cost. A point that is there is not
computed again, so a sweep goes on where it was stopped; a file of another configuration is refused.

Source: the protocol of SUPERB (Yang et al., Interspeech 2021); the curve over λ: Chen, Meng and Lee, ICASSP 2023.

    python finetune.py --checkpoint runs/demo/encoder.pt --task ctc --lam 0 0.5 1 --seeds 3 --out runs/ctc
    python finetune.py --checkpoint runs/demo/encoder.pt --task pool --data my.tsv
    python finetune.py --checkpoint runs/base/encoder.pt --task asr --head superb --data my/corpora
"""

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import pad
from evaluate import transformer_gflops
from heads import CTCHead, PoolHead, Seq2SeqHead
from ofa_encoder import FRAME_MS, SAMPLE_RATE, OFAEncoder, check_lam
from superb import METRICS, SUPERB, load_superb
from tasks import HIGHER_IS_BETTER, KINDS, Task, load_task

FEATURES = ("encoder", "random", "logmel", "deaf")


def arguments():
    parser = argparse.ArgumentParser(description="Train a head on the encoder at each λ and seed.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="encoder.pt or checkpoint.pt of pretrain.py; needed unless --features is logmel or deaf")
    add("--task", required=True, choices=[*KINDS, *SUPERB], help="what to predict: see tasks.py and superb.py")
    add("--data", help="asterisk (the default), or a TSV with columns path, text or label, and optionally split; for SUPERB's tasks a folder with "
                       "the data set, by default that of --root")
    add("--root", default="data", help="folder of the embedded corpus")
    add("--fold", type=int, choices=range(1, 6), default=1, help="session of IEMOCAP that er is tested on")
    add("--features", choices=FEATURES, default="encoder", help="what the head hears: the encoder, or a baseline")
    add("--lam", type=float, nargs="+", default=[0.0], help="each λ to train a head at")
    add("--seeds", type=int, default=1, help="heads for each λ, with seeds 0, 1, …")
    add("--unfreeze", action="store_true", help="train the encoder too (slow: nothing is kept between epochs)")
    add("--head", choices=("blstm", "linear", "superb"), default="blstm", help="what CTC stands on")
    add("--slots", type=int, default=1, help="symbols that a token may emit under CTC")
    add("--ctc-weight", type=float, default=0.3, help="part of a joint CTC loss in seq2seq, 0 to 1")
    add("--beam", type=int, default=1, help="hypotheses of seq2seq; 1: greedy")
    add("--epochs", type=int, default=120, help="at most")
    add("--patience", type=int, default=15, help="epochs without a better validation score or loss before it stops")
    add("--batch", type=int, default=16, help="utterances")
    add("--lr", type=float, default=2e-3, help="of the head; halved after a third of the patience")
    add("--encoder-lr", type=float, default=1e-4, help="of the encoder, with --unfreeze")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where it runs")
    add("--out", default="runs/finetune", help="folder for the points")
    args = parser.parse_args()
    args.data = args.data or (args.root if args.task in SUPERB else "asterisk")
    for lam in args.lam:
        check_lam(lam)
    if args.features in ("encoder", "random") and not args.checkpoint:
        raise ValueError(f"--features {args.features} needs --checkpoint")
    if args.unfreeze and args.features not in ("encoder", "random"):
        raise ValueError(f"--unfreeze trains an encoder; --features {args.features} has none")
    for name in ("seeds", "slots", "beam", "epochs", "patience", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if not 0 <= args.ctc_weight < 1:
        raise ValueError(f"--ctc-weight is {args.ctc_weight}, expected 0 <= weight < 1")
    return args


class Heard:
    """What the head hears of each utterance: states[i] (L + 1, T, D) in half precision, and what it cost."""

    @torch.no_grad()
    def __init__(self, speech, features, encoder, lam, device):
        self.states, frames, started = [None] * len(speech), 0, time.time()
        order = sorted(range(len(speech)), key=lambda i: speech.utterances[i].samples)
        for k in tqdm(range(0, len(order), 16), desc=f"{features} at λ = {lam:g}", unit=" batches", leave=False):
            indices = order[k : k + 16]
            waveforms, lengths = (t.to(device) for t in pad([speech[i] for i in indices]))
            if features == "deaf":
                states, tokens = torch.zeros(1, len(indices), 1, 8), [1] * len(indices)
            elif features == "logmel":
                states, tokens = zip(*(log_mel(w[:n]) for w, n in zip(waveforms, lengths)))
                states = pad_sequence(states, batch_first=True)[None]
            else:
                out = encoder(waveforms, lengths, lam)
                states, tokens = torch.stack(out.hidden_states), out.lengths.tolist()
            frames += sum((n - 400) // 320 + 1 for n in lengths.tolist())
            for b, i in enumerate(indices):
                self.states[i] = states[:, b, : tokens[b]].half().cpu()
        self.tokens = sum(s.shape[1] for s in self.states)
        self.period_ms, self.seconds = FRAME_MS * frames / self.tokens, time.time() - started
        few = [speech[i] for i in order[:: max(1, len(order) // 20)]]
        self.gflops = transformer_gflops(encoder, few, lam, device) if encoder else 0.0

    def __call__(self, indices, device):
        """A batch: hidden states (B, L + 1, T, D), zero past each length, and lengths (B,)."""
        rows = [self.states[i].to(device).float() for i in indices]
        hidden = pad_sequence([row.transpose(0, 1) for row in rows], batch_first=True)     # (B, T, L + 1, D)
        return hidden.transpose(1, 2), torch.tensor([row.shape[1] for row in rows], device=device)


def log_mel(waveform):
    """80 log-mel channels at the CNN's frames: (samples,) -> (S, 80), S."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=320, n_mels=80, center=False)
    x = (mel(waveform.cpu()) + 1e-6).log().T
    return x, len(x)


def live(encoder, speech, lam):
    """As Heard, but with the encoder run anew, and trained, at every batch."""
    def heard(indices, device):
        waveforms, lengths = (t.to(device) for t in pad([speech[i] for i in indices]))
        out = encoder(waveforms, lengths, lam)
        return torch.stack(out.hidden_states, 1), out.lengths
    return heard


def score(task: Task, predicted: list, targets: list, metric="") -> float:
    """The task's metric in %, of predictions (heads.py) for targets (lists of symbol numbers, -1 for one that is not in train);
    or another metric that the task has."""
    metric = metric or task.metric
    if task.kind == "ctc" and metric in METRICS:
        spell = lambda numbers: [task.symbols[s] if s >= 0 else "\0" for s in numbers]
        return 100 * METRICS[metric]([spell(p) for p in predicted], [spell(t) for t in targets])
    if task.kind != "pool":
        edits = sum(torchaudio.functional.edit_distance(p, t) for p, t in zip(predicted, targets))
        return 100 * edits / sum(map(len, targets))
    scores = torch.stack(predicted).numpy()                                                # (N, symbols)
    if metric == "accuracy":                                                            # of several questions, all must be answered right
        starts = np.cumsum([0, *task.groups[:-1]])
        answers = [part.argmax(1) for part in np.split(scores, starts[1:], 1)]
        return 100 * float(np.mean((np.stack(answers, 1) + starts == np.array(targets)).all(1)))
    wanted = np.array([[s in t for s in range(scores.shape[1])] for t in targets])
    return 100 * float(np.mean([average_precision(scores[:, s], wanted[:, s]) for s in range(scores.shape[1]) if wanted[:, s].any()]))


def average_precision(scores, wanted):
    """Mean, over the wanted ones, of the precision among all that score at least as high."""
    wanted = wanted[np.argsort(-scores, kind="stable")]
    return (wanted.cumsum() / np.arange(1, len(wanted) + 1))[wanted].mean()


def build_head(args, task, layers, dim):
    n = len(task.symbols)
    if task.kind == "ctc":
        return CTCHead(layers, dim, n, args.head, args.slots)
    if task.kind == "seq2seq":
        return Seq2SeqHead(layers, dim, n, ctc_weight=args.ctc_weight, beam=args.beam)
    return PoolHead(layers, dim, n, several=task.metric == "mAP", groups=task.groups)


def train(args, task: Task, heard, seed, encoder=None):
    """Train a head until the validation split says stop. Returns a dict: test and validation score at the best validation
    epoch, epochs, infeasible utterances, and predictions on test."""
    torch.manual_seed(seed)
    number = {s: k for k, s in enumerate(task.symbols)}
    targets = [[number.get(s, -1) for s in ([t] if isinstance(t, str) else t)] for t in task.targets]
    with torch.no_grad():
        hidden, lengths = heard(task.indices("train")[:: max(1, len(task.indices("train")) // 200)], args.device)
    head = build_head(args, task, hidden.shape[1], hidden.shape[3]).to(args.device)
    head.mix.standardise(hidden, lengths)
    groups = [{"params": head.parameters()}] + ([{"params": encoder.parameters(), "lr": args.encoder_lr}] if encoder else [])
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01)
    slower = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=max(1, args.patience // 3))
    splits = {split: sorted(task.indices(split), key=lambda i: task.speech.utterances[i].samples) for split in ("train", "valid", "test")}
    better = (lambda a, b: a > b) if task.metric in HIGHER_IS_BETTER else (lambda a, b: a < b)

    def batches(split):
        rows = splits[split]
        return [rows[k : k + args.batch] for k in range(0, len(rows), args.batch)]

    def modules(training):
        head.train(training)
        if encoder:
            encoder.train(training)

    @torch.no_grad()
    def test(split):
        modules(False)
        loss, predicted, wanted, infeasible = 0.0, [], [], 0
        for batch in batches(split):
            hidden, lengths = heard(batch, args.device)
            wanted += [targets[i] for i in batch]
            known = [[s for s in targets[i] if s >= 0] for i in batch]
            loss += head.loss(hidden, lengths, known).item() * len(batch) / len(splits[split])
            predicted += head.predict(hidden, lengths)
            infeasible += head.infeasible(lengths, known) if task.kind == "ctc" else 0
        return loss, score(task, predicted, wanted), infeasible, predicted

    best, lowest, stale, kept = None, float("inf"), 0, None
    generator = np.random.default_rng(seed)
    bar = tqdm(range(args.epochs), desc=f"seed {seed}", unit=" epochs", leave=False)
    for epoch in bar:
        modules(True)
        shuffled = batches("train")
        for k in generator.permutation(len(shuffled)):
            hidden, lengths = heard(shuffled[k], args.device)
            loss = head.loss(hidden, lengths, [targets[i] for i in shuffled[k]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 5.0)
            optimizer.step()
        valid_loss, valid, _, _ = test("valid")
        slower.step(valid_loss)
        stale += 1
        if valid_loss < lowest:
            lowest, stale = valid_loss, 0
        if best is None or better(valid, best):
            best, stale = valid, 0
            kept = copy.deepcopy((head.state_dict(), encoder.state_dict() if encoder else None)), epoch
        bar.set_postfix_str(f"valid {task.metric} {valid:.1f} %, best {best:.1f} %, loss {valid_loss:.3f}")
        if stale >= args.patience:
            break
    head.load_state_dict(kept[0][0])
    if encoder:
        encoder.load_state_dict(kept[0][1])
    _, result, infeasible, predicted = test("test")
    shown = [predicted[splits["test"].index(i)] for i in splits["test"]][:5] if task.kind != "pool" else []
    join = "".join if task.kind == "ctc" and task.metric != "PER" else " ".join
    second = {f"test {task.second}": score(task, predicted, [targets[i] for i in splits["test"]], task.second)} if task.second else {}
    return {"test": result, **second, "valid": best, "epochs": epoch + 1, "best_epoch": kept[1] + 1, "infeasible_test": infeasible,
            "test_utterances": len(splits["test"]),
            "examples": [{"wanted": join(task.targets[i]), "predicted": join(task.symbols[s] for s in p)} for i, p in zip(splits["test"], shown)]}


def main():
    args = arguments()
    encoder = OFAEncoder.from_checkpoint(args.checkpoint).to(args.device) if args.features in ("encoder", "random") else None
    task = load_superb(args.task, args.data, args.fold) if args.task in SUPERB else load_task(args.task, args.data, args.root)
    if encoder and args.features == "random":
        torch.manual_seed(0)
        encoder = OFAEncoder(encoder.config).to(args.device).eval()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in vars(args).items() if k not in ("lam", "seeds", "out", "root", "device", "fold" if args.task != "er" else "")}
    config["checkpoint_sha1"] = hashlib.sha1(Path(args.checkpoint).read_bytes()).hexdigest()[:12] if encoder else None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    for lam in args.lam if args.features in ("encoder", "random") else [0.0]:
        heard = None
        for seed in range(args.seeds):
            path = out / f"{args.task}-{args.features}-lam{lam:g}-seed{seed}.json"
            if path.exists():
                there = json.loads(path.read_text())["config"]
                if there != {**config, "lam": lam, "seed": seed}:
                    differ = sorted(k for k in config if there.get(k) != config[k])
                    raise ValueError(f"{path} is of another configuration ({', '.join(differ)} differ): choose another --out")
                print(f"{path} is there")
                continue
            heard = heard or Heard(task.speech, args.features, encoder, lam, args.device)
            started, learner = time.time(), copy.deepcopy(encoder) if args.unfreeze else None
            point = train(args, task, live(learner, task.speech, lam) if learner else heard, seed, learner)
            point = {"config": {**config, "lam": lam, "seed": seed}, "metric": task.metric, **point, "frame_period_ms": heard.period_ms,
                     "tokens": heard.tokens, "transformer_gflops_per_s": heard.gflops, "encode_s": heard.seconds,
                     "train_s": time.time() - started, "commit": commit, "date": time.strftime("%Y-%m-%d")}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(point, indent=1, ensure_ascii=False))
            partial.replace(path)
            infeasible = f", {point['infeasible_test']} of {point['test_utterances']} too short for CTC" if task.kind == "ctc" else ""
            print(f"λ = {lam:g} ({heard.period_ms:.1f} ms), seed {seed}: test {task.metric} {point['test']:.1f} % after {point['epochs']} "
                  f"epochs, {point['train_s']:.0f} s{infeasible}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped; the same command goes on from the last finished point")
