"""A long run: what it holds stays the same, and pauses change none of its numbers.

python -m pytest -m promise tests/test_soak.py --soak_steps=160000     # two hours
"""

import contextlib
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import REPOSITORY, outcome, write_tiny
from promises import Cases

FLAGS = ("--eval_every=100", "--optim.learning_rate=1e-4", "--samples=0")
FEW_STEPS = 600
LOOK_SECONDS = 0.2
LOOKS_BETWEEN_PAUSES = 8
MOST_PAUSES = 500  # about: a resumed run takes seconds to begin
SCRIPT = """
import sys
sys.path.insert(0, {repository!r})
import cli, train
{more}
cli.run(train.main)
"""
LEAK = """
held, update = [], train.update
def leaking(run, batch):
    update(run, batch)
    part = run.config.max_steps // 500
    held.append({what})
train.update = leaking
"""
more = [""]  # lines of the script, which a control adds


@contextlib.contextmanager
def leak(what: str) -> Iterator[None]:
    more[0] = LEAK.format(what=what)
    yield
    more[0] = ""


def memory_leaks() -> contextlib.AbstractContextManager[None]:
    return leak("bytes(range(250)) * (400_000 // run.config.max_steps)")  # 100 MB in all


def files_stay_open() -> contextlib.AbstractContextManager[None]:
    return leak("run.progress.step % part or open('/dev/null')")  # 500 in all


class Training:
    """A process that trains, and a note of what it held at each look."""

    def __init__(self, out_dir: Path, config: Path, steps: int) -> None:
        self.out_dir = out_dir
        script = out_dir.with_suffix(".py")
        script.write_text(SCRIPT.format(repository=str(REPOSITORY), more=more[0]))
        self.command = [sys.executable, str(script), str(config), f"--out_dir={out_dir}"]
        self.command += [f"--max_steps={steps}", *FLAGS]
        self.held: list[dict[str, float]] = []
        self.start()

    def start(self, *flags: str) -> None:
        with open(self.out_dir.with_suffix(".log"), "a", encoding="utf-8") as log:
            self.process = subprocess.Popen([*self.command, *flags], stdout=log, stderr=log)

    def is_over(self) -> bool:
        if self.process.poll() not in (None, 0):
            raise AssertionError(self.out_dir.with_suffix(".log").read_text())
        return self.process.poll() == 0

    def look(self) -> None:
        """Note MB of memory, open files, threads, and checkpoints on the disk."""
        proc = Path(f"/proc/{self.process.pid}")
        with contextlib.suppress(OSError, KeyError):  # it has not begun, it ends, a file is swept
            (self.out_dir / "metrics.jsonl").stat()
            lines = (proc / "status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            self.held.append(
                {
                    "memory": int(status["VmRSS"].split()[0]) / 2**10,
                    "files": len(list((proc / "fd").iterdir())),
                    "threads": int(status["Threads"]),
                    "checkpoints": len(list(self.out_dir.glob("*.pt"))),
                }
            )

    def typically(self, begin: float, end: float) -> dict[str, float]:
        """The median of what it held in a part of its time."""
        part = self.held[int(begin * len(self.held)) : int(end * len(self.held))]
        return {name: statistics.median(one[name] for one in part) for name in part[0]}

    def pause(self, is_to_end: bool) -> None:
        """Stop the process for a second; or end it, and resume."""
        if is_to_end:
            self.process.terminate()
            assert self.process.wait(60) in (0, 143, -15)
            self.start("--auto_resume")
        else:
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            self.process.send_signal(signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.promise(controls=[memory_leaks, files_stay_open])
def test_a_long_run_holds_no_more_at_its_end_and_pauses_change_nothing(
    cases: Cases, tmp_path: Path, request: pytest.FixtureRequest
):
    asked = request.config.getoption("--soak_steps") or (10_000 if cases.is_full else FEW_STEPS)
    steps = FEW_STEPS if cases.is_control else asked
    config = write_tiny(tmp_path)
    steady, paused = (Training(tmp_path / name, config, steps) for name in ("steady", "paused"))
    looks_between = max(LOOKS_BETWEEN_PAUSES, steps // MOST_PAUSES)
    n_pauses = 0
    for look in itertools.count(1):
        time.sleep(LOOK_SECONDS)
        steady.look()
        if steady.is_over() and paused.is_over():
            break
        if look % looks_between == 0 and paused.held and not paused.is_over():
            paused.pause(is_to_end=n_pauses % 2 == 1)
            n_pauses += 1
        paused.look()
    cases.count = steps
    early, late = steady.typically(0.3, 0.5), steady.typically(0.8, 0.95)
    print(f"{n_pauses} pauses; held early: {early}, late: {late}")
    assert n_pauses >= 2
    assert late["memory"] <= early["memory"] * 1.03
    assert late["files"] <= early["files"]
    assert late["threads"] <= early["threads"]
    assert late["checkpoints"] <= 3  # last, the one before it, and best
    assert outcome(paused.out_dir) == outcome(steady.out_dir)
