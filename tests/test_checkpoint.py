"""Checkpoints against kills, full disks, damage and malice."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
import train
from engine import checkpoint, report, resume
from engine.loss import LossModel
from engine.optim import OptimConfig, Optimizer, build_optimizers
from engine.parallel import World
from model import GPT, ModelConfig

ALONE = World(torch.device("cpu"))
OPERATIONS = [(torch, "save"), (os, "fsync"), (Path, "replace"), (Path, "unlink")]


class Killed(BaseException):
    """Ends a save as a kill does: no handler runs."""


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"step": step, "model": {"weight": torch.randn(5, 7)}, "config": f"seed = {step}\n"}


def steps(out_dir: Path) -> dict[str, int]:
    """The step of each checkpoint, after comparing all that it holds."""
    found = {}
    for name in json.loads((out_dir / checkpoint.RECORD).read_text()):
        loaded = checkpoint.load(out_dir, name)
        expected = state(loaded["step"])
        assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
        assert loaded["config"] == expected["config"]
        found[name] = loaded["step"]
    found.pop(checkpoint.PREVIOUS, None)
    return found


def names_in(out_dir: Path) -> set[str]:
    return {path.name for path in out_dir.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder whose best checkpoint is of step 1 and whose last one is of step 2."""
    checkpoint.save(tmp_path, state(1), ["last", "best"])
    checkpoint.save(tmp_path, state(2), ["last"])
    return tmp_path


def path_of(out_dir: Path, name: str) -> Path:
    return out_dir / json.loads((out_dir / checkpoint.RECORD).read_text())[name]["file"]


@contextlib.contextmanager
def failing_at(call: int, error: BaseException) -> Iterator[Callable[[], int]]:
    """Raise `error` in place of the n-th operation on the disk; yield a count of them."""
    count = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise error
            return real(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for where, name in OPERATIONS:
            patch.setattr(where, name, failing(getattr(where, name)))
        yield lambda: count


# --- What is kept ---------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(saved: Path):
    assert steps(saved) == {"last": 2, "best": 1}


def test_last_and_best_share_a_file_when_they_are_the_same(tmp_path: Path):
    checkpoint.save(tmp_path, state(1), ["last", "best"])
    assert path_of(tmp_path, "last") == path_of(tmp_path, "best")
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_files_that_nothing_names_are_swept(saved: Path):
    (saved / "step_00000009_deadbeef.pt").write_text("of a process killed before its record")
    (saved / "checkpoint.partial").write_text("of a process killed while writing")
    checkpoint.save(saved, state(3), ["last"])
    assert steps(saved) == {"last": 3, "best": 1}
    kept = {path_of(saved, name).name for name in ("last", "previous", "best")}
    assert names_in(saved) == kept | {checkpoint.RECORD}
    before = path_of(saved, "last").name
    checkpoint.save(saved, state(4), ["last", "best"])
    assert names_in(saved) == {path_of(saved, "last").name, before, checkpoint.RECORD}


def test_the_checkpoint_before_the_last_is_kept_to_go_on_from(saved: Path):
    def steps_to_go_on_from() -> list[int]:
        return [checkpoint.load(saved, n)["step"] for n in checkpoint.newest_first(saved)]

    assert steps_to_go_on_from() == [2, 1, 1]
    checkpoint.save(saved, state(5), ["last", "best"])
    assert steps_to_go_on_from() == [5, 5, 2]
    checkpoint.save(saved, state(5), ["last"])  # a run that is stopped where it has just saved
    assert steps_to_go_on_from() == [5, 5, 2]
    checkpoint.save(saved, state(3), ["last"])  # a run that went on from step 2
    assert steps_to_go_on_from() == [5, 3, 2]


def test_after_a_damaged_last_checkpoint_the_one_gone_on_from_stays(saved: Path):
    damaged = path_of(saved, "last")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    checkpoint.go_on_from(saved, "previous")
    checkpoint.save(saved, state(5), ["last", "best"])
    assert [checkpoint.load(saved, n)["step"] for n in checkpoint.newest_first(saved)] == [5, 5, 1]
    assert not damaged.exists()


def test_what_was_read_of_an_old_format_is_written_in_the_new_one(tmp_path: Path):
    checkpoint.save(tmp_path, state(1) | {"format": 1}, ["last"])
    assert checkpoint.load(tmp_path, "last")["format"] == checkpoint.FORMAT


def test_what_another_thread_writes_in_the_folder_is_not_swept(saved: Path):
    (saved / "config.toml.partial").write_text("being written")
    checkpoint.save(saved, state(3), ["last"])
    assert (saved / "config.toml.partial").exists()


def test_saving_a_step_again_is_harmless(saved: Path):
    checkpoint.save(saved, state(2), ["last"])
    assert steps(saved) == {"last": 2, "best": 1}


def test_the_record_holds_size_and_hash_of_each_file(saved: Path):
    for entry in json.loads((saved / checkpoint.RECORD).read_text()).values():
        data = (saved / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_checkpoint_under_its_own_name_stays_when_newer_ones_come(saved: Path):
    checkpoint.save(saved, state(2), ["step_2"])
    checkpoint.save(saved, state(3), ["last", "best"])
    assert steps(saved) == {"last": 3, "best": 3, "step_2": 2}
    assert checkpoint.history(saved) == ["step_2", "best"]


# --- Kills and full disks -------------------------------------------------------------------------


def test_a_kill_before_any_operation_leaves_the_checkpoint_before_or_after(tmp_path: Path):
    seen = []
    for call in range(1, 100):
        out_dir = tmp_path / str(call)
        checkpoint.save(out_dir, state(0), ["last", "best"])
        checkpoint.save(out_dir, state(1), ["last", "best"])
        with failing_at(call, Killed()):
            try:
                checkpoint.save(out_dir, state(2), ["last", "best"])
                break
            except Killed:
                seen.append(steps(out_dir)["last"])
        checkpoint.save(out_dir, state(3), ["last"])  # a new process goes on
        assert steps(out_dir) == {"last": 3, "best": seen[-1]}
        assert len(names_in(out_dir)) == 3
    assert len(seen) == 8  # save; sync, rename and sync the folder, twice; remove the oldest file
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")]
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path: Path, error: Any, is_first: bool):
    for call in range(1, 7):  # the seventh syncs the folder, when all is there
        out_dir = tmp_path / str(call)
        out_dir.mkdir()
        if not is_first:
            checkpoint.save(out_dir, state(1), ["last", "best"])
        before = names_in(out_dir)
        with (
            failing_at(call, error),
            pytest.raises(OSError, match=r"checkpoint of step 2 could not be written .* --resume"),
        ):
            checkpoint.save(out_dir, state(2), ["last", "best"])
        assert names_in(out_dir) == before
        assert is_first or steps(out_dir) == {"last": 1, "best": 1}


@pytest.mark.parametrize("names", [["last"], ["last", "best"]])
def test_a_record_that_may_not_outlive_a_power_cut_keeps_the_files_of_the_one_before(
    tmp_path: Path, names: list[str]
):
    checkpoint.save(tmp_path, state(1), ["last", "best"])
    before = (tmp_path / checkpoint.RECORD).read_text()
    with (
        failing_at(7, OSError(errno.EIO, "Input/output error")),  # the new record is renamed
        pytest.raises(
            OSError, match=r"step 2 could not be written .*Input/output error.* --resume"
        ),
    ):
        checkpoint.save(tmp_path, state(2), names)
    assert steps(tmp_path) == {"last": 1, "best": 1} | dict.fromkeys(names, 2)
    after = (tmp_path / checkpoint.RECORD).read_text()
    (tmp_path / checkpoint.RECORD).write_text(before)  # as the disk may still have it
    assert steps(tmp_path) == {"last": 1, "best": 1}
    (tmp_path / checkpoint.RECORD).write_text(after)
    checkpoint.save(tmp_path, state(3), ["last", "best"])
    assert len(list(tmp_path.glob("*.pt"))) == 2  # and the one before


def test_a_file_that_cannot_be_removed_is_named_and_the_run_goes_on(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint.save(saved, state(2), ["best"])
    old = path_of(saved, "previous")
    with monkeypatch.context() as patch:
        denied = PermissionError(errno.EACCES, "Permission denied")
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(denied))
        checkpoint.save(saved, state(3), ["last"])
    assert capsys.readouterr().err == f"{old} could not be removed (Permission denied)\n"
    assert steps(saved) == {"last": 3, "best": 2}
    assert old.exists()
    checkpoint.save(saved, state(4), ["last"])
    assert not old.exists()


def test_names_are_synced_to_the_disk_in_an_order_that_a_power_cut_cannot_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append("sync the folder" if is_folder else "sync a file")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        seen.append(f"rename to {target.suffix}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    checkpoint.save(tmp_path, state(1), ["last"])
    checkpoint_first = ["sync a file", "rename to .pt", "sync the folder"]
    assert seen == [*checkpoint_first, "sync a file", "rename to .json", "sync the folder"]


def test_a_disk_that_is_really_full_is_refused_in_a_sentence(saved: Path):
    before, limits = names_in(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step 3 could not be written") as caught:
            checkpoint.save(saved, state(3) | {"large": torch.zeros(100_000)}, ["last"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "what was saved before it is untouched" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(saved) == before
    assert steps(saved) == {"last": 2, "best": 1}


# --- Damage ---------------------------------------------------------------------------------------


def test_a_single_flipped_bit_anywhere_is_found(saved: Path):
    path = path_of(saved, "last")
    data = path.read_bytes()
    positions = np.random.default_rng(0).integers(8 * len(data), size=400)
    for position in [0, 8 * len(data) - 1, *map(int, positions)]:
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: .*; there is also the best checkpoint"):
            checkpoint.load(saved, "last")
    assert checkpoint.load(saved, "best")["step"] == 1
    path.write_bytes(data)
    assert checkpoint.load(saved, "last")["step"] == 2


@pytest.mark.parametrize("length", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_refused(saved: Path, length: int):
    path = path_of(saved, "last")
    data = path.read_bytes()
    path.write_bytes(data[:length])
    expected = "is damaged: its SHA-256 is not the one in checkpoints.json"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(saved, "last")


def test_a_missing_file_is_refused_and_the_other_checkpoint_named(saved: Path):
    path_of(saved, "last").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing; there is also the best checkpoint"):
        checkpoint.load(saved, "last")


def test_a_flipped_bit_in_the_record_never_gives_another_checkpoint(saved: Path):
    path = saved / checkpoint.RECORD
    data = path.read_bytes()
    accepted = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError, OSError):
            assert checkpoint.load(saved, "last")["step"] == 2
            accepted += 1
    assert accepted < 0.75 * len(data)  # half of it is about the other checkpoint


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"last": 3}', '{"last": {}}', '{"last": {"file": "a.pt"}}', "\0"]
)
def test_a_record_that_makes_no_sense_is_refused_by_name(saved: Path, text: str):
    (saved / checkpoint.RECORD).write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(saved, "last")


def test_a_folder_without_a_run_is_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: train one with `python"):
        checkpoint.load(tmp_path / "nowhere", "last")


def test_a_checkpoint_that_was_never_saved_is_refused_with_those_that_were(tmp_path: Path):
    checkpoint.save(tmp_path, state(1), ["last"])
    with pytest.raises(ValueError, match="has no best checkpoint, only: last"):
        checkpoint.load(tmp_path, "best")


# --- Malice ---------------------------------------------------------------------------------------


def put(out_dir: Path, write: Callable[[Path], Any]) -> None:
    """Replace the last checkpoint by another file, and let the record agree."""
    path = path_of(out_dir, "last")
    write(path)
    record = json.loads((out_dir / checkpoint.RECORD).read_text())
    record["last"]["bytes"] = path.stat().st_size
    record["last"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out_dir / checkpoint.RECORD).write_text(json.dumps(record))


class Attack:
    """Unpickles as a call that makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(saved: Path):
    made = saved / "attacked"
    content = {"format": checkpoint.FORMAT, **state(2), "config": Attack(made)}
    put(saved, lambda path: torch.save(content, path))
    with pytest.raises(ValueError, match=r"is refused: .* tensors and plain values only"):
        checkpoint.load(saved, "last")
    assert not made.exists()
    torch.load(path_of(saved, "last"), weights_only=False)  # it would have run
    assert made.exists()


def test_code_in_a_bare_pickle_is_refused_and_does_not_run(saved: Path):
    made = saved / "attacked"
    put(saved, lambda path: path.write_bytes(pickle.dumps(Attack(made), protocol=2)))
    with pytest.raises(ValueError, match="is refused"):
        checkpoint.load(saved, "last")
    assert not made.exists()


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"PK\x03\x04", b"text\n", bytes(1000)])
def test_a_file_that_is_no_checkpoint_is_refused(saved: Path, data: bytes):
    put(saved, lambda path: path.write_bytes(data))
    with pytest.raises(ValueError, match="is refused"):
        checkpoint.load(saved, "last")


@pytest.mark.parametrize("content", [{"format": 999}, {"step": 1}, [1, 2], torch.zeros(3)])
def test_another_format_is_refused_with_both_numbers(saved: Path, content: Any):
    put(saved, lambda path: torch.save(content, path))
    with pytest.raises(ValueError, match=r"has format (999|None); this code reads formats 1 and 2"):
        checkpoint.load(saved, "last")


def test_a_checkpoint_of_the_first_format_is_read_without_its_kernel(saved: Path):
    old = {"format": 1, **state(2), "model_config": {"n_layer": 3, "attention": "fused"}}
    put(saved, lambda path: torch.save(old, path))
    assert checkpoint.load(saved, "last")["model_config"] == {"n_layer": 3}


def test_only_a_last_checkpoint_is_one_to_go_on_from(tmp_path: Path):
    assert not checkpoint.has_last(tmp_path / "nowhere")
    checkpoint.save(tmp_path, state(0), ["step_0"])
    assert not checkpoint.has_last(tmp_path)
    checkpoint.save(tmp_path, state(1), ["last"])
    assert checkpoint.has_last(tmp_path)


# --- The folder -----------------------------------------------------------------------------------


def test_a_new_run_sets_the_run_before_it_aside(
    saved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out_dir = tmp_path / "a/run"
    report.open_folder(out_dir, resume=False).close()
    for number in (1, 2, 3):
        config = train.TrainConfig(out_dir=out_dir, seed=number)
        (out_dir / "config.toml").write_text(cli.dump_config(config))
        (out_dir / "metrics.jsonl").write_text(f"{number}")
        checkpoint.save(out_dir, state(number), ["last"])
        report.open_folder(out_dir, resume=False).close()
        assert names_in(out_dir) == set()
        assert capsys.readouterr().out.endswith(f"which is now in {out_dir}_{number}\n")
    for number in (1, 2, 3):
        aside = tmp_path / f"a/run_{number}"
        assert steps(aside) == {"last": number}
        assert (aside / "metrics.jsonl").read_text() == f"{number}"
        expected = train.TrainConfig(out_dir=aside, seed=number)
        assert cli.parse_config(train.TrainConfig, [str(aside / "config.toml")]) == expected


def test_a_folder_without_a_config_is_set_aside_too(saved: Path):
    (saved / "config.toml").unlink(missing_ok=True)
    report.open_folder(saved, resume=False).close()
    assert checkpoint.has_last(saved.with_name(f"{saved.name}_1"))


def test_a_resumed_run_keeps_its_folder(saved: Path):
    before = names_in(saved)
    report.open_folder(saved, resume=True).close()
    assert names_in(saved) == before


# --- Restoring ------------------------------------------------------------------------------------


def parts(name: Any = "muon", n_embd: int = 8) -> tuple[GPT, list[Optimizer]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "context_length": 8, "n_layer": 1, "n_head": 2}
    model = GPT(ModelConfig(architecture="modern", n_embd=n_embd, **sizes))
    return model, build_optimizers(model, OptimConfig(name=name))


def updated(model: GPT, optimizers: list[Optimizer], n: int) -> dict[str, Any]:
    """The weights after `n` updates, each with its own gradient."""
    loss_model = LossModel(model, torch.float32)
    for i in range(n):
        tokens_BT = torch.arange(8)[None] + i % 3
        loss_model(tokens_BT, tokens_BT + 1).backward()
        for optimizer in optimizers:
            optimizer.step(torch.tensor(1.0), torch.tensor(True))
        model.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_go_on_after_a_restore_as_if_nothing_had_happened(tmp_path: Path, name: Any):
    model, optimizers = parts(name)
    updated(model, optimizers, 3)
    checkpoint.save(tmp_path, {"step": 3, **resume.pack(model, optimizers)}, ["last"])
    expected = updated(model, optimizers, 4)
    model, optimizers = parts(name)
    resume.unpack(checkpoint.load(tmp_path, "last"), model, optimizers)
    found = updated(model, optimizers, 4)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_holds_no_settings_of_the_optimizers_so_that_a_run_may_change_them():
    state = resume.pack(*parts())
    for names in state["optimizers"]:
        assert all(isinstance(tensor, torch.Tensor) for ts in names.values() for tensor in ts)


def test_another_optimizer_is_refused():
    model, optimizers = parts("adamw")
    with pytest.raises(ValueError, match=r"its own optimizer: optim\.name has changed"):
        resume.unpack(resume.pack(*parts("muon")), model, optimizers)


@pytest.mark.parametrize(
    ("asked", "saved", "key"),
    [
        ({"n_layer": 1}, {"n_layer": 2}, "n_layer"),
        ({"n_layer": 1}, {}, "n_layer"),
        ({}, {"n_layer": 2}, "n_layer"),
        ({"a": 1, "b": [1, 2], "c": 3}, {"a": 1, "b": [2, 1], "c": 3}, "b"),
    ],
)
def test_a_difference_is_refused_by_name_with_the_ways_out(asked: Any, saved: Any, key: str):
    message = rf"another model: its {key} differs .*config\.toml and dataset, or .* another out_dir"
    with pytest.raises(ValueError, match=message):
        resume.check_same("model", asked, saved)


def test_no_difference_is_no_error():
    resume.check_same("model", {"n_layer": 1}, {"n_layer": 1})
