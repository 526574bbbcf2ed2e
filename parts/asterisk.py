"""The embedded corpus: the voice prompts of the Asterisk telephone exchange, as Debian packages them.

2,592 prompts, 90 minutes, the same ones read by professional speakers in English, Spanish, French, Italian and Russian, with
transcripts; 50 MB to fetch. Debian's packages hold 16 kHz G.722 files. They are decoded, trimmed and kept as one file,
data/asterisk.pt. Left out: tones, silence, prompts without a transcript, and those over 15 s.

Use it through data.py: load("asterisk"). `python asterisk.py` builds the file and prints credits.
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

MAX_SECONDS = 15.0

CREDIT = """Asterisk core sounds, https://downloads.asterisk.org/pub/telephony/sounds/, packaged by Debian (asterisk-core-sounds).
English and Spanish: Allison Smith; French: June Wallack (CC BY-SA 3.0). Italian: Carlo Flora; Russian: provided by
Maxim Topal, ivrvoice.ru (CC BY 3.0). Changes made here: decoded, trimmed, transcripts normalised."""
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
    """Fetch and decode the corpus into path, if it is not there yet. Raises OSError, with what to do, where that fails."""
    if not path.exists():
        print(CREDIT)
        packages = {
            name: _members(_fetch(name, sha, path.parent / "downloads"))
            for name, sha in PACKAGES.items()
        }
        save(_decode(packages), path)


def _fetch(name, sha, downloads) -> bytes:
    """A Debian package, from downloads/ if it is there, else from a mirror. Only a whole and right file is ever kept."""
    file = f"asterisk-core-sounds-{name}_1.6.1-1_all.deb"
    reasons = []
    for mirror in ((downloads / file).resolve().as_uri(), *(m + file for m in MIRRORS)):
        try:
            with urllib.request.urlopen(mirror, timeout=60) as reply:
                size = int(reply.headers["Content-Length"] or 0)
                with tqdm.wrapattr(
                    reply, "read", total=size, desc=file, disable=mirror.startswith("file:")
                ) as bar:
                    content = bar.read()
            if hashlib.sha256(content).hexdigest() != sha:
                raise OSError("not the expected file: its SHA-256 differs")
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"  {mirror}: {error}")
            continue
        with atomic_write(downloads / file) as kept:
            kept.write(content)
        return content
    raise OSError(
        "the embedded corpus could not be fetched:\n"
        + "\n".join(reasons)
        + f"\nTry again when there is a network, "
        f"or put {file} (Debian's, version 1.6.1-1) into {downloads}. "
        "Your own speech works too: --data FOLDER."
    )


def _members(package: bytes) -> dict[str, bytes]:
    """The files in a Debian package: an ar archive, of which one member is a tar archive."""
    at = 8  # after the magic "!<arch>\n"
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
    sound_files = [
        (path, language, content)
        for language in LANGUAGES
        for path, content in sorted(files[f"{language}-g722"].items())
        if path.endswith(".g722")
    ]
    for path, language, content in tqdm(sound_files, desc="decoding", unit=" prompts"):
        prompt = path.split("/", 6)[-1].removesuffix(
            ".g722"
        )  # ./usr/share/asterisk/sounds/VOICE/PROMPT.g722
        text = normalise(transcripts.get((prompt, language), ""), language)
        sound = trim(
            torch.tensor(G722.G722(SAMPLE_RATE, 64_000).decode(content), dtype=torch.int16)
        )
        if text and prompt not in tones and MIN_SAMPLES <= len(sound) <= MAX_SECONDS * SAMPLE_RATE:
            utterances.append(
                dict(
                    id=f"{language}/{prompt}",
                    group=prompt,
                    samples=len(sound),
                    text=text,
                    language=language,
                    start=at,
                    stop=at + len(sound),
                )
            )
            sounds.append(sound)
            at += len(sound)

    join_groups(utterances)
    return {"sound": torch.cat(sounds), "utterances": json.dumps(utterances)}


def join_groups(utterances):
    """Prompts that say the same thing, in any language, become one group, or test texts would be heard in training."""
    joined = {
        u["group"]: u["group"] for u in utterances
    }  # a forest: each prompt's parent, a root's parent is itself

    def root_of(prompt):
        return prompt if joined[prompt] == prompt else root_of(joined[prompt])

    first_with_text = {}
    for u in utterances:
        joined[root_of(u["group"])] = root_of(first_with_text.setdefault(u["text"], u["group"]))
    for u in utterances:
        u["group"] = root_of(u["group"])


def normalise(text: str, language: str) -> str:
    """Lower case, composed characters, digits as words; letters and apostrophes are kept, all else becomes a space."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    text = re.sub("[0-9]", lambda digit: f" {DIGITS[language][int(digit[0])]} ", text)
    return " ".join(re.sub(r"[^\w']|_", " ", text).split())


def trim(sound: Tensor, floor_db=-40.0, margin=800) -> Tensor:
    """Cut the silence at both ends of sound (samples,): all that lies floor_db below its loudest 20 ms, but for 50 ms."""
    loudness = (
        sound[: len(sound) // 320 * 320].float().view(-1, 320).pow(2).mean(1)
    )  # (20 ms steps,)
    loud = (
        (loudness > loudness.max(dim=0, keepdim=True).values * 10 ** (floor_db / 10)).nonzero()
        if len(loudness)
        else loudness
    )
    if not len(loud):
        return sound[:0]
    return sound[max(int(loud[0]) * 320 - margin, 0) : (int(loud[-1]) + 1) * 320 + margin]


if __name__ == "__main__":
    path = Path("data/asterisk.pt")
    print(f"{path} is there already.\n{CREDIT}" if path.exists() else f"building {path}")
    try:
        build(path)
    except OSError as error:
        sys.exit(f"asterisk.py: {error}")
