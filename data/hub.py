"""Files of a repository on the Hugging Face hub: their names, sizes and hashes, and themselves.

HF_ENDPOINT may give the address of a mirror, as it does for the hub's own library.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote, urljoin

import files
from data.download import ask, check_space, fetch, refusal

COMMIT = re.compile("[0-9a-f]{40}")  # what it names never changes, as what a branch names does
Found = TypeVar("Found")
LISTING = ".files.json"  # hidden, so that it is no text of a corpus


class HubFile(NamedTuple):
    """A file of a repository."""

    name: str  # its path in the repository, with slashes
    size: int  # bytes
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one, as data.download.fetch takes


@dataclass(frozen=True)
class Repository:
    """A repository at one revision: `Repository("openai-community/gpt2", "main", "models")`."""

    name: str
    revision: str
    kind: Literal["datasets", "models"]
    way_out: str = "get its files another way, put them in a folder and give its path instead"

    def url(self, name: str) -> str:
        """Return the address of a file."""
        kind = "" if self.kind == "models" else f"{self.kind}/"
        return f"{endpoint()}/{kind}{self.name}/resolve/{self.revision}/{quote(name)}"

    def at_commit(self) -> "Repository":
        """Return this repository at the commit that its revision stands for. Raises OSError."""
        if COMMIT.fullmatch(self.revision):
            return self
        url = f"{endpoint()}/api/{self.kind}/{self.name}/revision/{self.revision}"
        return replace(self, revision=read_page(url, read_commit, self.way_out)[0])

    def files(self, folder: Path, under: str = "") -> list[HubFile]:
        """Return all files, or those `under` a path, sorted by name. Raises OSError.

        The list of a commit is kept in `folder`, so that what is there can be used offline.
        """
        kept = folder / LISTING
        key = f"{self.name}@{self.revision}/{under}"
        if kept.is_file():
            # If it is damaged, the hub is asked again
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                found = json.loads(kept.read_text(encoding="utf-8"))
                if key in found:
                    return [HubFile(*row) for row in found[key]]
        listed = sorted(self._listed(under))
        if COMMIT.fullmatch(self.revision):
            files.write_text(kept, json.dumps({key: listed}))
        return listed

    def fetch(self, chosen: Iterable[HubFile], folder: Path) -> list[Path]:
        """Put files into a folder under their names, unless they are there. Raises OSError."""
        paths = {folder / file.name: file for file in chosen}
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(missing(path, file.size) for path, file in paths.items()))
        for path, file in paths.items():
            fetch(self.url(file.name), path, file.digest, file.size)
        return list(paths)

    def _listed(self, under: str) -> list[HubFile]:
        """Return what the hub says of each file; it does so page by page."""
        listed: list[HubFile] = []
        path = f"{self.kind}/{self.name}/tree/{self.revision}/{quote(under)}".rstrip("/")
        url = f"{endpoint()}/api/{path}?recursive=true"
        while url:
            page, url = read_page(url, read_files, self.way_out)
            listed += page
        return listed


def missing(path: Path, size: int) -> int:
    """Return how many bytes of a file have not arrived yet."""
    if path.exists():
        return 0
    partial = files.partial(path)
    return max(0, size - partial.stat().st_size) if partial.exists() else size


def read_page(url: str, read: Callable[[Any], Found], way_out: str) -> tuple[Found, str]:
    """Return what `read` finds in the JSON at an address, and the address of the next page, or "".

    Raises OSError with a way out, also if `read` finds something else than it wants.
    """
    import requests

    try:
        with ask(url) as response:
            response.raise_for_status()
            links = response.links
            next_page = urljoin(url, links["next"]["url"]) if "next" in links else ""
            return read(response.json()), next_page
    except (requests.RequestException, KeyError, TypeError) as error:
        raise refusal(url, error, way_out) from error


def endpoint() -> str:
    """Return the address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def read_commit(page: Any) -> str:
    """Return the commit that a page names. Raises TypeError if it names none."""
    match page:
        case {"sha": str(commit)} if COMMIT.fullmatch(commit):
            return commit
    raise TypeError("the page names no commit")


def read_files(page: Any) -> list[HubFile]:
    """Return the files among the entries of a page. Raises TypeError if that is no list of them."""
    if not isinstance(page, list):
        raise TypeError("the page is no list")
    return [read_entry(entry) for entry in page if entry["type"] == "file"]


def read_entry(entry: Any) -> HubFile:
    """Return the file of an entry. Raises OSError if its name leads out of a folder."""
    match entry:
        case {"path": str(name), "size": int(size), "lfs": {"oid": str(digest)}} | {
            "path": str(name),
            "size": int(size),
            "oid": str(digest),
        }:
            path = PureWindowsPath(name)  # which knows both slashes, and drives
        case _:
            raise TypeError("the entry is no file")
    if path.anchor or ".." in path.parts:
        raise OSError(f"the hub names a file {name!r}, which would lie outside its folder: refused")
    return HubFile(name, size, digest)
