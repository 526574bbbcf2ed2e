"""Files that are whole or not there at all, and checkpoints that can't run code.

    whole(path)             bytes go to a file beside path, which takes its name when all is written
    save(content, path)     torch.save in this way
    load_checkpoint(path)   tensors and plain values; a pickle that holds anything else is refused

So a script that is killed while it writes, or finds the disk full, leaves what was there before.

`python files.py` shows what a reader finds after a writer has failed half-way.
"""

import io
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def load_checkpoint(path, map_location="cpu"):
    """torch.load, safely, with a ValueError that says what is wrong with the file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: pre-train one with `make demo` or pretrain.py")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # truncated, pickled code, no checkpoint at all: torch has a different exception for each
        raise ValueError(f"{path} is no checkpoint, or it is damaged, or it holds more than tensors and plain values, which is not "
                         f"loaded because it could run code ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def save(content, path):
    """torch.save to path, whole or not at all. Raises OSError, say if the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: writing a file, torch hides why it failed
    with whole(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def whole(path):
    """A file to write bytes to. Whatever happens, path is left with either what it held or all that is written now."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); what was there before is intact") from None
    finally:
        with suppress(OSError):
            partial.unlink()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        save({"step": 1}, path)
        try:
            with whole(path) as file:
                file.write(b"half of step 2")
                raise OSError("the disk is full")
        except OSError as error:
            print(f"writing failed: {error}")
        print("what is there:", load_checkpoint(path))
