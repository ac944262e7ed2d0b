"""Damages a file in thousands of ways, and says what came of reading it."""

import contextlib
import io
import random
import re
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cli

if sys.platform == "linux":
    import resource

EDGES = (0, -1, 2**31 - 1, 2**63 - 1)  # of integers, where sizes and offsets go wrong
VALUES = ["0", "-1", "1.5", "1e999", "NaN", "true", "null", '"x"', "[]", "{}", "9" * 5000]
VALUES += map(str, EDGES)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+\w.]+|\s+|.', re.DOTALL)
TEXTS = (".json", ".jsonl", ".toml", ".tiktoken")
REFUSED = (ValueError, ArithmeticError, OSError)  # what cli.run makes a sentence of
SECONDS = 5  # of CPU time, which other processes do not lengthen, that a small file may take
MEMORY = 2**31  # bytes that it may take besides what the process has


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one damage of a disk, of a network or of a person."""
    n = len(data)
    start, other = rng.randrange(n), rng.randrange(n)
    end = start + int(n ** rng.random())  # short ranges are as likely as long ones
    before, cut, after = data[:start], data[start:end], data[end:]
    match rng.randrange(9):
        case 0:
            flipped = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                flipped[rng.randrange(n)] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return before
        case 2:
            return before + bytes(len(cut)) + after
        case 3:
            low, high = sorted((start, other))
            width = min(end - start, high - low, n - high)
            first, second = data[low : low + width], data[high : high + width]
            return data[:low] + second + data[low + width : high] + first + data[high + width :]
        case 4:
            return before + cut + cut + after
        case 5:
            return before + after
        case 6:
            return before + rng.randbytes(len(cut)) + after
        case 7:
            return before + b"\xff" * len(cut) + after
    width = rng.choice((4, 8))
    edge = rng.choice(EDGES) % 2 ** (8 * width)
    start -= start % width
    return data[:start] + edge.to_bytes(width, "little") + data[start + width :]


def damaged_text(text: str, rng: random.Random) -> str:
    """Return JSON or TOML with one token that a person or a program has changed."""
    tokens = TOKEN.findall(text)
    i, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    match rng.randrange(5):
        case 0:
            tokens[i] = rng.choice(VALUES)
        case 1:
            tokens[i] = ""
        case 2:
            tokens[i] *= 2
        case 3:
            tokens[i], tokens[other] = tokens[other], tokens[i]
        case 4:
            depth = rng.choice((1, 10_000))
            opened, closed = rng.choice((("[", "]"), ('{"a": ', "}")))
            tokens[i] = opened * depth + tokens[i] + closed * depth
    return "".join(tokens)


def damaged_zip(data: bytes, rng: random.Random) -> bytes:
    """Return an archive one of whose files was damaged before it was packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(out, "w") as after:
        names = before.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = before.read(name)
            after.writestr(name, damaged(content, rng) if name == chosen else content)
    return out.getvalue()


def damage(path: Path, data: bytes, rng: random.Random) -> None:
    """Write `data` into a file, damaged; half of the times so that its form stays whole."""
    if path.suffix in TEXTS and rng.random() < 0.5:
        path.write_text(damaged_text(data.decode(), rng), encoding="utf-8", newline="")
    elif path.suffix == ".pt" and rng.random() < 0.5:
        path.write_bytes(damaged_zip(data, rng))
    else:
        path.write_bytes(damaged(data, rng))


def survive(numbers: Iterable[int], paths: Iterable[Path], read: Callable[[], Any]) -> None:
    """Damage one of the files in each case: `read` must refuse it, or return what it should.

    What it should is for `read` to assert. What is refused must be so in words.
    """
    originals = [(path, path.read_bytes()) for path in paths]
    read()  # what is not damaged is not refused
    for number in numbers:
        path, data = originals[number % len(originals)]
        damage(path, data, random.Random(number))
        try:
            check_read(read, f"case {number}, {path.name}")
        finally:
            path.write_bytes(data)


def check_read(read: Callable[[], Any], case: str) -> None:
    """Assert that `read` returns, or refuses in words, within bounds of time and memory."""
    try:
        with bounded():
            said = refusal(read)
    except Exception as error:
        raise AssertionError(f"{case}: {error!r}") from error
    assert said is None or said, f"{case}: it was refused without a word"


def refusal(read: Callable[[], Any]) -> str | None:
    """Return the sentence by which a call refuses to go on, if it does."""
    try:
        read()
    except REFUSED as error:
        return cli.sentence(error)
    return None


class Hang(BaseException):
    """No handler of the program may keep it."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Bound the CPU time and the memory of what is done inside."""

    def stop(*_: object) -> None:
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
