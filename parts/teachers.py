"""What the student imitates: the layers of a teacher, 50 vectors a second.

    mfcc         needs no download: 13 MFCCs with first and second differences, one "layer" of 39 dimensions. Window 400 and hop 320
                 without centring put its frames where the CNN has its own.
    hubert_base  torchaudio's HuBERT Base: layers 4, 8 and 12, as DistilHuBERT (Chang et al., ICASSP 2022) distils them
    FILE         a HuBERT or wav2vec 2.0 model of torchaudio, saved with torch.save(model.state_dict(), FILE)

A teacher takes waveforms (B, samples) and lengths (B,) and returns a list of targets (B, S, D), one a layer.
"""

import hashlib

import torch
import torchaudio
from torch import nn

from ofa_encoder import SAMPLE_RATE, STRIDES, cnn_features, frames_of, load_checkpoint


class MFCCTeacher(nn.Module):
    """MFCC + Δ + ΔΔ, each dimension normalised to mean 0 and variance 1 over the utterance."""

    layers, dims = ["mfcc"], [39]

    def __init__(self):
        super().__init__()
        self.mfcc = torchaudio.transforms.MFCC(
            SAMPLE_RATE,
            n_mfcc=13,
            melkwargs={"n_fft": 400, "hop_length": 320, "n_mels": 40, "center": False},
        )

    @torch.no_grad()
    def forward(self, waveforms, lengths):
        targets = []
        for waveform, length in zip(
            waveforms, lengths
        ):  # alone, so that padding can't reach the differences
            mfcc = self.mfcc(waveform[:length].float())  # (13, S)
            delta = torchaudio.functional.compute_deltas(mfcc)
            x = torch.cat([mfcc, delta, torchaudio.functional.compute_deltas(delta)])
            x = x - x.mean(1, keepdim=True)
            targets.append((x / (x.square().mean(1, keepdim=True).sqrt() + 1e-3)).T)  # (S, 39)
        return [nn.utils.rnn.pad_sequence(targets, batch_first=True)]


class Wav2Vec2Teacher(nn.Module):
    """A HuBERT or wav2vec 2.0 model of torchaudio, of which some layers are taught."""

    def __init__(self, model, layers):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.layers = layers
        self.dims = [model.encoder.feature_projection.projection.out_features] * len(layers)
        # Models whose CNN has a LayerNorm everywhere (HuBERT Large, XLS-R) were trained on waveforms of mean 0, variance 1.
        self.normalise = not isinstance(
            model.feature_extractor.conv_layers[0].layer_norm, nn.GroupNorm
        )

    @torch.no_grad()
    def forward(self, waveforms, lengths):
        if self.normalise:
            waveforms = nn.utils.rnn.pad_sequence(
                [nn.functional.layer_norm(w[:n], (int(n),)) for w, n in zip(waveforms, lengths)],
                batch_first=True,
            )
        x, frames = cnn_features(self.model.feature_extractor, waveforms, lengths)
        hidden = self.model.encoder.extract_features(x, frames, max(self.layers))
        return [hidden[layer - 1] for layer in self.layers]


def load_teacher(name, layers=None):
    """The teacher called name (see the top of this file). layers: which to teach, counted from 1; default: those at a third,
    two thirds and the end. Raises ValueError or OSError that says what to do."""
    if name == "mfcc":
        return MFCCTeacher()
    if name == "hubert_base":
        try:
            model = torchaudio.pipelines.HUBERT_BASE.get_model()
        except (
            Exception
        ) as error:  # a damaged file in the cache: torch has a different exception for each
            raise OSError(
                f"HuBERT Base could not be downloaded, or is damaged ({str(error):.200}). Fetch {torchaudio.pipelines.HUBERT_BASE._path} on a "
                f"machine with a network and put it into {torch.hub.get_dir()}/checkpoints, "
                "or use --teacher FILE, or --teacher mfcc, which needs no download"
            ) from None
    else:
        model = _from_file(name)
    depth = len(model.encoder.transformer.layers)
    layers = layers or sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth})
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"teacher layers {layers}: {name} has layers 1 to {depth}")
    return Wav2Vec2Teacher(model, layers)


def _from_file(path):
    """Rebuild torchaudio's model from its weights alone. Every size can be read off their shapes, but
    for the number of heads: that is dim / 64 in all published models but XLarge, which has 16."""
    content = load_checkpoint(path)
    try:
        state = {
            k.removeprefix("wav2vec2."): v for k, v in content.items()
        }  # HuBERTPretrainModel has that prefix
        state = {k: v for k, v in state.items() if k.startswith(("feature_extractor.", "encoder."))}
        convs = [
            state[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(len(STRIDES))
        ]
        positions = next(
            v
            for k, v in state.items()
            if "pos_conv_embed.conv" in k and v.ndim == 3 and v.shape[1] > 1
        )
        dim = positions.shape[0]
        norm_everywhere = "feature_extractor.conv_layers.1.layer_norm.weight" in state
        model = torchaudio.models.wav2vec2_model(
            extractor_mode="layer_norm" if norm_everywhere else "group_norm",
            extractor_conv_layer_config=[
                (w.shape[0], w.shape[2], stride) for w, stride in zip(convs, STRIDES)
            ],
            extractor_conv_bias="feature_extractor.conv_layers.0.conv.bias" in state,
            encoder_embed_dim=dim,
            encoder_projection_dropout=0.0,
            encoder_pos_conv_kernel=positions.shape[2],
            encoder_pos_conv_groups=dim // positions.shape[1],
            encoder_num_layers=len(
                {k.split(".")[3] for k in state if k.startswith("encoder.transformer.layers.")}
            ),
            encoder_num_heads=16 if dim == 1280 else max(1, dim // 64),
            encoder_attention_dropout=0.0,
            encoder_ff_interm_features=state[
                "encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"
            ].shape[0],
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0,
            encoder_layer_norm_first=norm_everywhere,
            encoder_layer_drop=0.0,
            aux_num_out=None,
        )
        model.load_state_dict(state)
    except (AttributeError, KeyError, StopIteration, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no state_dict of a HuBERT or wav2vec 2.0 model of torchaudio ({error!r:.200})"
        ) from None
    return model


def fingerprint(teacher) -> str:
    """A short hash of what the teacher (on the CPU) says of a fixed second of sound, so that what
    is cached from one teacher is never taken for another's, even if only its code has changed.

    Raises ValueError unless the teacher gives one vector for each of the CNN's frames.
    """
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    waveform = 0.1 * torch.sin(2 * torch.pi * (200 * time + 1500 * time.square()))  # a sweep
    targets = teacher(waveform[None], torch.tensor([SAMPLE_RATE]))
    numbers = []
    for layer, dim, target in zip(teacher.layers, teacher.dims, targets, strict=True):
        if target.shape != (1, frames_of(SAMPLE_RATE), dim):
            raise ValueError(
                f"layer {layer} of the teacher gives {target.shape[1]} vectors of "
                f"{target.shape[2]} numbers for a second of sound; the encoder has "
                f"{frames_of(SAMPLE_RATE)} frames there, and {dim} numbers were announced"
            )
        # A few sums with fixed weights, rounded: processors differ in the last digits.
        said = target.flatten().double()
        place = torch.arange(len(said))
        for pitch in (0.7, 1.1, 1.9):
            weighted = (said * torch.cos(pitch * place)).sum() / len(said) ** 0.5
            numbers.append(round(float(weighted), 3))
    return hashlib.sha1(str(numbers).encode()).hexdigest()[:12]


def initialise(student, teacher) -> int:
    """Copy the teacher's weights into the student's wherever name and shape agree; returns how many numbers were copied.
    With preset base and hubert_base: the CNN, the projection, the positions and the first layers."""
    if not isinstance(teacher, Wav2Vec2Teacher):
        return 0
    ours = student.state_dict()
    fitting = {
        k: v
        for k, v in teacher.model.state_dict().items()
        if k in ours and ours[k].shape == v.shape
    }
    student.load_state_dict(fitting, strict=False)
    return sum(v.numel() for v in fitting.values())
