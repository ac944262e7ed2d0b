"""Sources of text (named corpora, files and folders) as a stream of documents.

A text file is one document; a .jsonl file has one per line, in its field "text". Either may be
compressed (.gz). A document is read in pieces, because it may be larger than the memory.

A U+FEFF at the start of a line is not text but a byte order mark: some editors begin a file with
one, and `cat a b` puts that of b on a later line. Elsewhere U+FEFF is a character like any other.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from data.download import fetch
from data.stories import write_stories
from data.tokenizer import cut, well_formed

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOADS = Path("data/downloads")
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BLOCK = 2**20  # bytes read at a time
MARK = "\ufeff"  # the byte order mark


class NotTextError(ValueError):
    """A file is not UTF-8 text."""

    def __init__(self, path: Path, offset: int):
        super().__init__(
            f"{path} is not UTF-8 text, as byte {offset} shows: convert it or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files that the sources stand for, in order."""

    files: tuple[Path, ...]  # to read; those that were found in folders are known to be text
    skipped: tuple[Path, ...]  # found in folders, but not UTF-8 text

    @classmethod
    def find(cls, sources: Iterable[str]) -> "Corpus":
        """Find the files of `sources`. Raises ValueError or OSError if one cannot be read."""
        files: list[Path] = []
        skipped: list[Path] = []
        for source in sources:
            if source not in NAMED and Path(source).is_file():
                files.append(Path(source))
                continue
            paths = NAMED[source]() if source in NAMED else walk(Path(source))
            for path in paths:
                group = files if is_text(path) else skipped
                group.append(path)
        return cls(files=tuple(files), skipped=tuple(skipped))

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield the pieces of each document that is not empty: use them up before the next one."""
        for path in self.files:
            has_lines = path.name.removesuffix(".gz").endswith(".jsonl")
            for pieces in read_jsonl(path) if has_lines else [read_text(path)]:
                for first in pieces:  # at most once, because whoever reads the chain uses up pieces
                    yield itertools.chain([first], pieces)


def stdlib() -> list[Path]:
    """Return the running Python's standard library without its tests: text on every machine."""
    paths = walk(Path(sysconfig.get_path("stdlib")), left_out=NOT_STDLIB)
    return [path for path in paths if path.suffix == ".py"]


def shakespeare() -> list[Path]:
    """Return tiny Shakespeare (1.1 MB), which is downloaded once."""
    path = DOWNLOADS / "shakespeare.txt"
    fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    return [path]


# To add a corpus, give its name here and a function that returns its files
NAMED: dict[str, Callable[[], list[Path]]] = {
    "stdlib": stdlib,
    "shakespeare": shakespeare,
    "stories": lambda: [write_stories()],
}


def walk(folder: Path, left_out: Collection[str] = ()) -> list[Path]:
    """Return the files under a folder, sorted, but no hidden ones. Raises OSError if unreadable."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no file or folder is named {folder}: give a path or one of {', '.join(NAMED)}"
        )

    def refuse(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):  # follows no links to folders
        folders[:] = [name for name in folders if name[0] != "." and name not in left_out]
        paths += [Path(root, name) for name in names if name[0] != "."]
    return sorted(path for path in paths if path.is_file())


def is_text(path: Path) -> bool:
    """Say whether the whole of a file is UTF-8 text."""
    try:
        for _ in read_blocks(path):
            pass
    except NotTextError:
        return False
    return True


def read_text(path: Path) -> Iterator[str]:
    """Yield a text file in pieces, which together have the same tokens as the whole text."""
    rest = ""
    for block in read_blocks(path):
        rest += without_marks(block, before=rest[-1:] or "\n")
        *pieces, rest = cut(rest) or [""]
        yield from pieces
    if rest:
        yield rest


def read_blocks(path: Path) -> Iterator[str]:
    """Yield a text file in blocks, newlines as they are. Raises NotTextError with an offset."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_bytes(path) as file:
        while True:
            undecoded = len(decoder.getstate()[0])  # the start of a character cut by the block
            block = file.read(BLOCK)
            if 0 in block:
                raise NotTextError(path, offset + block.index(0))
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise NotTextError(path, offset - undecoded + error.start) from None
            if not block:
                return
            yield text
            offset += len(block)


def without_marks(text: str, before: str = "\n") -> str:
    """Return `text`, which follows the character `before`, without its byte order marks."""
    if MARK not in text:
        return text
    return re.sub(f"\n{MARK}+", "\n", before + text)[1:]


def read_jsonl(path: Path) -> Iterator[Iterator[str]]:
    """Yield the text of each line in pieces. Raises ValueError that names the line."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            yield iter(cut(text_field(line, f"{path}, line {number}", "text")))


def text_field(line: bytes, place: str, *names: str) -> str:
    """Return the text in a line of JSON: {"text": "Once"} -> Once. A blank line has none."""
    try:
        spelled = without_marks(line.decode(errors="surrogatepass"))
        if not spelled.strip():
            return ""
        fields = json.loads(spelled)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: this is not JSON: {error}") from error
    found = fields if isinstance(fields, dict) else {}
    texts = [found[name] for name in names if isinstance(found.get(name), str)]
    if texts:
        return without_marks(well_formed(texts[0]))
    want = " or ".join(f'"{name}"' for name in names)
    raise ValueError(f"{place}: want an object with a string {want}: got {line[:60]!r}")


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
