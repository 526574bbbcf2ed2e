"""Rivals that need no training: frames of an encoder without compression, merged as they are.

An encoder that was pre-trained without compression sees a frame every 20 ms. Nothing forbids
merging its frames anyway, and giving its Transformer fewer tokens than it was trained on:

    average   tokens of equal length, as average pooling gives them, at any rate
    merge     neighbours that are alike: a token ends where the cosine of two neighbouring frames is
              lowest, as many times as the rate asks for, and is the mean of its frames

Both follow λ as once-for-all does: tokens per frame = modify_alpha(0.22, λ). How far
these two (finetune.py --features) fall short of once-for-all is what pre-training with compression
is worth.

Source of merging: Li et al., "Accelerating Transducers through adjacent token merging" (A-ToMe),
Interspeech 2023. There neighbours are merged between layers, in several rounds; here before the
first layer, in one.
"""

from dataclasses import replace

import torch
from torch.nn.functional import cosine_similarity

from ofa_encoder import INITIAL_ALPHA, OFAEncoder, modify_alpha, segment_alpha

RIVALS = ("average", "merge")


class Rival(OFAEncoder):
    """The encoder with its frames merged by one of RIVALS. Raises ValueError if it compresses."""

    def __init__(self, encoder: OFAEncoder, by):
        if encoder.config.compression != "none":
            raise ValueError(
                f"--features {by} merges the frames of an encoder without compression: pre-train "
                "one with pretrain.py --compression none"
            )
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        # To whoever asks, it is an encoder that follows λ.
        self.config = replace(encoder.config, compression="cif")
        self.mean_alpha.fill_(INITIAL_ALPHA)
        self.by = by

    def weigh(self, x, frames, lam, ends=None):
        rate = modify_alpha(self.mean_alpha, lam)  # tokens per frame
        if self.by == "average":
            # In a very short utterance, enough for one token.
            alpha = torch.maximum(rate, 0.501 / frames)[:, None].expand(x.shape[:2])
        else:
            alpha = segment_alpha(self.ends_by_likeness(x, frames, rate))
        return alpha, alpha, alpha

    def ends_by_likeness(self, x, frames, rate):
        """Where tokens end, (B, S) bool: with each utterance's last frame, and where neighbours are
        least alike."""
        B, S, _ = x.shape
        place = torch.arange(S, device=x.device)
        last = place == frames[:, None] - 1  # (B, S)
        likeness = torch.full((B, S), 2.0, device=x.device)  # of a frame and the next; 2: no next
        likeness[:, :-1] = cosine_similarity(x[:, :-1], x[:, 1:], dim=2)
        likeness = likeness.masked_fill(place >= frames[:, None] - 1, 2.0)
        inner = (rate * frames).round().clamp(min=1) - 1  # (B,) ends beside the last one
        rank = likeness.argsort(1).argsort(1)  # (B, S): 0 for the least alike
        return (rank < inner[:, None]) | last
