"""Command lines: a typed config from defaults, a TOML file and flags; errors in a sentence.

    python train.py config/quickstart.toml --model.n_layer=4

Later sources win: defaults < TOML file < command line. The file is turned into flags and
goes through the same strict parser as the command line, so a misspelled key or a value of
the wrong type is an error in either one, never a line that is silently ignored.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

Positional = tyro.conf.Positional
ConfigT = TypeVar("ConfigT")
USER_ERROR = 2  # exit code: the run was refused, and a sentence says why


def run(main: Callable[[], None]) -> None:
    """Call `main`; end in one sentence on stderr where the user can mend what went wrong."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells count
    except (ValueError, ArithmeticError, OSError) as error:
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
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}: got {getattr(config, name)}")


def parse_config(config_type: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Return the config that `argv` describes; raise ValueError with a sentence if it is none."""
    args = list(sys.argv[1:] if argv is None else argv)
    default = None
    if args and args[0].endswith(".toml"):
        path = args.pop(0)
        default = _parse(config_type, list(_flags(read_toml(path))), None, prog=path)
    return _parse(config_type, _bare_flags_are_true(args), default, prog=Path(sys.argv[0]).name)


def read_toml(path: str) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError that names it if it is not one."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def dump_config(config: Any) -> str:
    """Return TOML that `parse_config` reads back to an equal config; `None` is left out."""
    tables: dict[str, list[str]] = {"": []}

    def add(values: dict[str, Any], table: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                name = f"{table}.{key}".lstrip(".")
                tables[name] = []
                add(value, name)
            elif value is not None:  # TOML has no null
                # JSON scalars and arrays are TOML, but for infinity, which TOML spells "inf"
                text = json.dumps(value, ensure_ascii=False, default=str)
                tables[table].append(f"{key} = {text.replace('Infinity', 'inf')}")

    add(dataclasses.asdict(config), "")
    blocks = ([f"[{name}]"] * bool(name) + lines for name, lines in tables.items() if lines)
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _parse(config_type: type[ConfigT], args: list[str], default: Any, prog: str) -> ConfigT:
    """Let tyro parse `args`, and fold the box that it draws around an error into a sentence."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                config_type,
                args=args,
                prog=prog,
                use_underscores=True,  # --model.n_layer, spelled as in the code and the TOML file
                config=(tyro.conf.FlagConversionOff,),  # --compile=False, not --no-compile
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise ValueError(f"{prog}: {_unboxed(shown.getvalue())}") from None


def _unboxed(text: str) -> str:
    """tyro's error box -> `Unrecognized options: --sed=1; perhaps you meant --seed`."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    rules = [i for i, line in enumerate(lines[1:], 1) if line.startswith("──")]
    message = " ".join(lines[1 : rules[0] if rules else None]).strip()
    after = text.partition("Perhaps you meant")[2]
    nearest = re.search(r"--[\w.]+", after.partition("For full helptext")[0])
    return message + (f"; perhaps you meant {nearest[0]}" if nearest else "")


def _bare_flags_are_true(args: list[str]) -> list[str]:
    """`--resume --seed 1` -> `--resume=True --seed 1`."""
    followed_by = [*args[1:], "--"][: len(args)]
    return [
        f"{arg}=True"
        if re.fullmatch(r"--\w[\w.]*", arg) and after.startswith("--") and arg != "--help"
        else arg
        for arg, after in zip(args, followed_by, strict=True)
    ]


def _flags(table: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """Yield the command-line flags that say what `table` says."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from (f"{prefix}{key}", *map(str, value))
        else:
            yield f"{prefix}{key}={value}"
