"""Which device, what it is good at, and that nothing in the loop waits for it."""

import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from cli import parse_config
from engine import checkpoint, device, kernels, metrics, resume
from engine.device import (
    HostCopy,
    Prefetch,
    choose_precision,
    find_device,
    has_bfloat16,
    keep_freed_memory,
)
from engine.parallel import StopRequest, World
from helpers import (
    PLAIN,
    SERVER,
    finish,
    losses,
    signal_handlers_kept,
    train_here,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

# --- Which ----------------------------------------------------------------------------------------


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


def test_precision_is_what_was_asked_or_what_the_hardware_multiplies(
    monkeypatch: pytest.MonkeyPatch,
):
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(device, "has_bfloat16", lambda device, has=has: has)
        assert choose_precision("auto", CPU) == expected
        assert choose_precision("float32", CPU) == "float32"
        assert choose_precision("bfloat16", CPU) == "bfloat16"


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "avx2"])
def test_a_cpu_multiplies_bfloat16_if_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True, "sse4_1": True})
    for is_used in (True, False):  # by torch's library, whatever this machine has
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda used=is_used: used
        )
        assert has_bfloat16(CPU) == (is_used and name != "avx2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: False})
    assert not has_bfloat16(CPU)


def test_a_gpu_that_only_emulates_bfloat16_does_not_count(monkeypatch: pytest.MonkeyPatch):
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert not has_bfloat16(CUDA)
    assert not has_bfloat16(torch.device("mps"))


def count_faults(path: Path) -> None:
    """Write down how often a process asks the kernel for a page while it makes 20 tensors."""
    keep_freed_memory()
    counts = []
    for _ in range(2):
        for _ in range(20):
            torch.ones(10_000_000)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    path.write_text(str(counts[1] - counts[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="malloc's settings are those of Linux")
def test_the_memory_of_a_freed_tensor_is_used_again_without_asking_the_kernel(tmp_path: Path):
    process = SERVER.Process(target=count_faults, args=(tmp_path / "faults",))
    process.start()
    assert finish(process) == 0
    assert int((tmp_path / "faults").read_text()) < 1000  # 800 MB in pages of 4 kB: 200,000


# --- Batches ahead --------------------------------------------------------------------------------


def test_the_next_batch_is_made_while_the_device_works_and_each_only_once():
    made: list[int] = []

    def make(step: int) -> tuple[Tensor, ...]:
        made.append(step)
        return (torch.tensor(step), torch.tensor(-step))

    fetch = Prefetch(make, CPU)
    assert [tensor.item() for tensor in fetch.batch(3)] == [3, -3]
    fetch.ready[4].result()
    assert made == [3, 4]
    assert [tensor.item() for tensor in fetch.batch(4)] == [4, -4]
    assert [tensor.item() for tensor in fetch.batch(9)] == [9, -9]
    fetch.thread.shutdown()
    assert made == [3, 4, 5, 9, 10]


def test_an_error_in_making_a_batch_reaches_the_loop():
    def make(step: int) -> tuple[Tensor, ...]:
        raise ValueError("a damaged file")

    with pytest.raises(ValueError, match="a damaged file"):
        Prefetch(make, CPU).batch(0)


class Waiting:
    """A tensor on the host that notes how it is sent."""

    def __init__(self, said: str = "") -> None:
        self.said = said

    def pin_memory(self) -> "Waiting":
        return Waiting("pinned")

    def to(self, device: torch.device, non_blocking: bool) -> str:
        return f"{self.said} to {device.type}, {'at once' if non_blocking else 'waiting'}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda", "pinned to cuda, at once"),
        ("mps", " to mps, waiting"),  # https://github.com/pytorch/pytorch/issues/189690
        ("cpu", " to cpu, waiting"),
    ],
)
def test_only_cuda_reads_the_memory_of_the_host_later(name: str, expected: str):
    tensor: Any = Waiting()
    assert device.sent(tensor, torch.device(name)) == expected


# --- Numbers later --------------------------------------------------------------------------------


def test_on_a_cpu_numbers_are_there_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("a CPU has no events"))
    assert HostCopy(torch.tensor((1.0, 2.0))).read().tolist() == [1.0, 2.0]


def test_a_gpu_is_waited_for_until_the_copy_is_made_and_no_longer(monkeypatch: pytest.MonkeyPatch):
    queue: list[str] = []  # what the GPU has been given to do, in order
    waited_for: list[list[str]] = []

    class OnGPU:
        """A tensor of a GPU, as HostCopy uses it."""

        device = CUDA

        def to(self, where: str, non_blocking: bool) -> Tensor:
            assert (where, non_blocking) == ("cpu", True)
            queue.append("copy")
            return torch.tensor((1.0, 2.0))

    def record_event() -> Any:
        before = list(queue)
        return SimpleNamespace(synchronize=lambda: waited_for.append(before))

    stream = SimpleNamespace(record_event=record_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    queue.append("update 1")
    on_gpu: Any = OnGPU()
    numbers = HostCopy(on_gpu)
    queue.append("update 2")
    assert waited_for == []
    assert numbers.read().tolist() == [1.0, 2.0]
    assert waited_for == [["update 1", "copy"]]


# --- A run as on a GPU ----------------------------------------------------------------------------


class FakeCUDA(str):
    """A device that torch takes for the CPU, and the code of a run for a GPU."""

    type = "cuda"


class LateCopy(HostCopy):
    """Numbers that stay on the device until they are read, as a GPU's do."""

    events: list[tuple[str, int]]

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.clone())  # what a graph returned is overwritten
        self.number = sum(name == "given" for name, _ in self.events)
        self.events.append(("given", self.number))

    def read(self) -> Tensor:
        self.events.append(("read", self.number))
        return super().read()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, graphs: None) -> Iterator[Any]:
    """Let the CPU pass for a GPU; its updates are noted when given to it, and when read."""
    monkeypatch.setattr(LateCopy, "events", [], raising=False)
    monkeypatch.setattr(train, "HostCopy", LateCopy)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    card = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with signal_handlers_kept():
        yield FakeCUDA("cpu")


def parsed(config: Path, out_dir: Path, *flags: str) -> train.TrainConfig:
    """The config of a run without dropout."""
    return parse_config(train.TrainConfig, [str(config), f"--out_dir={out_dir}", *PLAIN, *flags])


def test_a_gpu_has_the_next_update_to_do_before_the_numbers_of_one_are_read(
    tiny: Path, tmp_path: Path, gpu: Any
):
    flags = ("--max_steps=6", "--eval_every=3", "--precision=bfloat16")
    train.train(parsed(tiny, tmp_path / "run", *flags), World(gpu), StopRequest())
    expected: list[tuple[str, int]] = []
    for first in (0, 3):  # an evaluation after three updates waits for the last of them
        expected += [("given", first), ("given", first + 1), ("read", first)]
        expected += [("given", first + 2), ("read", first + 1), ("read", first + 2)]
    assert LateCopy.events == expected
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    updates = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in updates] == [0, 1, 2, 3, 4, 5]
    assert all(line["peak_memory_bytes"] == 7 and line["mfu"] > 0 for line in updates)


def test_a_run_whose_numbers_come_late_has_the_losses_of_one_that_waits(
    tiny: Path, tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "use_kernels", lambda model: None)  # a CPU's, and round otherwise
    train.train(parsed(tiny, tmp_path / "late"), World(gpu), StopRequest())
    train_here(tiny, tmp_path / "at_once", *PLAIN)
    assert losses(tmp_path / "late") == losses(tmp_path / "at_once")


@pytest.mark.parametrize("flags", [["--eval_every=2"], ["--eval_every=9", "--keep_every=2"]])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_update_that_is_not_finite_is_noticed_before_anything_is_saved_although_read_late(
    tiny: Path,
    tmp_path: Path,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    flags: list[str],
):
    def poisoned(run: train.Run, batch: Any) -> Tensor:
        loss = accumulate_gradients(run, batch)
        return loss * torch.nan if run.progress.step == step else loss

    accumulate_gradients = train.accumulate_gradients
    monkeypatch.setattr(train, "accumulate_gradients", poisoned)
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda _, state, __: saved.append(state["step"]))
    with pytest.raises(ArithmeticError, match=rf"after step {step} a number is not finite"):
        train.train(parsed(tiny, tmp_path / "run", *flags), World(gpu), StopRequest())
    assert [at for at in saved if at > 0] == [at for at in (2, 4) if at <= step]


class Pair(World):
    """One of two processes, which are threads here: they meet to add up what they have."""

    meeting: threading.Barrier
    brought: list[Tensor]

    def sum(self, values: Tensor) -> Tensor:
        self.brought[self.rank] = values
        self.meeting.wait(20)
        total = self.brought[0] + self.brought[1]
        self.meeting.wait(20)
        return total

    def wait_for_all(self) -> None:
        self.meeting.wait(20)


@pytest.mark.parametrize(
    ("asked_in", "asked_rank", "left_at"),
    [
        (0, 1, 2),  # its sum is read during the next update
        (5, 0, 7),
        (5, 1, 7),
        (6, 1, 8),
        (7, 0, 8),  # it is read before the evaluation that comes next
        (11, 1, 12),
    ],
)
def test_processes_whose_numbers_come_late_agree_to_stop_after_the_same_step(
    tiny: Path,
    tmp_path: Path,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    asked_in: int,
    asked_rank: int,
    left_at: int,
):
    monkeypatch.setattr(Pair, "meeting", threading.Barrier(2), raising=False)
    monkeypatch.setattr(Pair, "brought", [torch.empty(0)] * 2, raising=False)
    stops = [StopRequest(), StopRequest()]
    steps: dict[int, int] = {}
    leave, update = resume.leave, train.update

    def noted_leave(run: train.Run) -> None:
        steps[run.world.rank] = run.progress.step
        leave(run)

    def signalled_update(run: train.Run, batch: Any) -> None:
        if (run.progress.step, run.world.rank) == (asked_in, asked_rank):
            run.stop.signal = 15
        update(run, batch)

    monkeypatch.setattr(resume, "leave", noted_leave)
    monkeypatch.setattr(train, "update", signalled_update)
    config, codes = parsed(tiny, tmp_path / "run"), {}

    def process(rank: int) -> None:
        try:
            train.train(config, Pair(gpu, rank, 2), stops[rank])
        except SystemExit as stop:
            codes[rank] = stop.code

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert steps == {0: left_at, 1: left_at}
    assert codes == {0: 143, 1: 143}
