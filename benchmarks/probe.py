"""What only torch knows, as one line of JSON: python -m benchmarks.probe [RUN]

Of the machine: its GPU and threads. Of a finished run: the operations that a token costs, and
how fast this machine multiplies large matrices in the run's own precision.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint, cli
from engine.metrics import PEAK_FLOPS, flops_per_token
from engine.parallel import find_device
from engine.report import count_parameters
from model import GPT, ModelConfig

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # large enough to reach the full rate
PRODUCTS = 9


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Say what this machine is, and what a run costs on it."""

    run: cli.Positional[Path | None] = None
    """Folder of a run, with its checkpoint."""


def probe(config: ProbeConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "gpu": gpu_name()}
    if config.run is None:
        return found
    settings = cli.read_toml(str(config.run / "config.toml"))
    device, precision = find_device(settings["device"]), settings["precision"]
    peak = known_peak(gpu_name()) if (device, precision) == ("cuda", "bfloat16") else None
    return found | {
        "precision": precision,
        "machine_flops": peak or matrix_flops(device, precision),
        "is_known_peak": peak is not None,
        **costs(checkpoint.load(config.run, "last")["model_config"]),
    }


def costs(model_config: dict[str, Any]) -> dict[str, int]:
    """Size of a model, and operations of a training step per token."""
    model = ModelConfig(**model_config)
    with torch.device("meta"):
        parts = count_parameters(GPT(model))
    per_token = flops_per_token(parts, asdict(model))
    return {"parameters": parts["total"], "flops_per_token": per_token}


def known_peak(gpu: str | None) -> float | None:
    """FLOP/s from the data sheet of a GPU, if it is in engine/metrics.py."""
    return next((peak for name, peak in PEAK_FLOPS.items() if gpu and name in gpu), None)


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def matrix_flops(device: str, precision: str) -> float:
    """FLOP/s of products of large square matrices: the median of a few, after one to warm up."""
    n = MATRIX_SIZE[device]
    a_NN, b_NN = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    seconds: list[float] = []
    for _ in range(PRODUCTS + 1):
        started_at = time.perf_counter()
        (a_NN @ b_NN)[0, 0].item()  # which waits for a GPU
        seconds.append(time.perf_counter() - started_at)
    return 2 * n**3 / statistics.median(seconds[1:])


if __name__ == "__main__":
    cli.run(lambda: print(json.dumps(probe(cli.parse_config(ProbeConfig)))))
