"""Mistakes, a row each: what was done, how, and words that the error has.

Scripts end with `script.py: message`, never with a traceback; the Python API raises ValueError or
OSError. Code that hides in a file is never run. What a corpus may hold is in test_data.py, half a
data set of SUPERB's in test_superb.py.
"""

import os
import pickle
import runpy
import shutil
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from huggingface_hub import constants

from cif import cif, cif_loop, expand
from extras import streaming
from extras.firing import firing
from ofa_encoder import PRESETS, OFAEncoder, lam_from_period
from parts import boundaries
from parts.data import load, read_sound
from parts.runs import save
from parts.superb import load_superb
from parts.tasks import load_task
from parts.teachers import load_teacher

REPO = Path(__file__).parent.parent
ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
FLAGS = {
    "pretrain.py": "--data forty --root root --steps 1 --batch-seconds 8 --device cpu --out new",
    "finetune.py": "--task pool --data good.tsv --checkpoint encoder.pt --epochs 1",
    "adaptive_lambda.py": "--way autograd --task pool --data good.tsv --checkpoint encoder.pt "
    "--epochs 1",
}  # later flags win

HEADER, SPLIT = "path\tlabel\n", "path\tlabel\tsplit\n"
FILES = {
    "a-file": "not a folder",
    "text.pt": "not a checkpoint",
    "cut.pt": b"PK\x03\x04 cut off",
    "empty.pt": "",
    "empty.tsv": "",
    "header.tsv": HEADER,
    "file-column.tsv": "file\tlabel\na.wav\tx\n",
    "no-label.tsv": "path\ttext\na.wav\tx\n",
    "two-labels.tsv": "path\tlabel\tlabel\na.wav\tx\ty\n",
    "gone.tsv": HEADER + "missing.wav\tx\n",
    "folder.tsv": HEADER + "forty\tx\n",
    "no-value.tsv": HEADER + "a.wav\t\n",
    "short-row.tsv": HEADER + "a.wav\n",
    "held.tsv": SPLIT + "a.wav\tx\theld\n",
    "no-test.tsv": SPLIT + "a.wav\tx\ttrain\nb.wav\tx\tvalid\n",
    "two.tsv": HEADER + "a.wav\tx\nb.wav\tx\n",
    "labels.tsv": HEADER + "a.wav\tx\nb.wav\ty\nc.wav\tz\n",
    "twice.tsv": SPLIT + "a.wav\tx\ttrain\n\n./a.wav\tx\ttest\n",
    "unseen.tsv": SPLIT + "a.wav\tx\ttrain\nb.wav\tx\tvalid\nc.wav\ty\ttest\n",
    "commas.tsv": "path,label\na.wav,x\n",
    "long-row.tsv": HEADER + "a.wav\tx\ty\n",
    "comma/metadata.csv": "file_name,text\na.wav,press one, then two\n",
    "quote/metadata.csv": 'file_name,text\na.wav,"press one\nb.wav,hello\n',
    "latin-1.tsv": (HEADER + "a.wav\tMüller\n").encode("latin-1"),
    "utf-16.tsv": (HEADER + "a.wav\tx\n").encode("utf-16"),
    "long.tsv": HEADER + "a.wav\t" + "x" * 200_000,
    "no-sound.tsv": HEADER + "bytes.wav\tx\n",
    "table.csv": "path,label\n",
    "bytes.wav": b"RIFF and then nothing",
    "no-bytes.wav": "",
    "bytes.tsv": bytes(range(256)),
    "other.tsv": "other\t0.1\n",
    "word.tsv": "other\tx\n",
    "same-id.tsv": "other\t0.1\nother\t0.2\n",
    "no-times.tsv": "other\t\n",
    "nan.tsv": "other\tnan\n",
    "negative.tsv": "other\t-1\n",
    "half/pool-encoder-lam0-seed0.json": '{"config": {"task":',
    "list/pool-encoder-lam0-seed0.json": "[]",
    "bare/pool-encoder-lam0-seed0.json": '{"config": {}, "metric": "CER", "test": 1}',
    "points/half/1.json": '{"config": {"task":',
    "bare-points/bare/1.json": '{"config": {}, "metric": "CER", "test": 1}',
    "number/pool-encoder-lam0-seed0.json": '{"config": 3, "metric": "CER", "test": 1}',
    "cut-corpus/asterisk.pt": b"PK\x03\x04 cut off",
    "root/LibriSpeech/dev-clean/84/121123/84-121123-0000.flac": "",
    "root/LibriSpeech/dev-other/84/121123/._84-121123-0000.flac": "",
    "hub/checkpoints/hubert_fairseq_base_ls960.pth": b"PK\x03\x04 cut off",
    "cut-deb/downloads/asterisk-core-sounds-en_1.6.1-1_all.deb": b"!<arch>\n cut off",
    "sound-and-text/notes.txt": "no sound",
    "payload-model/config.json": '{"model_type": "hubert"}',
    "jsonl/metadata.jsonl": '{"file_name": "a.wav", "label": "x"}',
    "no-column/metadata.csv": "file,label\na.wav,x\n",
    "semicolons/metadata.csv": "file_name;label\na.wav;x\n",
    "latin-1/metadata.csv": "file_name,label\na.wav,Müller\n".encode("latin-1"),
    "gone/metadata.csv": "file_name,label\nmissing.wav,x\n",
    "no-value/train/metadata.csv": "file_name,label\na.wav,\n",
    "half-split/metadata.csv": "file_name,label\ntrain/a.wav,x\n../a.wav,x\n",
    "no-valid/metadata.csv": "file_name,label\ntrain/a.wav,x\ntest/a.wav,x\n",
}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def call(command):
    """Run the script as the command line does, all but the start of Python."""
    script, *flags = command.split()
    sys.argv = [script, *FLAGS.get(script, "").split(), *flags]
    if script.endswith(".py"):
        runpy.run_path(str(REPO / script), run_name="__main__")
    else:  # python -m extras.predict
        runpy.run_module(script, run_name="__main__")


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """A folder with one of each kind of bad file, beside good ones."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", [])
        Path("forty").symlink_to(folder)
        for name in (
            "empty",
            "folder.pt",
            "list.tsv",
            "no-points",
            "as-folder/checkpoint.pt",
            "folder-of-bytes",
        ):
            Path(name).mkdir(parents=True)
        for name, content in FILES.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        shutil.copy("bytes.wav", "folder-of-bytes")
        for name, sound in (("a", 1), ("b", 1), ("c", 1), ("none", 0), ("10ms", 0.01)):
            soundfile.write(f"{name}.wav", np.sin(np.arange(int(16_000 * sound))), 16_000)
        soundfile.write("none8.wav", np.zeros(0), 8000)
        Path("one").mkdir()
        shutil.copy("a.wav", "one")
        for name in (
            "half-split/train",
            "no-valid/train",
            "no-valid/test",
            "no-labels/train",
            "no-labels/test",
            "depths/train/x",
            "depths/extra/x",
        ):
            Path(name).mkdir(parents=True)
            shutil.copy("a.wav", name)
        soundfile.write("nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
        soundfile.write("infinite.wav", np.full(16_000, np.inf), 16_000, subtype="FLOAT")
        sides = ("train", "train", "train", "valid", "test")
        rows = [
            f"forty/{p.name}\t{p.name[:2] == 'en'}\t{sides[n % 5]}\n"
            for n, p in enumerate(sorted(Path("forty").glob("*.wav")))
        ]
        Path("good.tsv").write_text(SPLIT + "".join(rows))
        Path("nan-sound.tsv").write_text(SPLIT + "".join(rows) + "nan.wav\tTrue\ttrain\n")

        torch.manual_seed(0)
        encoder = OFAEncoder(PRESETS["tiny"]).checkpoint()
        save(encoder, "encoder.pt")
        save(OFAEncoder(replace(PRESETS["tiny"], compression="average2")).checkpoint(), "fixed.pt")
        save(OFAEncoder(replace(PRESETS["tiny"], alpha="segments")).checkpoint(), "segments.pt")
        channels = [(32, k, s) for k, s in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))]
        hubert = torchaudio.models.wav2vec2_model(
            "group_norm", channels, False, 128, 0, 16, 4, 3, 2, 0, 64, 0, 0, False, 0, None
        )
        save(hubert.state_dict(), "hubert.pt")
        Path("truncated.pt").write_bytes(Path("encoder.pt").read_bytes()[:50_000])
        Path("payload.pt").write_bytes(pickle.dumps(Payload(), 2))
        shutil.copy("payload.pt", "payload-model/pytorch_model.bin")
        with pytest.raises(SystemExit, match="has learned nothing"):  # from a single step
            call("pretrain.py --out run")
        run = torch.load("run/checkpoint.pt", weights_only=True)
        for name, content in {
            "payload-inside.pt": {**encoder, "config": Payload()},
            "foreign.pt": {"model": 1},
            "tensor.pt": torch.ones(1),
            "list.pt": [1, 2],
            "other-size.pt": {**encoder, "config": {**encoder["config"], "dim": 128}},
            "odd-heads.pt": {**encoder, "config": {**encoder["config"], "heads": 5}},
            "nan.pt": {
                **encoder,
                "encoder": {k: v * torch.nan for k, v in encoder["encoder"].items()},
            },
            "gone-corpus.pt": {**run, "args": {**run["args"], "data": "gone"}},
            "other-heads.pt": {**run, "heads": {"0.bias": torch.ones(39)}},
            "no-args.pt": {k: v for k, v in run.items() if k != "args"},
            "of-encoder/checkpoint.pt": encoder,
            "of-payload/checkpoint.pt": {**run, "optimizer": Payload()},
            "of-nothing/checkpoint.pt": {"optimizer": {}},
            "of-other-speech/checkpoint.pt": {**run, "speech": "another"},
            "of-other-size/checkpoint.pt": {
                **run,
                "encoder": {k: v.flatten()[:1] for k, v in run["encoder"].items()},
            },
            "payload-corpus/asterisk.pt": {"utterances": "[]", "sound": Payload()},
            "foreign-corpus/asterisk.pt": {"model": 1},
        }.items():
            Path(name).parent.mkdir(exist_ok=True)
            torch.save(content, name)
        Path("of-cut").mkdir()
        Path("of-cut/checkpoint.pt").write_bytes(Path("run/checkpoint.pt").read_bytes()[:100_000])
        shutil.copytree(REPO / "results/average2", "with-firing/average2")
        Path("with-firing/firing").mkdir()
        Path("with-firing/firing/ofa.json").write_text("[]")
        Path("with-firing/firing/segments.json").write_text("{}")
        Path("with-times/x").mkdir(parents=True)
        Path("with-times/x/x.json").touch()
        Path("with-times/benchmark-heads.json").write_text("cut")
    return place


sound, x, a = torch.zeros(2, 800), torch.ones(2, 4, 3), torch.full((2, 4), 0.5)


def encoder(*arguments, compression="cif", **keywords):
    return OFAEncoder(replace(PRESETS["tiny"], compression=compression))(*arguments, **keywords)


def both(*arguments, **keywords):  # each must refuse, in the same words
    with pytest.raises(ValueError) as loop:
        cif_loop(*arguments, **keywords)
    try:
        cif(*arguments, **keywords)
    except ValueError as error:
        assert str(error) == str(loop.value)
        raise


def ends(path):
    return boundaries.read_boundaries(path, load("forty"))


ROWS = [
    # pretrain.py: where the speech is
    ("data that are not there", "pretrain.py --data nowhere", "no such folder: nowhere"),
    (
        "a file for the folder of speech",
        "pretrain.py --data a-file",
        "no such folder: a-file (--data takes",
    ),
    ("an empty folder of speech", "pretrain.py --data empty", "no usable sound file in empty"),
    (
        "a folder without sound",
        "pretrain.py --data sound-and-text",
        "no usable sound file in sound-and-text",
    ),
    (
        "a folder of corrupted sound",
        "pretrain.py --data folder-of-bytes",
        "no usable sound file in folder-of-bytes: 1 were left out",
    ),
    (
        "an unknown subset of LibriSpeech",
        "pretrain.py --data librispeech:train-clean-99",
        "train-clean-99",
    ),
    ("no subset of LibriSpeech", "pretrain.py --data librispeech:", "train-clean-100"),
    (
        "LibriSpeech without its transcripts",
        "pretrain.py --data librispeech:dev-clean",
        "root/LibriSpeech/dev-clean is not as LibriSpeech is distributed",
    ),
    (
        "LibriSpeech with a stray file",
        "pretrain.py --data librispeech:dev-other",
        "root/LibriSpeech/dev-other is not as LibriSpeech is distributed",
    ),
    ("a file for the root", "pretrain.py --root a-file", "a-file"),
    (
        "a corpus that was cut off",
        "pretrain.py --data asterisk --root cut-corpus",
        "cut-corpus/asterisk.pt is damaged",
    ),
    (
        "a corpus with a payload",
        "pretrain.py --data asterisk --root payload-corpus",
        "payload-corpus/asterisk.pt is damaged",
    ),
    (
        "something else as the corpus",
        "pretrain.py --data asterisk --root foreign-corpus",
        "foreign-corpus/asterisk.pt is damaged (KeyError): delete it",
    ),
    (
        "no network",
        "pretrain.py --data asterisk --root new-root",
        "asterisk-core-sounds-en_1.6.1-1_all.deb",
    ),
    (
        "a damaged package and no network",
        "pretrain.py --data asterisk --root cut-deb",
        "not the expected file: its SHA-256 differs",
    ),
    (
        "segments of a peer",
        "pretrain.py --alpha segments --compression average2",
        "--alpha segments is for --compression cif",
    ),
    ("another α", "pretrain.py --alpha words", "--alpha: invalid choice: 'words'"),
    # the teacher, boundaries
    (
        "a teacher that is not there",
        "pretrain.py --teacher nowhere.pt",
        "no teacher nowhere.pt: expected mfcc, hubert_base, a FILE",
    ),
    ("a mistyped teacher", "pretrain.py --teacher hubert_bse", "no teacher hubert_bse: expected"),
    (
        "a damaged HuBERT Base in the cache",
        "pretrain.py --teacher hubert_base",
        "HuBERT Base could not be downloaded, or is damaged",
    ),
    ("text as the teacher", "pretrain.py --teacher text.pt", "text.pt is no checkpoint"),
    (
        "our own encoder as the teacher",
        "pretrain.py --teacher encoder.pt",
        "encoder.pt is no state_dict of a HuBERT",
    ),
    ("a teacher with a payload", "pretrain.py --teacher payload.pt", "payload.pt is no checkpoint"),
    (
        "any folder as the teacher",
        "pretrain.py --teacher folder.pt",
        "folder.pt has no config.json: a folder for --teacher is one that transformers'",
    ),
    (
        "a teacher that the hub lacks, or no network",
        "pretrain.py --teacher nobody/hubert",
        "nobody/hubert is no folder here, and could not be had from the Hugging Face hub",
    ),
    (
        "a model of transformers with a payload",
        "pretrain.py --teacher payload-model",
        "payload-model: its weights can't be read",
    ),
    (
        "a list as the teacher",
        "pretrain.py --teacher list.pt",
        "list.pt is no checkpoint: it holds a list",
    ),
    (
        "a layer that the teacher lacks",
        "pretrain.py --teacher hubert.pt --teacher-layers 4",
        "hubert.pt has layers 1 to 3",
    ),
    ("boundaries that are not there", "pretrain.py --boundaries nowhere.tsv", "nowhere.tsv"),
    (
        "boundaries of another corpus",
        "pretrain.py --boundaries other.tsv",
        "other.tsv lacks 36 of 36 utterances, among them",
    ),
    (
        "an empty file of boundaries",
        "pretrain.py --boundaries empty.tsv",
        "empty.tsv lacks 36 of 36",
    ),
    ("a folder of boundaries", "pretrain.py --boundaries empty", "empty"),
    (
        "bytes as boundaries",
        "pretrain.py --boundaries bytes.tsv",
        "bytes.tsv, after line 0: not UTF-8",
    ),
    # numbers
    ("λ = 2.5", "pretrain.py --lam 2.5", "λ is 2.5"),
    ("λ = nan", "pretrain.py --lam nan", "λ is nan"),
    ("a λ below 0", "pretrain.py --lam -0.1", "λ is -0.1"),
    ("a largest λ of 3", "pretrain.py --lam-max 3", "--lam-max is 3.0"),
    ("a largest λ of nan", "pretrain.py --lam-max nan", "--lam-max is nan"),
    (
        "λ for a peer of one rate",
        "pretrain.py --compression average2 --lam 0.5",
        "average2 has one rate",
    ),
    (
        "a quantity of tokens that are given",
        "pretrain.py --compression none --quantity 1",
        "none has one rate",
    ),
    (
        "several λ, all one",
        "pretrain.py --lam 0.5 --lams-per-step 5",
        "--lams-per-step is for a λ that is drawn",
    ),
    (
        "a range of one λ",
        "pretrain.py --compression none --lam-max 1",
        "--lam-max is for a λ that is drawn",
    ),
    (
        "bf16 where it may be wrong",
        "pretrain.py --precision bf16",
        "--precision bf16 is for CUDA, and this is cpu",
    ),
    ("no λ at all", "pretrain.py --lams-per-step 0", "--lams-per-step is 0"),
    (
        "a head in bf16 where it may be wrong",
        "finetune.py --precision bf16 --device cpu",
        "--precision bf16 is for CUDA, and this is cpu",
    ),
    ("no steps", "pretrain.py --steps 0", "--steps is 0"),
    ("half a step", "pretrain.py --steps 0.5", "argument --steps: invalid int value"),
    ("no layers", "pretrain.py --layers 0", "--layers is 0"),
    ("a batch of less than nothing", "pretrain.py --batch-seconds -1", "--batch-seconds is -1.0"),
    ("an endless batch", "pretrain.py --batch-seconds inf", "--batch-seconds is inf"),
    ("a learning rate of nan", "pretrain.py --lr nan", "--lr is nan"),
    ("an infinite learning rate", "pretrain.py --lr inf", "--lr is inf"),
    ("a quantity below 0", "pretrain.py --quantity -1", "--quantity is -1.0"),
    ("a quantity of nan", "pretrain.py --quantity nan", "--quantity is nan"),
    (
        "segments shorter than a frame",
        "pretrain.py --segment-ms 5",
        "--segment-ms is 5.0, expected 20 to 500",
    ),
    ("segments over a second", "pretrain.py --segment-ms 1500", "expected 20 to 500"),
    ("a seed below 0", "pretrain.py --seed -1", "--seed is -1"),
    (
        "a seed of 23 digits",
        "pretrain.py --seed 99999999999999999999999",
        "--seed is 99999999999999999999999",
    ),
    ("less than no workers", "pretrain.py --workers -1", "--workers is -1"),
    ("an unknown preset", "pretrain.py --preset huge", "argument --preset: invalid choice"),
    (
        "an unknown compression",
        "pretrain.py --compression average3",
        "argument --compression: invalid choice",
    ),
    (
        "a device that is not there",
        f"pretrain.py --device {ABSENT}",
        f"--device {ABSENT}: torch finds none here",
    ),
    # where it writes, and what it goes on from
    ("a file for --out", "pretrain.py --out a-file", "a-file"),
    ("a folder in a file for --out", "pretrain.py --out a-file/new", "a-file/new"),
    ("an --out where nobody may write", "pretrain.py --out /proc/new", "/proc/new"),
    (
        "an --out that holds a run",
        "pretrain.py --out run",
        "run/checkpoint.pt is the checkpoint of an earlier run: go on with it by --resume",
    ),
    (
        "going on with another learning rate",
        "pretrain.py --out run --resume --lr 0.5",
        "of another run (flag: now, then): {'lr': (0.5, 0.001)}",
    ),
    (
        "going on with another preset",
        "pretrain.py --out run --resume --preset base",
        "{'preset': ('base', 'tiny')}",
    ),
    (
        "going on from an encoder",
        "pretrain.py --out of-encoder --resume",
        "of-encoder/checkpoint.pt can't be resumed: pretrain.py did not write it",
    ),
    (
        "going on from a cut checkpoint",
        "pretrain.py --out of-cut --resume",
        "of-cut/checkpoint.pt is no checkpoint, or it is damaged",
    ),
    (
        "going on from a payload",
        "pretrain.py --out of-payload --resume",
        "of-payload/checkpoint.pt is no checkpoint",
    ),
    (
        "going on from nearly nothing",
        "pretrain.py --out of-nothing --resume",
        "can't be resumed: it is damaged (KeyError('args'))",
    ),
    (
        "going on with weights of another size",
        "pretrain.py --out of-other-size --resume",
        "of-other-size/checkpoint.pt can't be resumed: it is damaged",
    ),
    (
        "going on with other speech",
        "pretrain.py --out of-other-speech --resume",
        "of-other-speech/checkpoint.pt was made with other speech than forty holds now",
    ),
    (
        "a folder called checkpoint.pt",
        "pretrain.py --out as-folder --resume",
        "no checkpoint at as-folder/checkpoint.pt",
    ),
    # finetune.py
    ("an unknown task", "finetune.py --task dance", "argument --task: invalid choice: 'dance'"),
    ("a head at λ = 2.5", "finetune.py --lam 0 2.5", "λ is 2.5"),
    ("a head at λ = nan", "finetune.py --lam nan", "λ is nan"),
    ("any λ and one", "finetune.py --lam any 0.5", "goes without further λ"),
    ("any λ of log-mels", "finetune.py --lam any --features logmel", "--features"),
    ("any λ, unfrozen", "finetune.py --lam any --unfreeze", "--unfreeze"),
    ("merging what is merged", "finetune.py --features merge", "--compression none"),
    ("a head of a rival", "finetune.py --features average --save-heads", "without --save-heads"),
    ("boundaries of regression", "finetune.py --boundaries pseudo", "has no segments"),
    (
        "boundaries of log-mels",
        "finetune.py --boundaries pseudo --features logmel",
        "--boundaries is for --features encoder",
    ),
    (
        "boundaries of other speech",
        "finetune.py --checkpoint segments.pt --boundaries other.tsv",
        "other.tsv lacks",
    ),
    ("λ is a word", "finetune.py --lam some", "'some' is neither a number nor any"),
    ("one λ twice", "finetune.py --lam 0.1234567 0 0.1234568", "expected each value once"),
    (
        "a beam for a label",
        "finetune.py --beam 5",
        "--beam is for seq2seq, and --task pool is pool",
    ),
    (
        "a head of CTC's for a label",
        "finetune.py --task pool --head linear",
        "--head is for ctc, and --task pool is pool",
    ),
    (
        "any λ of an encoder of one rate",
        "finetune.py --checkpoint fixed.pt --lam any",
        "fixed.pt has one fixed rate",
    ),
    (
        "λ for log-mels",
        "finetune.py --features logmel --lam 0 0.5",
        "--features logmel has no encoder: it goes without --lam",
    ),
    (
        "λ for an encoder of one rate",
        "finetune.py --checkpoint fixed.pt --lam 0.5",
        "fixed.pt has one fixed rate (average2)",
    ),
    ("unfreezing log-mels", "finetune.py --features logmel --unfreeze", "--unfreeze"),
    ("no encoder", "finetune.py --checkpoint nowhere.pt", "no checkpoint at nowhere.pt"),
    (
        "a HuBERT, of another width, as the encoder",
        "finetune.py --checkpoint hubert.pt",
        "hubert.pt holds no encoder of this project",
    ),
    ("text as the encoder", "finetune.py --checkpoint text.pt", "text.pt is no checkpoint"),
    (
        "an encoder that was cut off",
        "finetune.py --checkpoint truncated.pt",
        "truncated.pt is no checkpoint, or it is damaged",
    ),
    (
        "an encoder with a payload",
        "finetune.py --checkpoint payload.pt",
        "or it holds more than tensors and plain values",
    ),
    (
        "a payload inside of an encoder",
        "finetune.py --checkpoint payload-inside.pt",
        "payload-inside.pt is no checkpoint",
    ),
    ("an encoder of NaN", "finetune.py --checkpoint nan.pt", "nan.pt holds NaN"),
    ("no seeds", "finetune.py --seeds 0", "--seeds is 0"),
    ("the seed of a head below 0", "finetune.py --seed -1", "--seed is -1"),
    ("no learning rate", "finetune.py --lr 0", "--lr is 0.0"),
    (
        "a learning rate of the encoder of nan",
        "finetune.py --unfreeze --encoder-lr nan",
        "--encoder-lr is nan",
    ),
    ("CTC alone in seq2seq", "finetune.py --ctc-weight 1", "--ctc-weight is 1.0"),
    (
        "a sixth session of IEMOCAP",
        "finetune.py --task er --fold 6",
        "argument --fold: invalid choice",
    ),
    (
        "no such device for the head",
        f"finetune.py --device {ABSENT}",
        f"--device {ABSENT}: torch finds none here",
    ),
    ("a file for the points", "finetune.py --out a-file", "a-file"),
    ("points where nobody may write", "finetune.py --out /proc/new", "/proc/new"),
    ("half a point", "finetune.py --out half", "half/pool-encoder-lam0-seed0.json is no point"),
    (
        "a list as a point",
        "finetune.py --out list",
        "list/pool-encoder-lam0-seed0.json is no point",
    ),
    ("a bare point", "finetune.py --out bare", "bare/pool-encoder-lam0-seed0.json is no point"),
    (
        "a point whose configuration is a number",
        "finetune.py --out number",
        "number/pool-encoder-lam0-seed0.json is no point",
    ),
    # its TSV
    ("a TSV that is not there", "finetune.py --data nowhere.tsv", "no such file: nowhere.tsv"),
    ("a CSV", "finetune.py --data table.csv", "ends in .tsv"),
    ("a folder called .tsv", "finetune.py --data list.tsv", "no such file: list.tsv"),
    ("an empty TSV", "finetune.py --data empty.tsv", "no rows"),
    ("a TSV of a header", "finetune.py --data header.tsv", "no rows"),
    ("no column path", "finetune.py --data file-column.tsv", "no column path"),
    ("no column label", "finetune.py --data no-label.tsv", "no column label"),
    ("two columns label", "finetune.py --data two-labels.tsv", "more than one column label"),
    (
        "commas in a TSV",
        "finetune.py --data commas.tsv",
        "no column label, path in its header; columns are separated by tabs",
    ),
    ("a TSV in Latin-1", "finetune.py --data latin-1.tsv", "latin-1.tsv: not a TSV in UTF-8"),
    ("a TSV in UTF-16", "finetune.py --data utf-16.tsv", "utf-16.tsv: not a TSV in UTF-8"),
    ("bytes as a TSV", "finetune.py --data bytes.tsv", "bytes.tsv: not a TSV in UTF-8"),
    (
        "a TSV with an endless label",
        "finetune.py --data long.tsv",
        "long.tsv: not a TSV in UTF-8 (field larger",
    ),
    (
        "a sound file that is not there",
        "finetune.py --data gone.tsv",
        "line 2: no such file: missing.wav",
    ),
    ("a folder for a sound file", "finetune.py --data folder.tsv", "line 2: no such file: forty"),
    (
        "corrupted sound alone",
        "finetune.py --data no-sound.tsv",
        "no usable sound file in no-sound.tsv",
    ),
    (
        "NaN in a file of the TSV",
        "finetune.py --data nan-sound.tsv",
        "nan.wav: holds NaN or infinite samples",
    ),
    ("no label", "finetune.py --data no-value.tsv", "line 2: path or label is empty"),
    (
        "a row that is too short",
        "finetune.py --data short-row.tsv",
        "line 2: path or label is empty",
    ),
    (
        "a file in two splits",
        "finetune.py --data twice.tsv",
        "line 4: ./a.wav is in test and in train",
    ),
    ("an unknown split", "finetune.py --data held.tsv", "line 2: split is 'held'"),
    ("too few to split", "finetune.py --data two.tsv", "no utterance is left for test"),
    ("as many labels as files", "finetune.py --data labels.tsv", "two more files than labels"),
    ("nothing to test", "finetune.py --data no-test.tsv", "no utterance is left for test"),
    # or its folder
    (
        "neither a TSV nor a folder",
        "finetune.py --data nowhere",
        "--data nowhere: expected asterisk, a file that ends in .tsv, or a folder that is there",
    ),
    (
        "a folder of sound without labels",
        "finetune.py --data forty",
        ".wav: without a metadata.csv, every file lies in forty/LABEL, or",
    ),
    (
        "folders of splits without labels",
        "finetune.py --data no-labels",
        "no-labels/test/a.wav: without a metadata.csv, every file lies in no-labels/LABEL, or",
    ),
    (
        "a folder beside those of splits",
        "finetune.py --data depths",
        "depths/extra/x/a.wav: without a metadata.csv, every file lies in depths/LABEL, or",
    ),
    (
        "a folder without texts",
        "finetune.py --task ctc --data forty",
        "forty has no metadata.csv: a table with the columns file_name and text",
    ),
    (
        "another form of metadata",
        "finetune.py --data jsonl",
        "no sound file in jsonl, and no metadata.csv",
    ),
    ("an empty folder of labels", "finetune.py --data empty", "no sound file in empty"),
    (
        "no column file_name",
        "finetune.py --data no-column",
        "no-column/metadata.csv: no column file_name in its header; columns are separated by comma",
    ),
    (
        "semicolons in metadata.csv",
        "finetune.py --data semicolons",
        "semicolons/metadata.csv: no column file_name, label in its header",
    ),
    (
        "metadata.csv in Latin-1",
        "finetune.py --data latin-1",
        "latin-1/metadata.csv: not a CSV in UTF-8",
    ),
    (
        "a file of metadata.csv that is not there",
        "finetune.py --data gone",
        "gone/metadata.csv, line 2: no such file: gone/missing.wav",
    ),
    (
        "no label in metadata.csv",
        "finetune.py --data no-value",
        "no-value/train/metadata.csv, line 2: file_name or label is empty",
    ),
    (
        "a file outside the folders of splits",
        "finetune.py --data half-split",
        "half-split/metadata.csv, line 3: ../a.wav lies in no folder named train, validation or",
    ),
    (
        "a cell too many",
        "finetune.py --data long-row.tsv",
        "line 2: more cells than the header has",
    ),
    (
        "a comma in a text",
        "finetune.py --task ctc --data comma",
        "comma/metadata.csv, line 2: more cells than the header has; in a CSV, put a text with",
    ),
    (
        "a quote that is left open",
        "finetune.py --task ctc --data quote",
        "quote/metadata.csv: not a CSV in UTF-8 (unexpected end of data)",
    ),
    ("a fold of none", "finetune.py --fold 2", "--fold is for --task er"),
    ("a frozen encoder's rate", "finetune.py --encoder-lr 1e-3", "--encoder-lr is for --unfreeze"),
    ("no folder validation", "finetune.py --data no-valid", "no utterance is left for valid"),
    (
        "a label that train lacks",
        "finetune.py --data unseen.tsv",
        "label 'y' of c.wav (test) never occurs in train",
    ),
    # adaptive_lambda.py
    ("λ from 0", "adaptive_lambda.py --lam 0", "can't start from an end of the scale"),
    ("λ from 2", "adaptive_lambda.py --lam 2", "λ is 2"),
    ("λ from any", "adaptive_lambda.py --lam any", "no λ to start from"),
    ("no step", "adaptive_lambda.py --way differences --delta 0", "--delta is 0"),
    ("hardly a step", "adaptive_lambda.py --way differences --delta 1e-9", "--delta is 1e-09"),
    ("a start of a search", "adaptive_lambda.py --way search --lam 0.5", "search has no start"),
    (
        "a step of autograd",
        "adaptive_lambda.py --way autograd --delta 0.2",
        "--delta is of no use to --way autograd",
    ),
    ("slopes by choice", "adaptive_lambda.py --by loss", "--by is of no use to --way autograd"),
    (
        "a rest in a search",
        "adaptive_lambda.py --way search --freeze 9",
        "--freeze is of no use to --way search",
    ),
    ("an unknown way", "adaptive_lambda.py --way guess", "--way: invalid choice: 'guess'"),
    ("λ from nan", "adaptive_lambda.py --lam nan", "λ is nan"),
    (
        "λ learned on log-mels",
        "adaptive_lambda.py --features logmel",
        "frozen, pre-trained encoder",
    ),
    (
        "λ from where no head learns",
        "adaptive_lambda.py --way differences --lam 0.1 1.8",
        "--lam 1.8: under --way differences the head learns up to λ = 1.6",
    ),
    ("a price below 0", "adaptive_lambda.py --price -1", "--price is -1.0"),
    ("one price twice", "adaptive_lambda.py --price 1 2 1", "--price 1 2 1: expected each value"),
    (
        "λ that can't move",
        "adaptive_lambda.py --lam-lr 0",
        "--lam-lr is 0.0, expected a number over",
    ),
    ("no epochs to learn λ in", "adaptive_lambda.py --lam-epochs 0", "--lam-epochs is 0"),
    (
        "λ frozen for good",
        "adaptive_lambda.py --freeze 400 --lam-epochs 2",
        "would rest for all of the 4 steps",
    ),
    (
        "λ learned on an encoder of one rate",
        "adaptive_lambda.py --checkpoint fixed.pt",
        "one fixed rate (average2)",
    ),
    (
        "λ learned on nothing",
        "adaptive_lambda.py --checkpoint nowhere.pt",
        "no checkpoint at nowhere.pt",
    ),
    # the other scripts
    (
        "a corpus to build without a network",
        "parts.asterisk",
        "the embedded corpus could not be fetched",
    ),
    ("firing of nothing", "extras.firing nowhere.pt", "no checkpoint at nowhere.pt"),
    ("firing of text", "extras.firing text.pt", "text.pt is no checkpoint"),
    (
        "a prediction without a head",
        "extras.predict",
        "train a head with `python finetune.py --save-heads`",
    ),
    ("a prediction by an encoder", "extras.predict encoder.pt a.wav", "encoder.pt holds no head"),
    ("a prediction by nothing", "extras.predict nowhere.pt a.wav", "no checkpoint at nowhere.pt"),
    (
        "a head of log-mels, kept",
        "finetune.py --features logmel --save-heads",
        "--features logmel has no encoder: it goes without --lam, --save-heads",
    ),
    # extras.hub; what a folder may hold is in test_hub.py
    ("no checkpoint for a folder", "extras.hub nowhere.pt new", "no checkpoint at nowhere.pt"),
    ("foreign weights for a folder", "extras.hub foreign.pt new", "foreign.pt holds no encoder"),
    ("a file for the folder", "extras.hub encoder.pt a-file", "a-file"),
    ("an unknown section", "extras.benchmark sums", "the sections are ['sums'], expected"),
    ("no round", "extras.benchmark cif --repeats 0", "--repeats is 0"),
    (
        "results of no points",
        "extras.results no-points",
        "no points at one λ under no-points: `make sweep RESULTS=no-points` computes them",
    ),
    ("results of nothing", "extras.results nowhere", "no points at one λ under nowhere"),
    ("a page of nothing", "extras.listen nowhere.pt x.html", "no checkpoint at nowhere.pt"),
    ("pictures of nothing", "extras.pictures nowhere.pt", "no checkpoint at nowhere.pt"),
    ("an export of nothing", "extras.export nowhere.pt x.onnx", "no checkpoint at nowhere.pt"),
    ("slopes of nothing", "extras.slopes nowhere.pt", "no checkpoint at nowhere.pt"),
    ("slopes of an encoder", "extras.slopes encoder.pt", "encoder.pt holds no head"),
    ("claims of nothing", "extras.claims nowhere", "no points under nowhere"),
    (
        "claims with damaged times",
        "extras.claims with-times",
        "with-times/benchmark-heads.json is no table of benchmark.py",
    ),
    ("results of half a point", "extras.results points", "points/half/1.json is no point"),
    (
        "results of a bare point",
        "extras.results bare-points",
        "bare-points/bare/1.json is no point",
    ),
    (
        "results with a damaged table",
        "extras.results with-firing",
        "with-firing/firing/segments.json is no table of firing.py",
    ),
    # the Python API: the encoder
    ("an array", lambda: encoder(np.zeros((1, 800))), "waveforms is a ndarray, expected a tensor"),
    ("one waveform, no batch", lambda: encoder(sound[0]), "waveforms has shape (800,)"),
    ("whole numbers", lambda: encoder(sound.int()), "int32"),
    ("399 samples", lambda: encoder(sound[:, :399]), "399"),
    ("no utterances", lambda: encoder(sound[:0]), "waveforms of []"),
    ("399 valid samples", lambda: encoder(sound, torch.tensor([800, 399])), "399"),
    ("more valid samples than there are", lambda: encoder(sound, torch.tensor([800, 801])), "801"),
    ("a length too few", lambda: encoder(sound, torch.tensor([800])), "lengths has shape (1,)"),
    (
        "lengths in seconds",
        lambda: encoder(sound, torch.tensor([0.05, 0.05])),
        "type torch.float32, expected whole samples",
    ),
    ("NaN in the sound", lambda: encoder(sound * torch.nan), "NaN"),
    ("λ = 2 for the encoder", lambda: encoder(sound, None, 2.0), "λ is 2"),
    ("λ below 0 for the encoder", lambda: encoder(sound, None, -0.1), "λ is -0.1"),
    ("λ = nan for the encoder", lambda: encoder(sound, None, float("nan")), "λ is nan"),
    ("a tensor of λ = 2.5", lambda: encoder(sound, None, torch.tensor(2.5)), "λ is 2.5"),
    ("two λ", lambda: encoder(sound, None, torch.tensor([0.1, 0.2])), "λ has shape (2,)"),
    ("λ for one rate", lambda: encoder(sound, lam=0.5, compression="average2"), "one fixed rate"),
    (
        "a period of one rate",
        lambda: OFAEncoder.from_checkpoint("fixed.pt").lam_for(40),
        "can't be asked for 40 ms",
    ),
    ("a compression that is not there", lambda: encoder(sound, compression="average3"), "average3"),
    ("19 ms", lambda: lam_from_period(19, 0.22), "a frame period of 19 ms"),
    ("nan ms", lambda: lam_from_period(float("nan"), 0.22), "a frame period of nan ms"),
    ("endless ms", lambda: lam_from_period(float("inf"), 0.22), "a frame period of inf ms"),
    ("a token in a month", lambda: lam_from_period(3e9, 0.22), "grows with λ, up to 10000000 ms"),
    ("λ is a text", lambda: encoder(sound, None, "0.5"), "λ is '0.5', expected one number"),
    ("no λ", lambda: encoder(sound, None, None), "λ is None, expected one number"),
    ("λ in a box", lambda: encoder(sound, None, torch.full((1, 1, 1), 0.5)), "has shape (1, 1, 1)"),
    *(
        (
            f"{what} to load",
            lambda name=name: OFAEncoder.from_checkpoint(f"{name}.pt"),
            f"{name}.pt",
        )
        for name, what in (
            ("nowhere", "no file"),
            ("folder", "a folder"),
            ("empty", "an empty file"),
            ("cut", "a cut file"),
            ("payload", "a payload"),
            ("foreign", "foreign weights"),
            ("tensor", "a tensor"),
            ("list", "a list"),
            ("other-size", "weights of another size"),
            ("odd-heads", "heads that do not divide"),
            ("nan", "NaN"),
        )
    ),
    # CIF
    ("frames without a batch", lambda: both(x[0], a), "x has shape (4, 3)"),
    ("no frames", lambda: both(x[:, :0], a[:, :0]), "x has shape (2, 0, 3)"),
    ("whole frames", lambda: both(x.long(), a), "int64"),
    (
        "a weight too few",
        lambda: both(x, a[:, :3]),
        "alpha has shape (2, 3) and type torch.float32, expected floats (B, S) = (2, 4)",
    ),
    ("negative weights", lambda: both(x, -a), "negative"),
    ("NaN weights", lambda: both(x, a * torch.nan), "holds negative, infinite or NaN weights"),
    ("infinite weights", lambda: both(x, a / 0), "holds negative, infinite or NaN weights"),
    ("weights of 1e8", lambda: both(x, a * 2e8), "alpha asks for 1e+08 tokens a frame"),
    ("weights of 1e30", lambda: both(x, a * 2e30), "alpha asks for 1e+30 tokens a frame"),
    (
        "a billion tokens wanted",
        lambda: both(x, a, target_lengths=torch.tensor([4, 10**9])),
        "alpha asks for 2.5e+08 tokens a frame",
    ),
    ("a threshold of next to nothing", lambda: both(x, a, threshold=1e-9), "of 1e-09 too small?"),
    (
        "an empty utterance",
        lambda: both(x, a, torch.tensor([0, 4])),
        "lengths is [0, 4], expected 1 to 4",
    ),
    ("more frames than there are", lambda: both(x, a, torch.tensor([5, 4])), "lengths is [5, 4]"),
    ("one length of two", lambda: both(x, a, torch.tensor([4])), "lengths has shape (1,)"),
    (
        "half a frame",
        lambda: both(x, a, torch.tensor([0.5, 1.0])),
        "lengths has shape (2,) and type torch.float32",
    ),
    ("a threshold of 0", lambda: both(x, a, threshold=0.0), "threshold is 0.0"),
    ("a threshold of nan", lambda: both(x, a, threshold=float("nan")), "threshold is nan"),
    ("a tail of 1.5 tokens", lambda: both(x, a, tail_threshold=1.5), "tail_threshold is 1.5"),
    (
        "no tokens wanted",
        lambda: both(x, a, target_lengths=torch.tensor([1, 0])),
        "target_lengths is [1, 0]",
    ),
    (
        "tokens of nothing",
        lambda: both(x, a * 0, target_lengths=torch.tensor([1, 1])),
        "expected targets of 1 or more and sums > 0",
    ),
    (
        "one target of two",
        lambda: both(x, a, target_lengths=torch.tensor([1])),
        "target_lengths has shape (1,)",
    ),
    (
        "tokens of something else",
        lambda: expand(torch.ones(2, 9, 3), cif(x, a)),
        "tokens has shape (2, 9, 3)",
    ),
    ("a stream of negative weights", lambda: streaming.step(x, -a, streaming.start(x)), "negative"),
    (
        "a stream longer than its chunk",
        lambda: streaming.step(x, a, streaming.start(x), [5, 4]),
        "lengths is",
    ),
    (
        "a chunk of another batch",
        lambda: streaming.step(x[:1], a[:1], streaming.start(x)),
        "with the state's (B, C) = (2, 3)",
    ),
    (
        "a chunk without a batch",
        lambda: streaming.step(x[0], a[0], streaming.start(x)),
        "x has shape (4, 3)",
    ),
    # sound, boundaries, tasks, teachers
    ("no sound file", lambda: read_sound("nowhere.wav"), "nowhere.wav: "),
    ("a folder as sound", lambda: read_sound("empty"), "empty: "),
    ("corrupted sound", lambda: read_sound("bytes.wav"), "bytes.wav: "),
    ("a sound file of no bytes", lambda: read_sound("no-bytes.wav"), "no-bytes.wav: "),
    (
        "a sound file of no samples",
        lambda: read_sound("none.wav"),
        "none.wav: 0 samples at 16 kHz, too short",
    ),
    ("no samples at 8 kHz", lambda: read_sound("none8.wav"), "none8.wav: 0 samples at 16 kHz"),
    ("10 ms", lambda: read_sound("10ms.wav"), "10ms.wav: 160 samples at 16 kHz, too short"),
    ("NaN in a file", lambda: read_sound("nan.wav"), "nan.wav: holds NaN or infinite samples"),
    (
        "infinity in a file",
        lambda: read_sound("infinite.wav"),
        "infinite.wav: holds NaN or infinite samples",
    ),
    ("one file, to be split", lambda: load("one").part("train"), "too few to hold some out"),
    (
        "boundaries that are words",
        lambda: ends("word.tsv"),
        "word.tsv, line 1 (other): expected an id that no line before it has, a tab",
    ),
    ("no boundaries", lambda: ends("no-times.tsv"), "no-times.tsv, line 1 (other)"),
    ("boundaries twice", lambda: ends("same-id.tsv"), "same-id.tsv, line 2 (other)"),
    ("boundaries at nan", lambda: ends("nan.tsv"), "nan.tsv, line 1 (other)"),
    ("boundaries before 0", lambda: ends("negative.tsv"), "negative.tsv, line 1 (other)"),
    (
        "firing of an encoder of one rate",
        lambda: firing(OFAEncoder.from_checkpoint("fixed.pt"), load("forty"), []),
        "one fixed rate (average2)",
    ),
    ("a kind of task that is not there", lambda: load_task("dance"), "unknown task 'dance'"),
    ("a task of SUPERB's that is not there", lambda: load_superb("dance"), "unknown task 'dance'"),
    (
        "foreign weights as a teacher",
        lambda: load_teacher("foreign.pt"),
        "foreign.pt is no state_dict",
    ),
    (
        "layer 0 of a teacher",
        lambda: load_teacher("hubert.pt", layers=[0]),
        "hubert.pt has layers 1 to 3",
    ),
]


@pytest.mark.parametrize("how, words", [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_the_mistake_is_named(place, monkeypatch, capsys, how, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("TORCH_HOME", str(place))
    really_open = urllib.request.urlopen

    def offline(address, *rest, **more):
        if address.startswith("file:"):
            return really_open(address, *rest, **more)
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if callable(how):
        with pytest.raises((ValueError, OSError)) as error:
            how()
        message = str(error.value)
    else:
        with pytest.raises(SystemExit) as stop:
            call(how)
        message = (
            stop.value.code
            if isinstance(stop.value.code, str)
            else capsys.readouterr().err.splitlines()[-1]
        )
        name = how.split()[0].removesuffix(".py").split(".")[-1]
        assert message.startswith(f"{name}.py: ")
    assert words in message and not Path("payload-was-run").exists()


def test_every_script_has_rows():
    """Every file that can be run and takes something from the command line."""
    ids = [row[0] for row in ROWS]
    assert len(set(ids)) == len(ids)
    tried = {row[1].split()[0].removesuffix(".py") for row in ROWS if isinstance(row[1], str)}
    files = [*REPO.glob("*.py"), *REPO.glob("parts/*.py"), *REPO.glob("extras/*.py")]
    scripts = {
        ".".join(path.relative_to(REPO).with_suffix("").parts)
        for path in files
        if "__main__" in path.read_text()
    }
    examples = {"cif", "ofa_encoder"}  # they take nothing
    # superb prints what is missing; the flags of s3prl_expert are s3prl's own.
    assert tried == scripts - examples - {"parts.superb", "extras.s3prl_expert"}
