"""Large corpora, which are prepared in pieces, against the same texts prepared at once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import pieces
from data.loader import Dataset
from data.prepare import PrepareConfig, prepare
from data.tokenizer import CharTokenizer
from helpers import REPOSITORY, losses, train_here

N_FILES = 12


def write_texts(folder: Path) -> Path:
    """Write 12 files of 100 documents each."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "é"]
    for n in range(N_FILES):
        texts = [" ".join(rng.choices(words, k=40)) for _ in range(100)]
        lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)]
        (folder / f"{n:02d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    """Let a piece be three of the files."""
    sizes = [path.stat().st_size for path in texts.iterdir()]
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2.5 * max(sizes))


def build(texts: Path, out: Path, tokenizer: str = "byte", val_fraction: float = 0.1) -> Dataset:
    vocab_size = 300 if tokenizer == "bpe" else 0
    settings: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "out": out}
    prepare(PrepareConfig(sources=(str(texts),), val_fraction=val_fraction, **settings))
    return Dataset.open(out)


def written(out: Path) -> dict[str, int]:
    """When each token file was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("pieces_*/*.bin")}


@pytest.fixture
def at_once(texts: Path, tmp_path: Path) -> Dataset:
    return build(texts, tmp_path / "at_once")


def test_pieces_have_the_tokens_of_a_corpus_that_is_prepared_at_once(
    at_once: Dataset, texts: Path, tmp_path: Path, small_pieces: None
):
    dataset = build(texts, tmp_path / "out")
    for split in ("train", "val"):
        assert np.array_equal(dataset.tokens(split)[:], at_once.tokens(split))
        found, expected = (one.meta["splits"][split] for one in (dataset, at_once))
        assert len(found["shards"]) == 4
        assert {key: found[key] for key in ("tokens", "bytes", "documents")} == {
            key: expected[key] for key in ("tokens", "bytes", "documents")
        }


def test_of_a_large_corpus_little_validates_unless_more_is_asked_for(
    texts: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
):
    assert pieces.VAL_FRACTION == 0.001
    monkeypatch.setattr(pieces, "VAL_FRACTION", 0.02)
    found = [build(texts, tmp_path / str(asked), val_fraction=asked) for asked in (0, 0.1)]
    few, many = (dataset.meta["splits"]["val"]["documents"] for dataset in found)
    assert 0 < few < 50 < many


def test_a_preparation_that_is_started_again_writes_the_missing_pieces_alone(
    texts: Path, tmp_path: Path, small_pieces: None, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    dataset = build(texts, out)
    meta, before = dataset.meta, written(out)
    (folder,) = out.glob("pieces_*")
    (folder / "00002.json").unlink()  # as if it had been killed before this one was whole
    (folder / "val_00002.bin.partial").write_text("half")
    (out / "meta.json").unlink()
    capsys.readouterr()
    assert build(texts, out).meta == meta
    assert "3 of 4 pieces are there already" in capsys.readouterr().out
    after = written(out)
    assert {name for name in before if after[name] != before[name]} == {
        *("train_00002.bin", "val_00002.bin")
    }
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("changed", ["a text", "a setting"])
def test_pieces_of_other_texts_or_settings_are_written_anew_and_the_old_ones_removed(
    texts: Path, tmp_path: Path, small_pieces: None, changed: str
):
    out = tmp_path / "out"
    build(texts, out)
    (old,) = out.glob("pieces_*")
    if changed == "a text":
        with (texts / "00.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"text": "one more"}\n')
    dataset = build(texts, out, "byte" if changed == "a text" else "bpe")
    (new,) = out.glob("pieces_*")
    assert new != old
    n = sum(split["documents"] for split in dataset.meta["splits"].values())
    assert n == 100 * N_FILES + (changed == "a text")


def test_a_damaged_piece_is_written_again_and_foreign_folders_stay(
    texts: Path, tmp_path: Path, small_pieces: None
):
    out = tmp_path / "out"
    (out / "pieces_of_our_music").mkdir(parents=True)
    meta = build(texts, out).meta
    (folder,) = out.glob("pieces_????????")
    for name in ("train_00001.bin", "val_00003.bin"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    (folder / "train_00002.bin").unlink()
    before = written(out)
    assert build(texts, out).meta == meta
    after = written(out)
    assert {name[-9:-4] for name in after if after[name] != before.get(name)} == {
        *("00001", "00002", "00003")
    }
    assert (out / "pieces_of_our_music").exists()


def test_a_split_without_tokens_is_refused(texts: Path, tmp_path: Path, small_pieces: None):
    with pytest.raises(ValueError, match="the val split must have 2 tokens: got 0"):
        build(texts, tmp_path / "out", val_fraction=1e-9)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_another_runs_tokenizer_must_separate_documents_and_is_part_of_what_was_asked(
    texts: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    letters = "".join(sorted({*(texts / "00.jsonl").read_text(encoding="utf-8"), "é"}))
    for with_end in (False, True):
        tokenizer = CharTokenizer(letters, with_end_of_text=with_end)
        monkeypatch.setattr("data.prepare.tokenizer_of", lambda _, found=tokenizer: found)
        if with_end:
            build(texts, out, str(run))
        else:
            with pytest.raises(ValueError, match="which this char tokenizer has not"):
                build(texts, out, str(run))
            assert not out.exists()
    assert len(list(out.glob("pieces_*"))) == 1


def test_a_bpe_is_learned_from_all_pieces(
    texts: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.learn.BPE_TRAINING_CHARACTERS", 8000)
    with (texts / "09.jsonl").open("w", encoding="utf-8") as file:
        file.writelines('{"text": "' + "zq" * 50 + str(i) + '"}\n' for i in range(100))
    dataset = build(texts, tmp_path / "out", "bpe")
    tokens = [dataset.tokenizer.token_bytes(i) for i in range(256, dataset.vocab_size - 1)]
    assert any(b"zq" in token for token in tokens)
    assert any(b"cat" in token for token in tokens)


def test_a_file_that_cannot_be_read_is_named_and_the_other_pieces_stay(
    texts: Path, tmp_path: Path, small_pieces: None
):
    out = tmp_path / "out"
    bad = texts / "07.jsonl"
    text = bad.read_text(encoding="utf-8")
    bad.write_text(text + '{"other": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"07\.jsonl"):
        build(texts, out)
    assert not (out / "meta.json").exists()
    assert not list(out.glob("pieces_*/00002.json"))


SCRIPT = """
import sys
sys.path.insert(0, {repository!r})
from data import pieces, prepare
from cli import run

pieces.PIECE_BYTES = {size}
if __name__ == "__main__":
    run(prepare.main)
"""


@pytest.mark.slow
def test_an_interrupted_preparation_keeps_its_whole_pieces_and_leaves_no_process(
    at_once: Dataset, texts: Path, tmp_path: Path, small_pieces: None
):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY), size=pieces.PIECE_BYTES))
    command = [sys.executable, str(script), str(texts), "--tokenizer=byte", f"--out={out}"]
    command.append("--val_fraction=0.1")
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    while not list(out.glob("pieces_*/0*.json")):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (143, 0)  # it may have been faster
    with pytest.raises(ProcessLookupError):
        wait_for_the_end_of_group(process.pid)
    before = written(out)
    dataset = build(texts, out)
    assert np.array_equal(dataset.tokens("train")[:], at_once.tokens("train"))
    kept = {path.stem for path in out.glob("pieces_*/0*.json")}
    assert any(written(out)[name] == before[name] for name in before if name[-9:-4] in kept)


def wait_for_the_end_of_group(group: int) -> None:
    """Raises ProcessLookupError when no process of the group is left."""
    for _ in range(200):
        os.killpg(group, 0)
        time.sleep(0.05)


def test_a_run_trains_on_pieces_and_a_damaged_one_is_found(
    texts: Path, tmp_path: Path, small_pieces: None
):
    config = tmp_path / "run.toml"
    config.write_text(
        f'max_steps = 2\nbatch_size = 2\nsamples = 0\ndevice = "cpu"\n[data]\n'
        f'path = "{tmp_path / "out"}"\n[model]\ncontext_length = 8\nn_layer = 1\n'
        "n_head = 1\nn_embd = 8\n"
    )
    build(texts, tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")  # its files are found where it is
    train_here(config, tmp_path / "run", f"--data.path={moved}")
    assert len(losses(tmp_path / "run")) == 3
    for path in moved.glob("pieces_*/train_*.bin"):
        path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(ValueError, match=r"train_0000\d\.bin was changed .*prepare it again"):
        train_here(config, tmp_path / "run", f"--data.path={moved}", "--resume", "--max_steps=3")
