"""`bench.py gpu`: all that needs a GPU, by the commands in gpu.toml, each within its own minutes.

Each result is printed and kept at once, so a part that fails or takes too long spoils no other.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nanogpt
from benchmarks.check import TOO_FAR
from benchmarks.preparation import prepare
from benchmarks.runs import python, run, temporary_folder
from benchmarks.table import Output, Row, Tables
from cli import read_toml

PARTS = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True, kw_only=True)
class Gpu(Output):
    """Check a GPU, then measure speed and memory of 124M, sampling, and races against nanoGPT."""

    nanogpt: Path
    """A checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"""
    text: Path
    """A large text file, for 124M."""
    shakespeare: Path
    """The file of tiny Shakespeare."""
    parts: Path = PARTS
    """File of the parts to do."""
    json: Path = Path("gpu.json")
    """File to add the record of each part to, as soon as it is there."""

    def measure(self) -> Tables:
        """Prepare the large text, then do the parts, one after another."""
        rows: list[Row] = []
        with temporary_folder() as folder:
            paths = {n: getattr(self, n).resolve() for n in ("nanogpt", "text", "shakespeare")}
            nanogpt.copy(self.nanogpt, folder / "nanogpt")  # or it is none: no part has begun yet
            self.shakespeare.open().close()  # or it is not there
            prepare(paths["text"], "gpt2", folder / "large")
            for name, part in read_toml(str(self.parts)).items():
                words = shlex.split(part["command"])
                flags = [word.format(data=folder / "large", **paths) for word in words]
                command = python("bench.py", *flags, f"--json={self.json.resolve()}")
                started_at = time.monotonic()
                try:
                    said = run(command, limit_seconds=60 * part["minutes"]).text
                    print(said, flush=True)
                    outcome = TOO_FAR if TOO_FAR in said else "done"
                except (ValueError, OSError) as error:
                    outcome = str(error)
                seconds = time.monotonic() - started_at
                rows.append({"part": name, "seconds": seconds, "outcome": outcome})
        return {"parts": rows}
