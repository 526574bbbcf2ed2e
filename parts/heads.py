"""Small heads on the encoder's hidden states, as SUPERB has them (Yang et al., Interspeech 2021).

Every head first mixes the hidden states h_0 .. h_L by a learned softmax, x = Σ_l softmax(w)_l · h_l, x (B, T, D), and then

    CTCHead      a BiLSTM, or none, and a linear layer: each token emits one symbol or the blank, or with slots k up to k symbols
    Seq2SeqHead  a BiLSTM, and a Transformer decoder that attends to it; greedy or beam search; optionally a joint CTC loss
    PoolHead     a linear layer, the mean over tokens, and a linear layer

Each has loss(hidden, lengths, targets) and predict(hidden, lengths), with hidden (B, L + 1, T, D), lengths (B,) in tokens,
and targets lists of symbol numbers. CTC can't emit more symbols than it has tokens (times slots): `infeasible` tells.

"""

import math
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    ctc_loss,
    log_softmax,
)
from torch.nn.utils.rnn import pad_sequence


class Mix(nn.Module):
    """Softmax-weighted sum of standardised hidden states, then a projection: (B, L + 1, T, D) -> (B, T, width)."""

    def __init__(self, layers, dim, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, 1, dim))
        self.register_buffer("std", torch.ones(layers, 1, dim))
        self.weights = nn.Parameter(torch.zeros(layers))
        self.project = nn.Linear(dim, width)

    def standardise(self, rows):
        """From now on every dimension has mean 0 and variance 1 over tokens like these, rows (L + 1, tokens, D). Some of an
        encoder's dimensions hardly move around a large mean; a head would spend its first epochs on finding that out."""
        self.mean.copy_(rows.mean(1, keepdim=True))
        self.std.copy_(rows.std(1, keepdim=True, unbiased=False) + 1e-5)

    def forward(self, hidden):
        return self.project(
            torch.einsum("l,bltd->btd", self.weights.softmax(0), (hidden - self.mean) / self.std)
        )


class BiLSTM(nn.Module):
    """LSTMs in both directions over x (B, T, D) -> (B, T, 2 · width). The backward one sees each utterance reversed within its
    length: on a CPU that is several times faster than packed sequences, and gives the same."""

    def __init__(self, dim, width):
        super().__init__()
        self.forwards, self.backwards = (
            nn.LSTM(dim, width, batch_first=True),
            nn.LSTM(dim, width, batch_first=True),
        )

    def forward(self, x, lengths):
        steps = torch.arange(x.shape[1], device=x.device)
        reverse = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)[
            :, :, None
        ]  # (B, T, 1)
        flip = lambda y: y.gather(1, reverse.expand(y.shape))
        return torch.cat([self.forwards(x)[0], flip(self.backwards(flip(x))[0])], 2)


def emissions(text) -> int:
    """What CTC must emit for a text, at the least: its symbols, and a blank between two equal ones."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


class CTCHead(nn.Module):
    """shape: "blstm" (one layer of 128), "linear", or SUPERB's own for speech recognition, "superb" (two layers of 1024)."""

    BLANK = 0

    def __init__(self, layers, dim, symbols: int, shape="blstm", symbols_per_token=1, dropout=0.2):
        super().__init__()
        width, depth = {"linear": (256, 0), "blstm": (128, 1), "superb": (1024, 2)}[shape]
        self.mix, self.symbols_per_token = Mix(layers, dim, width), symbols_per_token
        self.lstms = nn.ModuleList(
            BiLSTM(width if i == 0 else 2 * width, width) for i in range(depth)
        )
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(2 * width if depth else width, symbols_per_token * (symbols + 1))

    def forward(self, hidden, lengths):
        x = self.dropout(self.mix(hidden))
        for lstm in self.lstms:
            x = self.dropout(lstm(x, lengths))
        x = self.out(x)  # (B, T, slots · (symbols + 1))
        return log_softmax(
            x.view(len(x), x.shape[1] * self.symbols_per_token, -1).float(), 2
        )  # (B, T · slots, symbols + 1)

    def loss(self, hidden, lengths, targets):
        """Mean over utterances of the loss per symbol; those too short for their text count as 0, since CTC gives infinity."""
        flat = torch.cat(
            [torch.as_tensor(t, dtype=torch.long, device=hidden.device) + 1 for t in targets]
        )
        sizes = torch.tensor([len(t) for t in targets], device=hidden.device)
        return ctc_loss(
            self(hidden, lengths).transpose(0, 1),
            flat,
            lengths * self.symbols_per_token,
            sizes,
            self.BLANK,
            zero_infinity=True,
        )

    def infeasible(self, lengths, targets) -> int:
        """How many of the utterances have too few tokens for their text."""
        return sum(
            emissions(t) > length * self.symbols_per_token
            for t, length in zip(targets, lengths.tolist())
        )

    @torch.no_grad()
    def predict(self, hidden, lengths):
        best = self(hidden, lengths).argmax(2).tolist()
        result = []
        for row, length in zip(best, lengths.tolist()):
            row = row[: length * self.symbols_per_token]
            result.append(
                [
                    s - 1
                    for s, before in zip(row, [self.BLANK, *row])
                    if s not in (self.BLANK, before)
                ]
            )
        return result


def sinusoids(x: Tensor) -> Tensor:
    """x (B, T, C) plus positions, as in Vaswani et al. 2017."""
    angle = torch.arange(x.shape[1], device=x.device)[:, None] / 10000 ** (
        torch.arange(0, x.shape[2], 2, device=x.device) / x.shape[2]
    )
    return x + torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


class Seq2SeqHead(nn.Module):
    """Attention decoder. The symbol after the last one, number `symbols`, both starts and ends a text."""

    def __init__(
        self,
        layers,
        dim,
        symbols: int,
        width=128,
        depth=2,
        ctc_weight=0.0,
        beam=1,
        max_symbols=30,
        dropout=0.2,
    ):
        super().__init__()
        self.mix, self.end, self.width, self.beam, self.ctc_weight = (
            Mix(layers, dim, width),
            symbols,
            width,
            beam,
            ctc_weight,
        )
        self.max_symbols = max_symbols  # symbols, at the most, in a predicted text
        self.lstm, self.join = BiLSTM(width, width), nn.Linear(2 * width, width)
        self.embed = nn.Embedding(symbols + 1, width)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(
                width, 4, 4 * width, dropout, batch_first=True, norm_first=True
            ),
            depth,
            nn.LayerNorm(width),
        )
        self.out = nn.Linear(width, symbols + 1)
        self.ctc = (
            nn.Linear(width, symbols + 1) if ctc_weight else None
        )  # its blank is the end symbol

    def memory(self, hidden, lengths):
        x = self.join(self.dropout(self.lstm(self.dropout(self.mix(hidden)), lengths)))
        return x, torch.arange(x.shape[1], device=x.device) >= lengths[:, None]

    def decode(self, memory, padding, text):
        """Log-probabilities of each next symbol: text (B, N) -> (B, N, symbols + 1)."""
        causal = torch.ones(
            text.shape[1], text.shape[1], dtype=torch.bool, device=text.device
        ).triu(1)
        x = self.decoder(
            sinusoids(self.embed(text) * math.sqrt(self.width)),
            memory,
            causal,
            memory_key_padding_mask=padding,
        )
        return log_softmax(self.out(x).float(), 2)

    def loss(self, hidden, lengths, targets):
        memory, padding = self.memory(hidden, lengths)
        end = torch.tensor([self.end], device=hidden.device)
        targets = [torch.as_tensor(t, dtype=torch.long, device=hidden.device) for t in targets]
        given = pad_sequence(
            [torch.cat([end, t]) for t in targets], batch_first=True, padding_value=self.end
        )
        wanted = pad_sequence(
            [torch.cat([t, end]) for t in targets], batch_first=True, padding_value=-100
        )
        loss = cross_entropy(
            self.decode(memory, padding, given).flatten(0, 1), wanted.flatten(), label_smoothing=0.1
        )
        if self.ctc is not None:
            sizes = torch.tensor([len(t) for t in targets], device=hidden.device)
            ctc = ctc_loss(
                log_softmax(self.ctc(memory).float(), 2).transpose(0, 1),
                torch.cat(targets),
                lengths,
                sizes,
                self.end,
                zero_infinity=True,
            )
            loss = (1 - self.ctc_weight) * loss + self.ctc_weight * ctc
        return loss

    @torch.no_grad()
    def predict(self, hidden, lengths):
        """Beam search with self.beam hypotheses (1: greedy) of up to self.max_symbols symbols; of the last ones the best by mean log-probability."""
        memory, padding = self.memory(hidden, lengths)
        B, K, V = len(memory), self.beam, self.end + 1
        memory, padding = memory.repeat_interleave(K, 0), padding.repeat_interleave(K, 0)
        text = torch.full((B, K, 1), self.end, device=hidden.device)
        total = torch.zeros(B, K, device=hidden.device).masked_fill(
            torch.arange(K, device=hidden.device) > 0, -torch.inf
        )
        ended = torch.zeros(B, K, dtype=torch.bool, device=hidden.device)
        only_end = torch.full((V,), -torch.inf, device=hidden.device).index_fill(
            0, torch.tensor(self.end, device=hidden.device), 0
        )
        while text.shape[2] <= self.max_symbols and not ended.all():
            scores = self.decode(memory, padding, text.flatten(0, 1))[:, -1].view(B, K, V)
            scores = torch.where(
                ended[:, :, None], only_end, scores
            )  # a text that has ended stays as it is
            total, best = (total[:, :, None] + scores).flatten(1).topk(K)  # (B, K)
            parent, symbol = best // V, best % V
            text = torch.cat(
                [text.gather(1, parent[:, :, None].expand_as(text)), symbol[:, :, None]], 2
            )
            ended = ended.gather(1, parent) | (symbol == self.end)
        sizes = (text[:, :, 1:] != self.end).sum(2) + ended  # (B, K)
        best = (total / sizes).argmax(1)
        return [
            [s for s in rows[k] if s != self.end] for rows, k in zip(text.tolist(), best.tolist())
        ]


class PoolHead(nn.Module):
    """One label an utterance (cross entropy), or one of each of `groups`, so many symbols each (the sum of the cross entropies), or with
    `several` any number of them (binary cross entropies)."""

    def __init__(
        self, layers, dim, symbols: int, multi_label=False, width=256, dropout=0.2, groups=()
    ):
        super().__init__()
        self.mix, self.multi_label, self.groups = (
            Mix(layers, dim, width),
            multi_label,
            list(groups) or [symbols],
        )
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(width, symbols)

    def forward(self, hidden, lengths):
        x = self.mix(hidden)
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return self.out(
            self.dropout((x * valid[:, :, None]).sum(1) / lengths[:, None])
        )  # (B, symbols)

    def loss(self, hidden, lengths, targets):
        logits = self(hidden, lengths)
        if not self.multi_label:
            wanted = torch.tensor(targets, device=logits.device) - torch.tensor(
                [0, *accumulate(self.groups[:-1])], device=logits.device
            )
            return sum(
                cross_entropy(part, wanted[:, g])
                for g, part in enumerate(logits.split(self.groups, 1))
            )
        wanted = torch.zeros_like(logits)
        for row, t in zip(wanted, targets):
            row[t] = 1
        return binary_cross_entropy_with_logits(logits, wanted)

    @torch.no_grad()
    def predict(self, hidden, lengths):
        """Scores (symbols,) of each utterance."""
        return list(self(hidden, lengths).cpu())


HEADS = {"ctc": CTCHead, "seq2seq": Seq2SeqHead, "pool": PoolHead}
