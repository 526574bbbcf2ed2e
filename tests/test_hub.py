"""extras/hub.py against checkpoints of pretrain.py, plain readings of the files that it writes, and
transformers' own padding."""

import json
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2FeatureExtractor

import ofa_encoder
from extras import hub
from extras.hub import OFAEncoder, encode
from ofa_encoder import ALPHAS, COMPRESSIONS, Config
from parts.runs import save

REPO = Path(__file__).parent.parent
SMALL = Config(channels=(32,) * 7, dim=64, heads=2, ff=96, layers=2, pos_kernel=16)
FILES = {"README.md", "config.json", "model.safetensors"}


def small(**more):
    torch.manual_seed(0)
    return OFAEncoder(replace(SMALL, **more)).eval()


def weights_are_equal(a, b):
    a = a.state_dict()
    b = b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Folders.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_encoder_comes_back_from_its_folder(tmp_path, compression, alpha):
    encoder = small(compression=compression, alpha=alpha)
    encoder.mean_alpha.fill_(0.2503)
    encoder.train().save_pretrained(tmp_path)
    again = OFAEncoder.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert again.config == encoder.config
    assert weights_are_equal(again, encoder)
    assert not again.training


def test_a_folder_can_be_read_without_this_file(tmp_path):
    """Its two files are all there is to know."""
    encoder = small()
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    plain = ofa_encoder.OFAEncoder(Config(**{**config, "channels": tuple(config["channels"])}))
    plain.load_state_dict(weights)
    assert plain.config == encoder.config
    assert weights_are_equal(plain, encoder)


@pytest.mark.parametrize("half", [True, False])
def test_a_checkpoint_becomes_a_folder(tmp_path, monkeypatch, half):
    """Float16 are the parameters alone."""
    encoder = ofa_encoder.OFAEncoder(replace(SMALL, alpha="segments"))
    encoder.mean_alpha.fill_(0.2503)
    save(encoder.checkpoint(), tmp_path / "encoder.pt")
    flags = ["--half"] if half else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hub.py", *flags, "encoder.pt", "folder"])
    hub.main()
    saved = load_file("folder/model.safetensors")
    for name, value in saved.items():
        is_number = name in ("mean_alpha", "end_threshold")
        assert value.dtype == (torch.float16 if half and not is_number else torch.float32)
    again = OFAEncoder.from_pretrained("folder")
    expected = encoder.state_dict()
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].to(saved[name].dtype).float())


def test_the_folder_here_is_the_checkpoint_here():
    """If it is not: python -m extras.hub --half checkpoints/ofa-tiny.pt checkpoints/ofa-tiny"""
    folder = REPO / "checkpoints/ofa-tiny"
    expected = ofa_encoder.OFAEncoder.from_checkpoint(f"{folder}.pt")
    encoder = OFAEncoder.from_pretrained(folder)
    assert encoder.config == expected.config
    assert weights_are_equal(encoder, expected)
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "model.safetensors").stat().st_size < 3e6


# The hub.


def test_a_name_on_the_hub_is_fetched_from_there(tmp_path, monkeypatch):
    """Here from the cache of the hub, which has it as if it had been fetched before."""
    cached = tmp_path / "models--someone--encoder"
    small().save_pretrained(cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    encoder = OFAEncoder.from_pretrained("someone/encoder", cache_dir=tmp_path)
    assert weights_are_equal(encoder, small())


def test_a_folder_is_what_is_pushed(tmp_path, monkeypatch):
    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    small().push_to_hub("someone/encoder")
    pushed = tmp_path / "someone/encoder"
    assert {path.name for path in pushed.iterdir()} == FILES
    assert weights_are_equal(OFAEncoder.from_pretrained(pushed), small())


# Mistakes.


def spoil(folder, what):
    """Save an encoder to folder, and spoil it."""
    small().save_pretrained(folder)
    config = folder / "config.json"
    weights = folder / "model.safetensors"
    state = small().state_dict()
    if what == "no config":
        config.unlink()
    elif what == "half a config":
        config.write_text("{")
    elif what == "a list":
        config.write_text("[1]")
    elif what == "another model's config":
        config.write_text('{"model_type": "hubert", "hidden_size": 768}')
    elif what == "another compression":
        config.write_text(json.dumps(asdict(SMALL) | {"compression": "average3"}))
    elif what == "another size":
        config.write_text(json.dumps(asdict(SMALL) | {"dim": 128}))
    elif what == "no attention heads":
        config.write_text(json.dumps(asdict(SMALL) | {"heads": 0}))
    elif what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "a weight missing":
        state.pop("alpha_predictor.linear.bias")
        save_file(state, weights)
    elif what == "NaN":
        save_file(state | {"mean_alpha": torch.tensor(torch.nan)}, weights)


@pytest.mark.parametrize(
    "what, words",
    [
        ("no config", "has no config.json: save_pretrained writes such a folder"),
        ("half a config", "its config.json can't be read"),
        ("a list", "its config.json can't be read"),
        ("another model's config", "holds no encoder of this project, or a damaged one"),
        ("another compression", "average3"),
        ("another size", "holds no encoder of this project, or a damaged one"),
        ("no attention heads", "holds no encoder of this project, or a damaged one"),
        ("no weights", "model.safetensors can't be read"),
        ("cut weights", "model.safetensors can't be read"),
        ("a weight missing", "alpha_predictor.linear.bias"),
        ("NaN", "holds NaN or infinite weights"),
    ],
)
def test_a_folder_that_will_not_do_is_named(tmp_path, what, words):
    spoil(tmp_path, what)
    with pytest.raises(ValueError, match=words) as error:
        OFAEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["nobody/encoder", "no such folder", "a/b/c"])
def test_a_name_that_is_not_to_be_had_is_one_line(monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"{name} is no folder here, and could not be") as error:
        OFAEncoder.from_pretrained(name)
    assert "\n" not in str(error.value)


# Called as models of transformers are.


@pytest.fixture(scope="module")
def sounds(asterisk):
    return [asterisk[i].numpy() for i in (0, 700, 1300)]


@torch.no_grad()
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.5])
def test_a_batch_of_transformers_gives_the_tokens_of_each(sounds, lam):
    """Each utterance's tokens are those that it has alone, and the mask says which they are."""
    encoder = small()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    batch = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="pt")
    out = encode(encoder, **batch, lam=lam)
    assert out.attention_mask.shape == out.last_hidden_state.shape[:2]
    assert not out.last_hidden_state[out.attention_mask == 0].any()
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for b, sound in enumerate(sounds):
        alone = encoder(torch.from_numpy(sound)[None], lam=lam).hidden_states[-1][0]
        tokens = out.last_hidden_state[b][out.attention_mask[b] == 1]
        torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_example_at_the_top_of_the_file_runs(sounds):
    first = hub.__doc__.index("    from transformers import")
    values = {"encode": encode, "encoder": small(), "sounds": sounds}
    exec(textwrap.dedent(hub.__doc__[first:]), values)
    assert values["mean"].shape == (3, 64)
    out = values["encoder"](torch.from_numpy(sounds[0])[None], lam=values["encoder"].lam_for(60))
    torch.testing.assert_close(values["mean"][0], out.hidden_states[-1].mean(1)[0])


@torch.no_grad()
def test_without_a_mask_all_samples_count(sounds):
    encoder = small()
    waveforms = torch.from_numpy(np.stack([sound[:8_000] for sound in sounds]))
    out = encode(encoder, waveforms)
    torch.testing.assert_close(out.last_hidden_state, encoder(waveforms).hidden_states[-1])
    assert out.attention_mask.all()


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.tensor([[0] * 400 + [1] * 400]), "pad on the right"),
        (torch.ones(1, 400), "attention_mask has shape"),
    ],
    ids=["padding on the left", "a mask of another length"],
)
def test_a_mask_that_will_not_do_is_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        encode(small(), torch.zeros(1, 800), mask)
