"""data.py and asterisk.py: the embedded corpus, folders, LibriSpeech, reading sound, batches.

What a corpus holds, what is left out of it, and what happens when a download breaks off.
"""

import hashlib
import itertools
import math

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

import parts.asterisk as corpus
from parts.data import (
    SPLITS,
    Speech,
    Utterance,
    batches,
    by_length,
    from_files,
    load,
    loader,
    pad,
    read_sound,
)


def tone(path, seconds, rate=16_000, channels=1):
    """Write a sound file of 440 Hz."""
    time = np.arange(int(seconds * rate)) / rate
    sound = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(path, np.tile(sound[:, None], channels), rate)


def pitch(waveform):
    """The strongest frequency of a waveform at 16 kHz, in Hz."""
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return spectrum.argmax().item() * 16_000 / len(waveform)


# The embedded corpus.


def test_embedded_corpus_is_ninety_minutes_in_five_languages(asterisk):
    assert 2500 < len(asterisk) < 2700
    assert 85 < asterisk.seconds / 60 < 95
    assert {u.language for u in asterisk.utterances} == set(corpus.LANGUAGES)
    assert all(0.025 <= u.samples / 16_000 <= 15 for u in asterisk.utterances)


def test_embedded_sound_is_as_long_as_announced_and_in_range(asterisk):
    for i in (0, 1000, 2500):
        assert asterisk[i].shape == (asterisk.utterances[i].samples,)
        assert 0.05 < asterisk[i].abs().max() <= 1


def test_embedded_transcripts_are_words_and_tones_are_left_out(asterisk):
    texts = {u.id: u.text for u in asterisk.utterances}
    assert texts["en/agent-loginok"] == "agent logged in"
    assert texts["fr/activated"] == "activé"
    assert not any(character.isdigit() for text in texts.values() for character in text)
    assert not any("beep" in id for id in texts)
    assert not any(id.endswith("2tone") for id in texts)


def test_splits_share_no_text_and_no_prompt(asterisk):
    parts = [asterisk.part(split).utterances for split in SPLITS]
    for one, other in itertools.combinations(parts, 2):
        assert not {u.text for u in one} & {u.text for u in other}
        prompts, others = ({u.id.split("/", 1)[1] for u in part} for part in (one, other))
        assert not prompts & others


def test_splits_hold_everything_once_and_their_shares(asterisk):
    parts = [asterisk.part(split).utterances for split in SPLITS]
    ids = [u.id for part in parts for u in part]
    assert sorted(ids) == sorted(u.id for u in asterisk.utterances)
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert len(part) == pytest.approx(share * len(asterisk), rel=0.1)


def test_splits_are_the_same_every_time(asterisk):
    for split in SPLITS:
        assert asterisk.part(split).utterances == asterisk.part(split).utterances


@pytest.mark.parametrize("count", [10, 1900])
def test_a_subset_is_spread_over_the_corpus(asterisk, count):
    few = asterisk.subset(count)
    assert len(few) == count
    assert {u.language for u in few.utterances} == set(corpus.LANGUAGES)


def test_a_subset_of_more_than_all_is_all(asterisk):
    assert asterisk.subset(10**6).utterances == asterisk.utterances


def test_normalised_text_has_letters_apostrophes_and_digits_as_words():
    text = "  L’été,\tCafe\u0301 #2 — D'accord_!"
    assert corpus.normalise(text, "fr") == "l'été café deux d'accord"


def test_trim_keeps_the_sound_and_50_ms_on_both_sides():
    sound = torch.zeros(16_000, dtype=torch.int16)
    sound[6_400:9_600] = 1000
    assert torch.equal(corpus.trim(sound), sound[6_400 - 800 : 9_600 + 800])


@pytest.mark.parametrize("samples", [0, 100, 16_000])
def test_trim_leaves_nothing_of_silence(samples):
    assert corpus.trim(torch.zeros(samples, dtype=torch.int16)).shape == (0,)


def test_groups_are_joined_by_text_across_prompts():
    """b and c share "nein", a and d "yes"; e shares nothing."""
    rows = ["a yes", "b no", "b nein", "c nein", "c ja", "d yes", "e else"]
    utterances = [dict(zip(("group", "text"), row.split())) for row in rows]
    corpus.join_groups(utterances)
    groups = [u["group"] for u in utterances]
    assert groups[0] == groups[5]
    assert len(set(groups[1:5])) == 1
    assert len(set(groups)) == 3


class Mirror:
    """A mirror on this machine that has one package; `fetch` gets it."""

    def __init__(self, folder):
        self.content = b"!<arch>\n" + bytes(range(256)) * 100
        self.file = folder / "mirror" / "asterisk-core-sounds-en_1.6.1-1_all.deb"
        self.file.parent.mkdir()
        self.file.write_bytes(self.content)
        self.downloads = folder / "downloads"

    def fetch(self):
        return corpus._fetch("en", hashlib.sha256(self.content).hexdigest(), self.downloads)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    mirror = Mirror(tmp_path)
    mirrors = ["file:///no/such/mirror/", mirror.file.parent.as_uri() + "/"]
    monkeypatch.setattr(corpus, "MIRRORS", mirrors)
    return mirror


def test_a_download_that_breaks_off_leaves_nothing(mirror):
    mirror.file.write_bytes(mirror.content[:5000])
    with pytest.raises(OSError, match=r"(?s)SHA-256 differs.*Try again.*--data FOLDER"):
        mirror.fetch()
    assert not list(mirror.downloads.glob("*"))


def test_a_package_is_downloaded_once(mirror):
    assert mirror.fetch() == mirror.content
    assert [p.name for p in mirror.downloads.iterdir()] == [mirror.file.name]
    mirror.file.unlink()
    assert mirror.fetch() == mirror.content  # now from downloads/


def test_a_damaged_download_is_fetched_again(mirror):
    mirror.downloads.mkdir()
    (mirror.downloads / mirror.file.name).write_bytes(b"damaged")
    assert mirror.fetch() == mirror.content


def test_a_corpus_that_can_not_be_fetched_leaves_no_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "MIRRORS", ["file:///no/such/mirror/"])
    with pytest.raises(OSError, match="could not be fetched"):
        load("asterisk", tmp_path)
    assert not (tmp_path / "asterisk.pt").exists()
    assert "CC BY-SA 3.0" in capsys.readouterr().out  # credits come first


# Folders of sound files.


@pytest.fixture
def mixed_folder(tmp_path):
    """Files that can be used, files that can't, and files that are not sound."""
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


def test_a_folder_gives_its_usable_files_and_cuts_long_ones(mixed_folder):
    speech = load(str(mixed_folder))
    long = ["LONG.WAV#0", "LONG.WAV#1", "LONG.WAV#2"]
    others = ["good.wav", "sub/stereo.flac", "telephone.ogg"]
    assert [u.id for u in speech.utterances] == long + others
    assert [u.group for u in speech.utterances[:3]] == ["LONG.WAV"] * 3
    assert speech.seconds == pytest.approx(44, abs=0.01)


def test_a_folder_names_the_files_that_it_leaves_out(mixed_folder, capsys):
    load(str(mixed_folder))
    printed = capsys.readouterr().err
    for name in ("10ms.wav (10 ms", "empty.wav (empty", "cut.flac", "broken.wav", "zero-bytes.mp3"):
        assert f"left out: {mixed_folder}/{name}" in printed
    for name in ("notes.txt", "headerless.raw", "stereo"):
        assert name not in printed


def test_a_file_that_is_damaged_in_the_middle_is_left_out(tmp_path, capsys):
    """Its header is whole, and it ends where it should."""
    tone(tmp_path / "a.ogg", 5)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * 16_000)
    soundfile.write(tmp_path / "b.ogg", noise, 16_000)
    sound = bytearray((tmp_path / "b.ogg").read_bytes())
    middle = len(sound) // 2
    sound[middle : middle + 3000] = bytes(3000)
    (tmp_path / "b.ogg").write_bytes(sound)
    speech = load(str(tmp_path))
    assert [u.samples for u in speech.utterances] == [80_000, 80_000]
    (loaded,) = loader(speech, [[0, 1]])
    used, waveforms, _ = loaded
    assert used == [0] and len(waveforms) == 1
    assert "left out: " in capsys.readouterr().err


def test_sound_of_a_folder_is_resampled_and_as_long_as_announced(mixed_folder):
    speech = load(str(mixed_folder))
    for i, u in enumerate(speech.utterances):
        assert speech[i].shape == (u.samples,)
        assert pitch(speech[i]) == pytest.approx(440, abs=2)  # not just played at another rate


@pytest.mark.parametrize("large", range(10))
def test_a_group_that_is_most_of_a_corpus_is_for_training(large):
    utterances = []
    for k in range(10):
        for n in range(1000 if k == large else 10):
            utterances.append(Utterance(f"{k}/{n}", f"speaker{k}", 16_000))
    speech = Speech(utterances, held_out=(0.05, 0.05))
    sizes = [len(speech.part(split)) for split in SPLITS]
    assert sizes[0] >= 1000
    assert min(sizes[1:]) >= 10


def test_names_that_differ_in_their_spaces_alone_are_two(tmp_path):
    for name in ("a b.wav", "a  b.wav", "a\tb\nc.wav"):
        soundfile.write(tmp_path / name, np.zeros(16_000), 16_000)
    assert {u.id for u in load(str(tmp_path)).utterances} == {"a b.wav", "a  b.wav", "a b c.wav"}


def test_many_folders_are_groups_and_few_are_not(tmp_path):
    for n in range(10):
        (tmp_path / f"speaker{n}").mkdir()
        tone(tmp_path / f"speaker{n}" / "a.wav", 0.1)
        groups = {u.group for u in load(str(tmp_path)).utterances}
        assert groups == ({"a.wav"} if n < 9 else {f"speaker{k}" for k in range(10)})


def test_ids_have_no_tabs(tmp_path):
    """A tab ends the id in a file of boundaries."""
    tone(tmp_path / "a\tb.wav", 1)
    assert load(str(tmp_path)).utterances[0].id == "a b.wav"


# Reading sound.


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return tmp_path_factory.mktemp("sounds")


usual_rates = st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000])


@given(
    rate=usual_rates | st.integers(6_000, 96_000),
    seconds=st.floats(0.04, 0.12),
    gains=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3),
    stretch=st.tuples(st.floats(0, 0.2), st.floats(0.8, 1)),
    kind=st.sampled_from(["wav", "aiff"]),
)
def test_any_rate_channels_and_stretch_become_16_khz_mono(
    sounds, rate, seconds, gains, stretch, kind
):
    """A tone of 100 Hz stays one of 100 Hz, as loud as the mean of its channels, and as long as
    the header says."""
    path = sounds / f"tone.{kind}"
    length = round(seconds * rate)
    sound = np.sin(2 * np.pi * 100 * np.arange(length) / rate)
    soundfile.write(path, sound[:, None] * gains, rate)
    (utterance,) = from_files([(path, "id", "group", "")], (0.1, 0.1), sounds).utterances
    assert len(read_sound(path)) == utterance.samples == math.ceil(length * 16_000 / rate)

    start = round(stretch[0] * length)
    stop = round(stretch[1] * length)
    if (stop - start) / rate < 0.026:  # too short to be read
        return
    waveform = read_sound(path, start, stop)
    time = start / rate + np.arange(len(waveform)) / 16_000
    expected = np.mean(gains) * np.sin(2 * np.pi * 100 * time)
    difference = np.abs(waveform.numpy() - expected)[50:-50]  # the filter rings at both ends
    # Other rates are rounded to a multiple of 25 Hz, which shifts the tone a little.
    assert difference.max() < (0.02 if rate % 25 == 0 else 0.15)


@pytest.fixture
def spoilt(tmp_path):
    """Three files, of which the second and third go bad after their headers were read."""
    for name in ("a", "b", "c"):
        tone(tmp_path / f"{name}.wav", 1)
    speech = load(str(tmp_path))
    soundfile.write(tmp_path / "b.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "c.wav").unlink()
    return speech


def test_sound_that_can_not_be_read_is_named_and_left_out(spoilt, capsys):
    ((indices, waveforms, lengths),) = loader(spoilt, [[0, 1, 2]])
    assert indices == [0]
    assert torch.equal(waveforms[0], spoilt[0])
    assert waveforms.shape == (1, 16_000)
    assert lengths.tolist() == [16_000]
    printed = capsys.readouterr().err
    assert "left out: " in printed
    assert "b.wav: holds NaN" in printed
    assert "c.wav: " in printed


@pytest.mark.parametrize("indices", [[1, 2], []], ids=["none readable", "none asked for"])
def test_a_batch_of_nothing_is_a_frame_of_silence(spoilt, indices):
    ((read, waveforms, lengths),) = loader(spoilt, [indices])
    assert read == []
    assert torch.equal(waveforms, torch.zeros(1, 400))
    assert lengths.tolist() == [400]


def test_workers_read_the_same(asterisk):
    plan = [[0, 900], [], [2000]]
    for here, elsewhere in zip(loader(asterisk, plan), loader(asterisk, plan, 1), strict=True):
        assert here[0] == elsewhere[0]
        assert torch.equal(here[1], elsewhere[1])
        assert torch.equal(here[2], elsewhere[2])


def test_pad_by_hand():
    waveforms, lengths = pad([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])])
    assert waveforms.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]


# Batches.


def epochs(speech, seconds, seed, count):
    """The first epochs of batches: a list of batches for each."""
    plan = batches(speech, seconds, seed)
    result = []
    for _ in range(count):
        epoch = []
        while sum(map(len, epoch)) < len(speech):
            epoch.append(next(plan))
        result.append(epoch)
    return result


def padded_samples(speech, epoch):
    """How many samples each batch has when it is padded."""
    return [max(speech.utterances[i].samples for i in batch) * len(batch) for batch in epoch]


def test_an_epoch_has_each_utterance_once(asterisk):
    for epoch in (*epochs(asterisk, 32, 1, 2), by_length(asterisk)):
        assert sorted(i for batch in epoch for i in batch) == list(range(len(asterisk)))


def test_batches_are_as_long_as_asked_with_little_padding(asterisk):
    (epoch,) = epochs(asterisk, 32, 1, 1)
    for seconds, packed in ((32, epoch), (30, by_length(asterisk))):
        padded = padded_samples(asterisk, packed)
        assert max(padded) <= seconds * 16_000
        assert sum(u.samples for u in asterisk.utterances) / sum(padded) > 0.85


def test_order_depends_on_seed_and_epoch_alone(asterisk):
    first, second = epochs(asterisk, 32, 1, 2)
    assert [first, second] == epochs(asterisk, 32, 1, 2)
    assert first != second
    assert [first] != epochs(asterisk, 32, 2, 1)


def test_by_length_goes_from_short_to_long(asterisk):
    order = [asterisk.utterances[i].samples for batch in by_length(asterisk) for i in batch]
    assert order == sorted(order)


def test_an_utterance_longer_than_a_batch_is_alone():
    samples = [8_000, 8_000, 10**6, 10**6]
    speech = Speech([Utterance(str(n), "g", length) for n, length in enumerate(samples)])
    assert by_length(speech, 1) == [[0, 1], [2], [3]]


def test_no_utterances_give_no_batches():
    assert by_length(Speech([])) == []
    with pytest.raises(ValueError, match="no utterances"):
        next(batches(Speech([]), 32, 0))


# LibriSpeech.


@pytest.fixture
def tiny_librispeech(tmp_path):
    """Laid out as the real one: SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, .trans.txt."""
    for speaker in range(100, 140):
        chapter = tmp_path / "LibriSpeech" / "dev-clean" / str(speaker) / "7"
        chapter.mkdir(parents=True)
        lines = ""
        for n in range(2):
            tone(chapter / f"{speaker}-7-{n:04}.flac", 0.5)
            lines += f"{speaker}-7-{n:04} HELLO WORLD\n"
        (chapter / f"{speaker}-7.trans.txt").write_text(lines)
    return tmp_path


def test_librispeech_is_read_with_its_transcripts(tiny_librispeech):
    speech = load("librispeech:dev-clean", tiny_librispeech)
    assert len(speech) == 80
    assert speech.utterances[0].id == "100-7-0000"
    assert speech.utterances[0].text == "hello world"
    assert speech[0].shape == (8_000,)


def test_librispeech_is_split_by_speaker(tiny_librispeech):
    speech = load("librispeech:dev-clean", tiny_librispeech)
    speakers = [{u.group for u in speech.part(split).utterances} for split in SPLITS]
    for one, other in itertools.combinations(speakers, 2):
        assert not one & other
    assert len(set().union(*speakers)) == 40
    assert len(speakers[0]) > 30


def test_a_librispeech_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def breaks(root, subset, download):
        (root / "LibriSpeech" / subset / "100").mkdir(parents=True)
        raise OSError("connection reset")

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", breaks)
    with pytest.raises(OSError, match="(?s)connection reset.*Try again.*--data FOLDER"):
        load("librispeech:dev-clean", tmp_path)
    assert not list(tmp_path.rglob("*"))
