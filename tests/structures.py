"""Edits JSON and TOML as a program or a person might, and says what came of reading it.

Hypothesis chooses the edits: it knows odd values of each type, and makes what fails small. The form
stays whole, so that an edit goes further into the program than a flipped bit does (damage.py).
"""

import copy
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import cli
from damage import EDGES, check_read
from promises import Cases

# The last is half of a character, as JSON may hold it
ODD_TEXTS = ["", "..", "/", "../x", "a/b", "\0", "0", "cpu", "\ud800"]


class Object(list[Any]):
    """A JSON object as a list of [key, value]: a key may be there twice."""


TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(ODD_TEXTS)
FEW_LETTERS = st.text("abc \n", max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
LEAF |= st.sampled_from(EDGES)
VALUE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT, inner, max_size=3).map(
            lambda found: Object(map(list, found.items()))
        )
    ),
    max_leaves=5,
)
CHANGES = st.sampled_from(["replace", "rename", "remove", "repeat", "move"])


def drawn(
    cases: Cases, short: int, full: int, values: st.SearchStrategy[Any], check: Callable[[Any], Any]
) -> None:
    """Check so many values, the same ones each time, and count them."""
    phases = [Phase.generate] if cases.is_control else [Phase.generate, Phase.shrink]

    @settings(
        max_examples=cases.most(short, full),
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(values)
    def check_and_count(value: Any) -> None:
        check(value)
        cases.count += 1

    check_and_count()


def places(value: Any) -> list[tuple[list[Any], int]]:
    """Return every place in a JSON value, as a list and an index."""
    if not isinstance(value, list):
        return []
    found: list[tuple[list[Any], int]] = []
    for i, item in enumerate(value):
        found.append((value, i))
        found += places(item[1] if isinstance(value, Object) else item)
    return found


@st.composite
def edited(draw: st.DrawFn, text: str) -> Any:
    """Return a JSON document of which one to three places were changed."""
    document = json.loads(text, object_pairs_hook=lambda found: Object(map(list, found)))
    for _ in range(draw(st.integers(1, 3))):
        there = places(document)
        if not there:
            break
        within, i = there[draw(st.integers(0, len(there) - 1))]
        other, j = there[draw(st.integers(0, len(there) - 1))]
        from_elsewhere = copy.deepcopy(other[j][1] if isinstance(other, Object) else other[j])
        key, value = within[i] if isinstance(within, Object) else (None, None)
        match draw(CHANGES):
            case "replace":
                value = draw(VALUE | st.just(from_elsewhere))
                within[i] = value if key is None else [key, value]
            case "rename" if key is not None:
                within[i] = [draw(TEXT), value]
            case "remove":
                del within[i]
            case "repeat":
                again = draw(VALUE)
                within.insert(i, again if key is None else [key, again])
            case _:
                within.append(within.pop(i))
    return document


def as_json(value: Any) -> str:
    """`json.dumps`, with objects that may have a key twice."""
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {as_json(v)}" for key, v in value) + "}"
    return f"[{', '.join(map(as_json, value))}]" if isinstance(value, list) else json.dumps(value)


def as_lines(value: Any) -> str:
    """Return a list as JSON, one line each."""
    return "".join(f"{as_json(line)}\n" for line in value)


def as_toml(value: Any, is_inside: bool = False) -> str:
    if isinstance(value, Object):
        lines = [f"{json.dumps(key)} = {as_toml(v, True)}" for key, v in value]
        return "{" + ", ".join(lines) + "}" if is_inside else "\n".join(lines)
    if isinstance(value, list):
        return f"[{', '.join(as_toml(item, True) for item in value)}]"
    return cli.to_toml(value)


def survive_edits(
    cases: Cases, short: int, full: int, paths: list[Path], read: Callable[[], Any]
) -> None:
    """Edit each file, so many times: `read` must refuse it in words, or return what it should."""
    for path in paths:
        data = path.read_bytes()
        text, write = form(path.name, data)

        def check(document: Any, path: Path = path, write: Any = write) -> None:
            path.write_bytes(write(document))
            check_read(read, f"{path.name} as {path.read_bytes()[:2000]}")

        read()  # what was not edited is not refused
        try:
            drawn(cases, short, full, edited(text), check)
        finally:
            path.write_bytes(data)


def form(name: str, data: bytes) -> tuple[str, Callable[[Any], bytes]]:
    """Return a file's content as JSON, and what writes such content again."""
    match Path(name).suffix:
        case ".jsonl":
            return f"[{','.join(data.decode().splitlines())}]", lambda found: as_lines(
                found
            ).encode()
        case ".toml":
            table = json.dumps(tomllib.loads(data.decode()))
            return table, lambda found: as_toml(found).encode(errors="surrogatepass")
        case ".safetensors":  # a length of 8 bytes, a header in JSON, the numbers
            end = 8 + int.from_bytes(data[:8], "little")

            def write(found: Any) -> bytes:
                header = as_json(found).encode()
                return len(header).to_bytes(8, "little") + header + data[end:]

            return data[8:end].decode(), write
    return data.decode(), lambda found: as_json(found).encode()
