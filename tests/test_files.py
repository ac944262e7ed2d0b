"""A file is whole or not there at all, whatever happens while it is written."""

import contextlib
import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import files

OPERATIONS = [(os, "fsync"), (Path, "replace"), (Path, "unlink")]
old_or_none = pytest.mark.parametrize("old", [b"old", None])


class Killed(BaseException):
    """Ends the writing between two operations."""


def put(path: Path, old: bytes | None) -> None:
    if old is not None:
        path.write_bytes(old)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def write_half(path: Path, error: BaseException) -> None:
    with files.whole(path) as file:
        file.write("half")
        raise error


def n_open() -> int:
    """The number of open files."""
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Raise Killed in place of the n-th operation on the disk."""
    calls = iter(range(1, 100))

    def operation(real: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for where, name in OPERATIONS:
            real = getattr(where, name)
            patch.setattr(where, name, lambda *a, real=real, **k: operation(real, *a, **k))
        yield


# --- Writing --------------------------------------------------------------------------------------


def test_a_folder_is_written_to_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with files.reserved(tmp_path / "out"):
        assert (tmp_path / "out").exists()


@old_or_none
def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path: Path, old: bytes | None):
    path = tmp_path / "a.txt"
    put(path, old)
    with files.whole(path) as file:
        file.write("new")
        file.flush()
        assert content(path) == old
        assert content(files.partial(path)) == b"new"
    assert content(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_the_line_ends_that_it_has(tmp_path: Path):
    text = "a\r\né\n日本\r"
    files.write_text(tmp_path / "a.txt", text)
    assert content(tmp_path / "a.txt") == text.encode()
    with files.whole(tmp_path / "b", "wb") as file:
        file.write(b"\r\n\xff")
    assert content(tmp_path / "b") == b"\r\n\xff"


def test_a_text_makes_its_folder_and_takes_the_place_of_an_older_one(tmp_path: Path):
    path = tmp_path / "a/b/c.txt"
    files.write_text(path, "long text")
    files.write_text(path, "short")
    assert path.read_text() == "short"


def test_what_a_killed_process_left_is_written_over(tmp_path: Path):
    files.partial(tmp_path / "a.txt").write_text("half of a long file")
    files.write_text(tmp_path / "a.txt", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@old_or_none
@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt(), SystemExit(1)])
def test_after_an_error_or_ctrl_c_nothing_has_changed(
    tmp_path: Path, error: BaseException, old: bytes | None
):
    path = tmp_path / "a.txt"
    put(path, old)
    before = set(tmp_path.iterdir())
    with pytest.raises(type(error)) as caught:
        write_half(path, error)
    assert caught.value is error
    assert content(path) == old
    assert set(tmp_path.iterdir()) == before


@old_or_none
def test_a_kill_at_any_operation_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, old: bytes | None
):
    path, kills = tmp_path / "a.txt", 0
    for call in range(1, 10):
        put(path, old)
        with killed_at(call):
            try:
                files.write_text(path, "new")
                break
            except Killed:
                assert content(path) == old
        assert not files.partial(path).exists()
        kills += 1
    assert kills == 2  # before the sync, and before the rename
    assert content(path) == b"new"


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        seen.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    files.write_text(tmp_path / "a.txt", "12345")
    assert seen == [5, "a.txt"]


def test_a_disk_that_is_really_full_leaves_the_old_file(tmp_path: Path):
    path, limits = tmp_path / "a.txt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_text(path, "x" * 30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_folder_is_closed_after_a_sync_that_failed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = n_open()
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)
    assert n_open() == before


# --- Before writing -------------------------------------------------------------------------------


def test_a_hash_is_that_of_hashlib(tmp_path: Path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_check_makes_the_folder_and_leaves_no_file(tmp_path: Path):
    files.check_writable(tmp_path / "a/b/c.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    (tmp_path / "old.txt").write_text("old")
    files.check_writable(tmp_path / "old.txt")
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_file_in_a_file_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match=r"a/b\.txt cannot be written \(.*\): pass a file in a fol"):
        files.check_writable(tmp_path / "a/b.txt")


def test_a_folder_and_a_pipe_are_no_files_to_write(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="cannot be written, because it is not a file"):
            files.check_writable(path)
