"""`bench.py stories`: what a model has learned from data.stories, and which heads do it."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import python, run
from benchmarks.table import Tables


@dataclass(frozen=True, kw_only=True)
class StoriesBench:
    """Judge a run of config/stories.toml on stories that it has not seen."""

    out_dir: Path = Path("out/stories")
    """Folder that train.py wrote."""
    data: Path = Path("data/stories_bpe")
    """Folder that data.prepare wrote."""
    stories: int = 1000
    """Stories to ask for pronouns in, the first so many of the validation split."""


def measure(config: StoriesBench) -> Tables:
    """Judge in a process of its own, as this one stays without torch."""
    flags = (f"--out_dir={config.out_dir.resolve()}", f"--data={config.data.resolve()}")
    command = python("-m", "benchmarks.learned", *flags, f"--stories={config.stories}")
    return json.loads(run(command).lines[-1].text)
