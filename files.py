"""Write files completely or not at all. Any module may import this.

A file is written beside its place, as NAME.partial, synced to the disk, and renamed. A process that
is killed at any moment leaves the old file or the new one, never a part of either.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

if os.name == "posix":
    import fcntl

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that do not say on which disk


def partial(path: Path) -> Path:
    """Return where to write a file until it is whole."""
    return path.with_name(f"{path.name}.partial")


@contextlib.contextmanager
def whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears at `path` when the block ends; after an error nothing has changed.

    Text is UTF-8, and its line ends are written as they are.
    """
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"
    try:
        with open(partial(path), mode, encoding=encoding, newline=newline) as file:
            yield file
            sync(file)
        partial(path).replace(path)
    except BaseException as error:  # Ctrl-C as well
        partial(path).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            error.filename, error.strerror = str(path.parent), error.strerror or str(error)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears when the block ends; after an error there is none.

    Raises FileExistsError if there is one already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or pass another")
    unfinished = partial(folder)
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(folder)
    except BaseException:  # Ctrl-C as well
        shutil.rmtree(unfinished)
        raise


def write_text(path: Path, text: str) -> None:
    """Put a text in place of what a file holds; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def readable(what: object) -> Iterator[None]:
    """Raise ValueError, or OSError, if the block can make no sense of what it reads."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a made-up file can fail in any way
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{what} is damaged or of another kind: {reason}") from error


def plain_name(name: str) -> str:
    """Return a name that was read from a file. Raises ValueError if it leads to another folder."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} must be a plain file name, without a folder")
    return name


def check_zip(path: Path) -> None:
    """Raise an error if a file is no zip archive, or if its content is larger than the file."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError(f"{path} is packed: its content is larger than the file")


def sync(file: IO[Any]) -> None:
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder, so also its renames, are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs; make it if needed, and remove it if it stays empty.

    Raises OSError if another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(Lock(folder)))
        stack.callback(remove_empty, made)
        yield


class Lock:
    """Keeps other processes from a folder until it is closed.

    The lock is on the folder itself: it leaves no file behind, goes with the folder if that is
    renamed, and the system releases it when the process ends, even if it is killed. On a network
    file system it may keep out only processes of the same machine.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError if another process has locked the folder."""
        self.descriptor: int | None = None
        if os.name != "posix":  # on Windows the files that another has open cannot be written
            return
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            way_out = "wait until it has ended, or choose another folder"
            raise OSError(f"another process is writing to {folder}: {way_out}") from None
        except OSError:  # this file system has no locks
            self.close()

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one is not empty
        for folder in folders:
            folder.rmdir()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises OSError if the file cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        way_out = "pass a file in a folder that can be written to"
        raise OSError(f"{path} cannot be written ({error.strerror}): {way_out}") from error
    if path.exists() and not path.is_file():  # a folder, a pipe, a device
        raise OSError(f"{path} cannot be written, because it is not a file: pass another")
