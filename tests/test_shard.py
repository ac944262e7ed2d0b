"""Runs whose numbers are shared over processes, against runs of one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import train
from engine import checkpoint, muon
from engine.parallel import World
from engine.shard import Owners, choose_parallel
from helpers import REPOSITORY, finish, losses, start_many, train_here, write_tiny
from model import ModelConfig

CPU = torch.device("cpu")
EXACT = ("--model.dropout=0", "--max_steps=12", "--optim.grad_clip=0.5", "--micro_batch_size=1")
GPT2 = ("--model.architecture=gpt2", "--model.tie_embeddings", "--optim.name=adamw")
TIED = ("--model.tie_embeddings",)
UNEVEN = ("--model.vocab_size=101",)
RATES = ("--optim.muon_learning_rate=0.02", "--optim.embedding_learning_rate=0.03")
CONSTANT = ("--optim.decay_fraction=0", *RATES)  # they do not depend on the number of steps
WAYS = {"ddp": 0, "fsdp": 0, "hsdp": 2}  # and how many processes count as of one machine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


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
KINDS = {"uneven": UNEVEN, "tied": TIED, "gpt2": GPT2}
MEETINGS = [(n, way, kind) for n, way in ((2, "ddp"), (2, "fsdp"), (4, "hsdp")) for kind in KINDS]
QUICK = [(2, "ddp", "uneven"), (2, "fsdp", "gpt2"), (4, "hsdp", "tied")]


@pytest.mark.parametrize(
    ("n", "way", "kind"),
    [pytest.param(*m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MEETINGS],
)
def test_processes_that_share_a_model_give_the_losses_of_one(
    tiny: Path, tmp_path: Path, n: int, way: str, kind: str
):
    run(n, way, tiny, tmp_path / "shared", *KINDS[kind])
    train_here(tiny, tmp_path / "alone", *EXACT, *KINDS[kind])
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "hsdp"])
def test_after_50_steps_four_processes_are_at_the_losses_of_one(
    tiny: Path, tmp_path: Path, way: str
):
    run(4, way, tiny, tmp_path / "shared", *UNEVEN, "--max_steps=50")
    train_here(tiny, tmp_path / "alone", *EXACT, *UNEVEN, "--max_steps=50")
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    train_here(tiny, path, *EXACT, *CONSTANT)
    return path


def test_what_two_processes_saved_goes_on_in_four_and_in_one(
    tiny: Path, alone: Path, tmp_path: Path
):
    path = tmp_path / "shared"
    run(2, "fsdp", tiny, path, *CONSTANT, "--max_steps=4")
    run(4, "hsdp", tiny, path, *CONSTANT, "--max_steps=8", "--resume")
    train_here(tiny, path, *EXACT, *CONSTANT, "--parallel=fsdp", "--resume")
    assert losses(path)[-5:] == pytest.approx(losses(alone)[-5:], abs=1e-5)
    weights = [checkpoint.load(folder, "last")["model"] for folder in (path, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


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

    def noted(matrices_KMN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        print(f"rank {os.environ['RANK']}: {tuple(matrices_KMN.shape)}")
        return make(matrices_KMN, dtype)

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
    # Of 2 layers: queries, keys, values and c_proj; c_gate and c_fc; the MLP's c_proj
    assert by_shape == {("16", "16"): [4, 4], ("64", "16"): [2, 2], ("16", "64"): [1, 1]}


def test_a_process_may_own_no_matrix():
    update = muon.orthogonalize(torch.empty(0, 4, 3), torch.float32)
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


DYING = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import train
from engine import cli

real = train.update

def update(run, batch):
    if run.world.rank == 1 and run.progress.step == {step} and not restarts:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run, batch)

restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
train.update = update
cli.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "step"), [("ddp", 1), ("fsdp", 7)])
def test_a_job_whose_worker_is_killed_ends_with_the_losses_of_an_undisturbed_one(
    tiny: Path, tmp_path: Path, way: str, step: int
):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(repository=str(REPOSITORY), step=step))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--max-restarts=1", str(script), str(tiny), "--auto_resume"]
    command += [f"--out_dir={tmp_path / 'run'}", *EXACT, f"--parallel={way}"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/clusters.md
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "-9" in done.stderr
    train_here(tiny, tmp_path / "alone", *EXACT)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
