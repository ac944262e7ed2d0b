"""What a long step says of itself: how far it has come, and what it leaves out."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm


def progress(verb: str, total: int | None = None, done: int = 0) -> tqdm:
    """Return a bar that counts bytes, of which some may be done. It is drawn on a terminal only."""
    return tqdm(desc=verb, total=total, initial=done, unit="B", unit_scale=True, disable=None)


def print_left_out(reason: str, paths: Sequence[Path]) -> None:
    """Print how many files are left out, if any, with the names of some."""
    if paths:
        names = ", ".join(path.name for path in paths[:3])
        print(f"{reason}, so left out: {len(paths)} files, such as {names}")
