"""Texts and files that several tests share."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared/data"


def shared(name: str) -> Path:
    """Return a file or folder beside the repository; skip the test where there is none."""
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"needs {SHARED_DATA / name}")
    return SHARED_DATA / name


@pytest.fixture
def shakespeare() -> Path:
    """Tiny Shakespeare, 1,115,394 characters."""
    return shared("tinyshakespeare.txt")


@pytest.fixture
def gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiktoken cache that holds GPT-2's vocabulary, and is the one in use."""
    folder = shared("tiktoken_cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder
