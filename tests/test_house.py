"""The rules of the house, which the README promises to its readers."""

import ast
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest

from engine.cli import parse_config
from train import TrainConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train", "sample", "visualize", "bench"}
SCRIPTS |= {"data.prepare", "benchmarks.probe", "benchmarks.evaluator", "benchmarks.encoding"}
SCRIPTS |= {"benchmarks.decoding", "benchmarks.learned", "benchmarks.peers"}
FOLDERS = ("data", "engine", "sampling", "viewer", "benchmarks")  # rooms; scripts may live there
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [ROOT / "model.py", *(p for name in FOLDERS for p in ROOT.glob(f"{name}/*.py"))]
}
FILES = {**ROOMS, **{name: ROOT / f"{name.replace('.', '/')}.py" for name in SCRIPTS}}
LIBRARIES = {  # what a room may import besides torch, numpy and the standard library
    "benchmarks.encoding": {"tiktoken"},
    "benchmarks.others": {"transformers"},
    "data.bpe": {"regex"},
    "data.download": {"requests"},
    "data.prepare": {"tqdm"},
    "data.split": {"tqdm"},
    "data.tokenizer": {"tiktoken"},
    "data.gpt2": {"tiktoken"},
    "engine.cli": {"tyro"},
    "engine.metrics": {"tqdm"},
    "engine.report": {"matplotlib"},
    "engine.wandb_run": {"requests", "wandb"},
    "viewer.picture": {"matplotlib"},
}
KNOWS = {  # data, engine and the model know no other room
    "sampling": {"data", "engine", "model"},
    "viewer": {"model"},
    "benchmarks": {"data", "engine", "model", "sampling", "viewer"},
}
BUDGETS = {"model": 460, "train": 250, "sample": 260}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """Every module that a file imports, anywhere in it, as written: `engine.cli`."""
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


@pytest.mark.parametrize("name", sorted(ROOMS.keys() - SCRIPTS))
def test_a_room_imports_no_script(name: str) -> None:
    assert not imports(name) & SCRIPTS


@pytest.mark.parametrize("name", sorted(ROOMS.keys() - SCRIPTS))
def test_a_room_knows_only_the_rooms_that_it_is_made_from(name: str) -> None:
    own = name.partition(".")[0]
    others = {*FOLDERS, "model"} - {own} - KNOWS.get(own, set())
    assert not {module.partition(".")[0] for module in imports(name)} & others


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_imports_its_own_library_and_no_other(name: str) -> None:
    allowed = {"torch", "numpy", "model", *FOLDERS} | sys.stdlib_module_names
    allowed |= LIBRARIES.get(name, set())
    assert {module.partition(".")[0] for module in imports(name)} <= allowed


def test_the_model_imports_torch_only() -> None:
    outside = {module.partition(".")[0] for module in imports("model")} - sys.stdlib_module_names
    assert outside == {"torch"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_keeps_its_budget_of_lines(name: str) -> None:
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGETS.get(name, 200)


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
    """No exec, no bare except, no getattr or get with a default, no mutable globals."""
    for node in ast.walk(tree(name)):
        assert not isinstance(node, ast.Global)
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in {"exec", "eval"}
            assert not (called == "getattr" and len(node.args) == 3)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.name)
def test_a_config_is_valid_and_says_what_it_costs(path: Path) -> None:
    config = parse_config(TrainConfig, [str(path)])
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"{config.max_steps:,} steps" in header
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
