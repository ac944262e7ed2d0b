"""Show attention in a trained model, on one page that needs no network.

python visualize.py --out_dir=out/quickstart --text="O Romeo, Romeo! wherefore"

The model is in the page, which runs it on whatever is typed there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import cli
import files
from data.shown import shown
from engine import checkpoint, metrics
from engine.count import count_parameters
from engine.device import DeviceName
from model import require
from sampling.load import Trained, load_model
from sampling.prompts import encode_prompt, read_text
from viewer import page
from viewer.page import Json
from viewer.probe import Probes, make_probes, measure
from viewer.record import losses
from viewer.reverser import reverser_scene
from viewer.scene import MOST_FRAMES, MOST_TOKENS, Checkpoint, cuts, living_scene, model_scene
from viewer.weights import MOST_IN_F16, Form, most_copies, obstacle_to, rounded, tokenizer_spec

FIRST_TOKENS = 32  # of a text by the model itself, which a page shows if it is given none


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Which model and text to show, and where."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run; of the checkpoints that it kept as many are shown as a page can hold."""
    text: str = ""
    """Text for the model to read at first; if it is empty, one that the model writes."""
    text_file: Path | None = None
    """File with the text for the model to read, instead of text."""
    html: Path | None = None
    """Page to write; None is attention.html in out_dir."""
    weights: Literal["auto", "f32", "f16", "int8"] = "auto"
    """Numbers of the model in the page: f16 is near float32, int8 half as large; auto by size."""
    device: DeviceName = "auto"
    """Device to run on; auto takes the best that is here."""

    def __post_init__(self) -> None:
        require(not (self.text and self.text_file), "give text or text_file, not both")


@dataclass(frozen=True)
class Run:
    """A run's folder, its newest model, and the texts on which the heads are scored."""

    out_dir: Path
    device: DeviceName
    newest: Trained
    probes: Probes

    @classmethod
    def open(cls, out_dir: Path, device: DeviceName) -> "Run":
        newest = load_model(out_dir, "last", device)
        start = encode_prompt("", newest)
        probes = make_probes(newest.model, start[0], newest.tokenizer.vocab_size, newest.tokenizer)
        return cls(out_dir, device, newest, probes)

    def name(self, token: int) -> str:
        """Return how a token is shown."""
        if token >= self.newest.tokenizer.vocab_size:  # the model's vocabulary may be padded
            return f"⟨token {token}⟩"
        return shown(self.newest.tokenizer.token_bytes(token))

    def encode(self, text: str) -> Tensor:
        """Return token ids (1, T), without a text those of one by the model itself.

        Raises ValueError if there are too many to see.
        """
        if not text:
            return self.probes.written_BT[:1, :FIRST_TOKENS]
        tokens = self.newest.tokenizer.encode(text)
        limit = self.newest.model.config.context_length
        if len(tokens) > limit:
            raise ValueError(
                f"the text has {len(tokens)} tokens, and this model sees at most "
                f"context_length={limit}: pass a shorter one"
            )
        return torch.tensor([tokens], device=self.newest.model.wte.weight.device)

    def checkpoints(self, most: int) -> tuple[list[Checkpoint], list[str]]:
        """Return at most so many checkpoints, and sentences on those that are left out."""
        names = checkpoint.history(self.out_dir)
        newest = ("last", f"step_{self.newest.step}")  # the same model, perhaps in two files
        found = {self.newest.step: self.newest}
        notices: list[str] = []
        others = [name for name in evenly(names, most) if name not in newest]
        for name in others:
            try:
                trained = load_model(self.out_dir, name, self.device)
                found[trained.step] = trained
            except (OSError, ValueError) as error:
                notices.append(f"The {name} checkpoint is left out: {cli.sentence(error)}.")
        if len(found) < len(names):
            notices.insert(0, f"{len(found)} of {len(names)} checkpoints are shown.")
        kept = [found[step] for step in sorted(found)]
        return [Checkpoint(t.step, t.model, measure(t.model, self.probes)) for t in kept], notices

    def scene(self, tokens_1T: Tensor, form: Form | Literal["auto"]) -> Json:
        """Return what the page shows: the model or, if it cannot run it, what it makes of the text.

        Raises ValueError if a form is asked for that the page cannot have.
        """
        model, config = self.newest.model, self.newest.model.config
        tokenizer = tokenizer_spec(self.newest.tokenizer.state())
        obstacle = obstacle_to(model, tokenizer)
        require(form == "auto" or not obstacle, f"weights must be auto, as {obstacle}: got {form}")
        if tokenizer is None or obstacle:
            checkpoints, notices = self.checkpoints(MOST_FRAMES)
            notices += cuts(config, tokens_1T.shape[1])
            notices += [f"The page shows this one text only, as {obstacle}."]
            scene = model_scene(checkpoints, tokens_1T[:, :MOST_TOKENS], self.name, notices)
        else:
            if form == "auto":
                form = "f16" if count_parameters(model)["total"] <= MOST_IN_F16 else "int8"
            checkpoints, notices = self.checkpoints(most_copies(model, form))
            start = (tokens_1T[0].tolist(), self.newest.tokenizer.decode(tokens_1T[0].tolist()))
            notices += cuts(config)
            scene = living_scene(checkpoints, *start, self.name, notices, tokenizer, form)
        log = self.out_dir / "metrics.jsonl"
        lines = metrics.read(log) if log.exists() else []
        evaluations = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
        return {**scene, "run": str(self.out_dir), "evaluations": evaluations}

    def change_by(self, form: Form) -> float:
        """Return by how much the page's weights change the loss of texts by the model itself."""
        model, texts_BT = self.newest.model, self.probes.written_BT
        return float((losses(rounded(model, form), texts_BT) - losses(model, texts_BT)).mean())


def evenly(items: list[str], most: int) -> list[str]:
    """Keep at most so many items, evenly spaced, and the last: (a b c d e), 3 -> (a c e)."""
    if len(items) <= most:
        return items
    gaps = max(1, most - 1)
    return [items[len(items) - 1 - (len(items) - 1) * i // gaps] for i in range(most)][::-1]


def write_page(run: Run, tokens_1T: Tensor, form: Form | Literal["auto"], path: Path) -> None:
    scene = run.scene(tokens_1T, form)
    html = page.build([scene, reverser_scene()])
    files.write_text(path, html)
    print(f"written to {path}: {len(html.encode()):,} bytes, for any browser, without a network")
    if "model" in scene:
        used: Form = scene["frames"][-1]["weights"]["form"]
        print(
            f"The model is in it, with weights as {used}, which change the loss of its own texts "
            f"by {run.change_by(used):+.5f} nats per token."
        )
    for notice in scene["notices"]:
        print(notice)


def main() -> None:
    config = cli.parse_config(VisualizeConfig)
    text = config.text if config.text_file is None else read_text(config.text_file)
    run = Run.open(config.out_dir, config.device)
    tokens_1T = run.encode(text)
    path = config.html or config.out_dir / "attention.html"
    files.check_writable(path)
    write_page(run, tokens_1T, config.weights, path)


if __name__ == "__main__":
    cli.run(main)
