"""Worlds, sums and signals in one process; test_train.py has the runs in several."""

import contextlib
import os
import shutil
import signal
import sys
import sysconfig
import time
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import train
from cli import parse_config
from engine import parallel
from engine.loss import LossModel, loss_and_gradients
from engine.parallel import StopRequest, World, mix_seed, seed_dropout
from helpers import PLAIN, SERVER, finish, signal_handlers_kept, write_tiny
from model import GPT, ModelConfig

CPU = torch.device("cpu")


# --- Processes ------------------------------------------------------------------------------------


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


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Let torch take this process for the second of two; what it asks of the first is noted."""
    asked: list[tuple[str, Any]] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def all_reduce(values: Tensor) -> None:
        asked.append(("sum", tuple(values.shape)))
        values.mul_(2)  # the other process has the same

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    for name in ("init_process_group", "new_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *args, name=name, **_: asked.append((name, args)))
    return asked


def test_processes_join_and_leave_together(two: list[tuple[str, Any]]):
    with parallel.world("cpu") as world:
        assert (world.device, world.rank, world.size) == (CPU, 1, 2)
        assert two == [("init_process_group", ("gloo",)), ("new_group", ())]
        world.wait_for_all()
        assert two[2:] == [("barrier", ())]
    assert two[3:] == [("barrier", ()), ("destroy_process_group", ())]


def test_a_process_that_fails_waits_for_no_other(two: list[tuple[str, Any]]):
    with pytest.raises(ValueError, match="a fault"), parallel.world("cpu"):
        raise ValueError("a fault")
    names = [name for name, _ in two]
    assert names == ["init_process_group", "new_group", "destroy_process_group"]


class Replica:
    """Stands for DDP, which knows itself."""

    itself: "Replica"


@pytest.mark.parametrize("error", [None, ValueError("a fault"), SystemExit(143)])
def test_a_run_is_freed_before_its_processes_part(
    two: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, error: BaseException | None
):
    """Else torch frees the replica's group at exit while it holds Python's lock, for which a thread
    of that group may wait: then the process hangs."""
    replicas: list[Any] = []

    def run() -> None:
        replica = Replica()
        replica.itself = replica
        replicas.append(weakref.ref(replica))
        if error is not None:
            raise error

    def part() -> None:
        two.append(("part", replicas[0]() is None))

    monkeypatch.setattr(dist, "destroy_process_group", part)
    with contextlib.suppress(ValueError, SystemExit), parallel.world("cpu"):
        run()
    assert two[-1] == ("part", True)


def test_a_sum_over_two_processes_leaves_the_tensor_that_was_given(two: list[tuple[str, Any]]):
    values = torch.tensor([1.5, -2.0])
    assert World(CPU, rank=1, size=2).sum(values).tolist() == [3.0, -4.0]
    assert values.tolist() == [1.5, -2.0]
    assert two == [("sum", (2,))]


def test_a_step_asks_the_other_processes_once_with_a_vector_of_two_numbers(
    two: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = [str(write_tiny(tmp_path)), f"--out_dir={tmp_path / 'run'}", *PLAIN]
    config = parse_config(train.TrainConfig, [*arguments, "--max_steps=3", "--eval_every=2"])
    with signal_handlers_kept():
        train.train(config, World(CPU, rank=0, size=2), StopRequest())
    # Shall we stop? Then the losses and their number, and again: shall we stop?
    evaluation = [("sum", ()), ("sum", (2,)), ("sum", ())]
    assert two == [("sum", (2,))] * 2 + evaluation + [("sum", (2,))] + evaluation


# --- Compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_are_compiled_and_on_a_gpu_the_loss_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    model = GPT(ModelConfig(vocab_size=5, context_length=4, n_layer=2, n_head=1, n_embd=8))
    loss_model = LossModel(model, torch.float32)
    found: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: found.append(module))
    monkeypatch.setattr(torch, "compile", lambda function: found.append(function))
    monkeypatch.setenv("CXX", sys.executable)  # neither a compiler nor a header need be there
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    loss_model.compile_parts(torch.device(device))
    assert found == [*model.blocks, *([loss_and_gradients] if device == "cuda" else [])]


def test_without_a_compiler_a_model_is_not_compiled_and_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = GPT(ModelConfig(vocab_size=5, context_length=4, n_layer=2, n_head=1, n_embd=8))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="compile needs a C\\+\\+ compiler: install no-such-compiler"
    ):
        LossModel(model, torch.float32).compile_parts(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the header elsewhere")
def test_without_pythons_header_a_model_is_not_compiled_and_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = GPT(ModelConfig(vocab_size=5, context_length=4, n_layer=2, n_head=1, n_embd=8))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"compile needs .*Python\.h: install .*python3-dev"):
        LossModel(model, torch.float32).compile_parts(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiled_loss_of_a_chunk_and_its_gradients_are_those_of_the_plain_one():
    torch.manual_seed(0)
    x_nC, weight_VC, targets_n = torch.randn(12, 8), torch.randn(20, 8), torch.arange(12)
    targets_n[3] = -100
    plain = loss_and_gradients(x_nC, weight_VC, targets_n)
    compiled = torch.compile(loss_and_gradients)(x_nC, weight_VC, targets_n)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)


# --- Seeds ----------------------------------------------------------------------------------------


def masks(seed: int, step: int, rank: int) -> list[float]:
    seed_dropout(seed, step, World(CPU, rank, size=4))
    return torch.rand(8).tolist()


def test_dropout_is_the_same_for_the_same_seed_step_and_rank():
    first = masks(1, 2, 3)
    torch.rand(5)
    assert masks(1, 2, 3) == first


def test_dropout_differs_between_seeds_steps_and_ranks():
    cases = [(seed, step, rank) for seed in range(3) for step in range(9) for rank in range(4)]
    assert len({tuple(masks(*case)) for case in cases}) == len(cases)


def test_mixed_seeds_share_about_half_of_their_bits_with_those_of_neighbours():
    seeds = [mix_seed(1337, step, rank) for step in range(50) for rank in range(4)]
    different = [(a ^ b).bit_count() for a in seeds for b in seeds if a != b]
    assert min(different) > 15
    assert max(different) < 49
    assert sum(different) / len(different) == pytest.approx(32, abs=0.5)


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_nothing_else(number: signal.Signals):
    with signal_handlers_kept():
        stop = StopRequest()
        assert not stop.agree(World(CPU))
        signal.raise_signal(number)
        assert not stop.is_agreed
        assert stop.agree(World(CPU))
        assert stop.is_agreed
        assert stop.exit_code == 128 + number
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == stop._note


def test_the_exit_code_is_that_of_the_first_signal():
    with signal_handlers_kept():
        stop = StopRequest()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 130


def test_a_process_that_another_one_told_to_stop_exits_as_by_sigterm():
    with signal_handlers_kept():
        assert StopRequest().exit_code == 143


def test_what_was_agreed_is_not_forgotten():
    with signal_handlers_kept():
        stop = StopRequest()
        stop.is_agreed = True
        assert stop.agree(World(CPU))


def wait_for_signals(log: Path) -> None:
    """Note each signal that a StopRequest takes, until a second has passed without one."""
    stop = StopRequest()
    log.write_text("ready ")
    seen = None
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if stop.signal != seen:
            seen, until = stop.signal, time.monotonic() + 1
            log.write_text("asked ")
        time.sleep(0.01)


def wait_for_text(path: Path, text: str) -> None:
    for _ in range(6000):
        if path.exists() and path.read_text() == text:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{path} does not hold {text!r}")


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[BaseProcess]:
    """A process that is ready to be asked to stop, and then has a second's work to do."""
    process = SERVER.Process(target=wait_for_signals, args=(tmp_path / "log",))
    process.start()
    wait_for_text(tmp_path / "log", "ready ")
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_kills(asked: BaseProcess, tmp_path: Path, first: signal.Signals):
    os.kill(asked.pid or 0, first)
    wait_for_text(tmp_path / "log", "asked ")
    os.kill(asked.pid or 0, signal.SIGINT)
    assert finish(asked) == -signal.SIGINT


def test_no_sigterm_kills_who_was_asked_to_stop_already(asked: BaseProcess, tmp_path: Path):
    os.kill(asked.pid or 0, signal.SIGTERM)  # a scheduler's
    wait_for_text(tmp_path / "log", "asked ")
    for _ in range(2):  # torchrun's, and one more
        os.kill(asked.pid or 0, signal.SIGTERM)
    assert finish(asked) == 0
