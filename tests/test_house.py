"""The rules of the house, which the README promises to its readers."""

import ast
import functools
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import parse_config
from train import TrainConfig

ROOT = Path(__file__).parents[1]
LEAVES = {"files", "cli"}  # which every room may import
FOLDERS = ("data", "engine", "sampling", "viewer", "exchange", "benchmarks")  # rooms
SCRIPTS = {"train", "sample", "visualize", "convert", "bench", "data.prepare"}  # it is in a room
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in ROOT.glob(f"{name}/*.py"))]
}
ROOMS = FILES.keys() - {"train", "sample", "visualize", "convert", "bench"}
LIBRARIES = {  # what a room may import besides torch, numpy and the standard library
    "benchmarks.peers": {"transformers"},
    "benchmarks.preparation": {"tiktoken"},
    "data.bpe": {"regex"},
    "data.download": {"requests"},
    "data.hub": {"requests"},
    "data.parquet": {"pyarrow"},
    "data.progress": {"tqdm"},
    "data.hub_tokenizer": {"tokenizers"},
    "data.tokenizer": {"tiktoken"},
    "cli": {"tyro"},
    "engine.metrics": {"tqdm"},
    "engine.report": {"matplotlib"},
    "engine.wandb_run": {"requests", "wandb"},
    "exchange.gguf_file": {"gguf"},
    "exchange.hub_folder": {"safetensors"},
    "viewer.page": {"rjsmin"},
    "viewer.record": {"tqdm"},
}
KNOWS = {  # data and the model know no other room
    "engine": {"model"},
    "sampling": {"data", "engine", "model"},
    "viewer": {"data", "engine", "model", "sampling"},
    "exchange": {"data", "model"},
    "benchmarks": {"data", "engine", "exchange", "model", "sampling", "viewer"},
}
BUDGETS = {"model": 330, "train": 250, "sample": 200, "cli": 134}  # lines; others have 200
MOST_LINES = 10883  # without the exchange with other projects
MOST_LINES_OF_EXCHANGE = 1005  # with convert.py
MOST_LINES_OF_BENCHMARKS = 1700
MOST_LINES_OF_A_ROOM = 2850
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """Every module that a file imports, anywhere in it, as written: `engine.shard`."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def depth(node: ast.AST, is_elif: bool = False) -> int:
    """Nested blocks in `node`; an elif is as deep as its if."""
    below = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        below = max(below, depth(child, chained))
    return below + (isinstance(node, BLOCKS) and not is_elif)


def room_of(name: str) -> str:
    """`sampling.choose` -> sampling, `model` -> model."""
    return name.partition(".")[0]


def lines_of(*names: str) -> int:
    return sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in names)


def statements(name: str, kind: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree(name)) if isinstance(node, kind))


@pytest.mark.parametrize("name", sorted(ROOMS - SCRIPTS))
def test_a_room_imports_no_script_and_only_the_rooms_that_it_is_made_from(name: str) -> None:
    assert not imports(name) & SCRIPTS
    known = {*LEAVES, room_of(name)} | KNOWS.get(room_of(name), set())
    others = {*FOLDERS, "model"} - known
    assert not {room_of(module) for module in imports(name)} & others


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_imports_its_own_library_and_no_other(name: str) -> None:
    allowed = {"torch", "numpy", "model", *LEAVES, *FOLDERS} | sys.stdlib_module_names
    allowed |= LIBRARIES.get(name, set())
    assert {room_of(module) for module in imports(name)} <= allowed


@pytest.mark.parametrize(("name", "libraries"), [("files", set()), ("cli", {"tyro"})])
def test_a_leaf_imports_no_room(name: str, libraries: set[str]) -> None:
    assert {room_of(module) for module in imports(name)} <= sys.stdlib_module_names | libraries


def test_the_model_imports_torch_only() -> None:
    outside = {room_of(module) for module in imports("model")} - sys.stdlib_module_names
    assert outside == {"torch"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_keeps_its_budget_of_lines(name: str) -> None:
    assert lines_of(name) <= BUDGETS.get(name, 200)


def test_all_code_keeps_its_budget_and_so_does_each_room() -> None:
    sizes = {room: lines_of(*(n for n in FILES if room_of(n) == room)) for room in FOLDERS}
    exchange = sizes["exchange"] + lines_of("convert")
    assert lines_of(*FILES) - exchange <= MOST_LINES
    assert exchange <= MOST_LINES_OF_EXCHANGE
    assert sizes["benchmarks"] + lines_of("bench") <= MOST_LINES_OF_BENCHMARKS
    assert max(sizes.values()) <= MOST_LINES_OF_A_ROOM


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_function_is_over_40_lines_or_3_blocks_deep(name: str) -> None:
    long = {function.name: length(function) for function in functions(name)}
    deep = {function.name: depth(function) for function in functions(name)}
    assert {name: n for name, n in long.items() if n > 40} == {}
    assert {name: n for name, n in deep.items() if n > 3} == {}


def test_the_median_function_is_under_12_lines() -> None:
    lengths = [length(function) for name in FILES for function in functions(name)]
    assert statistics.median(lengths) < 12


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_guessed(name: str) -> None:
    """No exec, no bare except, no getattr with a default, no mutable globals."""
    assert not list(statements(name, ast.Global))
    assert not [node for node in statements(name, ast.ExceptHandler) if node.type is None]  # type: ignore[attr-defined]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in {"exec", "eval"}
            assert not (called == "getattr" and len(node.args) == 3)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_line_is_squeezed(name: str) -> None:
    """One statement a line; no tuple assignment of constants, or of more than three values."""
    found = [node for node in ast.walk(tree(name)) if isinstance(node, ast.stmt)]
    lines = [node.lineno for node in found if ast.unparse(node) != "..."]  # a Protocol's body
    assert len(lines) == len(set(lines))
    for node in found:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if isinstance(node.targets[0], ast.Tuple):
            values = node.value.elts
            assert len(values) <= 3, node.lineno
            assert not any(isinstance(value, ast.Constant) for value in values), node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.name)
def test_a_config_is_valid_and_says_its_loss(path: Path) -> None:
    parse_config(TrainConfig, [str(path)])
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "oss" in header  # the expected loss, or that it is not yet measured


def test_the_pinned_requirements_lie_in_the_ranges_that_are_supported() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    supported = {range.name: range.specifier for range in ranges}
    lines = [*(ROOT / "requirements.txt").open(), *(ROOT / "requirements-dev.txt").open()]
    pinned = dict(line.strip().split("==") for line in lines if "==" in line)
    assert pinned.keys() == supported.keys()
    assert all(Version(version) in supported[name] for name, version in pinned.items())


def test_the_readme_gives_the_reason_for_each_dependency() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pins = re.findall(r"^(\w+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert [name for name in pins if not re.search(rf"^\| `{name}` \| \w", readme, re.M)] == []


def test_the_files_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"\b(?:config|data|engine|viewer|benchmarks|tests)/\w+\.(?:py|toml)\b", readme)
    )
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
