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
    FOLDER       a HuBERT, wav2vec 2.0 or WavLM model of transformers: model.save_pretrained(FOLDER)
    OWNER/NAME   such a model on the Hugging Face hub: facebook/hubert-base-ls960

The s-th vector must belong to the encoder's s-th frame, and there must be as many of them as the
CNN makes frames. `fingerprint` refuses a teacher with another number.

Sources: Chang, Yang and Lee, "DistilHuBERT", ICASSP 2022; Hsu et al., "HuBERT", TASLP 2021; Baevski
et al., "wav2vec 2.0", NeurIPS 2020; Chen et al., "WavLM", JSTSP 2022.
"""

import hashlib
import logging
import re
import sys
from pathlib import Path

import torch
import torchaudio
from torch import nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import compute_deltas
from torchaudio.models.wav2vec2.utils import import_huggingface_model

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
    """A HuBERT, wav2vec 2.0 or WavLM model of torchaudio.

    layers: which to teach, counted from 1. normalise: whether to give it waveforms of mean 0 and
    variance 1; None: if it `expects_normalised`. eps is added to the variance: 1e-5 in fairseq and
    torchaudio.

    The vectors of a layer are its output, after both residual connections, as in torchaudio's
    extract_features. Models that put their norms first (the Large ones) end with one more
    LayerNorm. It comes after the last layer and is left out here, as in the hidden_states of
    transformers 5; transformers 4 and s3prl apply it to the last layer's.
    """

    boundary_dims = None

    def __init__(self, model, layers, normalise=None, eps=1e-5):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.layers = layers
        self.dims = [model.encoder.feature_projection.projection.out_features] * len(layers)
        self.normalise = expects_normalised(model) if normalise is None else normalise
        self.eps = eps

    @torch.no_grad()
    def forward(self, waveforms, lengths):
        if self.normalise:
            valid = [waveform[:n] for waveform, n in zip(waveforms, lengths.tolist())]
            normalised = [layer_norm(x, x.shape, eps=self.eps) for x in valid]
            waveforms = pad_sequence(normalised, batch_first=True)
        x, frames = cnn_features(self.model.feature_extractor, waveforms, lengths)  # (B, S, C)
        outputs = self._outputs(x, frames)
        return [outputs[layer - 1] for layer in self.layers]  # (B, S, D) each

    def _outputs(self, x, frames):
        """Of all layers up to the highest that is taught, (B, S, D) each.

        x (B, S, C): the CNN's frames; frames (B,): how many of them are not padding. torchaudio's
        own loop can't be used: it has no way to tell WavLM what is padding.
        """
        transformer = self.model.encoder.transformer
        layers = transformer.layers[: max(self.layers)]
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (B, S)
        x = self.model.encoder.feature_projection(x).masked_fill(padding[:, :, None], 0)
        x = x + transformer.pos_conv_embed(x)
        if not layers[0].layer_norm_first:
            x = transformer.layer_norm(x)

        # What is added to the scores of attention: nothing, and in the padding minus infinity.
        # WavLM wants it (B, S), the others (B, 1, S, S).
        added = torch.zeros_like(x[:, :, 0]).masked_fill(padding, -torch.inf)
        mask = added[:, None, None].expand(-1, 1, x.shape[1], -1)
        if hasattr(layers[0].attention, "rel_attn_embed"):
            mask = None
        position_bias = None  # WavLM's first layer makes it, and it is handed on
        outputs = []
        for layer in layers:
            x, position_bias = layer(x, mask, position_bias, added)
            outputs.append(x)
        return outputs


def expects_normalised(model) -> bool:
    """Whether a published model with such a CNN was trained on waveforms of mean 0 and variance 1:
    those were whose CNN has a LayerNorm in each layer (HuBERT Large, WavLM Large, XLS-R)."""
    return not isinstance(model.feature_extractor.conv_layers[0].layer_norm, nn.GroupNorm)


# 2. The teachers that can be named.


def load_teacher(name, layers=None):
    """The teacher called name, of TEACHERS, a FILE, a FOLDER or OWNER/NAME, on the CPU.

    layers: which to teach, counted from 1; default: those at a third, two thirds and the end. A
    teacher of one layer ignores it. Raises ValueError or OSError that says what to do.
    """
    if name in TEACHERS:
        return TEACHERS[name](layers)
    if Path(name).is_dir() or _may_be_on_the_hub(name):
        model, normalise = _model_from_transformers(name)
        return _with_layers(model, layers, name, normalise=normalise, eps=1e-7)  # as it does it
    if not Path(name).exists():
        raise ValueError(
            f"no teacher {name}: expected {', '.join(TEACHERS)}, a FILE, a FOLDER or OWNER/NAME"
        )
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


def _may_be_on_the_hub(name) -> bool:
    """Whether name is like OWNER/NAME, and no file, nor what a missing one would be called."""
    if Path(name).exists() or Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return False
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None


def _with_layers(model, layers, name, **normalisation) -> Wav2Vec2Teacher:
    depth = len(model.encoder.transformer.layers)
    if not layers:
        # In a model of fewer than three layers some of these are the same, or below the first.
        layers = sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth})
    if min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"teacher layers {layers}: {name} has layers 1 to {depth}")
    return Wav2Vec2Teacher(model, layers, **normalisation)


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


# 3. Models of transformers.

FAMILIES = ("hubert", "wav2vec2", "wavlm")  # by their model_type in config.json


def _model_from_transformers(name):
    """torchaudio's model with the weights of a FOLDER or of OWNER/NAME on the hub, and whether its
    preprocessor_config.json says that waveforms are to be normalised.

    No code that comes with a model is run. Raises ValueError or OSError that says what to do.
    """
    try:
        import transformers  # here, since only such teachers need it
    except ImportError:
        raise ValueError(
            f"--teacher {name} is read by transformers: pip install transformers"
        ) from None
    _check_family(transformers, name)

    # Loading reports the weights that are not used, those of heads. What counts is what is missing.
    transformers.logging.set_verbosity_error()
    try:
        original, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # a different exception for each kind of damage
        raise ValueError(
            f"{name}: its weights can't be read ({_line(error)}); "
            "expected model.safetensors or pytorch_model.bin beside config.json"
        ) from None
    missing = set(report["missing_keys"]) - {"masked_spec_embed"}  # used by pre-training alone
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, among them {min(missing)}")

    original = original.float().eval()
    model = _as_torchaudio(original, name)
    try:
        extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(name)
        return model, extractor.do_normalize
    except OSError:  # save_pretrained of a model does not write that file
        if expects_normalised(model):
            print(
                f"{name} has no preprocessor_config.json, so waveforms are not normalised. "
                "Published models like it expect them normalised: copy that file from the one "
                "that this model began with",
                file=sys.stderr,
            )
        return model, False


def _check_family(transformers, name):
    """Raise ValueError or OSError unless config.json can be had and says one of FAMILIES."""
    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name} has no config.json: a folder for --teacher is one that transformers' "
            "save_pretrained has written, or a copy of a model on the Hugging Face hub"
        )
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(name)
    except OSError as error:
        if is_folder:
            raise ValueError(f"{name}: its config.json can't be read ({_line(error)})") from None
        raise OSError(
            f"{name} is no folder here, and could not be had from the Hugging Face hub "
            f"({_line(error)}). Check the name and the network; or fetch it elsewhere "
            f"by `hf download {name} --local-dir FOLDER`, and use --teacher FOLDER"
        ) from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ValueError(
            f"{name} holds a model of type {family}; a teacher is of type {', '.join(FAMILIES)}"
        )


def _as_torchaudio(original, name):
    """torchaudio's model with the weights of one of transformers.

    transformers has variants that torchaudio lacks (other activations, batch norm, adapters).
    Raises ValueError unless both say the same of a second of sound.
    """
    # torchaudio warns that there is no head for CTC; none is wanted.
    logging.getLogger(import_huggingface_model.__module__).setLevel(logging.ERROR)
    waveform = _rising_tone()[None]
    try:
        model = import_huggingface_model(original).eval()
        with torch.no_grad():
            ours, _ = model(waveform)
            theirs = original(waveform).last_hidden_state
        same = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    except RuntimeError as error:  # other weights, or another shape
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} is a variant that torchaudio lacks ({reason})") from None
    if not same:
        difference = (ours - theirs).abs().max().item()
        raise ValueError(
            f"{name} is a variant that torchaudio lacks: its vectors come out different, "
            f"by up to {difference:.2g}"
        )
    return model


def _line(error) -> str:
    """The first line of what an error says: those of transformers have many."""
    return str(error).strip().split("\n")[0][:200]


# 4. What pre-training needs of a teacher beside its targets.


def fingerprint(teacher) -> str:
    """A short hash of the vectors that a teacher (on the CPU) gives for one fixed sound.

    What is cached from a teacher is kept under it. Another model, other layers or changed code give
    other vectors, hence another fingerprint, and never find the cache of this one. Raises
    ValueError unless there is one vector for each frame of the CNN.
    """
    targets = teacher(_rising_tone()[None], torch.tensor([SAMPLE_RATE]))  # (1, S, D) for each layer

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


def _rising_tone():
    """A second of sound whose pitch rises from 200 to 3,200 Hz."""
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    return 0.1 * torch.sin(2 * torch.pi * (200 * time + 1500 * time.square()))


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
