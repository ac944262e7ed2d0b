"""bench.py and the room benchmarks, against a made-up checkout where they need another side."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bench
import cli
from benchmarks import check, generation, gpu, nanogpt, peers, race, scale, stories, table, training
from benchmarks.preparation import encoding_rates
from benchmarks.race import THEM, US, US_EQUAL, US_LONGER, Race
from benchmarks.runs import Finished, python, run
from benchmarks.table import Row
from data.loader import Dataset
from data.tokenizer import ByteTokenizer
from engine.count import flops_per_token
from helpers import REPOSITORY, TINY, train_here, words, write_stories
from model import GPT, ModelConfig
from sampling.score import split_loss
from train import TrainConfig
from viewer.probe import Measured

CPU = torch.device("cpu")

# A checkout that can be raced, made up here: a bigram model that learns nothing
PREPARE = """
import numpy as np
from pathlib import Path
folder = Path(__file__).parent
text = (folder / "input.txt").read_text(encoding="utf-8")
ids = np.array([sorted(set(text)).index(c) for c in text], np.uint16)
cut = int(len(ids) * 0.9)
ids[:cut].tofile(folder / "train.bin")
ids[cut:].tofile(folder / "val.bin")
"""
TRAIN = """
import sys, torch
from pathlib import Path
from model import GPT, GPTConfig
seed_offset = 0
torch.manual_seed(1337 + seed_offset)
flags = dict(arg[2:].split("=") for arg in sys.argv[1:] if arg.startswith("--"))
out = Path(flags["out_dir"])
out.mkdir(parents=True)
print("iter 0: loss 4.0, time 12.50ms, mfu 1.00%")
arguments = {"vocab_size": 40, "block_size": 16}
weights = GPT(GPTConfig(**arguments)).state_dict()
state = {"_orig_mod." + name: weight for name, weight in weights.items()}
torch.save({"model": state, "model_args": arguments}, out / "ckpt.pt")
"""
MODEL = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F
@dataclass
class GPTConfig:
    vocab_size: int = 1
    block_size: int = 1
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a line that is no result")
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens, targets):
        logits = self.table(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / nanogpt.CHARACTERS).mkdir(parents=True)
    (folder / nanogpt.CHARACTERS / "prepare.py").write_text(PREPARE)
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run bench.py in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    monkeypatch.setattr(table, "describe_machine", dict)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        cli.run(bench.main)
    finally:
        signal.signal(signal.SIGTERM, handler)


def trained(seconds: float, steps: int, step_ms: float) -> Row:
    """What a run of ours is measured to be, whose updates all took so long."""
    of_steps = steps * step_ms / 1000
    row = {"steps": steps, "whole process s": seconds, "training steps s": of_steps}
    return row | {"step ms": step_ms, "loss": 1.5, "bits per byte": 2.2}


def entry(side: str, seconds: float, loss: float, steps: int | None = None) -> Row:
    row: Row = {"run": side, "seed": "1", "steps": steps, "whole process s": seconds}
    return row | {"loss": loss, "parameters": 5}


# --- Children -------------------------------------------------------------------------------------


def test_a_child_is_timed_and_its_memory_and_output_are_read() -> None:
    code = "import time; print('é'); time.sleep(0.3); b'x' * 300_000_000"
    finished = run(python("-c", code))
    assert finished.text == "é\n"
    assert 0.3 < finished.seconds < 10
    assert finished.peak_bytes > 300_000_000


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("first\\nerror: the disk is full\\n", "failed: the disk is full"),
        ("Traceback\\nKeyError: 3\\n", "failed: Traceback\nKeyError: 3"),
        ("", "failed: 1"),
    ],
)
def test_a_failing_child_is_reported_by_its_sentence_or_by_all_that_it_said(
    said: str, expected: str
) -> None:
    code = f"import sys; sys.stderr.write('{said}'); sys.exit(1)"
    with pytest.raises(ValueError, match=f"{expected}$"):
        run(python("-c", code))


def test_a_child_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code = f"""
        import signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from benchmarks.runs import python, run
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run(python("-c", "import os, time; "
            "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"))
    """
    with pytest.raises(TimeoutError, match="was stopped after 1 seconds"):
        run(python("-c", textwrap.dedent(code)), limit_seconds=1)
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_an_interrupted_measurement_leaves_no_child_and_no_folder(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from benchmarks.runs import *
        import cli
        def main():
            with temporary_folder() as folder:
                open({str(tmp_path / "folder")!r}, "w").write(str(folder))
                run(python("-c", "import os, time; "
                    "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"))
        cli.run(main)
    """
    process = subprocess.Popen(python("-c", textwrap.dedent(code)))
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert not Path((tmp_path / "folder").read_text()).exists()


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent's notice does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_measuring_preparation_imports_no_torch_which_would_count_as_a_childs_memory() -> None:
    code = "import sys, bench, benchmarks.preparation; print('torch' in sys.modules)"
    assert run(python("-c", code)).text == "False\n"


# --- Training -------------------------------------------------------------------------------------


def test_a_run_of_equal_time_has_the_steps_that_fit_beside_all_else() -> None:
    found = trained(60, 100, 500)  # 100 steps of half a second, and 10 seconds beside them
    assert training.steps_within(found, 100) == (100 - 10) / 0.5
    assert training.steps_within(found, 1) == 1


@pytest.mark.parametrize(("logged", "expected"), [({}, 7), ({"peak_memory_bytes": 2**20}, 1)])
def test_a_run_is_read_from_its_metrics_without_the_steps_in_which_it_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: dict[str, int], expected: int
) -> None:
    elapsed = [9, 18, 27, 36, 45, *(45 + step / 2 for step in range(1, 12))]  # 5 slow, 11 faster
    lines = [{"step": n, "train_loss": 2.0, "elapsed_seconds": s} for n, s in enumerate(elapsed)]
    lines += [{"step": 16, "val_loss": 1.5, "val_bits_per_byte": 2.2} | logged]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(training, "run", lambda command: Finished(60, 7 * 2**20, ""))
    row = training.train(Path("a.toml"), tmp_path)
    assert (row["steps"], row["step ms"], row["training steps s"]) == (16, 500, 50.5)
    assert (row["10 % below, ms"], row["90 % below, ms"]) == (500, 500)
    assert (row["loss"], row["bits per byte"], row["peak MiB"]) == (1.5, 2.2, expected)


def test_matrix_products_are_timed_with_their_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MATRIX_SIZE", {"cpu": 64})
    monkeypatch.setattr(training, "seconds_of", lambda function: 1.0)
    assert training.matrix_flops("cpu", "float32") == 2 * 64**3  # each took a second


@pytest.mark.slow
def test_train_measures_speed_and_the_share_of_the_machines_products(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(training, "matrix_flops", lambda *_: 1e9)
    results = tmp_path / "result.json"
    call(monkeypatch, "train", tiny, "--steps=10", "--repeats=1", f"--json={results}")
    (record,) = json.loads(results.read_text())
    (row,) = record["tables"]["runs"]
    assert row["tokens/s"] == pytest.approx(4 * 16 / (row["step ms"] / 1000))
    # 6 operations a weight of attention, MLP and head, and 12 for each layer, channel and position
    per_token = 6 * (2 * 4 * 16**2 + 2 * 3 * 16 * 64 + 15 * 16) + 12 * 2 * 16 * 16
    assert row["MFU"] == pytest.approx(row["tokens/s"] * per_token / 1e9)
    assert row["10 % below, ms"] <= row["step ms"] <= row["90 % below, ms"]
    assert f"| {row['parameters']:,} |" in capsys.readouterr().out


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flags of runs that take half a second a step with AdamW and one second without."""
    calls: list[tuple[str, ...]] = []

    def train(config: Path, out_dir: Path, *flags: str) -> Row:
        calls.append(flags)
        step = 0.5 if "--optim.name=adamw" in flags else 1.0
        n = next((int(f.split("=")[1]) for f in flags if f.startswith("--max_steps=")), 100)
        return trained(n * step + 10, n, 1000 * step)

    monkeypatch.setattr(training, "utilisation", lambda *_: {})
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(race, "train", train)
    return calls


def test_an_ablation_gives_each_variant_the_seconds_of_the_recipe(
    made_up: list[tuple[str, ...]],
) -> None:
    (rows,) = training.Ablate(repeats=2).measure().values()
    steps = {row["without"]: row["steps"] for row in rows}
    assert steps[training.RECIPE] == 100
    assert steps["AdamW for all, at 3e-3"] == 200
    assert {"--seed=1", "--seed=2"} <= {flag for flags in made_up for flag in flags}
    assert all(row["loss"] == 1.5 and row["spread"] == 0 for row in rows)


def test_an_ablated_choice_is_a_flag_that_train_py_knows() -> None:
    plain = cli.parse_config(TrainConfig, ["config/race_cpu.toml"])
    for name, flags in cli.read_toml(str(training.WITHOUT)).items():
        config = cli.parse_config(TrainConfig, ["config/race_cpu.toml", *flags.split()])
        assert (config == plain) == (name == training.RECIPE)


def test_whole_runs_are_listed_by_seed_with_their_median(made_up: list[tuple[str, ...]]) -> None:
    config = training.Whole(config=Path("a.toml"), repeats=3, flags="--samples=1")
    tables = config.measure()
    assert [row["seed"] for row in tables["runs"]] == ["1337", "1338", "1339"]
    assert tables["median"][0]["whole process s"] == 110
    assert tables["median"][0]["bits per byte"] == 2.2
    assert all("--samples=1" in flags for flags in made_up)


# --- The other side -------------------------------------------------------------------------------


def test_the_times_that_nanogpt_logs_are_read() -> None:
    text = "step 0: val loss 4.1\niter 0: loss 4.2, time 90.25ms, mfu -100.00%\n"
    text += "iter 1: loss 4.2, time 12.50ms, mfu 1.00%\niter 2: loss 4.2, time 11.00ms\n"
    assert nanogpt.UPDATE.findall(text) == ["90.25", "12.50", "11.00"]


@pytest.mark.parametrize("train_py", [None, TRAIN.replace("1337 + seed_offset", "int('1')")])
def test_a_folder_whose_seed_cannot_be_set_is_refused_before_anything_runs(
    checkout: Path, tmp_path: Path, train_py: str | None
) -> None:
    (checkout / "train.py").unlink()
    if train_py is not None:
        (checkout / "train.py").write_text(train_py)
    with pytest.raises(ValueError, match=r"is not a checkout of nanoGPT, whose train\.py sets its"):
        nanogpt.copy(checkout, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_seed_is_changed_in_the_copy_alone(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt, "run", lambda command, **how: command)
    copy = nanogpt.copy(checkout, tmp_path / "copy")
    for seed in (7, 8):
        nanogpt.train(copy, seed)
        assert f"torch.manual_seed({seed} + seed_offset)" in (copy / "train.py").read_text()
    assert (checkout / "train.py").read_text() == TRAIN


# --- The race -------------------------------------------------------------------------------------


class Sums(nn.Module):
    """The loss of a model that sees the sum of its window so far, so that windows matter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.table(tokens_BT.cumsum(1) % 300)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def test_the_loss_of_a_split_is_that_of_each_token_in_its_window(tiny: Path) -> None:
    dataset, model = Dataset.open(tiny.parent / "char"), Sums()
    tokens_N = torch.from_numpy(dataset.tokens("val", 50).astype(np.int64))
    losses = []
    for i in range(49):
        seen = tokens_N[i // 5 * 5 : i + 1].sum() % 300
        losses.append(F.cross_entropy(model.table.weight[seen], tokens_N[i + 1]))
    expected = torch.stack(losses).mean().item()
    assert split_loss(model, 5, dataset, 50) == pytest.approx(expected, rel=1e-6)


def test_the_summary_is_of_medians_and_ratios() -> None:
    rows = [entry(THEM, s, loss) for s, loss in ((90, 1.9), (100, 1.8), (150, 1.7))]
    rows += [entry(US, s, loss, 175) for s, loss in ((9, 1.7), (10, 1.8), (11, 2.9))]
    rows += [entry(US_EQUAL, 99, 1.6, 2000)]
    lines = {line["median"]: line for line in race.summary(rows)}
    assert lines["whole process, s"]["ratio"] == 10
    assert lines["time to nanoGPT's final loss, s"]["ours"] == 10
    assert lines["loss at equal time"]["ours"] == 1.6
    assert lines["time of the run of equal time, s"]["ours"] == 99


def test_the_time_to_the_others_loss_is_that_of_the_fewest_steps_that_reach_it() -> None:
    rows = [entry(THEM, 100, 1.8), entry(US, 10, 1.85, 175), entry(US_EQUAL, 99, 1.6, 2000)]
    for seconds, loss, steps in ((12, 1.9, 219), (13, 1.7, 219), (14, 1.79, 219), (20, 1.5, 274)):
        rows.append(entry(US_LONGER, seconds, loss, steps))
    lines = {line["median"]: line for line in race.summary(rows)}
    assert lines["time to nanoGPT's final loss, s"]["ours"] == 13
    assert lines["time to nanoGPT's final loss, s"]["ratio"] == 100 / 13
    assert lines["whole process, s"]["ours"] == 10


def test_a_loss_that_no_run_reached_is_said_to_be_not_reached() -> None:
    rows = [entry(THEM, 100, 1.8), entry(US, 10, 1.85, 175), entry(US_EQUAL, 99, 1.6, 2000)]
    lines = {line["median"]: line for line in race.summary(rows)}
    line = lines["time to nanoGPT's final loss, s"]
    assert line == {"median": line["median"], THEM: 100, "ours": "not reached"}


def test_a_race_without_equal_time_tells_nothing_of_it() -> None:
    rows = [entry(THEM, 100, 1.8), entry(US, 10, 1.7, 175)]
    lines = {line["median"] for line in race.summary(rows)}
    assert "time to nanoGPT's final loss, s" in lines
    assert not {line for line in lines if "equal" in line}


@pytest.mark.parametrize(("most", "tried"), [(2000, [125, 157]), (150, [125])])
def test_a_race_that_is_not_won_goes_on_with_more_steps_until_it_is_or_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int, tried: list[int]
) -> None:
    losses = {100: 2.0, 125: 1.9, 157: 1.8, 197: 1.7, most: 1.5}

    def ours(self: Race, side: str, n: int, folder: Path, steps: int = 0) -> Row:
        return entry(side, steps, losses[steps], steps)

    def first_round(self: Race, n: int, *_: Path) -> list[Row]:
        return [entry(THEM, 100, 1.8), entry(US, 10, 2.0, 100), entry(US_EQUAL, 99, 1.5, most)]

    monkeypatch.setattr(Race, "ours", ours)
    monkeypatch.setattr(Race, "round", first_round)
    monkeypatch.setattr(race, "prepare_both", lambda *_: None)
    monkeypatch.setattr(nanogpt, "copy", lambda *_: tmp_path)
    (tmp_path / "text").write_text("a text\n" * 1000)
    rows = Race(nanogpt=tmp_path, text=tmp_path / "text", repeats=2).measure()["runs"]
    assert [row["steps"] for row in rows if row["run"] == US_LONGER] == sorted(2 * tried)


@pytest.mark.slow
def test_a_race_runs_both_sides_on_the_same_text_and_judges_them(
    checkout: Path, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(words(800, "aeionrstlmé…"), encoding="utf-8")
    tables = Race(
        nanogpt=checkout,
        text=tmp_path / "text.txt",
        config=tiny,
        repeats=1,
        device="cpu",
        flags="--max_steps=12 --eval_every=12",
    ).measure()
    theirs, own, equal = tables["runs"]
    assert [row["run"] for row in tables["runs"]] == [THEM, US, US_EQUAL]
    assert (theirs["parameters"], theirs["step ms"]) == (40 * 40, 12.5)
    assert own["parameters"] == equal["parameters"]
    assert all(1 < row["loss"] < 9 for row in tables["runs"])
    assert not list(checkout.rglob("*.bin"))


def test_sides_with_different_tokens_do_not_race(checkout: Path, tmp_path: Path) -> None:
    script = checkout / nanogpt.CHARACTERS / "prepare.py"
    script.write_text(PREPARE.replace("0.9", "0.8"))
    with pytest.raises(ValueError, match=r"different tokens of this text in train\.bin"):
        race.prepare_both(checkout, words(200, "abcdef"), "char", tmp_path)


def test_line_ends_are_the_same_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "FEWEST_CHARACTERS", 9)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert race.read_lines(tmp_path / "a.txt") == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(b"\xff\xfe", "is not UTF-8 text"), (b"few", "2,580 characters: got 3")],
)
def test_a_text_that_cannot_be_raced_on_is_refused(
    tmp_path: Path, data: bytes, sentence: str
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        race.read_lines(tmp_path / "a.txt")


# --- Preparation ----------------------------------------------------------------------------------


def test_encoding_is_timed_beside_tiktokens_where_it_knows_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text" * 100)
    ours, theirs = encoding_rates(ByteTokenizer(), str(tmp_path / "a.txt"))
    assert ours > 0
    assert theirs is None


def test_each_tokenizer_is_measured_in_turn_with_its_median(tiny: Path) -> None:
    from benchmarks.preparation import Prepare

    text = str(tiny.parent / "words.txt")
    tables = Prepare(text=text, tokenizers=("byte", "char"), repeats=2).measure()
    assert [row["tokenizer"] for row in tables["runs"]] == ["byte", "char"] * 2
    assert [row["tokenizer"] for row in tables["median"]] == ["byte", "char"]
    for row in tables["runs"]:
        megabytes = Path(text).stat().st_size / 1e6
        seconds = row["whole process s"]
        assert row["whole process MB/s"] == pytest.approx(megabytes / seconds)


# --- The GPU's parts ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cpu_computes_what_it_computes_in_every_way(tiny: Path) -> None:
    flags = "--model.context_length=32 --model.n_embd=32 --eval_tokens=400"
    checked = check.Check(text=tiny.parent / "words.txt", flags=flags, device="cpu")
    (rows,) = checked.measure().values()
    outcomes = {row["check"]: row["outcome"] for row in rows}
    names = ("on the CPU", "compiled", "bfloat16", "resumed", "logits, decoded")
    assert outcomes == dict.fromkeys(names, "ok")


LLAMA_8B = replace(
    scale.MODELS["modern 7B"], n_kv_head=8, n_inner=14336, vocab_size=128256, context_length=8192
)


def test_a_cluster_is_calculated_for_models_of_the_parameters_that_they_have() -> None:
    published = {"GPT-2 124M": 124.4e6, "GPT-2 355M": 354.8e6, "GPT-2 774M": 774.0e6}
    published["GPT-2 1.5B"] = 1557.6e6  # Radford et al., 2019, as nanoGPT counts them
    for name, n in published.items():
        assert scale.parameters(scale.MODELS[name])[1] == pytest.approx(n, rel=0.001)
    small = scale.MODELS["GPT-2 124M"]
    with torch.device("meta"):
        model = GPT(small)
    norms = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert scale.parameters(small)[1] == sum(p.numel() for p in model.parameters()) - norms
    assert scale.parameters(LLAMA_8B)[1] == pytest.approx(8.03e9, rel=0.001)


@pytest.mark.parametrize(("tokens_per_second", "mfu"), [(6667, 0.39), (5762, 0.33)])
def test_our_count_of_operations_gives_the_mfu_that_torchtitan_states_for_8_h100s(
    tokens_per_second: int, mfu: float
) -> None:
    # Tokens/s of each and MFU, compiled and not, in torchtitan's docs of December 2024
    found = tokens_per_second * flops_per_token(LLAMA_8B) / scale.H100_FLOPS
    assert found == pytest.approx(mfu, abs=0.01)


def test_more_gpus_hold_less_each_and_take_less_time() -> None:
    rows = [scale.calculated("modern 7B", gpus, 0.4) for gpus in (1, 8, 64)]
    assert [row["fits 80 GB"] for row in rows] == ["no", "kept", "kept"]
    assert rows[0]["AdamW's state, GB each"] == pytest.approx(16 * 6.863, rel=0.001)
    hours = [row["hours for 20 tokens/parameter"] for row in rows]
    assert hours[0] == pytest.approx(8 * hours[1]) == pytest.approx(64 * hours[2])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "shared"), [(1, "ddp"), (2, "fsdp")])
def test_a_size_is_measured_in_several_processes(tiny: Path, n: int, shared: str) -> None:
    data = cli.parse_config(TrainConfig, [str(tiny)]).data.path
    size = {"context_length": 16, "n_embd": 16, "n_layer": 1, "processes": n, "shared": shared}
    row = scale.Scale(data=data).measured({**size})
    assert {key: row[key] for key in size} == size
    assert row["step ms"] > 0
    assert row["peak MiB of a process"] > 50  # torch alone


def test_what_is_too_far_from_the_plain_run_is_told() -> None:
    assert check.row("a", 2.0, 2.001, 0.01)["outcome"] == "ok"
    assert check.row("a", 2.0, 1.98, 0.01)["outcome"] == "TOO FAR"
    assert check.row("a", 2.0, float("nan"), 0.01)["outcome"] == "TOO FAR"


@pytest.mark.parametrize(("said", "outcome"), [("ok  ok", "done"), ("ok  TOO FAR", "TOO FAR")])
def test_a_part_in_which_a_check_is_too_far_is_not_called_done(
    said: str, outcome: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts.toml").write_text('[one]\nminutes = 1\ncommand = "check"\n')
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    monkeypatch.setattr(gpu, "run", lambda *_, **__: Finished(1.0, 1, said))
    parts = tmp_path / "parts.toml"
    sources = {"nanogpt": checkout, "text": parts, "shakespeare": parts}
    tables = gpu.Gpu(parts=parts, json=tmp_path / "json", **sources).measure()
    assert [row["outcome"] for row in tables["parts"]] == [outcome]


@pytest.mark.slow
def test_a_part_that_fails_or_overruns_costs_no_other(
    tiny: Path,
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "parts.toml").write_text(
        f'[fails]\nminutes = 1\ncommand = "whole {{text}}.toml"\n'
        f'[overruns]\nminutes = 0.001\ncommand = "table"\n'
        f"[works]\nminutes = 1\ncommand = \"whole {tiny} --repeats=1 --flags='--max_steps=1'\"\n"
    )
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    config = gpu.Gpu(
        nanogpt=checkout,
        text=tmp_path / "no text",
        shakespeare=tmp_path / "parts.toml",
        parts=tmp_path / "parts.toml",
        json=tmp_path / "results.json",
    )
    (rows,) = config.measure().values()
    outcomes = [row["outcome"] for row in rows]
    assert "no text.toml: No such file or directory" in outcomes[0]
    assert outcomes[1:] == ["bench.py was stopped after 0 seconds", "done"]
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["tables"]["runs"][0]["seed"] == "1337"
    assert "### whole, 2" in capsys.readouterr().out


def test_the_parts_are_commands_that_bench_py_knows(checkout: Path, tmp_path: Path) -> None:
    import importlib
    import shlex

    for part in cli.read_toml(str(gpu.PARTS)).values():
        text = part["command"].format(nanogpt="a", text="b", shakespeare="c", data="d")
        command, *flags = shlex.split(text)
        module, kind = bench.MEASUREMENTS[command]
        config_type = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
        named = [f"--config={flags[0]}", *flags[1:]] if command == "train" else flags
        config: Any = cli.parse_config(config_type, named)
        if command in ("train", "race"):
            cli.parse_config(TrainConfig, [str(config.config), *config.flags.split()])


# --- Generation -----------------------------------------------------------------------------------

ONE_LAYER = ModelConfig(n_layer=1, n_head=2, n_embd=4, n_kv_head=2, vocab_size=10, context_length=8)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config whose model has GPT-2's architecture and room for the steps that are timed."""
    path = tmp_path_factory.mktemp("sizes") / "small.toml"
    model = "vocab_size = 97\ncontext_length = 64\nn_layer = 2\nn_head = 2\nn_embd = 32\n"
    path.write_text(f"[model]\n{model}")
    return str(path)


@pytest.mark.parametrize(("precision", "n_bytes"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_token_reads_every_weight_but_the_embeddings_and_the_head_once(
    precision: Any, n_bytes: int
) -> None:
    # matrices: 4 x 12 + 4 x 4 + 4 x 16 + 16 x 4 = 192, head 10 x 4 = 40; biases 12 + 4 + 16 + 4
    # = 36; norms, with biases, 3 x 8 = 24: less wte and wpe, and all of it 292 numbers
    model = GPT(ONE_LAYER)
    assert generation.weight_bytes(model, precision) == 292 * n_bytes


def test_bandwidth_is_the_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "READ_BYTES", 4000)
    taken = iter([9.0, 2.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(generation, "seconds_of", lambda function: next(taken))
    assert generation.bandwidth(CPU) == 2000


def test_prompts_are_cut_to_what_leaves_room_for_the_steps(sizes: str) -> None:
    config = generation.random_model(sizes, CPU).config
    lengths = [len(generation.random_prompts(config, 1, length)[0]) for length in (4, 512)]
    assert lengths == [4, 64 - generation.NEW_TOKENS]


def test_a_model_is_measured_for_every_prompt_and_batch_beside_the_memorys_limit(
    sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "READ_BYTES", 2**22)
    config = generation.Sample(models=(sizes,), prompts=(4, 16), batch_sizes=(1, 2))
    rows = config.speed(sizes, "float32", CPU)
    assert [(row["prompt"], row["batch"]) for row in rows] == [(4, 1), (16, 1), (4, 2), (16, 2)]
    for row in rows:
        speed, limit = row["decode tokens/s"], row["limit tokens/s"]
        assert row["of limit"] == pytest.approx(speed / limit)
        assert speed == pytest.approx(1000 * row["batch"] / row["step ms"])
        assert limit == pytest.approx(1e3 * row["memory GB/s"] * row["batch"] / row["MB a step"])
    # 12 tokens more in 2 layers of 2 texts: keys and values of 32 channels in 4 bytes
    longer = rows[3]["MB a step"] - rows[2]["MB a step"]
    assert longer == pytest.approx(12 * 2 * 2 * 2 * 32 * 4 / 1e6)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_all_steps_that_are_timed_have_room_however_many_are_done_at_once(device: str) -> None:
    turns = generation.STEPS // generation.STEPS_AT_ONCE[device]
    done = generation.SETTLING_STEPS + turns * generation.STEPS_AT_ONCE[device]
    assert turns * generation.STEPS_AT_ONCE[device] == generation.STEPS
    assert done < generation.NEW_TOKENS


def test_a_peer_with_other_weights_is_refused(sizes: str) -> None:
    model, other = generation.random_model(sizes, CPU), generation.random_model(sizes, CPU)
    prompt_1T = torch.tensor(generation.random_prompts(model.config, 1, 8))
    own, _ = peers.our_generate(model)(prompt_1T, 8)
    peers.agree("twin", peers.our_generate(other)(prompt_1T, 8)[0], own)
    nn.init.normal_(other.get_parameter("blocks.0.attn.c_proj.weight"))
    with pytest.raises(ValueError, match="stranger must choose the tokens that ours does: got"):
        peers.agree("stranger", peers.our_generate(other)(prompt_1T, 8)[0], own)


def test_transformers_agrees_on_the_same_weights_and_takes_turns(sizes: str) -> None:
    pytest.importorskip("transformers")
    model = generation.random_model(sizes, CPU)
    (row,) = peers.race(model, {"float32": model}, ("transformers",), [[1, 2, 3, 4]])
    assert (row["prompt"], row["precision"], row["side"]) == (4, "float32", "transformers")
    assert row["times"] == row["tokens/s"] / row["its tokens/s"] > 0


def test_each_precision_meets_its_own_of_llama_cpp_after_the_same_greedy_text(sizes: str) -> None:
    pytest.importorskip("xllamacpp")
    model = generation.random_model(sizes, CPU)
    ours: Any = {k: generation.random_model(sizes, CPU) for k in ("float32", "float16", "int8")}
    rows = peers.race(model, ours, ("llamacpp",), [[1, 2, 3, 4]])
    assert [(row["precision"], row["side"]) for row in rows] == [
        ("float32", "llamacpp f32"),
        ("float16", "llamacpp f16"),
        ("float16", "llamacpp bf16"),
        ("int8", "llamacpp q8_0"),
    ]
    assert all(row["its tokens/s"] > 0 for row in rows)


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_nanogpt_agrees_on_the_same_weights(sizes: str) -> None:
    model = generation.random_model(sizes, CPU)
    prompt_1T = torch.tensor(generation.random_prompts(model.config, 1, 8))
    theirs = peers.generate_of(f"nanogpt={os.environ['NANOGPT']}", model)(prompt_1T, 8)
    peers.agree("nanogpt", theirs, peers.our_generate(model)(prompt_1T, 8)[0])


def test_a_model_that_is_not_gpt2s_has_no_peers(tiny: Path) -> None:
    model = generation.random_model(str(tiny), CPU)
    with pytest.raises(ValueError, match="need a model of GPT-2's architecture"):
        peers.race(model, {"float32": model}, ("transformers",), [[1]])


def test_the_first_token_is_timed_in_turn_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []

    def timed(command: list[str]) -> Finished:
        taken.append(command)
        seconds = {2: 2.0, 4: 9.0}[len(taken)] if len(taken) in (2, 4) else 3.0 - len(taken) % 2
        return Finished(seconds, 0, "")

    monkeypatch.setattr(generation, "run", timed)
    alone, first = generation.start_rows(Path("a"), "cpu")
    assert [command[1] for command in taken] == ["-c", "sample.py"] * 5
    assert (alone["seconds"], first["seconds"]) == (2.0, 3.0)
    assert first["over the import"] == 1.5


def test_each_precision_is_shown_with_its_loss(tiny: Path, tmp_path: Path) -> None:
    train_here(tiny, tmp_path / "run", "--max_steps=1")
    rows = generation.quality(tmp_path / "run", generation.available(CPU), CPU)
    assert (rows[0]["precision"], rows[0]["change"]) == ("float32", 0)
    assert all(abs(row["change"]) < 0.05 for row in rows)


# --- Stories --------------------------------------------------------------------------------------

COSTS = ("worth on text", "worth on copies")


def test_a_model_is_judged_by_loss_pronouns_and_heads(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.format(dataset=write_stories(tmp_path, 800)))
    flags = ("--max_steps=1", "--model.context_length=192")
    train_here(tmp_path / "tiny.toml", tmp_path / "run", *flags)
    config = stories.Stories(out_dir=tmp_path / "run", data=tmp_path / "dataset", stories=20)
    loss, pronouns, _ = config.measure().values()
    entropy = Dataset.open(tmp_path / "dataset").entropy()
    floor, *others = (row["nats per token"] for row in loss)
    assert floor == entropy
    assert min(others) > floor
    assert set(pronouns[0]) == {"model", "bigram model", "pronouns"}


def test_a_head_is_listed_with_what_it_is_worth_if_it_has_a_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {(0, 1): ("previous", "why")}
    monkeypatch.setattr(stories, "label", lambda layer, head, _: found.get((layer, head), ("", "")))
    measured = Measured(
        written={"previous": torch.tensor([[0.1, 0.9]])},
        copied={},
        uniform={"previous": 0.05},
        cost_written_LH=torch.tensor([[0.0, 0.25]]),
        cost_copied_LH=torch.tensor([[0.125, 4.5]]),
        copy_loss=1.0,
        n_periods=3,
    )
    listed, others = stories.head_rows(measured)
    assert [*listed] == ["head", "label", "score", "of uniform attention", *COSTS]
    assert [*listed.values()] == ["L0H1", "previous token", pytest.approx(0.9), 0.05, 0.25, 4.5]
    assert others == {"head": "any other, at most", COSTS[1]: 0.125}


# --- The command line, and what it leaves ---------------------------------------------------------


def test_rows_become_a_markdown_table() -> None:
    rows: list[Row] = [{"run": "a|b", "loss": 1.5}, {"run": "c", "tokens": 1234567}]
    assert table.markdown(rows).splitlines() == [
        "| run | loss | tokens |",
        "| --- | --- | --- |",
        "| a\\|b | 1.5000 | – |",
        "| c | – | 1,234,567 |",
    ]


def test_the_median_row_keeps_the_texts_that_all_rows_share() -> None:
    rows: list[Row] = [{"of": "x", "seed": str(n), "ms": n} for n in (1, 2, 9)]
    assert table.medians(rows) == {"of": "x", "ms": 2}


def test_records_are_added_and_printed_as_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny: Path
) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "docs/results.json")
    monkeypatch.setattr(training.Whole, "row", lambda *_: {"seed": "1"} | trained(9, 1, 1.0))
    for _ in range(2):
        call(monkeypatch, "whole", tiny, "--repeats=1", f"--json={table.RESULTS}")
    capsys.readouterr()
    call(monkeypatch, "table")
    printed = capsys.readouterr().out
    assert printed.count("### whole, 2") == 2
    assert f"`python bench.py whole {tiny} --repeats=1 --json=" in printed
    assert "runs:\n\n| seed |" in printed
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["results.json"]


GPU_TEXTS = ("--text=README.md", "--shakespeare=nowhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["tarin"],
            "error: bench.py measures train, race, whole, ablate, prepare, stories, sample",
        ),
        (["race", "--nanogpt=nowhere", "--text=README.md"], "nowhere is not a checkout of nanoGPT"),
        (["gpu", "--nanogpt=nowhere", *GPU_TEXTS], "nowhere is not a checkout of nanoGPT"),
        (["train", "a.toml", "--stesp=1"], "Unrecognized options: --stesp=1"),
        (["prepare", "--text=nowhere"], "no file or folder is named nowhere"),
        (["train", "nowhere.toml"], "nowhere.toml: No such file or directory"),
        (["sample", "--peer=nanochat"], "peer must be nanogpt=CHECKOUT, transformers or llamacpp"),
        (["sample", "--run=tests"], "tests/config.toml: No such file or directory"),
        (["ablate", "--repeats=0"], "repeats must be at least 1: got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == cli.USER_ERROR
    printed = capsys.readouterr().err
    assert sentence in " ".join(printed.replace("│", " ").split())
    assert "Traceback" not in printed


def test_the_parts_for_a_gpu_begin_when_all_that_they_need_is_there(checkout: Path) -> None:
    here = {"nanogpt": checkout, "text": checkout / "model.py", "shakespeare": checkout}
    with pytest.raises(IsADirectoryError):
        gpu.Gpu(**here).measure()


def test_the_commit_of_a_copy_without_git_is_unknown(tmp_path: Path) -> None:
    assert table.commit(tmp_path) == "unknown"


def test_everything_about_the_machine_is_described() -> None:
    found = table.describe_machine()
    assert found["cores"] == os.cpu_count()
    assert found["torch"] == torch.__version__
    assert found["CPU"]
