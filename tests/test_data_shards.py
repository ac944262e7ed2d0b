"""llm.c's token shards, which become a dataset where they lie."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import files
from data.bigram import bigram_loss
from data.format import Joined
from data.loader import Batches, Dataset, Windows, eval_batches
from data.prepare import PrepareConfig, prepare
from data.shards import find_shards
from helpers import run_here, train_here

pytestmark = pytest.mark.usefixtures("gpt2_cache")
E = 50256  # end-of-text
TOKENS_N = np.arange(1000, dtype=np.uint16)


def write_shard(path: Path, tokens_N: np.ndarray, *header: int) -> None:
    head = np.zeros(256, "<i4")
    head[:3] = header or (20240520, 1, len(tokens_N))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.tobytes() + tokens_N.astype("<u2").tobytes())


def text_ids(n: int, seed: int) -> np.ndarray:
    """Texts of 7 tokens, each after end-of-text."""
    tokens_N = np.random.default_rng(seed).integers(0, 300, n)
    tokens_N[::8] = E
    return tokens_N


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards to train on, of which the second begins within a document, and one of val."""
    folder = tmp_path / "fineweb"
    train_N = text_ids(900, 1)
    write_shard(folder / "fineweb_train_000001.bin", train_N[:500])
    write_shard(folder / "fineweb_train_000002.bin", train_N[500:])
    write_shard(folder / "fineweb_val_000000.bin", text_ids(400, 0))
    return folder


def adopt(folder: Path, out: Path) -> Dataset:
    prepare(PrepareConfig(sources=(str(folder),), tokenizer="gpt2", out=out))
    return Dataset.open(out)


@pytest.mark.parametrize("lengths", [(1000,), (1, 999), (300, 1, 1, 698), (500, 500)])
def test_joined_arrays_have_the_length_and_slices_of_their_concatenation(lengths: tuple[int, ...]):
    arrays = np.split(TOKENS_N, np.cumsum(lengths)[:-1])
    joined = Joined(lengths, arrays.__getitem__)
    assert len(joined) == 1000
    rng = np.random.default_rng(0)
    wheres = [slice(*sorted(rng.integers(0, 1100, 2).tolist())) for _ in range(300)]
    for where in [
        *wheres,
        slice(None),
        slice(299, 302),
        slice(5, 5),
        slice(None, 1),
        slice(999, None),
    ]:
        assert np.array_equal(joined[where], TOKENS_N[where])
        assert joined[where].dtype == TOKENS_N.dtype


def test_shards_are_a_dataset_that_copies_nothing(shards: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in shards.iterdir()}
    dataset = adopt(shards, tmp_path / "out")
    assert {path.name for path in dataset.path.iterdir()} == {"meta.json", "tokenizer.tiktoken"}
    assert {path: path.read_bytes() for path in shards.iterdir()} == before
    assert isinstance(dataset.tokens("train"), Joined)  # so it is not in memory
    assert len(dataset.tokens("train")) == 900
    assert np.array_equal(dataset.tokens("train")[:], text_ids(900, 1))
    assert np.array_equal(dataset.tokens("val"), text_ids(400, 0))
    assert np.array_equal(dataset.tokens("val", 7), text_ids(400, 0)[:7])
    assert len(dataset.tokens("train", 600)) == 600


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A folder as nanoGPT's data/openwebtext is after its prepare.py."""
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    (folder / "prepare.py").write_text("# not a text to learn from")
    for split, n in (("train", 900), ("val", 400)):
        text_ids(n, n).astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


def test_nanogpts_files_are_a_dataset_that_copies_nothing(nanogpt: Path, tmp_path: Path):
    dataset = adopt(nanogpt, tmp_path / "out")
    assert {path.name for path in dataset.path.iterdir()} == {"meta.json", "tokenizer.tiktoken"}
    for split, n in (("train", 900), ("val", 400)):
        assert np.array_equal(dataset.tokens(split), text_ids(n, n))
    assert dataset.meta["splits"]["val"]["documents"] == 50


def test_nanogpts_files_with_a_vocabulary_of_their_own_are_refused(nanogpt: Path, tmp_path: Path):
    (nanogpt / "meta.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"meta\.pkl, which is not read"):
        adopt(nanogpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_cut_within_an_id_is_refused(nanogpt: Path, tmp_path: Path):
    (nanogpt / "val.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="must have ids of two bytes each: got 3 bytes"):
        adopt(nanogpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_ours_is_not_taken_for_nanogpts(nanogpt: Path, tmp_path: Path):
    (nanogpt / "meta.json").write_text("{}")
    assert find_shards([str(nanogpt)]) == {}


def test_what_else_is_in_the_folder_is_said_to_be_left_out(nanogpt: Path, tmp_path: Path, capsys):
    (nanogpt / "more").mkdir()
    (nanogpt / "more/val.bin").write_text("a text")
    adopt(nanogpt, tmp_path / "out")
    said = "not token files, so left out: 2 files, such as val.bin, prepare.py\n"
    assert said in capsys.readouterr().out


def test_nothing_is_said_if_all_files_are_shards(shards: Path, tmp_path: Path, capsys):
    adopt(shards, tmp_path / "out")
    assert "left out" not in capsys.readouterr().out


def test_shards_without_a_number_are_taken_if_they_are_alone_in_their_split(tmp_path: Path, capsys):
    folder = tmp_path / "TinyStories"
    write_shard(folder / "TinyStories_train.bin", text_ids(900, 1))
    write_shard(folder / "TinyStories_val.bin", text_ids(400, 0))
    dataset = adopt(folder, tmp_path / "out")
    assert np.array_equal(dataset.tokens("train"), text_ids(900, 1))
    assert np.array_equal(dataset.tokens("val"), text_ids(400, 0))
    write_shard(folder / "TinyStories_train_000001.bin", text_ids(900, 2))
    with pytest.raises(ValueError, match=r"or only NAME_train.bin: got 2, with the numbers \[1\]"):
        find_shards([str(folder)])


def test_shards_of_two_corpora_in_one_folder_are_refused(shards: Path):
    write_shard(shards / "other_train_000003.bin", text_ids(900, 2))
    with pytest.raises(ValueError, match="of one corpus: got those of fineweb, other; put each"):
        find_shards([str(shards)])


@pytest.mark.parametrize("flag", ["--val_fraction=0.2", "--column=content"])
def test_what_only_text_can_be_asked_is_refused_of_tokens(
    shards: Path, tmp_path: Path, capsys, flag: str
):
    assert command(shards, "--tokenizer=gpt2", flag, f"--out={tmp_path / 'out'}") == 2
    assert "leave out --val_fraction and --column" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_meta_counts_tokens_documents_and_the_bytes_of_text(shards: Path, tmp_path: Path):
    dataset = adopt(shards, tmp_path / "out")
    for split, ids in (("train", text_ids(900, 1)), ("val", text_ids(400, 0))):
        about = dataset.meta["splits"][split]
        n_bytes = sum(len(dataset.tokenizer.token_bytes(i)) for i in ids[ids != E].tolist())
        counts = (about["tokens"], about["documents"], about["bytes"])
        assert counts == (len(ids), -(-len(ids) // 8), n_bytes)
    first = (shards / "fineweb_train_000001.bin").read_bytes()
    assert dataset.meta["splits"]["train"]["shards"][0] == {
        "file": "fineweb_train_000001.bin",
        "tokens": 500,
        "sha256": hashlib.sha256(first).hexdigest(),
    }
    assert dataset.bits_per_byte(1.0) == pytest.approx(400 / n_bytes / np.log(2))


def test_a_window_across_two_shards_is_that_of_the_whole(shards: Path, tmp_path: Path):
    windows = Windows(50257, context_length=8)
    tokens_N = adopt(shards, tmp_path / "out").tokens("train")
    parts = Batches(tokens_N, windows, batch_size=4, seed=1)
    whole = Batches(text_ids(900, 1), windows, batch_size=4, seed=1)
    for step in range(100):  # several epochs, so several of these windows
        for ours, theirs in zip(parts.batch(step), whole.batch(step), strict=True):
            assert torch.equal(ours, theirs)


def test_shards_are_evaluated_as_the_same_tokens_in_one_array(shards: Path, tmp_path: Path):
    write_shard(shards / "fineweb_val_000001.bin", text_ids(80, 3))
    dataset = adopt(shards, tmp_path / "out")
    val_N = np.concatenate([text_ids(400, 0), text_ids(80, 3)])
    windows = Windows(50257, context_length=12)  # so it holds one text and a half
    ours = eval_batches(dataset.tokens("val"), windows, 4, E)
    for a, b in zip(ours, eval_batches(val_N, windows, 4, E), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    expected = bigram_loss(text_ids(900, 1), val_N, 50257)
    assert bigram_loss(dataset.tokens("train"), dataset.tokens("val"), 50257) == expected


def test_the_command_adopts_shards_and_says_what_to_type_next(shards: Path, tmp_path: Path, capsys):
    assert command(shards, "--tokenizer=gpt2", f"--out={tmp_path / 'out'}") == 0
    shown = capsys.readouterr().out
    assert "train           900 tokens" in shown
    assert f"--data.path={tmp_path / 'out'}" in shown


def test_a_dataset_of_text_in_the_folder_makes_room_for_shards(shards: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 30)
    prepare(PrepareConfig(sources=(str(tmp_path / "a.txt"),), out=tmp_path / "out"))
    adopt(shards, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "meta.json", "tokenizer.tiktoken",
    }  # fmt: skip


def command(*args: object) -> int:
    import data.prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        return run_here(data.prepare.main, "prepare.py", *args)


def no_magic(folder: Path) -> None:
    (folder / "fineweb_train_000002.bin").write_bytes(bytes(2000))


def another_version(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000002.bin", TOKENS_N, 20240520, 2, 1000)


def llama(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000002.bin", TOKENS_N, 20240801, 7, 500)


def too_short(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000002.bin", TOKENS_N, 20240520, 1, 1001)


def no_tokens(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000002.bin", TOKENS_N[:0])


def only_a_header(folder: Path) -> None:
    (folder / "fineweb_train_000002.bin").write_bytes(b"header")


def foreign_ids(folder: Path) -> None:
    write_shard(folder / "fineweb_train_000002.bin", TOKENS_N + np.uint16(50_000))


def no_val(folder: Path) -> None:
    (folder / "fineweb_val_000000.bin").unlink()


def a_gap(folder: Path) -> None:
    (folder / "fineweb_train_000002.bin").rename(folder / "fineweb_train_000003.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_magic, "_000002.bin is no shard: it should begin with 20240520, 1, not 0, 0"),
        (another_version, "should begin with 20240520, 1, not 20240520, 2"),
        (llama, "_000002.bin has tokens of Llama 3, not GPT-2"),
        (too_short, "_000002.bin should have 3,026 bytes, not 3,024: get it again"),
        (no_tokens, "_000002.bin must have 2 tokens or more: got 0"),
        (only_a_header, "is no shard"),
        (foreign_ids, "_000002.bin has token 50999, which GPT-2 has not"),
        (no_val, "NAME_val_NUMBER.bin without a gap, or only NAME_val.bin: got 0"),
        (a_gap, "NAME_train.bin: got 2, with the numbers [1, 3]; get those that are missing"),
    ],
)
def test_a_wrong_shard_is_refused_in_a_sentence_and_nothing_is_written(
    shards: Path, tmp_path: Path, capsys, damage, words: str
):
    damage(shards)
    assert command(shards, "--tokenizer=gpt2", f"--out={tmp_path / 'out'}") == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_than_that_of_the_shards_is_refused(shards: Path, tmp_path: Path, capsys):
    assert command(shards, f"--out={tmp_path / 'out'}") == 2
    assert "has tokens of GPT-2: pass --tokenizer=gpt2, not bpe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "should have 1824 bytes, not 1822"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\0\0"), "SHA-256"),
    ],
)
def test_a_shard_that_changes_afterwards_is_found_out(
    shards: Path, tmp_path: Path, damage, reason: str
):
    adopt(shards, tmp_path / "out")
    damage(shards / "fineweb_train_000002.bin")
    with pytest.raises(ValueError, match=f"is damaged: .*{reason}.*; prepare it again"):
        Dataset.open(tmp_path / "out").tokens("train")[:]


def test_a_shard_is_compared_with_its_hash_once_and_not_before_it_is_read(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checked: list[str] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: (checked.append(path.name), real(path))[1])
    dataset = adopt(shards, tmp_path / "out")
    checked.clear()
    train_N = dataset.tokens("train")
    assert len(train_N) == 900
    assert checked == []
    for _ in range(3):
        assert len(train_N[510:520]) == 10
        assert len(dataset.tokens("train")[600:700]) == 100
    assert checked == ["fineweb_train_000002.bin"]
    assert len(train_N[490:520]) == 30
    assert checked == ["fineweb_train_000002.bin", "fineweb_train_000001.bin"]


def test_a_run_trains_on_shards_and_goes_on_after_they_have_moved(shards: Path, tmp_path: Path):
    config = tmp_path / "run.toml"
    config.write_text(
        f'max_steps = 2\nbatch_size = 2\nsamples = 0\ndevice = "cpu"\n[data]\n'
        f'path = "{tmp_path / "out"}"\n[model]\ncontext_length = 8\nn_layer = 1\n'
        "n_head = 1\nn_embd = 8\n"
    )
    adopt(shards, tmp_path / "out")
    train_here(config, tmp_path / "run")
    moved = shards.rename(tmp_path / "elsewhere")
    adopt(moved, tmp_path / "out")
    train_here(config, tmp_path / "run", "--resume", "--max_steps=3")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 3
