"""Runs that are killed at random moments, again and again, end as an undisturbed one."""

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import train
from engine import resume
from helpers import finish, outcome, start, start_many, wait_for_lines
from promises import Cases

LONG = ("--max_steps=40", "--eval_every=2", "--auto_resume")  # with 20 checkpoints
script = ["train"]  # what is killed; a control puts a broken one in its place


def train_with_momentum_of_zero() -> None:
    """train.py, where the momentum is lost when a run goes on."""
    unpack = resume.unpack

    def without_momentum(state: dict[str, Any], model: Any, optimizers: list[Any]) -> None:
        unpack(state, model, optimizers)
        for optimizer in optimizers:
            for tensors in optimizer.state.values():
                for tensor in tensors:
                    tensor.zero_()

    resume.unpack = without_momentum
    train.main()


def train_with_the_data_of_another_step() -> None:
    """train.py, which goes on with the batch that follows the right one."""
    restore = train.resume.restore

    def shifted(run: Any, origin: Any) -> Any:
        progress = restore(run, origin)
        batch = run.batches.batch
        run.batches.batch = lambda step: batch(step + (progress.step > 0))
        return progress

    resume.restore = shifted
    train.main()


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    script[0] = f"test_kills:{name}"
    yield
    script[0] = "train"


def momentum_not_restored() -> contextlib.AbstractContextManager[None]:
    return broken("train_with_momentum_of_zero")


def step_shifted_by_one() -> contextlib.AbstractContextManager[None]:
    return broken("train_with_the_data_of_another_step")


def begin(n_processes: int, *arguments: Any, output: Path) -> list[BaseProcess]:
    if n_processes == 1:
        return [start(*arguments, output=output)]
    return start_many(n_processes, *arguments, output=output)


def all_finished(processes: list[BaseProcess]) -> list[int | None]:
    return [finish(process) for process in processes]


@pytest.mark.slow
@pytest.mark.promise(controls=[momentum_not_restored, step_shifted_by_one])
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(
    n_processes: int, cases: Cases, tiny: Path, tmp_path: Path
):
    log = tmp_path / "log"
    run = partial(begin, n_processes, output=log)
    for name in ("first", "undisturbed"):  # the first one also starts the server of processes
        started_at = time.monotonic()
        assert set(all_finished(run("train", tiny, f"--out_dir={tmp_path / name}", *LONG))) == {0}
    seconds = time.monotonic() - started_at
    expected = outcome(tmp_path / "undisturbed")
    arguments = (tiny, f"--out_dir={tmp_path / 'run'}", *LONG)
    rng = random.Random(n_processes)
    wanted = (200 if n_processes == 1 else 60) if cases.is_full else 2
    for case in range(4 * wanted):
        processes = run(script[0], *arguments)
        if case == 0:  # has it been saved? Else no control would be noticed
            wait_for_lines(tmp_path / "run/metrics.jsonl", 20)
        else:
            time.sleep(rng.uniform(0.1, 0.9) * seconds)
        for process in processes:
            process.kill()
        codes = set(all_finished(processes))
        assert codes <= {0, -signal.SIGKILL, 2}, log.read_text()
        cases.count += -signal.SIGKILL in codes  # else it had ended before
        if case % 3 == 2 or cases.count == wanted:
            codes = set(all_finished(run(script[0], *arguments)))
            assert codes == {0}, log.read_text()
            assert outcome(tmp_path / "run") == expected
            assert not list((tmp_path / "run").glob("*.partial"))
            (tmp_path / "run").rename(tmp_path / f"run{case}")
        if cases.count == wanted:
            break
    assert cases.count == wanted
