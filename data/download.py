"""Download a file once, and check what arrives."""

import hashlib
from pathlib import Path

import files

STALL_SECONDS = 10  # the longest wait for a connection, or for the next bytes


def fetch(url: str, sha256: str, path: Path) -> None:
    """Put the file at `url` at `path`, unless it is there. Raises OSError if that fails."""
    import requests  # slow to import, and rarely needed

    if path.is_file() and files.sha256(path) == sha256:
        return
    try:
        response = requests.get(url, timeout=STALL_SECONDS)
        response.raise_for_status()
    except requests.RequestException as error:
        status = f": {error}" if isinstance(error, requests.HTTPError) else ""
        raise OSError(
            f"cannot download {url} ({type(error).__name__}{status}): get the file another way "
            "and give its path instead"
        ) from error
    if hashlib.sha256(response.content).hexdigest() != sha256:
        raise OSError(f"the file at {url} is not the expected file (its SHA-256 differs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path, "wb") as file:
        file.write(response.content)
