"""Run a command as a child process: how long it took, how much memory, what it said and when.

Everything is measured from outside, so that start-up and shut-down count. The measuring process
itself imports no torch: on Linux a child's peak memory starts from its parent's.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}  # lines when they are printed; UTF-8
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that ru_maxrss counts in


@dataclass(frozen=True)
class Line:
    """A line of standard output, and when it came."""

    seconds: float
    text: str


@dataclass(frozen=True)
class Finished:
    """A child process that has done its work."""

    seconds: float
    """Wall time of the whole process."""
    peak_bytes: int
    """Largest resident set."""
    lines: list[Line]

    def seconds_to(self, pattern: re.Pattern[str], most: float) -> float | None:
        """Return when the first number that `pattern` captures was at most `most`, if ever."""
        return next((line.seconds for line in self.lines if is_reached(line, pattern, most)), None)


def is_reached(line: Line, pattern: re.Pattern[str], most: float) -> bool:
    """`step 250: val loss 1.46`, read by a pattern, is at most 1.4697: True."""
    found = pattern.search(line.text)
    return found is not None and float(found[1]) <= most


def python(*arguments: object) -> list[str]:
    """A command line for this same interpreter."""
    return [sys.executable, *map(str, arguments)]


def run(
    command: list[str],
    *,
    cwd: Path = ROOT,
    limit_seconds: float | None = None,
    until: Callable[[Line], bool] = lambda line: False,
) -> Finished:
    """Run `command` to its end, or until a line that it prints is all that was wanted.

    Raises TimeoutError if it takes too long, and ValueError with the last line of its standard
    error if it fails. No process of it is left behind, whatever happens.
    """
    with tempfile.TemporaryFile() as errors:
        started_at = time.perf_counter()
        process = _start(command, cwd, errors)
        watch = _Watch(process, started_at, until)
        timer = threading.Timer(limit_seconds or threading.TIMEOUT_MAX, _kill, [process])
        timer.daemon = True
        try:
            watch.start()
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started_at
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            _kill(process)
            process.wait()  # of a process that has ended, nothing
        watch.join()
        if limit_seconds and seconds >= limit_seconds and process.returncode == -signal.SIGKILL:
            raise TimeoutError(f"{_name(command)} was stopped after {limit_seconds:.0f} seconds")
        if process.returncode and not watch.is_satisfied:
            raise ValueError(f"{_name(command)} failed: {_last_line(errors, process.returncode)}")
    return Finished(seconds, usage.ru_maxrss * RSS_UNIT, watch.lines)


class _Watch(threading.Thread):
    """Reads what a process prints, and ends the process at the line that was waited for."""

    def __init__(
        self, process: subprocess.Popen, started_at: float, until: Callable[[Line], bool]
    ) -> None:
        super().__init__(daemon=True)
        self.process, self.started_at, self.until = process, started_at, until
        self.lines: list[Line] = []
        self.is_satisfied = False

    def run(self) -> None:
        for text in cast(IO[str], self.process.stdout):
            line = Line(time.perf_counter() - self.started_at, text.rstrip("\n"))
            self.lines.append(line)
            if not self.is_satisfied and self.until(line):
                self.is_satisfied = True
                _kill(self.process)


def _start(command: list[str], cwd: Path, errors: IO[bytes]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a group of its own, so that its own children end with it
    )


def _kill(process: subprocess.Popen) -> None:
    """End a process and all that it has started; those that have ended already are no error."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _name(command: list[str]) -> str:
    """`/usr/bin/python train.py config/a.toml --x=1` -> `train.py`; of -m, the module."""
    return next(word for word in command[1:] if not word.startswith("-"))


def _last_line(errors: IO[bytes], code: int) -> str:
    errors.seek(0)
    text = errors.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, after Ctrl-C too."""
    with tempfile.TemporaryDirectory(prefix="bench_", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()
