"""What the student imitates: the layers of a teacher, 50 vectors a second.

A teacher is called with waveforms (B, samples) and lengths (B,) in samples and returns a list of
targets (B, S, D), one for each of its `layers` (names, for tables), with D as in its `dims`.
`boundary_dims` says how many numbers of the last layer's vectors count when segments are found
(parts/boundaries.py); None: all.
To add one, write a function that makes it and enter it in TEACHERS below, and nowhere else.

    mfcc         needs no download: 13 MFCCs with first and second differences, one "layer" of
                 39 dimensions
    hubert_base  torchaudio's HuBERT Base: layers 4, 8 and 12, as DistilHuBERT distils them
    FILE         a HuBERT or wav2vec 2.0 model of torchaudio: torch.save(model.state_dict(), FILE)

The s-th vector must belong to the encoder's s-th frame, and there must be as many of them as the
CNN makes frames. `fingerprint` refuses a teacher with another number.

Sources: Chang, Yang and Lee, "DistilHuBERT", ICASSP 2022; Hsu et al., "HuBERT", TASLP 2021.
"""

import hashlib

import torch
import torchaudio
from torch import nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import compute_deltas

from ofa_encoder import SAMPLE_RATE, STRIDES, cnn_features, frames_of, load_checkpoint

# 1. The kinds of teachers.


class MFCCTeacher(nn.Module):
    """MFCC + Δ + ΔΔ, each dimension normalised to mean 0 and variance 1 over the utterance."""

    layers = ["mfcc"]
    dims = [39]
    boundary_dims = 13  # segments are found without the differences, which are large at their ends

    def __init__(self):
        super().__init__()
        # A window of 400 and a hop of 320 samples, without centring, are those of the CNN: the
        # vectors lie where its frames lie.
        spectrogram = {"n_fft": 400, "hop_length": 320, "n_mels": 40, "center": False}
        self.mfcc = torchaudio.transforms.MFCC(SAMPLE_RATE, n_mfcc=13, melkwargs=spectrogram)

    @torch.no_grad()
    def forward(self, waveforms, lengths):
        targets = []
        # One utterance at a time, so that padding can't reach the differences or the mean.
        for waveform, length in zip(waveforms, lengths):
            mfcc = self.mfcc(waveform[:length].float())  # (13, S)
            delta = compute_deltas(mfcc)
            x = torch.cat([mfcc, delta, compute_deltas(delta)])  # (39, S)
            x = x - x.mean(1, keepdim=True)
            deviation = x.square().mean(1, keepdim=True).sqrt()
            targets.append((x / (deviation + 1e-3)).T)  # (S, 39); in silence the deviation is 0
        return [pad_sequence(targets, batch_first=True)]


class Wav2Vec2Teacher(nn.Module):
    """A HuBERT or wav2vec 2.0 model of torchaudio. layers: which to teach, counted from 1."""

    boundary_dims = None

    def __init__(self, model, layers):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.layers = layers
        self.dims = [model.encoder.feature_projection.projection.out_features] * len(layers)
        # Models whose CNN has a LayerNorm in each layer (HuBERT Large, XLS-R) were trained on
        # waveforms of mean 0 and variance 1.
        first_norm = model.feature_extractor.conv_layers[0].layer_norm
        self.normalise = not isinstance(first_norm, nn.GroupNorm)

    @torch.no_grad()
    def forward(self, waveforms, lengths):
        if self.normalise:
            valid = [waveform[:n] for waveform, n in zip(waveforms, lengths.tolist())]
            normalised = [layer_norm(waveform, waveform.shape) for waveform in valid]
            waveforms = pad_sequence(normalised, batch_first=True)
        x, frames = cnn_features(self.model.feature_extractor, waveforms, lengths)  # (B, S, C)
        hidden = self.model.encoder.extract_features(x, frames, max(self.layers))
        return [hidden[layer - 1] for layer in self.layers]  # (B, S, D) each


# 2. The teachers that can be named.


def load_teacher(name, layers=None):
    """The teacher called name, of TEACHERS or a FILE, on the CPU.

    layers: which to teach, counted from 1; default: those at a third, two thirds and the end. A
    teacher of one layer ignores it. Raises ValueError or OSError that says what to do.
    """
    if name in TEACHERS:
        return TEACHERS[name](layers)
    return _with_layers(_model_from_file(name), layers, name)


def _mfcc(layers):  # it has only one
    return MFCCTeacher()


def _hubert_base(layers):
    bundle = torchaudio.pipelines.HUBERT_BASE
    try:
        model = bundle.get_model()
    except Exception as error:  # torch has a different exception for each kind of damage
        raise OSError(
            f"HuBERT Base could not be downloaded, or is damaged ({str(error):.200}). "
            f"Fetch {bundle._path} on a machine with a network and put it into "
            f"{torch.hub.get_dir()}/checkpoints, "
            "or use --teacher FILE, or --teacher mfcc, which needs no download"
        ) from None
    return _with_layers(model, layers, "hubert_base")


# The name of each, and the function that makes it from `layers` (None: the default).
TEACHERS = {"mfcc": _mfcc, "hubert_base": _hubert_base}


def _with_layers(model, layers, name) -> Wav2Vec2Teacher:
    depth = len(model.encoder.transformer.layers)
    if not layers:
        # In a model of fewer than three layers some of these are the same, or below the first.
        layers = sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth})
    if min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"teacher layers {layers}: {name} has layers 1 to {depth}")
    return Wav2Vec2Teacher(model, layers)


def _model_from_file(path):
    """torchaudio's model, rebuilt from its weights alone.

    Raises ValueError if the file is not there or holds something else.
    """
    content = load_checkpoint(path)
    try:
        # HuBERT as it is pre-trained (HuBERTPretrainModel) is the same model under a prefix.
        state = {key.removeprefix("wav2vec2."): weight for key, weight in content.items()}
        inside = ("feature_extractor.", "encoder.")  # not the heads of pre-training
        state = {key: weight for key, weight in state.items() if key.startswith(inside)}
        model = torchaudio.models.wav2vec2_model(**_sizes(state))
        model.load_state_dict(state)
    except (AttributeError, KeyError, StopIteration, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no state_dict of a HuBERT or wav2vec 2.0 model of torchaudio "
            f"({error!r:.200})"
        ) from None
    return model


def _sizes(state: dict) -> dict:
    """The arguments of torchaudio's wav2vec2_model, read off the shapes of its weights.

    Only the number of heads leaves no trace. It is dim / 64 in all published models but XLarge,
    whose dim is 1280 and which has 16.
    """
    convs = [state[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(len(STRIDES))]
    shapes = [(w.shape[0], w.shape[2], stride) for w, stride in zip(convs, STRIDES)]
    # With a LayerNorm in each layer of the CNN, the Transformer has its norms first as well.
    norm_everywhere = "feature_extractor.conv_layers.1.layer_norm.weight" in state

    # The positional convolution is stored in two factors (weight norm), whose names depend on the
    # version of torch. The one with the convolution's shape is (dim, dim / groups, kernel).
    positions = next(
        weight
        for key, weight in state.items()
        if "pos_conv_embed.conv" in key and weight.ndim == 3 and weight.shape[1] > 1
    )
    dim = positions.shape[0]

    layers = {key.split(".")[3] for key in state if key.startswith("encoder.transformer.layers.")}
    feed_forward = state["encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"]
    return {
        "extractor_mode": "layer_norm" if norm_everywhere else "group_norm",
        "extractor_conv_layer_config": shapes,
        "extractor_conv_bias": "feature_extractor.conv_layers.0.conv.bias" in state,
        "encoder_embed_dim": dim,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": positions.shape[2],
        "encoder_pos_conv_groups": dim // positions.shape[1],
        "encoder_num_layers": len(layers),
        "encoder_num_heads": 16 if dim == 1280 else max(1, dim // 64),
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": feed_forward.shape[0],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": norm_everywhere,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }


# 3. What pre-training needs of a teacher beside its targets.


def fingerprint(teacher) -> str:
    """A short hash of the vectors that a teacher (on the CPU) gives for one fixed sound.

    What is cached from a teacher is kept under it. Another model, other layers or changed code give
    other vectors, hence another fingerprint, and never find the cache of this one. Raises
    ValueError unless there is one vector for each frame of the CNN.
    """
    # A second of sound whose pitch rises from 200 to 3,200 Hz.
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    waveform = 0.1 * torch.sin(2 * torch.pi * (200 * time + 1500 * time.square()))
    targets = teacher(waveform[None], torch.tensor([SAMPLE_RATE]))  # (1, S, D) for each layer

    sums = []
    for layer, dim, target in zip(teacher.layers, teacher.dims, targets, strict=True):
        if target.shape != (1, frames_of(SAMPLE_RATE), dim):
            raise ValueError(
                f"layer {layer} of the teacher gives {target.shape[1]} vectors of "
                f"{target.shape[2]} numbers for a second of sound; the encoder has "
                f"{frames_of(SAMPLE_RATE)} frames there, and {dim} numbers were announced"
            )
        # The numbers themselves can't be hashed, since processors differ in their last digits. So
        # a few sums of them are rounded, in which each number has a weight of its own. Should a sum
        # fall on the edge of rounding, another machine only makes the cache again.
        numbers = target.flatten().double()
        place = torch.arange(len(numbers))
        for frequency in (0.7, 1.1, 1.9):
            weights = torch.cos(frequency * place)
            total = (numbers * weights).sum() / len(numbers) ** 0.5
            sums.append(round(float(total), 3))
    return hashlib.sha1(str(sums).encode()).hexdigest()[:12]


def initialise(student, teacher) -> int:
    """Copy the teacher's weights into the student's wherever name and shape agree.

    Returns how many numbers were copied. With preset base and hubert_base these are the CNN, the
    projection, the positions and the first layers.
    """
    if not isinstance(teacher, Wav2Vec2Teacher):
        return 0
    ours = student.state_dict()
    fitting = {}
    for name, weight in teacher.model.state_dict().items():
        if name in ours and ours[name].shape == weight.shape:
            fitting[name] = weight
    student.load_state_dict(fitting, strict=False)
    return sum(weight.numel() for weight in fitting.values())
