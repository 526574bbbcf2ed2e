"""teachers.py against torchaudio's own models and transforms, on real speech."""

import pytest
import torch
import torchaudio

from ofa_encoder import PRESETS, Config, OFAEncoder
from parts.data import pad
from parts.teachers import MFCCTeacher, fingerprint, initialise, load_teacher


@pytest.fixture(scope="module")
def prompts(asterisk):
    return [asterisk[i] for i in (0, 900, 2000)]


def wav2vec2(mode="group_norm", dim=128):
    torch.manual_seed(0)
    channels = [(32, k, s) for k, s in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))]
    return torchaudio.models.wav2vec2_model(
        mode,
        channels,
        mode == "layer_norm",
        dim,
        0.1,
        16,
        4,
        3,
        2,
        0.1,
        64,
        0.1,
        0.1,
        mode == "layer_norm",
        0.1,
        None,
    ).eval()


def test_mfcc_is_aligned_and_does_not_see_padding(prompts):
    teacher, encoder = load_teacher("mfcc"), OFAEncoder(PRESETS["tiny"]).eval()
    waveforms, lengths = pad(prompts)
    (targets,) = teacher(waveforms, lengths)
    frames = encoder(waveforms, lengths).frames
    for b, waveform in enumerate(prompts):
        (alone,) = teacher(waveform[None], lengths[b : b + 1])
        assert alone.shape == (1, frames[b], 39)  # as many frames as the CNN
        torch.testing.assert_close(targets[b, : frames[b]], alone[0])
        torch.testing.assert_close(alone[0].mean(0), torch.zeros(39), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            alone[0].var(0, unbiased=False), torch.ones(39), rtol=0, atol=0.02
        )
    assert (
        teacher(torch.zeros(1, 400), torch.tensor([400]))[0].isfinite().all()
    )  # one frame of silence


@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
def test_a_file_gives_torchaudios_layers(prompts, tmp_path, mode):
    model, path = wav2vec2(mode), tmp_path / "teacher.pt"
    torch.save(
        {f"wav2vec2.{k}" if mode == "group_norm" else k: v for k, v in model.state_dict().items()},
        path,
    )
    teacher = load_teacher(str(path), layers=[1, 3])
    assert teacher.dims == [128, 128]
    waveforms, lengths = pad(prompts)
    targets = teacher(waveforms, lengths)
    for b, waveform in enumerate(prompts):  # in company as torchaudio has it alone
        if mode == "layer_norm":
            waveform = torch.nn.functional.layer_norm(waveform, waveform.shape)
        hidden, _ = model.extract_features(waveform[None])
        for target, layer in zip(targets, (hidden[0], hidden[2]), strict=True):
            torch.testing.assert_close(target[b, : layer.shape[1]], layer[0], rtol=1e-4, atol=1e-5)
    assert load_teacher(str(path)).layers == [1, 2, 3]


def test_student_starts_as_the_teacher(tmp_path):
    torch.save(wav2vec2(dim=64).state_dict(), tmp_path / "teacher.pt")
    teacher = load_teacher(str(tmp_path / "teacher.pt"))
    student = OFAEncoder(
        Config(channels=(32,) * 7, dim=64, heads=1, ff=64, layers=2, pos_kernel=16)
    )
    copied = initialise(student, teacher)
    ours, theirs = student.state_dict(), teacher.model.state_dict()
    same = [k for k in ours if k in theirs and ours[k].shape == theirs[k].shape]
    assert all(torch.equal(ours[k], theirs[k]) for k in same) and copied == sum(
        ours[k].numel() for k in same
    )
    assert any("layers.1" in k for k in same) and any("conv_layers.6" in k for k in same)
    assert initialise(student, load_teacher("mfcc")) == 0


def test_hubert_base_fits_the_base_preset():
    """Every weight of preset base, but the α predictor's, has its like in HuBERT Base."""
    with torch.device("meta"):
        ours, theirs = (
            OFAEncoder(PRESETS["base"]).state_dict(),
            torchaudio.models.hubert_base().state_dict(),
        )
    own = {k for k in ours if k not in theirs or ours[k].shape != theirs[k].shape}
    assert own == {"mean_alpha", *(k for k in ours if k.startswith("alpha_predictor"))}


def test_no_network_for_hubert_says_what_to_do(monkeypatch):
    def offline(self, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(type(torchaudio.pipelines.HUBERT_BASE), "get_model", offline)
    with pytest.raises(OSError, match="(?s)HuBERT Base could not be downloaded.*--teacher mfcc"):
        load_teacher("hubert_base")


def test_a_fingerprint_is_what_a_teacher_says(tmp_path, monkeypatch):
    torch.save(wav2vec2().state_dict(), tmp_path / "teacher.pt")
    teachers = [
        load_teacher("mfcc"),
        *(load_teacher(str(tmp_path / "teacher.pt"), layers) for layers in ([1], [2], [1, 2])),
    ]
    found = [fingerprint(teacher) for teacher in teachers]
    assert len(set(found)) == 4 and fingerprint(load_teacher("mfcc")) == found[0]
    forward = MFCCTeacher.forward
    monkeypatch.setattr(
        MFCCTeacher, "forward", lambda self, *a: [1.1 * t for t in forward(self, *a)]
    )  # another code
    assert fingerprint(load_teacher("mfcc")) != found[0]
    monkeypatch.setattr(
        MFCCTeacher, "forward", lambda self, *a: [t[:, 1:] for t in forward(self, *a)]
    )
    with pytest.raises(
        ValueError, match="layer mfcc of the teacher gives 48 vectors .* the encoder has 49 frames"
    ):
        fingerprint(load_teacher("mfcc"))
