"""A disk that fails, a process that dies, or power that goes, at the n-th call that touches files.

What a power cut may leave follows Pillai et al., "All File Systems Are Not Created Equal" (OSDI
2014): a name is safe once its folder is synced, a content once its file is; of what is not, any
part may be there.
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import files

CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """Ends a writing as a kill does: from then on no call has an effect, in no handler either."""


FAULTS = {  # an error number, or None for a kill
    "KILL": None,
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "EROFS": errno.EROFS,
    "EDQUOT": errno.EDQUOT,
}


class Disk:
    """Counts the calls, and lets one of them fail."""

    def __init__(self, failing: int, fault: str) -> None:
        self.failing = failing
        self.number = FAULTS[fault]
        self.calls: list[str] = []

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            return real(*args, **kwargs)

        return call

    def count(self, name: str) -> None:
        """Raise the fault if this is the call that fails; after a kill, at every later one too."""
        self.calls.append(name)
        if self.number is None and self.is_hit:
            raise Killed
        if self.number is not None and len(self.calls) == self.failing:
            raise OSError(self.number, os.strerror(self.number))

    @property
    def is_hit(self) -> bool:
        return len(self.calls) >= self.failing

    @property
    def failed(self) -> str:
        """The name of the call that failed."""
        return self.calls[self.failing - 1]


class File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file = file
        self.write = disk.wrap("write", file.write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.file)


@contextlib.contextmanager
def broken_disk(failing: int, fault: str) -> Iterator[Disk]:
    """Let the n-th open for writing, write, fsync, rename, removal or mkdir fail."""
    disk = Disk(failing, fault)
    real_open = builtins.open

    def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        disk.count("open")
        return File(real_open(file, mode, *args, **kwargs), disk)

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, disk.wrap(name, getattr(os, name)))
        patch.setattr(builtins, "open", counted_open)
        patch.setattr(io, "open", counted_open)
        yield disk


Contents = dict[str, bytes]  # by the path in a folder


def put(folder: Path, wanted: Contents) -> None:
    """Let a folder hold these files and no others."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        files.remove(path)
    for name, data in wanted.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@dataclass(frozen=True)
class Call:
    """What was done to names in a folder, or to the content of a file (a number)."""

    kind: str  # "create", "rename", "unlink", "sync folder", "sync file"
    folder: str = ""
    name: str = ""
    target: str = ""
    file: int = 0


class Journal:
    """The calls of a writing, and what each file held when it was synced and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[Call] = []
        self.number_of: dict[int, int] = {}  # inode -> number; an inode is used again
        self.data: dict[int, bytes] = {}

    def note(self, kind: str, path: Any, target: Any = "", file: int = 0) -> None:
        name = os.path.relpath(path, self.folder)
        target = target and os.path.relpath(target, self.folder)
        if not name.startswith(".."):
            folder = name if kind == "sync folder" else str(Path(name).parent)
            self.calls.append(Call(kind, folder, name, target, file))

    def created(self, file: Any, path: Any) -> None:
        number = self.number_of[os.fstat(file.fileno()).st_ino] = 1 + len(self.data)
        self.data[number] = b""
        self.note("create", path, file=number)

    def synced(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_dir():
            self.note("sync folder", path)
        elif os.fstat(descriptor).st_ino in self.number_of:
            number = self.number_of[os.fstat(descriptor).st_ino]
            self.data[number] = path.read_bytes()
            self.note("sync file", path, file=number)

    def states_after(self, n_calls: int, before: Contents) -> Iterator[Contents]:
        """Every state of the folder that a power cut after `n_calls` calls may leave."""
        done = self.calls[:n_calls]
        synced = {call.file for call in done if call.kind == "sync file"}
        changes = [(i, call) for i, call in enumerate(done) if not call.kind.startswith("sync")]
        syncs = [(i, call.folder) for i, call in enumerate(done) if call.kind == "sync folder"]
        unsafe = [i for i, c in changes if not any(j > i and c.folder == f for j, f in syncs)]
        for lost in itertools.chain.from_iterable(
            itertools.combinations(unsafe, n) for n in range(len(unsafe) + 1)
        ):
            names: dict[str, bytes | int] = dict(before)
            for i, call in changes:
                if i not in lost:
                    apply(call, names)
            open_ = {file for file in names.values() if isinstance(file, int)} - synced
            for parts in itertools.product((0, 0.5, 1), repeat=len(open_)):
                held = {
                    file: self.data[file][: int(part * len(self.data[file]))]
                    for file, part in zip(sorted(open_), parts, strict=True)
                }
                yield {
                    name: held.get(file, self.data[file]) if isinstance(file, int) else file
                    for name, file in names.items()
                }


def apply(call: Call, names: dict[str, bytes | int]) -> None:
    if call.kind == "create":
        names[call.name] = call.file
    elif call.name in names:
        moved = names.pop(call.name)
        if call.kind == "rename":
            names[call.target] = moved


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[Journal]:
    """Note the calls that a writing makes in a folder."""
    journal = Journal(folder)
    real_open, fsync, replace, unlink = builtins.open, os.fsync, os.replace, os.unlink

    def noted_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        if set(mode) & set("wx"):
            journal.created(file, path)
        return file

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        journal.synced(descriptor)

    def noted_replace(path: Any, target: Any) -> None:
        replace(path, target)
        journal.note("rename", path, target)

    def noted_unlink(path: Any, *args: Any, **kwargs: Any) -> None:
        unlink(path, *args, **kwargs)
        journal.note("unlink", path)

    with pytest.MonkeyPatch.context() as patch:
        for where, name, noted in (
            (builtins, "open", noted_open),
            (io, "open", noted_open),
            (os, "fsync", noted_fsync),
            (os, "replace", noted_replace),
            (os, "unlink", noted_unlink),
        ):
            patch.setattr(where, name, noted)
        yield journal
