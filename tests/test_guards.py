"""What a run notices while it trains, each shown by a planted fault."""

import json
import math
import os
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import files
import train
from engine import checkpoint, guards, metrics
from engine.guards import RECENT, SPIKE, Repeated, Spikes
from helpers import (
    contents,
    finish,
    losses,
    outcome,
    start,
    start_two,
    train_here,
)


@pytest.fixture
def interrupted(tiny: Path, undisturbed: Path, tmp_path: Path) -> Path:
    """A run that was killed after step 10, and has a checkpoint of step 8."""
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    config = (path / "config.toml").read_text().replace(str(undisturbed), str(path))
    (path / "config.toml").write_text(config)
    state = checkpoint.load(path, "previous")
    assert state["step"] == 8
    (path / checkpoint.RECORD).unlink()
    checkpoint.save(path, state, ["last", "best"])
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:-3]))
    return path


# --- Steps that are done once more ----------------------------------------------------------------


def test_a_run_that_goes_on_as_it_was_is_not_disturbed(
    tiny: Path, interrupted: Path, undisturbed: Path
):
    train_here(tiny, interrupted, "--resume")
    assert losses(interrupted) == losses(undisturbed)


def test_a_run_that_goes_on_with_a_lost_optimizer_stops_once_and_says_so(
    tiny: Path, interrupted: Path
):
    state = checkpoint.load(interrupted, "last")
    for optimizer in state["optimizers"]:
        for tensors in optimizer.values():
            for tensor in tensors[:2]:
                tensor.zero_()
    checkpoint.save(interrupted, state, ["last"])
    with pytest.raises(ArithmeticError, match=r"step \d+ has a loss of .* it was .* once more"):
        train_here(tiny, interrupted, "--resume")
    train_here(tiny, interrupted, "--resume")
    assert len(losses(interrupted)) > 12


def test_a_run_that_goes_on_with_the_data_of_another_step_stops(
    tiny: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    batch = train.Batches.batch
    monkeypatch.setattr(train.Batches, "batch", lambda self, step: batch(self, step + 1))
    with pytest.raises(ArithmeticError, match="step 8 has a loss of"):
        train_here(tiny, interrupted, "--resume")


def test_a_run_that_goes_on_with_other_settings_is_not_compared(tiny: Path, interrupted: Path):
    train_here(tiny, interrupted, "--resume", "--optim.learning_rate=1e-4")
    assert len(losses(interrupted)) > 12


def test_losses_are_compared_as_closely_as_their_precision_allows():
    lines = [{"step": 3.0, "train_loss": 2.0}, {"step": 4.0, "val_loss": 9.0}]
    for precision, near, far in (("float32", 2.0009, 2.0011), ("bfloat16", 2.009, 2.011)):
        repeated = Repeated(lines, precision)
        repeated.check(3, near)
        repeated.check(4, 1.0)
        with pytest.raises(ArithmeticError):
            repeated.check(3, far)


# --- Numbers --------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the gradients of some steps infinite."""
    real = train.accumulate_gradients

    def poisoned(run: train.Run, batch: tuple[Tensor, ...]) -> Tensor:
        loss = real(run, batch)
        if run.progress.step in steps:
            for parameter in run.model.parameters():
                parameter.grad = torch.full_like(parameter, math.inf)
        return loss

    monkeypatch.setattr(train, "accumulate_gradients", poisoned)


def test_updates_that_are_not_finite_are_skipped_and_counted_if_asked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    poison(monkeypatch, 3, 4, 9)
    train_here(tiny, tmp_path / "run", "--on_nonfinite=skip")
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    skipped = [line for line in lines if "skipped_updates" in line]
    assert [(line["step"], line["skipped_updates"]) for line in skipped] == [(3, 1), (4, 2), (9, 3)]
    assert all("train_loss" not in line for line in skipped)
    assert "step      4: skipped, as loss or gradient is not finite" in capsys.readouterr().out
    weights = checkpoint.load(tmp_path / "run", "last")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_skipped_update_changes_nothing_at_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, 4)
    flags = ("--max_steps=5", "--eval_every=1", "--keep_every=1", "--on_nonfinite=skip")
    train_here(tiny, tmp_path / "run", *flags)
    before, after = (checkpoint.load(tmp_path / "run", f"step_{n}")["model"] for n in (4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_whose_updates_are_never_finite_ends_all_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, *range(100))
    with pytest.raises(ArithmeticError, match="after step 9 a number is not finite"):
        train_here(tiny, tmp_path / "run", "--on_nonfinite=skip")


def test_a_loss_far_above_the_recent_ones_is_a_spike_and_no_other():
    spikes = Spikes()
    rng = np.random.default_rng(0)
    heights = [spikes.height(3 + 0.1 * float(rng.standard_normal())) for _ in range(2000)]
    assert heights[:RECENT] == [0.0] * RECENT
    assert max(heights) < SPIKE
    recent = [spikes.recent[i] for i in range(RECENT)]
    exact = (3.3 - statistics.fmean(recent)) / statistics.pstdev(recent)
    assert spikes.height(3.3) == pytest.approx(exact, rel=1e-9)
    assert spikes.height(3.8) > SPIKE
    assert spikes.height(2.0) < 0


# --- Devices --------------------------------------------------------------------------------------


def test_computing_gradients_twice_changes_no_bit_of_a_run(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    train_here(tiny, tmp_path / "run", "--verify_every=1")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_a_gradient_that_differs_by_a_bit_when_it_is_computed_again_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = train.accumulate_gradients, []

    def flipped(run: train.Run, batch: tuple[Tensor, ...]) -> Tensor:
        calls.append(run.progress.step)
        loss = real(run, batch)
        if calls.count(6) == 2:
            run.model.wte.weight.grad.view(torch.int32)[0, 0] ^= 1  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(train, "accumulate_gradients", flipped)
    with pytest.raises(ArithmeticError, match="after step 6 the same gradients were"):
        train_here(tiny, tmp_path / "run", "--verify_every=3")
    assert calls == [0, 0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4


def test_where_a_step_takes_far_longer_than_the_others_it_says_where_each_thread_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(guards, "LEAST_SECONDS", 0.4)
    watch = guards.Watch()

    def step_that_hangs(seconds: float) -> None:
        watch.begin()
        time.sleep(seconds)

    step_that_hangs(1)  # the first ones may compile
    for _ in range(RECENT):
        step_that_hangs(0)
    watch.rest()
    time.sleep(1)  # an evaluation
    assert capfd.readouterr().err == ""
    step_that_hangs(1)
    assert re.search(r"Timeout.*in step_that_hangs", capfd.readouterr().err, re.S)
    watch.rest()


def test_a_run_that_fails_leaves_no_timer_behind(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def update(run: train.Run, batch: Any) -> None:
        if run.progress.step == 3:
            raise ValueError("it fails")
        real_update(run, batch)

    real_update = train.update
    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(guards, "RECENT", 1)  # after which steps are watched
    monkeypatch.setattr(guards, "LEAST_SECONDS", 0.4)
    with pytest.raises(ValueError, match="it fails"):
        train_here(tiny, tmp_path / "run")
    time.sleep(1)
    assert "Timeout" not in capfd.readouterr().err


# --- Processes ------------------------------------------------------------------------------------


def train_with_a_flipped_bit() -> None:
    """train.py, where a bit of one process's weights flips at step 6."""
    update = train.update

    def flipped(run: train.Run, batch: tuple[Tensor, ...]) -> None:
        update(run, batch)
        if run.world.rank == 1 and run.progress.step == 6:
            weight = run.model.wte.weight.detach()
            weight.view(torch.int32)[0, 0] ^= 1

    train.update = flipped
    train.main()


def test_processes_whose_copies_differ_by_a_bit_stop_and_name_the_strange_one(
    tiny: Path, tmp_path: Path
):
    log = tmp_path / "log"
    arguments = (tiny, f"--out_dir={tmp_path / 'run'}", "--optim.name=adamw")
    script = "test_guards:train_with_a_flipped_bit"
    processes = start_two(script, *arguments, "--micro_batch_size=1", output=log)
    assert [finish(process) for process in processes] == [2, 2], log.read_text()
    said = log.read_text()
    assert said.count("after step 8 processes [1] have different weights from the first ") == 2
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4


def test_a_second_run_in_the_folder_of_one_that_is_running_is_refused(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    out_dir, logs = tmp_path / "run", [tmp_path / "log_a", tmp_path / "log_b"]
    first = start("train", tiny, f"--out_dir={out_dir}", "--max_steps=100000", output=logs[0])
    while not (out_dir / "checkpoints.json").exists():
        assert first.is_alive(), logs[0].read_text()
    for flags in ((), ("--resume", "--max_steps=100000")):
        second = start("train", tiny, f"--out_dir={out_dir}", *flags, output=logs[1])
        assert finish(second) == 2
    said = logs[1].read_text()
    assert said.count(f"another process is writing to {out_dir}: wait until it has ended") == 2
    os.kill(first.pid or 0, 15)
    assert finish(first) == 143, logs[0].read_text()
    assert len(list(tmp_path.glob("run*"))) == 1  # nobody has moved it
    steps = [json.loads(line)["step"] for line in (out_dir / "metrics.jsonl").open()]
    assert steps == sorted(steps)


def test_a_run_that_comes_a_moment_too_late_leaves_the_config_of_the_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_here(tiny, tmp_path / "run")
    before, locks = contents(tmp_path / "run"), []

    class LateLock(files.Lock):
        def __init__(self, folder: Path) -> None:
            """Another process takes the lock after the first look at it."""
            super().__init__(folder)
            locks.append(folder)
            if len(locks) > 1:
                self.close()
                raise OSError(f"another process is writing to {folder}")

    monkeypatch.setattr(files, "Lock", LateLock)
    with pytest.raises(OSError, match="another process is writing"):
        train_here(tiny, tmp_path / "run", "--resume", "--eval_every=3")
    assert contents(tmp_path / "run") == before


def test_a_finished_run_leaves_its_folder_to_others(tiny: Path, tmp_path: Path):
    for _ in range(2):
        train_here(tiny, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "run_1")
    assert re.fullmatch(r"run(_1)?", next(tmp_path.glob("run*")).name)
