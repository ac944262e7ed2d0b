"""Show attention in a trained model: one page that needs no network.

python visualize.py --out_dir=out/quickstart --text="import os, sys; import os"
python visualize.py --out_dir=out/quickstart --live
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from engine import checkpoint
from engine.cli import at_least, parse_config, run
from engine.files import check_writable, write_whole
from engine.metrics import read
from engine.parallel import DeviceName, find_device
from model import GPT
from sample import load_model
from sampling.prompts import encode_prompt, read_text
from viewer import page, picture
from viewer.examples import examples_scene
from viewer.live import LiveServer
from viewer.payload import Json
from viewer.probe import Probes, make_probes, measure
from viewer.record import record
from viewer.reverser import reverser_scene
from viewer.scene import MOST_TOKENS, Checkpoint, cuts, model_scene, most_checkpoints
from viewer.tokens import shown

LIVE_TOKENS = 32  # of a text of the model's own, to begin with


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Which model and text to show, and where."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run; all checkpoints that it kept are shown."""
    text: str = ""
    """Text to read with the model."""
    text_file: Path | None = None
    """File whose text to read, instead of text."""
    html: Path | None = None
    """Page to write; attention.html in out_dir if neither this nor png is given."""
    png: Path | None = None
    """Picture of all heads to write."""
    live: bool = False
    """Serve the page to this machine, with a box to type in, instead of writing it."""
    port: int = 8000
    """Where to serve; 0 for any port that is free."""
    device: DeviceName = "auto"
    """Where to run; auto takes the best that is here."""

    def __post_init__(self) -> None:
        at_least(0, self, "port")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535: got {self.port}")
        if self.text and self.text_file is not None:
            raise ValueError("give text or text_file, not both")
        if self.png and self.png.suffix != ".png":
            raise ValueError(f"png must be a file that ends in .png: got {self.png}")
        if self.live and (self.png or self.html):
            raise ValueError("give live or files to write, html and png, not both")


@dataclass(frozen=True)
class Trained:
    """A run: its newest model, its tokenizer, and the texts by which all its heads are judged."""

    out_dir: Path
    device: str
    model: GPT
    tokenizer: Tokenizer
    probes: Probes

    @classmethod
    def open(cls, out_dir: Path, device: str) -> "Trained":
        state = checkpoint.load(out_dir, "last")
        model, tokenizer = load_model(state, device)
        start = encode_prompt("", tokenizer, state["data"]["train"]["documents"] > 1)
        probes = make_probes(model, start[0], tokenizer.vocab_size)
        return cls(out_dir, device, model, tokenizer, probes)

    def name(self, token: int) -> str:
        """How a token is shown."""
        if token >= self.tokenizer.vocab_size:  # the model's vocabulary may be padded
            return f"⟨{token}⟩"
        return shown(self.tokenizer.token_bytes(token))

    def encode(self, text: str) -> Tensor:
        """Token ids (1, T). Raises ValueError if there are none, or more than the model can see."""
        if not text:
            raise ValueError("the text must not be empty: pass --text=... or --text_file=...")
        tokens, limit = self.tokenizer.encode(text), self.model.config.context_length
        if len(tokens) > limit:
            raise ValueError(
                f"the text has {len(tokens)} tokens, and this model sees at most "
                f"context_length={limit}: pass a shorter one"
            )
        return torch.tensor([tokens], device=self.device)

    def checkpoints(self, n_tokens: int) -> tuple[list[Checkpoint], list[str]]:
        """As many of the run's checkpoints as a page can hold; a sentence if that is not all."""
        names = checkpoint.history(self.out_dir)
        most = most_checkpoints(self.model.config, min(n_tokens, MOST_TOKENS))
        found = evenly(names, most)
        notices = [f"{len(found)} of {len(names)} checkpoints are shown."]
        return list(map(self.checkpoint, found)), notices if len(found) < len(names) else []

    def checkpoint(self, name: str) -> Checkpoint:
        state = checkpoint.load(self.out_dir, name)
        model, _ = load_model(state, self.device)
        return Checkpoint(state["step"], model, measure(model, self.probes))

    def evaluations(self) -> list[tuple[float, float]]:
        """Step and validation loss, where the run's log is still there."""
        log = self.out_dir / "metrics.jsonl"
        lines = read(log) if log.exists() else []
        return [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]

    def scene(self, tokens_1T: Tensor, checkpoints: list[Checkpoint], notices: list[str]) -> Json:
        """What the page shows of a text, cut to what it can hold."""
        notices = cuts(self.model.config, tokens_1T.shape[1]) + notices
        scene = model_scene(checkpoints, tokens_1T[:, :MOST_TOKENS], self.name, notices)
        return scene | {"run": str(self.out_dir), "evaluations": self.evaluations()}


def evenly(items: list[str], most: int) -> list[str]:
    """At most so many items, the last among them, evenly spaced: (a b c d e), 3 -> (a c e)."""
    if len(items) <= most:
        return items
    gaps = max(1, most - 1)
    return [items[len(items) - 1 - (len(items) - 1) * i // gaps] for i in range(most)][::-1]


def write_page(trained: Trained, tokens_1T: Tensor, path: Path) -> None:
    scene = trained.scene(tokens_1T, *trained.checkpoints(tokens_1T.shape[1]))
    html = page.build([examples_scene(), scene, reverser_scene()])
    write_whole(path, html)
    print(f"written to {path}: {len(html.encode()):,} bytes, for any browser, without a network")
    for notice in scene["notices"]:
        print(notice)


def draw_picture(trained: Trained, tokens_1T: Tensor, path: Path) -> None:
    names, kept = list(map(trained.name, tokens_1T[0].tolist())), record(trained.model, tokens_1T)
    measured = measure(trained.model, trained.probes)
    picture.draw(path, kept.weights_LBHTS[:, 0], names, measured)
    print(f"written to {path}")
    if len(names) > picture.MOST_NAMED:
        print(f"More than {picture.MOST_NAMED} tokens: their names have no room beside the maps.")


def serve(trained: Trained, tokens_1T: Tensor, port: int) -> None:
    """Answer until Ctrl-C."""
    checkpoints = trained.checkpoints(trained.model.config.context_length)
    scene = trained.scene(tokens_1T, *checkpoints)
    html = page.build([examples_scene(), scene, reverser_scene()], live=True)

    def answer(text: str) -> Json:
        return trained.scene(trained.encode(text), *checkpoints)

    with LiveServer(html, answer, port) as server:
        print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def main() -> None:
    config = parse_config(VisualizeConfig)
    text = config.text if config.text_file is None else read_text(config.text_file)
    html = config.html or (None if config.png or config.live else config.out_dir / "attention.html")
    trained = Trained.open(config.out_dir, find_device(config.device))
    is_given = text or not config.live  # else there is something to look at before one types
    tokens_1T = trained.encode(text) if is_given else trained.probes.written_BT[:1, :LIVE_TOKENS]
    for path in filter(None, (html, config.png)):
        check_writable(path)
    if config.live:
        serve(trained, tokens_1T, config.port)
    if html:
        write_page(trained, tokens_1T, html)
    if config.png:
        draw_picture(trained, tokens_1T, config.png)


if __name__ == "__main__":
    run(main)
