"""Documents in files: a text is one, a line of .jsonl is one, a row of .parquet is one.

A document is an iterable of pieces, which can be gone through again. A text file is read in pieces
each time, because it may be larger than the memory.

A U+FEFF at the start of a line is not text but a byte order mark: some editors begin a file with
one, and `cat a b` puts that of b on a later line. Elsewhere U+FEFF is a character like any other.
"""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from data.parquet import read_rows
from data.tokenizer import END_OF_TEXT, cut, well_formed

BLOCK = 2**20  # bytes read at a time
LONGEST_LINE = 2**28  # bytes of a .jsonl: a small .gz may hold a line without end
MARK = "\ufeff"  # the byte order mark
TITLE = re.compile(r" = (?!= ).*(?<! =) = \n")  # of an article, but not of a section: " = = A = = "

Document = Iterable[str]
Reader = Callable[[Path, str], Iterator[Document]]  # of a file and the column that holds the text


class NotTextError(ValueError):
    """A file is not UTF-8 text."""

    def __init__(self, path: Path, offset: int):
        super().__init__(
            f"{path} is not UTF-8 text, as byte {offset} shows: convert it or leave it out"
        )


class TextFile:
    """A text file as a document: each time it is gone through, it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return read_text(self.path)


def read_documents(path: Path, column: str) -> Iterator[Document]:
    """Yield the documents of a file, whose name says of which kind it is."""
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "jsonl":
            return read_jsonl(path, column)
        case "parquet":
            return map(pieces_of, read_rows(path, column))
    return iter([TextFile(path)])


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


def read_separated(path: Path, _: str) -> Iterator[Document]:
    """Yield the texts of a file that are separated by end-of-text, as TinyStories are."""
    rest = ""
    for block in read_blocks(path):
        *texts, rest = (rest + block).split(END_OF_TEXT)
        for text in texts:
            yield pieces_of(text.strip("\n"))
    yield pieces_of(rest.strip("\n"))


def read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """Yield the text of each line. Raises ValueError that names the line."""
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"{path}, line {number} is too long: it has {len(line):,} bytes")
            yield cut(text_field(line, f"{path}, line {number}", column))


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
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def read_articles(path: Path, column: str) -> Iterator[Document]:
    """Yield the articles of a Parquet file of WikiText, each row of which is a line."""
    lines: list[str] = []
    for row in read_rows(path, column):
        if TITLE.fullmatch(row) and any(map(str.strip, lines)):
            yield pieces_of("".join(lines))
            lines = []
        lines.append(row or " \n")  # as the line was, before it was put into a row
    yield pieces_of("".join(lines))


def pieces_of(text: str) -> Document:
    """Return a document of a text in memory."""
    return cut(without_marks(well_formed(text)))
