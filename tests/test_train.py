"""Runs against undisturbed runs, whatever happens to them, and against plain torch."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cli
import sample
import train
from data.loader import Dataset, Windows
from engine import checkpoint, metrics
from engine.replica import draw_weights
from helpers import (
    PLAIN,
    REPOSITORY,
    contents,
    finish,
    losses,
    outcome,
    signal_handlers_kept,
    start,
    start_two,
    train_here,
    wait_for_lines,
    without_box,
    without_times,
    write_dataset,
)
from sampling.load import load_model

COMPILE_SECONDS = 900  # on a busy machine, with nothing in a cache
LONG = ("--max_steps=40", "--eval_every=2")  # long enough to be hit, with 20 checkpoints
# It sees its text 85 times, and knows it by heart long before the end
RESTLESS = ("--max_steps=40", "--batch_size=32", "--model.dropout=0", "--optim.learning_rate=0.1")
UPDATE = {"step", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
EVALUATION = {"step", "val_loss", "val_bits_per_byte"}


@pytest.fixture(scope="module")
def undisturbed_long(tiny: Path) -> tuple[Path, float]:
    """The same of a longer run in a process of its own, and how many seconds it took."""
    out_dir, started_at = tiny.parent / "undisturbed_long", time.monotonic()
    process = start("train", tiny, f"--out_dir={out_dir}", *LONG, output=tiny.parent / "log")
    assert finish(process) == 0
    return out_dir, time.monotonic() - started_at


@pytest.fixture(scope="module")
def restless(tiny: Path) -> Path:
    """The folder of a run whose best checkpoint is not its last one."""
    train_here(tiny, tiny.parent / "restless", *RESTLESS)
    return tiny.parent / "restless"


@contextlib.contextmanager
def signalled(name: str, call: int, number: int) -> Iterator[None]:
    """Let a signal arrive during the n-th call of a function of train.py."""
    real, calls = getattr(train, name), iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(number)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, interrupted)
        yield


def stopped_here(config: Path, out_dir: Path, *flags: str) -> int:
    """Train until a signal stops it; return the exit code."""
    with pytest.raises(SystemExit) as stop:
        train_here(config, out_dir, *flags)
    assert isinstance(stop.value.code, int)
    return stop.value.code


# --- What a run leaves ----------------------------------------------------------------------------


def test_each_step_is_logged_once_and_evaluations_where_they_belong(undisturbed: Path):
    lines = metrics.read(undisturbed / "metrics.jsonl")
    expected = [(step, kind) for step in range(13) for kind in kinds_of(step)]
    found = [(line["step"], "val" if "val_loss" in line else "train") for line in lines]
    assert found == expected
    for line in lines:
        keys = EVALUATION if "val_loss" in line else UPDATE
        assert line.keys() == keys | {"elapsed_seconds"}
        assert all(math.isfinite(value) for value in line.values())
    seconds = [line["elapsed_seconds"] for line in lines]
    assert seconds == sorted(seconds)


def kinds_of(step: int) -> list[str]:
    return ["val"] * (step % 4 == 0 and step > 0) + ["train"] * (step < 12)


def test_the_loss_falls(undisturbed: Path):
    values = losses(undisturbed)
    assert values[0] == pytest.approx(math.log(15), abs=0.1)  # the uniform guess
    assert values[-1] < values[0] - 0.1


def test_the_validation_loss_is_the_mean_over_the_whole_split(tiny: Path, undisturbed: Path):
    dataset = Dataset.open(tiny.parent / "char")
    model = load_model(undisturbed, "last", "cpu").model
    tokens_T = torch.from_numpy(dataset.tokens("val").astype(int))
    total = 0.0
    for first in range(0, len(tokens_T) - 1, 16):
        window_T = tokens_T[first : first + 17]
        logits_TV = model(window_T[None, :-1])[0]
        total += F.cross_entropy(logits_TV, window_T[1:], reduction="sum").item()
    line = metrics.read(undisturbed / "metrics.jsonl")[-1]
    assert line["val_loss"] == pytest.approx(total / (len(tokens_T) - 1), abs=1e-6)
    text = dataset.tokenizer.decode(tokens_T.tolist())
    per_byte = line["val_loss"] / math.log(2) * len(tokens_T) / len(text.encode())
    assert line["val_bits_per_byte"] == pytest.approx(per_byte, rel=1e-9)


def test_evaluation_can_keep_to_the_beginning_of_the_split(tiny: Path, tmp_path: Path):
    train_here(tiny, tmp_path / "run", "--max_steps=1", "--eval_tokens=17")
    model = load_model(tmp_path / "run", "last", "cpu").model
    tokens_T = torch.from_numpy(Dataset.open(tiny.parent / "char").tokens("val")[:17].astype(int))
    loss = F.cross_entropy(model(tokens_T[None, :-1])[0], tokens_T[1:]).item()
    assert losses(tmp_path / "run")[-1] == pytest.approx(loss, abs=1e-6)


def test_the_best_checkpoint_has_the_lowest_validation_loss(restless: Path):
    lines = metrics.read(restless / "metrics.jsonl")
    evaluations = {line["val_loss"]: line["step"] for line in lines if "val_loss" in line}
    assert min(evaluations) < list(evaluations)[-1]
    best, last = (checkpoint.load(restless, name) for name in ("best", "last"))
    assert (best["step"], last["step"]) == (evaluations[min(evaluations)], 40)
    assert best["best_val_loss"] == last["best_val_loss"] == min(evaluations)


def test_a_run_ends_with_samples_losses_a_picture_and_what_is_next(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_here(tiny, tmp_path / "run", "--max_steps=1", "--samples=2")
    text = capsys.readouterr().out
    assert re.search(r"^parameters: .* 8,784 total$", text, re.M)
    assert text.count("--- sample ") == 2
    assert re.search(r"^best validation loss: 2\.\d+ nats per token, \d\.\d+ bits", text, re.M)
    assert re.search(r"^a bigram model's validation loss: 2\.\d+ nats per token, ", text, re.M)
    assert f"next: python sample.py --out_dir={tmp_path / 'run'}" in text
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_without_samples_spends_no_time_on_a_picture(undisturbed: Path):
    assert not (undisturbed / "loss.png").exists()


def test_the_config_in_the_folder_repeats_the_run(tiny: Path, undisturbed: Path, tmp_path: Path):
    train_here(undisturbed / "config.toml", tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(undisturbed)


def test_another_seed_is_another_run(tiny: Path, undisturbed: Path, tmp_path: Path):
    train_here(tiny, tmp_path / "run", "--seed=2")
    assert losses(tmp_path / "run")[0] != losses(undisturbed)[0]


def test_a_new_run_in_the_same_folder_loses_nothing(tiny: Path, undisturbed: Path, tmp_path: Path):
    shutil.copytree(undisturbed, tmp_path / "run")
    train_here(tiny, tmp_path / "run", "--max_steps=1")
    assert outcome(tmp_path / "run_1") == outcome(undisturbed)
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 1


# --- The same result, however it is computed ------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny: Path) -> list[float]:
    """Losses of a run without dropout, under AdamW, in one piece."""
    train_here(tiny, tiny.parent / "plain", *PLAIN, "--micro_batch_size=0")
    return losses(tiny.parent / "plain")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_loss_does_not_depend_on_the_micro_batch_size(
    tiny: Path, plain: list[float], tmp_path: Path, size: int
):
    train_here(tiny, tmp_path / "run", *PLAIN, f"--micro_batch_size={size}")
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-5)


def test_the_first_updates_are_those_of_a_loop_in_plain_torch(tiny: Path, plain: list[float]):
    config = cli.parse_config(train.TrainConfig, [str(tiny), *PLAIN])
    dataset = Dataset.open(tiny.parent / "char")
    windows = Windows(vocab_size=15, context_length=16)
    batches = train.Batches(dataset.tokens("train"), windows, batch_size=4, seed=config.seed)
    model = train.GPT(replace(config.model, vocab_size=15))
    draw_weights(model, config.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    for step in range(3):
        tokens_BT, targets_BT = batches.batch(step)
        loss = F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())
        assert loss.item() == pytest.approx(plain[step], abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 4
        optimizer.step()


def test_two_processes_give_the_losses_of_one(tiny: Path, plain: list[float], tmp_path: Path):
    flags = (f"--out_dir={tmp_path / 'run'}", *PLAIN, "--micro_batch_size=1")
    processes = start_two("train", tiny, *flags, output=tmp_path / "log")
    assert list(map(finish, processes)) == [0, 0], (tmp_path / "log").read_text()
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-5)
    said = (tmp_path / "log").read_text()
    assert said.count("best validation loss") == 1  # the other process is silent
    assert said.count("step      4: validation loss") == 1


def test_muon_with_two_processes_gives_nearly_the_losses_of_one(tiny: Path, tmp_path: Path):
    train_here(tiny, tmp_path / "one", "--model.dropout=0")
    flags = ("--model.dropout=0", f"--out_dir={tmp_path / 'two'}")
    processes = start_two("train", tiny, *flags, output=tmp_path / "log")
    assert list(map(finish, processes)) == [0, 0], (tmp_path / "log").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)


def test_processes_must_share_a_batch_evenly(tiny: Path, tmp_path: Path):
    flags = (f"--out_dir={tmp_path / 'run'}", "--batch_size=3")
    processes = start_two("train", tiny, *flags, output=tmp_path / "log")
    assert list(map(finish, processes)) == [2, 2]
    assert "batch_size=3, 2 processes" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_bfloat16_gives_nearly_the_same_losses(tiny: Path, plain: list[float], tmp_path: Path):
    train_here(tiny, tmp_path / "run", *PLAIN, "--precision=bfloat16")
    found = losses(tmp_path / "run")
    assert found == pytest.approx(plain, abs=0.1)
    assert found != pytest.approx(plain, abs=1e-5)
    weights = checkpoint.load(tmp_path / "run", "last")["model"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


# --- Compiled -------------------------------------------------------------------------------------

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def train_and_count_graphs() -> None:
    """train.py, which also says how many graphs were compiled, before it samples and at the end."""
    from torch._dynamo.utils import counters  # it is slow to import

    def noted_samples(*args: Any) -> None:
        print("graphs before samples:", counters["stats"]["unique_graphs"])
        write_samples(*args)

    write_samples = sample.write_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_samples", noted_samples)
        train.main()
    print("graphs at the end:", counters["stats"]["unique_graphs"])


@pytest.mark.slow
@compiled
def test_a_compiled_model_gives_the_same_losses_and_the_plain_one_writes_the_samples(
    tiny: Path, plain: list[float], tmp_path: Path
):
    arguments = [tiny, f"--out_dir={tmp_path / 'run'}", *PLAIN, "--compile", "--samples=1"]
    process = start("test_train:train_and_count_graphs", *arguments, output=tmp_path / "log")
    code, said = finish(process, COMPILE_SECONDS), (tmp_path / "log").read_text(encoding="utf-8")
    assert code == 0, said
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-4)
    before, end = re.findall(r"^graphs .*: (\d+)$", said, re.M)
    assert int(before) > 0
    assert end == before


@pytest.mark.slow
@compiled
def test_two_processes_with_a_compiled_model_give_the_losses_of_one_without(
    tiny: Path, plain: list[float], tmp_path: Path
):
    flags = (f"--out_dir={tmp_path / 'run'}", *PLAIN, "--compile", "--micro_batch_size=2")
    processes = start_two("train", tiny, *flags, output=tmp_path / "log")
    codes = [finish(process, COMPILE_SECONDS) for process in processes]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert losses(tmp_path / "run") == pytest.approx(plain, abs=1e-4)


# --- Stop and go on -------------------------------------------------------------------------------


def test_a_run_stopped_in_its_middle_and_resumed_ends_as_undisturbed(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    with signalled("update", 5, signal.SIGTERM):
        assert stopped_here(tiny, tmp_path / "run") == 143
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 6
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_a_run_stopped_after_each_of_its_steps_ends_as_undisturbed(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    for step in range(12):
        with signalled("update", 0, signal.SIGTERM):
            flags = ["--resume"] if step > 0 else []
            assert stopped_here(tiny, tmp_path / "run", *flags) == 143
        assert checkpoint.load(tmp_path / "run", "last")["step"] == step + 1
        if (
            step < 4
        ):  # before the first evaluation the newest is the best, so that it can be sampled
            assert checkpoint.load(tmp_path / "run", "best")["step"] == step + 1
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


@pytest.mark.parametrize("evaluation", [0, 2])
def test_a_run_stopped_while_it_evaluates_and_resumed_ends_as_undisturbed(
    tiny: Path, undisturbed: Path, tmp_path: Path, evaluation: int
):
    with signalled("evaluate", evaluation, signal.SIGINT):
        assert stopped_here(tiny, tmp_path / "run") == 130
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4 * (evaluation + 1)
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_checkpoints_are_kept_when_asked_and_a_resumed_run_keeps_the_same(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    with signalled("update", 5, signal.SIGTERM):
        assert stopped_here(tiny, tmp_path / "run", "--keep_every=3") == 143
    train_here(tiny, tmp_path / "run", "--keep_every=3", "--resume")
    assert kept(tmp_path / "run") == {f"step_{step}": step for step in (0, 3, 6, 9, 12)}
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    assert kept(undisturbed) == {}


def kept(out_dir: Path) -> dict[str, int]:
    """The checkpoints that are kept for ever, with their steps."""
    names = json.loads((out_dir / checkpoint.RECORD).read_text()).keys()
    names -= {"last", "previous", "best"}
    return {name: checkpoint.load(out_dir, name)["step"] for name in names}


class Killed(BaseException):
    """Ends a run as a kill does: nothing more is saved."""


@pytest.mark.parametrize("keep_every", [0, 3])
def test_a_run_killed_before_it_had_a_checkpoint_starts_anew_says_so_and_ends_as_undisturbed(
    tiny: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keep_every: int,
):
    def killed(run: train.Run, batch: Any) -> None:
        if run.progress.step == 2:  # the first evaluation follows after 4
            raise Killed
        update(run, batch)

    update, out_dir, flag = train.update, tmp_path / "run", f"--keep_every={keep_every}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", killed)
        with pytest.raises(Killed):
            train_here(tiny, out_dir, flag)
    assert [line["step"] for line in metrics.read(out_dir / "metrics.jsonl")] == [0, 1]
    assert (out_dir / checkpoint.RECORD).exists() == (keep_every > 0)
    assert "to resume" not in capsys.readouterr().out
    train_here(tiny, out_dir, flag, "--resume")
    line = f"{out_dir} has no checkpoint to resume: the run starts at step 0\n"
    assert line in capsys.readouterr().out
    assert outcome(out_dir) == outcome(undisturbed)
    assert len(kept(out_dir)) == (5 if keep_every else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # it was not set aside


def test_a_resumed_run_remembers_its_best_loss(tiny: Path, restless: Path, tmp_path: Path):
    best = checkpoint.load(restless, "best")["step"]
    with signalled("update", best + 1, signal.SIGTERM):
        stopped_here(tiny, tmp_path / "run", *RESTLESS)
    train_here(tiny, tmp_path / "run", *RESTLESS, "--resume")
    assert outcome(tmp_path / "run") == outcome(restless)


def test_a_finished_run_can_be_resumed_without_harm(tiny: Path, undisturbed: Path, tmp_path: Path):
    shutil.copytree(undisturbed, tmp_path / "run")
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_an_older_run_does_not_go_on_with_windows_in_another_order(
    refusal: Callable[..., str], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.order.MOST_HELD", 2)
    error = refusal(f"--out_dir={undisturbed}", "--resume")
    assert "an older run, whose windows came in another order" in error


def test_a_run_does_not_end_before_the_step_that_it_has_reached(
    refusal: Callable[..., str], undisturbed: Path
):
    before = contents(undisturbed)
    error = refusal(f"--out_dir={undisturbed}", "--resume", "--max_steps=3")
    assert "max_steps must be at least the 12 steps done: got 3" in error
    assert contents(undisturbed) == before


def test_a_run_does_not_go_on_with_other_text(
    refusal: Callable[..., str], undisturbed: Path, tmp_path: Path
):
    data = write_dataset(tmp_path, "char", letters="…émltsrnoiea")  # the same, in another order
    error = refusal(f"--out_dir={undisturbed}", f"--data.path={data}", "--resume")
    assert "the checkpoint has another dataset: its train differs" in error


def test_a_resumed_run_takes_the_new_learning_rate(tiny: Path, tmp_path: Path):
    with signalled("update", 5, signal.SIGTERM):
        stopped_here(tiny, tmp_path / "run", "--optim.decay_fraction=0")
    flags = ("--optim.decay_fraction=0", "--optim.learning_rate=1e-3")
    train_here(tiny, tmp_path / "run", "--resume", *flags)
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[3:] == pytest.approx([1e-2] * 3 + [1e-3] * 6)


def test_a_process_stopped_by_ctrl_c_says_how_to_go_on_and_then_ends_as_undisturbed(
    tiny: Path, undisturbed_long: tuple[Path, float], tmp_path: Path
):
    out_dir, output = tmp_path / "run", tmp_path / "log"
    process = start("train", tiny, f"--out_dir={out_dir}", *LONG, output=output)
    wait_for_lines(out_dir / "metrics.jsonl", random.randint(1, 40))
    os.kill(process.pid or 0, signal.SIGINT)
    assert finish(process) == 130
    text = output.read_text()
    said = re.search(r"^stopped and saved at step (\d+); .*: python train\.py (.*)$", text, re.M)
    assert said is not None, text
    assert checkpoint.load(out_dir, "last")["step"] == int(said[1])
    assert finish(start("train", *said[2].split(), output=output)) == 0
    assert outcome(out_dir) == outcome(undisturbed_long[0])


def test_a_signal_to_one_of_two_processes_stops_both_and_resuming_ends_as_undisturbed(
    tiny: Path, tmp_path: Path
):
    arguments = [tiny, "--max_steps=24", f"--out_dir={tmp_path / 'a'}"]
    processes = start_two("train", *arguments, output=tmp_path / "log_a")
    assert list(map(finish, processes)) == [0, 0], (tmp_path / "log_a").read_text()
    arguments = [tiny, "--max_steps=24", f"--out_dir={tmp_path / 'b'}"]
    processes = start_two("train", *arguments, output=tmp_path / "log_b")
    wait_for_lines(tmp_path / "b/metrics.jsonl", 2)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert list(map(finish, processes)) == [143, 143], (tmp_path / "log_b").read_text()
    assert "stopped and saved at step" in (tmp_path / "log_b").read_text()
    processes = start_two("train", *arguments, "--resume", output=tmp_path / "log_b")
    assert list(map(finish, processes)) == [0, 0], (tmp_path / "log_b").read_text()
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


def train_on_a_slow_disk() -> None:
    """train.py where it takes a second to write a checkpoint."""

    def slow_save(*args: Any) -> None:
        time.sleep(1)
        save(*args)

    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", slow_save)
        train.main()


def test_no_process_leaves_while_another_one_writes_and_more_sigterms_change_nothing(
    tiny: Path, tmp_path: Path
):
    out_dir, output = tmp_path / "run", tmp_path / "log"
    arguments = [tiny, f"--out_dir={out_dir}", "--max_steps=400", "--eval_every=400"]
    main, other = start_two("test_train:train_on_a_slow_disk", *arguments, output=output)
    wait_for_lines(out_dir / "metrics.jsonl", 3)
    os.kill(other.pid or 0, signal.SIGTERM)
    time.sleep(0.5)  # it has stopped, and main is writing
    for process in (main, other):  # torchrun's
        os.kill(process.pid or 0, signal.SIGTERM)
    assert finish(other) == 143, output.read_text()
    assert checkpoint.has_last(out_dir)
    assert finish(main) == 143, output.read_text()
    step = checkpoint.load(out_dir, "last")["step"]
    assert f"stopped and saved at step {step}; go on with: " in output.read_text()


def torchrun(script: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a script twice, as a user does, so that the tests can be imported in it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"},
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds its processes in /proc")
def test_torchrun_stops_whole_and_goes_on_to_the_losses_of_one_process(
    tiny: Path, plain: list[float], tmp_path: Path
):
    out_dir, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text("import test_train; import cli; cli.run(test_train.train_on_a_slow_disk)")
    arguments = [tiny, f"--out_dir={out_dir}", *PLAIN, "--micro_batch_size=1"]
    process = torchrun(script, *arguments)
    wait_for_lines(out_dir / "metrics.jsonl", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:  # as a scheduler does, which knows each process
        os.kill(int(child), signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "exitcode  : 143" in said  # the other may have been hit by torchrun on its way out
    step = checkpoint.load(out_dir, "last")["step"]
    assert said.count(f"stopped and saved at step {step}; go on with: ") == 1
    process = torchrun(REPOSITORY / "train.py", *arguments, "--resume")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert losses(out_dir) == pytest.approx(plain, abs=1e-5)


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_diverging_run_saves_nothing_and_goes_on_from_its_last_good_checkpoint(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    with signalled("update", 4, signal.SIGTERM):
        stopped_here(tiny, tmp_path / "run")
    before = checkpoint.load(tmp_path / "run", "last")["model"]
    with pytest.raises(ArithmeticError, match=r"after step 6 a number is not finite"):
        train_here(tiny, tmp_path / "run", "--resume", "--optim.learning_rate=1e30")
    after = checkpoint.load(tmp_path / "run", "last")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_a_validation_loss_that_is_not_finite_is_neither_logged_nor_saved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = iter([2.5, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(values))
    with pytest.raises(ArithmeticError, match=r"after step 8 .* not finite \(val_loss=nan\)"):
        train_here(tiny, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_run_which_can_go_on(
    tiny: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def poisoned(run: train.Run, batch: Any) -> Tensor:
        loss = accumulate_gradients(run, batch)
        if run.progress.step == 7:  # step 8 saves
            runs.append(run)
            before.extend(everything(run))
            next(run.model.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return loss

    runs: list[train.Run] = []
    before: list[Tensor] = []
    accumulate_gradients = train.accumulate_gradients
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", poisoned)
        with pytest.raises(ArithmeticError, match=r"after step 7 .* not finite \(loss=2.*=inf\)"):
            train_here(tiny, tmp_path / "run")
    assert [type(optimizer).__name__ for optimizer in runs[0].optimizers] == ["AdamW", "Muon"]
    after = everything(runs[0])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def everything(run: train.Run) -> list[Tensor]:
    """Copies of all weights and of all that the optimizers remember."""
    remembered = [t for optimizer in run.optimizers for ts in optimizer.state.values() for t in ts]
    return [tensor.detach().clone() for tensor in (*run.model.parameters(), *remembered)]


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_to_go_on_from(
    tiny: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = torch.save, iter(range(100))

    def full(*args: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 8 could not be written .* No space left"):
            train_here(tiny, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run", "last")["step"] == 4
    train_here(tiny, tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


@pytest.fixture
def refusal(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run train.py, which must refuse to, and return its one line, or the words in tyro's box."""

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", str(tiny), *map(str, flags)])
        capsys.readouterr()
        with signal_handlers_kept(), pytest.raises(SystemExit) as stop:
            cli.run(train.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        if error.startswith("╭"):
            return without_box(error)
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.n_head=3"], "Error parsing model: n_head must divide n_embd: got n_head=3"),
        (["--model.context_length=5000"], "a text must be longer than one context: got 607 tokens"),
        (["--data.path=nowhere"], "nowhere is not a prepared dataset (it has no meta.json): run"),
        (["--model.vocab_size=3"], "model.vocab_size must hold the 15 tokens of"),
        (["--resume"], "holds no checkpoint: train one with `python train.py CONFIG"),
        (["--max_step=3"], "Unrecognized options: --max_step=3 Perhaps you meant: --max_steps"),
        (["--max_steps=ten"], "--max_steps: invalid literal for int() with base 10: 'ten'"),
        (["--max_steps=-1"], "Error parsing TrainConfig: max_steps must be at least 0: got -1"),
        (["--eval_every=-1"], "eval_every must be at least 0: got -1"),
        (["--model.n_layer=0"], "n_layer must be given, or minutes that choose it: got 0"),
        (["--minutes=-1"], "minutes must be at least 0: got -1"),
        (["--minutes=inf"], "minutes must be finite: got inf"),
        (["--eval_tokens=1"], "eval_tokens must be 0 or at least 2: got 1"),
        (["--minutes=0.001"], "minutes are too few for this run: got 0.001; give more"),
        (["--minutes=1", "--resume"], "minutes plan a new run, and resume goes on with one: take"),
        (["--seed=-1"], "seed must be at least 0: got -1"),
        (["--optim.name=sgd"], "Expected one of ('adamw', 'muon')"),
    ],
)
def test_a_bad_request_is_refused_and_nothing_is_written(
    refusal: Callable[..., str], tmp_path: Path, flags: list[str], message: str
):
    assert message in refusal(f"--out_dir={tmp_path / 'run'}", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_no_run_is_none_to_go_on_in(
    refusal: Callable[..., str], tmp_path: Path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("of a reader")
    assert "holds no checkpoint" in refusal(f"--out_dir={tmp_path / 'run'}", "--resume")
    assert contents(tmp_path / "run") == {"notes.txt": b"of a reader"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused(refusal: Callable[..., str], tmp_path: Path):
    said = refusal(f"--out_dir={tmp_path / 'run'}", "--device=cuda")
    assert "device cuda is not available here: take auto or" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.n_embd=32"], "the checkpoint has another model: its n_embd differs"),
        (
            ["--model.architecture=gpt2", "--model.tie_embeddings"],
            "another model: its architecture",
        ),
        (["--optim.name=adamw"], "a run goes on with its own optimizer: optim.name has changed"),
    ],
)
def test_a_run_does_not_go_on_with_another_model_or_optimizer(
    refusal: Callable[..., str], undisturbed: Path, flags: list[str], message: str
):
    before = contents(undisturbed)
    assert message in refusal(f"--out_dir={undisturbed}", "--resume", *flags)
    assert contents(undisturbed) == before


def test_a_run_does_not_go_on_with_another_tokenizer(
    refusal: Callable[..., str], undisturbed: Path, tmp_path: Path
):
    before = contents(undisturbed)
    data = write_dataset(tmp_path, "byte")
    flags = (f"--data.path={data}", "--resume")
    assert "another tokenizer: its kind differs" in refusal(f"--out_dir={undisturbed}", *flags)
    data = write_dataset(tmp_path, "char", letters="AEIONRSTLMÉ…")  # as many of them
    flags = (f"--data.path={data}", "--resume")
    assert "another tokenizer: its characters differ" in refusal(f"--out_dir={undisturbed}", *flags)
    assert contents(undisturbed) == before


def test_a_run_goes_on_that_was_begun_before_heads_and_mlps_had_widths_of_their_own(
    undisturbed: Path, tmp_path: Path
):
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    state = checkpoint.load(out_dir, "last")
    for field in ("head_dim", "n_inner"):
        del state["model_config"][field]
    checkpoint.save(out_dir, state, ["last"])
    config = (out_dir / "config.toml").read_text()
    (out_dir / "config.toml").write_text(re.sub(r"model\.(head_dim|n_inner) = .*\n", "", config))
    train_here(out_dir / "config.toml", out_dir, "--resume", "--max_steps=14")
    assert checkpoint.load(out_dir, "last")["step"] == 14


@pytest.mark.parametrize("cut", [slice(-1), slice(0), slice(1, None)])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    refusal: Callable[..., str], undisturbed: Path, tmp_path: Path, cut: slice
):
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    path = out_dir / json.loads((out_dir / checkpoint.RECORD).read_text())["last"]["file"]
    path.write_bytes(path.read_bytes()[cut])
    before = contents(out_dir)
    assert f"{path} is damaged" in refusal(f"--out_dir={out_dir}", "--resume")
    assert contents(out_dir) == before


def test_a_job_that_is_started_again_goes_on_from_the_checkpoint_before_a_damaged_one(
    undisturbed: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    path = out_dir / json.loads((out_dir / checkpoint.RECORD).read_text())["last"]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    train_here(tiny, out_dir, "--auto_resume")
    said = capsys.readouterr().out
    assert f"skipped the last checkpoint: {path} is damaged" in said
    assert "step      8: validation loss" in said  # where it went on
    assert "step      4: validation loss" not in said
    assert checkpoint.load(out_dir, "previous")["step"] == 8  # not the damaged one
    assert outcome(out_dir) == outcome(undisturbed)


def test_a_job_all_of_whose_checkpoints_are_damaged_is_refused(
    undisturbed: Path, tmp_path: Path, refusal: Callable[..., str]
):
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    for path in out_dir.glob("*.pt"):
        path.unlink()
    assert "is missing" in refusal(f"--out_dir={out_dir}", "--auto_resume")


def test_a_resumed_log_differs_from_an_undisturbed_one_in_times_alone(undisturbed: Path):
    line = metrics.read(undisturbed / "metrics.jsonl")[0]
    assert line.keys() - without_times(line).keys() == {"elapsed_seconds", "tokens_per_second"}
