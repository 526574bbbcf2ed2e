"""Where speech comes from: the embedded corpus, a folder of sound files, or LibriSpeech through torchaudio.

    load("asterisk")                     2,592 prompts in five languages, 90 minutes: see asterisk.py
    load("my/folder")                    any rate, any number of channels, any format that soundfile reads
    load("librispeech:train-clean-100")  downloaded on first use; join subsets with +

Each gives a `Speech`: a list of utterances whose sound, 16 kHz mono floats in [-1, 1], is read when asked for.
`speech.part("train")`, "valid" and "test" never share a group: a prompt in all its languages, a folder, a speaker.
`batches` makes batches by seconds of audio, of utterances of like length.

"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor
from tqdm import tqdm

from ofa_encoder import MIN_SAMPLES, SAMPLE_RATE
from parts import asterisk
from parts.asterisk import MAX_SECONDS  # longer files are cut into equal pieces

SPLITS = ("train", "valid", "test")


@dataclass(slots=True)
class Utterance:
    id: str  # unique; names the utterance in messages and in files of boundaries
    group: str  # utterances of one group stay on one side of every split
    samples: int  # its length at 16 kHz
    text: str = ""  # transcript, where there is one
    language: str = ""
    path: str = ""  # the sound file; "" if the sound lies in Speech.sound
    start: int = 0  # its first sample there
    stop: int = 0  # and the one after its last, at the file's own rate


class Speech(torch.utils.data.Dataset):
    """Utterances, and speech[i]: the waveform (samples,) of the i-th. held_out: the shares of valid and test."""

    def __init__(
        self, utterances: list[Utterance], held_out=(0.1, 0.2), sound: Tensor | None = None
    ):
        self.utterances, self.held_out, self.sound = utterances, held_out, sound

    def __len__(self):
        return len(self.utterances)

    @property
    def seconds(self) -> float:
        return sum(u.samples for u in self.utterances) / SAMPLE_RATE

    def __getitem__(self, i) -> Tensor:
        u = self.utterances[i]
        if self.sound is not None:
            return self.sound[u.start : u.stop].float() / 32768
        return read_sound(u.path, u.start, u.stop)

    def part(self, split: str) -> "Speech":
        """The utterances of "train", "valid" or "test". Which group goes where depends on the corpus alone: groups are
        taken in the order of a hash of their names, first for test, then for valid, until these hold their share."""
        wanted = {"test": self.held_out[1] * len(self), "valid": self.held_out[0] * len(self)}
        sizes, held, side = Counter(u.group for u in self.utterances), Counter(), {}
        for group in sorted(sizes, key=lambda g: hashlib.sha1(g.encode()).digest()):
            side[group] = next((name for name in wanted if held[name] < wanted[name]), "train")
            held[side[group]] += sizes[group]
        if set(side.values()) != set(SPLITS):
            raise ValueError(
                f"{len(self)} utterances in {len(sizes)} groups (folders, speakers) are too few to hold some "
                "out for validation and test: add files, or put them into one folder"
            )
        return Speech(
            [u for u in self.utterances if side[u.group] == split], self.held_out, self.sound
        )

    def subset(self, count: int) -> "Speech":
        """So many of the utterances, evenly spread; all, if there are fewer."""
        count = min(count, len(self))
        return Speech(
            [self.utterances[k * len(self) // count] for k in range(count)],
            self.held_out,
            self.sound,
        )


def load(name: str, root="data") -> Speech:
    """The corpus called name (see the top of this file); what is downloaded or cached lies under root.
    Raises ValueError or OSError, with what to do, where nothing usable is found."""
    if name == "asterisk":
        cache = Path(root) / "asterisk.pt"
        asterisk.build(cache)
        try:
            content = torch.load(cache, weights_only=True, mmap=True)
            utterances, sound = (
                [Utterance(**u) for u in json.loads(content["utterances"])],
                content["sound"],
            )
        except Exception as error:  # as in load_checkpoint
            raise ValueError(
                f"{cache} is damaged ({type(error).__name__}): delete it, and it will be built again"
            ) from None
        return Speech(utterances, held_out=(0.1, 0.2), sound=sound)
    if name.startswith("librispeech:"):
        return librispeech(name.removeprefix("librispeech:").split("+"), Path(root))
    return folder(Path(name))


def batches(speech: Speech, seconds: float, seed: int):
    """Forever, epoch after epoch: lists of indices of utterances of similar length, whose padded batch
    lasts up to `seconds`, or of a single utterance that is longer. Each utterance comes once an epoch.
    The order depends on seed alone."""
    samples = np.array([u.samples for u in speech.utterances])
    for epoch in range(sys.maxsize):
        random = np.random.default_rng([seed, epoch])
        # The jitter gives an utterance other companions of similar length in every epoch.
        order = np.argsort(samples * random.uniform(0.9, 1.1, len(samples)))
        packed = pack(order, samples, seconds)
        for k in random.permutation(len(packed)):
            yield packed[k]


def by_length(speech: Speech, seconds=30.0) -> list[list[int]]:
    """All utterances once, from short to long, in batches as `batches` makes them."""
    samples = np.array([u.samples for u in speech.utterances])
    return pack(np.argsort(samples, kind="stable"), samples, seconds)


def pack(order, samples, seconds) -> list[list[int]]:
    """Cut order, indices into samples, into batches that last up to `seconds` when padded."""
    packed = []
    batch, longest = [], 0
    for i in order:
        longest = max(longest, samples[i])
        if batch and longest * (len(batch) + 1) > seconds * SAMPLE_RATE:
            packed.append(batch)
            batch, longest = [], samples[i]
        batch.append(int(i))
    packed.append(batch)
    return packed


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms of any lengths -> (B, samples), padded with zeros, and lengths (B,)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths


def read_sound(path, start=0, stop=None) -> Tensor:
    """A stretch of a sound file as 16 kHz mono (samples,). Raises ValueError that names the file if it can't be used."""
    try:
        sound, rate = soundfile.read(path, start=start, stop=stop, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    # The resampling filter grows as the rates' common divisor shrinks: to gigabytes at 8001 Hz. Odd rates are rounded, by 12 Hz at the most.
    waveform = torchaudio.functional.resample(
        torch.from_numpy(sound).mean(1), 25 * max(1, round(rate / 25)), SAMPLE_RATE
    )
    waveform = torch.nn.functional.pad(
        waveform, (0, math.ceil(len(sound) * SAMPLE_RATE / rate) - len(waveform))
    )
    if len(waveform) < MIN_SAMPLES:
        raise ValueError(
            f"{path}: {len(waveform)} samples at 16 kHz, too short: at least {MIN_SAMPLES} (25 ms) are needed"
        )
    if not waveform.isfinite().all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return waveform


class _Readable(torch.utils.data.Dataset):
    """speech[i] with its index; None, and a line that says why, where the sound can't be read after all."""

    def __init__(self, speech):
        self.speech = speech

    def __getitem__(self, i):
        try:
            return i, self.speech[i]
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)


def _collate(items):
    items = [item for item in items if item is not None] or [(None, torch.zeros(MIN_SAMPLES))]
    indices, waveforms = zip(*items)
    return [i for i in indices if i is not None], *pad(waveforms)


def loader(speech: Speech, plan, workers=0):
    """An iterator over plan's lists of indices that gives (indices, waveforms (B, samples), lengths (B,)) for each, read by
    so many processes ahead of time. An utterance that can't be read is named and left out; if none is left, the indices
    are empty and the waveform is one frame of silence."""
    return iter(
        torch.utils.data.DataLoader(
            _Readable(speech), batch_sampler=plan, num_workers=workers, collate_fn=_collate
        )
    )


def folder(path: Path) -> Speech:
    """Every sound file under path. A file that can't be used is named and left out."""
    if not path.is_dir():
        raise ValueError(
            f"no such folder: {path} (--data takes asterisk, librispeech:SUBSET or a folder of sound files)"
        )
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"} | {
        ".aif",
        ".oga",
        ".opus",
    }
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    folders = {p.parent for p in files}
    speakers = (
        len(folders) >= 10
    )  # many folders: one a speaker or a recording, as most corpora have it
    entries = [
        (p, str(p.relative_to(path)), str(p.parent.relative_to(path)) if speakers else p.name, "")
        for p in files
    ]
    return from_files(entries, held_out=(0.05, 0.05), where=path)


def librispeech(subsets: list[str], root: Path) -> Speech:
    """LibriSpeech through torchaudio. A download that breaks off leaves nothing behind."""
    entries = []
    for subset in subsets:
        if not (root / "LibriSpeech" / subset).is_dir():
            unpacked = root / f"{subset}.partial"
            print(
                f"downloading LibriSpeech {subset} to {root / 'LibriSpeech'} (openslr.org/12, CC BY 4.0)"
            )
            try:
                unpacked.mkdir(parents=True, exist_ok=True)
                torchaudio.datasets.LIBRISPEECH(unpacked, subset, download=True)
                (root / "LibriSpeech").mkdir(exist_ok=True)
                os.replace(unpacked / "LibriSpeech" / subset, root / "LibriSpeech" / subset)
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"LibriSpeech {subset} could not be downloaded ({error}). Try again, or unpack it yourself so "
                    f"that {root / 'LibriSpeech' / subset} exists. "
                    "Your own speech works too: --data FOLDER."
                ) from None
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)
        data = torchaudio.datasets.LIBRISPEECH(root, subset)
        try:
            for path, _, text, speaker, _, _ in map(data.get_metadata, range(len(data._walker))):
                entries.append(
                    (
                        root / "LibriSpeech" / path,
                        Path(path).stem,
                        f"speaker {speaker}",
                        text.lower(),
                    )
                )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{root / 'LibriSpeech' / subset} is not as LibriSpeech is distributed ({error})"
            ) from None
    return from_files(entries, held_out=(0.01, 0.01), where=root / "LibriSpeech")


def from_files(entries, held_out, where, cut=True) -> Speech:
    """entries: (path, id, group, text) each. Reads the headers only; the sound stays on disk. A file that can't be used is
    named and left out; with cut, one that is longer than MAX_SECONDS becomes several utterances."""
    utterances, left_out = [], []
    for path, id, group, text in tqdm(
        entries, desc="reading headers", unit=" files", disable=len(entries) < 1000
    ):
        try:
            with soundfile.SoundFile(path) as file:
                frames, rate = file.frames, file.samplerate
                file.seek(max(frames - 1, 0))
                if len(file.read(1)) < min(frames, 1):
                    raise ValueError("its end can't be read")
            samples = math.ceil(frames * SAMPLE_RATE / rate)
            if samples < MIN_SAMPLES:
                raise ValueError(
                    "empty"
                    if frames == 0
                    else f"{1000 * frames / rate:.0f} ms, shorter than one frame (25 ms)"
                )
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            left_out.append(f"left out: {path} ({error})")
            continue
        pieces = math.ceil(samples / (MAX_SECONDS * SAMPLE_RATE)) if cut else 1
        for k in range(pieces):
            start, stop = k * frames // pieces, (k + 1) * frames // pieces
            id = " ".join(id.split())  # a tab would break the files of boundaries
            utterances.append(
                Utterance(
                    f"{id}#{k}" if pieces > 1 else id,
                    group,
                    math.ceil((stop - start) * SAMPLE_RATE / rate),
                    text,
                    path=str(path),
                    start=start,
                    stop=stop,
                )
            )
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    if not utterances:
        raise ValueError(f"no usable sound file in {where}: {len(left_out)} were left out")
    return Speech(utterances, held_out)
