"""Show attention in a trained model, on one page that needs no network.

python visualize.py --out_dir=out/quickstart --text="O Romeo, Romeo! wherefore"
python visualize.py --out_dir=out/quickstart --live
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cli
import files
from engine import checkpoint, metrics
from engine.device import DeviceName
from model import require
from sampling.load import Trained, load_model
from sampling.prompts import encode_prompt, read_text
from viewer import page, picture
from viewer.examples import examples_scene
from viewer.live import LiveServer
from viewer.page import Json
from viewer.probe import Probes, make_probes, measure
from viewer.record import record
from viewer.reverser import reverser_scene
from viewer.scene import MOST_TOKENS, Checkpoint, cuts, model_scene, most_checkpoints
from viewer.tokens import shown

LIVE_TOKENS = 32  # of the text by the model itself that the live page shows at first


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Which model and text to show, and where."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run; all checkpoints that it kept are shown."""
    text: str = ""
    """Text for the model to read."""
    text_file: Path | None = None
    """File with the text for the model to read, instead of text."""
    html: Path | None = None
    """Page to write; without html and png it is attention.html in out_dir."""
    png: Path | None = None
    """Picture of all heads to write (.png)."""
    live: bool = False
    """Serve the page to this machine, with a box to type a text in, instead of writing it."""
    port: int = 8000
    """Port to serve the page on; 0 takes any that is free."""
    device: DeviceName = "auto"
    """Device to run on; auto takes the best that is here."""

    def __post_init__(self) -> None:
        cli.at_least(0, self, "port")
        require(self.port <= 65535, f"port must be at most 65535: got {self.port}")
        require(not (self.text and self.text_file), "give text or text_file, not both")
        is_png = self.png is None or self.png.suffix == ".png"
        require(is_png, f"png must be a file that ends in .png: got {self.png}")
        writes = self.png or self.html
        require(not (self.live and writes), "give live or files to write (html, png), not both")


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
        probes = make_probes(newest.model, start[0], newest.tokenizer.vocab_size)
        return cls(out_dir, device, newest, probes)

    def name(self, token: int) -> str:
        """Return how a token is shown."""
        if token >= self.newest.tokenizer.vocab_size:  # the model's vocabulary may be padded
            return f"⟨token {token}⟩"
        return shown(self.newest.tokenizer.token_bytes(token))

    def encode(self, text: str) -> Tensor:
        """Return token ids (1, T). Raises ValueError if there are none, or too many to see."""
        if not text:
            raise ValueError("the text must not be empty: pass --text=... or --text_file=...")
        tokens = self.newest.tokenizer.encode(text)
        limit = self.newest.model.config.context_length
        if len(tokens) > limit:
            raise ValueError(
                f"the text has {len(tokens)} tokens, and this model sees at most "
                f"context_length={limit}: pass a shorter one"
            )
        return torch.tensor([tokens], device=self.newest.model.wte.weight.device)

    def checkpoints(self, n_tokens: int) -> tuple[list[Checkpoint], list[str]]:
        """Return the checkpoints that a page can hold, and sentences on those that are left out."""
        names = checkpoint.history(self.out_dir)
        most = most_checkpoints(self.newest.model.config, min(n_tokens, MOST_TOKENS))
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

    def scene(self, tokens_1T: Tensor, checkpoints: list[Checkpoint], notices: list[str]) -> Json:
        """Return what the page shows of a text, cut to what a page can hold."""
        notices = cuts(self.newest.model.config, tokens_1T.shape[1]) + notices
        scene = model_scene(checkpoints, tokens_1T[:, :MOST_TOKENS], self.name, notices)
        log = self.out_dir / "metrics.jsonl"
        lines = metrics.read(log) if log.exists() else []
        losses = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
        return {**scene, "run": str(self.out_dir), "evaluations": losses}


def evenly(items: list[str], most: int) -> list[str]:
    """Keep at most so many items, evenly spaced, and the last: (a b c d e), 3 -> (a c e)."""
    if len(items) <= most:
        return items
    gaps = max(1, most - 1)
    return [items[len(items) - 1 - (len(items) - 1) * i // gaps] for i in range(most)][::-1]


def write_page(run: Run, tokens_1T: Tensor, path: Path) -> None:
    scene = run.scene(tokens_1T, *run.checkpoints(tokens_1T.shape[1]))
    html = page.build([examples_scene(), scene, reverser_scene()])
    files.write_text(path, html)
    print(f"written to {path}: {len(html.encode()):,} bytes, for any browser, without a network")
    for notice in scene["notices"]:
        print(notice)


def draw_picture(run: Run, tokens_1T: Tensor, path: Path) -> None:
    names = [run.name(token) for token in tokens_1T[0].tolist()]
    weights_LHTT = record(run.newest.model, tokens_1T).weights_LBHTS[:, 0]
    picture.draw(path, weights_LHTT, names, measure(run.newest.model, run.probes))
    print(f"written to {path}")
    if len(names) > picture.MOST_NAMED:
        print(f"More than {picture.MOST_NAMED} tokens: their names have no room beside the maps.")


def serve(run: Run, tokens_1T: Tensor, port: int) -> None:
    """Answer texts until Ctrl-C."""
    checkpoints, notices = run.checkpoints(run.newest.model.config.context_length)
    scene = run.scene(tokens_1T, checkpoints, notices)
    html = page.build([examples_scene(), scene, reverser_scene()], live=True)

    def answer(text: str) -> Json:
        return run.scene(run.encode(text), checkpoints, notices)

    with LiveServer(html, answer, port) as server:
        for notice in scene["notices"]:
            print(notice)
        print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def main() -> None:
    config = cli.parse_config(VisualizeConfig)
    text = config.text if config.text_file is None else read_text(config.text_file)
    html = config.html or (None if config.png or config.live else config.out_dir / "attention.html")
    run = Run.open(config.out_dir, config.device)
    is_given = text or not config.live  # else the model's own text is shown until one is typed
    tokens_1T = run.encode(text) if is_given else run.probes.written_BT[:1, :LIVE_TOKENS]
    for path in filter(None, (html, config.png)):
        files.check_writable(path)
    if config.live:
        serve(run, tokens_1T, config.port)
    if html:
        write_page(run, tokens_1T, html)
    if config.png:
        draw_picture(run, tokens_1T, config.png)


if __name__ == "__main__":
    cli.run(main)
