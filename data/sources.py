"""Sources of text: named corpora, files and folders, as a stream of documents.

A text file is one document; a .jsonl file has one per line, in its field "text". Either may be
gzipped (.gz). A document comes in pieces, since it may be larger than memory.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
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
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it; elsewhere it is a character


class NotTextError(ValueError):
    """A file is not UTF-8 text."""

    def __init__(self, path: Path, offset: int):
        super().__init__(
            f"{path} is not UTF-8 text, as byte {offset} shows: convert it or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files that the sources stand for, in order."""

    files: tuple[Path, ...]
    """Files to read. Those that were found in a folder are known to be UTF-8 text."""

    skipped: tuple[Path, ...]
    """Files in folders that are not UTF-8 text."""

    @classmethod
    def find(cls, sources: Iterable[str]) -> "Corpus":
        """Find the files of `sources`. Raises ValueError or OSError for one that cannot be read."""
        files: list[Path] = []
        skipped: list[Path] = []
        for source in sources:
            if source not in NAMED and Path(source).is_file():
                files.append(Path(source))
                continue
            for path in NAMED[source]() if source in NAMED else walk(Path(source)):
                (files if is_text(path) else skipped).append(path)
        return cls(files=tuple(files), skipped=tuple(skipped))

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield each document that is not empty as its pieces; use them up before the next."""
        for path in self.files:
            lines = path.name.removesuffix(".gz").endswith(".jsonl")
            for pieces in read_jsonl(path) if lines else [read_text(path)]:
                for first in pieces:  # at most once: the reader of the chain uses up the rest
                    yield itertools.chain([first], pieces)


def stdlib() -> list[Path]:
    """Return the running Python's own library, without its tests: real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(p for p in paths if NOT_STDLIB.isdisjoint(p.relative_to(root).parts))


def shakespeare() -> list[Path]:
    """Return tiny Shakespeare (1.1 MB), downloaded once."""
    path = DOWNLOADS / "shakespeare.txt"
    try:
        fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, path)
    except OSError as error:
        raise OSError(f"{error}: get the file another way and give its path as SOURCE") from error
    return [path]


# A larger corpus is added here: its name, and what returns its files.
NAMED: dict[str, Callable[[], list[Path]]] = {
    "stdlib": stdlib,
    "shakespeare": shakespeare,
    "stories": lambda: [write_stories()],
}


def walk(folder: Path) -> list[Path]:
    """Return the files under `folder`, sorted by path. Hidden ones and linked folders are left out.

    Raises FileNotFoundError if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no file or folder is named {folder}: give a path or one of {', '.join(NAMED)}"
        )

    def refuse(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
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
    """Yield a text file in pieces that have, one after another, the tokens of the whole."""
    rest = ""
    for block in read_blocks(path):
        *pieces, rest = cut(rest + block) or [""]
        yield from pieces
    if rest:
        yield rest


def read_blocks(path: Path) -> Iterator[str]:
    """Yield a text file in blocks, newlines as they are. Raises NotTextError with an offset."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, block = 0, b"-"
    with open_bytes(path) as file:
        while block:
            undecoded = len(decoder.getstate()[0])  # the start of a character cut by the block
            block = file.read(BLOCK)
            if 0 in block:
                raise NotTextError(path, offset + block.index(0))
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise NotTextError(path, offset - undecoded + error.start) from None
            yield text if offset else text.removeprefix(BYTE_ORDER_MARK)
            offset += len(block)


def read_jsonl(path: Path) -> Iterator[Iterator[str]]:
    """Yield the text of each line in pieces. Raises ValueError that names the line."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield iter(cut(text_field(line, f"{path}, line {number}")))


def text_field(line: bytes, place: str) -> str:
    """Return the field "text" of a line of JSON: {"text": "Once"} -> Once."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: this is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise ValueError(f'{place}: want an object with a string "text": got {line[:60]!r}')
    return well_formed(fields["text"])


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be read, through gzip if it is named so."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
