"""python -m data.prepare: what it writes, what it refuses, and that it is whole or not there."""

import codecs
import contextlib
import errno
import gzip
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import requests

import data.prepare
import data.writer
from cli import run
from data.encode import encode_all
from data.learn import Learn
from data.loader import Dataset
from data.prepare import PrepareConfig, main, prepare
from data.sources import Corpus, stdlib
from data.split import Part, Scan
from data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, cut
from files import reserved
from helpers import contents

REPOSITORY = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "naïve", "☃", "dogs"]


def story(seed: int, n_words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words)) + "\n"


def build(*sources: Path, out: Path, **settings) -> Dataset:
    prepare(PrepareConfig(sources=tuple(map(str, sources)), out=out, **settings))
    return Dataset.open(out)


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *map(str, args)],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip


def command_here(*args: str | Path) -> int:
    """Run the command in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        patch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            run(main)
    return int(stopped.value.code or 0)


def fork(function: Callable[..., None], *args: object) -> ForkProcess:
    """Run a function in a copy of this process, which starts at once."""
    child = FORK.Process(target=function, args=args)
    child.start()
    return child


PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def decoded(dataset: Dataset, split: str) -> list[str]:
    """Return the documents of a split."""
    text = dataset.tokenizer.decode(dataset.tokens(split).tolist())
    first, *documents = text.split("<|endoftext|>")
    assert first == ""
    return documents


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A folder of 40 documents, one of them twice."""
    folder = tmp_path / "stories"
    (folder / "deeper").mkdir(parents=True)
    for i in range(40):
        (folder / ("deeper" if i % 2 else "") / f"{i:02}.txt").write_text(story(i % 39), "utf-8")
    return folder


def test_shakespeare_by_characters_has_nanogpts_counts(shakespeare: Path, tmp_path: Path):
    dataset = build(shakespeare, out=tmp_path / "out", tokenizer="char")
    assert (len(dataset.tokens("train")), len(dataset.tokens("val"))) == (1_003_854, 111_540)
    assert (dataset.vocab_size, dataset.tokenizer.end_of_text) == (65, None)
    assert isinstance(dataset.tokenizer, CharTokenizer)
    ids = itertools.chain(dataset.tokens("train").tolist(), dataset.tokens("val").tolist())
    text = "".join(map(dataset.tokenizer.characters.__getitem__, ids))
    assert text == shakespeare.read_bytes().decode()


@pytest.mark.usefixtures("gpt2_cache")
def test_shakespeare_by_gpt2_has_nanogpts_counts(shakespeare: Path, tmp_path: Path):
    dataset = build(shakespeare, out=tmp_path / "out", tokenizer="gpt2")
    assert (len(dataset.tokens("train")), len(dataset.tokens("val"))) == (301_966, 36_059)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_many_documents_go_whole_to_one_side_each_after_end_of_text(
    stories: Path, tmp_path: Path, tokenizer
):
    dataset = build(
        stories, out=tmp_path / "out", tokenizer=tokenizer, val_fraction=0.3,
        vocab_size=300 if tokenizer == "bpe" else 0,
    )  # fmt: skip
    train, val = decoded(dataset, "train"), decoded(dataset, "val")
    assert sorted(train + val) == sorted(story(i % 39) for i in range(40))
    assert not set(train) & set(val)
    assert len(val) >= 4
    about = dataset.meta["splits"]["val"]
    assert (about["documents"], about["bytes"]) == (len(val), len("".join(val).encode()))


def test_the_side_of_a_document_does_not_depend_on_the_others(stories: Path, tmp_path: Path):
    before = decoded(build(stories, out=tmp_path / "1", tokenizer="byte", val_fraction=0.3), "val")
    (stories / "00 before all.txt").write_text(story(100), "utf-8")
    after = decoded(build(stories, out=tmp_path / "2", tokenizer="byte", val_fraction=0.3), "val")
    assert set(after) - {story(100)} == set(before)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_whole_documents_that_leave_far_from_the_fraction_are_each_cut_in_two(
    tmp_path: Path, fraction: float
):
    lengths = [9] * 30 + [9000]  # whichever side the long one goes to
    for i, length in enumerate(lengths):
        (tmp_path / f"{i:02}.txt").write_text(chr(97 + i % 26) * length)
    build(tmp_path, out=tmp_path / ".out", tokenizer="byte", val_fraction=fraction)
    about = json.loads((tmp_path / ".out/meta.json").read_text())["splits"]
    assert about["val"]["documents"] == about["train"]["documents"] == len(lengths)
    assert about["val"]["bytes"] / sum(lengths) == pytest.approx(fraction, rel=0.1)


def write_lines(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{i:0500}"}) + "\n" for i in range(n)))
    return path


def test_many_documents_are_not_cut_for_a_character_of_each(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", 900)  # of which none validates whole
    words = "val_fraction of 0.0001 would be the last characters of each of 900 documents"
    with pytest.raises(ValueError, match=f"{words}: give more text or a larger --val_fraction"):
        build(path, out=tmp_path / "out", tokenizer="byte", val_fraction=0.0001)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("n", "fraction", "n_val", "n_bytes"),
    [
        (900, 0.01, 3, 3 * 500),  # far from the fraction, but better than 5 bytes of each
        (900, 0.05, 39, 39 * 500),
        (900, 0.0399, 29, 29 * 500),
        (20, 0.04, 20, 20 * 20),
        (19, 0.004, 19, 19 * 2),
    ],
)
def test_a_small_fraction_is_whole_documents_or_ends_that_are_long_enough(
    tmp_path: Path, n: int, fraction: float, n_val: int, n_bytes: int
):
    path = write_lines(tmp_path / "a.jsonl", n)
    dataset = build(path, out=tmp_path / "out", tokenizer="byte", val_fraction=fraction)
    val = dataset.meta["splits"]["val"]
    assert (val["documents"], val["bytes"]) == (n_val, n_bytes)


def test_few_documents_are_each_cut_in_two(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(str(i) * 10)
    dataset = build(tmp_path / "0.txt", tmp_path / "1.txt", tmp_path / "2.txt",
                    out=tmp_path / "out", tokenizer="char")  # fmt: skip
    assert decoded(dataset, "train") == ["0" * 9, "1" * 9, "2" * 9]
    assert decoded(dataset, "val") == ["0", "1", "2"]


def test_a_tokenizer_without_end_of_text_is_refused_for_several_documents(
    stories: Path, tmp_path: Path, monkeypatch
):
    tokenizer = CharTokenizer(story(1), with_end_of_text=False)  # as a run on one text has it
    monkeypatch.setattr(Learn, "tokenizer", lambda _: tokenizer)
    with pytest.raises(ValueError, match=r"which this char tokenizer has not: give one document"):
        build(stories, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bpe_vocabulary_counts_end_of_text_as_its_last_id(stories: Path, tmp_path: Path):
    dataset = build(stories, out=tmp_path / "out", vocab_size=290)
    assert (dataset.vocab_size, dataset.tokenizer.end_of_text) == (290, 289)
    assert int(dataset.tokens("train").max()) == 289


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary_and_says_so(tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("abc " * 40)
    dataset = build(tmp_path / "a.txt", out=tmp_path / "out")
    assert dataset.vocab_size < 265
    assert f"{dataset.vocab_size} tokens, not 4,096" in capsys.readouterr().out


def test_bpe_never_sees_the_validation_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("hello " * 90 + "secret" * 9)
    ranks = build(tmp_path / "a.txt", out=tmp_path / "out").tokenizer.state()["ranks"]
    (tmp_path / "a.txt").write_text("hello " * 90 + "public" * 9)
    assert build(tmp_path / "a.txt", out=tmp_path / "2").tokenizer.state()["ranks"] == ranks


def test_jsonl_gzip_and_plain_files_give_their_documents(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": story(i), "id": i}) for i in range(30)]
    (folder / "a.jsonl").write_text("\n".join(lines[:10]) + "\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[10:]).encode()))
    (folder / "c.txt.gz").write_bytes(gzip.compress(story(30).encode()))
    (folder / "d.md").write_bytes(b"# Old Mac\rDos\r\nUnix\n")
    (folder / ".hidden").write_text("hidden")
    (folder / "empty.py").write_text("")
    dataset = build(folder, out=tmp_path / "out", tokenizer="byte", val_fraction=0.5)
    documents = decoded(dataset, "train") + decoded(dataset, "val")
    expected = [*map(story, range(31)), "# Old Mac\rDos\r\nUnix\n"]
    assert sorted(documents) == sorted(expected)


def test_a_special_token_string_in_a_text_is_ordinary_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("<|endoftext|> " * 20)
    dataset = build(tmp_path / "a.txt", out=tmp_path / "out", tokenizer="byte")
    assert int(dataset.tokens("train").max()) < 256


def test_a_file_in_blocks_has_the_pieces_of_the_whole(tmp_path: Path, monkeypatch):
    text = story(1, 5000)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    monkeypatch.setattr("data.documents.BLOCK", 1001)  # cuts characters of two and three bytes
    monkeypatch.setattr("data.documents.cut", lambda text: cut(text, 300))
    pieces = [piece for document in Corpus.find([str(tmp_path)]).documents() for piece in document]
    assert "".join(pieces) == text
    assert len(pieces) > 50
    assert all(piece[0] == " " and piece[1] != " " for piece in pieces[1:])


def read(*sources: Path) -> list[str]:
    corpus = Corpus.find([str(source) for source in sources])
    return ["".join(pieces) for pieces in corpus.documents()]


MARK = codecs.BOM_UTF8
# What is in a file, and the documents that it holds
MARKED = {
    "plain.txt": (MARK + b"hello", ["hello"]),
    "two files, cat.txt": (MARK + b"one\n" + MARK + b"two\n", ["one\ntwo\n"]),
    "an empty file, cat.txt": (MARK + MARK + b"two\n", ["two\n"]),
    "after Windows newlines.txt": (MARK + b"one\r\n" + MARK + b"two", ["one\r\ntwo"]),
    "within a line.txt": (b"a" + MARK + b"b" + MARK + b"\n", ["a\ufeffb\ufeff\n"]),
    "nothing else.txt": (MARK + MARK, []),
    "packed.txt.gz": (gzip.compress(MARK + "é\n".encode() + MARK + b"two"), ["é\ntwo"]),
    "lines.jsonl": (MARK + b'{"text": "one"}\n' + MARK + b'{"text": "two"}\n', ["one", "two"]),
    "blank lines.jsonl": (MARK + b"\n" + MARK + MARK + b'{"text": "two"}\n' + MARK, ["two"]),
    "packed lines.jsonl.gz": (gzip.compress(MARK + b'{"text": "one"}'), ["one"]),
    "texts.jsonl": (
        b'{"text": "\\ufeffone\\n\\ufefftwo"}\n{"text": "a\xef\xbb\xbfb"}\n{"text": "\\ufeff"}',
        ["one\ntwo", "a\ufeffb"],
    ),
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("block", [2**20, 1, 2, 3, 4, 5, 7])
def test_a_byte_order_mark_at_the_start_of_a_line_is_no_text_wherever_blocks_end(
    tmp_path: Path, monkeypatch, name: str, block: int
):
    data, documents = MARKED[name]
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr("data.documents.BLOCK", block)
    assert read(tmp_path / name) == documents


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_dataset_of_marked_files_is_that_of_the_same_files_without_marks(
    tmp_path: Path, fraction: float
):
    """So the scan, the encoding and the bytes counted agree on what is text."""
    for folder in ("plain", "marked"):
        mark = MARK if folder == "marked" else b""
        (tmp_path / folder).mkdir()
        for i in range(3):
            lines = [mark + story(10 * i + j).encode() for j in range(10)]
            (tmp_path / folder / f"{i}.txt").write_bytes(b"".join(lines))
        build(tmp_path / folder, out=tmp_path / f"{folder}.out", val_fraction=fraction)
    plain, marked = contents(tmp_path / "plain.out"), contents(tmp_path / "marked.out")
    for found in (plain, marked):
        text = found["meta.json"].decode().replace("/plain", "/marked")
        found["meta.json"] = re.sub('"sha256": .*', "", text, count=1).encode()  # that of itself
    assert plain == marked


def test_a_vocabulary_of_characters_is_collected_piece_by_piece(tmp_path: Path, monkeypatch):
    """A document may be larger than the memory."""

    def documents(self: Corpus) -> Iterator[Iterator[str]]:
        yield (chr(ord("a") + i) * 100_000 for i in range(26))

    monkeypatch.setattr(Corpus, "documents", documents)
    learn = Learn("char", 0, Corpus(files=()), Scan(val_fraction=0.1))
    tracemalloc.start()
    tokenizer = learn.tokenizer()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokenizer.vocab_size == 26
    assert peak < 500_000


def test_the_standard_library_comes_without_tests_and_in_one_order():
    files = stdlib()
    assert files == sorted(files)
    names = {part for path in files for part in path.parts}
    assert not names & {"test", "tests", "idle_test"}
    assert {"argparse.py", "topics.py"} <= names


def test_a_vocabulary_over_65536_is_stored_in_four_bytes(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x10000, 0x20001))) * 2, "utf-8")
    dataset = build(tmp_path / "a.txt", out=tmp_path / "out", tokenizer="char")
    assert dataset.tokens("val").dtype == np.dtype("<u4")
    assert int(dataset.tokens("val").max()) == 2**16


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_preparing_twice_gives_the_same_bytes(stories: Path, tmp_path: Path, tokenizer):
    build(stories, out=tmp_path / "1", tokenizer=tokenizer)
    build(stories, out=tmp_path / "2", tokenizer=tokenizer)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_another_tokenizer_replaces_the_dataset_and_leaves_no_old_file(
    stories: Path, tmp_path: Path
):
    build(stories, out=tmp_path / "out", tokenizer="bpe")
    (tmp_path / "out" / "val.bin.partial").write_text("left by a killed preparation")
    build(stories, out=tmp_path / "out", tokenizer="byte")
    assert set(contents(tmp_path / "out")) == {"train.bin", "val.bin", "meta.json"}


def test_the_command_ends_with_what_to_type_next(stories: Path, tmp_path: Path):
    done = command(stories, "--tokenizer=byte", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    flags = f"--data.path={tmp_path / 'out'} --out_dir=out/out"
    assert done.stdout.splitlines()[-1].endswith(f"train.py config/quickstart.toml {flags}")
    assert done.stderr == ""


def test_a_folder_to_write_that_is_a_file_is_named(stories: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("kept")
    assert command_here(stories, "--tokenizer=byte", "--out", tmp_path / "file") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"
    assert (tmp_path / "file").read_text() == "kept"


def bad_input(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return arguments that must be refused, and words of the sentence that refuses them."""
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("x")
    (folder / "binary.bin").write_bytes(b"text\n" * 9 + b"\0\1\2")
    (folder / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "cut.txt").write_bytes("ab☃".encode()[:-1])
    (folder / "folder").mkdir()
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "list.jsonl").write_text('{"text": "a"}\n\n["text"]\n')
    (folder / "field.jsonl").write_text('{"txt": "a"}\n')
    (folder / "number.jsonl").write_text('{"text": 1}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "bad.txt.gz").write_text("not gzip")
    (folder / "cut.txt.gz").write_bytes(
        gzip.compress(random.Random(0).randbytes(999).hex().encode())[:-99]
    )
    (folder / "good.txt").write_text(story(1))
    return {
        "missing": (["no.txt"], "no file or folder is named"),
        "empty": (["empty.txt"], "hold no text"),
        "empty folder": (["folder"], "hold no text"),
        "one character": (["one.txt"], "train split must have 2 tokens: got 0"),
        "binary": (["good.txt", "binary.bin"], "binary.bin is not UTF-8 text, as byte 45"),
        "latin-1": (["latin1.txt"], "byte 2 "),
        "cut character": (["cut.txt"], "byte 2 "),
        "broken line": (["bad.jsonl"], "bad.jsonl, line 2: this is not JSON"),
        "line without object": (["list.jsonl"], "line 3: want an object"),
        "line without text": (["field.jsonl"], 'want an object with a string "text"'),
        "line with a number": (["number.jsonl"], 'want an object with a string "text"'),
        "deep line": (["deep.jsonl"], "line 1: this is not JSON"),
        "no gzip": (["bad.txt.gz"], "is not a whole gzip file"),
        "cut gzip": (["cut.txt.gz"], "is not a whole gzip file"),
    }  # fmt: skip


BAD = ["missing", "empty", "empty folder", "one character", "binary", "latin-1", "cut character",
       "broken line", "line without object", "line without text", "line with a number",
       "deep line", "no gzip", "cut gzip",
       ]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(
    case: str, tmp_path: Path, capsys, monkeypatch
):
    (tmp_path / "in").mkdir()
    args, words = bad_input(tmp_path / "in")[case]
    monkeypatch.chdir(tmp_path / "in")
    assert command_here(*args, f"--out={tmp_path / 'new' / 'out'}") == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out=x"], ["name a file, a folder or one of stdlib,"]),
        (["a", "--vocab_siz=300"], ["--vocab_siz=300", "Perhaps you meant", "--vocab_size INT"]),
        (["a", "--vocab_size=256"], ["at least 257", "got vocab_size=256"]),
        (["a", "--tokenizer=byte", "--vocab_size=300"], ["for bpe only", "tokenizer=byte"]),
        (["a", "--val_fraction=1"], ["between 0 and 1: got 1.0"]),
    ],
)
def test_a_command_line_that_says_nothing_useful_is_refused_with_the_rule(
    args: list[str], words: list[str], capsys
):
    assert command_here(*args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [word for word in words if word not in shown.err] == []


def test_binary_files_in_a_folder_are_skipped_and_reported(stories: Path, tmp_path: Path, capsys):
    expected = contents(build(stories, out=tmp_path / "1", tokenizer="byte").path)
    (stories / "picture.png").write_bytes(b"\x89PNG\0")
    dataset = build(stories, out=tmp_path / "2", tokenizer="byte")
    assert "not UTF-8 text, so left out: 1 files, such as picture.png" in capsys.readouterr().out
    assert contents(dataset.path)["train.bin"] == expected["train.bin"]


def test_a_dataset_in_a_folder_is_no_text_of_it_and_no_source(stories: Path, tmp_path: Path):
    expected = contents(build(stories, out=tmp_path / "1", tokenizer="bpe", vocab_size=300).path)
    for _ in range(2):  # the second time the first is there
        build(stories, out=stories / "deeper/dataset", tokenizer="bpe", vocab_size=300)
    found = contents(stories / "deeper/dataset")
    assert found["train.bin"] == expected["train.bin"]
    dataset = stories / "deeper/dataset"
    with pytest.raises(ValueError, match="dataset is a prepared dataset: give the text that it"):
        build(dataset, out=dataset, tokenizer="byte")
    assert contents(dataset) == found
    (stories / "deeper/meta.json").write_text('{"title": "not of a dataset"}')
    assert len(Corpus.find([str(stories)]).files) == 41


def test_capital_letters_in_the_end_of_a_name_change_nothing(tmp_path: Path):
    (tmp_path / "A.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.Txt.GZ").write_bytes(gzip.compress(b"three"))
    texts = ["".join(document) for document in Corpus.find([str(tmp_path)]).documents()]
    assert texts == ["one", "two", "three"]


def test_without_network_shakespeare_says_how_to_pass_a_file(monkeypatch, tmp_path: Path):
    def offline(url: str, **settings: object) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(
        OSError, match=r"cannot download .*get the file another way and put it at data/down"
    ):
        Corpus.find(["shakespeare"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed", [["abc", "d"], ["abc", "defg"], ["abc"], ["abc", "def", "g"]])
def test_a_source_that_changes_between_the_passes_is_refused(tmp_path: Path, changed: list[str]):
    def write(texts: list[str]) -> None:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    file = tmp_path / "a.jsonl"
    write(["abc", "def"])
    corpus = Corpus.find([str(file)])
    scan = Scan.of(corpus, 0.1)
    assert "".join(part.text for part in scan.parts(corpus)) == "abcdef"
    write(changed)
    with pytest.raises(ValueError, match="changed while"):
        list(scan.parts(corpus))


class SlowTokenizer(ByteTokenizer):
    """Records which thread encodes with which tokenizer, and takes uneven time."""

    seen: set[tuple[int, int]]

    def encode_array(self, text: str) -> np.ndarray:
        self.seen.add((threading.get_ident(), id(self)))
        time.sleep(0.002 * (int(text) % 3))
        return super().encode_array(text)

    def __deepcopy__(self, memo: object) -> Tokenizer:
        tokenizer = SlowTokenizer()
        tokenizer.seen = self.seen
        return tokenizer


def test_encoding_keeps_the_order_reads_little_ahead_and_gives_each_thread_a_tokenizer(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("data.encode.BATCH", 1)
    read: list[int] = []
    parts = (read.append(i) or Part("train", str(i), starts_document=True) for i in range(1000))
    tokenizer = SlowTokenizer()
    tokenizer.seen = set()
    encoded = encode_all(parts, tokenizer, separate=False)
    decoded = [tokenizer.decode(next(encoded).tokens_N.tolist()) for _ in range(100)]
    assert decoded == [str(i) for i in range(100)]
    assert len(read) <= 100 + 2 * 3
    assert [len(set(column)) for column in zip(*tokenizer.seen, strict=True)] == [3, 3]
    assert len(tokenizer.seen) == 3


def test_a_sample_for_bpe_is_bounded_and_taken_from_all_of_the_training_text(
    tmp_path: Path, monkeypatch
):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i:03}" * 10}) + "\n" for i in range(1000))
    )
    monkeypatch.setattr("data.learn.BPE_TRAINING_CHARACTERS", 3000)
    corpus = Corpus.find([str(tmp_path)])
    sample = [int(text[:3]) for text in Learn("bpe", 0, corpus, Scan.of(corpus, 0.1)).sample()]
    assert 100 <= len(sample) <= 101
    assert max(np.diff([0, *sample, 1000])) <= 20


@pytest.mark.parametrize("moment", ["write", "sync of the first file", "sync of the last file"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_leaves_what_was_there(
    stories: Path, tmp_path: Path, monkeypatch, moment: str, existed: bool
):
    out = tmp_path / "out"
    if existed:
        build(stories, out=out, vocab_size=300)
    before = contents(out)
    left = {"write": 0, "sync of the first file": 0, "sync of the last file": 3}[moment]

    def full(*args: object) -> None:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1

    owner = data.writer.TokenFile if moment == "write" else os
    monkeypatch.setattr(owner, "write" if moment == "write" else "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        build(stories, out=out, vocab_size=280)
    assert failed.value.filename == str(out)
    assert contents(out) == before
    assert out.exists() == existed


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_cleans_up(tmp_path: Path, signal_: signal.Signals):
    (tmp_path / "a.txt").write_text(story(1, 40_000) * 100)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", str(tmp_path / "a.txt"), "--tokenizer=byte",
         f"--out={out}"],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    begun = out / "train.bin.partial"
    # Python leaves a moment between opening a file and promising to remove it: wait for content
    while not begun.exists() or not begun.stat().st_size:
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.001)
    process.send_signal(signal_)
    assert process.wait(20) == 128 + signal_
    assert not out.exists()


def kill_and_prepare_again(tmp_path: Path, kills: int) -> None:
    """Kill preparations at random moments: old dataset or none; then the same as undisturbed."""
    (tmp_path / "old.txt").write_text(story(1, 3000))
    (tmp_path / "new.txt").write_text(story(2, 50_000))
    started_at = time.perf_counter()
    build(tmp_path / "new.txt", out=tmp_path / "expected", vocab_size=400)
    seconds = time.perf_counter() - started_at
    expected = contents(tmp_path / "expected")
    rng = random.Random(0)
    for n in range(kills):
        out = tmp_path / str(n)
        old = contents(build(tmp_path / "old.txt", out=out, tokenizer="char").path)
        config = PrepareConfig(sources=(str(tmp_path / "new.txt"),), vocab_size=400, out=out)
        child = fork(prepare, config)
        if n % 2:  # anywhere, or from when files are written
            time.sleep(seconds * rng.uniform(0.1, 1.0))
        else:
            while child.is_alive() and not (out / "train.bin.partial").exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.2 * seconds))
        child.kill()
        child.join()
        left = {k: v for k, v in contents(out).items() if not k.endswith(".partial")}
        assert "meta.json" not in left or left in (old, expected)
        prepare(config)
        assert contents(out) == expected


def test_a_preparation_killed_at_8_moments_is_repeated_to_the_same_bytes(tmp_path: Path):
    kill_and_prepare_again(tmp_path, 8)


def die_at(operation: int, config: PrepareConfig) -> None:
    """Prepare, and end without any cleanup just before the n-th change of the folder or sync."""
    left = operation

    def deadly(function):
        def counted(*args, **kwargs):
            nonlocal left
            if not left:
                os._exit(9)
            left -= 1
            return function(*args, **kwargs)

        return counted

    os.fsync = deadly(os.fsync)
    Path.unlink, Path.replace = deadly(Path.unlink), deadly(Path.replace)
    prepare(config)


@pytest.mark.slow
def test_death_before_any_step_of_writing_leaves_the_old_dataset_or_none(
    stories: Path, tmp_path: Path
):
    """A dataset is replaced by one of another size, so that a mixture of both is refused."""
    config = PrepareConfig(sources=(str(stories),), vocab_size=300, out=tmp_path / "out")
    expected = contents(build(stories, out=tmp_path / "new", vocab_size=300).path)
    seen: list[str] = []
    for operation in range(100):
        old = contents(build(stories, out=tmp_path / "out", vocab_size=270).path)
        child = fork(die_at, operation, config)
        child.join()
        found = {k: v for k, v in contents(tmp_path / "out").items() if "partial" not in k}
        seen.append("old" if found == old else "new" if found == expected else "none")
        assert seen[-1] != "none" or "meta.json" not in found
        if child.exitcode == 0:
            break
    assert seen == sorted(seen, key=["old", "none", "new"].index)  # and no way back
    assert min(seen.count("old"), seen.count("none")) > 2


def prepare_with_a_pause(config: PrepareConfig, go_on: Event) -> None:
    def encode(*args, **kwargs):
        go_on.wait()
        return encode_all(*args, **kwargs)

    data.prepare.encode_all = encode
    prepare(config)


@contextlib.contextmanager
def paused(config: PrepareConfig) -> Iterator[tuple[ForkProcess, Event]]:
    """Prepare in another process, which waits when it has begun its files."""
    go_on = FORK.Event()
    child = fork(prepare_with_a_pause, config, go_on)
    try:
        while not (config.folder / "val.bin.partial").exists():
            assert child.is_alive()
            time.sleep(0.001)
        yield child, go_on
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("existed", [True, False])
def test_a_second_preparation_into_a_folder_is_refused_and_the_first_is_undisturbed(
    stories: Path, tmp_path: Path, capsys, existed: bool
):
    out = tmp_path / "new" / "out"
    if existed:
        build(stories, out=out, tokenizer="char")
    expected = contents(build(stories, out=tmp_path / "expected", tokenizer="byte").path)
    first = PrepareConfig(sources=(str(stories),), tokenizer="byte", out=out)
    with paused(first) as (child, go_on):
        before = contents(out)
        capsys.readouterr()
        assert command_here(stories, "--vocab_size=300", "--out", out) == 2
        shown = capsys.readouterr()
        assert contents(out) == before
        go_on.set()
        child.join()
        assert child.exitcode == 0
    assert contents(out) == expected
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"error: another process is writing to {out}: wait until")
    assert "or choose another folder" in shown.err


def test_a_killed_preparation_does_not_keep_others_out_of_its_folder(stories: Path, tmp_path: Path):
    config = PrepareConfig(sources=(str(stories),), tokenizer="byte", out=tmp_path / "out")
    with paused(config) as (child, _):
        child.kill()
        child.join()
        prepare(config)
    assert set(contents(tmp_path / "out")) == {"train.bin", "val.bin", "meta.json"}


def test_only_folders_that_were_made_and_stay_empty_are_removed(tmp_path: Path):
    with reserved(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with reserved(tmp_path / "empty"):
        pass
    with reserved(tmp_path / "full" / "b"):
        (tmp_path / "full" / "b" / "file").write_text("x")
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "full", "b", "file"}


@pytest.mark.slow
def test_a_preparation_killed_at_20_moments_is_repeated_to_the_same_bytes(tmp_path: Path):
    kill_and_prepare_again(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["latin", "chinese"])
def test_memory_stays_bounded_on_200_megabytes(tmp_path: Path, script: str):
    rng = np.random.default_rng(0)
    low, high, width = (97, 123, 1) if script == "latin" else (0x4E00, 0x5E00, 3)
    with open(tmp_path / "large.txt", "w", encoding="utf-8") as file:
        for _ in range(200 // width):
            code_points = rng.integers(low, high, 10**6)
            code_points[rng.random(10**6) < 0.15] = ord(" ")
            file.write(code_points.astype("<u4").tobytes().decode("utf-32-le"))
    prepare_it = ("-m", "data.prepare", tmp_path / "large.txt", "--out", tmp_path / "out")
    # by a small process: on Linux a child's peak starts from its parent's, here that of all tests
    done = subprocess.run(
        [sys.executable, "-c", PEAK, sys.executable, *map(str, prepare_it)],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])  # in KiB; bytes on macOS
    assert 10e6 < peak * (1 if sys.platform == "darwin" else 1024) < 500e6
