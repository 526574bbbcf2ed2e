"""runs.py: files that are never left half-written. (Full disks and kills: test_pretrain.py.)"""

import pytest
import torch

from ofa_encoder import load_checkpoint
from parts.runs import atomic_write, save

INTACT = "x.pt could not be written .no space.; what was there before is intact"


def test_what_was_there_stays_until_all_is_written(tmp_path):
    path = tmp_path / "new" / "x.pt"
    save({"a": torch.arange(3)}, path)
    with pytest.raises(OSError, match=INTACT), atomic_write(path) as file:
        file.write(b"half")
        raise OSError("no space")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(bytes([1 // 0]))
    assert load_checkpoint(path)["a"].tolist() == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]  # and nothing half-written beside it
