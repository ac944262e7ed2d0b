"""The other side of a race: a checkout of nanoGPT, of which only the seed is changed, in a copy.

Nothing of it is part of this project; what it does is decided by its own scripts and flags.
"""

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.runs import Finished, python, run

CHARACTERS = Path("data/shakespeare_char")  # where it keeps the text that it knows by characters
NEEDED = ("train.py", "model.py", CHARACTERS / "prepare.py")
SEED = re.compile(r"(?<=torch\.manual_seed\()\d+(?= \+ seed_offset\))")
EVALUATION = re.compile(r"^step \d+: train loss [\d.]+, val loss ([\d.]+)")
UPDATE = re.compile(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms")

STOCK = ("config/train_shakespeare_char.py",)  # 3 minutes on an A100, says its README
CPU = (  # the README's command for a CPU; the last checkpoint is the one that counts
    *STOCK,
    *["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64"],
    *["--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000"],
    *["--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=True"],
)


@dataclass(frozen=True)
class Checkout:
    """A copy of nanoGPT that may be changed. Make one with `Checkout.copy`."""

    folder: Path

    @classmethod
    def copy(cls, source: Path, folder: Path) -> "Checkout":
        """Copy a checkout. Raises ValueError if it is none, or not as it was known to be."""
        check(source)
        ignored = shutil.ignore_patterns(".git", "out*", "*.bin", "input.txt", "__pycache__")
        shutil.copytree(source, folder, ignore=ignored)
        return cls(folder)

    def prepare(self, text: str) -> Path:
        """Let it prepare `text` by characters; return the folder of its train.bin and val.bin."""
        folder = self.folder / CHARACTERS
        (folder / "input.txt").write_text(text, encoding="utf-8", newline="\n")
        run(python(CHARACTERS / "prepare.py"), cwd=self.folder)
        return folder

    def train(self, out_dir: Path, seed: int, *flags: str, **how: Any) -> Finished:
        """Run its train.py; `how` goes to `runs.run`."""
        script = self.folder / "train.py"
        source = script.read_text(encoding="utf-8")
        script.write_text(SEED.sub(str(seed), source), encoding="utf-8")
        return run(python("train.py", *flags, f"--out_dir={out_dir}"), cwd=self.folder, **how)


def check(source: Path) -> None:
    """Raise ValueError or OSError if a folder is no checkout of nanoGPT."""
    missing = [str(name) for name in NEEDED if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} is not a checkout of nanoGPT, it has no {', '.join(missing)}: "
            "get one with git clone https://github.com/karpathy/nanoGPT"
        )
    if len(SEED.findall((source / "train.py").read_text(encoding="utf-8"))) != 1:
        raise ValueError(
            f"{source}/train.py sets its seed in another way than `torch.manual_seed(1337 + "
            "seed_offset)`: this checkout cannot be run with several seeds"
        )


def import_model(checkout: Path) -> ModuleType:
    """Its model.py, under another name, as ours is called model, too."""
    name, path = "nanogpt_model", checkout / "model.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # as dataclasses expect
    spec.loader.exec_module(module)
    return module


def step_seconds(finished: Finished) -> list[float]:
    """Of each update that it logged: `iter 7: loss 4.1, time 52.10ms, mfu 1.00%` -> 0.0521."""
    found = (UPDATE.search(line.text) for line in finished.lines)
    return [float(match[1]) / 1000 for match in found if match]
