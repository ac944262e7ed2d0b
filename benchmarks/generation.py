"""`bench.py sample`: how fast text is generated, and how near that is to the memory's limit."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import peers
from benchmarks.runs import python, run, seconds_of
from benchmarks.table import Output, Row, Tables
from cli import read_toml
from data.loader import Dataset
from engine import count
from engine.device import DeviceName, find_device
from engine.loss import LossModel
from model import GPT, ModelConfig, require
from sampling.cache import cached_attention
from sampling.decode import Decoder
from sampling.load import load_model
from sampling.precision import SamplePrecision, available, convert
from sampling.score import split_loss

QUICKSTART = Path("out/quickstart")  # used if it is there
STEPS = 24  # tokens per text that are timed
SETTLING_STEPS = 5  # not timed: a GPU's graph is recorded in them
NEW_TOKENS = 1 + SETTLING_STEPS + STEPS
STEPS_AT_ONCE = {"cpu": 1, "mps": 8, "cuda": 8}  # waiting after each would slow a GPU down
ROUNDS = 5
READ_BYTES = 512 * 2**20  # far more than any cache holds
BYTES: dict[SamplePrecision, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
QUALITY_TOKENS = 50_000  # of the validation split
LOUD = 0.05  # std of c_proj: fresh blocks add little or nothing, so greedy text would repeat itself


@dataclass(frozen=True, kw_only=True)
class Sample(Output):
    """Measure prefill and decode tokens/s, beside the limit that the memory sets."""

    models: tuple[str, ...] = ("124M", "config/shakespeare_char_laptop.toml")
    """Sizes, with random weights: 124M (GPT-2's) or a config file."""
    prompts: tuple[int, ...] = (16, 512)
    """Tokens of each prompt, cut to what leaves room for the steps."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """Texts that grow at once."""
    peer: tuple[str, ...] = ()
    """Peers of the first of the models: nanogpt=CHECKOUT, transformers, llamacpp, or several."""
    run: Path | None = None
    """Run whose first token is timed, with its loss in each precision (default: out/quickstart)."""
    device: DeviceName = "auto"
    """Device to run on."""

    def __post_init__(self) -> None:
        for peer in self.peer:
            known = peer in ("transformers", "llamacpp") or peer.startswith("nanogpt=")
            require(known, f"peer must be nanogpt=CHECKOUT, transformers or llamacpp: got {peer}")

    def measure(self) -> Tables:
        """Measure the peers, then the quality and the start of a run, then the speed."""
        device = torch.device(find_device(self.device))
        kinds = available(device)
        tables: Tables = {}
        if self.peer:
            model = random_model(self.models[0], device)
            ours: dict[SamplePrecision, GPT] = {
                kind: convert(random_model(self.models[0], device), kind) for kind in kinds
            }
            prompts = [random_prompts(model.config, 1, length)[0] for length in self.prompts]
            tables["peers"] = peers.race(model, ours, self.peer, prompts)
        if self.run or (QUICKSTART / "config.toml").is_file():
            tables["quality"] = quality(self.run or QUICKSTART, kinds, device)
            tables["start"] = start_rows(self.run or QUICKSTART, device.type)
        tables["speed"] = [
            row for m in self.models for k in kinds for row in self.speed(m, k, device)
        ]
        return tables

    def speed(self, name: str, precision: SamplePrecision, device: torch.device) -> list[Row]:
        """Return a row for each batch size and each length of the prompts."""
        head: Row = {"model": Path(name).stem, "precision": precision}
        rows: list[Row] = []
        for batch_size in self.batch_sizes:
            model = random_model(name, device)
            n_bytes = weight_bytes(model, precision)
            convert(model, precision, batch_size)
            for length in self.prompts:
                prompts = random_prompts(model.config, batch_size, length)
                rows.append(head | speed_row(model, n_bytes, prompts))
        return rows


def speed_row(model: GPT, weight_bytes: int, prompts: list[list[int]]) -> Row:
    """Read prompts, then let them grow between two measurements of the memory."""
    device = model.wte.weight.device
    length, batch_size = len(prompts[0]), len(prompts)
    decoder = Decoder(model, prompts, NEW_TOKENS)
    tokens_B = torch.zeros(batch_size, dtype=torch.long, device=device)
    at_once = STEPS_AT_ONCE[device.type]

    def grow(steps: int) -> None:
        for _ in range(steps):
            tokens_B.copy_(decoder.feed(tokens_B).argmax(-1))
        tokens_B[0].item()  # which waits for a GPU

    readings = [seconds_of(lambda: decoder.read()[0, 0].item()) for _ in range(3)]
    grow(SETTLING_STEPS)
    before = bandwidth(device)
    turns = [seconds_of(lambda: grow(at_once)) for _ in range(STEPS // at_once)]
    rate = (before + bandwidth(device)) / 2
    step_seconds = statistics.median(turns) / at_once
    # A step reads the weights and the cache, taken at its length halfway through
    cached = decoder.cache.k_LBKSD.nbytes // decoder.cache.size * (length + NEW_TOKENS // 2)
    n_bytes = weight_bytes + 2 * cached
    limit = rate * batch_size / n_bytes
    return {
        "prompt": length,
        "batch": batch_size,
        "prefill tokens/s": batch_size * length / statistics.median(readings),
        "decode tokens/s": batch_size / step_seconds,
        "step ms": 1000 * step_seconds,
        "MB a step": n_bytes / 1e6,
        "memory GB/s": rate / 1e9,
        "limit tokens/s": limit,
        "of limit": batch_size / step_seconds / limit,
    }


def weight_bytes(model: GPT, precision: SamplePrecision) -> int:
    """Return the bytes of the weights that a decode step reads: blocks and output head."""
    parts = count.count_parameters(model)
    blocks = parts["attention"] + parts["mlp"] + parts["norms"]
    return BYTES[precision] * (blocks + model.lm_head.weight.numel())


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a sum over a large tensor reads: the median of a few."""
    numbers_N = torch.ones(READ_BYTES // 4, device=device)
    seconds = statistics.median(seconds_of(lambda: numbers_N.sum().item()) for _ in range(ROUNDS))
    return READ_BYTES / seconds


def random_model(name: str, device: torch.device) -> GPT:
    """Return a model with the same random weights every time."""
    sizes = {} if name == "124M" else {"vocab_size": 4097} | read_toml(name)["model"]
    torch.manual_seed(0)
    model = GPT(ModelConfig(**sizes), cached_attention)
    for parameter, weight in model.named_parameters():
        if parameter.endswith("c_proj.weight"):
            nn.init.normal_(weight, std=LOUD)
    return model.to(device).eval()


def random_prompts(config: ModelConfig, batch_size: int, length: int) -> list[list[int]]:
    """Return texts that are all different, so that each must be read, cut to leave room."""
    fitting = max(1, min(length, config.context_length - NEW_TOKENS))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch_size, fitting), generator=generator).tolist()


def start_rows(run_dir: Path, device: str) -> list[Row]:
    """Return the seconds of a whole process that writes one token, beside `import torch` alone."""
    flags = (f"--out_dir={run_dir.resolve()}", f"--device={device}", "--max_new_tokens=1")
    commands = {
        "import torch": python("-c", "import torch"),
        "first token of sample.py": python("sample.py", *flags),
    }
    taken = [{name: run(c).seconds for name, c in commands.items()} for _ in range(ROUNDS)]
    seconds = {name: statistics.median(turn[name] for turn in taken) for name in commands}
    alone = seconds["import torch"]
    return [{"of": n, "seconds": s, "over the import": s / alone} for n, s in seconds.items()]


def quality(run_dir: Path, kinds: list[SamplePrecision], device: torch.device) -> list[Row]:
    """Return the validation loss of a run in each precision, float32 first."""
    dataset = Dataset.open(Path(read_toml(str(run_dir / "config.toml"))["data"]["path"]))
    rows: list[Row] = []
    for kind in kinds:
        model = convert(load_model(run_dir, "last").model.to(device), kind)
        loss_model = LossModel(model, model.wte.weight.dtype)
        loss = split_loss(loss_model, model.config.context_length, dataset, QUALITY_TOKENS)
        exact = rows[0]["loss"] if rows else loss
        rows.append({"precision": kind, "loss": loss, "change": loss - exact})
    return rows
