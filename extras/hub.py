"""An encoder in other people's code: a folder, or a name on the Hugging Face hub.

    from extras.hub import OFAEncoder

    encoder = OFAEncoder.from_pretrained("checkpoints/ofa-tiny")  # or "OWNER/NAME" on the hub
    encoder.save_pretrained("my-encoder")  # writes the folder
    encoder.push_to_hub("OWNER/NAME")  # after `hf auth login`

It is the encoder of ofa_encoder.py, with these three methods of huggingface_hub's
PyTorchModelHubMixin. The folder holds

    config.json          the fields of ofa_encoder.Config
    model.safetensors    the weights, under their names in state_dict(); no code can hide there
    README.md            the model card that the hub shows; one that is there already is kept, so
                         write into it what data the encoder heard, and its licence

From a checkpoint of pretrain.py such a folder is made by

    python -m extras.hub runs/demo/encoder.pt my-encoder
    python -m extras.hub --half checkpoints/ofa-tiny.pt checkpoints/ofa-tiny

Models of transformers are called with `input_values` and `attention_mask`. `encode` is called that
way. Since an encoder shortens the sequence, it also returns the mask of the tokens, which takes the
place of the attention mask in all that follows:

    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    batch = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="pt")
    out = encode(encoder, **batch, lam=encoder.lam_for(60))
    mask = out.attention_mask[:, :, None]  # (B, T, 1)
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)  # (B, D), over the tokens
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ofa_encoder

# 1. Folders and the hub.

CARD = """---
{{ card_data }}
---

# A once-for-all speech encoder

It turns speech at 16 kHz into tokens, at any frame period from 20 ms on. One number, λ, sets it:

```python
from extras.hub import OFAEncoder  # of once-for-all sequence compression for speech

encoder = OFAEncoder.from_pretrained("this folder, or OWNER/NAME")
out = encoder(waveforms, lengths, lam=encoder.lam_for(60))  # (B, samples) -> a token every 60 ms
out.hidden_states[-1], out.lengths  # (B, T, D), (B,)
```

The method: {{ paper_url }}
"""


class OFAEncoder(
    ofa_encoder.OFAEncoder,
    PyTorchModelHubMixin,
    model_card_template=CARD,
    paper_url="https://arxiv.org/abs/2211.02332",
    pipeline_tag="feature-extraction",
    tags=["audio", "speech"],
):
    """The encoder of ofa_encoder.py, with from_pretrained, save_pretrained and push_to_hub."""

    @classmethod
    def from_pretrained(cls, name, **hub) -> "OFAEncoder":
        """The encoder in a folder, or called name on the hub, in eval mode, in float32 on the CPU.

        hub: token, revision, cache_dir and so on, as huggingface_hub takes them. Raises ValueError
        if it is no encoder of this project, or damaged; OSError if it can't be had.
        """
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: save_pretrained writes such a folder")
        try:
            return super().from_pretrained(name, **hub)
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{name}: its config.json can't be read ({error!r:.200})") from None
        except (OSError, HFValidationError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise OSError(
                f"{name} is no folder here, and could not be had from the Hugging Face hub "
                f"({reason}): check the name and the network"
            ) from None

    @classmethod
    def _from_pretrained(cls, *, model_id, config=None, **hub):
        """What the mixin calls, with what config.json says."""
        if Path(model_id).is_dir():
            path = Path(model_id) / "model.safetensors"
        else:
            path = hf_hub_download(model_id, "model.safetensors", **hub)
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read ({error})") from None
        return cls.from_weights(asdict(config) if config else {}, weights, model_id)


# 2. Called as models of transformers are.


class Tokens(NamedTuple):
    """What `encode` returns, under the names of transformers."""

    last_hidden_state: Tensor  # (B, T, D), zero past an utterance's tokens
    attention_mask: Tensor  # (B, T) int64: 1 where there is a token
    hidden_states: tuple[Tensor, ...]  # the Transformer's input and each layer's output


def encode(encoder, input_values, attention_mask=None, lam=0.0) -> Tokens:
    """Tokens of waveforms, as a model of transformers is called.

    input_values (B, samples): at 16 kHz, in [-1, 1] as sound files hold them (do_normalize=False).
    attention_mask (B, samples): 1 for a sample, 0 for padding, which must be on the right; default:
    no padding. Raises ValueError for what the encoder can't take.
    """
    lengths = None
    if attention_mask is not None:
        if attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, "
                f"input_values {tuple(input_values.shape)}: expected the same"
            )
        lengths = attention_mask.long().sum(1)
        samples = torch.arange(input_values.shape[1], device=lengths.device)
        if ((samples < lengths[:, None]) != attention_mask.bool()).any():
            raise ValueError("attention_mask has zeros before ones: pad on the right")
    out = encoder(input_values, lengths, lam)
    hidden = tuple(out.hidden_states)
    tokens = torch.arange(hidden[-1].shape[1], device=out.lengths.device)
    return Tokens(hidden[-1], (tokens < out.lengths[:, None]).long(), hidden)


# 3. From a checkpoint of pretrain.py.


def main():
    parser = argparse.ArgumentParser(
        description="Write the encoder of a checkpoint into a folder for from_pretrained."
    )
    parser.add_argument("checkpoint", help="encoder.pt or checkpoint.pt of pretrain.py")
    parser.add_argument("folder", help="where to write config.json and model.safetensors")
    parser.add_argument("--half", action="store_true", help="weights in float16: half the size")
    args = parser.parse_args()

    encoder = OFAEncoder.from_checkpoint(args.checkpoint)
    if args.half:  # the parameters alone: mean α stays as exact as it is
        for parameter in encoder.parameters():
            parameter.data = parameter.data.half()
    encoder.save_pretrained(args.folder)
    print(f"wrote {args.folder}: config.json, model.safetensors, README.md")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"hub.py: {error}")
