"""Run a command as a child process: how long it takes, how much memory, and what it says."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[1]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that ru_maxrss counts in


class Finished(NamedTuple):
    """A child process that has done its work."""

    seconds: float  # of the whole process
    peak_bytes: int  # largest resident set; on Linux at least that of the parent at the start
    text: str  # its standard output


def python(*arguments: object) -> list[str]:
    """Return a command line for this same interpreter."""
    return [sys.executable, *map(str, arguments)]


def run(
    command: list[str], cwd: Path = ROOT, limit_seconds: float = threading.TIMEOUT_MAX
) -> Finished:
    """Run `command` to its end, or terminate it.

    Raises TimeoutError if it takes too long, and ValueError that says why if it fails.
    """
    name = next(word for word in command[1:] if not word.startswith("-"))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=errors)
        timer = threading.Timer(limit_seconds, process.terminate)  # it ends its own children, too
        timer.daemon = True
        try:
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            if process.returncode is None:  # Ctrl-C
                process.terminate()
                process.wait()
        seconds = time.perf_counter() - started_at
        if seconds >= limit_seconds:
            raise TimeoutError(f"{name} was stopped after {limit_seconds:.0f} seconds")
        if process.returncode:
            last = text_of(errors).strip().rpartition("\n")[2]
            why = last.removeprefix("error: ") if last.startswith("error: ") else text_of(errors)
            raise ValueError(f"{name} failed: {why or process.returncode}")
        return Finished(seconds, usage.ru_maxrss * RSS_UNIT, text_of(output))


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def seconds_of(function: Callable[[], object]) -> float:
    """Return the wall time of a call, which must not leave work to a GPU."""
    started_at = time.perf_counter()
    function()
    return time.perf_counter() - started_at


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, after Ctrl-C too."""
    with tempfile.TemporaryDirectory(prefix="bench_", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()
