"""What the parts of `bench.py gpu` share: sizes, time, and the two sides' 124M."""

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import ours
from benchmarks.nanogpt import Checkout
from benchmarks.ours import SETTLING_STEPS, Trained
from benchmarks.runs import Finished
from benchmarks.sizes import Sizes
from benchmarks.table import Row, Tables, Value, ratio
from benchmarks.verdict import THEM, US
from engine.cli import at_least

SEED = 1337


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """Measure on one GPU: speed and memory of 124M, and time to a loss, against nanoGPT."""

    nanogpt: Path
    """A checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"""
    text: Path
    """A large text, a file or a folder, such as the site-packages of a Python."""
    shakespeare: Path | None = None
    """The file of tiny Shakespeare (default: download it)."""
    config: Path = Path("config/gpt2_124m.toml")
    """Our config of 124M parameters."""
    race_config: Path = Path("config/shakespeare_char_laptop.toml")
    """Our config for tiny Shakespeare."""
    flags: str = ""
    """More flags for our runs of 124M, in one string."""
    target: float = 1.4697
    """Loss on tiny Shakespeare to race to; nanoGPT's README promises this one."""
    minutes: float = 9.5
    """All parts together; a part that overruns its share is stopped, and the next begins."""
    tiny: bool = False
    """Small sizes on a CPU, which only show that the parts work together."""

    def __post_init__(self) -> None:
        at_least(0.1, self, "minutes")


@dataclass(frozen=True)
class Speed:
    """What later parts plan with."""

    step_seconds: float
    start_seconds: float
    """All of the process that is not steps: imports, compilation, the end."""

    def steps_within(self, seconds: float) -> int:
        return max(2 * SETTLING_STEPS, int((seconds - self.start_seconds) / self.step_seconds))


@dataclass
class Session:
    """What the parts share."""

    config: GpuBench
    folder: Path
    sizes: Sizes
    checkout: Checkout
    limit_at: float = 0.0  # the instant when the current part must end
    flops_per_token: float = 0.0  # of GPT-2's architecture, which nanoGPT's is
    peak: float = 0.0
    speeds: dict[str, Speed] = field(default_factory=dict)
    tables: Tables = field(default_factory=lambda: {"124M": [], "races": [], "parts": []})

    @property
    def data(self) -> Path:
        return self.folder / "large"

    def left(self) -> float:
        """Seconds until the current part is stopped."""
        return max(1.0, self.limit_at - time.monotonic())

    def train(self, name: str, *flags: str) -> Trained:
        """Our 124M."""
        own = (*self.sizes.ours, f"--data.path={self.data}", *shlex.split(self.config.flags))
        out_dir = self.folder / name
        how = {"limit_seconds": self.left()}
        return ours.train(self.config.config, out_dir, *own, *flags, **how)

    def train_theirs(self, name: str, steps: int, *flags: str) -> Finished:
        """Their 124M, with an evaluation at the start, which it insists on, and at the end."""
        own = (*self.sizes.theirs, "--dataset=large", "--log_interval=1", f"--max_iters={steps}")
        own += (f"--eval_interval={steps}", "--eval_iters=1", f"--lr_decay_iters={steps}")
        own += (f"--warmup_iters={steps // 10}", *flags)
        how = {"limit_seconds": self.left()}
        return self.checkout.train(self.folder / name, SEED, *own, **how)

    def add_race(self, what: str, theirs: Value, own: Value) -> None:
        row: Row = {"race": what, THEM: theirs, US: own, "ratio": ratio(theirs, own)}
        self.tables["races"].append(row)
