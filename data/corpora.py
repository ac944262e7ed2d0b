"""Known corpora on the Hugging Face hub, each at the commit that was looked at."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.documents import Reader, read_articles, read_documents, read_separated
from data.hub import Repository

DOWNLOADS = Path("data/downloads")


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """Files of a data set. NAME:2 takes the first two of them, NAME:FOLDER those in a folder."""

    repository: str
    commit: str
    files: str  # pattern of their names
    first: int = 0  # how many are taken by default; 0 takes all
    val_fraction: float
    read: Reader = read_documents

    def find(self, name: str, part: str) -> list[Path]:
        """Return the files, downloaded unless a folder is given. Raises ValueError or OSError."""
        pattern = PurePosixPath(self.files)
        if part and not part.isdecimal():
            # A copy of the repository has other texts beside these, in files of the same names
            for names in (self.files, pattern.name):
                found = sorted(Path(part).glob(names))
                if found:
                    return found
            raise FileNotFoundError(
                f"{part} must be a folder with files {self.files} or {pattern.name} of {name}: "
                f"get them from {self.repository} on the hub"
            )
        way_out = f"get {self.files} of {self.repository} another way and pass {name}:FOLDER"
        repository = Repository(self.repository, self.commit, "datasets", way_out)
        listed = repository.files(DOWNLOADS / name, "/".join(pattern.parts[:-1]))
        matching = [file for file in listed if fnmatch.fnmatch(file.name, self.files)]
        n = int(part) if part else self.first or len(matching)
        if not 1 <= n <= len(matching):
            raise ValueError(f"{name} has {len(matching)} files: got {name}:{part}")
        return repository.fetch(matching[:n], DOWNLOADS / name)


# To add a corpus, say here where it is
HUB = {
    "tinystories": HubCorpus(
        repository="roneneldan/TinyStories",
        commit="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        files="TinyStoriesV2-GPT4-train.txt",
        val_fraction=0.01,
        read=read_separated,
    ),
    "wikitext": HubCorpus(
        repository="Salesforce/wikitext",
        commit="b08601e04326c79dfdd32d625aee71d232d685c3",
        files="wikitext-103-raw-v1/train-*.parquet",
        val_fraction=0.01,
        read=read_articles,
    ),
    "openwebtext": HubCorpus(
        repository="Skylion007/openwebtext",
        commit="79d93d786212f7344586290adb811d4ae6a1762c",
        files="plain_text/train-*.parquet",
        val_fraction=0.001,
    ),
    "fineweb-edu": HubCorpus(
        repository="HuggingFaceFW/fineweb-edu",
        commit="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        files="sample/10BT/*.parquet",
        first=1,
        val_fraction=0.001,
    ),
}
