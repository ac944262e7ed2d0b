"""Files of a repository on the Hugging Face hub: their names, sizes and hashes, and themselves.

HF_ENDPOINT may give the address of a mirror, as it does for the hub's own library.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urljoin

import files
from data.download import ask, check_space, fetch, refusal

COMMIT = re.compile("[0-9a-f]{40}")  # what it names never changes, as what a branch names does
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

    def url(self, name: str) -> str:
        """Return the address of a file."""
        kind = "" if self.kind == "models" else f"{self.kind}/"
        return f"{endpoint()}/{kind}{self.name}/resolve/{self.revision}/{quote(name)}"

    def at_commit(self) -> "Repository":
        """Return this repository at the commit that its revision stands for. Raises OSError."""
        if COMMIT.fullmatch(self.revision):
            return self
        url = f"{endpoint()}/api/{self.kind}/{self.name}/revision/{self.revision}"
        return replace(self, revision=read_page(url)[0]["sha"])

    def files(self, folder: Path, under: str = "") -> list[HubFile]:
        """Return all files, or those `under` a path, sorted by name. Raises OSError.

        The list of a commit is kept in `folder`, so that what is there can be used offline.
        """
        kept = folder / LISTING
        key = f"{self.name}@{self.revision}/{under}"
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            if key in found:
                return [HubFile(*row) for row in found[key]]
        listed = sorted(map(read_entry, self._entries(under)))
        if COMMIT.fullmatch(self.revision):
            files.write_text(kept, json.dumps({key: listed}))
        return listed

    def fetch(self, chosen: Iterable[HubFile], folder: Path) -> list[Path]:
        """Put files into a folder under their names, unless they are there. Raises OSError."""
        paths = {folder / file.name: file for file in chosen}
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(f.size for path, f in paths.items() if not path.exists()))
        for path, file in paths.items():
            fetch(self.url(file.name), path, file.digest, file.size)
        return list(paths)

    def _entries(self, under: str) -> list[dict[str, Any]]:
        """Return what the hub says of each file; it does so page by page."""
        entries: list[dict[str, Any]] = []
        path = f"{self.kind}/{self.name}/tree/{self.revision}/{quote(under)}".rstrip("/")
        url = f"{endpoint()}/api/{path}?recursive=true"
        while url:
            page, url = read_page(url)
            entries += page
        return [entry for entry in entries if entry["type"] == "file"]


def read_page(url: str) -> tuple[Any, str]:
    """Return the JSON at an address, and the address of the next page, if there is one."""
    import requests

    try:
        with ask(url) as response:
            response.raise_for_status()
            links = response.links
            return response.json(), urljoin(url, links["next"]["url"]) if "next" in links else ""
    except requests.RequestException as error:
        way_out = "get its files another way, put them in a folder and give its path instead"
        raise refusal(url, error, way_out) from error


def endpoint() -> str:
    """Return the address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def read_entry(entry: dict[str, Any]) -> HubFile:
    """Return the file of an entry. Raises OSError if its name leads out of a folder."""
    name = entry["path"]
    path = PureWindowsPath(name)  # which knows both slashes, and drives
    if path.anchor or ".." in path.parts:
        raise OSError(f"the hub names a file {name!r}, which would lie outside its folder: refused")
    digest = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
    return HubFile(name, entry["size"], digest)
