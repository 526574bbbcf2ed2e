"""Small heads on the encoder's hidden states, as SUPERB has them.

The encoder gives L + 1 hidden states h_l for each token. Every head first standardises them, and
sums them with learned weights w (`Mix`):

    x = W Σ_l softmax(w)_l · (h_l - mean_l) / std_l        (B, L + 1, T, D) -> (B, T, width)

What follows depends on the kind of task:

    CTCHead      BiLSTMs or none, and a linear layer. Each token emits one symbol or the blank;
                 with symbols_per_token = k, it does so k times.
    Seq2SeqHead  a BiLSTM, and a Transformer decoder that attends to its output; greedy or beam
                 search; optionally a joint CTC loss.
    PoolHead     the mean over tokens, and a linear layer.

Each has loss(hidden, lengths, targets), a scalar, and predict(hidden, lengths), a list with an
answer for each utterance, where

    hidden   (B, L + 1, T, D), padded
    lengths  (B,), in tokens
    targets  a list of symbol numbers for each utterance

Heads read tokens, however few, so they need no `expand`: only distillation compares the encoder
with a teacher frame by frame. CTC alone depends on the rate, since it can't emit more symbols than
there are tokens (times symbols_per_token): `infeasible` counts the utterances that are too short.

A head that is to serve any rate is told how long each token is (told=True): see `tell`.

A new head is a class here and an entry in HEADS, under the kind of task (tasks.py) it is for. The
one other place is finetune.build_head, which sets its options.

Sources: SUPERB: Yang et al., Interspeech 2021. CTC: Graves et al., ICML 2006. Joint CTC and
attention: Kim, Hori and Watanabe, ICASSP 2017. Decoder: Vaswani et al., NeurIPS 2017.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    ctc_loss,
    log_softmax,
)
from torch.nn.utils.rnn import pad_sequence

DROPOUT = 0.2
CTC_SHAPES = {  # width, and how many BiLSTMs of that width in each direction
    "linear": (256, 0),
    "blstm": (128, 1),
    "superb": (1024, 2),  # SUPERB's own for speech recognition
}


# 1. What several heads are built from.


def tell(hidden, durations) -> Tensor:
    """Hidden states (B, L + 1, T, D) with one more number each, (B, L + 1, T, D + 1), that tells
    a head how long the token is: ln(duration in frames), which is 0 at λ = 0.

    durations (B, T): of the tokens, in frames, as Encoded.durations returns them.
    """
    told = durations.clamp(min=0.1).log() * (durations > 0)  # (B, T), 0 in the padding too
    told = told[:, None, :, None]  # (B, 1, T, 1)
    return torch.cat([hidden, told.expand(-1, hidden.shape[1], -1, -1).to(hidden)], 3)


class Mix(nn.Module):
    """Weighted sum of the standardised hidden states, projected: (B, L + 1, T, D) -> (B, T, width).

    layers: how many hidden states there are, L + 1; dim: their size D. told: they carry one more
    number, that of `tell`, by which each channel of the result is scaled and shifted (FiLM, Perez
    et al., AAAI 2018). So one head can serve tokens of any length.
    """

    def __init__(self, layers, dim, width, told=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, 1, dim))
        self.register_buffer("std", torch.ones(layers, 1, dim))
        self.weights = nn.Parameter(torch.zeros(layers))
        self.project = nn.Linear(dim, width)
        self.told = None
        if told:
            self.told = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2 * width))
            nn.init.zeros_(self.told[2].weight)  # at first it changes nothing
            nn.init.zeros_(self.told[2].bias)

    def standardise(self, rows):
        """Take mean and standard deviation of each dimension from rows (L + 1, tokens, D), or D + 1
        if they carry what the head is told.

        Some of an encoder's dimensions vary little around a large mean. A head would spend its
        first epochs on learning to subtract it.
        """
        rows = rows[:, :, : self.mean.shape[2]]
        self.mean.copy_(rows.mean(1, keepdim=True))
        self.std.copy_(rows.std(1, keepdim=True, unbiased=False) + 1e-5)

    def forward(self, hidden):
        told = hidden[:, 0, :, self.mean.shape[2] :]  # (B, T, 1), or without it (B, T, 0)
        standard = (hidden[:, :, :, : self.mean.shape[2]] - self.mean) / self.std
        mixed = torch.einsum("l,bltd->btd", self.weights.softmax(0), standard)  # (B, T, D)
        x = self.project(mixed)
        if self.told:
            scale, shift = self.told(told).chunk(2, 2)  # (B, T, width) each
            x = x * (1 + scale) + shift
        return x


def reverse(x, lengths) -> Tensor:
    """x (B, T, C) with each utterance back to front within its length; padding stays in place."""
    steps = torch.arange(x.shape[1], device=x.device)  # (T,)
    ends = lengths[:, None]
    source = torch.where(steps < ends, ends - 1 - steps, steps)  # (B, T)
    return x.gather(1, source[:, :, None].expand(x.shape))


class BiLSTM(nn.Module):
    """LSTMs in both directions: x (B, T, D) -> (B, T, 2 · width).

    The backward LSTM reads each utterance reversed within its length. The result is that of packed
    sequences, which are several times slower on a CPU.
    """

    def __init__(self, dim, width):
        super().__init__()
        self.forwards = nn.LSTM(dim, width, batch_first=True)
        self.backwards = nn.LSTM(dim, width, batch_first=True)

    def forward(self, x, lengths):
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(reverse(x, lengths))
        return torch.cat([ahead, reverse(back, lengths)], 2)


def padding_of(x, lengths) -> Tensor:
    """True where x (B, T, C) is padding: (B, T)."""
    return torch.arange(x.shape[1], device=x.device) >= lengths[:, None]


def mean_ctc_loss(log_probs, lengths, targets, blank) -> Tensor:
    """The CTC loss per symbol of each text, and the mean of that over utterances.

    log_probs (B, N, symbols + 1), lengths (B,) in steps of N, targets: a tensor for each utterance.
    An utterance too short for its text has an infinite loss, which is taken as 0.
    """
    sizes = torch.tensor([len(t) for t in targets], device=log_probs.device)
    steps_first = log_probs.transpose(0, 1)  # (N, B, symbols + 1)
    return ctc_loss(steps_first, torch.cat(targets), lengths, sizes, blank, zero_infinity=True)


def as_tensors(targets, device) -> list[Tensor]:
    return [torch.as_tensor(t, dtype=torch.long, device=device) for t in targets]


# 2. CTC.


def emissions(text) -> int:
    """How much CTC must emit for a text: its symbols, and a blank between two equal ones."""
    repeats = sum(a == b for a, b in zip(text, text[1:]))
    return len(text) + repeats


def collapse(path, blank) -> list[int]:
    """The text of a CTC path: a symbol that is repeated counts once, and blanks are dropped."""
    text = []
    before = blank
    for symbol in path:
        if symbol not in (blank, before):
            text.append(symbol)
        before = symbol
    return text


class CTCHead(nn.Module):
    """CTC over `symbols` symbols. shape: one of CTC_SHAPES."""

    BLANK = 0  # the symbols follow it, so symbol s of a text has number s + 1 inside this class

    def __init__(self, layers, dim, symbols: int, shape="blstm", symbols_per_token=1, told=False):
        super().__init__()
        width, depth = CTC_SHAPES[shape]
        self.symbols_per_token = symbols_per_token
        self.mix = Mix(layers, dim, width, told)
        self.lstms = nn.ModuleList()
        size = width
        for _ in range(depth):
            self.lstms.append(BiLSTM(size, width))
            size = 2 * width
        self.dropout = nn.Dropout(DROPOUT)
        self.out = nn.Linear(size, symbols_per_token * (symbols + 1))

    def forward(self, hidden, lengths):
        """Log-probabilities of blank and symbols: (B, T · symbols_per_token, symbols + 1)."""
        x = self.dropout(self.mix(hidden))
        for lstm in self.lstms:
            x = self.dropout(lstm(x, lengths))
        x = self.out(x)  # (B, T, symbols_per_token · (symbols + 1))
        emitted = x.view(len(x), x.shape[1] * self.symbols_per_token, -1)
        return log_softmax(emitted.float(), 2)

    def loss(self, hidden, lengths, targets):
        numbers = [t + 1 for t in as_tensors(targets, hidden.device)]
        log_probs = self(hidden, lengths)
        return mean_ctc_loss(log_probs, lengths * self.symbols_per_token, numbers, self.BLANK)

    def infeasible(self, lengths, targets) -> int:
        """How many of the utterances have too few tokens for their text."""
        possible = (lengths * self.symbols_per_token).tolist()
        return sum(emissions(t) > most for t, most in zip(targets, possible))

    @torch.no_grad()
    def predict(self, hidden, lengths):
        """A list of symbol numbers for each utterance: the text of the most probable path."""
        paths = self(hidden, lengths).argmax(2).tolist()
        steps = (lengths * self.symbols_per_token).tolist()
        texts = [collapse(path[:n], self.BLANK) for path, n in zip(paths, steps)]
        return [[number - 1 for number in text] for text in texts]


# 3. Attention.


def sinusoids(x: Tensor) -> Tensor:
    """x (B, T, C) plus an encoding of the positions 0 .. T - 1 (Vaswani et al., section 3.5)."""
    positions = torch.arange(x.shape[1], device=x.device)[:, None]
    exponents = torch.arange(0, x.shape[2], 2, device=x.device) / x.shape[2]
    angle = positions / 10000**exponents  # (T, C / 2)
    return x + torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # sin, cos, sin, cos, …


class Seq2SeqHead(nn.Module):
    """Attention decoder. The number after the last symbol, `symbols`, both starts and ends a text.

    ctc_weight: the part of the joint CTC loss, 0 to 1; beam: hypotheses of the beam search, 1 for
    greedy; max_symbols: length of the longest text that is predicted.
    """

    WIDTH = 128
    DEPTH = 2  # layers of the decoder
    ATTENTION_HEADS = 4

    def __init__(
        self, layers, dim, symbols: int, ctc_weight=0.0, beam=1, max_symbols=30, told=False
    ):
        super().__init__()
        width = self.WIDTH
        self.end = symbols
        self.ctc_weight = ctc_weight
        self.beam = beam
        self.max_symbols = max_symbols
        self.mix = Mix(layers, dim, width, told)
        self.lstm = BiLSTM(width, width)
        self.join = nn.Linear(2 * width, width)
        self.embed = nn.Embedding(symbols + 1, width)
        self.dropout = nn.Dropout(DROPOUT)
        layer = nn.TransformerDecoderLayer(
            width, self.ATTENTION_HEADS, 4 * width, DROPOUT, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, self.DEPTH, nn.LayerNorm(width))
        self.out = nn.Linear(width, symbols + 1)
        self.ctc = nn.Linear(width, symbols + 1) if ctc_weight else None  # its blank is `end`

    def memory(self, hidden, lengths):
        """What the decoder attends to: vectors (B, T, C), and where they are padding (B, T)."""
        x = self.dropout(self.mix(hidden))
        x = self.join(self.dropout(self.lstm(x, lengths)))
        return x, padding_of(x, lengths)

    def decode(self, memory, padding, text):
        """Log-probabilities of each next symbol: text (B, N) -> (B, N, symbols + 1)."""
        n = text.shape[1]
        future = torch.ones(n, n, dtype=torch.bool, device=text.device).triu(1)
        x = sinusoids(self.embed(text) * math.sqrt(self.WIDTH))
        x = self.decoder(x, memory, future, memory_key_padding_mask=padding)
        return log_softmax(self.out(x).float(), 2)

    def loss(self, hidden, lengths, targets):
        """Label-smoothed cross entropy of each next symbol, and of the end."""
        memory, padding = self.memory(hidden, lengths)
        targets = as_tensors(targets, hidden.device)
        end = torch.tensor([self.end], device=hidden.device)

        # The decoder is given a text up to some symbol, and has to predict the next one.
        given = [torch.cat([end, t]) for t in targets]
        wanted = [torch.cat([t, end]) for t in targets]
        given = pad_sequence(given, batch_first=True, padding_value=self.end)  # (B, N)
        wanted = pad_sequence(wanted, batch_first=True, padding_value=-100)  # -100 is ignored
        log_probs = self.decode(memory, padding, given)  # (B, N, symbols + 1)
        loss = cross_entropy(log_probs.flatten(0, 1), wanted.flatten(), label_smoothing=0.1)
        if self.ctc is None:
            return loss

        log_probs = log_softmax(self.ctc(memory).float(), 2)  # (B, T, symbols + 1)
        joint = mean_ctc_loss(log_probs, lengths, targets, self.end)
        return (1 - self.ctc_weight) * loss + self.ctc_weight * joint

    @torch.no_grad()
    def predict(self, hidden, lengths):
        """A list of symbol numbers for each utterance, by beam search with K = self.beam texts.

        These hypotheses grow by a symbol at each step, until they end or have max_symbols. Then
        the one with the best mean log-probability per symbol, the end included, is chosen.
        """
        memory, padding = self.memory(hidden, lengths)
        B, K, V = len(memory), self.beam, self.end + 1
        device = hidden.device

        # The decoder sees the K hypotheses of an utterance as K rows of one batch.
        memory = memory.repeat_interleave(K, 0)  # (B · K, T, C)
        padding = padding.repeat_interleave(K, 0)

        # All K begin alike. Only the first may go on from there, or all K would stay alike.
        text = torch.full((B, K, 1), self.end, device=device)
        total = torch.full((B, K), -torch.inf, device=device)  # log-probability of each
        total[:, 0] = 0
        ended = torch.zeros(B, K, dtype=torch.bool, device=device)

        # A hypothesis that has ended is continued by further ends, at no cost.
        only_end = torch.full((V,), -torch.inf, device=device)
        only_end[self.end] = 0

        while text.shape[2] <= self.max_symbols and not ended.all():
            # Score each symbol as the next one of each hypothesis.
            scores = self.decode(memory, padding, text.flatten(0, 1))[:, -1].view(B, K, V)
            scores = torch.where(ended[:, :, None], only_end, scores)

            # Of the K · V continuations of an utterance, keep the best K.
            continued = total[:, :, None] + scores  # (B, K, V)
            total, best = continued.flatten(1).topk(K)  # (B, K)
            parent = best // V  # the hypothesis that each of them continues
            symbol = best % V

            # Several may continue the same hypothesis, and some hypotheses are given up.
            text = text.gather(1, parent[:, :, None].expand_as(text))
            text = torch.cat([text, symbol[:, :, None]], 2)
            ended = ended.gather(1, parent) | (symbol == self.end)

        # Longer texts are less probable, so it is the mean over symbols that is compared.
        sizes = (text[:, :, 1:] != self.end).sum(2) + ended  # (B, K)
        best = (total / sizes).argmax(1)
        chosen = text[torch.arange(B, device=device), best].tolist()
        return [[s for s in row if s != self.end] for row in chosen]


# 4. Mean pooling.


class PoolHead(nn.Module):
    """Labels of an utterance; symbols: how many labels there are.

    One label, or one label of each of several groups, whose sizes are given in order by `groups`
    and add up to symbols; the loss is the sum of the cross entropies of the groups. With
    multi_label any number of labels, and the loss is the binary cross entropy of each.
    """

    WIDTH = 256

    def __init__(self, layers, dim, symbols: int, multi_label=False, groups=(), told=False):
        super().__init__()
        self.multi_label = multi_label
        self.groups = list(groups) or [symbols]
        self.mix = Mix(layers, dim, self.WIDTH, told)
        self.dropout = nn.Dropout(DROPOUT)
        self.out = nn.Linear(self.WIDTH, symbols)

    def forward(self, hidden, lengths):
        """Scores of the labels: (B, symbols)."""
        x = self.mix(hidden)  # (B, T, C)
        valid = ~padding_of(x, lengths)
        mean = (x * valid[:, :, None]).sum(1) / lengths[:, None]  # (B, C)
        return self.out(self.dropout(mean))

    def loss(self, hidden, lengths, targets):
        scores = self(hidden, lengths)
        if self.multi_label:
            wanted = torch.zeros_like(scores)
            for row, labels in zip(wanted, targets):
                row[labels] = 1
            return binary_cross_entropy_with_logits(scores, wanted)

        # Labels are numbered through all groups, but cross entropy counts from 0 in each.
        wanted = torch.tensor(targets, device=scores.device)  # (B, groups)
        loss = 0.0
        start = 0
        for g, group_scores in enumerate(scores.split(self.groups, 1)):
            loss = loss + cross_entropy(group_scores, wanted[:, g] - start)
            start += self.groups[g]
        return loss

    @torch.no_grad()
    def predict(self, hidden, lengths):
        """Scores (symbols,) of the labels for each utterance, on the CPU."""
        return list(self(hidden, lengths).cpu())


HEADS = {"ctc": CTCHead, "seq2seq": Seq2SeqHead, "pool": PoolHead}
