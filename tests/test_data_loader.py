"""Batches against plain Python on small token arrays, and the refusal of damaged datasets."""

import hashlib
import json
import math
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import IGNORED, Batches, Dataset, Windows, eval_batches
from data.order import Order, shuffled
from data.prepare import PrepareConfig, prepare
from data.tokenizer import load_tokenizer
from data.windows import cut_windows

T = 8
TOKENS_N = np.arange(1000, dtype=np.uint16)  # each token is its own position
WINDOWS = Windows(vocab_size=1000, context_length=T)


def batches(tokens_N: np.ndarray = TOKENS_N, windows: Windows = WINDOWS, seed: int = 1) -> Batches:
    return Batches(tokens_N, windows, batch_size=4, seed=seed)


def epoch_of_starts(loader: Batches, epoch: int) -> list[int]:
    first = epoch * loader.n_windows
    rows = [
        int(tokens_T[0])
        for step in range(first // 4, (first + loader.n_windows) // 4 + 1)
        for tokens_T in loader.batch(step)[0]
    ]
    return rows[first % 4 :][: loader.n_windows]


def test_targets_are_the_tokens_one_later():
    tokens_BT, targets_BT = batches().batch(3)
    assert tokens_BT.shape == targets_BT.shape == (4, T)
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
    assert torch.equal(targets_BT, tokens_BT + 1)
    assert torch.equal(tokens_BT, tokens_BT[:, :1] + torch.arange(T))


def test_a_batch_depends_on_seed_and_step_alone():
    forwards = [batches().batch(step) for step in range(200)]
    loader = batches()
    for step in reversed(range(200)):
        assert torch.equal(loader.batch(step)[0], forwards[step][0])
    assert not torch.equal(batches(seed=2).batch(0)[0], forwards[0][0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_ranks_are_the_batch_of_one(world_size: int):
    for step in (0, 30, 31, 100):
        shares = [
            batches(windows=replace(WINDOWS, rank=rank, world_size=world_size)).batch(step)[0]
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(shares), batches().batch(step)[0])


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own():
    loader = batches()
    epochs = [epoch_of_starts(loader, epoch) for epoch in range(5)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + T * loader.n_windows, T))
        assert starts != sorted(starts)
    ranks = [np.argsort(starts).tolist() for starts in epochs]
    assert len({tuple(order) for order in ranks}) == 5


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 4097, 100_000])
def test_a_computed_shuffle_puts_every_window_at_one_place(n: int):
    keys = np.random.default_rng(n).integers(2**64, size=4, dtype=np.uint64)
    found = shuffled(np.arange(n), n, keys)
    assert sorted(found.tolist()) == list(range(n))
    if n >= 1000:  # as random as a permutation: its neighbours are a third of n apart, uncorrelated
        assert np.abs(np.diff(found)).mean() == pytest.approx(n / 3, rel=0.1)
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
        others = shuffled(np.arange(n), n, keys + np.uint64(1))
        assert (found == others).mean() < 0.01


def test_the_order_of_a_hundred_billion_tokens_takes_no_memory():
    n = 100_000_000
    order = Order(n, n_offsets=1024, seed=1)
    tracemalloc.start()
    windows_B, offsets_B = order.windows(np.arange(n - 256, n + 256))  # of two epochs
    assert tracemalloc.get_traced_memory()[1] < 10**7  # an array would be 800 MB
    tracemalloc.stop()
    assert len(set(windows_B[:256].tolist())) == len(set(windows_B[256:].tolist())) == 256
    assert windows_B.max() < n
    assert len(set(offsets_B.tolist())) == 2
    again, _ = Order(n, n_offsets=1024, seed=1).windows(np.arange(n, n + 256))
    assert again.tolist() == windows_B[256:].tolist()


def test_a_long_epoch_visits_every_window_once_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.order.MOST_HELD", 10)
    loader = batches()
    assert loader.order.kind == "computed"
    starts = epoch_of_starts(loader, 3)
    assert sorted(starts) == list(range(min(starts), min(starts) + T * loader.n_windows, T))
    assert starts != sorted(starts)


def test_a_short_epoch_keeps_the_order_that_it_always_had():
    windows_B, offsets_B = Order(5, n_offsets=3, seed=7).windows(np.arange(5, 10))
    rng = np.random.default_rng([7, 1])
    offset = rng.integers(3)
    assert windows_B.tolist() == rng.permutation(5).tolist()
    assert set(offsets_B.tolist()) == {offset}


def test_windows_begin_elsewhere_in_other_epochs_and_reach_the_whole_text():
    loader = batches()
    epochs = [epoch_of_starts(loader, epoch) for epoch in range(60)]
    assert {min(starts) for starts in epochs} == set(range(T))
    assert min(map(min, epochs)) == 0
    assert max(map(max, epochs)) + T >= len(TOKENS_N) - T


@pytest.mark.parametrize("n", range(T + 1, 5 * T))
def test_windows_stay_inside_a_text_of_any_length(n: int):
    loader = batches(TOKENS_N[:n])
    for step in range(50):
        tokens_BT, targets_BT = loader.batch(step)
        assert tokens_BT.shape == (4, T)
        assert int(targets_BT.max()) < n


def test_a_text_no_longer_than_one_context_is_refused():
    with pytest.raises(ValueError, match="got 8 tokens, context_length=8; give more text"):
        batches(TOKENS_N[:T])


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size=4, 3 processes"):
        batches(windows=replace(WINDOWS, world_size=3))


def test_a_token_outside_the_vocabulary_is_refused_in_the_batch_that_has_it():
    windows = replace(WINDOWS, vocab_size=500)
    with pytest.raises(ValueError, match="outside its vocabulary of 500"):
        [batches(windows=windows).batch(step) for step in range(30)]
    with pytest.raises(ValueError, match="outside its vocabulary of 500"):
        list(eval_batches(TOKENS_N, windows, batch_size=4))


@pytest.mark.parametrize("n", [2, T, T + 1, 32, 33, 34, 999, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_makes_every_token_but_the_first_a_target_once(n: int, world_size: int):
    seen: Counter[int] = Counter()
    numbers: set[int] = set()
    for rank in range(world_size):
        windows = replace(WINDOWS, rank=rank, world_size=world_size)
        batches = list(eval_batches(TOKENS_N[:n], windows, batch_size=4))
        numbers.add(len(batches))
        for tokens_BT, targets_BT in batches:
            assert tokens_BT.shape == targets_BT.shape == (4, T)
            counted = targets_BT != IGNORED
            assert counted.any() or rank > 0
            assert torch.equal(targets_BT[counted], tokens_BT[counted] + 1)
            seen.update(targets_BT[counted].tolist())
    assert seen == Counter(range(1, n))
    assert len(numbers) == 1  # of batches, as to compute a sharded model is the work of all


E = 999  # stands for end-of-text


def texts(*lengths: int) -> np.ndarray:
    """Texts of these lengths in tokens, of which the first is end-of-text."""
    return np.concatenate([np.array([E, *range(1, n)], np.uint16) for n in lengths])


def inputs(tokens_N: np.ndarray) -> list[list[int]]:
    """The tokens that evaluation reads, window by window, without those that fill a window up."""
    return [
        tokens_T[targets_T != IGNORED].tolist()
        for tokens_BT, targets_BT in eval_batches(tokens_N, WINDOWS, 2, end_of_text=E)
        for tokens_T, targets_T in zip(tokens_BT, targets_BT, strict=True)
        if (targets_T != IGNORED).any()
    ]


def test_the_docstring_example_is_cut_before_the_second_text():
    assert cut_windows(np.array([E, 1, 2, E, 3, E, 4, 5]), 4, E) == [(0, 3), (3, 7)]


def test_windows_of_an_evaluation_begin_with_a_text_where_texts_are_short():
    tokens_N = texts(3, 4, 5, 2, 8, 6)
    lengths = [len(window) for window in inputs(tokens_N)]
    assert lengths == [7, 7, 8, 5]  # the last token is predicted, and is no input
    assert all(window[0] == E for window in inputs(tokens_N))
    assert list(chain(*inputs(tokens_N))) == tokens_N[:-1].tolist()


def test_a_text_longer_than_a_window_is_cut_even_among_short_ones():
    tokens_N = texts(2, 2, 2, 12, 2, 2, 2, 2, 2)
    assert [len(window) for window in inputs(tokens_N)] == [6, 8, 8, 5]
    assert list(chain(*inputs(tokens_N))) == tokens_N[:-1].tolist()


def test_windows_lie_side_by_side_where_texts_are_long():
    assert [len(window) for window in inputs(texts(10, 9, 30))] == [8] * 6


def test_cross_entropy_leaves_out_what_evaluation_pads():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


def test_evaluation_of_a_single_token_is_refused():
    with pytest.raises(ValueError, match="got 1"):
        next(eval_batches(TOKENS_N[:1], WINDOWS, batch_size=4))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("hello hello world, this is the world " * 30)
    config = PrepareConfig(
        sources=(str(folder / "text.txt"),), vocab_size=270, out=folder / "dataset"
    )
    prepare(config)
    return folder / "dataset"


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    for file in prepared.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_an_opened_dataset_gives_back_the_text(dataset: Path):
    opened = Dataset.open(dataset)
    text = "hello hello world, this is the world " * 30
    n = int(len(text) * 0.9)
    assert opened.tokenizer.decode(opened.tokens("train").tolist()) == text[:n]
    assert opened.tokenizer.decode(opened.tokens("val").tolist()) == text[n:]
    bits_per_token = 3  # as many as a fair choice of one in 8, whose loss is ln 8 nats
    expected = bits_per_token * len(opened.tokens("val")) / (len(text) - n)
    assert opened.bits_per_byte(math.log(8)) == pytest.approx(expected)


def test_a_folder_that_is_no_dataset_is_refused_with_the_command_that_makes_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"python -m data\.prepare SOURCE --out="):
        Dataset.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.bin", lambda data: data[:-1], "bytes, not"),
        ("val.bin", lambda data: data + b"\0\0", "bytes, not"),
        ("train.bin", lambda data: b"\0\0" + data[2:], "SHA-256"),
        ("val.bin", lambda data: b"\xff\xff" + data[2:], "token 65535 is outside its vocabulary"),
        ("tokenizer.tiktoken", lambda data: data[:-1], "SHA-256"),
        ("meta.json", lambda data: data[:-3], "is damaged"),
        ("meta.json", lambda data: b"[]", "is damaged"),
        ("meta.json", lambda data: data.replace(b'"tokens"', b'"tocens"'), "lacks 'tokens'"),
        ("meta.json", lambda data: data.replace(b'"bytes"', b'"bites"'), "lacks 'bytes'"),
        ("meta.json", lambda data: data.replace(b'version": 1', b'version": 2'), "version is 2"),
        ("meta.json", lambda data: data.replace(b'size": 270', b'size": 271'), "should be 270"),
    ],
)
def test_a_damaged_dataset_is_refused(dataset: Path, name: str, damage, reason: str):
    damaged = damage((dataset / name).read_bytes())
    assert damaged != (dataset / name).read_bytes()
    (dataset / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"is damaged: .*{reason}|{reason}.*prepare it again"):
        Dataset.open(dataset)


def test_a_missing_token_file_is_named(dataset: Path):
    (dataset / "val.bin").unlink()
    with pytest.raises(ValueError, match=r"damaged: .*val\.bin.*; prepare it again"):
        Dataset.open(dataset)


def test_meta_is_json_that_a_person_can_read(dataset: Path):
    text = (dataset / "meta.json").read_text("utf-8")
    assert json.loads(text)["tokenizer"]["kind"] == "bpe"
    assert text.count("\n") > 20


def test_the_identity_of_a_dataset_has_its_tokenizer_and_the_hashes_of_its_tokens(dataset: Path):
    identity = Dataset.open(dataset).identity()
    tokenizer = load_tokenizer(identity["tokenizer"])
    assert tokenizer.state() == Dataset.open(dataset).tokenizer.state()
    for split in ("train", "val"):
        data = (dataset / f"{split}.bin").read_bytes()
        assert identity["data"][split]["sha256"] == hashlib.sha256(data).hexdigest()
