"""The picture of the loss, the use of the hardware, and what a run says of itself."""

import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import files
from engine import report
from engine.count import flops_per_token, peak_flops
from engine.parallel import World
from helpers import train_here
from model import GPT, ModelConfig

CPU = World(torch.device("cpu"))
GPT2_124M: Any = {"vocab_size": 50257, "n_layer": 12, "n_embd": 768, "context_length": 1024}


def on_meta(**sizes: Any) -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig(**sizes))


def write_log(folder: Path, lines: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "train_loss": 3.0}, {"step": 1, "val_loss": 2.0}],
        [{"step": 0, "val_loss": 2.0}],
        [],
    ],
)
def test_the_picture_is_a_png_whatever_was_logged(tmp_path: Path, lines: list[Any]):
    write_log(tmp_path, lines)
    report.plot_loss(tmp_path, {"bigram model": 2.5})
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (840, 480)


def test_a_run_whose_log_cannot_be_opened_leaves_its_folder_to_others(tiny: Path, tmp_path: Path):
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"metrics\.jsonl") as failed:  # which keeps all that it knew
        train_here(tiny, tmp_path / "run")
    files.Lock(tmp_path / "run").close()
    assert failed.value.errno == errno.EISDIR


def test_both_losses_are_drawn_at_their_steps_and_the_bigram_models_as_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from matplotlib import pyplot

    write_log(tmp_path, [{"step": 0, "train_loss": 3.0}, {"step": 5, "val_loss": 2.0}])
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.plot_loss(tmp_path, {"bigram model": 2.5})
    monkeypatch.undo()
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    pyplot.close(figures[0])
    level = drawn.pop("bigram model: 2.50")
    assert drawn == {"train_loss": [[0.0, 3.0]], "val_loss": [[5.0, 2.0]]}
    assert {height for _, height in level} == {2.5}


def test_a_run_is_announced_in_tokens_and_epochs(capsys: pytest.CaptureFixture[str]):
    sizes: Any = {"vocab_size": 11, "n_layer": 1, "n_embd": 8, "n_head": 2}
    model = on_meta(**sizes, context_length=64)  # positions: 64 x 8; tokens: 11 x 8
    config = {"max_steps": 2000, "batch_size": 12, "model": {"context_length": 64}}
    config |= {"precision": "float32", "resume": False, "out_dir": "out/run"}
    config |= {"parallel": "auto"}
    report.announce(model, config, 1_000_000, CPU)
    attention, mlp = 4 * 8 * 8 + 4 * 8, 2 * 4 * 8 * 8 + 5 * 8  # matrices and their biases
    total = 3 * 2 * 8 + 75 * 8 + attention + mlp
    assert capsys.readouterr().out.splitlines() == [
        f"parameters: 48 norms, 600 embeddings, {attention} attention, {mlp} mlp, 0 head, "
        f"{total:,} total",
        "run: 2,000 steps of 768 tokens, 1.54 epochs",
        "device: 1 x cpu, float32",
    ]


@pytest.mark.parametrize(
    ("resume", "step", "is_said"), [(True, 0, True), (True, 4, False), (False, 0, False)]
)
def test_a_run_that_was_to_go_on_but_starts_anew_says_so(
    capsys: pytest.CaptureFixture[str], resume: bool, step: int, is_said: bool
):
    config = {"max_steps": 8, "batch_size": 1, "model": {"context_length": 64}}
    config |= {"precision": "float32", "resume": resume, "out_dir": "out/run"}
    config |= {"parallel": "ddp"}
    report.announce(on_meta(**GPT2_124M), config, 1000, CPU, step)
    line = "out/run has no checkpoint to resume: the run starts at step 0"
    assert (line in capsys.readouterr().out.splitlines()) == is_said


@pytest.mark.parametrize(("kind", "n", "is_said"), [("fsdp", 1, True), ("fsdp", 2, False)])
def test_one_process_that_was_asked_to_share_a_model_says_that_it_holds_it_all(
    capsys: pytest.CaptureFixture[str], kind: str, n: int, is_said: bool
):
    config = {"max_steps": 8, "batch_size": 1, "model": {"context_length": 64}, "parallel": kind}
    config |= {"precision": "float32", "resume": False, "out_dir": "out/run"}
    report.announce(on_meta(**GPT2_124M), config, 1000, World(torch.device("cpu"), size=n))
    line = "parallel=fsdp: this one process holds the whole model"
    assert (line in capsys.readouterr().out.splitlines()) == is_said


@pytest.mark.parametrize("entropy", [None, 1.25])
def test_the_end_of_a_run_tells_the_distance_to_the_entropy_where_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entropy: float | None
):
    write_log(tmp_path, [{"step": 0, "train_loss": 3.0}])
    report.conclude(tmp_path, 1.28, 2.5, entropy, lambda loss: loss / 2, True)
    said = capsys.readouterr().out
    assert "best validation loss: 1.2800 nats per token, 0.6400 bits per byte" in said
    line = "entropy of the text (the best is 2.40 % above): 1.2500 nats per token"
    assert (line in said) == (entropy is not None)


# --- The use of the hardware ----------------------------------------------------------------------


def test_the_operations_of_gpt2_are_six_per_weight_and_those_of_attention():
    weights = 12 * 12 * 768**2 + 50257 * 768  # 12 C² in each block, and the head
    by_hand = 6 * weights + 12 * 12 * 768 * 1024  # nanoGPT's 6 N + 12 L H Q T
    assert flops_per_token(ModelConfig(**GPT2_124M)) == by_hand


def test_an_untied_head_costs_what_a_tied_one_does():
    tied, untied = (
        flops_per_token(ModelConfig(architecture="modern", tie_embeddings=tie, **GPT2_124M))
        for tie in (True, False)
    )
    assert tied == untied


@pytest.mark.parametrize(
    ("name", "teraflops"),  # dense bfloat16, from NVIDIA's data sheets
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_each_gpu_has_the_peak_of_its_own_data_sheet(name: str, teraflops: int):
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI300X",
        "cpu",
    ],
)
def test_a_variant_that_is_not_listed_has_no_peak_rather_than_that_of_another(name: str):
    assert peak_flops(name) is None


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> World:
    """Eight A100, each of which has used 7 bytes at most."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    return World(torch.device("cuda"), rank=3, size=8)


def test_half_of_the_peak_of_eight_gpus_is_a_utilisation_of_a_half(gpus: World):
    model = ModelConfig(**GPT2_124M)
    tokens_per_second = 0.5 * 8 * 312e12 / flops_per_token(model)
    found = report.speed(gpus, model, "bfloat16", tokens_per_second / gpus.size)
    assert found == {
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": 7,
        "mfu": pytest.approx(0.5),
    }


def test_unknown_hardware_has_no_utilisation(gpus: World, monkeypatch: pytest.MonkeyPatch):
    model = ModelConfig(**GPT2_124M)
    assert report.speed(CPU, model, "float32", 1000.0) == {"tokens_per_second": 1000.0}
    known = {"tokens_per_second", "peak_memory_bytes"}
    assert report.speed(gpus, model, "float32", 1000.0).keys() == known  # of other peaks
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    assert report.speed(gpus, model, "bfloat16", 1000.0).keys() == known
