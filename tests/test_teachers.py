"""teachers.py against torchaudio's own models and transforms, on real speech, and against
transformers' own models.

Every teacher that can be named, one from a file, and one from a folder of each family must keep the
contract at the top of teachers.py. All models are small random ones, so nothing is downloaded.
"""

import json
import sys

import pytest
import torch
import torchaudio
import transformers
from huggingface_hub import constants

from ofa_encoder import KERNELS, PRESETS, STRIDES, Config, OFAEncoder, frames_of
from parts.data import pad
from parts.teachers import FAMILIES, TEACHERS, MFCCTeacher, fingerprint, initialise, load_teacher

BUNDLE = type(torchaudio.pipelines.HUBERT_BASE)  # of every pretrained wav2vec 2.0 in torchaudio


@pytest.fixture(scope="module")
def prompts(asterisk):
    return [asterisk[i] for i in (0, 900, 2000)]


def wav2vec2(mode="group_norm", dim=128, layers=3):
    """A small random model of torchaudio, with the CNN's kernels and strides of all of them."""
    torch.manual_seed(0)
    model = torchaudio.models.wav2vec2_model(
        extractor_mode=mode,
        extractor_conv_layer_config=[(32, k, s) for k, s in zip(KERNELS, STRIDES)],
        extractor_conv_bias=mode == "layer_norm",
        encoder_embed_dim=dim,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=layers,
        encoder_num_heads=dim // 64,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
        encoder_layer_norm_first=mode == "layer_norm",
        encoder_layer_drop=0.1,
        aux_num_out=None,
    )
    return model.eval()


def saved(model, path, prefix=""):
    """Save a model as --teacher FILE takes it; returns FILE."""
    torch.save({prefix + key: weight for key, weight in model.state_dict().items()}, path)
    return str(path)


def of_transformers(family, size="base", head="", **more):
    """A random model of transformers of two layers, as small as wav2vec2(), and no two weights of
    it alike. size: "base", or "large", which has other norms in other places."""
    is_large = size == "large"
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        conv_bias=is_large,
        feat_extract_norm="layer" if is_large else "group",
        do_stable_layer_norm=is_large,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=8,
        **more,
    )
    auto_class = transformers.AutoModelForCTC if head else transformers.AutoModel
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():  # else norms are 1, and biases 0
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


# What every teacher must keep.


@pytest.fixture(params=[*TEACHERS, "FILE", *FAMILIES])
def name(request, tmp_path, monkeypatch):
    monkeypatch.setattr(BUNDLE, "get_model", lambda self, **_: wav2vec2())
    if request.param == "FILE":
        return saved(wav2vec2("layer_norm"), tmp_path / "teacher.pt")
    if request.param in FAMILIES:
        of_transformers(request.param, "large").save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")
    return request.param


def test_a_teacher_has_a_vector_for_each_frame_of_the_cnn(name, prompts):
    teacher = load_teacher(name)
    for waveform in [*prompts, torch.zeros(400), torch.zeros(719), torch.zeros(720)]:
        targets = teacher(waveform[None], torch.tensor([len(waveform)]))
        for target, dim in zip(targets, teacher.dims, strict=True):
            assert target.shape == (1, frames_of(len(waveform)), dim)
            assert target.isfinite().all()
    assert len(teacher.layers) == len(teacher.dims)


def test_a_teacher_does_not_see_padding(name, prompts):
    """An utterance has the same targets in a batch as alone."""
    teacher = load_teacher(name)
    targets = teacher(*pad(prompts))
    for b, waveform in enumerate(prompts):
        alone = teacher(waveform[None], torch.tensor([len(waveform)]))
        for target, expected in zip(targets, alone, strict=True):
            found = target[b, : expected.shape[1]]
            torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


def test_a_teacher_is_not_trained(name, prompts):
    targets = load_teacher(name)(*pad(prompts))
    assert not any(target.requires_grad for target in targets)


def test_a_fingerprint_is_the_same_every_time(name):
    assert fingerprint(load_teacher(name)) == fingerprint(load_teacher(name))


# Each kind.


def test_mfccs_are_torchaudios_and_their_differences(prompts):
    """Each dimension has mean 0 and variance 1; before that it is torchaudio's."""
    (targets,) = load_teacher("mfcc")(prompts[0][None], torch.tensor([len(prompts[0])]))
    assert targets.shape[2] == 39
    mean = targets[0].mean(0)
    variance = targets[0].var(0, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros(39), rtol=0, atol=1e-4)
    torch.testing.assert_close(variance, torch.ones(39), rtol=0, atol=0.02)

    spectrogram = {"n_fft": 400, "hop_length": 320, "n_mels": 40, "center": False}
    mfcc = torchaudio.transforms.MFCC(16_000, 13, melkwargs=spectrogram)(prompts[0])  # (13, S)
    expected = (mfcc - mfcc.mean(1, keepdim=True)) / mfcc.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(targets[0, :, :13].T, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prefix", ["", "wav2vec2."], ids=["plain", "as HuBERT is pre-trained"])
@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
def test_a_file_gives_torchaudios_layers(prompts, tmp_path, mode, prefix):
    model = wav2vec2(mode)
    teacher = load_teacher(saved(model, tmp_path / "teacher.pt", prefix), layers=[1, 3])
    assert teacher.dims == [128, 128]
    for waveform in prompts:
        targets = teacher(waveform[None], torch.tensor([len(waveform)]))
        if mode == "layer_norm":  # these models were trained on normalised waveforms
            waveform = torch.nn.functional.layer_norm(waveform, waveform.shape)
        hidden, _ = model.extract_features(waveform[None])
        for target, expected in zip(targets, (hidden[0], hidden[2]), strict=True):
            torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "depth, expected", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (12, [4, 8, 12])]
)
def test_layers_at_a_third_two_thirds_and_the_end_are_the_default(tmp_path, depth, expected):
    path = saved(wav2vec2(layers=depth), tmp_path / "teacher.pt")
    assert load_teacher(path).layers == expected


def test_no_network_for_hubert_says_what_to_do(monkeypatch):
    def offline(self, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(BUNDLE, "get_model", offline)
    with pytest.raises(OSError, match="(?s)HuBERT Base could not be downloaded.*--teacher mfcc"):
        load_teacher("hubert_base")


# Models of transformers.


@torch.no_grad()
def assert_same_vectors(teacher, original, normalised=False):
    """That the teacher gives the hidden states of transformers, within 1e-4, on random waveforms of
    several lengths. normalised: whether transformers is given them with mean 0 and variance 1."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    torch.manual_seed(1)
    for samples in (400, 5_000, 16_001):
        waveform = 0.03 * torch.randn(1, samples) + 0.01  # as quiet as speech
        targets = teacher(waveform, torch.tensor([samples]))
        if normalised:
            inputs = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt")
            waveform = inputs.input_values
        hidden = original(waveform, output_hidden_states=True).hidden_states
        expected = [hidden[layer] for layer in teacher.layers]  # hidden[0] is the first one's input
        for target, states in zip(targets, expected, strict=True):
            assert (target - states).abs().max() <= 1e-4


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_hidden_states_of_transformers(tmp_path, family, size):
    original = of_transformers(family, size)
    original.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.layers == [1, 2]
    assert teacher.dims == [128, 128]
    assert_same_vectors(teacher, original)


@pytest.mark.parametrize("do_normalize", [True, False, None])
def test_waveforms_are_normalised_if_the_folder_says_so(tmp_path, capsys, do_normalize):
    """If it says nothing (None), they are not, and one line says that they should be."""
    original = of_transformers("hubert", "large")
    original.save_pretrained(tmp_path)
    if do_normalize is not None:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert_same_vectors(teacher, original, normalised=do_normalize)
    warned = f"{tmp_path} has no preprocessor_config.json" in capsys.readouterr().err
    assert warned == (do_normalize is None)


def test_a_base_model_that_says_nothing_of_normalisation_is_no_reason_to_warn(tmp_path, capsys):
    of_transformers("hubert").save_pretrained(tmp_path)
    load_teacher(str(tmp_path))
    assert "preprocessor_config" not in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_a_head_teaches_its_hidden_states(tmp_path, family):
    original = of_transformers(family, head="ctc")
    original.save_pretrained(tmp_path)
    assert_same_vectors(load_teacher(str(tmp_path)), original)


def test_a_model_in_half_precision_teaches_in_single(tmp_path):
    original = of_transformers("hubert").half()
    original.save_pretrained(tmp_path)
    assert_same_vectors(load_teacher(str(tmp_path)), original.float())


def test_weights_as_they_lie_on_the_hub(tmp_path):
    """facebook/hubert-base-ls960 is a .bin whose weight norm has the names of older versions."""
    original = of_transformers("hubert")
    original.config.save_pretrained(tmp_path)
    names = {"parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    weights = {}
    for key, weight in original.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        weights[key] = weight
    assert any(key.endswith("weight_g") for key in weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_vectors(load_teacher(str(tmp_path)), original)


def test_a_name_on_the_hub_is_fetched_from_there(tmp_path, monkeypatch):
    """Here from the cache of the hub, which has it as if it had been fetched before."""
    original = of_transformers("wavlm")
    cached = tmp_path / "models--someone--wavlm"
    original.save_pretrained(cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_same_vectors(load_teacher("someone/wavlm"), original)


def test_a_name_that_is_not_to_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="hf download nobody/hubert --local-dir FOLDER") as error:
        load_teacher("nobody/hubert")
    assert "\n" not in str(error.value)


def test_without_transformers_it_says_which_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        load_teacher(str(tmp_path))


def damage(folder, what):
    """Save a HuBERT to folder, and damage it."""
    more = {"hidden_act": "relu"} if what == "other activation" else {}
    more |= {"conv_pos_batch_norm": True} if what == "batch norm" else {}
    model = of_transformers("hubert", **more)
    weights = model.state_dict()
    if what == "weight missing":
        weights.pop("encoder.layers.1.attention.k_proj.weight")
    model.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text())
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut weights":
        (folder / "model.safetensors").write_bytes(b"cut")
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "damaged config":
        (folder / "config.json").write_text("{")
    elif what == "other type":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    elif what == "no type":
        (folder / "config.json").write_text('{"dim": 3}')
    elif what == "other size":
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


@pytest.mark.parametrize(
    "what, words",
    [
        ("no config", "has no config.json: a folder for --teacher is one"),
        ("damaged config", "its config.json can't be read"),
        ("other type", "holds a model of type whisper; a teacher is of type hubert, wav2vec2"),
        ("no type", "holds a model of type None"),
        ("no weights", "its weights can't be read"),
        ("cut weights", "its weights can't be read"),
        ("other size", "its weights can't be read"),
        ("weight missing", "lacks 1 weights, among them encoder.layers.1.attention.k_proj.weight"),
        ("other activation", "a variant that torchaudio lacks: its vectors come out different"),
        ("batch norm", "a variant that torchaudio lacks"),
    ],
)
def test_a_folder_that_will_not_do_is_refused_in_one_line(tmp_path, what, words):
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=words) as error:
        load_teacher(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# Fingerprints.


def test_other_teachers_and_layers_have_other_fingerprints(tmp_path):
    path = saved(wav2vec2(), tmp_path / "teacher.pt")
    found = {fingerprint(load_teacher(path, layers)) for layers in ([1], [2], [1, 2])}
    found.add(fingerprint(load_teacher("mfcc")))
    assert len(found) == 4


def change_mfccs(monkeypatch, change):
    """As if somebody had edited the code of MFCCTeacher: `change` its targets."""
    forward = MFCCTeacher.forward

    def edited(self, waveforms, lengths):
        return [change(target) for target in forward(self, waveforms, lengths)]

    monkeypatch.setattr(MFCCTeacher, "forward", edited)


def test_changed_code_has_another_fingerprint(monkeypatch):
    before = fingerprint(load_teacher("mfcc"))
    change_mfccs(monkeypatch, lambda target: 1.1 * target)
    assert fingerprint(load_teacher("mfcc")) != before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda target: target[:, 1:], "48 vectors of 39 numbers .* the encoder has 49 frames"),
        (lambda target: target[:, :, 1:], "49 vectors of 38 numbers .* 39 numbers were announced"),
    ],
    ids=["a vector too few", "a number too few"],
)
def test_vectors_that_do_not_fit_the_frames_are_refused(monkeypatch, change, message):
    change_mfccs(monkeypatch, change)
    with pytest.raises(ValueError, match=f"layer mfcc of the teacher gives {message}"):
        fingerprint(load_teacher("mfcc"))


# The student's first weights.


def test_the_student_starts_as_the_teacher(tmp_path):
    teacher = load_teacher(saved(wav2vec2(dim=64), tmp_path / "teacher.pt"))
    config = Config(channels=(32,) * 7, dim=64, heads=1, ff=64, layers=2, pos_kernel=16)
    student = OFAEncoder(config)
    copied = initialise(student, teacher)

    ours = student.state_dict()
    theirs = teacher.model.state_dict()
    same = [key for key in ours if key in theirs and ours[key].shape == theirs[key].shape]
    for key in same:
        assert torch.equal(ours[key], theirs[key])
    assert copied == sum(ours[key].numel() for key in same)
    assert any("layers.1" in key for key in same)
    assert any("conv_layers.6" in key for key in same)


def test_nothing_is_copied_from_mfccs():
    student = OFAEncoder(PRESETS["tiny"])
    before = {key: weight.clone() for key, weight in student.state_dict().items()}
    assert initialise(student, load_teacher("mfcc")) == 0
    for key, weight in student.state_dict().items():
        assert torch.equal(weight, before[key])


def test_hubert_base_fits_the_base_preset():
    """HuBERT Base has every weight of preset base, by name and shape, but the α predictor's."""
    with torch.device("meta"):
        ours = OFAEncoder(PRESETS["base"]).state_dict()
        theirs = torchaudio.models.hubert_base().state_dict()
    own = {key for key in ours if key not in theirs or ours[key].shape != theirs[key].shape}
    assert own == {"mean_alpha", *(key for key in ours if key.startswith("alpha_predictor"))}
