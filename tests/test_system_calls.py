"""The whole program under strace, which makes the n-th call to the system fail, or kills there."""

import contextlib
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import REPOSITORY, outcome, train_here, write_tiny
from promises import Cases

FLAGS = ("--max_steps=4", "--eval_every=2")
FAULTS = {  # and the calls that they are tried at
    "signal=KILL": ("fsync", "rename", "openat", "write"),
    "error=EIO": ("fsync", "rename", "openat", "write"),
    "error=ENOSPC": ("fsync", "openat", "write"),
    "error=EDQUOT": ("fsync", "write"),
    "error=EROFS": ("fsync", "openat"),
}
FEW = ("signal=KILL", "error=EIO")  # tried by default
WRITTEN = ("checkpoint.partial", "checkpoints.json.partial", "metrics.jsonl", "config.toml.partial")
script = [REPOSITORY / "train.py"]  # a control puts a broken one in its place

IN_PLACE = """
import sys
from pathlib import Path
sys.path.insert(0, {repository!r})
import cli, train
from engine import checkpoint

def write_in_place(out_dir, state):
    path = out_dir / "checkpoint.pt"
    checkpoint.torch.save(state | {{"format": checkpoint.FORMAT}}, path)
    size = path.stat().st_size
    sha256 = checkpoint.files.sha256(path)
    return {{"step": state["step"], "file": path.name, "sha256": sha256, "bytes": size}}

checkpoint._write = write_in_place
cli.run(train.main)
"""


@contextlib.contextmanager
def checkpoint_written_over() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in_place.py"
        path.write_text(IN_PLACE.format(repository=str(REPOSITORY)))
        script[0] = path
        yield
        script[0] = REPOSITORY / "train.py"


def train_with(fault: str, call: str, number: int, config: Path, out_dir: Path) -> bool:
    """Train, while the n-th call of each thread fails; return whether there was one."""
    log = out_dir.with_suffix(".strace")
    of_files = [f"-P{out_dir / name}" for name in WRITTEN]
    command = ["strace", "-f", f"-o{log}", f"-etrace={call}"]
    command += of_files if call in ("openat", "write") else []
    command += [f"-einject={call}:{fault}:when={number}", sys.executable, str(script[0])]
    command += [str(config), f"--out_dir={out_dir}", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True)
    is_hit = "(INJECTED)" in log.read_text() or done.returncode == -signal.SIGKILL
    assert is_hit or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return is_hit


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.promise(controls=[checkpoint_written_over])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_whose_nth_call_to_the_system_fails_goes_on_to_the_end_of_an_undisturbed_one(
    fault: str, cases: Cases, tmp_path: Path
):
    if not cases.is_full and fault not in FEW:
        pytest.skip("tried by `make torture`")
    config, out_dir = write_tiny(tmp_path), tmp_path / "run"
    train_here(config, tmp_path / "undisturbed", *FLAGS)
    expected = outcome(tmp_path / "undisturbed")
    for call in FAULTS[fault] if cases.is_full else FAULTS[fault][:1]:
        before = cases.count
        stride = (12 if call == "write" else 1) if cases.is_full else 4  # of a hundred writes
        for _, number in zip(cases.until_none_is_left(), itertools.count(stride, stride)):
            shutil.rmtree(out_dir, ignore_errors=True)
            if not train_with(fault, call, number, config, out_dir):
                break
            train_here(config, out_dir, *FLAGS, "--auto_resume")
            assert outcome(out_dir) == expected, (call, number)
        assert cases.count > before, call
