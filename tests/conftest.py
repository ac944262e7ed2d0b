"""Texts and files that several tests share."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from browser import Page, chromium, find_chromium
from graphs import graphs  # noqa: F401  (a fixture)
from helpers import train_here, write_tiny

pytest_plugins = ["promises"]

SHARED_DATA = Path(__file__).parents[2] / "shared/data"

# Tensors of tests are so small that threads only wait for each other, most of all on a busy machine
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of a CPU, and bench.py check is of a GPU
# A job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
# tqdm's own lock is shared with forked processes: one that a test kills could keep it for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # a thread that held the lock at a fork would do the same


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run, whose dataset is beside it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(tiny: Path) -> Path:
    """The folder of the tiny run that nothing happened to."""
    train_here(tiny, tiny.parent / "undisturbed")
    return tiny.parent / "undisturbed"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One tab of a headless Chromium; skip the test where there is none."""
    binary = find_chromium()
    if binary is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with chromium(binary, tmp_path_factory.mktemp("profile")) as tab:
        yield tab
