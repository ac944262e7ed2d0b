"""The picture of the loss, and the words at the beginning and the end of a run."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from torch import device, nn

from engine import report
from engine.parallel import World


def write_log(folder: Path, lines: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "train_loss": 3.0}, {"step": 1, "val_loss": 2.0}],
        [{"step": 0, "val_loss": 2.0}],
        [],
    ],
)
def test_the_picture_is_a_png_whatever_was_logged(tmp_path: Path, lines: list[Any]):
    write_log(tmp_path, lines)
    report.plot_loss(tmp_path, {"bigram model": 2.5})
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (840, 480)


def test_both_losses_are_drawn_at_their_steps_and_the_bigram_models_as_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from matplotlib import pyplot

    write_log(tmp_path, [{"step": 0, "train_loss": 3.0}, {"step": 5, "val_loss": 2.0}])
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.plot_loss(tmp_path, {"bigram model": 2.5})
    monkeypatch.undo()
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    pyplot.close(figures[0])
    level = drawn.pop("bigram model")
    assert drawn == {"train_loss": [[0.0, 3.0]], "val_loss": [[5.0, 2.0]]}
    assert {height for _, height in level} == {2.5}


def test_a_run_is_announced_in_tokens_and_epochs(capsys: pytest.CaptureFixture[str]):
    config = {"max_steps": 2000, "batch_size": 12, "model": {"context_length": 64}}
    model, world = nn.ModuleDict({"mlp": nn.Linear(40, 30, bias=False)}), World(device("cpu"))
    parts = report.announce(model, config | {"precision": "float32"}, 1_000_000, world)
    assert parts == {
        "norms": 0,
        "embeddings": 0,
        "attention": 0,
        "mlp": 1200,
        "head": 0,
        "total": 1200,
    }
    assert capsys.readouterr().out.splitlines() == [
        "parameters: 0 norms, 0 embeddings, 0 attention, 1,200 mlp, 0 head, 1,200 total",
        "run: 2,000 steps of 768 tokens, 1.54 epochs",
        "device: 1 x cpu, float32",
    ]


@pytest.mark.parametrize("entropy", [None, 1.25])
def test_the_end_of_a_run_tells_the_distance_to_the_entropy_where_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entropy: float | None
):
    write_log(tmp_path, [{"step": 0, "train_loss": 3.0}])
    report.conclude(tmp_path, 1.28, 2.5, entropy, lambda loss: loss / 2, True)
    said = capsys.readouterr().out
    assert "best validation loss: 1.2800 nats per token, 0.6400 bits per byte" in said
    line = "2.40 % above the entropy of the text, 1.2500 nats per token"
    assert (line in said.splitlines()) == (entropy is not None)
