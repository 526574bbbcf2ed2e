"""heads.py against torch's packed LSTM, brute force over CTC paths, and teacher-forced scores."""

import itertools
import math

import pytest
import torch

from parts.heads import BiLSTM, CTCHead, PoolHead, Seq2SeqHead


def hidden(B=2, L=3, T=7, D=8, seed=0):
    return torch.randn(B, L, T, D, generator=torch.Generator().manual_seed(seed))


def test_bilstm_is_torchs_packed_one():
    torch.manual_seed(0)
    ours, theirs = BiLSTM(5, 4), torch.nn.LSTM(5, 4, batch_first=True, bidirectional=True)
    for name, p in ours.forwards.named_parameters():
        getattr(theirs, name).data = p.data
    for name, p in ours.backwards.named_parameters():
        getattr(theirs, f"{name}_reverse").data = p.data
    x, lengths = torch.randn(3, 6, 5), torch.tensor([6, 4, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(ours(x, lengths)[b, :n], expected[b, :n])


@pytest.mark.parametrize(
    "make",
    [
        lambda: CTCHead(3, 8, 4),
        lambda: CTCHead(3, 8, 4, "linear", symbols_per_token=2),
        lambda: Seq2SeqHead(3, 8, 4, ctc_weight=0.3, beam=3),
        lambda: PoolHead(3, 8, 4),
    ],
)
def test_padding_and_company_change_nothing(make):
    torch.manual_seed(0)
    head, x, lengths = make().eval(), hidden(), torch.tensor([7, 4])
    garbage = x.clone()
    garbage[1, :, 4:] = 9.0
    together, alone = head.predict(garbage, lengths), head.predict(x[1:, :, :4], lengths[1:])
    if isinstance(head, PoolHead):
        torch.testing.assert_close(together[1], alone[0])
    else:
        assert together[1] == alone[0]


def test_ctc_loss_is_the_sum_over_all_paths():
    torch.manual_seed(0)
    head, x = CTCHead(3, 8, 2, "linear").eval(), hidden(B=1, T=4)
    log_probs, target = head(x, torch.tensor([4]))[0], [1, 1]
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        collapsed = [s - 1 for s, before in zip(path, (0, *path)) if s not in (0, before)]
        total += (
            math.exp(sum(log_probs[t, s].item() for t, s in enumerate(path)))
            if collapsed == target
            else 0
        )
    assert head.loss(x, torch.tensor([4]), [target]).item() == pytest.approx(
        -math.log(total) / 2, rel=1e-4
    )


def test_infeasible_utterances_are_counted():
    head = CTCHead(3, 8, 4, symbols_per_token=1)
    assert head.infeasible(torch.tensor([2, 2, 3, 1]), [[0, 1], [1, 1], [1, 1], [0, 1]]) == 2
    head.symbols_per_token = 2
    assert head.infeasible(torch.tensor([2, 2, 3, 1]), [[0, 1], [1, 1], [1, 1], [0, 1]]) == 0


def test_beam_finds_no_worse_than_greedy():
    """The score that the search reports for its text is the decoder's own, and a wider beam's is at least greedy's."""
    for seed in range(6):
        torch.manual_seed(seed)
        head, x, lengths = (
            Seq2SeqHead(3, 8, 4, max_symbols=5).eval(),
            hidden(B=1, seed=seed) * 3,
            torch.tensor([7]),
        )

        def mean_score(text):
            memory, padding = head.memory(x, lengths)
            given = torch.tensor([[head.end, *text]])
            scores = head.decode(memory, padding, given)[0]
            return sum(scores[n, s].item() for n, s in enumerate([*text, head.end])) / (
                len(text) + 1
            )

        with torch.no_grad():
            (greedy,) = head.predict(x, lengths)
            head.beam = 50
            (best,) = head.predict(x, lengths)
            if len(greedy) < 5 and len(best) < 5:
                assert mean_score(best) >= mean_score(greedy) - 1e-4


def test_heads_learn():
    """Each head overfits four utterances."""
    x, lengths = hidden(B=4, T=8), torch.tensor([8, 8, 6, 6])
    texts = [[0, 1, 2], [3, 3], [1], [2, 0]]
    for head, targets in (
        (CTCHead(3, 8, 4, dropout=0), texts),
        (Seq2SeqHead(3, 8, 4, ctc_weight=0.3, dropout=0), texts),
        (PoolHead(3, 8, 4, dropout=0), [[0], [1], [2], [3]]),
        (PoolHead(3, 8, 4, multi_label=True, dropout=0), texts),
    ):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(head.parameters(), 0.003)
        for _ in range(300):
            optimizer.zero_grad()
            head.loss(x, lengths, targets).backward()
            optimizer.step()
        predicted = head.eval().predict(x, lengths)
        if isinstance(head, PoolHead):
            predicted = [
                sorted(
                    (p > (0 if head.multi_label else p.max() - 1e-6)).nonzero().flatten().tolist()
                )
                for p in predicted
            ]
            targets = [sorted(set(t)) for t in targets]
        assert predicted == targets, type(head)
