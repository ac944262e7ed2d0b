"""Every file that is read, damaged in thousands of ways: a sentence, or the right result."""

import contextlib
import functools
import hashlib
import io
import json
import math
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

import cli
import data.loader
import data.tokenizer
import files
import model as model_module
import sample
import train
from damage import check_read, survive
from data import shards
from data.loader import Dataset
from data.prepare import PrepareConfig, prepare
from data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from engine import checkpoint, metrics, report, shares
from engine.guards import Repeated
from exchange import card, foreign, hub_folder, names
from helpers import on_linux, plain, words
from model import GPT, ModelConfig
from promises import Cases, broken
from sampling import prompts
from sampling.load import load_model
from structures import FEW_LETTERS, TEXT, drawn, survive_edits

pytestmark = on_linux
FORMS = {"gpt2": {}, "modern": {"architecture": "modern", "tie_embeddings": False}}


def write_dataset(folder: Path, kind: str) -> Path:
    (folder / "text.txt").write_text(words(160, "abcé"), encoding="utf-8")
    vocab_size = 330 if kind == "bpe" else 0
    sources = (str(folder / "text.txt"),)
    out = folder / kind
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(PrepareConfig(sources=sources, tokenizer=kind, vocab_size=vocab_size, out=out))
    return out


def state_of(tokenizer: Tokenizer, form: str = "gpt2") -> dict[str, Any]:
    """A checkpoint of a small random model."""
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 1, "n_embd": 4, "context_length": 8}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **FORMS[form]).sized()
    model = GPT(config)
    for weight in model.parameters():
        torch.nn.init.uniform_(weight)
    split = {"documents": 3, "tokens": 900, "bytes": 2000, "sha256": "0"}
    return {
        "step": 7,
        "best_val_loss": 1.5,
        "data": {"train": split, "val": split},
        "model_config": vars(config),
        "tokenizer": tokenizer.state(),
        "config": "seed = 1\n",
        "model": model.state_dict(),
        "optimizers": [],
    }


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_dataset(tmp_path_factory.mktemp(kind), kind) for kind in ("char", "bpe")}


@pytest.fixture
def tokenizers(datasets: dict[str, Path]) -> dict[str, Tokenizer]:
    kinds = {kind: Dataset.open(folder).tokenizer for kind, folder in datasets.items()}
    return {**kinds, "byte": ByteTokenizer()}


@pytest.fixture
def no_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save time, most of which would go into weights that are not used, and into shapes."""
    for draw in ("normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, draw, lambda tensor, **_: tensor)
    monkeypatch.setattr(names, "shapes_of", functools.cache(names.shapes_of))


@pytest.fixture
def saved(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> Path:
    checkpoint.save(tmp_path, state_of(tokenizers["char"]), ["last", "best"])
    return tmp_path


def check_model(state: dict[str, Any]) -> None:
    """Assert that a state of some file is one that a run or an export can take."""
    config = ModelConfig(**state["model_config"])
    assert {name: tuple(w.shape) for name, w in state["model"].items()} == names.shapes_of(config)
    assert {w.dtype for w in state["model"].values()} == {torch.float32}
    assert 0 < load_tokenizer(state["tokenizer"]).vocab_size <= config.vocab_size
    assert isinstance(state["step"], int)
    card.origin(state)


Files = tuple[list[Path], Callable[[], object]]  # and what reads them, and says if it is right


def record_of_checkpoints(saved: Path) -> Files:
    expected = plain(checkpoint.load(saved, "last"))

    def read() -> None:
        checkpoint.newest_first(saved)
        checkpoint.history(saved)
        assert plain(checkpoint.load(saved, "last")) == expected

    return [saved / checkpoint.RECORD], read


def log(folder: Path) -> Files:
    path = folder / "metrics.jsonl"
    lines = [{"step": i, "train_loss": 2.5 - i / 9, "grad_norm": 0.5} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text("seed = 1")

    def read() -> None:
        again = Repeated(report.lines_to_repeat(folder, "seed = 1", 3))
        with contextlib.suppress(ArithmeticError):
            again.check(4, 2.0)
        metrics.forget_from(path, 3)
        assert all(line["step"] < 3 for line in metrics.read(path))

    return [path], read


def config(folder: Path) -> Files:
    path = folder / "config.toml"
    config = replace(train.TrainConfig(), out_dir=Path("out/ä"), max_steps=12)
    path.write_text(cli.dump_config(config), encoding="utf-8")

    def read() -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                parsed = cli.parse_config(train.TrainConfig, [str(path)])
        except SystemExit as stop:
            raise ValueError(f"exit code {stop.code}") from None
        cli._check(tomllib.loads(cli.dump_config(parsed)), parsed, "config.toml")

    return [path], read


def folder_of_the_hub(folder: Path, tokenizer: Tokenizer, form: str) -> Files:
    hub_folder.export(state_of(tokenizer, form), folder, license="")
    names = ("config.json", "tokenizer.json", "model.safetensors")
    return [folder / name for name in names], lambda: check_model(foreign.read(folder, None))


# --- Controls -------------------------------------------------------------------------------------


class Same(str):
    """A hash that is that of any file."""

    def __ne__(self, _: object) -> bool:
        return False


sha256_not_compared = broken("sha256_not_compared", files, "sha256", lambda _: Same())
meta_not_compared = broken("meta_not_compared", data.loader, "sha256_of", lambda _: Same())


@contextlib.contextmanager
def raising_another_error(module: Any) -> Iterator[None]:
    """Let what `module` raises be an error of which cli.run makes no sentence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ValueError", type("AnotherError", (Exception,), {}), raising=False)
        yield


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.promise(controls=[sha256_not_compared])
def test_a_damaged_checkpoint_is_refused(cases: Cases, saved: Path):
    expected = plain(checkpoint.load(saved, "last"))

    def read() -> None:
        assert plain(checkpoint.load(saved, "last")) == expected

    survive(cases(40, 10_000), saved.glob("*.pt"), read)


@pytest.mark.promise(controls=[functools.partial(raising_another_error, files)])
def test_a_damaged_record_of_checkpoints_is_refused_or_leads_to_the_same(cases: Cases, saved: Path):
    survive(cases(60, 10_000), *record_of_checkpoints(saved))


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.promise(controls=[functools.partial(raising_another_error, checkpoint)])
def test_a_made_up_checkpoint_whose_hash_agrees_is_refused_or_a_model(cases: Cases, saved: Path):
    [path] = saved.glob("*.pt")
    record = json.loads((saved / checkpoint.RECORD).read_text())

    def read() -> None:
        record["last"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (saved / checkpoint.RECORD).write_text(json.dumps(record))
        found = load_model(saved, "last", "cpu")
        assert type(found.step) is int
        tokenizer = found.tokenizer
        assert tokenizer.vocab_size <= found.model.config.vocab_size
        assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)

    survive(cases(60, 10_000), [path], read)


@pytest.mark.promise(controls=[sha256_not_compared])
def test_a_damaged_share_of_a_checkpoint_is_refused(cases: Cases, tmp_path: Path, tokenizers: Any):
    state = state_of(tokenizers["char"], "modern")
    folder = tmp_path / "step_00000007_1f3a9c04.shares"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        hashes = shares.write(folder, shares.flat(state), None)
    finally:
        dist.destroy_process_group()
    rest = {key: state[key] for key in state if key not in ("model", "optimizers")}
    checkpoint.save(tmp_path, rest, ["last"], {"folder": folder.name, "sha256": hashes})
    expected = plain(checkpoint.load(tmp_path, "last")["model"])
    assert expected == plain(state["model"])

    def read() -> None:
        assert plain(checkpoint.load(tmp_path, "last")["model"]) == expected

    survive(cases(40, 10_000), [folder / name for name in hashes], read)


@pytest.mark.promise(controls=[functools.partial(raising_another_error, files)])
def test_a_damaged_log_is_refused_or_has_numbers(cases: Cases, tmp_path: Path):
    survive(cases(60, 10_000), *log(tmp_path))


@pytest.mark.promise(controls=[functools.partial(raising_another_error, cli)])
def test_a_damaged_config_is_refused_or_valid(cases: Cases, tmp_path: Path):
    survive(cases(20, 2_000), *config(tmp_path))


# --- Datasets -------------------------------------------------------------------------------------


def content(dataset: Dataset) -> list[Any]:
    return [
        dataset.tokens("train")[:].tolist(),
        dataset.tokens("val")[:].tolist(),
        dataset.identity(),
        dataset.bits_per_byte(1.0),
        dataset.end_of_text,
    ]


def survive_as_dataset(numbers: Iterator[int], folder: Path, *damaged: str) -> None:
    expected = content(Dataset.open(folder))

    def read() -> None:
        is_same = content(Dataset.open(folder)) == expected
        assert is_same, (
            "it has other content"
        )  # pytest's own comparison of long lists takes minutes

    survive(numbers, [folder / name for name in damaged], read)


@pytest.mark.promise(controls=[sha256_not_compared])
def test_damaged_tokens_are_refused(cases: Cases, datasets: dict[str, Path]):
    survive_as_dataset(cases(40, 10_000), datasets["char"], "train.bin", "val.bin")


@pytest.mark.promise(controls=[functools.partial(raising_another_error, data.loader)])
def test_damaged_ranks_of_a_tokenizer_are_refused(cases: Cases, datasets: dict[str, Path]):
    survive_as_dataset(cases(60, 10_000), datasets["bpe"], "tokenizer.tiktoken")


@pytest.mark.promise(controls=[meta_not_compared])
def test_a_damaged_meta_json_is_refused_or_leads_to_the_same(
    cases: Cases, datasets: dict[str, Path]
):
    survive_as_dataset(cases(60, 10_000), datasets["char"], "meta.json")


@pytest.mark.promise(controls=[functools.partial(raising_another_error, shards)])
def test_damaged_shards_of_llmc_are_refused_or_have_tokens(cases: Cases, tmp_path: Path):
    path = tmp_path / "corpus_train.bin"
    header = np.zeros(shards.SHARD_HEADER // 4, "<i4")
    header[:3] = (shards.MAGIC, shards.VERSION, 200)
    ids = np.arange(200).astype("<u2")
    path.write_bytes(header.tobytes() + ids.tobytes())

    def read() -> None:
        about = shards.describe([path], ByteTokenizer())
        assert path.stat().st_size == shards.SHARD_HEADER + 2 * about["tokens"]
        assert about["tokens"] >= about["bytes"] > 0

    survive(cases(60, 10_000), [path], read)


# --- Other projects -------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.promise(controls=[functools.partial(raising_another_error, files)])
@pytest.mark.parametrize(("kind", "form"), [("char", "gpt2"), ("bpe", "modern"), ("byte", "gpt2")])
def test_a_damaged_folder_of_the_hub_is_refused_or_a_model(
    cases: Cases, tmp_path: Path, tokenizers: dict[str, Tokenizer], kind: str, form: str
):
    survive(cases(15, 4_000), *folder_of_the_hub(tmp_path / "hub", tokenizers[kind], form))


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.promise(controls=[functools.partial(raising_another_error, foreign)])
def test_a_damaged_ckpt_of_nanogpt_is_refused_or_a_model(
    cases: Cases, tmp_path: Path, datasets: Any, tokenizers: dict[str, Tokenizer]
):
    ours = state_of(tokenizers["char"])
    theirs = {
        f"transformer.{name.replace('blocks', 'h')}": weight
        for name, weight in ours["model"].items()
    }
    theirs["lm_head.weight"] = theirs.pop("transformer.lm_head.weight")
    keys = ("vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    sizes = {key: ours["model_config"][key] for key in keys} | {"block_size": 8, "bias": True}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": theirs, "model_args": sizes, "iter_num": 9}, path)

    def read() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            check_model(foreign.read(path, datasets["char"]))

    survive(cases(60, 10_000), [path], read)


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.promise(controls=[functools.partial(raising_another_error, model_module)])
def test_a_damaged_model_of_llmc_is_refused_or_a_model(
    cases: Cases, tmp_path: Path, datasets: Any, tokenizers: dict[str, Tokenizer]
):
    ours = state_of(tokenizers["char"])
    V = tokenizers["char"].vocab_size
    header = np.zeros(foreign.LLMC_HEADER, "<i4")
    header[:8] = (foreign.LLMC_MAGIC, 3, 8, V, 1, 1, 4, V)
    weights = [weight for name, weight in ours["model"].items() if name != "lm_head.weight"]
    path = tmp_path / "model.bin"
    path.write_bytes(header.tobytes() + b"".join(w.numpy().tobytes() for w in weights))

    def read() -> None:
        check_model(foreign.read(path, datasets["char"]))

    survive(cases(60, 10_000), [path], read)


# --- Edits that keep the form, by Hypothesis ------------------------------------------------------


def description_of_a_dataset(folder: Path, dataset: Path) -> Files:
    """Without its hash, as if the edit was made before it was written."""
    shutil.copytree(dataset, folder)
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    path.write_text(json.dumps(meta))
    tokens = content(Dataset.open(folder))[:2]

    def read() -> None:
        found = content(Dataset.open(folder))
        assert found[:2] == tokens
        assert math.isfinite(found[3])

    return [path], read


def edited_files(
    kind: str, folder: Path, datasets: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> Files:
    match kind:
        case "record of checkpoints":
            checkpoint.save(folder, state_of(tokenizers["char"]), ["last", "best"])
            return record_of_checkpoints(folder)
        case "log":
            return log(folder)
        case "config":
            return config(folder)
        case "meta.json":
            return description_of_a_dataset(folder / "dataset", datasets["char"])
        case "folder of the hub":
            return folder_of_the_hub(folder / "hub", tokenizers["char"], "gpt2")
    return folder_of_the_hub(folder / "hub", tokenizers["bpe"], "modern")


@contextlib.contextmanager
def another_error_everywhere() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (files, cli, data.loader):
            stack.enter_context(raising_another_error(module))
        yield


KINDS = (
    "record of checkpoints",
    "log",
    "config",
    "meta.json",
    "folder of the hub",
    "modern folder",
)


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.promise(controls=[another_error_everywhere])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_edited_in_its_own_form_is_refused_or_leads_to_what_it_should(
    kind: str, cases: Cases, tmp_path: Path, datasets: Any, tokenizers: Any
):
    survive_edits(cases, 20, 2_000, *edited_files(kind, tmp_path, datasets, tokenizers))


halves_kept = broken("halves_kept", data.tokenizer, "well_formed", lambda text: text)


@pytest.mark.promise(controls=[halves_kept])
def test_any_text_comes_back_from_the_command_line_and_from_a_tokenizer_that_has_its_letters(
    cases: Cases, tokenizers: dict[str, Tokenizer]
):
    def check(text: str) -> None:
        flags = cli.parse_config(sample.SampleConfig, [f"--prompt={text}"])
        assert flags.prompt == text
        joined = json.loads(json.dumps(text))  # which joins halves of a character
        for kind in ("byte", "bpe"):
            whole = re.sub("[\ud800-\udfff]", "\ufffd", joined)
            assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == whole
        char = tokenizers["char"]
        if set(text) <= set(char.state()["characters"]):
            assert char.decode(char.encode(text)) == text
        else:
            with pytest.raises(ValueError, match="the character vocabulary lacks"):
                char.encode(text)

    drawn(cases, 40, 5_000, TEXT | FEW_LETTERS, check)


@pytest.mark.promise(controls=[functools.partial(raising_another_error, prompts)])
def test_any_bytes_are_refused_as_a_file_of_prompts_or_have_some(cases: Cases, tmp_path: Path):
    def check(content: bytes) -> None:
        for path in (tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"):
            path.write_bytes(content)
            check_read(functools.partial(read, path), f"{path.name} as {content!r}")

    def read(path: Path) -> None:
        found = prompts.read_prompts(path)
        assert found
        assert all(isinstance(prompt, str) and prompt for prompt in found)

    lines = st.lists(TEXT.map(lambda text: json.dumps({"prompt": text}))).map("\n".join)
    texts = (lines | TEXT).map(lambda text: text.encode(errors="replace"))
    drawn(cases, 40, 5_000, texts | st.binary(max_size=40), check)
