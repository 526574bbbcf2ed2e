"""data.py and asterisk.py: the corpus, what a folder may hold, downloads that break off."""

import hashlib
import math

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

import parts.asterisk as corpus
from parts.data import Speech, Utterance, batches, from_files, load, loader, read_sound


def test_embedded_corpus(asterisk):
    assert 2500 < len(asterisk) < 2700 and 85 < asterisk.seconds / 60 < 95
    assert {u.language for u in asterisk.utterances} == {"en", "es", "fr", "it", "ru"}
    for i in (0, 1000, 2500):
        assert (
            len(asterisk[i]) == asterisk.utterances[i].samples
            and 0.05 < asterisk[i].abs().max() <= 1
        )
    texts = {u.id: u.text for u in asterisk.utterances}
    assert texts["en/agent-loginok"] == "agent logged in" and texts["fr/activated"] == "activé"
    assert not any(character.isdigit() for text in texts.values() for character in text)
    assert not any(
        "beep" in id or "tone" in id.split("/")[-1][:20] and id.endswith("2tone") for id in texts
    )
    assert all(0.025 <= u.samples / 16_000 <= 15 for u in asterisk.utterances)


def test_splits_do_not_leak(asterisk):
    parts = {split: asterisk.part(split).utterances for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(asterisk)
    assert len(parts["test"]) == pytest.approx(0.2 * len(asterisk), rel=0.1)
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        for key in (
            lambda u: u.text,
            lambda u: u.id.split("/", 1)[1],
        ):  # no text and no prompt on both sides
            assert not {key(u) for u in parts[a]} & {key(u) for u in parts[b]}
    assert [u.id for u in asterisk.part("test").utterances] == [u.id for u in parts["test"]]


def test_normalise_and_trim():
    assert (
        corpus.normalise("  L’été,\tCafe\u0301 #2 — D'accord_!", "fr") == "l'été café deux d'accord"
    )
    sound = torch.zeros(16_000, dtype=torch.int16)
    sound[6_400:9_600] = 1000
    assert (
        corpus.trim(sound).shape == (3_200 + 2 * 800,)
        and len(corpus.trim(sound * 0)) == 0
        and len(corpus.trim(sound[:100])) == 0
    )


def test_groups_are_joined_by_text_across_prompts():
    rows = [
        ("a", "yes"),
        ("b", "no"),
        ("b", "nein"),
        ("c", "nein"),
        ("c", "ja"),
        ("d", "yes"),
        ("e", "else"),
    ]
    utterances = [dict(group=group, text=text) for group, text in rows]
    corpus.join_groups(utterances)
    groups = [u["group"] for u in utterances]
    assert groups[0] == groups[5] and len(set(groups[1:5])) == 1 and len(set(groups)) == 3


def test_broken_download_leaves_nothing(tmp_path, monkeypatch):
    name, file = "en", "asterisk-core-sounds-en_1.6.1-1_all.deb"
    content = b"!<arch>\n" + bytes(range(256)) * 100
    sha = hashlib.sha256(content).hexdigest()
    mirror, downloads = tmp_path / "mirror", tmp_path / "downloads"
    mirror.mkdir()
    monkeypatch.setattr(corpus, "MIRRORS", ["file:///no/such/mirror/", mirror.as_uri() + "/"])
    (mirror / file).write_bytes(content[:5000])  # the connection broke
    with pytest.raises(OSError, match=r"(?s)SHA-256 differs.*Try again.*--data FOLDER"):
        corpus._fetch(name, sha, downloads)
    assert not list(downloads.glob("*"))
    (mirror / file).write_bytes(content)
    assert corpus._fetch(name, sha, downloads) == content
    (mirror / file).unlink()
    assert corpus._fetch(name, sha, downloads) == content  # the second time from downloads/
    assert [p.name for p in downloads.iterdir()] == [file]


def test_broken_build_leaves_no_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "MIRRORS", ["file:///no/such/mirror/"])
    with pytest.raises(OSError, match="could not be fetched"):
        load("asterisk", tmp_path)
    assert not (tmp_path / "asterisk.pt").exists() and "CC BY-SA 3.0" in capsys.readouterr().out


def tone(path, seconds, rate=16_000, channels=1, hz=440, **keywords):
    t = np.arange(int(seconds * rate)) / rate
    soundfile.write(
        path, np.tile(0.5 * np.sin(2 * np.pi * hz * t)[:, None], channels), rate, **keywords
    )


@pytest.fixture
def mixed_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    tone(tmp_path / "good.wav", 1)
    tone(tmp_path / "sub" / "stereo.flac", 2, 44_100, 2)
    tone(tmp_path / "telephone.ogg", 1, 8_000)
    tone(tmp_path / "LONG.WAV", 40)
    tone(tmp_path / "10ms.wav", 0.01)
    tone(tmp_path / "empty.wav", 0)
    tone(tmp_path / "cut.flac", 3)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:3000])
    (tmp_path / "broken.wav").write_bytes(b"RIFF and then nothing")
    (tmp_path / "zero-bytes.mp3").touch()
    (tmp_path / "notes.txt").write_text("not a sound file")
    (tmp_path / "headerless.raw").write_bytes(bytes(4000))
    return tmp_path


def test_folder_names_what_it_leaves_out(mixed_folder, capsys):
    speech = load(str(mixed_folder))
    ids = [u.id for u in speech.utterances]
    assert ids == [
        "LONG.WAV#0",
        "LONG.WAV#1",
        "LONG.WAV#2",
        "good.wav",
        "sub/stereo.flac",
        "telephone.ogg",
    ]
    said = capsys.readouterr().err
    for name in ("10ms.wav (10 ms", "empty.wav (empty", "cut.flac", "broken.wav", "zero-bytes.mp3"):
        assert f"left out: {mixed_folder}/{name}" in said
    assert "notes.txt" not in said and "stereo" not in said
    assert speech.seconds == pytest.approx(44, abs=0.01)
    for i, u in enumerate(speech.utterances):
        waveform = speech[i]
        assert waveform.shape == (u.samples,)  # the length was known before the sound was read
        peak = (
            torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs().argmax()
            * 16_000
            / len(waveform)
        )
        assert peak.item() == pytest.approx(440, abs=2)  # resampled, not just relabelled
    assert {u.group for u in speech.utterances if u.id.startswith("LONG")} == {"LONG.WAV"}


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("somewhere")


@given(
    rate=st.one_of(
        st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]), st.integers(6_000, 96_000)
    ),
    seconds=st.floats(0.04, 0.12),
    gains=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3),
    cut=st.tuples(st.floats(0, 0.2), st.floats(0.8, 1)),
    kind=st.sampled_from(["wav", "aiff"]),
)
def test_any_rate_channels_and_stretch_become_16_khz_mono(
    somewhere, rate, seconds, gains, cut, kind
):
    """100 Hz stay 100 Hz, as loud as the mean of the channels, as long as the header said."""
    path, frames = somewhere / f"tone.{kind}", round(seconds * rate)
    soundfile.write(path, np.sin(2 * np.pi * 100 * np.arange(frames) / rate)[:, None] * gains, rate)
    (whole,) = from_files([(path, "id", "group", "")], (0.1, 0.1), somewhere).utterances
    assert len(read_sound(path)) == whole.samples == math.ceil(frames * 16_000 / rate)
    start, stop = round(cut[0] * frames), round(cut[1] * frames)
    if (stop - start) / rate < 0.026:
        return
    waveform = read_sound(path, start, stop)
    expected = np.mean(gains) * np.sin(
        2 * np.pi * 100 * (start / rate + np.arange(len(waveform)) / 16_000)
    )
    inner = slice(50, -50)  # the filter rings at both ends
    assert np.abs(waveform.numpy() - expected)[inner].max() < (0.02 if rate % 25 == 0 else 0.15)


def test_unreadable_sound_is_named_and_left_out(tmp_path, capsys):
    for name in ("a", "b", "c"):
        tone(tmp_path / f"{name}.wav", 1)
    speech = load(str(tmp_path))
    soundfile.write(
        tmp_path / "b.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT"
    )  # goes bad after the headers were read
    (tmp_path / "c.wav").unlink()
    (indices, waveforms, lengths), (none, silence, _) = loader(speech, [[0, 1, 2], [1]])
    assert indices == [0] and waveforms.shape == (1, 16_000) and lengths.tolist() == [16_000]
    assert none == [] and silence.shape == (1, 400)
    said = capsys.readouterr().err
    assert "b.wav: holds NaN" in said and "c.wav: " in said


def test_batches(asterisk):
    samples = [u.samples for u in asterisk.utterances]
    first, second, plan = [], [], batches(asterisk, 32, seed=1)
    for epoch in (first, second):
        while sum(map(len, epoch)) < len(asterisk):
            epoch.append(next(plan))
        assert sorted(i for batch in epoch for i in batch) == list(
            range(len(asterisk))
        )  # each once an epoch
        padded = [max(samples[i] for i in batch) * len(batch) for batch in epoch]
        assert max(padded) <= 32 * 16_000 and sum(samples) / sum(padded) > 0.85  # little padding
    assert first != second
    again, other = batches(asterisk, 32, seed=1), batches(asterisk, 32, seed=2)
    assert [next(again) for _ in range(5)] == first[:5] != [next(other) for _ in range(5)]
    assert next(batches(Speech([Utterance("long", "g", 10**6)]), 1, 0)) == [
        0
    ]  # longer than a batch: alone


@pytest.fixture
def tiny_librispeech(tmp_path):
    """Laid out as the real one: SUBSET/SPEAKER/CHAPTER/*.flac and a .trans.txt."""
    for speaker in range(100, 140):
        chapter = tmp_path / "LibriSpeech" / "dev-clean" / str(speaker) / "7"
        chapter.mkdir(parents=True)
        for n in range(2):
            tone(chapter / f"{speaker}-7-{n:04}.flac", 0.5)
        (chapter / f"{speaker}-7.trans.txt").write_text(
            "".join(f"{speaker}-7-{n:04} HELLO WORLD\n" for n in range(2))
        )
    return tmp_path


def test_librispeech_folder(tiny_librispeech):
    speech = load("librispeech:dev-clean", tiny_librispeech)
    assert (
        len(speech) == 80
        and speech.utterances[0].text == "hello world"
        and speech[0].shape == (8_000,)
    )
    speakers = [
        {u.group for u in speech.part(split).utterances} for split in ("train", "valid", "test")
    ]
    assert not speakers[0] & speakers[1] and not speakers[0] & speakers[2] and len(speakers[0]) > 30


def test_librispeech_download_that_breaks_off(tmp_path, monkeypatch):
    import torchaudio

    def breaks(root, subset, download):
        (root / "LibriSpeech" / subset / "100").mkdir(parents=True)
        raise OSError("connection reset")

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", breaks)
    with pytest.raises(OSError, match="(?s)connection reset.*Try again.*--data FOLDER"):
        load("librispeech:dev-clean", tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_few_are_spread(asterisk):
    for count in (10, len(asterisk) * 3 // 4):
        assert (
            len(asterisk.subset(count)) == count
            and len({u.language for u in asterisk.subset(count).utterances}) == 5
        )
    assert len(asterisk.subset(10**6)) == len(asterisk)
