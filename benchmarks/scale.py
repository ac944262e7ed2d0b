"""`bench.py scale`: what grows with context, width, depth and processes; and what a cluster needs.

The first table is measured on this machine. The second is arithmetic alone: bytes and operations
that are counted, and a share of the GPUs' peak that is assumed.
"""

import itertools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.runs import python, run, temporary_folder
from benchmarks.table import MEBIBYTE, Output, Row, Tables
from benchmarks.training import SETTLING_STEPS, milliseconds, settled
from engine import metrics
from engine.count import PEAK_FLOPS, flops_per_token, product_weights
from engine.loss import BYTES_PER_LOGIT
from engine.recipe import TOKENS_PER_PARAMETER
from engine.shard import STATE_BYTES
from model import ModelConfig

CONFIG = Path("config/shakespeare_char_laptop.toml")
STEPS = SETTLING_STEPS + 10
SIZES = {"context_length": 256, "n_embd": 256, "n_layer": 4}
TOKENS = 4096  # per step, whatever the context
MUON_BYTES = 12  # of a parameter, its gradient and one mean, in a block's matrix
H100_FLOPS = PEAK_FLOPS["H100 80GB HBM3"]
MEMORY = 80e9  # of it
KEPT = {"gpt2": 28, "modern": 45}  # bytes per layer, token and channel, that a backward pass needs
RECOMPUTED = 2  # as many, if a block keeps its input in bfloat16 alone
GPUS = (1, 8, 64, 1024)
GPT2 = ModelConfig(architecture="gpt2", vocab_size=50257, context_length=1024, tie_embeddings=True)
MODERN = replace(GPT2, architecture="modern", context_length=4096, tie_embeddings=False)
MODELS = {
    "GPT-2 124M": replace(GPT2, n_layer=12, n_head=12, n_embd=768),
    "GPT-2 355M": replace(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "GPT-2 774M": replace(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "GPT-2 1.5B": replace(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "modern 7B": replace(MODERN, n_layer=32, n_head=32, n_embd=4096),
    "modern 13B": replace(MODERN, n_layer=40, n_head=40, n_embd=5120),
    "modern 70B": replace(
        MODERN, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, n_inner=28672, vocab_size=128256
    ),
}


@dataclass(frozen=True, kw_only=True)
class Scale(Output):
    """Measure steps of several sizes here, and calculate those of a cluster."""

    data: Path
    """A prepared dataset of characters, which is trained on for a few steps."""
    mfu: float = 0.4
    """Share of the GPUs' peak that the calculated hours assume."""

    def measure(self) -> Tables:
        """Return both tables."""
        return {
            "measured here": list(map(self.measured, sizes())),
            "calculated": [calculated(name, gpus, self.mfu) for name in MODELS for gpus in GPUS],
        }

    def measured(self, size: dict[str, int | str]) -> Row:
        """Train for a few steps at a size; torchrun gives each of several processes one thread."""
        n = int(size["processes"])
        batch_size = TOKENS // int(size["context_length"])
        flags = [f"--model.{name}={size[name]}" for name in SIZES]
        flags += [f"--data.path={self.data.resolve()}", f"--batch_size={batch_size}"]
        flags += [f"--max_steps={STEPS}", f"--eval_every={STEPS}", "--eval_tokens=2", "--samples=0"]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        launched = [*launch, "train.py"] if n > 1 else ["train.py"]
        with temporary_folder() as folder:
            how = [f"--out_dir={folder / 'run'}", f"--parallel={size['shared']}"]
            command = python(*launched, CONFIG.resolve(), *how, *flags)
            finished = run(command)
            steps = milliseconds(metrics.read(folder / "run" / "metrics.jsonl"))
        return {
            **size,
            "step ms": statistics.median(settled(steps)),
            "peak MiB of a process": finished.peak_bytes / MEBIBYTE,
        }


def sizes() -> list[dict[str, int | str]]:
    """Return the sizes to measure: each of them half and twice, then several processes."""
    alone = {**SIZES, "processes": 1, "shared": "ddp"}
    found = [alone]
    for name, factor in itertools.product(SIZES, (0.5, 2)):
        found.append({**alone, name: int(SIZES[name] * factor)})
    return [*found, *({**alone, "processes": 2, "shared": how} for how in ("ddp", "fsdp"))]


def calculated(name: str, gpus: int, mfu: float) -> Row:
    """Return the memory and the time of a model on H100s that share it, a sequence on each."""
    config = MODELS[name].sized()
    n_blocks, n = parameters(config)
    state = STATE_BYTES * n / gpus
    muon = (MUON_BYTES * n_blocks + STATE_BYTES * (n - n_blocks)) / gpus
    n_ends = n - n_blocks  # embeddings and head, which stay gathered, as their gradients do
    gathered = 4 * (3 * n_blocks / config.n_layer + 2 * n_ends)  # two blocks and one's gradient
    logits = 8 * min(config.context_length * config.vocab_size, MEMORY / BYTES_PER_LOGIT)
    always = state + logits + (gathered if gpus > 1 else 0)
    channels = config.n_embd * config.context_length
    kept = KEPT[config.architecture] * channels
    totals = {
        "kept": always + config.n_layer * kept,
        "recomputed": always + config.n_layer * RECOMPUTED * channels + kept,
    }
    flops = TOKENS_PER_PARAMETER * n * flops_per_token(config)
    return {
        "model": name,
        "H100s": gpus,
        "parameters": n,
        "AdamW's state, GB each": state / 1e9,
        "Muon's": muon / 1e9,
        **{f"all, {how}": total / 1e9 for how, total in totals.items()},
        "fits 80 GB": next((how for how, total in totals.items() if total < MEMORY), "no"),
        "GFLOP/token": flops_per_token(config) / 1e9,
        "hours for 20 tokens/parameter": flops / (gpus * mfu * H100_FLOPS) / 3600,
        "of": "calculated",
    }


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Return how many there are in the blocks' matrices, and in all but the norms."""
    embeddings = config.n_embd * config.vocab_size
    n_blocks = product_weights(config) - embeddings  # without the head
    n_positions = 0 if config.is_modern else config.n_embd * config.context_length
    return n_blocks, n_blocks + n_positions + embeddings * (1 if config.tie_embeddings else 2)
