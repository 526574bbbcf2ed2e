"""This encoder as an upstream of s3prl, the toolkit of SUPERB, at any λ.

s3prl (https://github.com/s3prl/s3prl) takes an upstream's hidden states at one constant rate and
tells their number from the waveform: one frame for every 320 samples, rounded up. Tokens have no
constant rate, so each hidden state is spread back over the frames its tokens were made of:

    waveforms ── OFAEncoder at λ ── hidden states (B, T, D) ── expand ── (B, F, D),
                                                               F = ⌈samples / 320⌉

A frame gets the weighted mean of the tokens it is part of, and what follows the last token repeats
it. So the Transformer saves what λ promises; s3prl's heads save nothing, since they read F frames.

In Python (`register` makes "ofa" known to s3prl, and must come before s3prl is imported):

    from extras.s3prl_expert import register

    register()
    from s3prl.nn import Featurizer, S3PRLUpstream

    upstream = S3PRLUpstream("ofa", "checkpoints/ofa-tiny.pt", extra_conf={"lam": 0.5})

On the command line this file takes what s3prl's run_downstream.py takes. -k is the checkpoint, and
-g holds λ or a frame period in ms, as YAML or in a YAML file:

    python -m extras.s3prl_expert -m train -n ic-60ms -d fluent_commands -c CONFIG.yaml \\
        -u ofa -k checkpoints/ofa-tiny.pt -g "ms: 60"

Source: s3prl 0.4.18, nn/upstream.py and upstream/example/expert.py. What this file does not do:
fetch SUPERB's corpora, or install what s3prl's recipes import beyond s3prl itself.
"""

import sys
import types
from contextlib import suppress
from pathlib import Path

import torch
import torchaudio
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from cif import expand
from ofa_encoder import MIN_SAMPLES, OFAEncoder, check_lam

SAMPLES_PER_FRAME = 320


class UpstreamExpert(nn.Module):
    """The encoder behind s3prl's interface of an upstream.

    ckpt: a file that pretrain.py wrote.
    model_config: {"lam": λ} or {"ms": frame period}, or the same as YAML, or a file that holds it.
    lam, ms: the same as keywords, which go before model_config. Without any of them, λ = 0.
    others: what s3prl gives every upstream, such as refresh; not used.

    `expert.lam` may be set to another λ at any time. Raises ValueError for what can't be used.
    """

    def __init__(self, ckpt=None, model_config=None, *, lam=None, ms=None, **others):
        super().__init__()
        if ckpt is None:
            raise ValueError("which encoder? give its checkpoint as ckpt (-k)")
        self.encoder = OFAEncoder.from_checkpoint(ckpt)
        if lam is None and ms is None:
            config = read_config(model_config)
            lam = config.get("lam")
            ms = config.get("ms")
        if lam is not None and ms is not None:
            raise ValueError("lam and ms say the same: give one of them")
        if ms is not None:
            lam = self.encoder.lam_for(ms)
        self.lam = check_lam(0.0 if lam is None else lam)
        config = self.encoder.config
        if self.lam and config.compression != "cif":
            raise ValueError(f"{ckpt} has one fixed rate ({config.compression}) and no λ")

    def get_downsample_rates(self, key: str) -> int:
        """Samples for each frame of what `forward` returns under key: the same for all."""
        return SAMPLES_PER_FRAME

    def forward(self, wavs) -> dict:
        """wavs: a list of waveforms (samples,) at 16 kHz, of any lengths, none of them empty.

        Returns hidden_states, a list of the Transformer's input and each layer's output, and
        last_hidden_state, each (B, F, D): F frames for the longest utterance, zero past an
        utterance's own ⌈samples / 320⌉. An utterance's frames do not depend on the others.
        """
        samples = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)  # (B,)
        waveforms = pad_sequence(list(wavs), batch_first=True)  # (B, longest)

        # The CNN looks at 400 samples for its first frame. A shorter sound gets zeros.
        waveforms = pad(waveforms, (0, max(0, MIN_SAMPLES - waveforms.shape[1])))
        encoded = self.encoder(waveforms, samples.clamp(min=MIN_SAMPLES), self.lam)
        fired = encoded.fired

        # What is part of no token goes to the last one: a tail that was dropped, and the one or two
        # frames that s3prl counts beyond the CNN's last.
        wanted = (samples + SAMPLES_PER_FRAME - 1) // SAMPLES_PER_FRAME  # (B,)
        F = int(wanted.max())
        ones = torch.ones_like(encoded.hidden_states[0][:, :, :1])  # (B, T, 1)
        left = 1 - to_length(expand(ones, fired), F)  # (B, F, 1)
        last = encoded.lengths - 1  # (B,)
        row = torch.arange(len(wavs), device=wanted.device)
        valid = torch.arange(F, device=wanted.device) < wanted[:, None]  # (B, F)

        hidden_states = []
        for hidden in encoded.hidden_states:
            frames = to_length(expand(hidden, fired), F) + left * hidden[row, last][:, None]
            hidden_states.append(frames * valid[:, :, None])  # (B, F, D)
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}


def to_length(x, length):
    """x (B, S, D) with zeros after it: (B, length, D)."""
    return pad(x, (0, 0, 0, length - x.shape[1]))


def read_config(model_config) -> dict:
    """{"lam": λ}, {"ms": frame period} or {} from a dict, YAML, a file of YAML, or None.

    Raises ValueError for anything else.
    """
    import yaml  # s3prl depends on it

    if model_config is None:
        return {}
    config = model_config
    if not isinstance(config, dict):
        text = str(model_config)
        try:
            with suppress(OSError):  # it is no file, but YAML
                text = Path(text).read_text(encoding="utf-8")
            config = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
    numbers = isinstance(config, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in config.values()
    )
    if not numbers or set(config) - {"lam", "ms"}:
        raise ValueError(
            f"model_config is {model_config!r}, expected a YAML file, or YAML, with one number: "
            '"lam: 0.5" or "ms: 60"'
        )
    return config


def register():
    """Make the encoder known to s3prl as "ofa". Call it before anything of s3prl is imported.

    Raises ModuleNotFoundError if s3prl, or a library that it imports, is missing.
    """
    _restore_old_names()
    from s3prl import hub

    hub.ofa = UpstreamExpert


def _restore_old_names():
    """s3prl 0.4.18 imports, for other upstreams and uploads, names that torchaudio 2.9 and
    huggingface_hub 1.0 have dropped. They have to be there, but nothing here uses them."""
    import huggingface_hub

    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = _do_nothing
    if not hasattr(torchaudio, "sox_effects"):
        torchaudio.sox_effects = types.ModuleType("torchaudio.sox_effects")
        torchaudio.sox_effects.apply_effects_tensor = None
        sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects
    for name in ("HfFolder", "Repository"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, None)


def _do_nothing(backend):
    """torchaudio finds its backend itself."""


def main():
    try:
        register()
        from s3prl.run_downstream import main as run_downstream
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing: pip install -r tests/requirements.txt, "
            f"or pip install {error.name}"
        ) from None
    run_downstream()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"s3prl_expert.py: {error}")
