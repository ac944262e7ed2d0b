"""bench.py and the room benchmarks, against a made-up checkout where they need another side."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import bench
from benchmarks import (
    ablation,
    machine,
    nanogpt,
    ours,
    probe,
    race,
    table,
    training,
    verdict,
    whole,
)
from benchmarks.encoding import rates
from benchmarks.evaluator import split_loss
from benchmarks.gpu import PARTS, attempt
from benchmarks.nanogpt import Checkout
from benchmarks.ours import Trained
from benchmarks.race import RaceBench
from benchmarks.runs import Finished, Line, python, run
from benchmarks.session import Speed
from benchmarks.verdict import THEM, US, US_EQUAL, Entry
from data.tokenizer import ByteTokenizer
from engine import cli
from helpers import REPOSITORY, write_tiny
from train import TrainConfig

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
print("step 0: train loss 4.1000, val loss 4.0000")
arguments = {"vocab_size": 40, "block_size": 16}
weights = GPT(GPTConfig(**arguments)).state_dict()
state = {"_orig_mod." + name: weight for name, weight in weights.items()}
torch.save({"model": state, "model_args": arguments}, out / "ckpt.pt")
"""
MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    vocab_size: int = 1
    block_size: int = 1
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a line that is no result")
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens, targets=None):
        return self.table(tokens), None
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / nanogpt.CHARACTERS).mkdir(parents=True)
    (folder / nanogpt.CHARACTERS / "prepare.py").write_text(PREPARE)
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path / "words.txt"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run bench.py in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        cli.run(bench.main)
    finally:
        signal.signal(signal.SIGTERM, handler)


def trained(seconds: float, *steps: float, **last: float) -> Trained:
    """A run of ours whose updates of 100 tokens took so long."""
    elapsed = [sum(steps[: n + 1]) for n in range(len(steps))]
    updates = [
        {"elapsed_seconds": at, "tokens_per_second": 100 / step, **last}
        for at, step in zip(elapsed, steps, strict=True)
    ]
    return Trained(Path(), Finished(seconds, 7 * 2**20, []), updates, 1.5, 2.2)


def entry(side: str, seconds: float, loss: float, steps: int = 0) -> Entry:
    result = {"loss": loss, "parameters": 5}
    return Entry(side, 1, steps, Finished(seconds, 1, []), Path(), result)


# Children


def test_a_child_is_timed_and_its_lines_are_dated(tmp_path: Path) -> None:
    code = "import time; print('a'); time.sleep(0.3); print('b'); b'x' * 50_000_000"
    finished = run(python("-c", code))
    first, second = finished.lines
    assert (first.text, second.text) == ("a", "b")
    assert 0.2 < second.seconds - first.seconds <= finished.seconds < 10
    assert finished.peak_bytes > 50_000_000


def test_a_failing_child_is_reported_by_the_last_line_that_it_wrote() -> None:
    code = "import sys; sys.exit('first\\nerror: the disk is full\\n')"
    with pytest.raises(ValueError, match=r"failed: the disk is full$"):
        run(python("-c", code))


def test_a_child_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(60)
    """
    with pytest.raises(TimeoutError, match="was stopped after 1 seconds"):
        run(python("-c", textwrap.dedent(code)), limit_seconds=1)
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_a_child_ends_at_the_line_that_was_waited_for() -> None:
    code = "import time; print('go'); print('stop'); time.sleep(60)"
    finished = run(python("-c", code), until=lambda line: line.text == "stop")
    assert [line.text for line in finished.lines] == ["go", "stop"]
    assert finished.seconds < 10


def test_an_interrupted_measurement_leaves_no_child_and_no_folder(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from benchmarks.runs import *
        from engine import cli
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


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent's notice does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_measuring_imports_no_torch_whose_memory_would_count_as_a_childs() -> None:
    code = "import sys, bench; print('torch' in sys.modules)"
    assert run(python("-c", code)).lines[0].text == "False"


# Throughput


def test_mfu_is_the_models_operations_over_the_machines() -> None:
    steps = [9.0] * ours.SETTLING_STEPS + [2.0, 1.0, 2.0, 3.0, 2.0]
    probed = {"flops_per_token": 1000, "parameters": 5, "machine_flops": 100_000.0}
    probed |= {"is_known_peak": False, "precision": "float32"}
    row = training.throughput(trained(100, *steps), probed)
    assert row["tokens/s"] == 50  # 100 tokens in the median of 2 seconds
    assert row["MFU"] == 0.5  # 50 tokens/s x 1,000 of 100,000 operations a second
    assert (row["step ms"], row["10 % below, ms"]) == (2000, pytest.approx(1400))
    assert row["90 % below, ms"] == pytest.approx(2600)


def test_peak_memory_is_the_allocators_where_it_is_logged() -> None:
    assert trained(9, 1.0).peak_bytes == 7 * 2**20
    assert trained(9, 1.0, peak_memory_bytes=123).peak_bytes == 123


def test_a_known_gpu_is_measured_against_its_data_sheet() -> None:
    assert probe.known_peak("NVIDIA H200") == 989e12
    assert probe.known_peak("Some GPU") is None
    assert probe.known_peak(None) is None


def test_matrix_products_are_timed_with_their_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MATRIX_SIZE", {"cpu": 64})
    clock = iter(range(1000))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    assert probe.matrix_flops("cpu", "float32") == 2 * 64**3  # each took a second


def test_train_measures_a_config(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machine, "describe", dict)
    results = text.parent / "result.json"
    config = text.parent / "tiny.toml"
    call(monkeypatch, "train", config, "--steps=10", "--repeats=1", f"--json={results}")
    record = json.loads(results.read_text())
    (row,) = record["tables"]["runs"]
    assert 0 < row["MFU"] < 1
    assert row["tokens/s"] == pytest.approx(4 * 16 / (row["step ms"] / 1000), rel=0.02)
    assert f"| {row['parameters']:,} |" in capsys.readouterr().out


# The other side


def test_nanogpts_lines_are_read() -> None:
    lines = [
        Line(0.5, "step 0: train loss 4.2, val loss 4.1"),
        Line(1.0, "iter 0: loss 4.2, time 1500.25ms, mfu -100.00%"),
        Line(2.0, "step 250: train loss 1.2, val loss 1.4697"),
        Line(3.0, "step 500: train loss 1.2, val loss 1.3"),
    ]
    finished = Finished(4, 1, lines)
    assert nanogpt.step_seconds(finished) == [1.50025]
    assert finished.seconds_to(nanogpt.EVALUATION, 1.4697) == 2
    assert finished.seconds_to(nanogpt.EVALUATION, 1.2) is None


def test_our_own_lines_are_read() -> None:
    line = Line(2.0, "step    250: validation loss 1.5000 nats per token, 2.1 bits per byte")
    assert Finished(4, 1, [line]).seconds_to(ours.EVALUATION, 1.5) == 2


@pytest.mark.parametrize("missing", ["train.py", "model.py", "data/shakespeare_char/prepare.py"])
def test_a_folder_that_is_no_checkout_is_refused_before_anything_runs(
    checkout: Path, missing: str
) -> None:
    (checkout / missing).unlink()
    with pytest.raises(OSError, match=f"is not a checkout of nanoGPT, it has no {missing}: get"):
        nanogpt.check(checkout)


def test_a_checkout_whose_seed_is_elsewhere_is_refused(checkout: Path) -> None:
    (checkout / "train.py").write_text(TRAIN.replace("1337 + seed_offset", "int('1')"))
    with pytest.raises(ValueError, match="sets its seed in another way"):
        nanogpt.check(checkout)


def test_the_seed_is_changed_in_the_copy_alone(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt, "run", lambda command, **how: command)
    copy = nanogpt.Checkout.copy(checkout, tmp_path / "copy")
    for seed in (7, 8):
        copy.train(tmp_path / "out", seed)
        assert f"torch.manual_seed({seed} + seed_offset)" in (copy.folder / "train.py").read_text()
    assert (checkout / "train.py").read_text() == TRAIN


# The race


def test_the_evaluators_loss_is_that_of_each_token_in_its_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.evaluator.TOKENS_PER_PASS", 12)
    torch.manual_seed(0)
    tokens_N, weight_VV = torch.randint(7, (50,)), torch.randn(7, 7)
    # A model that sees the sum of its window so far, so that windows matter
    logits_of = lambda tokens_BT, _: weight_VV[tokens_BT.cumsum(1) % 7]  # noqa: E731
    losses = []
    for i in range(49):
        seen = tokens_N[i // 5 * 5 : i + 1].sum() % 7
        losses.append(F.cross_entropy(weight_VV[seen], tokens_N[i + 1]))
    expected = torch.stack(losses).mean().item()
    assert split_loss(logits_of, tokens_N, 5) == pytest.approx(expected, rel=1e-6)


def test_a_run_of_equal_time_has_the_steps_that_fit_after_all_else() -> None:
    steps = [9.0] * ours.SETTLING_STEPS + [0.5] * 10  # 50 seconds, then half a second a step
    run = trained(60, *steps)  # of 60 seconds, so that 15 steps of half a second leave 52.5
    assert run.steps_within(100) == (100 - 52.5) / 0.5
    assert run.steps_within(1) == 1


def test_the_summary_is_of_medians_and_ratios() -> None:
    entries = [entry(THEM, s, loss) for s, loss in ((90, 1.9), (100, 1.8), (150, 1.7))]
    entries += [entry(US, s, loss) for s, loss in ((9, 1.7), (10, 1.8), (11, 2.9))]
    entries += [entry(US_EQUAL, 99, 1.6)]
    rows = {row["median"]: row for row in verdict.summary(entries, 0)}
    assert rows["whole process, s"]["ratio"] == "10.00 ×"
    assert rows["time to nanoGPT's final loss, s"]["ours"] == 10
    assert rows["loss at equal time"]["ours"] == 1.6
    assert rows["time of the run of equal time, s"]["ours"] == 99


def test_the_time_to_the_others_loss_is_that_of_the_fewest_steps_that_reach_it() -> None:
    entries = [entry(THEM, 100, 1.8), entry(US, 10, 1.85, 175), entry(US_EQUAL, 99, 1.6, 2000)]
    for seconds, loss, steps in ((12, 1.9, 219), (13, 1.7, 219), (14, 1.79, 219), (20, 1.5, 274)):
        entries.append(entry("ours, more steps", seconds, loss, steps))
    rows = {row["median"]: row for row in verdict.summary(entries, 0)}
    row = rows["time to nanoGPT's final loss, s"]
    assert (row["ours"], row["ratio"]) == (13, "7.69 ×")
    assert rows["whole process, s"]["ours"] == 10


def test_a_race_that_is_not_won_goes_on_with_more_steps_until_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = {100: 2.0, 125: 1.9, 157: 1.8, 197: 1.7}
    tried: list[int] = []

    def train(config: Path, out_dir: Path, *flags: str) -> ours.Trained:
        tried.append(int(flags[-1].removeprefix("--max_steps=")))
        return trained(1.0, *[0.5] * tried[-1])

    def judge(entries: list[Entry], *_: object) -> None:
        for new in entries:
            new.result = {"loss": losses[new.steps], "parameters": 1}

    monkeypatch.setattr(ours, "train", train)
    monkeypatch.setattr(race, "judge", judge)
    entries = [entry(THEM, 100, 1.8), entry(US, 10, 2.0, 100), entry(US_EQUAL, 99, 1.5, 2000)]
    config = RaceBench(nanogpt=tmp_path, text=tmp_path, repeats=2)
    found = race.reach(config, entries, tmp_path, Checkout(tmp_path), tmp_path)
    assert tried == [125, 125, 157, 157]
    assert [new.steps for new in found] == tried
    entries[2] = entry(US_EQUAL, 99, 1.5, 150)  # no time for 157
    found = race.reach(config, entries, tmp_path, Checkout(tmp_path), tmp_path)
    assert {new.steps for new in found} == {125}


def test_a_loss_that_was_not_reached_is_said_with_the_loss() -> None:
    entries = [entry(THEM, 100, 1.8), entry(US, 10, 1.85), entry(US_EQUAL, 99, 1.6)]
    entries[1].finished.lines.append(Line(5, "step  9: validation loss 1.7 nats"))
    rows = {row["median"]: row for row in verdict.summary(entries, 1.75)}
    row = rows["time to nanoGPT's final loss, s"]
    assert (row["ours"], row["ratio"]) == ("not reached: 1.8500", None)
    row = rows["time to its own first 1.75 nats, s"]
    assert (row["nanoGPT"], row["ours"]) == ("not reached", 5)
    entries.append(entry(US, 10, 1.85))  # a second round, which did not get there
    assert verdict.seconds_to(entries, US, 1.75) == "not reached"


def test_a_race_runs_both_sides_on_the_same_text_and_judges_them(
    checkout: Path, text: Path
) -> None:
    config = RaceBench(
        nanogpt=checkout,
        text=text,
        config=text.parent / "tiny.toml",
        repeats=1,
        device="cpu",
        tiny=True,
    )
    tables = race.measure(config)
    theirs, own, equal = tables["runs"]
    assert [row["run"] for row in tables["runs"]] == [THEM, US, US_EQUAL]
    assert theirs["parameters"] == 40 * 40
    assert own["parameters"] == equal["parameters"]
    assert all(isinstance(row["loss"], float) and 1 < row["loss"] < 9 for row in tables["runs"])
    assert not list(checkout.rglob("*.bin"))


def test_sides_with_different_tokens_do_not_race(checkout: Path, text: Path) -> None:
    script = checkout / nanogpt.CHARACTERS / "prepare.py"
    script.write_text(PREPARE.replace("0.9", "0.8"))
    copy = nanogpt.Checkout.copy(checkout, text.parent / "copy")
    with pytest.raises(ValueError, match="different train tokens"):
        race.prepare_both(copy, text.read_text(encoding="utf-8"), text.parent)


def test_line_ends_are_the_same_for_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert race.read_text(tmp_path / "a.txt", fewest=9) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "holds no text"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"few", "2,580 characters: got 3"),
    ],
)
def test_a_text_that_cannot_be_raced_on_is_refused(
    tmp_path: Path, data: bytes, sentence: str
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        race.read_text(tmp_path / "a.txt")


# Preparation


def test_encoding_is_timed_beside_tiktokens_where_it_knows_the_vocabulary() -> None:
    found = rates(ByteTokenizer(), "some text" * 100)
    assert found["ours"] is not None
    assert found["ours"] > 0
    assert found["tiktoken"] is None


# The GPU's ten minutes


def test_the_parts_share_the_time_that_there_is() -> None:
    assert sum(share for _, share, _ in PARTS) == pytest.approx(1)


def test_a_part_that_fails_is_reported_and_the_next_begins() -> None:
    def overrun(session: object) -> None:
        raise TimeoutError("train.py was stopped after 78 seconds")

    assert Speed(0.5, 40).steps_within(60) == 40
    row = attempt("speed", overrun, None)  # type: ignore[arg-type]
    assert row["outcome"] == "train.py was stopped after 78 seconds"


# The command line, and what it leaves


def test_rows_become_a_markdown_table() -> None:
    rows: list[table.Row] = [{"run": "a|b", "loss": 1.5}, {"run": "c", "tokens": 1234567}]
    assert table.markdown(rows).splitlines() == [
        "| run | loss | tokens |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1.5000 | – |",
        "| c | – | 1,234,567 |",
    ]


def test_the_median_row_keeps_the_texts_that_all_rows_share() -> None:
    rows: list[table.Row] = [{"of": "x", "seed": str(n), "ms": n} for n in (1, 2, 9)]
    assert table.medians(rows) == {"of": "x", "ms": 2}


def test_records_are_added_and_printed_as_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "docs/results.json"
    for n in (1, 2):
        tables = {"runs": [{"n": n}], "empty": []}
        record = {"benchmark": "race", "date": "today", "command": f"race {n}", "tables": tables}
        table.append(results, record | {"machine": {"CPU": "fast", "GPU": None}})
    call(monkeypatch, "table", f"--results={results}")
    printed = capsys.readouterr().out
    assert printed.count("### race, today") == 2
    assert "`race 2`\n\nCPU fast\n\nruns:\n\n| n |" in printed
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tarin"], "prepare, stories, sample, gpu, table: got tarin; see bench.py --help"),
        (["train", "a.toml", "--steps=1"], "steps must be at least 10: got 1"),
        (["race", "--nanogpt=nowhere", "--text=a"], "nowhere is not a checkout of nanoGPT"),
        (["train", "a.toml", "--stesp=1"], "perhaps you meant --steps"),
        (["table", "--results=nowhere"], "nowhere holds no results yet"),
        (["prepare", "--text=nowhere"], "nowhere is not a file that holds text"),
        (["train", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(machine, "describe", dict)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == cli.USER_ERROR
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.splitlines()) == 1


def test_without_a_gpu_its_benchmark_says_so(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machine, "describe", dict)
    monkeypatch.setattr("benchmarks.gpu.probe", lambda: {"gpu": None})
    with pytest.raises(SystemExit):
        call(monkeypatch, "gpu", f"--nanogpt={checkout}", f"--text={checkout}")
    assert "bench.py gpu needs an NVIDIA GPU, and there is none here" in capsys.readouterr().err


def test_the_commit_of_a_copy_without_git_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"


# --- Whole runs and ablations ---------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flags of runs that take half a second a step with AdamW and one second without."""
    calls: list[tuple[str, ...]] = []

    def train(config: Path, out_dir: Path, *flags: str) -> Trained:
        calls.append(flags)
        step = 0.5 if "--optim.name=adamw" in flags else 1.0
        n = next((int(f.split("=")[1]) for f in flags if f.startswith("--max_steps=")), 100)
        return trained(n * step + 10, *[step] * n)

    monkeypatch.setattr(ours, "train", train)
    return calls


def test_an_ablation_gives_each_variant_the_seconds_of_the_recipe(
    made_up: list[tuple[str, ...]],
) -> None:
    (rows,) = ablation.measure(ablation.AblateBench(repeats=2)).values()
    steps = {row["without"]: row["steps"] for row in rows}
    assert steps[ablation.RECIPE] == 100
    assert steps["AdamW for all, at 3e-3"] == 200
    assert {"--seed=1", "--seed=2"} <= {flag for flags in made_up for flag in flags}
    assert all(row["loss"] == 1.5 and row["spread"] == 0 for row in rows)


def test_an_ablated_choice_is_a_flag_that_train_py_knows() -> None:
    for flags in ablation.WITHOUT.values():
        config = cli.parse_config(TrainConfig, ["config/race_cpu.toml", *flags])
        assert not flags or config != cli.parse_config(TrainConfig, ["config/race_cpu.toml"])


def test_whole_runs_are_listed_by_seed_with_their_median(made_up: list[tuple[str, ...]]) -> None:
    tables = whole.measure(whole.WholeBench(config=Path("a.toml"), repeats=3, flags="--samples=1"))
    assert [row["seed"] for row in tables["runs"]] == ["1337", "1338", "1339"]
    assert tables["median"][0]["whole process s"] == 110
    assert tables["median"][0]["bits per byte"] == 2.2
    assert all("--samples=1" in flags for flags in made_up)
