"""The encoder as an ONNX file: other runtimes then run it without Python or PyTorch.

    python -m extras.export checkpoints/ofa-tiny.pt runs/ofa-tiny.onnx

writes the file, compares onnxruntime with PyTorch on twenty prompts of the embedded corpus at
several λ, and times both. λ is an input of the graph, and all lengths are free:

    waveforms (B, samples) float32, lengths (B,) int64, lam () float64
        -> hidden_states (B, layers + 1, T, D), n_tokens (B,) int64, fire_times (B, T)

as `OFAEncoder` returns them, with its hidden states stacked. The graph checks nothing: waveforms
are at 16 kHz, finite, and of 400 samples or more, and 0 ≤ λ < 2. Only forward, and in eval mode.

Three things in the encoder have no ONNX graph: in two of them Python code looks at values, and the
third is an operator that ONNX lacks. Here they are written once more, with the same result:

    GroupNorm    of each utterance alone: mean and variance over a mask, instead of a loop over rows
    cif          a sum over pieces by scatter_add, counts instead of searchsorted, no checks
    cummax       by doubling (only for Config.alpha "segments")

What is left that depends on values is T, the number of tokens, and torch.export can be told of it.
How many there are is a comparison of sums with limits. Where a sum is as close to its limit as
rounding errors are, two runtimes may differ by a token; that is rare, and the comparison shows it.

Sources: torch.export's documentation on data-dependent values; searchsorted can't be exported
(pytorch issue 151648).
"""

import parts  # noqa: F401  before torch: it sets how the threads of torch wait

# isort: split
import argparse
import logging
import sys
import warnings
from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, pad

from cif import ROUNDING, _fire_times, _merge_rulers, widest_float
from extras.benchmark import interleaved
from ofa_encoder import SAMPLE_RATE, OFAEncoder
from parts.data import load
from parts.runs import atomic_write

INPUTS = ("waveforms", "lengths", "lam")
OUTPUTS = ("hidden_states", "n_tokens", "fire_times")
LAMS = (0.0, 0.3, 0.5, 1.0, 1.5)  # at which onnxruntime is compared with PyTorch
TOLERANCE = 1e-4
LONGEST = 2**20  # frames in an utterance, nearly six hours: how far the running maximum looks back


# 1. What has to be written once more.


def cif_graph(x, alpha, lengths):
    """`cif` with its defaults, without a step that looks at values but for T.

    x (B, S, C), alpha (B, S), lengths (B,) as in `cif`, and nothing is checked. Each utterance's α
    may add up to S at most. Returns tokens (B, T, C), their number (B,) and fire times (B, T).
    """
    B, S, C = x.shape
    padding = torch.arange(S, device=x.device) >= lengths[:, None]
    alpha = alpha.to(widest_float(x.device)).masked_fill(padding, 0)
    slack = ROUNDING[alpha.dtype]

    # As in `cif`: count the token ends at or before each frame end, and see whether a tail fires.
    total = alpha.cumsum(1)  # (B, S)
    fires = (total + slack).long()  # (B, S)
    full = fires[:, -1]  # (B,)
    tail = total[:, -1] - full
    fires_tail = tail + slack >= 0.5
    n_tokens = full + fires_tail.long()

    # The list of pieces is as long as if S tokens fired. What is too much has width 0.
    frame, token, width = _merge_rulers(total, fires, lengths, S, 1.0)  # (B, 2 S)
    width = width.masked_fill(token >= n_tokens[:, None], 0)
    scale = 1 / tail.where(fires_tail, 1)
    weight = torch.where(token == full[:, None], width * scale[:, None], width).to(x.dtype)

    # Add every piece to its token. There are at most S, and one place more for what has no width.
    pieces = x.gather(1, frame[:, :, None].expand(-1, -1, C)) * weight[:, :, None]
    place = token.clamp(max=S)[:, :, None].expand(-1, -1, C)
    tokens = x.new_zeros(B, S + 1, C).scatter_add(1, place, pieces)

    # The frame in which token t fired: so many frames end before it, with t or fewer token ends.
    ones = torch.ones_like(fires)
    during = ones.new_zeros(B, S + 1).scatter_add(1, fires, ones).cumsum(1)  # (B, S + 1)
    during = torch.minimum(during, lengths[:, None] - 1)
    times = _fire_times(total, alpha, during, 1.0)
    number = torch.arange(S + 1, device=x.device)
    times = times.where(number < full[:, None], lengths[:, None].to(times))
    times = times.masked_fill(number >= n_tokens[:, None], 0).float()

    # Only now look at a value.
    T = n_tokens.max().item()
    torch._check(T >= 1)
    torch._check(T <= S)
    return tokens.narrow(1, 0, T), n_tokens, times.narrow(1, 0, T)


def cnn_graph(extractor, waveforms, lengths):
    """`cnn_features` with GroupNorm over a mask. Arguments and results as there."""
    padding = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    x = waveforms.masked_fill(padding, 0)[:, None]  # (B, 1, samples)
    for layer in extractor.conv_layers:
        x = layer.conv(x)  # (B, C, S) of this layer
        lengths = (lengths - layer.kernel_size) // layer.stride + 1
        if isinstance(layer.layer_norm, nn.GroupNorm):
            x = masked_norm(x, lengths, layer.layer_norm)
        elif layer.layer_norm is not None:
            x = layer.layer_norm(x)
        x = gelu(x)
    return x.transpose(1, 2), lengths


def masked_norm(x, lengths, norm):
    """GroupNorm of single channels, over each utterance's own lengths (B,): x (B, C, S).

    Sums are in float64. onnxruntime adds one number after the other, and α and its running total
    pass on what float32 loses: after 80 s, hidden states were 2.5e-3 away.
    """
    valid = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]  # (B, 1, S)
    n = lengths[:, None, None]
    mean = (x * valid).sum(2, keepdim=True, dtype=torch.float64) / n  # (B, C, 1)
    centred = x - mean.to(x.dtype)
    variance = (centred * valid).square().sum(2, keepdim=True, dtype=torch.float64) / n
    normal = centred * (variance + norm.eps).rsqrt().to(x.dtype)
    return normal * norm.weight[:, None] + norm.bias[:, None]


def running_maximum(x, dim):
    """torch.cummax of x (B, S) along dim 1: the maxima of 1, 2, 4, … frames up to each."""
    before = 1
    while before < LONGEST:
        x = torch.maximum(x, pad(x, (before, 0), value=-torch.inf)[:, : x.shape[1]])
        before *= 2
    return x, torch.zeros_like(x, dtype=torch.int64)  # nothing here uses the indices


class EncoderGraph(nn.Module):
    """`OFAEncoder.forward` in a form that torch.export takes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, waveforms, lengths, lam):
        encoder = self.encoder
        projection = encoder.encoder.feature_projection
        x, frames = cnn_graph(encoder.feature_extractor, waveforms, lengths)
        x = projection.layer_norm(x)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (B, S)
        x = x.masked_fill(padding[:, :, None], 0)

        _, _, weights = encoder.weigh(x, frames, lam)
        tokens, n_tokens, times = cif_graph(x, weights, frames)
        x = projection.projection(tokens)  # (B, T, D)
        valid = torch.arange(x.shape[1], device=x.device) < n_tokens[:, None]  # (B, T)
        return torch.stack(encoder.transform(x, valid), 1), n_tokens, times


# 2. To ONNX.


def export(encoder):
    """The encoder, in eval mode and on the CPU, as a torch.onnx.ONNXProgram.

    Raises ValueError if a library is missing.
    """
    # Sizes of the example that are 1, or equal to each other, would be taken for constants.
    example = (torch.randn(2, 20_000), torch.tensor([20_000, 15_000]), torch.tensor(0.7).double())
    batch = torch.export.Dim("batch")
    samples = torch.export.Dim("samples", min=720)  # two frames; one works as well, and is tested
    shapes = ({0: batch, 1: samples}, {0: batch}, {})
    return to_onnx(EncoderGraph(encoder), example, shapes, INPUTS, OUTPUTS)


def to_onnx(module, example, shapes, inputs, outputs):
    """A module as a torch.onnx.ONNXProgram. inputs, outputs: their names. As in `export`."""
    check_libraries()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(module, example, dynamic_shapes=shapes)
        program = program.run_decompositions({torch.ops.aten.cummax.default: running_maximum})
        return torch.onnx.export(
            program,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            optimize=False,  # the optimizer has dropped an addend of 1e-9: keep it from ROUNDING
            verbose=False,
            dynamo=True,
        )


def check_libraries():
    """Raise ValueError that names those which are missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"{name} is missing: pip install onnx onnxscript onnxruntime"
            ) from None


def open_session(model):
    """onnxruntime's session of a file, or of its bytes, on the CPU, with torch's many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, waveforms, lengths, lam):
    """What `EncoderGraph` returns, from onnxruntime. Tensors in and out; lam is a number."""
    inputs = (waveforms, lengths, torch.tensor(lam, dtype=torch.float64))
    feed = {name: value.numpy() for name, value in zip(INPUTS, inputs)}
    return [torch.from_numpy(value) for value in session.run(list(OUTPUTS), feed)]


def difference(session, encoder, waveform, lam) -> float:
    """The largest difference in any hidden state of waveform (samples,) between onnxruntime and
    PyTorch; infinite if their numbers of tokens differ."""
    lengths = torch.tensor([len(waveform)])
    hidden_states, n_tokens, _ = run(session, waveform[None], lengths, lam)
    with torch.no_grad():
        expected = encoder(waveform[None], lam=lam)
    if not torch.equal(n_tokens, expected.lengths):
        return float("inf")
    return (hidden_states - torch.stack(expected.hidden_states, 1)).abs().max().item()


def main():
    parser = argparse.ArgumentParser(
        prog="export.py", description="The encoder as an ONNX file, checked and timed."
    )
    parser.add_argument("checkpoint", help="a file that pretrain.py wrote")
    parser.add_argument("out", help="the .onnx to write")
    args = parser.parse_args()
    encoder = OFAEncoder.from_checkpoint(args.checkpoint)
    speech = load("asterisk").subset(20)
    content = export(encoder).model_proto.SerializeToString()
    session = open_session(content)
    lams = LAMS if encoder.config.compression == "cif" else LAMS[:1]
    found = [difference(session, encoder, sound, lam) for lam in lams for sound in speech]
    worst = torch.tensor(found).max().item()  # NaN, if one of them is
    print(
        f"onnxruntime and PyTorch differ by at most {worst:.1e}: {len(speech)} prompts, λ = {lams}"
    )
    if not worst <= TOLERANCE:
        raise ValueError(f"that is more than {TOLERANCE:g}: {args.out} is not written")
    with atomic_write(args.out) as file:
        file.write(content)
    print(f"wrote {args.out}, {len(content) / 1e6:.1f} MB")
    print_times(session, encoder, torch.cat(list(speech))[: 15 * SAMPLE_RATE], lams)


def print_times(session, encoder, waveform, lams):
    """Median milliseconds of both for waveform (samples,), interleaved."""
    seconds = len(waveform) / SAMPLE_RATE
    print(f"ms for {seconds:g} s of sound, threads: {torch.get_num_threads()}")
    print("     λ   onnxruntime   PyTorch")
    lengths = torch.tensor([len(waveform)])
    for lam in lams:
        calls = {
            "onnxruntime": partial(run, session, waveform[None], lengths, lam),
            "PyTorch": partial(encoder, waveform[None], lengths, lam),
        }
        with torch.no_grad():
            s = interleaved(calls, repeats=7)
        print(f"{lam:6.2f} {1e3 * s['onnxruntime']:13.1f} {1e3 * s['PyTorch']:9.1f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
