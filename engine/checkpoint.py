"""Save and restore a run: a checkpoint is there whole, or not at all.

    out/run/checkpoints.json                      what is saved, with size and SHA-256
    out/run/step_00002000_1f3a9c04.pt             model, optimizers, step, config, tokenizer

A new file never overwrites an old one. The record in checkpoints.json is renamed into place
when the file that it names is safely on disk, and only then are forgotten files removed, so a
process that is killed at any moment leaves the checkpoint before or the checkpoint after.
The hash is needed because torch.load reads flipped bits without complaint.
"""

import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # raise this when the meaning of a field changes
RECORD = "checkpoints.json"


def save(out_dir: Path, state: dict[str, Any], names: list[str]) -> None:
    """Write `state`, which has a step, and let `names` ("last", "best", "step_500") point to it.

    What no name points to any more is removed. Raises OSError if it cannot be written; what was
    saved before stays.
    """
    if "last" not in names:  # the only one to go on from, so that no other needs the optimizers
        state = {key: value for key, value in state.items() if key != "optimizers"}
    out_dir.mkdir(parents=True, exist_ok=True)
    partial = out_dir / "checkpoint.partial"
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            _sync(file)
        digest = _sha256(partial)
        path = out_dir / f"step_{state['step']:08d}_{digest[:8]}.pt"
        entry = {"step": state["step"], "file": path.name, "sha256": digest}
        entry["bytes"] = partial.stat().st_size
        partial.replace(path)
        record = _read_record(out_dir) | dict.fromkeys(names, entry)
        _write(out_dir / RECORD, json.dumps(record, indent=2))
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk
        _sweep(out_dir)
        raise OSError(
            f"the checkpoint of step {state['step']} could not be written to {out_dir}, is the "
            f"disk full? ({' '.join(str(error).split())[:120]}); what was saved before it is "
            "untouched: make room, and go on with --resume if there is a checkpoint"
        ) from error
    _sweep(out_dir)


def has_checkpoint(out_dir: Path) -> bool:
    return (out_dir / RECORD).exists()


def open_folder(out_dir: Path, config: str, resume: bool) -> None:
    """Make the run's folder and put its config there; a new run sets an older one aside."""
    if not out_dir.name:
        raise ValueError(f"out_dir must have a name, such as out/run: got {out_dir}")
    if has_checkpoint(out_dir) and not resume:
        names = (f"{out_dir.name}_{number}" for number in itertools.count(1))
        aside = next(path for name in names if not (path := out_dir.with_name(name)).exists())
        out_dir.rename(aside)
        print(f"{out_dir} held another run, which is now in {aside}")
    out_dir.mkdir(parents=True, exist_ok=True)
    _write(out_dir / "config.toml", config)


def history(out_dir: Path) -> list[str]:
    """Names of all that is saved, in the order of their steps; of one step, one name."""
    record = _read_record(out_dir)
    by_step = {record[name]["step"]: name for name in record}
    return [by_step[step] for step in sorted(by_step)]


def load(out_dir: Path, name: str) -> dict[str, Any]:
    """Read the checkpoint called `name` ("last" or "best") after comparing its hash.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or holds code.
    """
    if not has_checkpoint(out_dir):
        raise FileNotFoundError(
            f"{out_dir} holds no checkpoint: train one with `python train.py CONFIG "
            f"--out_dir={out_dir}`, or pass the folder of another run"
        )
    record = _read_record(out_dir)
    if name not in record:
        raise ValueError(f"{out_dir} has no {name} checkpoint, only: {', '.join(record)}")
    path = out_dir / record[name]["file"]
    if not path.exists():
        raise FileNotFoundError(f"{path}, the {name} checkpoint, is missing{_others(record, name)}")
    found, expected = path.stat().st_size, record[name]["bytes"]
    if found != expected or _sha256(path) != record[name]["sha256"]:
        raise ValueError(
            f"{path} is damaged: {found} bytes of {expected}, or another SHA-256 than in "
            f"{RECORD}{_others(record, name)}"
        )
    return _unpickle(path)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # the sentence below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a made-up file can fail in any way
        raise ValueError(
            f"{path} is refused: it must hold tensors and plain values only, never code"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this code reads format {FORMAT}")
    return state


def _others(record: dict[str, Any], name: str) -> str:
    path = record[name]["file"]
    others = [other for other in record if record[other]["file"] != path]
    return f"; there is also the {others[0]} checkpoint" if others else ""


def _read_record(out_dir: Path) -> dict[str, Any]:
    path = out_dir / RECORD
    if not path.exists():
        return {}
    fields = ("step", "file", "sha256", "bytes")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: {field: entry[field] for field in fields} for name, entry in record.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _write(path: Path, text: str) -> None:
    """Put `text` into a file that has the old text or the new one, whenever power fails."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the renames so far, in their order
    os.close(folder)


def _sweep(out_dir: Path) -> None:
    """Remove what the record no longer names, and what killed processes left."""
    kept = {entry["file"] for entry in _read_record(out_dir).values()}
    for path in [*out_dir.glob("step_*.pt"), *out_dir.glob("*.partial")]:
        if path.name not in kept:
            path.unlink()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
