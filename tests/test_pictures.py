"""The figures: what they show agrees with the encoder, and the command for README's writes them."""

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torchaudio.functional import edit_distance

from cif import cif
from ofa_encoder import FRAME_MS, OFAEncoder
from parts.figures import COLOURS, align, draw_edges, rulers_figure, texts_figure

REPO = Path(__file__).parent.parent


def test_edges_are_drawn_where_tokens_fire(asterisk):
    encoder = OFAEncoder.from_checkpoint(REPO / "checkpoints/segments-tiny.pt")
    with torch.no_grad():
        out = encoder(asterisk[0][None], lam=0.8)
    figure, axis = plt.subplots()
    draw_edges(axis, out)
    drawn = [segment[0, 0] for segment in axis.collections[0].get_segments()]
    plt.close(figure)
    assert len(drawn) == out.lengths.item()
    seconds = out.fired.fire_times[0] * FRAME_MS / 1000
    assert drawn == pytest.approx(seconds.tolist(), abs=1e-6)


def test_rulers_show_every_piece():
    """0.5 + 0.75: the second frame is cut in two by token 1."""
    alpha = torch.tensor([[0.5, 0.75, 0.25]])
    figure = rulers_figure(alpha, cif(torch.zeros(1, 3, 1), alpha))
    texts = [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
    assert [text for text in texts if text[0] in "01"] == ["0.5", "0.5", "0.25", "0.25"]
    assert texts.count("token 1 fires") == 1


def test_texts_are_aligned_by_the_fewest_edits():
    texts = ["", "a", "truncating audio", "trnqe i nuio", "press six to play", "pressix tplrea"]
    for wanted in texts:
        for predicted in texts:
            pairs = align(wanted, predicted)
            assert "".join(w for w, _ in pairs if w) == wanted
            assert "".join(p for _, p in pairs if p) == predicted
            errors = sum(w != p for w, p in pairs)
            assert errors == edit_distance(wanted, predicted)


@pytest.mark.parametrize("words", [False, True])
def test_errors_of_texts_are_orange(words):
    """“to” instead of “two”: a letter is missing, or a word is wrong."""
    figure = texts_figure([{"wanted": "press two", "20 ms": "press to"}], words)
    orange = [t.get_text() for t in figure.axes[0].texts if t.get_color() == COLOURS["fire"]]
    plt.close(figure)
    assert "".join(orange).strip() == ("to" if words else "·")


def test_pictures_of_readme_can_be_made(tmp_path):
    command = [sys.executable, "-m", "extras.pictures", "checkpoints/segments-tiny.pt", tmp_path]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    for name in ("segments.png", "rulers.png"):
        assert plt.imread(tmp_path / name).shape[1] > 1000
        assert (REPO / "docs" / name).exists() and f"docs/{name}" in (
            REPO / "README.md"
        ).read_text()
