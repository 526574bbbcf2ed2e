"""The work of the Transformer, counted."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ofa_encoder import SAMPLE_RATE


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
