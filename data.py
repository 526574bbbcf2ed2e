"""Where speech comes from: the embedded corpus, a folder of sound files, or LibriSpeech through torchaudio.

    load("asterisk")                     2,600 prompts in five languages, 90 minutes, fetched once (50 MB)
    load("my/folder")                    any rate, any number of channels, any format that soundfile reads
    load("librispeech:train-clean-100")  downloaded on first use; join subsets with +

Each gives a `Speech`: a list of utterances whose sound, 16 kHz mono floats in [-1, 1], is read when asked for.
`speech.part("train")`, "valid" and "test" never share a group: a prompt in all its languages, a folder, a speaker.
`batches` makes batches by seconds of audio, of utterances of like length.

The embedded corpus is Debian's package of the voice prompts of the Asterisk telephone exchange: the same prompts
read by professional speakers in English, Spanish, French, Italian and Russian, with transcripts.

`python data.py [corpus]` shows what is in a corpus.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import G722
import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor
from tqdm import tqdm

from ofa_encoder import MIN_SAMPLES, SAMPLE_RATE, save

MAX_SECONDS = 15.0   # longer files are cut into equal pieces; longer prompts are left out
SPLITS = ("train", "valid", "test")
OWN_DATA = "Your own speech works too: --data FOLDER, with sound files of any format that soundfile reads."


@dataclass(slots=True)
class Utterance:
    id: str              # unique; names the utterance in messages and in files of boundaries
    group: str           # utterances of one group stay on one side of every split
    samples: int         # its length at 16 kHz
    text: str = ""       # transcript, where there is one
    language: str = ""
    path: str = ""       # the sound file; "" if the sound lies in Speech.sound
    start: int = 0       # its first sample there
    stop: int = 0        # and the one after its last, at the file's own rate


class Speech(torch.utils.data.Dataset):
    """Utterances, and speech[i]: the waveform (samples,) of the i-th."""

    def __init__(self, utterances: list[Utterance], held_out=(0.1, 0.2), sound: Tensor | None = None):
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
        return read(u.path, u.start, u.stop)

    def part(self, split: str) -> "Speech":
        """The utterances of "train", "valid" or "test". Which group goes where depends on the corpus alone: groups are
        taken in the order of a hash of their names, first for test, then for valid, until these hold their share."""
        valid, test = (share * len(self) for share in self.held_out)
        sizes, seen, side = Counter(u.group for u in self.utterances), 0, {}
        for group in sorted(sizes, key=lambda g: hashlib.sha1(g.encode()).digest()):
            side[group] = "test" if seen < test else "valid" if seen < valid + test else "train"
            seen += sizes[group]
        if set(side.values()) != set(SPLITS):
            raise ValueError(f"{len(self)} utterances in {len(sizes)} groups (folders, speakers) are too few to hold some "
                             "out for validation and test: add files, or put them into one folder")
        return Speech([u for u in self.utterances if side[u.group] == split], self.held_out, self.sound)


def load(name: str, root="data") -> Speech:
    """The corpus called name (see the top of this file); what is downloaded or cached lies under root.
    Raises ValueError or OSError, with what to do, where nothing usable is found."""
    if name == "asterisk":
        return asterisk(Path(root))
    if name.startswith("librispeech:"):
        return librispeech(name.removeprefix("librispeech:").split("+"), Path(root))
    return folder(Path(name))


def batches(speech: Speech, seconds: float, seed: int):
    """Forever, epoch after epoch: lists of indices of utterances of like length, whose padded batch lasts up to
    `seconds`. Each utterance comes once an epoch. The order depends on seed alone."""
    samples = np.array([u.samples for u in speech.utterances])
    for epoch in range(sys.maxsize):
        rng = np.random.default_rng([seed, epoch])
        epoch_batches, batch, longest = [], [], 0
        for i in np.argsort(samples * rng.uniform(0.9, 1.1, len(samples))):  # like length, yet other company every epoch
            longest = max(longest, samples[i])
            if batch and longest * (len(batch) + 1) > seconds * SAMPLE_RATE:
                epoch_batches.append(batch)
                batch, longest = [], samples[i]
            batch.append(int(i))
        epoch_batches.append(batch)
        for k in rng.permutation(len(epoch_batches)):
            yield epoch_batches[k]


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms of any lengths -> (B, samples), padded with zeros, and lengths (B,)."""
    lengths = torch.tensor([len(w) for w in waveforms])
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths


def read(path, start=0, stop=None) -> Tensor:
    """A stretch of a sound file as 16 kHz mono (samples,). Raises ValueError that names the file if it can't be used."""
    try:
        sound, rate = soundfile.read(path, start=start, stop=stop, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    waveform = torchaudio.functional.resample(torch.from_numpy(sound).mean(1), rate, SAMPLE_RATE)
    if len(waveform) < MIN_SAMPLES:
        raise ValueError(f"{path}: {len(waveform)} samples at 16 kHz, too short: at least {MIN_SAMPLES} (25 ms) are needed")
    if not waveform.isfinite().all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return waveform


# ---------------------------------------------------------------- a folder, and LibriSpeech


def folder(path: Path) -> Speech:
    """Every sound file under path. A file that can't be used is named and left out."""
    if not path.is_dir():
        raise ValueError(f"no such folder: {path} (--data takes asterisk, librispeech:SUBSET or a folder of sound files)")
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    folders = {p.parent for p in files}
    speakers = len(folders) >= 10  # many folders: one a speaker or a recording, as most corpora have it
    entries = [(p, str(p.relative_to(path)), str(p.parent.relative_to(path)) if speakers else p.name, "") for p in files]
    return _from_files(entries, held_out=(0.05, 0.05), where=path)


def librispeech(subsets: list[str], root: Path) -> Speech:
    """LibriSpeech through torchaudio. A download that breaks off leaves nothing behind."""
    entries = []
    for subset in subsets:
        if not (root / "LibriSpeech" / subset).is_dir():
            unpacked = root / f"{subset}.partial"
            print(f"downloading LibriSpeech {subset} to {root / 'LibriSpeech'} (openslr.org/12, CC BY 4.0)")
            try:
                unpacked.mkdir(parents=True, exist_ok=True)
                torchaudio.datasets.LIBRISPEECH(unpacked, subset, download=True)
                (root / "LibriSpeech").mkdir(exist_ok=True)
                os.replace(unpacked / "LibriSpeech" / subset, root / "LibriSpeech" / subset)
            except (OSError, RuntimeError) as error:
                raise OSError(f"LibriSpeech {subset} could not be downloaded ({error}). Try again, or unpack it yourself so "
                              f"that {root / 'LibriSpeech' / subset} exists. {OWN_DATA}") from None
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)
        data = torchaudio.datasets.LIBRISPEECH(root, subset)
        for n in range(len(data._walker)):
            path, _, text, speaker, _, _ = data.get_metadata(n)
            entries.append((root / "LibriSpeech" / path, Path(path).stem, f"speaker {speaker}", text.lower()))
    return _from_files(entries, held_out=(0.01, 0.01), where=root / "LibriSpeech")


def _from_files(entries, held_out, where) -> Speech:
    """entries: (path, id, group, text) each. Reads the headers only; the sound stays on disk."""
    utterances, left_out = [], []
    for path, id, group, text in tqdm(entries, desc="reading headers", unit=" files", disable=len(entries) < 1000):
        try:
            with soundfile.SoundFile(path) as file:
                frames, rate = file.frames, file.samplerate
                file.seek(max(frames - 1, 0))
                if len(file.read(1)) < min(frames, 1):
                    raise ValueError("its end can't be read")
            samples = math.ceil(frames * SAMPLE_RATE / rate)
            if samples < MIN_SAMPLES:
                raise ValueError("empty" if frames == 0 else f"{1000 * frames / rate:.0f} ms, shorter than one frame (25 ms)")
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            left_out.append(f"left out: {path} ({error})")
            continue
        pieces = math.ceil(samples / (MAX_SECONDS * SAMPLE_RATE))
        for k in range(pieces):
            start, stop = k * frames // pieces, (k + 1) * frames // pieces
            utterances.append(Utterance(f"{id}#{k}" if pieces > 1 else id, group, math.ceil((stop - start) * SAMPLE_RATE / rate),
                                        text, path=str(path), start=start, stop=stop))
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    if not utterances:
        raise ValueError(f"no usable sound file in {where}: {len(left_out)} were left out")
    return Speech(utterances, held_out)


# ---------------------------------------------------------------- the embedded corpus

CREDIT = """Asterisk core sounds, https://downloads.asterisk.org/pub/telephony/sounds/, packaged by Debian (asterisk-core-sounds).
English and Spanish: Allison Smith; French: June Wallack (CC BY-SA 3.0). Italian: Carlo Flora; Russian: provided by
Maxim Topal, ivrvoice.ru (CC BY 3.0). Changes made here: decoded, trimmed, transcripts normalised."""
MIRRORS = ("https://deb.debian.org/debian/pool/main/a/asterisk-core-sounds/",
           "https://snapshot.debian.org/archive/debian/20250520T000000Z/pool/main/a/asterisk-core-sounds/")
PACKAGES = {  # name after asterisk-core-sounds-: SHA-256
    "en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "es-g722": "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    "fr-g722": "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    "it-g722": "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    "ru-g722": "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
}
LANGUAGES = ("en", "es", "fr", "it", "ru")


def asterisk(root: Path) -> Speech:
    """The embedded corpus: fetched, decoded and cached as root/asterisk.pt on first use."""
    cache = root / "asterisk.pt"
    if not cache.exists():
        print(CREDIT)
        files = {name: _members(_fetch(name, sha, root / "downloads")) for name, sha in PACKAGES.items()}
        save(_decode(files), cache)
    content = torch.load(cache, weights_only=True, mmap=True)
    return Speech([Utterance(**u) for u in json.loads(content["utterances"])], held_out=(0.1, 0.2), sound=content["sound"])


def _fetch(name, sha, downloads) -> bytes:
    """A Debian package, from downloads/ if it is there, else from a mirror. Only a whole and right file is ever kept."""
    file = f"asterisk-core-sounds-{name}_1.6.1-1_all.deb"
    reasons = []
    for mirror in ((downloads / file).resolve().as_uri(), *(m + file for m in MIRRORS)):
        try:
            with urllib.request.urlopen(mirror, timeout=60) as reply:
                size = int(reply.headers["Content-Length"] or 0)
                with tqdm.wrapattr(reply, "read", total=size, desc=file, disable=mirror.startswith("file:")) as bar:
                    content = bar.read()
            if hashlib.sha256(content).hexdigest() != sha:
                raise OSError("not the expected file: its SHA-256 differs")
        except OSError as error:
            reasons.append(f"  {mirror}: {error}")
            continue
        downloads.mkdir(parents=True, exist_ok=True)
        partial = downloads / f"{file}.{os.getpid()}.partial"
        partial.write_bytes(content)
        os.replace(partial, downloads / file)
        return content
    raise OSError(f"the embedded corpus could not be fetched:\n" + "\n".join(reasons) + f"\nTry again when there is a network, "
                  f"or put {file} (Debian's, version 1.6.1-1) into {downloads}. {OWN_DATA}")


def _members(package: bytes) -> dict[str, bytes]:
    """The files in a Debian package: an ar archive, of which one member is a tar archive."""
    at = 8                                                       # after the magic "!<arch>\n"
    while at < len(package):
        name, size = package[at : at + 16].decode().strip(), int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size])) as tar:
                return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        at += 60 + size + size % 2
    raise ValueError("a Debian package without data")


def _decode(files) -> dict:
    """Packages' members -> {"sound": int16 (all samples,), "utterances": JSON}, the content of the cache."""
    transcripts = {}
    for language in LANGUAGES:
        path = f"./usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        for line in gzip.decompress(files[language][path]).decode("utf-8-sig").splitlines():
            prompt, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                transcripts[prompt.strip(), language] = text.strip()
    # [bracketed] texts describe tones; so do the unbracketed ones of the same prompts in other languages.
    tones = {prompt for (prompt, _), text in transcripts.items() if re.match(r"[\[(]", text)}

    utterances, sounds, at = [], [], 0
    sound_files = [(path, language, content) for language in LANGUAGES
                   for path, content in sorted(files[f"{language}-g722"].items()) if path.endswith(".g722")]
    for path, language, content in tqdm(sound_files, desc="decoding", unit=" prompts"):
        prompt = path.split("/", 6)[-1].removesuffix(".g722")    # ./usr/share/asterisk/sounds/VOICE/PROMPT.g722
        text = normalise(transcripts.get((prompt, language), ""))
        sound = trim(torch.tensor(G722.G722(SAMPLE_RATE, 64_000).decode(content), dtype=torch.int16))
        if text and prompt not in tones and MIN_SAMPLES <= len(sound) <= MAX_SECONDS * SAMPLE_RATE:
            id = f"{language}/{prompt}"
            utterances.append(Utterance(id, prompt, len(sound), text, language, start=at, stop=at + len(sound)))
            sounds.append(sound)
            at += len(sound)

    # Prompts that say the same thing, in any language, belong to one group, or test texts would be heard in training.
    group = {u.group: u.group for u in utterances}
    def root_of(prompt):
        return prompt if group[prompt] == prompt else root_of(group[prompt])
    first_with_text = {}
    for u in utterances:
        group[root_of(u.group)] = root_of(first_with_text.setdefault(u.text, u.group))
    for u in utterances:
        u.group = root_of(u.group)
    return {"sound": torch.cat(sounds), "utterances": json.dumps([asdict(u) for u in utterances])}


def normalise(text: str) -> str:
    """Lower case, composed characters; letters, digits and apostrophes are kept, all else becomes a space."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    return " ".join(re.sub(r"[^\w']|_", " ", text).split())


def trim(sound: Tensor, floor_db=-40.0, margin=800) -> Tensor:
    """Cut the silence at both ends of sound (samples,): all that lies floor_db below its loudest 20 ms, but for 50 ms."""
    loudness = sound[: len(sound) // 320 * 320].float().view(-1, 320).pow(2).mean(1)  # (20 ms steps,)
    loud = (loudness > loudness.max(dim=0, keepdim=True).values * 10 ** (floor_db / 10)).nonzero() if len(loudness) else loudness
    if not len(loud):
        return sound[:0]
    return sound[max(int(loud[0]) * 320 - margin, 0) : (int(loud[-1]) + 1) * 320 + margin]


if __name__ == "__main__":
    try:
        speech = load(sys.argv[1] if len(sys.argv) > 1 else "asterisk")
        for split in SPLITS:
            part = speech.part(split)
            languages = Counter(u.language for u in part.utterances)
            print(f"{split}: {len(part)} utterances, {part.seconds / 60:.1f} minutes", dict(languages))
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    for i in range(0, len(speech), len(speech) // 5):
        u = speech.utterances[i]
        print(f"  {u.id}: {u.samples / SAMPLE_RATE:.2f} s, loudest sample {speech[i].abs().max():.2f}, “{u.text}”")
