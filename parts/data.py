"""Where speech comes from: the embedded corpus, a folder of sound files, or LibriSpeech.

    load("asterisk")                     2,592 prompts in five languages, 90 minutes: asterisk.py
    load("my/folder")                    sound files of any rate, channels and format
    load("librispeech:train-clean-100")  downloaded on first use; join subsets with +

Each gives a `Speech`: a list of utterances. Its sound, (samples,) of 16 kHz mono floats in [-1, 1],
is read only when it is asked for, so a corpus may be larger than memory.

Utterances come in groups: a prompt in all its languages, a folder, a speaker. The parts "train",
"valid" and "test" never share a group.

A batch is a list of indices. `batches` and `by_length` put utterances of similar length together,
as many as fit into so many seconds of audio once the shorter ones are padded to the longest.
"""

import hashlib
import itertools
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ofa_encoder import MIN_SAMPLES, SAMPLE_RATE
from parts import asterisk
from parts.asterisk import MAX_SECONDS

SPLITS = ("train", "valid", "test")


# 1. Utterances.


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


class Speech(Dataset):
    """A list of utterances; speech[i] is the waveform (samples,) of the i-th.

    held_out: the shares of utterances that go to valid and to test.
    sound: int16 (all samples,) where the sound of all utterances is one tensor, or None where it
    lies in files.
    """

    def __init__(
        self, utterances: list[Utterance], held_out=(0.1, 0.2), sound: Tensor | None = None
    ):
        self.utterances = utterances
        self.held_out = held_out
        self.sound = sound

    def __len__(self):
        return len(self.utterances)

    @property
    def seconds(self) -> float:
        return sum(u.samples for u in self.utterances) / SAMPLE_RATE

    def __getitem__(self, i) -> Tensor:
        u = self.utterances[i]
        if self.sound is None:
            return read_sound(u.path, u.start, u.stop)
        return self.sound[u.start : u.stop].float() / 32768

    def part(self, split: str) -> "Speech":
        """The utterances of "train", "valid" or "test"; the same ones whenever it is called.

        Raises ValueError if one of the three would be empty.
        """
        sizes = Counter(u.group for u in self.utterances)
        n_valid = self.held_out[0] * len(self)
        n_test = self.held_out[1] * len(self)

        # Groups are dealt out in an order that looks random but depends on their names alone: first
        # to test, then to valid, until each holds its share; the rest is for training. A group that
        # is larger than a share, and than two mean groups, is never held out.
        split_of = {}
        count = Counter()
        most = max(2 * len(self) / len(sizes), n_valid, n_test)
        for group in sorted(sizes, key=_digest):
            may_be_held_out = sizes[group] <= most
            if may_be_held_out and count["test"] < n_test:
                side = "test"
            elif may_be_held_out and count["valid"] < n_valid:
                side = "valid"
            else:
                side = "train"
            split_of[group] = side
            count[side] += sizes[group]

        if set(split_of.values()) != set(SPLITS):
            raise ValueError(
                f"{len(self)} utterances in {len(sizes)} groups (folders, speakers) are too few to "
                "hold some out for validation and test, or one group is nearly all of them: add "
                "files, or put them into one folder"
            )
        kept = [u for u in self.utterances if split_of[u.group] == split]
        return Speech(kept, self.held_out, self.sound)

    def subset(self, count: int) -> "Speech":
        """So many of the utterances, evenly spread over the list; all, if there are fewer."""
        count = min(count, len(self))
        kept = [self.utterances[k * len(self) // count] for k in range(count)]
        return Speech(kept, self.held_out, self.sound)


def identity(speech: Speech) -> list:
    """What tells this speech from any other, for the names of what is kept of it: which utterances
    of which files, and when these were last changed."""
    files = {u.path for u in speech.utterances if u.path}
    changed = {file: os.stat(file).st_mtime_ns for file in files}
    return [(u.id, u.samples, u.path, u.start, changed.get(u.path, 0)) for u in speech.utterances]


def _digest(text: str) -> bytes:
    """Python's own hash() of a string differs from run to run, so a real one is used."""
    return hashlib.sha1(text.encode()).digest()


# 2. Corpora.


def load(name: str, root="data") -> Speech:
    """The corpus called name (see the top of this file).

    What is downloaded or cached lies under root. Raises ValueError or OSError, with what to do,
    where nothing usable is found.
    """
    if name == "asterisk":
        return _load_asterisk(Path(root) / "asterisk.pt")
    if name.startswith("librispeech:"):
        return librispeech(name.removeprefix("librispeech:").split("+"), Path(root))
    return folder(Path(name))


def _load_asterisk(path: Path) -> Speech:
    asterisk.build(path)
    try:
        # With mmap, sound is read from the file as it is needed.
        content = torch.load(path, weights_only=True, mmap=True)
        utterances = [Utterance(**fields) for fields in json.loads(content["utterances"])]
        sound = content["sound"]
    except Exception as error:  # torch has a different exception for each kind of damage
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): delete it, and it will be built again"
        ) from None
    return Speech(utterances, held_out=(0.1, 0.2), sound=sound)


def folder(path: Path) -> Speech:
    """Every sound file under path. A file that can't be used is named and left out."""
    if not path.is_dir():
        raise ValueError(
            f"no such folder: {path} "
            "(--data takes asterisk, librispeech:SUBSET or a folder of sound files)"
        )
    files = sound_files(path)

    # Most corpora have a folder for each speaker or recording. If there are only a few folders,
    # they mean something else, and each file is a group of its own.
    by_folder = len({p.parent for p in files}) >= 10
    entries = []
    for p in files:
        group = str(p.parent.relative_to(path)) if by_folder else p.name
        entries.append((p, str(p.relative_to(path)), group, ""))
    return from_files(entries, held_out=(0.05, 0.05), where=path)


def sound_files(path: Path) -> list[Path]:
    """All files under path with the suffix of a sound file, in order."""
    # What soundfile can open, but for RAW: a file without a header does not say its rate.
    formats = set(soundfile.available_formats()) - {"RAW"}
    suffixes = {f".{name.lower()}" for name in formats} | {".aif", ".oga", ".opus"}
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def librispeech(subsets: list[str], root: Path) -> Speech:
    """Subsets of LibriSpeech (Panayotov et al., ICASSP 2015), grouped by speaker."""
    entries = []
    for subset in subsets:
        place = root / "LibriSpeech" / subset
        if not place.is_dir():
            _download_librispeech(subset, root)
        corpus = torchaudio.datasets.LIBRISPEECH(root, subset)
        try:
            for i in range(len(corpus)):
                path, _, text, speaker, _, _ = corpus.get_metadata(i)
                file = root / "LibriSpeech" / path
                entries.append((file, file.stem, f"speaker {speaker}", text.lower()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place} is not as LibriSpeech is distributed ({error})") from None
    return from_files(entries, held_out=(0.01, 0.01), where=root / "LibriSpeech")


def _download_librispeech(subset: str, root: Path):
    """Download a subset to root/LibriSpeech. Raises OSError; then nothing is left behind."""
    home = root / "LibriSpeech"
    print(f"downloading LibriSpeech {subset} to {home} (openslr.org/12, CC BY 4.0)")
    # It is unpacked elsewhere and moved when complete, so that what lies in home can be trusted.
    unpacked = root / f"{subset}.partial"
    try:
        unpacked.mkdir(parents=True, exist_ok=True)
        torchaudio.datasets.LIBRISPEECH(unpacked, subset, download=True)
        home.mkdir(exist_ok=True)
        os.replace(unpacked / "LibriSpeech" / subset, home / subset)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"LibriSpeech {subset} could not be downloaded ({error}). Try again, or unpack it "
            f"yourself so that {home / subset} exists. Your own speech works too: --data FOLDER."
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def from_files(entries, held_out, where, cut=True) -> Speech:
    """Speech from a list of sound files, of which only the headers are read now.

    entries: (path, id, group, text) of each. where: what to call the list in an error. cut: make
    several utterances of a file longer than MAX_SECONDS, with ids ID#0, ID#1 and so on.
    A file that can't be used is named and left out. Raises ValueError if none is left.
    """
    utterances = []
    left_out = []
    many = len(entries) >= 1000
    for path, id, group, text in tqdm(
        entries, desc="reading headers", unit=" files", disable=not many
    ):
        try:
            length, rate = _read_header(path)
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            left_out.append(f"left out: {path} ({error})")
            continue
        # A tab or a newline would break the files of boundaries.
        id = "".join(" " if character.isspace() else character for character in id)
        pieces = 1
        if cut:
            pieces = math.ceil(_samples_at_16_khz(length, rate) / (MAX_SECONDS * SAMPLE_RATE))
        for k in range(pieces):
            start = k * length // pieces
            stop = (k + 1) * length // pieces
            utterance = Utterance(
                id=f"{id}#{k}" if pieces > 1 else id,
                group=group,
                samples=_samples_at_16_khz(stop - start, rate),
                text=text,
                path=str(path),
                start=start,
                stop=stop,
            )
            utterances.append(utterance)
    for line in left_out:
        print(line, file=sys.stderr)
    if not utterances:
        raise ValueError(f"no usable sound file in {where}: {len(left_out)} were left out")
    return Speech(utterances, held_out)


def _read_header(path) -> tuple[int, int]:
    """Length of a sound file in samples, and its sampling rate.

    Raises soundfile.SoundFileError, OSError or ValueError if the file can't be used.
    """
    with soundfile.SoundFile(path) as file:
        length = file.frames
        rate = file.samplerate
        if length == 0:
            raise ValueError("empty")
        # The header of a file that was cut off is intact, so see whether its end is there.
        file.seek(length - 1)
        if len(file.read(1)) == 0:
            raise ValueError("its end can't be read")
    if _samples_at_16_khz(length, rate) < MIN_SAMPLES:
        raise ValueError(f"{1000 * length / rate:.0f} ms, shorter than one frame (25 ms)")
    return length, rate


def _samples_at_16_khz(length: int, rate: int) -> int:
    """How many samples read_sound makes of `length` samples at another rate."""
    return math.ceil(length * SAMPLE_RATE / rate)


# 3. Sound.


def read_sound(path, start=0, stop=None) -> Tensor:
    """A stretch of a sound file as 16 kHz mono (samples,).

    start, stop: in samples at the file's own rate; default: all of it. Raises ValueError that names
    the file if it can't be used.
    """
    try:
        sound, rate = soundfile.read(path, start=start, stop=stop, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    if stop is not None and len(sound) < stop - start:  # damage in the middle is no error to it
        raise ValueError(f"{path}: damaged, {len(sound)} of {stop - start} samples can be read")
    samples = _samples_at_16_khz(len(sound), rate)
    if samples < MIN_SAMPLES:
        raise ValueError(
            f"{path}: {samples} samples at 16 kHz, too short: "
            f"at least {MIN_SAMPLES} (25 ms) are needed"
        )
    waveform = torch.from_numpy(sound).mean(1)  # (samples, channels) -> (samples,)

    # The resampling filter grows as the greatest common divisor of the two rates shrinks, to
    # gigabytes at 8001 Hz. So the rate is rounded to a multiple of 25 Hz, which is off by 12 Hz at
    # most. Usual rates are such multiples. The length is made what the true rate gives.
    rounded = 25 * max(1, round(rate / 25))
    waveform = torchaudio.functional.resample(waveform, rounded, SAMPLE_RATE)
    missing = samples - len(waveform)  # cuts, if negative
    waveform = torch.nn.functional.pad(waveform, (0, missing))

    if not waveform.isfinite().all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return waveform


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms of any lengths -> (B, samples), padded with zeros, and their lengths (B,)."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths


def loader(speech: Speech, plan, workers=0):
    """An iterator over plan, lists of indices, that reads the sound of each list.

    Gives (indices, waveforms (B, samples), lengths (B,) in samples). workers: processes that read
    ahead of time; 0 reads in this one. An utterance that can't be read is named and left out. If
    none is left, or the list was empty, indices is empty and the only waveform is one frame of
    silence, so that a model can be called all the same.
    """
    readable = _Readable(speech)
    return iter(DataLoader(readable, batch_sampler=plan, num_workers=workers, collate_fn=_collate))


class _Readable(Dataset):
    """(i, waveform) of speech; None where the sound can't be read, and a line that says why."""

    def __init__(self, speech: Speech):
        self.speech = speech

    def __getitem__(self, i):
        try:
            return i, self.speech[i]
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            return None


def _collate(items):
    """What _Readable gave for a list of indices -> what loader gives."""
    items = [item for item in items if item is not None]
    indices = [i for i, _ in items]
    waveforms = [waveform for _, waveform in items]
    if not items:
        waveforms = [torch.zeros(MIN_SAMPLES)]
    return indices, *pad(waveforms)


# 4. Batches.


def batches(speech: Speech, seconds: float, seed: int):
    """Batches without end, epoch after epoch, each of utterances of similar length.

    A batch is as long as `seconds` allow (see `pack`). Each utterance comes once an epoch, and the
    order depends on seed alone. Raises ValueError if there are no utterances.
    """
    if len(speech) == 0:
        raise ValueError("there are no utterances to make batches of")
    samples = np.array([u.samples for u in speech.utterances])
    for epoch in itertools.count():
        random = np.random.default_rng([seed, epoch])
        # Lengths are jittered before they are sorted, so that an utterance does not share its
        # batch with the same others in every epoch.
        order = np.argsort(samples * random.uniform(0.9, 1.1, len(samples)))
        packed = pack(order, samples, seconds)
        for k in random.permutation(len(packed)):
            yield packed[k]


def by_length(speech: Speech, seconds=30.0) -> list[list[int]]:
    """Batches of all utterances, once each, from short to long (see `pack`)."""
    samples = np.array([u.samples for u in speech.utterances])
    return pack(np.argsort(samples, kind="stable"), samples, seconds)


def pack(order, samples, seconds) -> list[list[int]]:
    """Cut order, which holds indices into samples, into batches.

    A batch lasts up to `seconds` when all its utterances are padded to the longest. An utterance
    that is longer than that is a batch of its own. No batch is empty.
    """
    packed = []
    batch = []
    longest = 0
    for i in order:
        longest = max(longest, samples[i])
        if batch and longest * (len(batch) + 1) > seconds * SAMPLE_RATE:
            packed.append(batch)
            batch = []
            longest = samples[i]
        batch.append(int(i))
    if batch:
        packed.append(batch)
    return packed
