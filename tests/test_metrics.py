"""The log: what is written, what is read of a device and when, and what a resumed run forgets."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.device import HostCopy
from engine.metrics import Metrics, Update, check_finite, forget_from, read
from engine.parallel import StopRequest
from helpers import signal_handlers_kept


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with signal_handlers_kept():
        yield StopRequest()


def an_update(step: int, loss: float = 2.0, grad_norm: float = 1.0, asked: float = 0.0) -> Update:
    numbers = HostCopy(torch.tensor((loss, grad_norm, asked)))
    return Update(step, 0.5, numbers, {"learning_rate": 0.1, "tokens_per_second": 200.0})


def log_three_steps(metrics: Metrics, stop: StopRequest) -> None:
    with contextlib.closing(metrics):
        for step in range(3):
            metrics.evaluation(step, 2.5 - step, 3.5 - step)
            metrics.update(an_update(step))
            metrics.flush(stop)


def test_each_line_is_one_json_object_with_its_numbers(tmp_path: Path, stop: StopRequest):
    log_three_steps(Metrics(tmp_path, 0, 3), stop)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read(tmp_path / "metrics.jsonl")
    evaluation, update = read(tmp_path / "metrics.jsonl")[2:4]
    assert evaluation == {
        "step": 1,
        "val_loss": 1.5,
        "val_bits_per_byte": 2.5,
        "elapsed_seconds": 0.5,
    }
    assert update == {
        "step": 1,
        "train_loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 200.0,
        "elapsed_seconds": 1.0,
    }


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path: Path):
    metrics = Metrics(tmp_path, 0, 3)
    metrics.evaluation(0, 1.0, 2.0)
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    metrics.close()


def test_without_a_folder_nothing_is_logged(
    tmp_path: Path,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, 0, 3)
    log_three_steps(metrics, stop)
    metrics.end(3, "python train.py")
    assert metrics.elapsed_seconds == 1.5
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr()
    assert said.err == ""
    assert "python train.py" not in said.out


def test_updates_are_read_in_their_order_when_asked_and_each_once(
    tmp_path: Path, stop: StopRequest
):
    read_so_far: list[int] = []

    def later(step: int) -> HostCopy:
        """Numbers that note when they are read."""
        numbers = HostCopy(torch.tensor((2.0, 1.0, 0.0)))
        wait: Any = SimpleNamespace(synchronize=lambda: read_so_far.append(step))
        numbers.arrival = wait
        return numbers

    with contextlib.closing(Metrics(tmp_path, 0, 3)) as metrics:
        for step in range(3):
            metrics.update(an_update(step)._replace(numbers=later(step)))
        assert read_so_far == []
        assert read(tmp_path / "metrics.jsonl") == []
        metrics.flush(stop)
        metrics.flush(stop)
    assert read_so_far == [0, 1, 2]
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_process_that_was_asked_to_stop_is_noted_when_the_numbers_are_read(
    tmp_path: Path, stop: StopRequest
):
    with contextlib.closing(Metrics(tmp_path, 0, 3)) as metrics:
        metrics.update(an_update(0))
        metrics.flush(stop)
        assert not stop.is_agreed
        metrics.update(an_update(1, asked=1 / 8))  # one of eight, as the mean tells
        assert not stop.is_agreed
        metrics.flush(stop)
        assert stop.is_agreed
        metrics.update(an_update(2))
        metrics.flush(stop)
    assert stop.is_agreed


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (2.0, math.inf)])
def test_an_update_that_is_not_finite_is_refused_and_not_logged_when_it_is_read(
    tmp_path: Path, stop: StopRequest, loss: float, grad_norm: float
):
    with contextlib.closing(Metrics(tmp_path, 0, 3)) as metrics:
        metrics.update(an_update(0))
        metrics.update(an_update(1, loss, grad_norm))
        with pytest.raises(ArithmeticError, match="after step 1 a number is not finite"):
            metrics.flush(stop)
        with pytest.raises(ArithmeticError, match=r"after step 2 .* \(val_loss=inf\)"):
            metrics.evaluation(2, math.inf, math.inf)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0]


def test_a_resumed_log_forgets_what_it_will_write_again(tmp_path: Path, stop: StopRequest):
    log_three_steps(Metrics(tmp_path, 0, 3), stop)
    before = read(tmp_path / "metrics.jsonl")
    metrics = Metrics(tmp_path, 2, 3, elapsed_seconds=1.0)
    assert read(tmp_path / "metrics.jsonl") == before[:4]
    metrics.update(an_update(2))
    metrics.flush(stop)
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [*before[:4], before[5]]


def test_a_line_that_a_kill_cut_off_is_forgotten(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "val_loss": 1.0}\n{"step": 1, "val_loss": 1.0}\n'
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        forget_from(path, 2)
        assert path.read_text() == "".join(
            line for line in whole[:cut].splitlines(keepends=True) if line.endswith("\n")
        )
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_log_there_is_nothing_to_forget(tmp_path: Path):
    forget_from(tmp_path / "metrics.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loss", "grad_norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, math.nan)],
)
def test_a_number_that_is_not_finite_is_refused_with_its_step(loss: float, grad_norm: float):
    with pytest.raises(ArithmeticError, match=r"step 17 .* not finite .* lower the learning rate"):
        check_finite(17, loss=loss, grad_norm=grad_norm)


def test_finite_numbers_pass():
    check_finite(17, loss=1e30, grad_norm=0.0)
