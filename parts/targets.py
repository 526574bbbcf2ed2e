"""What the teacher says, kept: it is asked once for each utterance, not at every step.

A frozen teacher says the same of an utterance in every epoch, and HuBERT Base costs more than the
student that learns from it. So its targets are written to one file and read from there:

    pretrain.py ── indices of a batch ──> targets_of ──┬── KeptTargets: memory-mapped file
                                                       └── the teacher, where nothing is kept

The file holds a block for each utterance, from the shortest utterance to the longest:

    S rows of D_1 + … + D_L numbers      float16: of each frame, the vectors of all L layers
    CRC-32 of these bytes                uint32

All numbers are little-endian. Where a block lies follows from the lengths of the utterances alone,
so the file needs no index. The checksum tells what is damaged, and how far a file had been written
when its writer was killed: until it is complete, it has another name (.partial).

An hour of speech takes 0.83 GB with HuBERT Base: 180,000 frames, 3 layers of 768 numbers, 2 bytes.

Rounding to float16 moves a target h by at most 2⁻¹¹ |h| (numbers under 6e-5, by 3e-8). That changes
|ĥ - h|₁ / D by at most 2⁻¹¹ times the mean of |h|, and the cosine of two vectors by at most 2⁻¹¹;
hence the loss of a layer by at most 2⁻¹¹ · (mean |h| + 1).
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ofa_encoder import frames_of
from parts.data import Speech, by_length, identity, loader

MODES = ("auto", "always", "never")  # of --keep-targets
LARGEST = 2e9  # bytes that "auto" keeps, and at most this part of the free disk:
SHARE = 0.1


def targets_of(teacher, speech: Speech, indices, waveforms, lengths):
    """The targets of a batch of `loader`: (B, S, D) for each layer, as a teacher gives them.

    teacher: a teacher, which is asked, or its KeptTargets, which are read.
    """
    if isinstance(teacher, KeptTargets):
        return teacher([speech.utterances[i].id for i in indices])
    return teacher(waveforms, lengths)


def cache_path(speech: Speech, teacher: str, root) -> Path:
    """Where the targets of all utterances of speech are kept under root.

    teacher: its fingerprint (teachers.py). Another corpus or teacher has another name.
    """
    key = json.dumps([identity(speech), teacher])
    return Path(root) / f"targets-{hashlib.sha1(key.encode()).hexdigest()[:12]}.f16"


class KeptTargets:
    """A teacher's targets in a file. kept(ids of utterances) returns (B, S, D) for each layer."""

    def __init__(self, path: Path, speech: Speech, teacher, device="cpu"):
        """Nothing is read or written yet. device: where targets are wanted, and the teacher is."""
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.speech = speech
        self.device = device
        self.layers = teacher.layers
        self.dims = teacher.dims
        self.boundary_dims = teacher.boundary_dims
        self.plan = by_length(speech)  # the batches in which the teacher is asked
        self.place = {}  # id: the first byte of its block, and its number of frames
        self.size = 0  # of the file, in bytes
        for batch in self.plan:
            for i in batch:
                frames = frames_of(speech.utterances[i].samples)
                self.place[speech.utterances[i].id] = (self.size, frames)
                self.size += 2 * frames * sum(self.dims) + 4

    # 1. Reading.

    def __call__(self, ids):
        rows = []
        for id in ids:
            block = self._read(self.path, id)
            if block is None or np.isnan(block[0, 0]):
                raise ValueError(
                    f"{self.path} is damaged, or {id} could not be read when it was written: "
                    "delete it, and it will be made again"
                )
            rows.append(torch.from_numpy(block))
        if not rows:  # as `loader` gives one frame of silence
            rows = [torch.zeros(1, sum(self.dims))]
        padded = pad_sequence(rows, batch_first=True).to(self.device)  # (B, S, D_1 + … + D_L)
        return padded.float().split(self.dims, 2)

    def _read(self, path, id):
        """The rows (S, D_1 + … + D_L) of an utterance; None if they are not there or damaged."""
        first, frames = self.place[id]
        size = 2 * frames * sum(self.dims)
        try:
            # Only this block is mapped, and it is copied. If the whole file were mapped, all of it
            # that was ever read would count as this process's memory.
            block = np.array(np.memmap(path, np.uint8, "r", first, size + 4))
        except (OSError, ValueError):  # ValueError: the file ends before the block does
            return None
        rows = block[:size]
        if zlib.crc32(rows) != int.from_bytes(block[size:].tobytes(), "little"):
            return None
        return rows.view("<f2").reshape(frames, -1)

    def complete(self) -> bool:
        """Whether the file is there. Raises ValueError if it is of another size."""
        if not self.path.exists():
            return False
        found = self.path.stat().st_size
        if found != self.size:
            raise ValueError(
                f"{self.path} is damaged ({found} bytes, expected {self.size}): "
                "delete it, and it will be made again"
            )
        return True

    # 2. Writing.

    def wanted(self, mode, teacher) -> bool:
        """Whether targets are to be kept, as --keep-targets asks; auto says so if they are not."""
        if mode != "auto":
            return mode == "always"
        if self.path.exists():
            return True
        if next(teacher.parameters(), None) is None:  # MFCCs have no weights: cheap to compute
            return False
        free = self.free()
        if self.size <= min(LARGEST, SHARE * free):
            return True
        print(
            f"the teacher is asked at every step: its targets would take {gb(self.size)}, and "
            f"{gb(free)} are free in {self.path.parent} (see --keep-targets)"
        )
        return False

    def free(self) -> int:
        """Bytes of the disk that the file may take, what a killed run has written included."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.partial.stat().st_size if self.partial.exists() else 0
        return shutil.disk_usage(self.path.parent).free + written

    def write(self, teacher):
        """Ask the teacher for the targets of all utterances, unless the file is there.

        Killed at any moment, it goes on from there when it is called again. Raises OSError if the
        disk is too small, ValueError if targets are no numbers of float16.
        """
        if self.path.exists():
            return
        free = self.free()
        if self.size > free:
            raise OSError(
                f"the teacher's targets take {gb(self.size)}, and {gb(free)} are free in "
                f"{self.path.parent}: make room, or leave them out (--keep-targets never)"
            )
        try:
            with open(self.partial, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another process may be writing: wait for it
                if not self.path.exists():
                    self._write(file, teacher)
                    os.replace(self.partial, self.path)
        except OSError as error:
            raise OSError(
                f"{self.partial} could not be written ({error}); the same command goes on with it"
            ) from None

    def _write(self, file, teacher):
        print(f"the teacher is asked once: its targets, {gb(self.size)}, go into {self.path}")
        done, end = self._intact()
        file.truncate(end)
        arriving = loader(self.speech, self.plan[done:])
        bar = tqdm(
            self.plan[done:],
            desc="the teacher's targets",
            unit=" batches",
            total=len(self.plan),
            initial=done,
        )
        for batch in bar:
            used, waveforms, lengths = next(arriving)
            layers = teacher(waveforms.to(self.device), lengths.to(self.device))
            targets = torch.cat(layers, 2).half().cpu()  # (B, S, D_1 + … + D_L)
            if not targets.isfinite().all():
                raise ValueError(
                    "the teacher's targets are NaN or beyond 65,504, the largest number of "
                    "float16: leave them out (--keep-targets never)"
                )
            rows_of = dict(zip(used, targets.numpy()))
            for i in batch:
                frames = self.place[self.speech.utterances[i].id][1]
                # One that could not be read still has its place, so that all others have theirs.
                unread = np.full((frames, sum(self.dims)), np.nan)
                block = rows_of.get(i, unread)[:frames].astype("<f2").tobytes()
                file.write(block + zlib.crc32(block).to_bytes(4, "little"))
            file.flush()
        os.fsync(file.fileno())

    def _intact(self) -> tuple[int, int]:
        """How many batches of the plan are in the unfinished file, and the bytes that they take."""
        end = 0
        for done, batch in enumerate(self.plan):
            ids = [self.speech.utterances[i].id for i in batch]
            if any(self._read(self.partial, id) is None for id in ids):
                return done, end
            first, frames = self.place[ids[-1]]
            end = first + 2 * frames * sum(self.dims) + 4
        return len(self.plan), end


def gb(size) -> str:
    return f"{size / 1e9:.2f} GB"
