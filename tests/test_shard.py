"""Runs whose numbers are shared over processes, against runs of one process."""

import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import convert
import sample
import train
from engine import checkpoint, muon, shares
from engine.parallel import World
from engine.shard import Owners, choose_parallel
from helpers import REPOSITORY, finish, losses, run_here, start, start_many, train_here
from model import ModelConfig

CPU = torch.device("cpu")
EXACT = ("--model.dropout=0", "--max_steps=12", "--optim.grad_clip=0.5", "--micro_batch_size=1")
GPT2 = ("--model.architecture=gpt2", "--model.tie_embeddings", "--optim.name=adamw")
TIED = ("--model.tie_embeddings",)
UNEVEN = ("--model.vocab_size=101",)
RATES = ("--optim.muon_learning_rate=0.02", "--optim.embedding_learning_rate=0.03")
CONSTANT = ("--optim.decay_fraction=0", *RATES)  # they do not depend on the number of steps
WAYS = {"ddp": 0, "fsdp": 0, "hsdp": 2}  # and how many processes count as of one machine


def run(n: int, way: str, tiny: Path, out_dir: Path, *flags: str, script: str = "train") -> str:
    """Train in `n` processes; return what they printed."""
    log = out_dir.with_suffix(".log")
    arguments = (tiny, f"--out_dir={out_dir}", *EXACT, f"--parallel={way}", *flags)
    processes = start_many(n, script, *arguments, output=log, per_machine=WAYS[way])
    codes = [finish(process) for process in processes]
    said = log.read_text(encoding="utf-8")
    assert codes == [0] * n, said
    return said


SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "requeue", "open-mode", "signal"),
}
# 50257 is divisible by 29 and 1733 alone, so its rows are uneven
LARGE = ("--model.vocab_size=50257", "--max_steps=4")
KINDS = {"uneven": UNEVEN, "tied": TIED, "gpt2": GPT2, "large": LARGE, "tied large": LARGE + TIED}
MEETINGS = [(n, way, kind) for n, way in ((2, "ddp"), (2, "fsdp"), (4, "hsdp")) for kind in KINDS]
QUICK = [(2, "ddp", "uneven"), (2, "fsdp", "gpt2")]


@pytest.mark.parametrize(
    ("n", "way", "kind"),
    [pytest.param(*m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MEETINGS],
)
def test_processes_that_share_a_model_give_the_losses_of_one(
    tiny: Path, tmp_path: Path, n: int, way: str, kind: str
):
    run(n, way, tiny, tmp_path / "shared", *KINDS[kind])
    train_here(tiny, tmp_path / "alone", *EXACT, *KINDS[kind])
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=5e-5)


# At three times these rates rounding alone grows to 3e-3 in 50 steps: one process that adds up its
# gradients over other micro-batches differs as much
GENTLE = (
    *("--max_steps=50", "--optim.learning_rate=1e-3", "--optim.muon_learning_rate=0.005"),
    "--optim.embedding_learning_rate=0.003",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"), [("ddp", "uneven"), ("fsdp", "tied"), ("hsdp", "tied"), ("hsdp", "gpt2")]
)
def test_after_50_steps_four_processes_are_at_the_losses_of_one(
    tiny: Path, tmp_path: Path, way: str, kind: str
):
    run(4, way, tiny, tmp_path / "shared", *KINDS[kind], *GENTLE)
    train_here(tiny, tmp_path / "alone", *EXACT, *KINDS[kind], *GENTLE)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    train_here(tiny, path, *EXACT, *CONSTANT)
    return path


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_in_four_and_in_one(
    tiny: Path, alone: Path, tmp_path: Path
):
    path = tmp_path / "shared"
    run(2, "fsdp", tiny, path, *CONSTANT, "--max_steps=4")
    run(4, "hsdp", tiny, path, *CONSTANT, "--max_steps=8", "--resume")
    train_here(tiny, path, *EXACT, *CONSTANT, "--parallel=fsdp", "--resume")
    assert losses(path)[-5:] == pytest.approx(losses(alone)[-5:], abs=5e-5)
    weights = [checkpoint.load(folder, "last")["model"] for folder in (path, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, with checkpoints of steps 4 and 8."""
    path = tmp_path_factory.mktemp("shared") / "run"
    run(2, "fsdp", tiny, path, *CONSTANT, "--max_steps=8", "--keep_every=4")
    return path


def shares_of(out_dir: Path, name: str) -> list[Path]:
    record = json.loads((out_dir / checkpoint.RECORD).read_text())[name]["shares"]
    return [out_dir / record["folder"] / file for file in sorted(record["sha256"])]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_each_process_writes_its_share_and_none_the_whole(shared: Path):
    state = checkpoint.load(shared, "last")
    n = sum(tensor.numel() for tensor in state["model"].values())
    sizes = [path.stat().st_size for path in shares_of(shared, "last")]
    assert len(sizes) == 2
    assert all(size > 4 * 2 * n / 2 for size in sizes)  # weights and at least one mean
    assert max(sizes) < 0.6 * sum(sizes)
    assert sum(path.stat().st_size for path in shared.glob("*.pt")) < min(sizes)


def test_a_flipped_bit_in_any_share_is_found(shared: Path, tmp_path: Path):
    out_dir = tmp_path / "run"
    shutil.copytree(shared, out_dir)
    rng = random.Random(0)
    for path in shares_of(out_dir, "last"):
        n = 8 * path.stat().st_size
        for bit in [0, n - 1, *(rng.randrange(n) for _ in range(50))]:
            flip(path, bit)
            with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged"):
                checkpoint.load(out_dir, "last")
            flip(path, bit)
    checkpoint.load(out_dir, "last")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_is_started_again_skips_a_damaged_share_and_names_it(
    tiny: Path, shared: Path, alone: Path, tmp_path: Path, rank: int
):
    out_dir = tmp_path / "run"
    shutil.copytree(shared, out_dir)
    damaged = shares_of(out_dir, "last")[rank]
    flip(damaged, 4000)
    said = run(2, "fsdp", tiny, out_dir, *CONSTANT, "--auto_resume")
    assert f"skipped the last checkpoint: {damaged} is missing or damaged" in said
    assert losses(out_dir) == pytest.approx(losses(alone), abs=5e-5)  # from step 4 on
    run(2, "fsdp", tiny, out_dir, *CONSTANT, "--resume")


def test_shares_become_one_file_that_is_sampled_like_any_other(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    to = tmp_path / "whole"
    assert run_here(convert.main, "convert.py", "merge", f"--out_dir={shared}", f"--to={to}") == 0
    assert not list(to.glob("*.shares"))
    merged, state = (checkpoint.load(folder, "best") for folder in (to, shared))
    torch.testing.assert_close(merged["model"], state["model"], rtol=0, atol=0)
    capsys.readouterr()
    texts = []
    for folder in (to, shared):
        flags = (f"--out_dir={folder}", "--precision=float32", "--num_samples=1")
        assert run_here(sample.main, "sample.py", *flags, "--max_new_tokens=20") == 0
        texts.append(capsys.readouterr().out)
    assert len(texts[0]) > 20
    assert texts[0] == texts[1]


def train_where_one_process_cannot_write() -> None:
    """train.py, where the second process finds the disk full at its second checkpoint."""
    real, calls = shares.write, iter(range(100))

    def full(folder: Path, tensors: Any, group: Any) -> dict[str, str]:
        if os.environ["RANK"] == "1" and next(calls) == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
                return real(folder, tensors, group)
        return real(folder, tensors, group)

    shares.write = full
    train.main()


@pytest.mark.slow
def test_where_one_process_cannot_write_all_end_with_a_sentence_and_the_checkpoint_before(
    tiny: Path, alone: Path, tmp_path: Path
):
    out_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = (tiny, f"--out_dir={out_dir}", *EXACT, *CONSTANT, "--parallel=fsdp")
    script = "test_shard:train_where_one_process_cannot_write"
    processes = start_many(2, script, *arguments, output=log)
    assert [finish(process) for process in processes] == [2, 2]
    said = log.read_text(encoding="utf-8")
    assert said.count("the checkpoint of step 8 could not be written") == 2
    assert "process 1: [Errno 28] full" in said
    assert checkpoint.load(out_dir, "last")["step"] == 4
    assert len(list(out_dir.glob("*.shares"))) == 1
    run(2, "fsdp", tiny, out_dir, *CONSTANT, "--resume")
    assert losses(out_dir) == pytest.approx(losses(alone), abs=5e-5)


@pytest.mark.parametrize("broken", ["", "dropped", "shifted", "swapped"])
def test_the_test_before_notices_a_broken_restore(
    tiny: Path, alone: Path, tmp_path: Path, broken: str
):
    train_here(tiny, tmp_path / "run", *EXACT, *CONSTANT, "--max_steps=4")
    state = checkpoint.load(tmp_path / "run", "last")
    for means in state["optimizers"][1].values():
        if broken == "dropped":
            means[0].zero_()
        elif broken == "shifted":  # as by another step
            means[0].mul_(0.9)
        elif broken == "swapped":  # the shares of two processes
            means[0].copy_(means[0].roll(len(means[0]) // 2, 0))
    checkpoint.save(tmp_path / "run", state, ["last"])
    train_here(tiny, tmp_path / "run", *EXACT, *CONSTANT, "--resume")
    difference = abs(losses(tmp_path / "run")[-1] - losses(alone)[-1])
    assert (difference > 1e-4) == (broken != "")


def train_and_count_matrices() -> None:
    """train.py, which also says how many matrices each call made orthogonal."""
    make = muon.orthogonalize

    def noted(matrices_KMN: torch.Tensor) -> torch.Tensor:
        print(f"rank {os.environ['RANK']}: {tuple(matrices_KMN.shape)}")
        return make(matrices_KMN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalize", noted)
        train.main()


@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_each_process_makes_its_share_of_the_matrices_orthogonal(
    tiny: Path, tmp_path: Path, way: str
):
    script = "test_shard:train_and_count_matrices"
    said = run(2, way, tiny, tmp_path / "run", "--max_steps=1", script=script)
    found = re.findall(r"rank (\d): \((\d+), (\d+), (\d+)\)", said)
    by_shape: dict[tuple[str, ...], list[int]] = {}
    for _, n, *shape in sorted(found):
        by_shape.setdefault(tuple(shape), []).append(int(n))
    # Of 2 layers: queries, keys, values and c_proj; c_gate, c_fc and the MLP's c_proj
    assert by_shape == {("16", "16"): [4, 4], ("16", "64"): [3, 3]}


def test_a_process_may_own_no_matrix():
    update = muon.orthogonalize(torch.empty(0, 4, 3))
    assert update.shape == (0, 4, 3)
    rows = torch.randn(2, 3, 4)
    assert Owners().gather(rows, 2, 3) is rows


def test_a_model_that_does_not_fit_is_shared_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("engine.shard.memory_bytes", lambda device: 2**30)
    small = ModelConfig(vocab_size=100, n_layer=2, n_embd=64)
    large = ModelConfig(vocab_size=100, n_layer=12, n_embd=768)  # 85 M, of 16 bytes each
    world = World(CPU, 0, 2)
    assert choose_parallel("auto", small, world) == "ddp"
    assert choose_parallel("auto", large, world) == "fsdp"
    assert choose_parallel("ddp", large, world) == "ddp"
    assert choose_parallel("auto", large, World(CPU)) == "ddp"


def test_a_recomputed_run_has_the_same_losses(tiny: Path, tmp_path: Path):
    for name, flags in (("kept", ()), ("again", ("--recompute",))):
        train_here(tiny, tmp_path / name, *flags)  # with dropout, which is drawn again alike
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


# Field names of the Kubeflow Trainer's types (v2.3) and of SkyPilot's schema
KEYS = {
    "trainer.kubeflow.org/v1alpha1": {
        *("apiVersion", "kind", "metadata", "metadata.name", "spec", "spec.runtimeRef"),
        *("spec.runtimeRef.name", "spec.trainer", "spec.trainer.image", "spec.trainer.numNodes"),
        *("spec.trainer.env", "spec.trainer.command", "spec.trainer.resourcesPerNode"),
        *("spec.trainer.resourcesPerNode.limits", "nvidia.com/gpu"),
    },
    "sky": {
        *("num_nodes", "resources", "resources.accelerators", "resources.use_spot", "run"),
        *("resources.job_recovery", "resources.job_recovery.strategy", "file_mounts"),
        *("resources.job_recovery.max_restarts_on_errors", "/out", "/out.name", "/out.mode"),
        *("envs", "envs.TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    },
}


def keys_of(text: str) -> set[str]:
    """The dotted keys of simple YAML, from the last one that has a slash."""
    found: set[str] = set()
    above: list[tuple[int, str]] = []
    for line in text.split("run: |")[0].splitlines():
        key = re.match(r"( *)([\w./]+):", line)
        if key:
            depth = len(key[1])
            above = [*(pair for pair in above if pair[0] < depth), (depth, key[2])]
            path = [name for _, name in above]
            first = max((i for i, name in enumerate(path) if "/" in name), default=0)
            found.add(".".join(path[first:]))
    return found | ({"run"} if "run: |" in text else set())


def test_the_job_files_have_keys_that_exist_and_flags_that_train_has():
    text = (REPOSITORY / "docs/clusters.md").read_text(encoding="utf-8")
    kubernetes, sky = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert keys_of(kubernetes) == KEYS["trainer.kubeflow.org/v1alpha1"]
    assert keys_of(sky) == KEYS["sky"]
    (slurm,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    assert set(re.findall(r"#SBATCH --([\w-]+)", slurm)) <= SBATCH
    for flag in set(re.findall(r"--(auto_resume|parallel|recompute|out_dir)\b", text)):
        assert flag in train.TrainConfig.__dataclass_fields__
    torchrun = set(re.findall(r"--((?:rdzv|max|nproc|nnodes)[\w-]*)", text))
    assert torchrun <= {action.dest.replace("_", "-") for action in get_args_parser()._actions}


def train_with_little_memory() -> None:
    """train.py, which may take 26 bytes for each of its 51 million parameters.

    With AdamW one process takes 16 to train, and 12 more while a copy of them is written.
    """
    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        importlib.import_module(module)  # their memory does not count
    shares.FILE_BYTES = 2**24  # as small beside this model as they are beside a large one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = 1024 * int(re.findall(r"VmData:\s+(\d+) kB", status)[0])
    limit = used + 26 * 50_600_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    train.main()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_too_large_for_one_process_trains_resumes_and_is_evaluated_in_two(
    tiny: Path, tmp_path: Path
):
    sizes = ("--model.n_layer=16", "--model.n_embd=512", "--model.n_head=8", "--batch_size=2")
    flags = (*sizes, "--optim.name=adamw", "--parallel=fsdp", "--eval_every=2")
    script = "test_shard:train_with_little_memory"
    log = tmp_path / "log"
    process = start(script, tiny, f"--out_dir={tmp_path / 'alone'}", *flags, output=log)
    assert finish(process) not in (0, None)
    assert "allocate memory" in log.read_text(encoding="utf-8")
    for more in (("--max_steps=2",), ("--max_steps=3", "--resume")):
        run(2, "fsdp", tiny, tmp_path / "run", *flags, *more, script=script)


DYING = """
import datetime, os, signal, sys
sys.path.insert(0, {repository!r})
import train
import cli
from engine import parallel

real = train.update

def update(run, batch):
    if run.world.rank == 1 and run.progress.step == {step} and not restarts:
        os.kill(os.getpid(), {number})
    real(run, batch)

restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
train.update = update
parallel.TIMEOUT = datetime.timedelta(seconds=8)
cli.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "step", "number"),
    [
        ("ddp", 1, signal.SIGKILL),
        ("fsdp", 7, signal.SIGKILL),
        ("fsdp", 5, signal.SIGSTOP),  # torchrun waits 30 s for it to end
    ],
)
def test_a_job_whose_worker_is_killed_or_stopped_ends_with_the_losses_of_an_undisturbed_one(
    tiny: Path, tmp_path: Path, way: str, step: int, number: signal.Signals
):
    script = tmp_path / "dying.py"
    values = {"repository": str(REPOSITORY), "step": step, "number": int(number)}
    script.write_text(DYING.format(**values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--max-restarts=1", str(script), str(tiny), "--auto_resume"]
    command += [f"--out_dir={tmp_path / 'run'}", *EXACT, f"--parallel={way}"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/clusters.md
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    # The other worker says so, unless it was ended before it noticed
    sentence = rf"error: process 0 gave up waiting .* after step {step}: .*said nothing for 8 s"
    assert re.search(sentence, done.stderr) or number == signal.SIGKILL
    assert "-9" in done.stderr or number == signal.SIGSTOP
    train_here(tiny, tmp_path / "alone", *EXACT)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=5e-5)
