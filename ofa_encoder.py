"""The once-for-all encoder: a small speech encoder for any frame period, set by one scalar λ.

    waveforms (B, samples), 16 kHz
        │ CNN, LayerNorm
    x (B, S, C), a frame every 20 ms ─── Predictor ─── α (B, S), about 1 a phone in sum
        │                                              │ modify_alpha, by λ
        │                                              α′ (B, S)
        └────────────────────────┬─────────────────────┘
                                CIF
                                 │
                        tokens (B, T, C)
                                 │ projection, convolutional positions
                        hidden state 0 (B, T, D)
                                 │ Transformer layers
                        hidden states 1, 2, … (B, T, D)

λ changes α into

    α′ = 1 - λ + λ α   for 0 ≤ λ ≤ 1,      (2 - λ) α   for 1 ≤ λ < 2

λ = 0 makes every α′ 1: each frame is a token, and nothing is compressed. λ = 1 leaves α as it is:
about one token a phone, 90 ms. Between them lies a blend. From 1 towards 2, α′ shrinks to zero and
tokens grow without limit. α′ is linear in α, so its mean follows from the mean of α, and the mean
frame period has a closed form:

    period = 20 ms / mean α′ = 20 ms / modify_alpha(mean α, λ)

It is exact but for rounding to whole tokens if mean α is that of the speech itself. A single
utterance differs from the mean of many.

Where α comes from is another choice (Config.alpha). The predictor gives a number between 0 and 1
for each frame, and that number is

    regression   α itself, taught to be 1/n in a segment of n frames (the paper's way). Its sum
                 gives the right rate, but errors add up: tokens soon end anywhere.
    segments     the probability that a segment ends here. Segments end at its peaks, and α is 1/n
                 inside them. α′ is then locked to these ends, so that the running total is whole
                 there whatever λ is: up to λ = 1 no token crosses the end of a segment, and beyond
                 a token is a group of whole segments.

The number of tokens itself has no gradient: λ's arrives through the widths of the pieces that CIF
cuts. Guidance, which teaches α where segments end, acts on α before λ changes it (in pretrain.py).

The compression is chosen by a word. "cif" follows λ. Its fixed-rate peers are the same model with a
constant α′: "none" (1, DistilHuBERT), "average2" and "average4" (1/2 and 1/4, which is average
pooling, as in fixed-length subsampling).

Sources: once-for-all and α′: Chen, Meng and Lee, "Once-for-all sequence compression for
self-supervised speech models", ICASSP 2023, section 3. Fixed- and variable-length subsampling: Meng
et al., "On compressing sequences for self-supervised speech models", SLT 2022. The student: Chang,
Yang and Lee, "DistilHuBERT", ICASSP 2022. Segments and their lock are ours. CNN, positions and
layers are torchaudio's wav2vec 2.0 modules, so HuBERT's weights fit by name.

This file needs torch, torchaudio and cif.py: copy the pair. `python ofa_encoder.py` runs an
untrained encoder at several λ.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, pad, relu
from torch.utils.flop_counter import FlopCounterMode

from cif import ROUNDING, Fired, cif, widest_float

SAMPLE_RATE = 16_000

# HuBERT's CNN has seven layers. Together they look at 400 samples (25 ms) for a frame, and the next
# frame begins 320 samples (20 ms) later.
KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
MIN_SAMPLES = 400
FRAME_MS = 20
LONGEST_MS = 10_000_000  # that can be asked for: a token in three hours; far beyond, λ would be 2

CONSTANT_ALPHA = {"none": 1.0, "average2": 1 / 2, "average4": 1 / 4}
COMPRESSIONS = ("cif", *CONSTANT_ALPHA)
ALPHAS = ("regression", "segments")
RISE = 1e-3  # the smallest rise of a probability that makes a peak
INITIAL_ALPHA = 0.22  # of "cif" before training: about one token in 90 ms


# 1. λ and the frame period.


def modify_alpha(alpha, lam):
    """α′ from alpha (any shape) at λ in [0, 2): a float, or a scalar tensor that gets a gradient.

    The paper writes α′ with relu, which is the same but has no slope at λ = 0 and λ = 1.
    """
    lam = torch.as_tensor(lam, dtype=alpha.dtype, device=alpha.device)
    return torch.where(lam <= 1, 1 - lam + lam * alpha, (2 - lam) * alpha)


def check_lam(lam) -> float:
    """λ as a float. Raises ValueError unless it is one number, 0 ≤ λ < 2."""
    try:
        lam = torch.as_tensor(lam, dtype=torch.float32).detach()  # as α′ sees it: 1.99999999 is 2
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"λ is {lam!r}, expected one number") from None
    if lam.ndim > 1 or lam.numel() != 1:
        raise ValueError(f"λ has shape {tuple(lam.shape)}, expected one number")
    lam = lam.item()
    if not 0 <= lam < 2:
        raise ValueError(
            f"λ is {lam:g}, expected 0 <= λ < 2 (0: a token every 20 ms, 1: about one a phone)"
        )
    return lam


def period_from_lam(lam, mean_alpha) -> float:
    """Mean frame period in ms at λ, for speech of this mean α. ValueError for λ outside [0, 2)."""
    mean_alpha = torch.tensor(float(mean_alpha), dtype=torch.float64)
    tokens_per_frame = modify_alpha(mean_alpha, check_lam(lam)).item()
    return FRAME_MS / tokens_per_frame


def lam_from_period(period_ms, mean_alpha) -> float:
    """The λ whose mean frame period is period_ms: the inverse of period_from_lam.

    Raises ValueError for less than 20 ms, or more than LONGEST_MS.
    """
    if not FRAME_MS <= period_ms <= LONGEST_MS:
        raise ValueError(
            f"a frame period of {period_ms} ms can't be had: it is {FRAME_MS} ms at λ = 0 and "
            f"grows with λ, up to {LONGEST_MS} ms"
        )
    tokens_per_frame = FRAME_MS / period_ms
    if tokens_per_frame > mean_alpha:  # λ is less than 1
        return (1 - tokens_per_frame) / (1 - mean_alpha)
    return 2 - tokens_per_frame / mean_alpha


# 2. From the waveform to frames, and their α.


def frames_of(samples: int) -> int:
    """How many frames the CNN makes of so many samples, 400 or more."""
    samples_between = math.prod(STRIDES)  # 320
    return (samples - MIN_SAMPLES) // samples_between + 1


def cnn_features(extractor, waveforms, lengths):
    """HuBERT's CNN on waveforms (B, samples) at 16 kHz: frames (B, S, C) and their number (B,).

    extractor: torchaudio's FeatureExtractor; lengths (B,): number of valid samples, at least 400
    each. Frames past an utterance's number are of no use, and not zero.

    It differs from torchaudio's own forward in one point. The GroupNorm after the first layer takes
    mean and variance over time. In a padded batch they would include the padding, as they do in
    fairseq and torchaudio, and an utterance's result would depend on the length of the others. So
    each row is normalised alone.
    """
    waveforms = waveforms.to(extractor.conv_layers[0].conv.weight.dtype)  # from half, or double
    padding = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    x = waveforms.masked_fill(padding, 0)[:, None]  # (B, 1, samples)
    for layer in extractor.conv_layers:
        x = layer.conv(x)  # (B, C, S) of this layer
        lengths = (lengths - layer.kernel_size) // layer.stride + 1
        if isinstance(layer.layer_norm, nn.GroupNorm):
            rows = [layer.layer_norm(row[None, :, :n]) for row, n in zip(x, lengths.tolist())]
            x = torch.cat([pad(row, (0, x.shape[2] - row.shape[2])) for row in rows])
        elif layer.layer_norm is not None:
            x = layer.layer_norm(x)
        x = gelu(x)
    return x.transpose(1, 2), lengths


class AlphaPredictor(nn.Module):
    """Conv1d(k=5) → LayerNorm → ReLU → Linear → sigmoid: x (B, S, C) -> (B, S), in (0, 1).

    What it predicts is α itself, or the probability that a segment ends with this frame.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 5, padding=2)
        self.layer_norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.constant_(self.linear.bias, math.log(INITIAL_ALPHA / (1 - INITIAL_ALPHA)))

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)  # (B, S, C)
        x = self.linear(relu(self.layer_norm(x))).squeeze(-1)  # (B, S)
        return x.float().sigmoid()  # α are summed over long times: not in bf16


# 3. Segments: tokens that end where the sound changes.


def peaks(probability, frames):
    """probability (B, S) where it has a peak, and elsewhere 0.

    At a peak it has risen from the frame before, and does not rise on to the next. Only rises of
    more than RISE count, so that rounding makes no peaks in silence. frames (B,): how many are not
    padding. An utterance's last frame is left out: it ends a segment in any case.
    """
    inner = torch.arange(probability.shape[1], device=frames.device) < frames[:, None] - 1
    before = pad(probability, (1, 0))[:, :-1]
    after = pad(probability, (0, 1))[:, 1:]
    is_peak = (probability > before + RISE) & (probability >= after - RISE) & inner
    return probability * is_peak


def segment_ends(probability, frames, threshold):
    """Whether a segment ends with a frame, (B, S) bool: at peaks of the threshold or more, and with
    an utterance's last frame."""
    last = torch.arange(probability.shape[1], device=frames.device) == frames[:, None] - 1
    return (peaks(probability, frames) >= threshold) | last


def segment_alpha(ends):
    """α = 1/n in a segment of n frames, 0 in the padding: ends (B, S) bool -> (B, S).

    In float64, since 1/n is to be 1 when it has been added up n times.
    """
    number = ends.cumsum(1) - ends.long()  # (B, S) of the segment of each frame, counted from 0
    inside = number < ends.sum(1, keepdim=True)  # what follows the last end is padding
    ones = inside.to(widest_float(ends.device))
    size = torch.zeros_like(ones).scatter_add(1, number.clamp(max=ends.shape[1] - 1), ones)
    return ones / size.gather(1, number.clamp(max=ends.shape[1] - 1)).clamp(min=1)


def lock_to_ends(weights, ends):
    """Scale α′ = weights (B, S) so that its running total is whole where tokens are to end.

    ends (B, S) bool: where segments end; weights are 0 in the padding. The total at each end is
    rounded. A token may end there if the rounded total has grown since the end before:

        ends of segments         |           |     |              |
        total of α′             1.4         2.3   2.9            4.2
        rounded                  1           2     3              4
        between these, α′ · g/m  with g = 1, 1, 1, 1, by how much the rounded total has grown,
                                 and m = 1.4, 0.9, 0.6, 1.3, the mass that was there

    Where it has not grown, the segment joins the next one; at the end of the utterance, the one
    before. So the number of tokens is the rounded total, as without the lock. The factor g/m has no
    gradient: λ keeps the slope that it has in α′.

    Up to λ = 1 a segment of n frames has the mass n (1 - λ) + λ, which is at least 1, so the
    rounded total grows at every end: no token crosses one. Beyond, a segment has only 2 - λ, and
    some join the next, as one of 0.3 would here after the third (3.2 in all, rounded 3 again).
    """
    slack = ROUNDING[weights.dtype]  # a total of 2.5 is rounded up, even if it is 2.4999999999
    rounded = (weights.detach().cumsum(1) + 0.5 + slack).floor()  # (B, S)
    reached = (rounded * ends).cummax(1).values  # at the latest end that is not after this frame
    before = pad(reached, (1, 0))[:, :-1]
    growth = reached - before  # (B, S): over 0 where tokens are to end
    grown = growth > 0

    # Frames up to the same such place form a group, and what is left over joins the last one.
    group = grown.cumsum(1) - grown.long()  # (B, S), counted from 0
    group = torch.minimum(group, (grown.sum(1, keepdim=True) - 1).clamp(min=0))
    nothing = torch.zeros_like(weights)
    mass = nothing.scatter_add(1, group, weights.detach())
    factor = nothing.scatter_add(1, group, growth) / mass.where(mass > 0, 1)
    return weights * factor.gather(1, group)


# 4. The encoder.


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder, and its compression. The defaults are HuBERT Base's."""

    channels: tuple[int, ...] = (512,) * 7  # of the CNN's layers; C is the last of them
    dim: int = 768  # D, of the Transformer
    heads: int = 12
    ff: int = 3072  # width inside a layer's feed-forward part
    layers: int = 2
    pos_kernel: int = 128  # of the convolutional positions, in tokens
    dropout: float = 0.1
    compression: str = "cif"  # one of COMPRESSIONS
    alpha: str = "regression"  # one of ALPHAS: where α comes from, if compression is "cif"


PRESETS = {
    "tiny": Config(
        channels=(64, 64, 96, 128, 128, 128, 128),
        dim=192,
        heads=4,
        ff=768,
        pos_kernel=64,
        dropout=0.0,
    ),
    "base": Config(),  # HuBERT Base's widths with two of its twelve layers
}


class Encoded(NamedTuple):
    """What the encoder returns. B utterances, S frames, T tokens of D numbers."""

    # The Transformer's input and each layer's output, (B, T, D); zero past each length.
    hidden_states: list[Tensor]
    lengths: Tensor  # (B,) int64, number of tokens
    alpha: Tensor  # (B, S) α, before λ; of a fixed-rate peer its constant
    predicted: Tensor  # (B, S) what the predictor says: α, or how probably a segment ends here
    fired: Fired  # what CIF did: fire_times to plot, what expand needs, and α′ as fired.alpha
    frames: Tensor  # (B,) int64, number of frames of 20 ms, before compression

    def durations(self) -> Tensor:
        """How long each token is, in frames: (B, T), zero past an utterance's number of tokens.

        It is the sum of the shares that a token has in its frames. Unlike fire_times it has a
        gradient.
        """
        fired = self.fired
        alpha = fired.alpha.gather(1, fired.frame)  # (B, P), of the frame of each piece
        share = fired.width / alpha.where(alpha > 0, 1)
        B, T = fired.fire_times.shape
        # What follows an utterance's tokens has no width, and goes into a column that is cut off.
        sums = share.new_zeros(B, T + 1).scatter_add(1, fired.token.clamp(max=T), share)
        return sums[:, :T].float()

    def frame_period(self) -> float:
        """Mean frame period in ms over the batch."""
        return FRAME_MS * self.frames.sum().item() / self.lengths.sum().item()


class OFAEncoder(nn.Module):
    """The diagram at the top of this file. Raises ValueError for an unknown compression or α."""

    def __init__(self, config: Config):
        super().__init__()
        if config.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression is {config.compression!r}, expected one of {', '.join(COMPRESSIONS)}"
            )
        if config.alpha not in ALPHAS:
            raise ValueError(f"alpha is {config.alpha!r}, expected one of {', '.join(ALPHAS)}")
        self.config = config
        model = torchaudio.models.wav2vec2_model(
            extractor_mode="group_norm",
            extractor_conv_layer_config=list(zip(config.channels, KERNELS, STRIDES)),
            extractor_conv_bias=False,
            encoder_embed_dim=config.dim,
            encoder_projection_dropout=config.dropout,
            encoder_pos_conv_kernel=config.pos_kernel,
            encoder_pos_conv_groups=16,
            encoder_num_layers=config.layers,
            encoder_num_heads=config.heads,
            encoder_attention_dropout=config.dropout,
            encoder_ff_interm_features=config.ff,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=config.dropout,
            encoder_layer_norm_first=False,
            encoder_layer_drop=0.0,
            aux_num_out=None,
        )
        # Under torchaudio's names, which are those of HuBERT's weights. LayerNorm and projection
        # are both in encoder.feature_projection; CIF goes between them.
        self.feature_extractor = model.feature_extractor
        self.encoder = model.encoder
        if config.compression == "cif":
            self.alpha_predictor = AlphaPredictor(config.channels[-1])

        # Mean α of held-out speech, measured by pretrain.py: it turns milliseconds into λ.
        mean_alpha = CONSTANT_ALPHA.get(config.compression, INITIAL_ALPHA)
        self.register_buffer("mean_alpha", torch.tensor(mean_alpha))
        # How probable an end must be. pretrain.py sets it so that segments of held-out speech last
        # --segment-ms.
        if config.alpha == "segments":
            self.register_buffer("end_threshold", torch.tensor(0.5))

    def forward(self, waveforms, lengths=None, lam=0.0) -> Encoded:
        """Hidden states of waveforms at λ.

        waveforms (B, samples): at 16 kHz, of any float type. lengths (B,): number of valid samples
        in each, at least 400; those beyond may hold anything, NaN included. Default: all. lam: λ in
        [0, 2), a float or a scalar tensor; a fixed-rate peer takes 0 alone.

        An utterance's result does not depend on its padding or on the rest of the batch. Raises
        ValueError for wrong shapes, short or non-finite waveforms, and λ that is out of range.
        """
        lengths = self._check(waveforms, lengths, lam)
        x, frames = self.features(waveforms, lengths)
        return self.encode(x, frames, lam)

    def features(self, waveforms, lengths):
        """The part that does not depend on λ, and most of the work: the CNN's normalised frames.

        waveforms (B, samples) at 16 kHz, of any float type, and lengths (B,) in samples, a tensor
        on the same device; neither is checked (`forward` does). Returns x (B, S, C), zero in the
        padding, and the number of frames (B,).
        """
        x, frames = cnn_features(self.feature_extractor, waveforms, lengths)
        x = self.encoder.feature_projection.layer_norm(x)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (B, S)
        return x.masked_fill(padding[:, :, None], 0), frames

    def encode(self, x, frames, lam=0.0, ends=None) -> Encoded:
        """The part that depends on λ. The same frames can be encoded at many λ.

        x (B, S, C) and frames (B,): as `features` returns them. lam: as in `forward`; not checked.
        ends (B, S) bool: where segments end, if it is known; for Config.alpha "segments" alone.
        """
        alpha, predicted, weights = self.weigh(x, frames, lam, ends)
        fired = cif(x, weights, frames)  # tokens (B, T, C)

        # Contextualise the tokens. The rest is DistilHuBERT, on a shorter sequence.
        projection = self.encoder.feature_projection
        x = projection.dropout(projection.projection(fired.tokens))  # (B, T, D)
        valid = torch.arange(x.shape[1], device=x.device) < fired.lengths[:, None]  # (B, T)
        hidden_states = self.transform(x, valid)
        return Encoded(hidden_states, fired.lengths, alpha, predicted, fired, frames)

    def weigh(self, x, frames, lam, ends=None):
        """How much of a token each frame is worth. Arguments as of `encode`; returns α, what the
        predictor says, and α′, each (B, S)."""
        if self.config.compression != "cif":  # a fixed-rate peer has no λ
            constant = CONSTANT_ALPHA[self.config.compression]
            alpha = torch.full(x.shape[:2], constant, device=x.device)
            return alpha, alpha, _enough_for_a_token(alpha, frames)

        predicted = self.alpha_predictor(x)
        if self.config.alpha == "regression":
            weights = modify_alpha(predicted, lam)
            return predicted, predicted, _enough_for_a_token(weights, frames)

        if ends is None:
            ends = segment_ends(predicted, frames, self.end_threshold)
        alpha = segment_alpha(ends)
        weights = _enough_for_a_token(modify_alpha(alpha, lam), frames)
        return alpha, predicted, lock_to_ends(weights, ends)

    def transform(self, x, valid):
        """Positions and layers: projected tokens x (B, T, D) -> hidden states, each (B, T, D).

        valid (B, T): whether there is a token; elsewhere x is ignored and hidden states are zero.
        """
        transformer = self.encoder.transformer
        x = x * valid[:, :, None]  # the convolution must not see what lies past an utterance's end
        x = transformer.dropout(transformer.layer_norm(x + transformer.pos_conv_embed(x)))
        hidden_states = [x]
        attend = valid[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # (B, 1, T, T)
        for layer in transformer.layers:
            x, _ = layer(x, attend)
            hidden_states.append(x)
        return [hidden * valid[:, :, None] for hidden in hidden_states]

    def _check(self, waveforms, lengths, lam):
        """Raise ValueError for what `forward` can't take. Returns lengths as a tensor (B,)."""
        if check_lam(lam) != 0 and self.config.compression != "cif":
            raise ValueError(
                f"λ is {check_lam(lam):g}, but this encoder has one fixed rate "
                f"({self.config.compression}): leave λ at 0"
            )
        if not isinstance(waveforms, Tensor):
            raise ValueError(
                f"waveforms is a {type(waveforms).__name__}, expected a tensor: "
                "torch.from_numpy makes one"
            )
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise ValueError(
                f"waveforms has shape {tuple(waveforms.shape)} and type {waveforms.dtype}, "
                "expected floats (B, samples) at 16 kHz: sound[None] makes a batch of one"
            )
        B, N = waveforms.shape
        lengths = torch.full((B,), N) if lengths is None else torch.as_tensor(lengths)
        if lengths.shape != (B,) or lengths.is_floating_point():
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)} and type {lengths.dtype}, "
                f"expected whole samples ({B},)"
            )
        if B == 0 or (lengths < MIN_SAMPLES).any() or (lengths > N).any():
            raise ValueError(
                f"waveforms of {lengths.tolist()} samples (padded to {N}), "
                f"expected {MIN_SAMPLES} (25 ms at 16 kHz) to {N}"
            )
        lengths = lengths.to(waveforms.device, torch.int64)
        padding = torch.arange(N, device=waveforms.device) >= lengths[:, None]
        if not (waveforms.isfinite() | padding).all():
            raise ValueError("waveforms holds NaN or infinite samples")
        return lengths

    def lam_for(self, period_ms) -> float:
        """The λ for a mean frame period in ms, by the mean α that pre-training measured.

        Raises ValueError as `lam_from_period` does, and from a fixed-rate peer.
        """
        if self.config.compression != "cif":
            raise ValueError(
                f"this encoder has one fixed rate ({self.config.compression}): "
                f"it can't be asked for {period_ms} ms"
            )
        return lam_from_period(period_ms, self.mean_alpha.item())

    def checkpoint(self, dtype=torch.float32) -> dict:
        """What from_checkpoint reads, to be written with torch.save. float16 halves the file."""
        weights = {}
        for name, value in self.state_dict().items():
            is_number = value.ndim == 0  # mean_alpha and end_threshold: as exact as they are
            weights[name] = value.cpu() if is_number else value.cpu().to(dtype)
        return {"config": asdict(self.config), "encoder": weights}

    @classmethod
    def from_checkpoint(cls, path) -> "OFAEncoder":
        """The encoder in a file that pretrain.py wrote, in eval mode, in float32 on the CPU.

        Raises ValueError if there is no such file or it holds something else. No code in the file
        is run.
        """
        content = load_checkpoint(path)
        return cls.from_weights(content.get("config"), content.get("encoder"), path)

    @classmethod
    def from_weights(cls, config, weights, name) -> "OFAEncoder":
        """The encoder of a Config as a dict and a state_dict, in eval mode, in float32.

        name: what to call them in an error. Raises ValueError if they do not belong together.
        """
        try:
            config = dict(config)
            config["channels"] = tuple(config["channels"])
            encoder = cls(Config(**config))
            encoder.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(
                f"{name} holds no encoder of this project, or a damaged one ({error!r:.300})"
            ) from None
        if not all(value.isfinite().all() for value in encoder.state_dict().values()):
            raise ValueError(f"{name} holds NaN or infinite weights")
        return encoder.float().eval()


def _enough_for_a_token(weights, frames):
    """α′ (B, S) without padding; a sum below half a token is raised to just over half.

    CIF would fire nothing there, and an utterance without tokens has no hidden states: no head
    could say anything of it, and attention over nothing is NaN.
    """
    padding = torch.arange(weights.shape[1], device=weights.device) >= frames[:, None]
    weights = weights.masked_fill(padding, 0)
    mass = weights.sum(1, keepdim=True)  # (B, 1)
    return weights * (0.501 / mass).clamp(min=1)


def load_checkpoint(path, map_location="cpu") -> dict:
    """torch.load, without running code that is in the file.

    Raises ValueError that says what is wrong if there is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no checkpoint at {path}: correct the path, or pre-train an encoder with `make demo` "
            "or pretrain.py"
        )
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a cut file, pickled code, text: each has an exception of its own
        raise ValueError(
            f"{path} is no checkpoint, or it is damaged, or it holds more than tensors and plain "
            f"values, which is not loaded because it could run code ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


# 5. What λ saves.


@torch.no_grad()
def transformer_gflops(encoder, waveforms, lam, device="cpu", ends=None) -> float:
    """GFLOPs in positions and Transformer layers per second of speech, at λ.

    waveforms: a list of tensors (samples,), each of which is encoded alone. ends: for each of them
    where segments end, as `encode` takes it, if it is known.
    """
    flops = 0
    samples = 0
    for waveform, its_ends in zip(waveforms, ends or [None] * len(waveforms)):
        n = torch.tensor([len(waveform)], device=device)
        x, frames = encoder.features(waveform[None].to(device), n)
        tokens = encoder.encode(x, frames, lam, its_ends).fired.tokens  # (1, T, C)
        x = encoder.encoder.feature_projection.projection(tokens)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
        # The counter knows plain attention, but not the fused kernels of CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder.transform(x, valid)
        flops += counter.get_total_flops()
        samples += len(waveform)
    return flops / 1e9 / (samples / SAMPLE_RATE)


if __name__ == "__main__":
    torch.manual_seed(0)
    encoder = OFAEncoder(PRESETS["tiny"]).eval()
    size = sum(p.numel() for p in encoder.parameters())
    print(f"tiny, untrained: {size / 1e6:.2f} M parameters; 2 s of noise")
    for lam in (0, 0.25, 0.5, 0.75, 1, 1.5):
        with torch.no_grad():
            out = encoder(torch.randn(1, 2 * SAMPLE_RATE), lam=lam)
        predicted = period_from_lam(lam, out.alpha.mean())
        print(
            f"λ = {lam:<4}  hidden states {tuple(out.hidden_states[-1].shape)}  "
            f"a token every {out.frame_period():5.1f} ms (closed form {predicted:5.1f})"
        )
