"""heads.py against torch's packed LSTM, brute force over CTC paths, and teacher-forced scores."""

import itertools
import math

import pytest
import torch

from parts.heads import HEADS, BiLSTM, CTCHead, PoolHead, Seq2SeqHead, emissions, sinusoids, tell

# Every head as it comes, and with the options that change what it computes.
VARIANTS = [
    *((kind, {}) for kind in HEADS),
    ("ctc", {"shape": "linear", "symbols_per_token": 2}),
    ("seq2seq", {"ctc_weight": 0.3, "beam": 3}),
    ("pool", {"multi_label": True}),
]


def hidden(B=2, L=3, T=7, D=8, seed=0):
    return torch.randn(B, L, T, D, generator=torch.Generator().manual_seed(seed))


def make(kind, options=None):
    """A head for hidden() and four symbols, without dropout."""
    torch.manual_seed(0)
    return HEADS[kind](3, 8, 4, **(options or {})).eval()


def test_bilstm_is_torchs_packed_one():
    torch.manual_seed(0)
    ours = BiLSTM(5, 4)
    theirs = torch.nn.LSTM(5, 4, batch_first=True, bidirectional=True)
    for name, p in ours.forwards.named_parameters():
        getattr(theirs, name).data = p.data
    for name, p in ours.backwards.named_parameters():
        getattr(theirs, f"{name}_reverse").data = p.data
    x = torch.randn(3, 6, 5)
    lengths = torch.tensor([6, 4, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    result = ours(x, lengths)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(result[b, :n], expected[b, :n])


def test_positions_are_encoded_as_in_the_paper():
    encoded = sinusoids(torch.zeros(1, 5, 6))[0]
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert encoded[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert encoded[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_hidden_states_are_standardised():
    mix = make("pool").mix
    rows = 5 + 3 * torch.randn(3, 400, 8)
    mix.standardise(rows)
    standard = (rows - mix.mean) / mix.std
    torch.testing.assert_close(standard.mean(1), torch.zeros(3, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.var(1, unbiased=False), torch.ones(3, 8))


def test_a_head_is_told_how_long_tokens_are():
    """Each channel is scaled and shifted by what one more number says, which is 0 for a frame."""
    mix = make("pool", {"told": True}).mix
    x = hidden()
    frame, longer = torch.ones(2, 7), torch.full((2, 7), math.e)
    assert tell(x, frame)[..., -1].abs().max() == 0
    torch.testing.assert_close(tell(x, longer)[..., -1], torch.ones(2, 3, 7))
    torch.testing.assert_close(tell(x, longer)[..., :-1], x)
    assert tell(x, torch.zeros(2, 7))[..., -1].abs().max() == 0  # padding has no length
    torch.testing.assert_close(mix(tell(x, frame)), mix(tell(x, longer)))  # before it has learned

    torch.nn.init.normal_(mix.told[2].weight)
    plain = mix(tell(x, frame))
    other = mix(tell(x, longer))
    slope = (other[:, 1:] - other[:, :-1]) / (plain[:, 1:] - plain[:, :-1])  # (B, T - 1, width)
    torch.testing.assert_close(slope, slope[:1, :1].expand_as(slope), atol=1e-2, rtol=1e-2)
    assert slope.std() > 0.1
    mix.standardise(tell(torch.randn(3, 400, 8)[None], torch.ones(1, 400))[0])
    assert mix.mean.shape == (3, 1, 8)


@pytest.mark.parametrize("kind, options", VARIANTS)
def test_an_answer_does_not_depend_on_padding_or_on_the_batch(kind, options):
    head = make(kind, options)
    x = hidden()
    padded = x.clone()
    padded[1, :, 4:] = 9.0
    in_a_batch = head.predict(padded, torch.tensor([7, 4]))[1]
    alone = head.predict(x[1:, :, :4], torch.tensor([4]))[0]
    torch.testing.assert_close(in_a_batch, alone)


@pytest.mark.parametrize("kind, options", VARIANTS)
def test_the_loss_does_not_depend_on_padding(kind, options):
    head = make(kind, options)
    x = hidden()
    padded = torch.cat([x, torch.full((2, 3, 2, 8), 9.0)], 2)
    lengths = torch.tensor([7, 7])
    loss = head.loss(x, lengths, [[1], [2]])
    torch.testing.assert_close(head.loss(padded, lengths, [[1], [2]]), loss)


def learn(head, targets):
    """Overfit the head to four utterances; return what it predicts of them."""
    x = hidden(B=4, T=8)
    lengths = torch.tensor([8, 8, 6, 6])
    optimizer = torch.optim.Adam(head.parameters(), 0.001)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(x, lengths, targets).backward()
        optimizer.step()
    return head.predict(x, lengths)


@pytest.mark.parametrize("kind, options", VARIANTS)
def test_every_head_learns_a_symbol_for_each_utterance(kind, options):
    targets = [[0], [1], [2], [3]]
    predicted = learn(make(kind, options), targets)
    if isinstance(predicted[0], torch.Tensor):  # scores
        predicted = [[scores.argmax().item()] for scores in predicted]
    assert predicted == targets


@pytest.mark.parametrize("kind, options", [("ctc", {}), ("seq2seq", {"ctc_weight": 0.3})])
def test_texts_are_learned(kind, options):
    texts = [[0, 1, 2], [3, 3], [1], [2, 0]]
    assert learn(make(kind, options), texts) == texts


def test_sets_of_labels_are_learned():
    predicted = learn(make("pool", {"multi_label": True}), [[0, 1, 2], [3, 3], [1], [2, 0]])
    found = [(scores > 0).nonzero().flatten().tolist() for scores in predicted]
    assert found == [[0, 1, 2], [3], [1], [0, 2]]


def test_groups_are_cross_entropies_of_their_own():
    torch.manual_seed(0)
    head = PoolHead(3, 8, 5, groups=(2, 3)).eval()
    x = hidden()
    lengths = torch.tensor([4, 2])
    scores = torch.stack(head.predict(x, lengths)).double()
    first = scores[:, :2].log_softmax(1)
    second = scores[:, 2:].log_softmax(1)
    expected = -(first[0, 1] + first[1, 0] + second[0, 0] + second[1, 2]).item() / 2
    assert head.loss(x, lengths, [[1, 2], [0, 4]]).item() == pytest.approx(expected)


def test_ctc_loss_is_the_sum_over_all_paths():
    torch.manual_seed(0)
    head = CTCHead(3, 8, 2, "linear").eval()
    x = hidden(B=1, T=4)
    lengths = torch.tensor([4])
    target = [1, 1]
    log_probs = head(x, lengths)[0]  # (4, blank and two symbols)
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        collapsed = [s - 1 for s, before in zip(path, (0, *path)) if s not in (0, before)]
        if collapsed == target:
            total += math.exp(sum(log_probs[t, s].item() for t, s in enumerate(path)))
    per_symbol = -math.log(total) / len(target)
    assert head.loss(x, lengths, [target]).item() == pytest.approx(per_symbol, rel=1e-4)


def test_a_text_too_long_for_its_tokens_adds_nothing_to_the_ctc_loss():
    head = make("ctc")
    lengths = torch.tensor([7, 1])
    both = head.loss(hidden(), lengths, [[0, 1], [2, 3]])
    first = head.loss(hidden()[:1], lengths[:1], [[0, 1]])
    torch.testing.assert_close(both, first / 2)


@pytest.mark.parametrize("text, needed", [("", 0), ("a", 1), ("ab", 2), ("aa", 3), ("abba", 5)])
def test_ctc_needs_a_blank_between_equal_symbols(text, needed):
    assert emissions(text) == needed


def test_infeasible_utterances_are_counted():
    head = make("ctc")
    lengths = torch.tensor([2, 2, 3, 1])
    texts = [[0, 1], [1, 1], [1, 1], [0, 1]]
    assert head.infeasible(lengths, texts) == 2
    head.symbols_per_token = 2
    assert head.infeasible(lengths, texts) == 0


def mean_score(head, x, lengths, text):
    """The decoder's mean log-probability for each symbol of a text, its end included."""
    memory, padding = head.memory(x, lengths)
    given = torch.tensor([[head.end, *text]])
    scores = head.decode(memory, padding, given)[0]  # (symbols + 1, numbers)
    wanted = [*text, head.end]
    return sum(scores[n, symbol].item() for n, symbol in enumerate(wanted)) / len(wanted)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_a_wide_beam_finds_the_best_text(seed):
    """With room for every hypothesis, the search is exhaustive: compared with all texts."""
    torch.manual_seed(seed)
    longest = 3
    head = Seq2SeqHead(3, 8, 2, beam=50, max_symbols=longest).eval()
    x = hidden(B=1, seed=seed) * 3
    lengths = torch.tensor([7])
    (found,) = head.predict(x, lengths)

    scores = {}
    for n in range(longest):
        for text in itertools.product(range(2), repeat=n):
            scores[text] = mean_score(head, x, lengths, text)
    # A text that max_symbols cuts off competes without an end.
    memory, padding = head.memory(x, lengths)
    for text in itertools.product(range(2), repeat=longest):
        given = torch.tensor([[head.end, *text[:-1]]])
        log_probs = head.decode(memory, padding, given)[0]
        total = sum(log_probs[n, symbol].item() for n, symbol in enumerate(text))
        scores[text] = total / longest
    assert scores[tuple(found)] == pytest.approx(max(scores.values()), abs=1e-5)


@torch.no_grad()
def test_a_beam_of_one_is_greedy():
    torch.manual_seed(1)
    head = Seq2SeqHead(3, 8, 4, max_symbols=5).eval()
    x = hidden()
    lengths = torch.tensor([7, 4])
    memory, padding = head.memory(x, lengths)
    for b, found in enumerate(head.predict(x, lengths)):
        text = [head.end]
        while len(text) <= 5:
            given = torch.tensor([text])
            scores = head.decode(memory[b : b + 1], padding[b : b + 1], given)[0, -1]
            symbol = scores.argmax().item()
            if symbol == head.end:
                break
            text.append(symbol)
        assert found == text[1:]
