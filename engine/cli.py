"""Command lines: a typed config from defaults, a TOML file and flags; errors in a sentence.

    python train.py config/quickstart.toml --model.n_layer=4

Later sources win: defaults < TOML file < command line. The file is turned into flags and
goes through the same strict parser as the command line, so a misspelled key or a value of
the wrong type is an error in either one, never a line that is silently ignored. The file must
be a valid config by itself.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

Positional = tyro.conf.Positional
ConfigT = TypeVar("ConfigT")
USER_ERROR = 2  # exit code: the run was refused, and a sentence says why


def run(main: Callable[[], None]) -> None:
    """Call `main`; end in one sentence on stderr where the user can mend what went wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # any text may be printed
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
        if not getattr(config, name) >= least:  # nor is nan
            raise ValueError(f"{name} must be at least {least}: got {getattr(config, name)}")


def parse_config(config_type: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Return the config that `argv` describes; raise ValueError with a sentence if it is none."""
    args = list(sys.argv[1:] if argv is None else argv)
    default = None
    if args and args[0].endswith(".toml") and not args[0].startswith("-"):
        path = args.pop(0)
        table = read_toml(path)
        default = _parse(config_type, list(_flags(table)), None, prog=path)
        _check_types(table, default, path)
    args = _gathered(_bare_switches_are_true(args, config_type), config_type)
    return _parse(config_type, args, default, prog=Path(sys.argv[0]).name)


def _check_types(table: dict[str, Any], config: Any, path: str) -> None:
    """Refuse `max_steps = "30"`, which as a flag would do."""
    spelled = {bool: bool, int: int, float: (int, float), tuple: list}  # the others are texts
    for key, value in table.items():
        parsed = getattr(config, key)
        if isinstance(value, dict):
            _check_types(value, parsed, path)
            continue
        fits = isinstance(value, spelled.get(type(parsed), str))
        if not fits or isinstance(value, bool) != isinstance(parsed, bool):
            raise ValueError(f"{path}: {key} has a value of the wrong type: got {value!r}")


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
                tables[table].append(f"{key} = {_toml(value)}")

    add(dataclasses.asdict(config), "")
    blocks = ([f"[{name}]"] * bool(name) + lines for name, lines in tables.items() if lines)
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _toml(value: Any) -> str:
    """JSON is TOML, but for infinity: `(inf, 1)` -> `[inf, 1]`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


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
        # our own errors come as "Error parsing TrainConfig: ..."
        message = re.sub(r"^Error parsing \w+: ", "", _unboxed(shown.getvalue()))
        raise ValueError(f"{prog}: {message}{_nearest(message, config_type)}") from None


def _unboxed(text: str) -> str:
    """tyro's error box -> its first section, `Unrecognized options: --sed=1`."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    sections = re.split(r"^[│╭╰ ]*(?:─|---).*$", plain, flags=re.MULTILINE)
    return " ".join(sections[1].replace("│", " ").split())


def _nearest(message: str, config_type: type) -> str:
    """`Unrecognized options: --sed=1` -> `; perhaps you meant --seed`."""
    unknown = re.match(r"Unrecognized options: --([\w.]+)", message)
    names = [name for name, _ in _fields(config_type)]
    without_table = {name.rpartition(".")[2]: name for name in reversed(names)}
    meant = without_table | {name: name for name in names}
    found = difflib.get_close_matches(unknown[1], meant, n=1) if unknown else []
    return f"; perhaps you meant --{meant[found[0]]}" if found else ""


def _fields(config_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("seed", int)`, `("model.n_layer", int)` and so on."""
    for field in dataclasses.fields(config_type):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


def _bare_switches_are_true(args: list[str], config_type: type) -> list[str]:
    """`--resume --seed 1` -> `--resume=True --seed 1`."""
    switches = {f"--{name}" for name, kind in _fields(config_type) if kind is bool}
    followed_by = [*args[1:], "--"][: len(args)]
    return [
        f"{arg}=True" if arg in switches and after.startswith("--") else arg
        for arg, after in zip(args, followed_by, strict=True)
    ]


def _gathered(args: list[str], config_type: type) -> list[str]:
    """`--stop a --seed=1 --stop=b` -> `--seed=1 --stop a b`: neither value is lost."""
    lists = {f"--{name}" for name, kind in _fields(config_type) if get_args(kind)[1:] == (...,)}
    given = [arg.partition("=")[0] for arg in args]
    for flag in (flag for flag in lists if given.count(flag) > 1):
        parts, is_value = {False: list[str](), True: [flag]}, False
        for arg in args:
            is_value = arg.partition("=")[0] == flag or (is_value and not arg.startswith("--"))
            parts[is_value] += [] if arg == flag else [arg.removeprefix(f"{flag}=")]
        args = parts[False] + parts[True]
    return args


def _flags(table: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """Yield the command-line flags that say what `table` says."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from (f"{prefix}{key}", *map(str, value))
        else:
            yield f"{prefix}{key}={value}"
