"""Rows of results, as markdown tables and as records in one JSON file."""

import json
import os
import platform
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
from cli import at_least

Row = dict[str, Any]  # by column: a text, a number, or None for what was not measured
Tables = dict[str, list[Row]]  # by what they show, such as "runs" and "summary"

RESULTS = Path("docs/results.json")
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go besides the screen."""

    json: Path | None = None
    """File to add the record to, such as docs/results.json."""


@dataclass(frozen=True, kw_only=True)
class Repeated(Output):
    """A measurement that is repeated."""

    repeats: int = 3
    """Number of rounds; each has its own seed."""

    def __post_init__(self) -> None:
        at_least(1, self, "repeats")


def markdown(rows: list[Row]) -> str:
    """[{"run": "a", "loss": 1.5}] -> `| run | loss |`, a ruler, `| a | 1.5000 |`."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """1234567 -> `1,234,567`, 61.25 -> `61.2`, 1.898 -> `1.8980`, None -> `–`."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def medians(rows: list[Row]) -> Row:
    """Return the median of each column of numbers; of texts, the one that all rows share."""
    result: Row = {}
    for column, first in rows[0].items():
        values = {row[column] for row in rows}
        if isinstance(first, int | float):
            result[column] = statistics.median(row[column] for row in rows)
        elif len(values) == 1:
            result[column] = first
    return result


def report(record: dict[str, Any]) -> str:
    """Return a record as a page of markdown: what was run, where and when, and its tables."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value)
    head = [f"### {record['benchmark']}, {record['date']}", f"`{record['command']}`", machine]
    tables = [f"{name}:\n\n{markdown(rows)}" for name, rows in record["tables"].items() if rows]
    return "\n\n".join(head + tables)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add(path: Path, record: dict[str, Any]) -> None:
    """Add a record to those of a file."""
    text = json.dumps([*read(path), record], indent=2, ensure_ascii=False)
    files.write_text(path, text + "\n")


def describe_machine() -> dict[str, Any]:
    """Return all about this machine that a number depends on."""
    import torch  # not before the measurement: see Finished.peak_bytes

    cpu_info = Path("/proc/cpuinfo")  # on Linux
    text = cpu_info.read_text(encoding="utf-8") if cpu_info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return {
        "CPU": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
    }


def commit(folder: Path) -> str:
    """Return the commit of a folder, with a + if files were changed; `unknown` without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL)
        return found.decode().strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without git, or no git at all
        return "unknown"
