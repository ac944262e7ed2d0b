"""Downloads that end: with the bytes that were asked for, or with a sentence."""

import contextlib
import hashlib
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import requests

STALL_SECONDS = 10  # the longest wait for a connection or for the next bytes
DOWNLOAD_SECONDS = 120  # altogether


def fetch(url: str, sha256: str, path: Path) -> bytes:
    """Return the file at `url`, from `path` if it is there; keep it at `path` if that can be.

    Raises OSError if it can neither be read nor downloaded.
    """
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    data = download(url, sha256)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.replace(path)
    return data


def download(url: str, sha256: str) -> bytes:
    """Return the file at `url`. Raises OSError if it does not come in time, or is another file."""
    answer: Future[bytes] = Future()

    def get() -> None:
        try:
            response = requests.get(url, timeout=STALL_SECONDS)
            response.raise_for_status()
            answer.set_result(response.content)
        except Exception as error:
            answer.set_exception(error)

    # requests has no limit for the whole; a thread that is not waited for gives one, whether it
    # is the name server, the handshake or a trickle of bytes that takes for ever.
    threading.Thread(target=get, daemon=True).start()
    try:
        data = answer.result(timeout=DOWNLOAD_SECONDS)
    except (requests.RequestException, TimeoutError) as error:
        status = f": {error}" if isinstance(error, requests.HTTPError) else ""
        raise OSError(f"cannot download {url} ({type(error).__name__}{status})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(f"what {url} sends is not the expected file (its SHA-256 differs)")
    return data
