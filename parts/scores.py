"""Scores: what a head's predictions are worth.

    ctc, seq2seq   error rates (CER, PER, WER): edits per symbol, or word, of the target
    pool           accuracy, or mAP where several labels may apply: mean average precision
    SUPERB         slot-type F1 and others, in parts/superb.py

All are in %. `guessing` says what a score is to be compared with, and `bootstrap` how much it owes
to the utterances that happen to be in the test split.
"""

import numpy as np
import torch
from torchaudio.functional import edit_distance

from parts.runs import HIGHER_IS_BETTER
from parts.superb import SUPERB_METRICS
from parts.tasks import Task


def score(task: Task, predicted: list, targets: list, metric="") -> float:
    """The task's metric, or another one that it has, in %.

    predicted: what a head's `predict` returns, for each utterance symbol numbers (ctc, seq2seq) or
    the scores of all labels (pool). targets: lists of symbol numbers, -1 for a symbol that train
    does not have.
    """
    metric = metric or task.metric
    if task.kind == "pool":
        scores = torch.stack(predicted).numpy()  # (N, labels)
        if metric == "accuracy":
            return 100 * accuracy(scores, targets, task.groups)
        return 100 * mean_average_precision(scores, targets)

    if metric in SUPERB_METRICS:  # these need the symbols, not their numbers
        return 100 * SUPERB_METRICS[metric](
            [to_symbols(task, numbers) for numbers in predicted],
            [to_symbols(task, numbers) for numbers in targets],
        )

    # Error rates (CER, PER, WER): edits from prediction to target, per unit of the target.
    edits, counts = zip(*(edits_of(task, p, t) for p, t in zip(predicted, targets)))
    return 100 * sum(edits) / sum(counts)


def edits_of(task, predicted, target) -> tuple[int, int]:
    """How many edits lead from one prediction to its target, and how long the target is. What is
    counted are symbols; words, where symbols are letters and the metric is WER (SUPERB's asr)."""
    if task.kind == "ctc" and task.metric == "WER":
        predicted = "".join(to_symbols(task, predicted)).split()
        target = "".join(to_symbols(task, target)).split()
    return edit_distance(predicted, target), len(target)


DRAWS = 200  # of bootstrap


def bootstrap(task: Task, predicted: list, targets: list, utterances: list[int]) -> list[float]:
    """The score on DRAWS test splits that might have been, drawn from this one with replacement.

    utterances: which of the task's they are. Whole groups are drawn (a prompt with all its
    languages), since utterances of a group are alike. The draws depend on the groups alone, so two
    heads for one task can be compared draw by draw. Source: Efron and Tibshirani, "An introduction
    to the bootstrap", 1993; for error rates: Bisani and Ney, ICASSP 2004.
    """
    group_of = [task.speech.utterances[i].group for i in utterances]
    members = {group: [] for group in sorted(set(group_of))}
    for k, group in enumerate(group_of):
        members[group].append(k)
    members = list(members.values())
    random = np.random.default_rng(0)
    draws = random.integers(len(members), size=(DRAWS, len(members)))

    if task.kind == "pool" or task.metric in SUPERB_METRICS:
        return [
            score(task, [predicted[k] for k in some], [targets[k] for k in some])
            for some in ([k for g in draw for k in members[g]] for draw in draws)
        ]
    # Error rates: what each group has of edits and of symbols, or words, is counted once.
    of_groups = []
    for group in members:
        of_groups.append(np.sum([edits_of(task, predicted[k], targets[k]) for k in group], 0))
    edits, counts = np.array(of_groups).T
    return (100 * edits[draws].sum(1) / counts[draws].sum(1)).tolist()


def to_symbols(task, numbers) -> list[str]:
    """The symbols of these numbers; a null character, which no text has, for one not in train."""
    return [task.symbols[number] if number >= 0 else "\0" for number in numbers]


def accuracy(scores, targets, groups) -> float:
    """Part of the utterances whose label scores highest: scores (N, labels), targets N lists.

    With several questions, each has its own group of labels, and all must be answered right.
    """
    starts = np.cumsum([0, *groups[:-1]])  # the first label of each group
    of_each_group = np.split(scores, starts[1:], 1)
    answers = np.stack([group.argmax(1) for group in of_each_group], 1) + starts  # (N, groups)
    return float(np.mean((answers == np.array(targets)).all(1)))


def mean_average_precision(scores, targets) -> float:
    """Mean of average_precision over the labels that occur: scores (N, labels), targets N lists."""
    precisions = []
    for label in range(scores.shape[1]):
        wanted = np.array([label in labels for labels in targets])
        if wanted.any():
            precisions.append(average_precision(scores[:, label], wanted))
    return float(np.mean(precisions))


def average_precision(scores, wanted):
    """Mean, over the wanted ones, of the precision among all that score at least as high.

    scores (N,), wanted (N,) of bool.
    """
    as_high = scores >= scores[wanted][:, None]  # (wanted, all)
    return ((as_high & wanted).sum(1) / as_high.sum(1)).mean()


def guessing(task: Task, predicted: list, targets: list) -> float:
    """The score that guessing reaches on these utterances.

    The head's answers are dealt out among the utterances at random: they are as long and as
    frequent as before, but whose they are is lost. A head that has learned only which answers are
    common scores the same. Best of 20 deals.
    """
    random = np.random.default_rng(0)
    scores = []
    for _ in range(20):
        order = random.permutation(len(predicted))
        scores.append(score(task, [predicted[k] for k in order], targets))
    return max(scores) if task.metric in HIGHER_IS_BETTER else min(scores)
