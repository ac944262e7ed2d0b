"""Sources of text (named corpora, files and folders) as a stream of documents."""

import os
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.corpora import DOWNLOADS, HUB
from data.documents import Document, NotTextError, Reader, read_blocks, read_documents
from data.download import fetch
from data.format import is_dataset
from data.parquet import COLUMN
from data.plays import find_plays
from data.stories import write_stories

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VAL_FRACTION = 0.1  # of what is small; known corpora have their own


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files that the sources stand for, in order."""

    files: tuple[tuple[Path, Reader], ...]  # those found in folders are known to be text
    skipped: tuple[Path, ...] = ()  # found in folders, but not UTF-8 text
    val_fraction: float = VAL_FRACTION  # that suits the sources
    column: str = COLUMN  # of .parquet and .jsonl

    @classmethod
    def find(cls, sources: Iterable[str], column: str = COLUMN) -> "Corpus":
        """Find the files of `sources`. Raises ValueError or OSError if one cannot be read."""
        files: list[tuple[Path, Reader]] = []
        skipped: list[Path] = []
        fraction = VAL_FRACTION
        for source in sources:
            name, _, part = source.partition(":")
            if name in HUB:
                files += [(path, HUB[name].read) for path in HUB[name].find(name, part)]
                fraction = min(fraction, HUB[name].val_fraction)
            elif source not in LOCAL and Path(source).is_file():
                files.append((Path(source), read_documents))
            else:
                paths = LOCAL[source]() if source in LOCAL else walk(Path(source))
                readable = {path: is_readable(path) for path in paths}
                files += [(path, read_documents) for path in paths if readable[path]]
                skipped += [path for path in paths if not readable[path]]
        return cls(files=tuple(files), skipped=tuple(skipped), val_fraction=fraction, column=column)

    def documents(self) -> Iterator[Document]:
        """Yield each document that is not empty."""
        for path, read in self.files:
            yield from filter(any, read(path, self.column))

    @property
    def bytes(self) -> int | None:
        """Return the size of the text, as far as that of the files tells it."""
        paths = [path for path, _ in self.files]
        is_packed = any(path.suffix.lower() in (".gz", ".parquet") for path in paths)
        return None if is_packed else sum(path.stat().st_size for path in paths)


def stdlib() -> list[Path]:
    """Return the running Python's standard library without its tests: text on every machine."""
    paths = walk(Path(sysconfig.get_path("stdlib")), left_out=NOT_STDLIB)
    return [path for path in paths if path.suffix == ".py"]


def shakespeare() -> list[Path]:
    """Return tiny Shakespeare (1.1 MB), which is downloaded once."""
    path = DOWNLOADS / "shakespeare.txt"
    fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    return [path]


# Corpora with a name and a function that returns their files; data/corpora.py has those of the hub
LOCAL: dict[str, Callable[[], list[Path]]] = {
    "stdlib": stdlib,
    "shakespeare": shakespeare,
    "plays": find_plays,
    "stories": lambda: [write_stories()],
}
NAMED = ", ".join([*LOCAL, *HUB])


def walk(folder: Path, left_out: Collection[str] = ()) -> list[Path]:
    """Return the files under a folder, sorted: none hidden or of a dataset. Raises OSError."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no file or folder is named {folder}: give a path or one of {NAMED}"
        )
    if is_dataset(folder):
        raise ValueError(f"{folder} is a prepared dataset: give the text that it was made from")

    def refuse(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):  # follows no links to folders
        seen = (name for name in folders if name[0] != "." and name not in left_out)
        folders[:] = [name for name in seen if not is_dataset(Path(root, name))]
        paths += [Path(root, name) for name in names if name[0] != "."]
    return sorted(path for path in paths if path.is_file())


def is_readable(path: Path) -> bool:
    """Say whether a file is a Parquet file by its name, or the whole of it is UTF-8 text."""
    if path.suffix.lower() == ".parquet":
        return True
    try:
        for _ in read_blocks(path):
            pass
    except NotTextError:
        return False
    return True
