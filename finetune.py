"""Downstream tasks at any rate: a small head on the frozen encoder, trained to a plateau, at each λ and seed asked for.

    what is heard of an utterance at λ (heard.py) ─ head (heads.py) ─ symbols or labels (tasks.py)

Tasks are in tasks.py, those of SUPERB in superb.py. Baselines have the same head and hear something else (--features). An
utterance that λ makes too short for its text under CTC is counted (infeasible) and scored like any other.
A score that is no better than guessing is printed with a warning.

Every point, one λ and one seed, is a JSON file in --out with configuration, metric and cost. A point that is there is not
computed again, so a sweep goes on where it was stopped; a file of another configuration is refused.

Source: the protocol of SUPERB (Yang et al., Interspeech 2021); the curve over λ: Chen, Meng and Lee, ICASSP 2023.

    python finetune.py                                                       characters with checkpoints/ofa-tiny.pt at λ = 0, in a minute or two
    python finetune.py --checkpoint runs/demo/encoder.pt --task ctc --lam 0 0.5 1 --seeds 3 --out runs/ctc
    python finetune.py --checkpoint runs/demo/encoder.pt --task pool --data my.tsv --save-heads      then predict.py labels recordings
    python finetune.py --checkpoint runs/base/encoder.pt --task asr --head superb --data my/corpora
"""

import argparse
import copy
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import nn
from tqdm import tqdm

from ofa_encoder import OFAEncoder, check_lam
from parts.cache import FEATURES, FrameCache, HiddenStateCache, TrainableSource, UnfrozenEncoder
from parts.data import SPLITS
from parts.heads import HEADS
from parts.runs import (
    HIGHER_IS_BETTER,
    already_done,
    better,
    check_numbers,
    command,
    cost_of,
    pick_device,
    save,
    save_point,
    use_bf16,
    warning,
)
from parts.superb import SUPERB, SUPERB_METRICS, load_superb
from parts.tasks import KINDS, Task, load_task


def build_parser(
    description="Train a head on the encoder at each λ and seed.", lam="each λ to train a head at"
):
    """The flags, which adaptive_lambda.py adds to."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default="checkpoints/ofa-tiny.pt",
        help="encoder.pt or checkpoint.pt of pretrain.py; not read if --features is logmel or deaf",
    )
    add(
        "--task",
        choices=[*KINDS, *SUPERB],
        default="ctc",
        help="what to predict: see tasks.py and superb.py",
    )
    add(
        "--data",
        help="asterisk (the default), or a TSV with columns path, text or label, and optionally split; for SUPERB's tasks a folder with "
        "the data set, by default that of --root",
    )
    add("--root", default="data", help="folder of the embedded corpus")
    add(
        "--fold",
        type=int,
        choices=range(1, 6),
        default=1,
        help="session of IEMOCAP that er is tested on",
    )
    add(
        "--features",
        choices=FEATURES,
        default="encoder",
        help="what the head hears: the encoder, or a baseline",
    )
    add("--lam", type=float, nargs="+", default=[0.0], help=lam)
    add("--seeds", type=int, default=1, help="heads for each λ")
    add("--seed", type=int, default=0, help="of the first of them; the next ones count up")
    add(
        "--keep",
        choices=("memory", "nothing"),
        default="memory",
        help="what is heard is computed once and kept, or at every batch",
    )
    add(
        "--unfreeze",
        action="store_true",
        help="train the encoder too (slow: nothing is kept between epochs)",
    )
    add("--head", choices=("blstm", "linear", "superb"), default="blstm", help="what CTC stands on")
    add("--symbols-per-token", type=int, default=1, help="symbols that a token may emit under CTC")
    add("--ctc-weight", type=float, default=0.3, help="part of a joint CTC loss in seq2seq, 0 to 1")
    add("--beam", type=int, default=1, help="hypotheses of seq2seq; 1: greedy")
    add("--epochs", type=int, default=120, help="at most")
    add(
        "--patience",
        type=int,
        default=12,
        help="epochs without a better validation score or loss before it stops",
    )
    add("--batch", type=int, default=16, help="utterances")
    add("--lr", type=float, default=2e-3, help="of the head; halved after a third of the patience")
    add("--encoder-lr", type=float, default=1e-4, help="of the encoder, with --unfreeze")
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="in training: see pretrain.py",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: the best there is",
    )
    add("--out", default="runs/finetune", help="folder for the points")
    add(
        "--save-heads",
        action="store_true",
        help="keep each head, with its encoder, as a .pt beside its point: predict.py uses it",
    )
    return parser


def check(args):
    """Refuse values that can't be; settle the data, whose default depends on the task, and the device."""
    args.data = args.data or (args.root if args.task in SUPERB else "asterisk")
    for lam in args.lam:
        check_lam(lam)
    args.device = pick_device(args.device).type
    if args.features in ("logmel", "deaf") and any(args.lam):
        raise ValueError(f"--lam is for the encoder; --features {args.features} has no λ")
    if args.save_heads and args.features in ("logmel", "deaf"):
        raise ValueError(
            f"--save-heads keeps a head with its encoder; --features {args.features} has none"
        )
    if args.unfreeze and args.features not in ("encoder", "random"):
        raise ValueError(f"--unfreeze trains an encoder; --features {args.features} has none")
    check_numbers(
        args,
        "seeds",
        "symbols_per_token",
        "beam",
        "epochs",
        "patience",
        "batch",
        "lr",
        "encoder_lr",
    )
    check_numbers(args, "seed", zero=True)
    if not 0 <= args.ctc_weight < 1:
        raise ValueError(f"--ctc-weight is {args.ctc_weight}, expected 0 <= weight < 1")


def score(task: Task, predicted: list, targets: list, metric="") -> float:
    """The task's metric in %, of predictions (heads.py) for targets (lists of symbol numbers, -1 for one that is not in train);
    or another metric that the task has."""
    metric = metric or task.metric
    if task.kind == "ctc" and metric in SUPERB_METRICS:
        spell = lambda numbers: [task.symbols[s] if s >= 0 else "\0" for s in numbers]
        return 100 * SUPERB_METRICS[metric](
            [spell(p) for p in predicted], [spell(t) for t in targets]
        )
    if task.kind != "pool":
        edits = sum(torchaudio.functional.edit_distance(p, t) for p, t in zip(predicted, targets))
        return 100 * edits / sum(map(len, targets))
    scores = torch.stack(predicted).numpy()  # (N, symbols)
    if metric == "accuracy":  # of several questions, all must be answered right
        starts = np.cumsum([0, *task.groups[:-1]])
        answers = [part.argmax(1) for part in np.split(scores, starts[1:], 1)]
        return 100 * float(np.mean((np.stack(answers, 1) + starts == np.array(targets)).all(1)))
    wanted = np.array([[s in t for s in range(scores.shape[1])] for t in targets])
    return 100 * float(
        np.mean(
            [
                average_precision(scores[:, s], wanted[:, s])
                for s in range(scores.shape[1])
                if wanted[:, s].any()
            ]
        )
    )


def average_precision(scores, wanted):
    """Mean, over the wanted ones, of the precision among all that score at least as high."""
    as_high = scores >= scores[wanted][:, None]  # (wanted, all)
    return ((as_high & wanted).sum(1) / as_high.sum(1)).mean()


def guessing(task: Task, predicted: list, targets: list) -> float:
    """What guessing reaches on these utterances. The head's answers are dealt out among them at
    random: they are as long and as frequent as before, but whose they are is lost. A head that
    has learned only which answers are common scores the same. Best of 20 deals."""
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(20):
        order = generator.permutation(len(predicted))
        scores.append(score(task, [predicted[k] for k in order], targets))
    return max(scores) if task.metric in HIGHER_IS_BETTER else min(scores)


def build_head(args, task, layers, dim):
    sizes = {"layers": layers, "dim": dim, "symbols": len(task.symbols)}
    if task.kind == "ctc":
        sizes |= {"shape": args.head, "symbols_per_token": args.symbols_per_token}
    elif task.kind == "seq2seq":
        longest = max(len(task.targets[i]) for i in task.indices("train"))
        sizes |= {"ctc_weight": args.ctc_weight, "beam": args.beam, "max_symbols": longest}
    else:
        sizes |= {"multi_label": task.metric == "mAP", "groups": list(task.groups)}
    head = HEADS[task.kind](**sizes)
    head.sizes = sizes  # predict.py builds it anew from these
    return head


def save_head(path, head, encoder, lam, task):
    """All that predict.py needs: the head, its encoder and λ, and how to spell the answer."""
    spelling = {
        "kind": task.kind,
        "symbols": task.symbols,
        "between": "" if task.kind == "ctc" and task.metric != "PER" else " ",
    }
    save(
        {
            **encoder.checkpoint(),
            "lam": lam,
            "head": head.state_dict(),
            "sizes": head.sizes,
            **spelling,
        },
        path,
    )


def train(args, task: Task, heard: HiddenStateCache | TrainableSource, seed):
    """Train a head on what is heard, and a TrainableSource with it, until the validation split says stop; test it as it was at the
    epoch with the best validation score. Returns the part of a point that says how it went, and the head."""
    torch.manual_seed(seed)
    number = {s: k for k, s in enumerate(task.symbols)}
    targets = [
        [number.get(s, -1) for s in ([t] if isinstance(t, str) else t)] for t in task.targets
    ]
    learner = heard if isinstance(heard, TrainableSource) else TrainableSource()
    with torch.no_grad():
        learner.eval()
        some = task.indices("train")[:: max(1, len(task.indices("train")) // 200)]
        some = [heard(some[k : k + args.batch]) for k in range(0, len(some), args.batch)]
        rows = torch.cat(
            [h[:, :n] for hidden, lengths in some for h, n in zip(hidden, lengths)], 1
        )  # (L + 1, tokens, D)
    head = build_head(args, task, rows.shape[0], rows.shape[2]).to(args.device)
    head.mix.standardise(rows)
    trained = nn.ModuleList([head, learner])
    groups = [{"params": head.parameters()}, *learner.groups]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01)
    slower = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=0.5,
        patience=max(1, args.patience // 3),
        min_lr=[group.get("min_lr", 0.0) for group in groups],
    )
    bf16 = use_bf16(args, torch.device(args.device))
    splits = {
        split: sorted(task.indices(split), key=lambda i: task.speech.utterances[i].samples)
        for split in SPLITS
    }

    def batches(split):
        rows = splits[split]
        return [rows[k : k + args.batch] for k in range(0, len(rows), args.batch)]

    @torch.no_grad()
    def measure(split):
        trained.eval()
        loss, predicted, wanted, infeasible = 0.0, [], [], 0
        for batch in batches(split):
            hidden, lengths = heard(batch)
            wanted += [targets[i] for i in batch]
            known = [[s for s in targets[i] if s >= 0] for i in batch]
            loss += (
                (head.loss(hidden, lengths, known).item() + float(learner.cost))
                * len(batch)
                / len(splits[split])
            )
            predicted += head.predict(hidden, lengths)
            infeasible += head.infeasible(lengths, known) if task.kind == "ctc" else 0
        return loss, score(task, predicted, wanted), infeasible, predicted

    best, lowest, stale, kept, history = None, float("inf"), 0, None, []
    generator = np.random.default_rng(seed)
    bar = tqdm(range(args.epochs), desc=f"seed {seed}", unit=" epochs", leave=False)
    for epoch in bar:
        trained.train()
        shuffled, train_loss = batches("train"), 0.0
        for k in generator.permutation(len(shuffled)):
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                hidden, lengths = heard(shuffled[k])
                loss = head.loss(hidden, lengths, [targets[i] for i in shuffled[k]]) + learner.cost
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained.parameters(), 5.0)
            if not norm.isfinite():
                raise FloatingPointError(
                    f"seed {seed}, epoch {epoch + 1}: loss {loss.item()}, gradient {norm.item()}, utterances "
                    f"{[task.speech.utterances[i].id for i in shuffled[k]]}; try a smaller --lr"
                )
            optimizer.step()
            train_loss += loss.item() / len(shuffled)
        valid_loss, valid, _, _ = measure("valid")
        history.append(
            {"train_loss": train_loss, "valid_loss": valid_loss, "valid": valid, **learner.watch()}
        )
        slower.step(valid_loss)
        stale += 1
        if valid_loss < lowest:
            lowest, stale = valid_loss, 0
        if best is None or better(task.metric, valid, best):
            best, stale, kept = valid, 0, (copy.deepcopy(trained.state_dict()), epoch)
        bar.set_postfix_str(
            f"valid {task.metric} {valid:.1f} %, best {best or valid:.1f} %, loss {valid_loss:.3f}"
        )
        if stale >= args.patience:
            break
    if learner.keep_last:
        best, kept = valid, (trained.state_dict(), epoch)
    trained.load_state_dict(kept[0])
    _, result, infeasible, predicted = measure("test")
    infeasible_train = (
        0
        if task.kind != "ctc"
        else sum(
            head.infeasible(heard(batch)[1], [targets[i] for i in batch])
            for batch in batches("train")
        )
    )
    join = "".join if task.kind == "ctc" and task.metric != "PER" else " ".join
    examples = (
        []
        if task.kind == "pool"
        else [
            {"wanted": join(task.targets[i]), "predicted": join(task.symbols[s] for s in p)}
            for i, p in zip(splits["test"][::40], predicted[::40])
        ]
    )
    wanted = [targets[i] for i in splits["test"]]
    second = {}
    if task.second:
        second = {f"test {task.second}": score(task, predicted, wanted, task.second)}
    point = {
        "metric": task.metric,
        "test": result,
        **second,
        "guessing": guessing(task, predicted, wanted),
        "valid": best,
        "epochs": epoch + 1,
        "best_epoch": kept[1] + 1,
        "infeasible_test": infeasible,
        "infeasible_train": infeasible_train,
        "test_utterances": len(splits["test"]),
        "bf16": bf16,
        "examples": examples,
        "history": history,
    }
    return point, head


def prepare(args):
    """The encoder (None for logmel and deaf), the task, and what a point says about its configuration."""
    encoder = (
        OFAEncoder.from_checkpoint(args.checkpoint).to(args.device)
        if args.features in ("encoder", "random")
        else None
    )
    task = (
        load_superb(args.task, args.data, args.fold)
        if args.task in SUPERB
        else load_task(args.task, args.data, args.root)
    )
    config = {
        k: v
        for k, v in vars(args).items()
        if k not in ("lam", "seeds", "seed", "out", "root", "device", "keep", "save_heads")
    }
    config["checkpoint_sha1"] = (
        hashlib.sha1(Path(args.checkpoint).read_bytes()).hexdigest()[:12] if encoder else None
    )
    config["data_sha1"] = (
        hashlib.sha1(Path(args.data).read_bytes()).hexdigest()[:12]
        if Path(args.data).is_file()
        else None
    )
    if encoder and encoder.config.compression != "cif" and any(args.lam):
        raise ValueError(
            f"{args.checkpoint} has one fixed rate ({encoder.config.compression}): leave --lam at 0"
        )
    if encoder and args.features == "random":
        torch.manual_seed(0)
        encoder = OFAEncoder(encoder.config).to(args.device).eval()
    if encoder:
        encoder.requires_grad_(args.unfreeze)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return encoder, task, config


def main():
    parser = build_parser()
    args = parser.parse_args()
    check(args)
    encoder, task, config = prepare(args)
    frames = None
    for lam in args.lam if encoder else [0.0]:
        heard = None
        for seed in range(args.seed, args.seed + args.seeds):
            path = Path(args.out) / f"{args.task}-{args.features}-lam{lam:g}-seed{seed}.json"
            if (
                already_done(path, {**config, "lam": lam, "seed": seed})
                and path.with_suffix(".pt").exists() >= args.save_heads
            ):
                continue
            if encoder and not frames and not args.unfreeze:
                frames = FrameCache(task.speech, encoder, args.device, args.keep == "memory")
            if args.unfreeze:
                learner = UnfrozenEncoder(
                    task.speech, copy.deepcopy(encoder), lam, args.device, args.encoder_lr
                )
            else:
                learner = heard = heard or HiddenStateCache(
                    task.speech,
                    args.features,
                    encoder,
                    lam,
                    args.device,
                    frames,
                    args.keep == "memory",
                )
            started = time.time()
            point, head = train(args, task, learner, seed)
            if args.save_heads:
                save_head(path.with_suffix(".pt"), head, learner.encoder, lam, task)
            if args.unfreeze:  # the cost of the encoder that it has become
                frames = FrameCache(task.speech, learner.encoder, args.device, keep=False)
                heard = HiddenStateCache(
                    task.speech,
                    args.features,
                    learner.encoder,
                    lam,
                    args.device,
                    frames,
                    keep=False,
                )
            save_point(
                path,
                {
                    "config": {**config, "lam": lam, "seed": seed},
                    "command": command("finetune.py", parser, args, lam, seed),
                    **point,
                    **cost_of(heard, frames),
                    "train_s": time.time() - started,
                },
            )
            infeasible = (
                f", {point['infeasible_test']} of {point['test_utterances']} too short for CTC"
                if task.kind == "ctc"
                else ""
            )
            print(
                f"λ = {lam:g} ({heard.period_ms:.1f} ms), seed {seed}: test {task.metric} {point['test']:.1f} %, best of {point['epochs']} "
                f"epochs, {time.time() - started:.0f} s{infeasible}{warning(point)}"
            )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: stopped; the same command goes on from the last finished point")
