"""wandb may be absent, broken or without a network: the run must not notice."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import metrics
from engine.wandb_run import WandbRun, start_wandb
from helpers import REPOSITORY, finish, losses, start, train_here


class FakeWandb:
    """Stands for the wandb module and for its run; it fails in one of its functions."""

    def __init__(self, failing: str | None) -> None:
        self.failing, self.calls, self.logged = failing, [], []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise RuntimeError("no network")

    def setup(self) -> Any:
        self._call("setup")
        return SimpleNamespace(settings=SimpleNamespace(base_url="http://127.0.0.1:9"))

    def Settings(self, **settings: Any) -> dict[str, Any]:
        self._call("Settings")
        return settings

    def init(self, **settings: Any) -> "FakeWandb":
        self._call("init")
        self.settings = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log")
        self.logged.append({"step": step, **values})

    def finish(self) -> None:
        self._call("finish")


def install(monkeypatch: pytest.MonkeyPatch, failing: str | None = None) -> FakeWandb:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_imports_neither_wandb_nor_torchs_compiler_unless_asked_to(
    tiny: Path, tmp_path: Path
):
    code = (
        "import sys, train\n"
        f"sys.argv = ['train.py', {str(tiny)!r}, '--max_steps=1', '--out_dir={tmp_path / 'run'}']\n"
        "train.main()\n"
        "assert not {'wandb', 'torch._dynamo', 'sympy'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, cwd=REPOSITORY, text=True)
    assert said.returncode == 0, said.stderr
    assert not (tmp_path / "run/wandb").exists()


def test_wandb_gets_every_line_of_the_log_and_the_config(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = install(monkeypatch)
    train_here(tiny, tmp_path / "run", "--wandb=offline")
    assert fake.logged == metrics.read(tmp_path / "run/metrics.jsonl")
    assert fake.calls[-1] == "finish"
    assert fake.settings["mode"] == "offline"
    assert fake.settings["config"]["model"]["n_layer"] == 2
    assert fake.settings["dir"] == tmp_path / "run"


@pytest.mark.parametrize("failing", ["setup", "init", "log", "finish"])
def test_a_run_goes_on_without_a_wandb_that_fails_and_says_so_once(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
):
    fake = install(monkeypatch, failing)
    train_here(tiny, tmp_path / "run", "--wandb=online")
    assert len(losses(tmp_path / "run")) == 15
    assert fake.calls.count(failing) == 1
    assert capsys.readouterr().out.count("(no network)") == 1


def test_a_run_goes_on_where_wandb_is_not_installed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    train_here(tiny, tmp_path / "run", "--wandb=offline")
    assert len(losses(tmp_path / "run")) == 15
    assert "wandb: it did not start" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "reason"), [(None, "nobody is"), ("k" * 40, "its server does no")])
def test_a_run_that_cannot_be_online_is_logged_offline_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
    reason: str,
):
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    fake = install(monkeypatch)
    assert start_wandb("online", tmp_path, {}) is not None
    assert fake.settings["mode"] == "offline"
    assert f"wandb: {reason}" in capsys.readouterr().out


def test_a_run_that_failed_once_is_left_alone():
    fake = FakeWandb("log")
    run = WandbRun(fake)
    for step in range(3):
        run.log({"loss": 1.0}, step)
    run.finish()
    assert fake.calls == ["log"]


@pytest.mark.slow
def test_the_real_wandb_logs_into_the_folder_without_an_account(tiny: Path, tmp_path: Path):
    output, environment = tmp_path / "log", {"HOME": str(tmp_path), "WANDB_API_KEY": ""}
    arguments = [tiny, f"--out_dir={tmp_path / 'run'}", "--wandb=online"]
    assert finish(start("train", *arguments, output=output, **environment)) == 0
    assert "wandb: nobody is logged in" in output.read_text()
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(losses(tmp_path / "run")) == 15
