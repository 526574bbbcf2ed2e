"""files.py: whole or not at all. (Full disks and kills: test_pretrain.py; what is refused: test_bad_input.py.)"""

import pytest
import torch

from ofa_encoder import load_checkpoint
from parts.runs import atomic_write, save


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "x.pt"
    save({"a": torch.arange(3)}, path)
    with (
        pytest.raises(
            OSError, match="x.pt could not be written .no space.; what was there before is intact"
        ),
        atomic_write(path) as file,
    ):
        file.write(b"half")
        raise OSError("no space")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(bytes([1 // 0]))
    assert load_checkpoint(path)["a"].tolist() == [0, 1, 2] and list(path.parent.iterdir()) == [
        path
    ]
