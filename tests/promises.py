"""Promises: tests that count their cases, and that broken versions of the program must fail.

    @pytest.mark.promise(controls=[hash_not_checked])
    def test_a_flipped_bit_is_found(cases: Cases):
        for number in cases(50, 10_000):
            ...

`cases(short, full)` yields the numbers of the cases: a few by default, many with --full, which
`make torture` passes. Each control, here `hash_not_checked`, is a context manager that breaks the
program; the test is run once more inside of it and must then fail. A control that goes unnoticed is
itself a failure; all controls are slow tests. At the end a table says of each promise how often it
was tried.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

Control = Callable[[], AbstractContextManager[object]]


def broken(name: str, owner: Any, attribute: str, value: Any) -> Control:
    """Return a control of this name, which puts `value` in the place of a part of the program."""

    @contextlib.contextmanager
    def control() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, value)
            yield

    control.__name__ = name
    return control


class Cases:
    """Yields the numbers of the cases, and counts those that went well."""

    def __init__(self, is_full: bool, is_control: bool) -> None:
        self.is_full = is_full
        self.is_control = is_control
        self.count = 0

    def __call__(self, short: int, full: int) -> Iterator[int]:
        """Yield the numbers of the cases. A control ends at the first one that notices it."""
        for number in range(self.most(short, full)):
            yield number
            self.count += 1

    def most(self, short: int, full: int) -> int:
        """Return the number of cases, for a test that counts them itself."""
        return full if self.is_full or self.is_control else short

    def until_none_is_left(self) -> Iterator[int]:
        """Yield 1, 2, 3, … for a test that breaks out of the loop when nothing is left to try."""
        for number in itertools.count(1):
            yield number
            self.count += 1


@pytest.fixture
def cases(request: pytest.FixtureRequest, control: Control | None) -> Cases:
    return Cases(bool(request.config.getoption("--full")), control is not None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="try each promise many times")
    parser.addoption("--soak_steps", type=int, help="steps of the long run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("promise")
    if marker is not None:
        slow = [pytest.param(one, marks=pytest.mark.slow) for one in marker.kwargs["controls"]]
        names = ["kept", *(f"control_{name_of(control)}" for control in marker.kwargs["controls"])]
        metafunc.parametrize("control", [None, *slow], ids=names)


def name_of(control: Any) -> str:
    return control.func.__name__ if isinstance(control, functools.partial) else control.__name__


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    cases: Any = pyfuncitem.funcargs.get("cases")
    control: Any = pyfuncitem.funcargs.get("control")
    if cases is None or control is None:
        try:
            return (yield)
        finally:
            if cases is not None:
                pyfuncitem.user_properties.append(("cases", cases.count))
    with control():
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            print(f"noticed: {error!r}")  # to be seen with -rP: is it for the right reason?
            return True
    pytest.fail(f"the program was broken by {name_of(control)}, and nothing noticed it")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each promise: cases, failures, seconds, and what is promised."""
    rows: dict[str, list[float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            counted = dict(report.user_properties).get("cases")
            is_control = "control_" in report.nodeid
            if counted is None and not is_control:
                continue
            name = report.nodeid.rpartition("::")[2].partition("[")[0]
            row = rows.setdefault(name, [0, 0, 0, 0])
            row[0] += counted or 0
            row[1] += is_control and outcome == "passed"
            row[2] += outcome == "failed"
            row[3] += report.duration
    if not rows:
        return
    terminalreporter.section("promises")
    terminalreporter.line("   cases  controls  failures  seconds")
    for name, (n_cases, controls, failures, seconds) in sorted(rows.items()):
        words = name.removeprefix("test_").replace("_", " ")
        numbers = f"{n_cases:8,.0f}{controls:10.0f}{failures:10.0f}{seconds:9.1f}"
        terminalreporter.line(f"{numbers}  {words}")
