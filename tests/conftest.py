import os
import resource
from contextlib import contextmanager

import pytest
import soundfile
import torch
from hypothesis import settings

from parts.data import load

torch.set_num_threads(1)  # two are slower on sizes like these, and far slower on a busy machine

settings.register_profile("test", max_examples=300, deadline=None)
settings.register_profile("fuzz", max_examples=10_000, deadline=None)  # make fuzz
settings.load_profile("test")


@pytest.fixture(scope="session")
def asterisk():
    return load("asterisk")


@pytest.fixture(scope="session")
def folder(asterisk, tmp_path_factory):
    """Forty real prompts of about a second each, as wav files: a run on them takes seconds."""
    path = tmp_path_factory.mktemp("forty")
    for i in sorted(
        range(len(asterisk)), key=lambda i: abs(asterisk.utterances[i].samples - 16_000)
    )[:40]:
        name = asterisk.utterances[i].id.replace("/", "_")
        soundfile.write(path / f"{name}.wav", asterisk[i].numpy(), 16_000)
    return path


@pytest.fixture(params=["disk is full", "folder is read-only"])
def unwritable(request):
    """Within unwritable(folder) the kernel refuses to write more than 1,000 bytes anywhere, or
    anything into folder."""

    @contextmanager
    def unwritable(folder):
        limits, user = resource.getrlimit(resource.RLIMIT_FSIZE), os.geteuid()
        mode = folder.stat().st_mode
        try:
            if request.param == "disk is full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            else:
                folder.absolute().parent.chmod(0o755)
                folder.chmod(0o555)
                if user == 0:  # root may write anywhere: be somebody else
                    os.seteuid(65534)
            yield
        finally:
            os.seteuid(user)
            folder.chmod(mode)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return unwritable
