"""Files that somebody made to do harm: each is refused, and nothing happens that should not."""

import hashlib
import json
import random
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
import train
from damage import bounded
from data import documents, hub
from data.bpe import train_bpe
from data.format import META
from data.loader import Dataset
from data.pieces import Piece
from data.prepare import PrepareConfig, prepare
from data.sources import Corpus
from data.tokenizer import GPT2_PATTERN, BPETokenizer, ByteTokenizer
from engine import checkpoint, metrics
from exchange import foreign, hub_folder
from helpers import on_linux, words
from sampling import fastest
from sampling.load import load_model
from test_damage import state_of

pytestmark = on_linux
DEEP = 100_000
TEXTS = {
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "a number of 100,000 digits": '{"step": ' + "9" * DEEP + "}",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder whose best checkpoint is of step 7, and its last one of step 8."""
    state = state_of(ByteTokenizer(), "modern")
    checkpoint.save(tmp_path / "run", state, ["last", "best"])
    checkpoint.save(tmp_path / "run", state | {"step": 8}, ["last"])
    return tmp_path / "run"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    hub_folder.export(state_of(ByteTokenizer()), tmp_path / "hub", license="")
    return tmp_path / "hub"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return prepared(words(160, "abcé"), tmp_path, "char").path


def prepared(text: str, folder: Path, tokenizer: str, name: str = "text.txt") -> Dataset:
    (folder / name).write_bytes(text.encode())
    prepare(PrepareConfig(sources=(str(folder / name),), tokenizer=tokenizer, out=folder / "out"))
    return Dataset.open(folder / "out")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def put(saved: Path, write: Callable[[Path], object]) -> Path:
    """Replace the last checkpoint by another file, and let the record agree."""
    record = json.loads((saved / checkpoint.RECORD).read_text())
    path = saved / record["last"]["file"]
    write(path)
    record["last"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (saved / checkpoint.RECORD).write_text(json.dumps(record))
    return path


# --- Depth and size -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_beyond_reason_is_refused_wherever_json_is_read(
    text: str, saved: Path, exported: Path, dataset: Path, tmp_path: Path
):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + text + "\n")
    readers: dict[Path, Callable[[], Any]] = {
        saved / checkpoint.RECORD: lambda: checkpoint.load(saved, "last"),
        dataset / META: lambda: Dataset.open(dataset),
        exported / hub_folder.INDEX: lambda: foreign.read(exported, None),
        exported / "tokenizer.json": lambda: foreign.read(exported, None),
        exported / "config.json": lambda: foreign.read(exported, None),
        tmp_path / "metrics.jsonl": lambda: metrics.forget_from(tmp_path / "metrics.jsonl", 9),
    }
    for path, read in readers.items():
        path.write_text(text + "\n")
        with bounded(), pytest.raises(ValueError, match=rf"{path.name}|is damaged"):
            read()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_beyond_reason_is_made_again_where_it_only_saves_time(text: str, tmp_path: Path):
    piece = Piece(0, Corpus(files=()), 0.1, tmp_path)
    piece.record.write_text(text)
    (tmp_path / fastest.FILE).write_text(text)
    (tmp_path / hub.LISTING).write_text(text)
    repository = hub.Repository("me/small", "0123456789" * 4, "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.Repository, "_listed", lambda *_: [])
        assert repository.files(tmp_path) == []
    assert not piece.is_whole()
    assert fastest.kept(None, tmp_path) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * DEEP, "a = " + "{a = " * DEEP, "a" + ".a" * 2000 + " = 1", "a = " + "9" * DEEP],
)
def test_toml_beyond_reason_is_refused(text: str, tmp_path: Path):
    (tmp_path / "config.toml").write_text(text)
    with bounded(), pytest.raises(ValueError, match=r"config\.toml"):
        cli.parse_config(train.TrainConfig, [str(tmp_path / "config.toml")])


def test_sizes_beyond_all_memory_are_refused_before_any_is_taken(
    saved: Path, exported: Path, dataset: Path, tmp_path: Path
):
    edit(dataset / META, lambda meta: meta["splits"]["train"].update(tokens=10**18))
    data = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + data[8:])
    header = np.zeros(foreign.LLMC_HEADER, "<i4")
    header[:8] = (foreign.LLMC_MAGIC, 3, 8, 9, 2**31 - 1, 1, 4, 9)
    (tmp_path / "model.bin").write_bytes(header.tobytes())
    with bounded():
        with pytest.raises(ValueError, match=r"should have 2000000000000000000 bytes"):
            Dataset.open(dataset)
        with pytest.raises(ValueError, match=r"safetensors is damaged"):
            foreign.read(exported, None)
        with pytest.raises(ValueError, match=r"n_layer must be at most 1,000"):
            foreign.read(tmp_path / "model.bin", None)


@pytest.mark.parametrize("sizes", [{"n_layer": 2**31}, {"vocab_size": 2**40}, {"n_embd": 2**20}])
def test_a_checkpoint_whose_sizes_are_not_those_of_its_weights_is_refused(
    saved: Path, sizes: dict[str, int]
):
    state = checkpoint.load(saved, "last")
    state["model_config"] |= sizes
    put(saved, lambda path: torch.save(state, path))
    with bounded(), pytest.raises(ValueError, match=r"the last checkpoint in .* is damaged"):
        load_model(saved, "last")


def test_weights_that_repeat_one_number_without_end_are_refused(saved: Path, tmp_path: Path):
    state = checkpoint.load(saved, "last")
    n = 2**33  # numbers, of which the file has one
    state["model_config"] |= {"vocab_size": n}
    for name in ("wte.weight", "lm_head.weight"):
        state["model"][name] = torch.zeros(1, 1).expand(n, 4)
    put(saved, lambda path: torch.save(state, path))
    keys = ("n_layer", "n_head", "n_embd", "dropout", "vocab_size")
    sizes = {key: state["model_config"][key] for key in keys} | {"block_size": 8, "bias": True}
    theirs = {"wte.weight": state["model"]["wte.weight"], "wpe.weight": torch.zeros(8, 4)}
    torch.save({"model_args": sizes | {"n_layer": 0}, "model": theirs}, tmp_path / "ckpt.pt")
    with bounded():
        with pytest.raises(ValueError, match="weights are not those of"):
            load_model(saved, "last")
        with pytest.raises(ValueError, match=r"ckpt\.pt"):
            foreign.read(tmp_path / "ckpt.pt", None)


# --- Archives -------------------------------------------------------------------------------------


def as_bomb(path: Path) -> None:
    """Pack a checkpoint, and let one of its files expand to 10 GB."""
    with zipfile.ZipFile(path) as before:
        content = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name, data in content.items():
            after.writestr(name, data)
        after.infolist()[-1].file_size = 10**10


def test_a_checkpoint_that_would_expand_is_refused_and_not_unpacked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = put(saved, as_bomb)
    shutil.copy(path, tmp_path / "ckpt.pt")
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="is refused"):
        checkpoint.load(saved, "last")
    with pytest.raises(ValueError, match="is refused"):
        foreign.read(tmp_path / "ckpt.pt", None)


def expanding(path: Path, block: bytes, n: int) -> Path:
    """Write a gzip file of `n` equal blocks, each of which is compressed once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(start + again * (n - 1))
    return path


def test_a_gzip_file_that_expands_without_end_is_read_in_little_memory(tmp_path: Path):
    path = expanding(tmp_path / "text.txt.gz", b"to be or not to be, " * 5000, 1000)
    assert path.stat().st_size < 1e6
    lengths: list[int] = []
    with bounded(60, memory=2**26), pytest.raises(ValueError, match="is not a whole gzip file"):
        lengths.extend(map(len, documents.read_text(path)))
    assert sum(lengths) > 0.9e8


def test_a_line_of_jsonl_that_does_not_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1_000_000)
    path = expanding(tmp_path / "lines.jsonl.gz", b'{"text": "' + b"a" * 10**6, 10_000)
    with bounded(memory=2**26), pytest.raises(ValueError, match=r"lines\.jsonl\.gz, line 1 is too"):
        list(documents.read_documents(path, "text"))


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "..", ""])
def test_a_record_that_names_what_is_outside_of_its_folder_is_refused(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(next(saved.glob("*.pt")), saved.parent / "outside.pt")
    monkeypatch.setattr("files.sha256", lambda path: pytest.fail(f"{path} was read"))
    original = (saved / checkpoint.RECORD).read_text()
    for change in (
        {"file": name},
        {"shares": {"folder": name, "sha256": {}}},
        {"shares": {"folder": "a.shares", "sha256": {name: "0"}}},
    ):
        (saved / checkpoint.RECORD).write_text(original)
        edit(saved / checkpoint.RECORD, lambda record, to=change: record["last"].update(to))
        with pytest.raises(ValueError, match="must be a plain file name, without a folder"):
            checkpoint.load(saved, "last")
        with pytest.raises(ValueError, match="must be a plain file name, without a folder"):
            checkpoint.save(saved, state_of(ByteTokenizer()), ["best"])


def test_shards_of_a_dataset_outside_of_their_folder_are_refused(dataset: Path):
    def climb(meta: dict[str, Any]) -> None:
        del meta["sha256"]
        meta["shards"] = "."
        for split, about in meta["splits"].items():
            about["shards"] = [{**about, "file": f"../{dataset.name}/{split}.bin"}]

    edit(dataset / META, climb)
    with pytest.raises(ValueError, match=r"must be a plain file name, without a folder; prepare"):
        Dataset.open(dataset)


def test_a_checkpoint_with_the_hash_of_another_file_is_refused(saved: Path):
    edit(saved / checkpoint.RECORD, lambda r: r["last"].update(sha256=r["best"]["sha256"]))
    with pytest.raises(ValueError, match=r"SHA-256 is not the one in checkpoints\.json"):
        checkpoint.load(saved, "last")


# --- Texts ----------------------------------------------------------------------------------------


def test_lone_surrogates_in_jsonl_become_replacement_characters(tmp_path: Path):
    lines = [r'{"text": "a\ud800b"}', r'{"text": "\udc00\ud800"}', r'{"text": "\ud83d\ude00"}']
    dataset = prepared("\n".join(lines * 9) + "\n", tmp_path, "byte", "lines.jsonl")
    tokens = [token for split in ("train", "val") for token in dataset.tokens(split).tolist()]
    text = dataset.tokenizer.decode(tokens).replace("<|endoftext|>", "")
    assert sorted(text) == sorted("a\ufffdb\ufffd\ufffd\U0001f600" * 9)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_text_of_every_code_point_comes_back(tokenizer: str, tmp_path: Path):
    points = [*range(1, 0xD800), *range(0xE000, 0x110000)]  # a zero is taken for a binary file
    text = "".join(map(chr, points))
    assert len(text) == 1_112_063
    with bounded(60):
        dataset = prepared(text, tmp_path, tokenizer)
    tokens = [token for split in ("train", "val") for token in dataset.tokens(split).tolist()]
    assert dataset.tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    "letters", ["a", "abcdefgh", *(pytest.param(c, marks=pytest.mark.slow) for c in " 1\n")]
)
def test_a_million_characters_without_a_break_are_learned_and_encoded_in_time(letters: str):
    text = "".join(random.Random(0).choices(letters, k=10**6))
    with bounded(30):
        tokenizer = BPETokenizer(train_bpe([text], 400, GPT2_PATTERN), kind="bpe")
        assert tokenizer.decode(tokenizer.encode(text)) == text
