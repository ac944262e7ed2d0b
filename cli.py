"""Command lines, parsed by tyro: a typed config from defaults, a TOML file and flags.

    python train.py config/quickstart.toml --model.n_layer=4

Later sources win: defaults < TOML file < command line. The file must be a valid config by itself.
It is turned into flags, so that a misspelt key in it is refused as a misspelt flag is.
"""

import atexit
import contextlib
import dataclasses
import gc
import io
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

Positional = tyro.conf.Positional
ConfigT = TypeVar("ConfigT")
USER_ERROR = 2  # exit code: the run was refused, and a message says why


def run(main: Callable[[], None]) -> None:
    """Call `main`; print one sentence, not a traceback, for errors that the user can fix."""
    atexit.register(gc.freeze)  # else Python searches torch's objects for garbage as it ends: 0.5 s
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))  # it was closed
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # any text may be printed
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells count
    except (ValueError, ArithmeticError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # as torch says it
            raise
        with contextlib.suppress(OSError):  # there may be no room for it either
            print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(USER_ERROR)


def sentence(error: Exception) -> str:
    """`[Errno 2] No such file or directory: 'a.txt'` -> `a.txt: No such file or directory`."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def at_least(least: float, config: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields of `config` that is below `least`."""
    for name in names:
        if not getattr(config, name) >= least:  # or nan
            raise ValueError(f"{name} must be at least {least}: got {getattr(config, name)}")


def parse_config(config_type: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Return the config that `argv` describes. Raises SystemExit or ValueError if it is none."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0].startswith("-") or not args[0].endswith(".toml"):
        return tyro.cli(config_type, args=args, use_underscores=True)
    path = args.pop(0)
    table = read_toml(path)
    try:
        config = tyro.cli(config_type, args=list(_flags(table)), prog=path, use_underscores=True)
    except SystemExit:
        raise ValueError(f"{path} is not a valid config, as said above") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a config") from None
    _check(table, config, path)
    return tyro.cli(config_type, args=args, default=config, use_underscores=True)


def _flags(table: dict[str, Any]) -> Iterator[str]:
    """{"model": {"n_layer": 4, "tie": False}} -> `--model.n_layer=4`, `--model.no-tie`."""
    for key, value in _flat(table):
        before, dot, name = key.rpartition(".")
        if isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        elif isinstance(value, bool):
            yield f"--{key}" if value else f"--{before}{dot}no-{name}"
        else:
            yield f"--{key}={value}"


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"model": {"n_layer": 4}} -> ("model.n_layer", 4)."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check(table: dict[str, Any], config: Any, path: str) -> None:
    """Refuse what is valid only as a flag: `max-steps = 30`, `max_steps = "30"`."""
    spelled = {bool: bool, int: int, float: (int, float), tuple: list}  # all others are texts
    for key, value in table.items():
        found = vars(config).get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(found):
            _check(value, found, path)
        elif found is None or not isinstance(value, spelled.get(type(found), str)):
            raise ValueError(f"{path}: no field {key} takes {value!r}: check its name and type")


def read_toml(path: str) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError that names it if it is not one."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def dump_config(config: Any) -> str:
    """Return TOML that `parse_config` reads back to an equal config; `None` is left out."""
    values = _flat(dataclasses.asdict(config))
    return "".join(f"{key} = {to_toml(value)}\n" for key, value in values if value is not None)


def to_toml(value: Any) -> str:
    """JSON is TOML but for infinity: `(inf, 1)` -> `[inf, 1]`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    is_number = isinstance(value, float)
    return repr(value) if is_number else json.dumps(value, ensure_ascii=False, default=str)
