"""The precision that sampling takes by itself: as good as float32, and faster."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sample
from data.tokenizer import ByteTokenizer
from helpers import run_here, train_here, write_tiny
from sampling import fastest
from sampling.fastest import FILE, NOT_TRIED
from sampling.load import Trained, load_model
from sampling.precision import convert


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    train_here(write_tiny(tmp_path), tmp_path / "run", "--max_steps=4")
    return tmp_path / "run"


@pytest.fixture
def trained(run_dir: Path) -> Trained:
    return load_model(run_dir, device="cpu")


def results(monkeypatch: pytest.MonkeyPatch, *found: tuple[float, float]) -> list[int]:
    """Let the trials of float32, float16 and int8 find these losses and tokens/s."""
    calls: list[int] = []

    def trial(*_: Any) -> dict[str, float]:
        loss, rate = found[len(calls) % len(found)]
        calls.append(1)
        return {"loss": loss, "tokens/s": rate}

    kinds = ["float32", "float16", "bfloat16", "int8"]
    monkeypatch.setattr(fastest, "available", lambda _: kinds)
    monkeypatch.setattr(fastest, "convert", lambda model, _: model)
    monkeypatch.setattr(fastest, "trial", trial)
    return calls


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(2.0, 100), (2.0001, 150), (2.0009, 190)], "int8"),
        ([(2.0, 100), (2.0001, 150), (2.0011, 190)], "float16"),
        ([(2.0, 100), (2.0001, 150), (1.9988, 190)], "float16"),  # better by chance is no better
        ([(2.0, 100), (2.0001, 109), (2.0001, 90)], "float32"),
        ([(2.0, 100), (2.0020, 150), (float("nan"), 190)], "float32"),
    ],
)
def test_the_fastest_is_taken_of_those_that_keep_the_loss(
    found: Any,
    expected: str,
    trained: Trained,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    results(monkeypatch, *found)
    capsys.readouterr()
    assert fastest.fastest(trained, run_dir) == expected
    assert f"\nprecision: {expected}" in capsys.readouterr().err


def test_it_is_measured_once_for_each_checkpoint_and_machine(
    trained: Trained, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = results(monkeypatch, (2.0, 100), (2.0, 150), (2.0, 190))
    for _ in range(3):
        assert fastest.fastest(trained, run_dir) == "int8"
    assert len(calls) == 3
    fastest.fastest(trained._replace(step=3), run_dir)
    assert len(calls) == 6
    for damage in ("", "[1]", "{}", '{"of": 1, "precision": "int8"}'):
        (run_dir / FILE).write_text(damage)
        assert fastest.fastest(trained, run_dir) == "int8"
    assert len(calls) == 18


def test_what_is_found_is_that_of_the_converted_models(trained: Trained, run_dir: Path):
    fastest.fastest(trained, run_dir)
    tried = json.loads((run_dir / FILE).read_text())["tried"]
    assert "float32" in tried
    assert all(0 < one["tokens/s"] < 1e7 for one in tried.values())
    losses = {kind: one["loss"] for kind, one in tried.items()}
    assert all(abs(loss - losses["float32"]) < 0.05 for loss in losses.values())
    assert len(set(losses.values())) == len(losses)
    convert(trained.model, "float32")  # the model itself is as it was


def test_sampling_says_what_it_takes_and_keeps_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    flags = (f"--out_dir={run_dir}", "--max_new_tokens=5")
    capsys.readouterr()
    said = []
    for _ in range(2):
        assert run_here(sample.main, "sample.py", *flags) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert said[0].err == "trying precisions on the run's validation text, once ...\n" + said[1].err
    assert said[1].err.startswith("precision: ")
    assert not said[1].err.startswith(NOT_TRIED)
    assert (run_dir / FILE).exists()


@pytest.mark.parametrize("is_gone", [True, False])
def test_without_the_validation_text_it_is_float32(
    is_gone: bool, trained: Trained, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    if is_gone:
        shutil.rmtree(run_dir.parent / "char")
    else:  # another dataset has taken its place
        trained = trained._replace(tokenizer=ByteTokenizer())
    capsys.readouterr()
    assert fastest.fastest(trained, run_dir) == "float32"
    reason = "is not a prepared dataset" if is_gone else "has another tokenizer"
    said = capsys.readouterr().err
    assert said.startswith(NOT_TRIED)
    assert reason in said
    assert not (run_dir / FILE).exists()
