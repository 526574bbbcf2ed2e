"""The once-for-all encoder: a small speech encoder that runs at any frame period, set by one scalar λ.

    waveform (B, samples) ─ CNN ─ LayerNorm ─ x (B, S, C), a frame every 20 ms
    x ─ AlphaPredictor ─ α (B, S) in (0, 1), about one unit of mass per phone
    α′ = 1 - λ + λ α  for λ <= 1,   (2 - λ) α  for λ >= 1           modify_alpha
    x, α′ ─ CIF ─ tokens (B, T, C) ─ projection ─ + convolutional positions ─ Transformer layers ─ hidden states (B, T, D)

λ = 0 makes every α′ 1: every frame is a token, 20 ms, no compression. λ = 1 leaves α: about a token a phone, ~90 ms.
Between them lies a blend; from 1 towards 2, α′ shrinks to zero and tokens grow without limit.
Mean α′ is linear in λ on either side of 1, so the mean frame period has a closed form:

    period = 20 ms / mean α′,   mean α′ = 1 - λ (1 - mean α) for λ <= 1,   (2 - λ) mean α for λ >= 1

exact but for rounding to whole tokens, if mean α is that of the speech itself; an utterance differs from the mean.

Compression is chosen by a word. With "cif" it follows λ. The fixed-rate peers are the same model with constant α′:
"none" (1; DistilHuBERT), "average2" and "average4" (1/2 and 1/4: average pooling, as fixed-length subsampling does).

Sources: once-for-all and α′: Chen, Meng and Lee, "Once-for-all sequence compression for self-supervised speech models",
ICASSP 2023. Fixed- and variable-length subsampling: Meng et al., "On compressing sequences for
self-supervised speech models", SLT 2022. The student: Chang et al., "DistilHuBERT", ICASSP 2022. CNN, positions and
layers are torchaudio's wav2vec 2.0 modules, so HuBERT's weights fit by name.

`python ofa_encoder.py` runs an untrained encoder at several λ.
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

from cif import Fired, cif

FRAME_MS = 20
SAMPLE_RATE = 16_000
MIN_SAMPLES = 400  # what the CNN needs for one frame: 25 ms
CONSTANT_ALPHA = {"none": 1.0, "average2": 1 / 2, "average4": 1 / 4}
COMPRESSIONS = ("cif", *CONSTANT_ALPHA)


def frames_of(samples: int) -> int:
    """How many frames the CNN makes of so many samples: one for the first 400, one for every 320 more."""
    return (samples - MIN_SAMPLES) // 320 + 1


def modify_alpha(alpha, lam):
    """α′ from alpha (any shape) and λ in [0, 2), a float or a scalar tensor with gradient."""
    lam = torch.as_tensor(lam, dtype=alpha.dtype, device=alpha.device)
    return torch.where(
        lam <= 1, 1 - lam + lam * alpha, (2 - lam) * alpha
    )  # relu has no slope at its corner, λ = 0 or 1


def period_from_lam(lam, mean_alpha) -> float:
    """Mean frame period in ms at λ, for speech whose mean α is mean_alpha."""
    return (
        FRAME_MS
        / modify_alpha(torch.tensor(float(mean_alpha), dtype=torch.float64), check_lam(lam)).item()
    )


def lam_from_period(period_ms, mean_alpha) -> float:
    """The λ whose mean frame period is period_ms, at least 20 ms. The inverse of period_from_lam."""
    if not FRAME_MS <= period_ms < math.inf:
        raise ValueError(
            f"a frame period of {period_ms} ms can't be had: it is {FRAME_MS} ms at λ = 0 and grows with λ"
        )
    rate = FRAME_MS / period_ms  # tokens per frame
    return (1 - rate) / (1 - mean_alpha) if rate >= mean_alpha else 2 - rate / mean_alpha


def check_lam(lam) -> float:
    lam = torch.as_tensor(lam, dtype=torch.float32).detach()  # as α′ will see it: 1.99999999 is 2
    if lam.numel() != 1:
        raise ValueError(f"λ has shape {tuple(lam.shape)}, expected one number")
    lam = lam.item()
    if not 0 <= lam < 2:
        raise ValueError(
            f"λ is {lam:g}, expected 0 <= λ < 2 (0: a token every 20 ms, 1: about one a phone)"
        )
    return lam


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder. HuBERT's CNN has seven layers of these kernels and strides: a frame sees 400 samples, the next one starts 320 later."""

    channels: tuple[int, ...] = (512,) * 7  # of the CNN
    dim: int = 768  # D, of the Transformer
    heads: int = 12
    ff: int = 3072  # width inside a layer's feed-forward part
    layers: int = 2
    pos_kernel: int = 128  # of the convolutional positions, in tokens
    dropout: float = 0.1
    compression: str = "cif"


KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
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
    """What the encoder returns."""

    hidden_states: list[
        Tensor
    ]  # the Transformer's input and each layer's output, (B, T, D), zero past each length
    lengths: Tensor  # (B,) tokens
    alpha: Tensor  # (B, S) α, before λ; of a fixed-rate peer its constant
    fired: Fired  # what CIF did: fire_times to plot, what expand needs, and α′, as fired.alpha
    frames: Tensor  # (B,) frames of 20 ms, before compression

    def frame_period(self) -> float:
        """Mean frame period in ms over the batch."""
        return FRAME_MS * self.frames.sum().item() / self.lengths.sum().item()


class AlphaPredictor(nn.Module):
    """Conv1d(k=5) → LayerNorm → ReLU → Linear → sigmoid: x (B, S, C) -> α (B, S)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 5, padding=2)
        self.layer_norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.constant_(self.linear.bias, math.log(0.22 / 0.78))  # start near one token in 90 ms

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.linear(relu(self.layer_norm(x))).squeeze(-1).float().sigmoid()


class OFAEncoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        if config.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression is {config.compression!r}, expected one of {', '.join(COMPRESSIONS)}"
            )
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
        self.feature_extractor, self.encoder = model.feature_extractor, model.encoder
        if config.compression == "cif":
            self.alpha_predictor = AlphaPredictor(config.channels[-1])
        # Mean α of held-out speech, measured by pretrain.py: it turns milliseconds into λ.
        self.register_buffer(
            "mean_alpha", torch.tensor(CONSTANT_ALPHA.get(config.compression, 0.22))
        )

    def forward(self, waveforms, lengths=None, lam=0.0) -> Encoded:
        """waveforms (B, samples) at 16 kHz, of any float type; lengths (B,) valid samples, at least
        400 each; λ a float or a scalar tensor.

        An utterance's result does not depend on its padding or company, and it has at least one token.
        Raises ValueError for wrong shapes, short or non-finite waveforms, λ outside [0, 2), or λ != 0 for a fixed-rate peer.
        """
        lengths = self._check(waveforms, lengths, lam)
        return self.encode(*self.features(waveforms, lengths), lam)

    def features(self, waveforms, lengths):
        """What λ does not change, and most of the cost: the CNN's normalised frames x (B, S, C), zero in the padding, and their number (B,)."""
        x, frames = cnn_features(self.feature_extractor, waveforms, lengths)  # (B, S, C)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (B, S)
        return self.encoder.feature_projection.layer_norm(x).masked_fill(
            padding[:, :, None], 0
        ), frames

    def encode(self, x, frames, lam=0.0) -> Encoded:
        """The rest, at λ: x (B, S, C) and frames (B,) of `features`. The same frames can be encoded at many λ."""
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (B, S)
        if self.config.compression == "cif":
            alpha = self.alpha_predictor(x)  # (B, S)
            weights = modify_alpha(alpha, lam)
        else:
            alpha = weights = torch.full(
                padding.shape, CONSTANT_ALPHA[self.config.compression], device=x.device
            )
        # CIF fires nothing where all α′ add up to less than half a token; then raise them to just over half.
        mass = weights.masked_fill(padding, 0).sum(1, keepdim=True)
        fired = cif(x, weights * (0.501 / mass).clamp(min=1), frames)  # tokens (B, T, C)

        x = self.encoder.feature_projection.dropout(
            self.encoder.feature_projection.projection(fired.tokens)
        )  # (B, T, D)
        valid = torch.arange(x.shape[1], device=x.device) < fired.lengths[:, None]
        hidden_states = self.transform(x, valid)
        return Encoded(hidden_states, fired.lengths, alpha, fired, frames)

    def transform(self, x, valid):
        """Positions and layers: tokens x (B, T, D), valid (B, T) -> hidden states, each (B, T, D)."""
        transformer = self.encoder.transformer
        x = x * valid[:, :, None]
        x = transformer.dropout(transformer.layer_norm(x + transformer.pos_conv_embed(x)))
        hidden_states = [x]
        attend = valid[:, None, None, :].expand(
            -1, 1, x.shape[1], -1
        )  # (B, 1, T, T): to valid tokens only
        for layer in transformer.layers:
            x, _ = layer(x, attend)
            hidden_states.append(x)
        return [h * valid[:, :, None] for h in hidden_states]

    def _check(self, waveforms, lengths, lam):
        if check_lam(lam) != 0 and self.config.compression != "cif":
            raise ValueError(
                f"λ is {check_lam(lam):g}, but this encoder has one fixed rate ({self.config.compression}): "
                "leave λ at 0"
            )
        if not isinstance(waveforms, Tensor):
            raise ValueError(
                f"waveforms is a {type(waveforms).__name__}, expected a tensor: torch.from_numpy makes one"
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
                f"lengths has shape {tuple(lengths.shape)} and type {lengths.dtype}, expected whole samples ({B},)"
            )
        if B == 0 or (lengths < MIN_SAMPLES).any() or (lengths > N).any():
            raise ValueError(
                f"waveforms of {lengths.tolist()} samples (padded to {N}), "
                f"expected {MIN_SAMPLES} (25 ms at 16 kHz) to {N}"
            )
        lengths = lengths.to(waveforms.device)
        padding = torch.arange(N, device=waveforms.device) >= lengths[:, None]
        if not (waveforms.isfinite() | padding).all():
            raise ValueError("waveforms holds NaN or infinite samples")
        return lengths

    def lam_for(self, period_ms) -> float:
        """λ for a wanted mean frame period in ms, by the mean α measured when this encoder was pre-trained."""
        if self.config.compression != "cif":
            raise ValueError(
                f"this encoder has one fixed rate ({self.config.compression}): it can't be asked for {period_ms} ms"
            )
        return lam_from_period(period_ms, self.mean_alpha.item())

    def checkpoint(self, dtype=torch.float32) -> dict:
        """What from_checkpoint reads: give it to `save`. float16 halves the file; only mean_alpha, one number, stays as it is."""
        return {
            "config": asdict(self.config),
            "encoder": {
                k: v.cpu().to(dtype if v.ndim else v.dtype) for k, v in self.state_dict().items()
            },
        }

    @classmethod
    def from_checkpoint(cls, path) -> "OFAEncoder":
        """The encoder in a file that pretrain.py wrote, in eval mode, in float32 on the CPU.
        Raises ValueError if there is no such file or it holds something else. No code in the file is run."""
        content = load_checkpoint(path)
        try:
            encoder = cls(
                Config(**{**content["config"], "channels": tuple(content["config"]["channels"])})
            )
            encoder.load_state_dict(content["encoder"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no encoder of this project, or a damaged one ({error!r:.300})"
            ) from None
        if not all(v.isfinite().all() for v in encoder.state_dict().values()):
            raise ValueError(f"{path} holds NaN or infinite weights")
        return encoder.float().eval()


def cnn_features(extractor, waveforms, lengths):
    """HuBERT's CNN on waveforms (B, samples) -> frames (B, S, C) and their number (B,).

    As torchaudio's FeatureExtractor, but the first layer's GroupNorm (one group a channel) sees each utterance alone. Its mean
    and variance over time, taken over the padding too as in fairseq and torchaudio, would depend on the utterance's company.
    """
    waveforms = waveforms.to(extractor.conv_layers[0].conv.weight.dtype)  # from half, or double
    x = waveforms.masked_fill(
        torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None], 0
    )[:, None]
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


@torch.no_grad()
def transformer_gflops(encoder, waveforms, lam, device="cpu") -> float:
    """GFLOPs in positions and Transformer layers per second of speech, each utterance encoded alone."""
    flops = 0
    for waveform in waveforms:
        tokens = encoder(waveform[None].to(device), lam=lam).fired.tokens
        x = encoder.encoder.feature_projection.projection(tokens)
        # Fused attention kernels are not counted on CPUs, the plain one is.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder.transform(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device))
        flops += counter.get_total_flops()
    return flops / 1e9 / (sum(map(len, waveforms)) / SAMPLE_RATE)


def load_checkpoint(path, map_location="cpu"):
    """torch.load, safely, with a ValueError that says what is wrong with the file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: pre-train one with `make demo` or pretrain.py")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # truncated, pickled code, no checkpoint at all: torch has a different exception for each
        raise ValueError(
            f"{path} is no checkpoint, or it is damaged, or it holds more than tensors and plain values, which is not "
            f"loaded because it could run code ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


if __name__ == "__main__":
    torch.manual_seed(0)
    encoder = OFAEncoder(PRESETS["tiny"]).eval()
    print(
        f"tiny, untrained: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters; 2 s of noise"
    )
    with torch.no_grad():
        for lam in (0, 0.25, 0.5, 0.75, 1, 1.5):
            out = encoder(torch.randn(1, 2 * SAMPLE_RATE), lam=lam)
            predicted = period_from_lam(lam, out.alpha.mean())
            print(
                f"λ = {lam:<4}  hidden states {tuple(out.hidden_states[-1].shape)}  "
                f"a token every {out.frame_period():5.1f} ms (closed form {predicted:5.1f})"
            )
