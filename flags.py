"""What the flags of the training scripts have in common: numbers that must be numbers, the device, the precision.

`python flags.py` says what they come to on this machine.
"""

import os

import torch


def check_numbers(args, *names, zero=False):
    """Refuse NaN, infinity, and numbers that are not over 0; with zero, 0 is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (0 < value < 2**63 or zero and value == 0):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a number {'from' if zero else 'over'} 0")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: torch finds none here")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def use_bf16(args, device) -> bool:
    """Whether to train under bf16 autocast: on CUDA alone.

    On a CPU it is no faster, and torch 2.14.1's grouped bf16 conv1d is wrong on processors with
    AMX: the positional convolution of preset tiny is 117 % off, without a word.
    """
    if args.precision == "bf16" and device.type != "cuda":
        raise ValueError(f"--precision bf16 is for CUDA, and this is {device.type}: leave it out")
    return args.precision != "fp32" and device.type == "cuda"


if __name__ == "__main__":
    from types import SimpleNamespace

    device = pick_device("auto")
    print(f"--device auto: {device}; --precision auto: {'bf16' if use_bf16(SimpleNamespace(precision='auto'), device) else 'fp32'}")
