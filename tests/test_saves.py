"""Every call of a writing fails, kills, or is the last before the power goes."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import convert
import files
import visualize
from data.loader import Dataset
from data.prepare import PrepareConfig, prepare
from engine import checkpoint, resume, saver
from engine.parallel import World
from faults import FAULTS, Disk, Killed, broken_disk, put, recorded
from helpers import contents, on_linux, outcome, run_here, train_here, weights_alone, words
from promises import Cases, broken

Content = Any


# --- What is written ------------------------------------------------------------------------------


def tree(folder: Path) -> Content:
    """Every file with a hash of its bytes, but those that are unfinished."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    return {name: found for name, found in hashes.items() if ".partial" not in name}


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"step": step, "model": {"weight": torch.randn(5, 7)}, "optimizers": []}


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, state(step), ["last"])


def save_shared(folder: Path, step: int) -> None:
    """Save as a run does whose model is shared by processes; here there is one."""
    mesh = DeviceMesh("cpu", [0])
    shared = state(step)
    shared["model"] = {"weight": distribute_tensor(shared["model"]["weight"], mesh, [Shard(0)])}
    world = World(torch.device("cpu"), host_group=dist.group.WORLD)
    saver.write_shares(world, folder, saver.host_copy(shared, None), ["last"])


def checkpoints(folder: Path) -> Content:
    """The weights of each checkpoint, after comparing hashes."""
    if not (folder / checkpoint.RECORD).exists():
        return {}
    names = json.loads((folder / checkpoint.RECORD).read_text())
    return {n: checkpoint.load(folder, n)["model"]["weight"].tolist() for n in names}


def write_dataset(folder: Path, tokenizer: Any) -> None:
    source = folder.parent / "source.txt"
    source.write_text(words(60, "aeionrst"), encoding="utf-8")
    size = 280 if tokenizer == "bpe" else 0
    sources = (str(source),)
    prepare(PrepareConfig(sources=sources, tokenizer=tokenizer, vocab_size=size, out=folder))


def dataset(folder: Path) -> Content:
    """The tokens of a dataset, or nothing where there is none."""
    if not (folder / "meta.json").exists():
        return None
    opened = Dataset.open(folder)
    return {split: opened.tokens(split).tolist() for split in ("train", "val")}


def export_folder(trained: Path, folder: Path, version: int) -> None:
    if version == 2:  # a folder that is there is never written over
        run_quietly(convert.main, "export", f"--out_dir={trained}", f"--to={folder / 'hub'}")


def export_gguf(trained: Path, folder: Path, kind: str) -> None:
    flags = (f"--out_dir={trained}", f"--to={folder / 'a.gguf'}", f"--type={kind}")
    run_quietly(convert.main, "export", *flags)


def draw(trained: Path, folder: Path, text: str) -> None:
    flags = (f"--out_dir={trained}", f"--text={text}", f"--html={folder / 'a.html'}")
    run_quietly(visualize.main, *flags)


def run_quietly(main: Callable[[], None], *flags: str) -> None:
    """Run a script. Raises OSError with its sentence if it refuses, and lets a traceback out."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        if run_here(main, "script", *flags) != 0:
            raise OSError(said.getvalue())


@dataclass
class Writing:
    """What is written by `write(folder, first)`, and then by `write(folder, second)`."""

    write: Callable[..., None]
    versions: tuple[Any, Any] = (1, 2)
    content: Callable[[Path], Content] = tree
    needs_run: bool = False


WRITINGS = {
    "checkpoint": Writing(save, content=checkpoints),
    "shared checkpoint": Writing(save_shared, content=checkpoints),
    "dataset": Writing(write_dataset, ("char", "bpe"), dataset),
    "folder for transformers": Writing(export_folder, needs_run=True),
    "gguf": Writing(export_gguf, ("f32", "f16"), needs_run=True),
    "page": Writing(draw, ("a", "e"), needs_run=True),
}


@pytest.fixture(scope="module", autouse=True)
def a_group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("group")
    dist.init_process_group("gloo", init_method=f"file://{path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- Calls that fail ------------------------------------------------------------------------------


@contextlib.contextmanager
def written_in_place() -> Iterator[None]:
    """Write files where they belong, not beside, and leave the meta.json of an old dataset."""

    @contextlib.contextmanager
    def in_place(path: Path, mode: str = "w") -> Iterator[Any]:
        with open(path, mode, newline=None if "b" in mode else "\n") as file:
            yield file

    def remove(path: Path, missing_ok: bool = False) -> None:
        if path.name != "meta.json" and (path.exists() or not missing_ok):
            os.unlink(path)  # noqa: PTH108  (the real one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "whole", in_place)
        patch.setattr(files, "whole_folder", contextlib.nullcontext)
        patch.setattr(Path, "unlink", remove)
        yield


def write_with(fault: str, call: int, write: Callable[..., None], *arguments: Any) -> Disk:
    """Write, while one call fails; the writing may end in a sentence, or be killed."""
    said = "nothing, as it went well"
    with broken_disk(call, fault) as disk:
        try:
            write(*arguments)
        except Killed:
            said = "nothing, as it is dead"
        except OSError as error:
            said = str(error)
    assert said
    assert "Traceback" not in said
    return disk


@pytest.mark.promise(controls=[written_in_place])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("checkpoint", "dataset") else [pytest.mark.slow])
        for name in WRITINGS
    ],
)
def test_whichever_call_fails_or_kills_what_is_written_is_as_before_or_as_after(
    name: str, cases: Cases, undisturbed: Path, tmp_path: Path
):
    writing = WRITINGS[name]
    write = partial(writing.write, undisturbed) if writing.needs_run else writing.write
    before, after, folder = (tmp_path / part / "folder" for part in ("1", "2", "3"))
    before.mkdir(parents=True)
    write(before, writing.versions[0])
    shutil.copytree(before, after)
    write(after, writing.versions[1])
    old, new = writing.content(before), writing.content(after)
    assert old != new
    for fault in FAULTS if cases.is_full else ("KILL", "ENOSPC"):
        for call in cases.until_none_is_left():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before, folder)
            disk = write_with(fault, call, write, folder, writing.versions[1])
            if not disk.is_hit:
                break
            found = writing.content(folder)
            assert found in (old, new) or (found is None and name == "dataset"), disk.calls
            if fault != "KILL" and disk.failed not in ("unlink", "rmdir"):
                assert not list(folder.rglob("*.partial")), disk.calls
            if found != new:
                write(folder, writing.versions[1])
            assert writing.content(folder) == new, disk.calls


optimizer_not_restored = broken("optimizer_not_restored", resume, "unpack", weights_alone)


@pytest.mark.slow
@pytest.mark.promise(controls=[optimizer_not_restored])
@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_call_of_a_run_fails_or_kills_it_goes_on_to_the_end_of_an_undisturbed_one(
    fault: str, cases: Cases, tiny: Path, undisturbed: Path, tmp_path: Path
):
    if not cases.is_full and fault not in ("KILL", "EIO"):
        pytest.skip("tried by `make torture`")
    expected = outcome(undisturbed)
    calls = range(1 + list(FAULTS).index(fault), 10_000, 11 if cases.is_full else 120)
    for call, _ in zip(calls, cases.until_none_is_left(), strict=False):
        folder = tmp_path / f"run{call}"
        disk = write_with(fault, call, train_here, tiny, folder)
        if not disk.is_hit:
            break
        train_here(tiny, folder, "--auto_resume")
        assert outcome(folder) == expected, disk.calls
        shutil.rmtree(folder)


# --- Power that fails -----------------------------------------------------------------------------


files_not_synced = broken("files_not_synced", files, "sync", lambda file: file.flush())
folder_not_synced = broken("folder_not_synced", files, "sync_folder", lambda _: None)


@on_linux
@pytest.mark.promise(controls=[files_not_synced, folder_not_synced])
@pytest.mark.parametrize("save", [save, save_shared])
def test_whenever_the_power_fails_there_is_a_last_checkpoint_that_loads(
    save: Callable[[Path, int], None], cases: Cases, tmp_path: Path
):
    folder, found = tmp_path / "run", tmp_path / "found"
    save(folder, 1)
    for step in (2, 3, 4):
        before = contents(folder)
        with recorded(folder) as journal:
            save(folder, step)
        for n_calls in range(len(journal.calls) + 1):
            is_saved = n_calls == len(journal.calls)
            for left in journal.states_after(n_calls, before):
                put(found, left)
                loaded = checkpoint.load(found, "last")
                assert loaded["step"] in ([step] if is_saved else [step - 1, step])
                expected = state(loaded["step"])["model"]["weight"]
                assert torch.equal(loaded["model"]["weight"], expected)
                cases.count += 1
