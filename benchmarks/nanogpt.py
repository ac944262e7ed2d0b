"""The other side of a race: a copy of a checkout of nanoGPT, in which only the seed is changed.

Nothing of it is part of this project; what it does is decided by its own scripts and flags.
"""

import contextlib
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import Finished, python, run

CHARACTERS = Path("data/shakespeare_char")  # where it keeps a text by characters
SEED = re.compile(r"(?<=torch\.manual_seed\()\d+(?= \+ seed_offset\))")
UPDATE = re.compile(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", re.M)  # a line of its log
STOCK = ("config/train_shakespeare_char.py",)  # 3 minutes on an A100, says its README
CPU = (  # its README's command for a CPU; of its checkpoints the last one counts
    *STOCK,
    *["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64"],
    *["--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000"],
    *["--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=True"],
)


def copy(checkout: Path, folder: Path) -> Path:
    """Copy a checkout into a folder, where its seed can be set. Raises ValueError if it is none."""
    script = checkout / "train.py"
    source = script.read_text(encoding="utf-8") if script.is_file() else ""
    if len(SEED.findall(source)) != 1:
        raise ValueError(
            f"{checkout} is not a checkout of nanoGPT, whose train.py sets its seed by "
            "torch.manual_seed(1337 + seed_offset): git clone https://github.com/karpathy/nanoGPT"
        )
    ignored = shutil.ignore_patterns(".git", "out*", "*.bin", "input.txt", "__pycache__")
    return shutil.copytree(checkout, folder, ignore=ignored)


def prepare(checkout: Path, text: Path) -> Path:
    """Let it prepare a text by characters; return the folder of its train.bin and val.bin."""
    folder = checkout / CHARACTERS
    shutil.copy(text, folder / "input.txt")
    run(python(CHARACTERS / "prepare.py"), cwd=checkout)
    return folder


def train(checkout: Path, seed: int, *flags: str) -> Finished:
    """Run its train.py."""
    script = checkout / "train.py"
    source = script.read_text(encoding="utf-8")
    script.write_text(SEED.sub(str(seed), source), encoding="utf-8")
    return run(python("train.py", *flags), cwd=checkout)


def build(checkout: Path, **sizes: Any) -> Any:
    """Build a model by its own class."""
    names = runpy.run_path(str(checkout / "model.py"), run_name="nanogpt_model")
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        return names["GPT"](names["GPTConfig"](**sizes))


def load_loss(checkout: Path, path: Path) -> tuple[Any, int]:
    """Rebuild the model of a checkpoint, to be called for its loss; return its context, too.

    nanoGPT ignores targets of -1, where this project ignores -100.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model = build(checkout, **state["model_args"])
    prefix = "_orig_mod."  # of the names in a compiled model
    model.load_state_dict({name.removeprefix(prefix): w for name, w in state["model"].items()})
    forward = model.forward
    model.forward = lambda tokens_BT, targets_BT: forward(tokens_BT, targets_BT.clamp(min=-1))[1]
    return model, state["model_args"]["block_size"]
