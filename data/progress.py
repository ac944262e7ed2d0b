"""A bar that shows how far a long step has come."""

from tqdm import tqdm


def progress(verb: str, total: int | None = None, done: int = 0) -> tqdm:
    """Return a bar that counts bytes, of which some may be done. It is drawn on a terminal only."""
    return tqdm(desc=verb, total=total, initial=done, unit="B", unit_scale=True, disable=None)
