"""Devices, sums and signals in one process; test_train.py has the runs in several."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine import parallel
from engine.parallel import Prefetch, StopRequest, World, find_device, seed_dropout
from helpers import REPOSITORY, signal_handlers_kept

CPU = torch.device("cpu")

WAIT_FOR_SIGNALS = """
import time
from engine.parallel import StopRequest
stop = StopRequest()
print("ready", flush=True)
while stop.signal is None:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")],
)
def test_auto_is_the_best_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == best
    assert find_device("cpu") == "cpu"


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"device cuda is not available here: .* one of mps, cpu"):
        find_device("cuda")


def test_one_process_is_its_own_world(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with parallel.world("cpu") as world:
        assert (world.device, world.rank, world.size) == (CPU, 0, 1)
        assert world.is_main
        assert world.device_name == "cpu"


def test_a_sum_over_one_process_is_its_own_value():
    values = torch.tensor([1.5, -2.0])
    assert torch.equal(World(CPU).sum(values), values)


def test_other_processes_are_not_the_main_one():
    assert not World(CPU, rank=1, size=2).is_main


def test_precision_is_what_was_asked_or_what_the_hardware_multiplies(
    monkeypatch: pytest.MonkeyPatch,
):
    world = World(CPU)
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(parallel, "has_bfloat16", lambda device, has=has: has)
        assert world.precision("auto") == expected
        assert world.precision("float32") == "float32"


def masks(seed: int, step: int, rank: int) -> list[float]:
    seed_dropout(seed, step, World(CPU, rank, size=4))
    return torch.rand(8).tolist()


def test_dropout_is_the_same_for_the_same_seed_step_and_rank():
    first = masks(1, 2, 3)
    torch.rand(5)
    assert masks(1, 2, 3) == first


def test_dropout_differs_between_seeds_steps_and_ranks():
    cases = [(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)]
    assert len({tuple(masks(*case)) for case in cases}) == len(cases)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_nothing_else(number: signal.Signals):
    with signal_handlers_kept():
        stop = StopRequest()
        assert not stop.on_any_rank(World(CPU))
        signal.raise_signal(number)
        assert stop.on_any_rank(World(CPU))
        assert stop.exit_code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL


def test_a_process_that_another_one_told_to_stop_exits_as_by_sigterm():
    with signal_handlers_kept():
        assert StopRequest().exit_code == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_kills(number: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_SIGNALS],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    assert process.poll() is None
    asked_at = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == -number
    assert time.monotonic() - asked_at < 5
    process.stdout.close()


# --- Batches ahead --------------------------------------------------------------------------------


def test_the_next_batch_is_made_while_the_device_works_and_each_only_once():
    made: list[int] = []

    def make(step: int) -> tuple[torch.Tensor, ...]:
        made.append(step)
        return (torch.tensor(step), torch.tensor(-step))

    fetch = Prefetch(make, torch.device("cpu"))
    assert [tensor.item() for tensor in fetch.batch(3)] == [3, -3]
    fetch.ready[4].result()
    assert made == [3, 4]
    assert [tensor.item() for tensor in fetch.batch(4)] == [4, -4]
    assert [tensor.item() for tensor in fetch.batch(9)] == [9, -9]
    fetch.thread.shutdown()
    assert made == [3, 4, 5, 9, 10]


def test_an_error_in_making_a_batch_reaches_the_loop():
    def make(step: int) -> tuple[torch.Tensor, ...]:
        raise ValueError("a damaged file")

    with pytest.raises(ValueError, match="a damaged file"):
        Prefetch(make, torch.device("cpu")).batch(0)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc's settings are those of Linux")
def test_the_memory_of_a_freed_tensor_is_used_again_without_asking_the_kernel():
    code = """
import resource, torch
from engine.parallel import keep_freed_memory
keep_freed_memory()
def faults():
    for _ in range(20):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(faults() - first)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000  # 20 x 40 MB in pages of 4 kB would be 200,000
