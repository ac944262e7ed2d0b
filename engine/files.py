"""Files that a user asks for: refused before the work if they cannot be, and written whole."""

import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written; raise OSError if it can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        way_out = "pass a file in a folder that can be written to"
        raise OSError(f"{path} cannot be written ({error.strerror}): {way_out}") from error
    if path.exists() and not path.is_file():  # a folder, a pipe, a device
        raise OSError(f"{path} cannot be written: it is there, and is not a file; pass another")


def partial(path: Path) -> Path:
    """Where to write what shall be at `path` when it is whole."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Put a text in place of what a file holds, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial(path).write_text(text, encoding="utf-8")
    partial(path).replace(path)
