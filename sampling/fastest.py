"""Find the precision in which a run is sampled fastest on this CPU, without a loss of quality."""

import copy
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import files
from cli import read_toml, sentence
from data.loader import Dataset
from engine.loss import LossModel
from model import GPT
from sampling.decode import Decoder
from sampling.load import Trained
from sampling.precision import SamplePrecision, available, convert, median_seconds
from sampling.score import split_loss

MOST_CHANGE = 0.001  # of the validation loss, in nats per token
LEAST_GAIN = 1.1  # times as fast as float32: a smaller one may be chance
OPERATIONS = 10**12  # of a pass over validation text: seconds on a laptop
MOST_TOKENS = 2**15  # of that text
PROMPT_TOKENS = 16
STEPS = 12  # that are timed
FILE = "precision.json"
NOT_TRIED = "precision: float32, as no other could be tried: "


def fastest(trained: Trained, out_dir: Path) -> SamplePrecision:
    """Return the precision that writes fastest of those that keep the validation loss; say so.

    It is measured once, and kept in the folder of the run. Without the run's validation text it is
    float32; on a GPU it is `auto`, which `convert` knows.
    """
    if not trained.model.wte.weight.is_cpu:
        return "auto"
    try:
        found = kept(trained, out_dir) or measured(trained, out_dir)
    except (OSError, ValueError, KeyError) as error:
        print(f"{NOT_TRIED}{sentence(error)}", file=sys.stderr)
        return "float32"
    kind, exact = found["precision"], found["tried"]["float32"]
    shown = f"precision: {kind}"
    if kind != "float32":
        chosen = found["tried"][kind]
        shown += f", {chosen['tokens/s'] / exact['tokens/s']:.1f} times as fast as float32 here"
        shown += f"; validation loss {chosen['loss'] - exact['loss']:+.4f}"
    print(shown, file=sys.stderr)
    return kind


def kept(trained: Trained, out_dir: Path) -> dict[str, Any] | None:
    """Return what was measured before, if it was of this checkpoint on such a machine."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads((out_dir / FILE).read_text(encoding="utf-8"))
        if found["of"] == measured_of(trained) and found["precision"] in found["tried"]:
            return found
    return None


def measured_of(trained: Trained) -> dict[str, Any]:
    """Return what a measurement depends on."""
    cpu = [name for name, value in torch.cpu.get_capabilities().items() if value is True]
    return {
        "step": trained.step,
        "torch": torch.__version__,
        "cpu": sorted(cpu),
        "threads": torch.get_num_threads(),
    }


def measured(trained: Trained, out_dir: Path) -> dict[str, Any]:
    """Try all precisions on the validation text. Raises OSError or ValueError if it is not here."""
    dataset = Dataset.open(Path(read_toml(str(out_dir / "config.toml"))["data"]["path"]))
    if dataset.tokenizer.state() != trained.tokenizer.state():
        raise ValueError(f"the dataset {dataset.path} has another tokenizer")
    print("trying precisions on the run's validation text, once ...", file=sys.stderr)
    # bfloat16 is not tried: float16 is as fast, and nearer to float32
    kinds: list[SamplePrecision] = [k for k in available(torch.device("cpu")) if k != "bfloat16"]
    tried = {kind: trial(convert(copy.deepcopy(trained.model), kind), dataset) for kind in kinds}
    exact = tried["float32"]
    good = {
        kind: one["tokens/s"]
        for kind, one in tried.items()
        if abs(one["loss"] - exact["loss"]) < MOST_CHANGE
        and one["tokens/s"] > LEAST_GAIN * exact["tokens/s"]
    }
    precision = max(good, key=lambda kind: good[kind], default="float32")
    found = {"precision": precision, "tried": tried, "of": measured_of(trained)}
    with suppress(OSError):  # a folder that cannot be written to is measured again next time
        files.write_text(out_dir / FILE, json.dumps(found, indent=1) + "\n")
    return found


def trial(model: GPT, dataset: Dataset) -> dict[str, float]:
    """Return a model's loss on validation text, and how fast it writes."""
    config = model.config
    n_tokens = OPERATIONS // (2 * sum(p.numel() for p in model.parameters()))
    n_tokens = max(config.context_length + 1, min(MOST_TOKENS, n_tokens))
    loss = split_loss(LossModel(model, torch.float32), config.context_length, dataset, n_tokens)
    length = max(1, min(PROMPT_TOKENS, config.context_length - STEPS))
    decoder = Decoder(model, [dataset.tokens("val", length).tolist()], STEPS)
    decoder.read()
    token_1 = torch.zeros(1, dtype=torch.long)
    return {"loss": loss, "tokens/s": 1 / median_seconds(lambda: decoder.feed(token_1), STEPS)}
