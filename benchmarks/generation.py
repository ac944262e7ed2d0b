"""`bench.py sample`: how fast text is generated, and how near that is to the memory's limit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import nanogpt
from benchmarks.race import DeviceName
from benchmarks.runs import python, run
from benchmarks.startup import start_rows
from benchmarks.table import Row, Tables, ratio
from engine import cli
from engine.cli import at_least

ModelName = Literal["124M", "quickstart", "tiny"]
PrecisionName = Literal["float32", "bfloat16", "int8"]
QUICKSTART = Path("out/quickstart")
CHECKPOINTS = "checkpoints.json"  # as engine/checkpoint.py calls it, which imports torch
NANOGPT = "nanogpt="
QUALITY_TOKENS = 50_000  # of the validation split


@dataclass(frozen=True, kw_only=True)
class SampleBench:
    """Measure prefill and decode tokens/s, and the limit that the memory sets."""

    models: tuple[ModelName, ...] = ("124M", "quickstart")
    """Sizes, with random weights: GPT-2 124M, config/quickstart.toml, or tiny to try it out."""
    prompts: tuple[int, ...] = (16, 512)
    """Tokens of each prompt, cut to what leaves room for the steps."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """Texts that grow at once."""
    precisions: tuple[PrecisionName, ...] = ()
    """Of the weights (default: all that the device has)."""
    steps: int = 24
    """Tokens per text that are timed."""
    peer: tuple[str, ...] = ()
    """Whom to measure beside the first of the models: nanogpt=CHECKOUT, transformers, or both."""
    run: Path | None = None
    """Run whose first token is timed (default: out/quickstart, if it is there)."""
    quality: Path | None = None
    """Run, with its dataset, to show what each precision costs in loss."""
    device: DeviceName = "auto"
    """Where to run."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps")
        for name in ("prompts", "batch_sizes"):
            if min(getattr(self, name), default=0) < 1:
                got = " ".join(map(str, getattr(self, name)))
                raise ValueError(f"{name} must be at least 1 each: got {got or 'none'}")
        for peer in self.peer:
            if peer != "transformers" and not peer.startswith(NANOGPT):
                raise ValueError(f"peer must be {NANOGPT}CHECKOUT or transformers: got {peer}")

    @property
    def checkout(self) -> Path | None:
        """Where nanoGPT is, if it is a peer."""
        found = [Path(peer.removeprefix(NANOGPT)) for peer in self.peer if NANOGPT in peer]
        return found[0].resolve() if found else None

    @property
    def timed_run(self) -> Path | None:
        return self.run or (QUICKSTART if (QUICKSTART / CHECKPOINTS).exists() else None)


def measure(config: SampleBench) -> Tables:
    """Each model in a process of its own, then the peers, the start and the quality."""
    check(config)
    common = ["--device", config.device, "--prompts", *config.prompts]
    common += ["--precisions", *config.precisions] if config.precisions else []
    rows: list[Row] = []
    for model in config.models:
        flags = [f"--model={model}", f"--steps={config.steps}", *common]
        rows += child("decoding", *flags, "--batch_sizes", *config.batch_sizes)
    tables = {"speed": rows, "batches": batches(rows), "longer prompts": growth(rows)}
    if config.peer:
        flags = [f"--model={config.models[0]}", *common]
        flags += [f"--nanogpt={config.checkout}"] if config.checkout else []
        flags += ["--transformers=True"] if "transformers" in config.peer else []
        tables["peers"] = races(child("peers", *flags))
    if config.timed_run:
        tables["start"] = start_rows(config.timed_run, config.device)
    if config.quality:
        precisions = dict.fromkeys(str(row["precision"]) for row in rows)
        tables["quality"] = quality(config.quality, list(precisions), config.device)
    return tables


def check(config: SampleBench) -> None:
    """Raise OSError for what would be missed only after minutes."""
    if config.checkout:
        nanogpt.check(config.checkout)
    for path in (config.timed_run, config.quality):
        if path is not None and not (path / "config.toml").is_file():
            raise FileNotFoundError(f"{path} is not the folder of a run, it has no config.toml")


def child(module: str, *flags: object) -> list[dict[str, Any]]:
    """Run one of our scripts; return the JSON that it prints, line by line."""
    finished = run(python("-m", f"benchmarks.{module}", *flags))
    return [json.loads(line.text) for line in finished.lines]


def batches(rows: list[Row]) -> list[Row]:
    """How many times the tokens/s of one text each batch has."""
    found: list[Row] = []
    for one in (row for row in rows if row["batch"] == 1):
        kind = ("model", "precision", "prompt")
        line: Row = {name: one[name] for name in kind}
        for row in rows:
            if row["batch"] != 1 and alike(row, one, *kind):
                times = number(row, "decode tokens/s") / number(one, "decode tokens/s")
                line[f"batch {row['batch']} / 1"] = times
        found.append(line)
    return [line for line in found if len(line) > 3]


def growth(rows: list[Row]) -> list[Row]:
    """How much longer a step takes after a longer prompt, and how much the cache explains."""
    found: list[Row] = []
    for row in rows:
        same = [other for other in rows if alike(row, other, "model", "precision", "batch")]
        short = min(same, key=lambda other: float(other["prompt"] or 0))
        if row is short:
            continue
        more_bytes = 1e6 * (number(row, "MB a step") - number(short, "MB a step"))
        found.append(
            {name: row[name] for name in ("model", "precision", "batch")}
            | {"prompts": f"{short['prompt']} to {row['prompt']}"}
            | {"growth ms": number(row, "step ms") - number(short, "step ms")}
            | {"explained ms": more_bytes / number(row, "memory GB/s") / 1e6}
        )
    return found


def races(rows: list[Row]) -> list[Row]:
    """A line for each peer and prompt: its tokens/s, ours in float32, and ours at best."""
    found: list[Row] = []
    for row in (row for row in rows if row["side"] != "ours"):
        ours = [own for own in rows if own["side"] == "ours" and alike(own, row, "prompt")]
        (same,) = (own for own in ours if own["precision"] == "float32")
        best = max(ours, key=lambda own: number(own, "tokens/s"))
        theirs = row["tokens/s"]
        line: Row = {"peer": row["side"], "prompt": row["prompt"], "its tokens/s": theirs}
        line |= {"ours, float32": same["tokens/s"], "ratio": ratio(same["tokens/s"], theirs)}
        line |= {"ours, best": best["tokens/s"], "ratio, best": ratio(best["tokens/s"], theirs)}
        found.append(line | {"best": best["precision"]})
    return found


def quality(run_dir: Path, precisions: list[str], device: DeviceName) -> list[Row]:
    """The validation loss of a run in each precision, judged as in a race."""
    data = cli.read_toml(str(run_dir / "config.toml"))["data"]["path"]
    flags = [f"--ours={run_dir}", f"--data={data}", f"--most_tokens={QUALITY_TOKENS}"]
    found: list[Row] = []
    for precision in dict.fromkeys(["float32", *precisions]):
        (result,) = child("evaluator", *flags, f"--precision={precision}", f"--device={device}")
        found.append({"precision": precision, "loss": result["loss"]})
    return [row | {"change": number(row, "loss") - number(found[0], "loss")} for row in found]


def alike(a: Row, b: Row, *columns: str) -> bool:
    return all(a[column] == b[column] for column in columns)


def number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, int | float)
    return value
