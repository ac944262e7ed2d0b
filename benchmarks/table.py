"""Rows of results, as markdown tables and as records in one JSON file."""

import json
import statistics
from pathlib import Path
from typing import Any

from engine.files import write_whole

Value = str | float | None
Row = dict[str, Value]
Tables = dict[str, list[Row]]  # by what they show, such as "runs" and "summary"

RESULTS = Path("docs/results.json")
MISSING = "–"


def markdown(rows: list[Row]) -> str:
    """[{"run": "a", "loss": 1.5}] -> `| run | loss |`, a ruler, `| a | 1.5000 |`."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {c for c in columns if any(isinstance(row.get(c), int | float) for row in rows)}
    lines = [
        columns,
        ["---:" if column in numeric else "---" for column in columns],
        *([cell(row.get(column)) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Value) -> str:
    """1234567 -> `1,234,567`, 61.25 -> `61.2`, 1.898 -> `1.8980`, None -> `–`."""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.4f}"


def medians(rows: list[Row]) -> Row:
    """The median of each column of numbers; of texts, the one that all rows share."""
    result: Row = {}
    for column in rows[0]:
        values = [row[column] for row in rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) == len(values):
            result[column] = statistics.median(numbers)
        elif len(set(values)) == 1:
            result[column] = values[0]
    return result


def ratio(theirs: Value, ours: Value) -> str | None:
    """How many times less ours is: (100, 10) -> `10.0 ×`."""
    if isinstance(theirs, int | float) and isinstance(ours, int | float) and ours:
        return f"{theirs / ours:.2f} ×"
    return None


def report(record: dict[str, Any]) -> str:
    """A record as a page of markdown: what was run, where and when, and its tables."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value)
    head = f"### {record['benchmark']}, {record['date']}\n\n`{record['command']}`\n\n{machine}"
    tables = (f"{name}:\n\n{markdown(rows)}" for name, rows in record["tables"].items() if rows)
    return "\n\n".join([head, *tables])


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none if it is not there. Raises ValueError if damaged."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records")
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file, which has either the old records or these and the new one."""
    write(path, [*read(path), record])


def write(path: Path, value: Any) -> None:
    """Put JSON in place of what a file holds, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
