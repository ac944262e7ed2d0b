"""The log: what is written, what a resumed run forgets, and the use of the hardware."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.metrics import Metrics, check_finite, flops_per_token, forget_from, mfu, read
from engine.report import count_parameters
from model import GPT, ModelConfig

GPT2_124M: Any = {"vocab_size": 50257, "n_layer": 12, "n_embd": 768, "context_length": 1024}


def on_meta(**sizes: Any) -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig(**sizes))


def log_three_steps(metrics: Metrics) -> None:
    for step in range(3):
        metrics.evaluation(step, 2.5 - step, 3.5 - step)
        metrics.update(step, torch.tensor((2.0, 1.0)), rate=0.1, n_tokens=100, seconds=0.5)
        metrics.flush()
    metrics.close()


def test_each_line_is_one_json_object_with_its_numbers(tmp_path: Path):
    log_three_steps(Metrics(tmp_path, 0, 3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read(tmp_path / "metrics.jsonl")
    evaluation, update = read(tmp_path / "metrics.jsonl")[2:4]
    assert evaluation == {
        "step": 1,
        "val_loss": 1.5,
        "val_bits_per_byte": 2.5,
        "elapsed_seconds": 0.5,
    }
    assert update == {
        "step": 1,
        "train_loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 200.0,
        "elapsed_seconds": 1.0,
    }


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path: Path):
    metrics = Metrics(tmp_path, 0, 3)
    metrics.evaluation(0, 1.0, 2.0)
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    metrics.close()


def test_without_a_folder_nothing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, 0, 3)
    for step in range(3):
        metrics.update(step, torch.tensor((2.0, 1.0)), rate=0.1, n_tokens=100, seconds=0.5)
        metrics.flush()
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_resumed_log_forgets_what_it_will_write_again(tmp_path: Path):
    log_three_steps(Metrics(tmp_path, 0, 3))
    before = read(tmp_path / "metrics.jsonl")
    metrics = Metrics(tmp_path, 2, 3, elapsed_seconds=1.0)
    assert read(tmp_path / "metrics.jsonl") == before[:4]
    metrics.update(2, torch.tensor((2.0, 1.0)), rate=0.1, n_tokens=100, seconds=0.5)
    metrics.flush()
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [*before[:4], before[5]]


def test_a_line_that_a_kill_cut_off_is_forgotten(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "val_loss": 1.0}\n{"step": 1, "val_loss": 1.0}\n'
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        forget_from(path, 2)
        assert path.read_text() == "".join(
            line for line in whole[:cut].splitlines(keepends=True) if line.endswith("\n")
        )
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_log_there_is_nothing_to_forget(tmp_path: Path):
    forget_from(tmp_path / "metrics.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


def test_the_operations_of_gpt2_are_six_per_weight_and_those_of_attention():
    parts = count_parameters(on_meta(**GPT2_124M))
    weights = 12 * 12 * 768**2 + 50257 * 768  # 12 C² in each block, and the head
    by_hand = 6 * weights + 12 * 12 * 768 * 1024  # nanoGPT's 6 N + 12 L H Q T
    assert flops_per_token(parts, GPT2_124M) == pytest.approx(by_hand, rel=1e-3)  # its biases


def test_an_untied_head_costs_what_a_tied_one_does():
    tied, untied = (
        flops_per_token(
            count_parameters(on_meta(architecture="modern", tie_embeddings=tie, **GPT2_124M)),
            GPT2_124M,
        )
        for tie in (True, False)
    )
    assert tied == untied


def test_half_of_the_peak_of_eight_gpus_is_a_utilisation_of_a_half():
    # 312e12 operations a second each: at 855e6 per token, half of eight is 1.46e6 tokens
    tokens_per_second = 0.5 * 8 * 312e12 / 855_000_000
    values = mfu(855_000_000, "NVIDIA A100-SXM4-80GB", 8)(tokens_per_second)
    assert values == {"mfu": pytest.approx(0.5)}


def test_unknown_hardware_has_no_utilisation():
    assert mfu(855_000_000, "cpu", 1)(1000.0) == {}


@pytest.mark.parametrize(
    ("loss", "grad_norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, math.nan)],
)
def test_a_number_that_is_not_finite_is_refused_with_its_step(loss: float, grad_norm: float):
    with pytest.raises(ArithmeticError, match=r"step 17 .* not finite .* lower the learning rate"):
        check_finite(17, loss=loss, grad_norm=grad_norm)


def test_finite_numbers_pass():
    check_finite(17, loss=1e30, grad_norm=0.0)
