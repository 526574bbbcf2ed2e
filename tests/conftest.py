import numpy as np
import pytest
import soundfile
import torch

from data import load

torch.set_num_threads(1)  # two are slower on sizes like these, and far slower on a busy machine


@pytest.fixture(scope="session")
def asterisk():
    return load("asterisk")


@pytest.fixture(scope="session")
def folder(asterisk, tmp_path_factory):
    """Forty real prompts of about a second each as wav files: a corpus on which a run takes seconds."""
    path = tmp_path_factory.mktemp("forty")
    for i in sorted(range(len(asterisk)), key=lambda i: abs(asterisk.utterances[i].samples - 16_000))[:40]:
        name = asterisk.utterances[i].id.replace("/", "_")
        soundfile.write(path / f"{name}.wav", asterisk[i].numpy(), 16_000)
    return path
