"""Save and restore a run: a checkpoint is there whole, or not at all.

    out/run/checkpoints.json                      what is saved, with size and SHA-256
    out/run/step_00002000_1f3a9c04.pt             model, optimizers, step, config, tokenizer
    out/run/step_00002000_5b7e0d12.shares         model and optimizers of a shared run (shares.py)

A new file never overwrites an old one. Once it is safely on the disk, the record that names it is
renamed into place, and then files that the record no longer names are removed. A process killed at
any moment thus leaves the previous checkpoint or the new one. The hash is needed because
torch.load reads flipped bits without complaint.
"""

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import files
from engine import shares

FORMAT = 2  # raised when the meaning of a field changes
RECORD = "checkpoints.json"
PREVIOUS = "previous"  # the name of what was "last" before; to go on from if that is damaged
Record = dict[str, dict[str, Any]]  # name -> step, file, sha256, bytes, shares or None


def save(
    out_dir: Path, state: dict[str, Any], names: list[str], its_shares: dict[str, Any] | None = None
) -> None:
    """Write `state`, which has a step, under the names "last", "best" or "step_500".

    The model of a shared run is in `its_shares`, which were written before: a folder, and the
    SHA-256 of each file in it. A checkpoint that has no name any more is removed. Raises OSError if
    the new one cannot be written; what was saved before then stays.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    before = _read_record(out_dir)
    try:
        entry = _write(out_dir, state) | {"shares": its_shares}
        files.sync_folder(out_dir)  # first the name of the file, then that of the record
        after = before | dict.fromkeys(names, entry)
        if "last" in names and "last" in before and before["last"]["step"] < entry["step"]:
            after[PREVIOUS] = before["last"]
        files.write_text(out_dir / RECORD, json.dumps(after, indent=2))
        files.sync_folder(out_dir)
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk
        _sweep(out_dir, before, _read_record(out_dir))
        raise OSError(not_written(state["step"], out_dir, error)) from error
    _sweep(out_dir, after)


def not_written(step: int, out_dir: Path, error: Exception) -> str:
    """Return the sentence about a checkpoint that could not be written."""
    return (
        f"the checkpoint of step {step} could not be written to {out_dir}, is the "
        f"disk full? ({' '.join(str(error).split())[:120]}); what was saved before it is "
        "untouched: make room, and go on with --resume if there is a checkpoint"
    )


def _write(out_dir: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint under a name of its own; return its entry for the record."""
    partial = out_dir / "checkpoint.partial"
    with open(partial, "wb") as file:
        torch.save({**state, "format": FORMAT}, file)
        files.sync(file)
    digest = files.sha256(partial)
    size = partial.stat().st_size
    path = partial.replace(out_dir / f"step_{state['step']:08d}_{digest[:8]}.pt")
    return {"step": state["step"], "file": path.name, "sha256": digest, "bytes": size}


def _sweep(out_dir: Path, *records: Record) -> None:
    """Remove what no record names, and what killed processes left."""
    entries = [entry for record in records for entry in record.values()]
    kept = {entry["file"] for entry in entries}
    kept |= {entry["shares"]["folder"] for entry in entries if entry["shares"]}
    patterns = ("step_*.pt", "step_*.shares", "checkpoint*.partial")
    for path in itertools.chain(*map(out_dir.glob, patterns)):
        try:
            if path.name not in kept:
                files.remove(path)
        except OSError as error:  # it only takes up room
            print(f"{path} could not be removed ({error.strerror})", file=sys.stderr)


def history(out_dir: Path) -> list[str]:
    """Return the name of a checkpoint for every saved step, in the order of the steps."""
    record = _read_record(out_dir)
    by_step = {record[name]["step"]: name for name in record if name != PREVIOUS}
    return [by_step[step] for step in sorted(by_step)]


def load(out_dir: Path, name: str) -> dict[str, Any]:
    """Read the checkpoint called `name` ("last", "best" or another) after comparing its hashes.

    Of a checkpoint in shares it returns the weights, but no optimizers. Raises FileNotFoundError if
    there is none, ValueError if it is damaged or holds code.
    """
    state = read(out_dir, name)
    if "shares" in state:
        with files.readable(state["shares"]):
            state["model"] = shares.read_weights(state.pop("shares"))
    return state


def read(out_dir: Path, name: str, rank: int = 0, n_ranks: int = 1) -> dict[str, Any]:
    """Read a checkpoint as `load` does, but of one in shares return the folder alone.

    Each of `n_ranks` processes compares the hashes of some of the shares.
    """
    record = _read_record(out_dir)
    if not record:
        raise FileNotFoundError(
            f"{out_dir} holds no checkpoint: train one with `python train.py CONFIG "
            f"--out_dir={out_dir}`, or pass the folder of another run"
        )
    if name not in record:
        raise ValueError(f"{out_dir} has no {name} checkpoint, only: {', '.join(record)}")
    path = out_dir / record[name]["file"]
    others = [other for other, entry in record.items() if entry["file"] != path.name]
    found = f"; there is also the {others[0]} checkpoint" if others else ""
    way_out = "; --auto_resume goes on from the one before" if others == [PREVIOUS] else found
    if not path.exists():
        raise FileNotFoundError(f"{path}, the {name} checkpoint, is missing{way_out}")
    if files.sha256(path) != record[name]["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {RECORD}{way_out}")
    state = _unpickle(path)
    its_shares = record[name]["shares"]
    if its_shares:
        state["shares"] = out_dir / its_shares["folder"]
        for file, sha256 in sorted(its_shares["sha256"].items())[rank::n_ranks]:
            share = state["shares"] / file
            if not share.exists() or files.sha256(share) != sha256:
                raise ValueError(f"{share} is missing or damaged{way_out}")
    return state


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        files.check_zip(path)
        with warnings.catch_warnings(action="ignore"):  # the sentence below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a made-up file can fail in any way
        raise ValueError(
            f"{path} is refused: it must hold tensors and plain values only, never code"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found not in (1, FORMAT):
        raise ValueError(f"{path} has format {found}; this code reads formats 1 and {FORMAT}")
    if found == 1:  # it stored a choice of kernel, which each run now makes anew
        del state["model_config"]["attention"]
    return state


def newest_first(out_dir: Path) -> list[str]:
    """Return the names of the checkpoints that a run can go on from."""
    record = _read_record(out_dir)
    names = [name for name in ("last", PREVIOUS, "best") if name in record]
    return sorted(names, key=lambda name: -record[name]["step"])


def go_on_from(out_dir: Path, name: str) -> None:
    """Let the checkpoint called `name` be the last one, because the one that was is damaged."""
    record = _read_record(out_dir)
    if record["last"] != record[name]:
        record["last"] = record[name]
        files.write_text(out_dir / RECORD, json.dumps(record, indent=2))


def has_last(out_dir: Path) -> bool:
    """Return whether there is a checkpoint to go on from."""
    return "last" in _read_record(out_dir)


def _read_record(out_dir: Path) -> Record:
    path = out_dir / RECORD
    if not path.exists():
        return {}
    with files.readable(path):
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(found) for name, found in record.items()}


def _entry(found: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the record. Raises an error if it names what is not in the folder."""
    its_shares = found.get("shares")
    for name in (its_shares["folder"], *its_shares["sha256"].keys()) if its_shares else ():
        files.plain_name(name)
    named = {"file": files.plain_name(found["file"]), "step": int(found["step"])}
    return named | {"sha256": found["sha256"], "bytes": found["bytes"], "shares": its_shares}
