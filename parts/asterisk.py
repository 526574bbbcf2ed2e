"""The embedded corpus: the voice prompts of the Asterisk telephone exchange, packaged by Debian.

2,592 prompts, 90 minutes: the same prompts read by professional speakers in English, Spanish,
French, Italian and Russian, with transcripts; 50 MB to fetch. Left out are tones, silence, prompts
without a transcript, and those over 15 s.

Ten Debian packages, two a language, hold the transcripts and the sound (16 kHz, G.722). `build`
fetches them, decodes and trims every prompt, and writes one file:

    sound        int16 (all samples,): the prompts one after the other, 16 kHz
    utterances   JSON, a list of data.py's Utterances: where each lies in sound, text, language

    python -m parts.asterisk      builds data/asterisk.pt and prints credits: this is `make data`
    data.load("asterisk")         reads it, and builds it first where that has not been done
"""

import gzip
import hashlib
import http.client
import io
import json
import re
import sys
import tarfile
import unicodedata
import urllib.request
from pathlib import Path

import G722
import torch
from torch import Tensor
from tqdm import tqdm

from ofa_encoder import MIN_SAMPLES, SAMPLE_RATE
from parts.runs import atomic_write, save

MAX_SECONDS = 15.0  # prompts that last longer are left out; data.py cuts longer files into pieces

CREDIT = """\
Asterisk core sounds, https://downloads.asterisk.org/pub/telephony/sounds/, packaged by Debian
(asterisk-core-sounds). English and Spanish: Allison Smith; French: June Wallack (CC BY-SA 3.0).
Italian: Carlo Flora; Russian: provided by Maxim Topal, ivrvoice.ru (CC BY 3.0).
Changes made here: decoded, trimmed, transcripts normalised."""

MIRRORS = (
    "https://deb.debian.org/debian/pool/main/a/asterisk-core-sounds/",
    "https://snapshot.debian.org/archive/debian/20250520T000000Z/pool/main/a/asterisk-core-sounds/",
)
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
DIGITS = {
    "en": "zero one two three four five six seven eight nine".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
    "it": "zero uno due tre quattro cinque sei sette otto nove".split(),
    "ru": "ноль один два три четыре пять шесть семь восемь девять".split(),
}


def build(path: Path):
    """Fetch and decode the corpus into path, if it is not there yet.

    Raises OSError, with what to do, where that fails; then nothing is left at path.
    """
    if path.exists():
        return
    print(CREDIT)
    packages = {}
    for name, sha in PACKAGES.items():
        packages[name] = _files_in(_fetch(name, sha, path.parent / "downloads"))
    save(_decode(packages), path)


# 1. From the network to files.


def _fetch(name: str, sha: str, downloads: Path) -> bytes:
    """A Debian package, from downloads/ if it is there, else from a mirror and then kept there.

    A package with another SHA-256 is neither used nor kept. Raises OSError that names every place
    that was tried.
    """
    file = f"asterisk-core-sounds-{name}_1.6.1-1_all.deb"
    places = [(downloads / file).resolve().as_uri()]
    places += [mirror + file for mirror in MIRRORS]
    reasons = []
    for place in places:
        try:
            content = _download(place, file)
            if hashlib.sha256(content).hexdigest() != sha:
                raise OSError("not the expected file: its SHA-256 differs")
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"  {place}: {error}")
            continue
        with atomic_write(downloads / file) as kept:
            kept.write(content)
        return content
    tried = "\n".join(reasons)
    raise OSError(
        f"the embedded corpus could not be fetched:\n{tried}\n"
        f"Try again when there is a network, or put {file} (Debian's, version 1.6.1-1) into "
        f"{downloads}. Your own speech works too: --data FOLDER."
    )


def _download(url: str, name: str) -> bytes:
    """The content of url, with a progress bar called name where it comes over a network."""
    local = url.startswith("file:")
    with urllib.request.urlopen(url, timeout=60) as reply:
        size = int(reply.headers["Content-Length"] or 0)
        with tqdm.wrapattr(reply, "read", total=size, desc=name, disable=local) as bar:
            return bar.read()


def _files_in(package: bytes) -> dict[str, bytes]:
    """The files in a Debian package by path. It is an ar archive, with a tar archive in it."""
    at = 8  # after the magic "!<arch>\n"
    while at < len(package):
        # A member is a header of 60 bytes, with its name and size in ASCII, and its content.
        name = package[at : at + 16].decode().strip()
        size = int(package[at + 48 : at + 58])
        content = package[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                return {
                    member.name: tar.extractfile(member).read() for member in tar if member.isfile()
                }
        at += 60 + size + size % 2  # members begin at even places
    raise ValueError("a Debian package without data")


# 2. From files to utterances.


def _decode(packages: dict) -> dict:
    """The files of each package -> what `build` saves."""
    transcripts = _transcripts(packages)
    # Texts in brackets describe tones. Where only some languages have the brackets, the prompt is
    # a tone in the others too.
    tones = {prompt for (prompt, _), text in transcripts.items() if re.match(r"[\[(]", text)}

    sound_files = []
    for language in LANGUAGES:
        for path, content in sorted(packages[f"{language}-g722"].items()):
            if path.endswith(".g722"):
                sound_files.append((path, language, content))

    utterances = []
    sounds = []
    at = 0  # samples so far
    for path, language, content in tqdm(sound_files, desc="decoding", unit=" prompts"):
        # path is ./usr/share/asterisk/sounds/VOICE/PROMPT.g722
        prompt = path.split("/", 6)[-1].removesuffix(".g722")
        text = normalise(transcripts.get((prompt, language), ""), language)
        decoded = G722.G722(SAMPLE_RATE, 64_000).decode(content)
        sound = trim(torch.tensor(decoded, dtype=torch.int16))
        fits = MIN_SAMPLES <= len(sound) <= MAX_SECONDS * SAMPLE_RATE
        if not text or prompt in tones or not fits:
            continue
        utterance = {
            "id": f"{language}/{prompt}",
            "group": prompt,
            "samples": len(sound),
            "text": text,
            "language": language,
            "start": at,
            "stop": at + len(sound),
        }
        utterances.append(utterance)
        sounds.append(sound)
        at += len(sound)

    join_groups(utterances)
    return {"sound": torch.cat(sounds), "utterances": json.dumps(utterances)}


def _transcripts(packages: dict) -> dict[tuple[str, str], str]:
    """The text of each (prompt, language), as the packages have it."""
    transcripts = {}
    for language in LANGUAGES:
        path = f"./usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        lines = gzip.decompress(packages[language][path]).decode("utf-8-sig").splitlines()
        for line in lines:
            prompt, colon, text = line.partition(":")
            if colon and not line.startswith(";"):  # which starts a comment
                transcripts[prompt.strip(), language] = text.strip()
    return transcripts


def join_groups(utterances: list[dict]):
    """Give prompts with the same text, in any language, the same group.

    Otherwise one of them could be in the training part and the other in the test part. Joining
    carries on: if a and b share a text in one language and b and c in another, all three are one
    group. The groups are trees (union-find), and the root's name is the group's.
    """
    parent = {u["group"]: u["group"] for u in utterances}  # at first each is its own root
    first_with_text = {}
    for u in utterances:
        first = first_with_text.setdefault(u["text"], u["group"])
        parent[_root(parent, u["group"])] = _root(parent, first)
    for u in utterances:
        u["group"] = _root(parent, u["group"])


def _root(parent: dict[str, str], group: str) -> str:
    while parent[group] != group:
        group = parent[group]
    return group


def normalise(text: str, language: str) -> str:
    """Lower case, and digits as words; letters and apostrophes are kept, all else is a space."""
    # NFC: an accented letter is one character, however it was typed.
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    for digit, word in enumerate(DIGITS[language]):
        text = text.replace(str(digit), f" {word} ")
    return " ".join(re.sub(r"[^\w']|_", " ", text).split())


def trim(sound: Tensor, floor_db=-40.0, margin=800) -> Tensor:
    """Cut the silence at both ends of sound (samples,), but for a margin of 50 ms.

    Silence is whatever lies floor_db below the loudest 20 ms. Nothing is left of sound that is
    silent throughout, or shorter than 20 ms.
    """
    step = 320  # 20 ms
    steps = len(sound) // step
    if steps == 0:
        return sound[:0]
    loudness = sound[: steps * step].float().view(steps, step).pow(2).mean(1)  # (steps,)
    loud = (loudness > loudness.max() * 10 ** (floor_db / 10)).nonzero()
    if len(loud) == 0:
        return sound[:0]
    start = int(loud[0]) * step - margin
    stop = (int(loud[-1]) + 1) * step + margin
    return sound[max(start, 0) : stop]


if __name__ == "__main__":
    path = Path("data/asterisk.pt")
    if path.exists():
        print(f"{path} is there already.\n{CREDIT}")
    else:
        print(f"building {path}")
    try:
        build(path)
    except OSError as error:
        sys.exit(f"asterisk.py: {error}")
