"""Download a file once: go on after a cut, give up on a stall, and check what has arrived.

A file grows as NAME.partial, which outlives the process. It gets its name when it is whole and has
the hash that was asked for.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import files
from data.progress import progress

if TYPE_CHECKING:  # slow to import, and rarely needed
    from requests import Response

STALL_SECONDS = 30  # the longest wait for a connection, or for the next bytes
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new try after a cut, until new bytes arrive
BUSY = (429, 502, 503, 504)  # HTTP's answers that ask to come again later
BUSY_SECONDS = 10  # until then, if the server does not say how many
MOST_BUSY_SECONDS = 300  # the hub counts requests per five minutes
MOST_BUSY_ANSWERS = 5  # in a row
BLOCK = 2**16  # bytes
SHA256_DIGITS = 64


def fetch(url: str, path: Path, digest: str, size: int | None = None) -> None:
    """Put the file at `url` at `path`, unless it is there. Raises OSError if that fails.

    `digest` is the file's SHA-256, or the SHA-1 by which git knows it, for which `size` is needed.
    """
    partial = files.partial(path)
    with files.reserved(path.parent):
        if path.is_file() and is_right(path, digest, size):
            return
        try:
            with open(partial, "a+b") as file:
                complete(Part(file, digest, size), url, path)
                files.sync(file)
        except BaseException:  # Ctrl-C as well
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()
            raise
        partial.replace(path)
        files.sync_folder(path.parent)


class Part:
    """The beginning of a file, with its hash."""

    def __init__(self, file: IO[bytes], digest: str, size: int | None):
        self.file = file
        self.digest = digest
        self.size = size
        self.received = 0  # bytes
        self.hash = new_hash(digest, size)
        file.seek(0)
        while block := file.read(BLOCK):
            self._count(block)

    def append(self, block: bytes) -> None:
        """Add what comes next."""
        self.file.write(block)
        self._count(block)

    def begin_again(self) -> None:
        """Forget what there is."""
        self.file.truncate(0)  # it is open to append, so the next byte is the first
        self.received = 0
        self.hash = new_hash(self.digest, self.size)

    def fault(self) -> str:
        """Return how this differs from the whole file that was asked for: "" if it does not."""
        if self.size not in (None, self.received):
            return f"it has {self.received:,} bytes, not {self.size:,}"
        return "" if self.hash.hexdigest() == self.digest else "its hash differs"

    def _count(self, block: bytes) -> None:
        self.hash.update(block)
        self.received += len(block)


def is_right(path: Path, digest: str, size: int | None) -> bool:
    """Say whether a file is the one that was asked for."""
    with open(path, "rb") as file:
        return not Part(file, digest, size).fault()


def new_hash(digest: str, size: int | None) -> Any:
    """Return the hash that makes such digests. Git's begins with `blob SIZE`."""
    if len(digest) == SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def complete(part: Part, url: str, path: Path) -> None:
    """Receive what is missing, and check the whole. Raises OSError."""
    import requests

    way_out = f"get the file another way and put it at {path}"
    again = f"try again, which keeps what has arrived, or {way_out}"
    try:
        check_space(path.parent, (part.size or 0) - part.received)
        receive(part, url)
    except requests.RequestException as error:
        raise refusal(url, error, again) from error
    fault = part.fault()
    if fault:
        part.begin_again()
        raise OSError(f"{url} is not the expected file ({fault}), so it was removed: {way_out}")


def receive(part: Part, url: str) -> None:
    """Receive what is missing, in as many connections as that takes. Raises RequestException."""
    import requests

    cuts = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    pauses: Iterator[float] = iter(())  # before the first byte: there may be no network at all
    most = part.received
    while part.received != part.size:
        try:
            return receive_once(part, url)
        except cuts:
            if part.received > most:
                most = part.received
                pauses = iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                raise
        time.sleep(pause)


def receive_once(part: Part, url: str) -> None:
    """Receive what is missing, in one connection. Raises RequestException if it breaks."""
    response = ask(url, part.received)
    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        response = ask(url)
    with response, progress(url.rpartition("/")[2], part.size, part.received) as bar:
        response.raise_for_status()
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:  # the server sends the whole
            part.begin_again()
            bar.reset()
        for block in response.iter_content(BLOCK):
            part.append(block)
            bar.update(len(block))
            if part.size is not None and part.received > part.size:
                return  # it may never end


def ask(url: str, first: int = 0) -> "Response":
    """Ask for a file from byte `first` on, again while the server is busy."""
    import requests

    headers = {"Accept-Encoding": "identity"}  # else positions would be those of compressed bytes
    if first:
        headers["Range"] = f"bytes={first}-"
    busy = 0
    while True:
        response = requests.get(url, headers=headers, stream=True, timeout=STALL_SECONDS)
        if response.status_code not in BUSY or busy == MOST_BUSY_ANSWERS:
            return response
        response.close()
        busy += 1
        seconds = seconds_to_wait(response.headers)
        print(f"{url} is busy ({response.status_code}): trying again in {seconds} s", flush=True)
        time.sleep(seconds)


def seconds_to_wait(headers: Mapping[str, str]) -> int:
    """`Retry-After: 7` -> 7; `RateLimit: "api";r=0;t=55` -> 55, as the hub says it."""
    forms = {"Retry-After": r"^(\d+)$", "RateLimit": r"\bt=(\d+)"}
    for name, form in forms.items():
        found = re.search(form, headers[name]) if name in headers else None
        if found:
            return min(int(found[1]), MOST_BUSY_SECONDS)
    return BUSY_SECONDS


def refusal(url: str, error: Exception, way_out: str) -> OSError:
    """Return what to raise if nothing comes from `url`: requests' own errors are long."""
    import requests

    status = f": {error}" if isinstance(error, requests.HTTPError) else ""
    return OSError(f"cannot download {url} ({type(error).__name__}{status}): {way_out}")


def check_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError if so many bytes do not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            f"{folder} must have room for {n_bytes:,} bytes more, and its disk has {free:,}: "
            "free some, or work on another disk"
        )
