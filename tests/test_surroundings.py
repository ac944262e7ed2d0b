"""What surrounds a run may fail: its disk, dataset, wandb, terminal, scheduler, and its readers.

Whatever fails, a script goes on or ends in one sentence, and what was written before is whole.
"""

import contextlib
import html.parser
import http.server
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import convert
import data.format
import data.prepare
import data.shown
import exchange.hub_folder
import files
import sample
import train
import visualize
from engine import checkpoint, resume, wandb_run
from faults import put
from helpers import (
    REPOSITORY,
    contents,
    finish,
    on_linux,
    outcome,
    run_here,
    signal_handlers_kept,
    start,
    train_here,
    wait_for_lines,
    weights_alone,
    write_dataset,
    write_tiny,
)
from promises import Cases, broken
from test_train import signalled, stopped_here
from test_wandb_run import FakeWandb
from viewer import page

if sys.platform == "linux":
    import resource

pytestmark = on_linux
SCRIPTS = {script.__name__: script for script in (convert, data.prepare, sample, train, visualize)}
SMALL = {"n_layer = 2": "n_layer = 1", "n_head = 2": "n_head = 1", "n_embd = 16": "n_embd = 4"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run whose checkpoints are smaller than the picture of its loss."""
    config = write_tiny(tmp_path_factory.mktemp("tiny"))
    text = config.read_text()
    for large, small in SMALL.items():
        text = text.replace(large, small)
    config.write_text(text)
    return config


@pytest.fixture(scope="module")
def undisturbed(tiny: Path) -> Path:
    train_here(tiny, tiny.parent / "undisturbed/run", "--samples=1")
    return tiny.parent / "undisturbed/run"


@pytest.fixture(scope="module")
def begun(tiny: Path) -> Path:
    """The folder of a run that was stopped after 6 of its 12 steps."""
    with signalled("update", 5, signal.SIGTERM):
        stopped_here(tiny, tiny.parent / "begun/run", "--samples=1")
    return tiny.parent / "begun/run"


def ran(script: str, *flags: object) -> tuple[int, str]:
    """Run a script in this process; return its exit code, and its last line if it failed."""
    error = io.StringIO()
    with signal_handlers_kept(), contextlib.redirect_stderr(error):
        code = run_here(SCRIPTS[script].main, script, *flags)
    return code, error.getvalue().splitlines()[-1] if code == 2 else ""


# --- The disk -------------------------------------------------------------------------------------

JOBS = {  # that write to a disk
    "hub": "convert export --out_dir={run} --to={disk}/hub",
    "texts": "sample --out_dir={run} --precision=float32 --num_samples=9 --output={disk}/a.jsonl",
    "run": "train {config} --samples=1 --resume --out_dir={disk}/run",
    "dataset": "data.prepare {words} --tokenizer=char --out={disk}/dataset",
    "gguf": "convert export --out_dir={run} --to={disk}/model.gguf",
    "page": "visualize --out_dir={run} --text=no --html={disk}/page.html",
}
written_in_place = broken("written_in_place", files, "partial", lambda path: path)
no_sentence = broken("no_sentence", exchange.hub_folder, "SafetensorError", KeyError)


class Jobs:
    """Does jobs on a disk in trouble, and compares what they leave with what they should."""

    def __init__(self, config: Path, begun: Path, run: Path) -> None:
        self.words = {"config": config, "words": config.parent / "words.txt", "run": run}
        self.begun, self.run = begun, run
        self.before_and_after = cache(self._before_and_after)

    def do(self, job: str, disk: Path) -> tuple[int, str]:
        # The kernel that a trial finds faster may round otherwise: texts have log-probabilities
        same_kernel = mock.patch("sampling.precision.is_faster_packed", return_value=False)
        # pytest's own output is a file, with a limit too
        with same_kernel, contextlib.redirect_stdout(io.StringIO()):
            return ran(*JOBS[job].format(disk=disk, **self.words).split())

    def _before_and_after(self, job: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return what is on the disk before a job, and after it if nothing fails."""
        if job == "run":
            return contents(self.begun.parent), contents(self.run.parent)
        disk = self.words["config"].parent / job
        disk.mkdir()
        assert self.do(job, disk) == (0, "")
        new = contents(disk)
        return {} if job == "hub" else dict.fromkeys(new, b"old"), new

    def check(self, job: str, disk: Path, trouble: AbstractContextManager[object]) -> None:
        """Do a job in trouble, look at what it leaves, and do it again if it failed."""
        old, new = self.before_and_after(job)
        put(disk, old)
        with trouble:
            code, error = self.do(job, disk)
        if code != 0:
            assert code == 2
            assert error.startswith("error: ")
            assert str(disk) in error
            found = contents(disk)
            if job == "run":
                assert checkpoint.load(disk / "run", "last")["step"] >= 6
            else:
                assert found.keys() >= old.keys()
                assert all(found[name] in (old.get(name), new[name]) for name in found)
            assert self.do(job, disk) == (0, "")
        assert not list(disk.rglob("*.partial"))
        if job == "run":
            assert outcome(disk / "run") == outcome(self.run)
        else:
            assert contents(disk) == new


@pytest.fixture(scope="module")
def jobs(tiny: Path, begun: Path, undisturbed: Path) -> Jobs:
    return Jobs(tiny, begun, undisturbed)


@contextlib.contextmanager
def limited(n_bytes: int) -> Iterator[None]:
    """Let no file have more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.promise(controls=[written_in_place, no_sentence])
def test_a_file_that_finds_no_room_fails_in_a_sentence_and_leaves_the_old_one(
    cases: Cases, jobs: Jobs, tmp_path: Path
):
    for number in cases(2, 70):
        job = list(JOBS)[number % len(JOBS)]
        sizes = sorted(map(len, jobs.before_and_after(job)[1].values()), reverse=True)
        size = sizes[number // len(JOBS) % len(sizes)]
        part = random.Random(number).uniform(0.5, 1)
        jobs.check(job, tmp_path / "disk", limited(int(size * part)))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk, which only root may")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@contextlib.contextmanager
def filled(disk: Path, n_free: int) -> Iterator[None]:
    """Leave so many bytes of a disk free."""
    space = os.statvfs(disk)
    (disk / "other").write_bytes(bytes(space.f_bavail * space.f_bsize - n_free))
    yield
    (disk / "other").unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@pytest.mark.promise(controls=[written_in_place])
def test_a_disk_that_is_really_full_or_read_only_is_named_and_keeps_what_it_held(
    cases: Cases, jobs: Jobs, disk: Path
):
    for number in cases(2, 70):
        job = list(JOBS)[number % len(JOBS)]
        size = sum(map(len, jobs.before_and_after(job)[1].values()))
        is_full = number // len(JOBS) % 3 < 2
        free = int(size * random.Random(number).uniform(0, 0.9))
        trouble = filled(disk, free) if is_full else read_only(disk)
        jobs.check(job, disk, trouble)


# --- The dataset ----------------------------------------------------------------------------------


def replace_dataset(folder: Path) -> None:
    """Prepare another text of the same size and letters in the place of a dataset."""
    with contextlib.redirect_stdout(io.StringIO()):
        other = write_dataset(folder.parent, letters="…émltsrnoiea")
    assert other == folder


HARMS: dict[str, Callable[[Path], object]] = {
    "replaced": replace_dataset,
    "deleted": shutil.rmtree,
    "without meta.json": lambda folder: (folder / "meta.json").unlink(),
    "without val.bin": lambda folder: (folder / "val.bin").unlink(),
}


@contextlib.contextmanager
def harmed_at(step: int, harm: Callable[[], object]) -> Iterator[None]:
    """Do harm when a run begins this step, and all that it saved before is on the disk."""

    def harmful(run: train.Run, batch: Any) -> None:
        if run.progress.step == step:
            run.saver.close()
            harm()
        update(run, batch)

    update = train.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", harmful)
        yield


@pytest.mark.promise(
    controls=[
        broken("mapped_anew", data.format, "MOST_OPEN", 0),
        broken("other_data_accepted", resume, "check_same", lambda *_: None),
    ]
)
def test_a_run_goes_on_without_its_dataset_and_resumes_with_that_one_only(
    cases: Cases, tiny: Path, undisturbed: Path, tmp_path: Path
):
    for number in cases(2, 40):
        folder, out_dir = tmp_path / f"{number}/char", tmp_path / f"{number}/run"
        shutil.copytree(tiny.parent / "char", folder)
        before, harm = contents(folder), list(HARMS.values())[number % len(HARMS)]
        flags = [str(tiny), f"--out_dir={out_dir}", f"--data.path={folder}"]
        step = random.Random(number).randrange(4, 7)  # between the evaluations after 4 and 8
        with harmed_at(step, partial(harm, folder)), signalled("update", 8, signal.SIGTERM):
            assert ran("train", *flags)[0] == 143
        code, error = ran("train", *flags, "--resume")
        assert code == 2
        assert str(folder) in error or "another dataset: its train differs" in error
        put(folder, before)
        assert ran("train", *flags, "--resume") == (0, "")
        assert outcome(out_dir) == outcome(undisturbed)


def write_over(path: Path) -> None:
    """Put other tokens into a file, which keeps its size."""
    tokens = np.fromfile(path, "<u2")
    with open(path, "r+b") as file:
        tokens[::-1].tofile(file)


@pytest.mark.promise(
    controls=[broken("not_compared", data.format.TokenFiles, "check_unchanged", lambda _: None)]
)
def test_a_run_whose_tokens_are_written_over_ends_before_it_saves_and_goes_on_with_the_old_ones(
    cases: Cases, tiny: Path, undisturbed: Path, tmp_path: Path
):
    for number in cases(2, 20):
        folder, out_dir = tmp_path / f"{number}/char", tmp_path / f"{number}/run"
        shutil.copytree(tiny.parent / "char", folder)
        before = contents(folder)
        path = folder / f"{data.format.SPLITS[number % 2]}.bin"
        flags = [str(tiny), f"--out_dir={out_dir}", f"--data.path={folder}"]
        step = random.Random(number).randrange(4, 7)  # between the checkpoints of 4 and 8
        with harmed_at(step, partial(write_over, path)):
            code, error = ran("train", *flags)
        assert (code, f"{path} was changed while a run read it" in error) == (2, True)
        assert checkpoint.load(out_dir, "last")["step"] == 4
        put(folder, before)
        code, error = ran("train", *flags, "--resume")
        if code == 2:  # steps of the other tokens were logged, and are compared once
            assert "start it with --resume once more" in error
            code, error = ran("train", *flags, "--resume")
        assert (code, error) == (0, "")
        assert outcome(out_dir) == outcome(undisturbed)


def test_a_run_goes_on_if_its_tokens_are_written_again_as_they_were(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    folder = tmp_path / "char"
    shutil.copytree(tiny.parent / "char", folder)
    flags = [str(tiny), f"--out_dir={tmp_path / 'run'}", f"--data.path={folder}"]
    with harmed_at(5, partial(os.utime, folder / "train.bin")):
        assert ran("train", *flags) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def train_while_its_dataset_is_emptied() -> None:
    with harmed_at(6, partial(os.truncate, os.environ["TOKENS"], 0)):
        train.main()


def test_a_run_whose_token_file_is_cut_dies_and_goes_on_when_it_is_whole_again(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    folder, out_dir = tmp_path / "char", tmp_path / "run"
    shutil.copytree(tiny.parent / "char", folder)
    before, flags = contents(folder), [tiny, f"--out_dir={out_dir}", f"--data.path={folder}"]
    function = "test_surroundings:train_while_its_dataset_is_emptied"
    environment = {"TOKENS": str(folder / "train.bin")}
    process = start(function, *flags, output=tmp_path / "log", **environment)
    assert finish(process) == -signal.SIGBUS  # no program outlives a memory map that was cut
    assert checkpoint.load(out_dir, "last")["step"] == 4
    code, error = ran("train", *flags, "--resume")
    assert (code, "train.bin should have" in error) == (2, True)
    put(folder, before)
    assert ran("train", *flags, "--resume") == (0, "")
    assert outcome(out_dir) == outcome(undisturbed)


# --- wandb ----------------------------------------------------------------------------------------


class WaitingWandb(FakeWandb):
    """Stands for a wandb that does not return from one of its functions for a while."""

    has_returned = False

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing and not self.has_returned:
            time.sleep(6)
            self.has_returned = True


def called_directly(run: Any, function: Callable[..., object], *values: Any, **named: Any) -> None:
    function(*values, **named)


@pytest.mark.promise(
    controls=[broken("called_directly", wandb_run.WandbRun, "_call", called_directly)]
)
def test_a_wandb_that_fails_or_does_not_return_changes_nothing_and_is_named_once(
    cases: Cases,
    tiny: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(wandb_run, "PATIENCE", 1)
    for number in cases(2, 12):
        function = ("log", "init", "finish")[number % 3]
        fake = (WaitingWandb, FakeWandb)[number // 3 % 2](function)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        assert ran("train", tiny, f"--out_dir={tmp_path / str(number)}", "--wandb=offline")[0] == 0
        assert fake.calls.count(function) == 1
        assert not (isinstance(fake, WaitingWandb) and fake.has_returned)
        assert capsys.readouterr().out.count("\nwandb: it ") == 1
        assert outcome(tmp_path / str(number)) == outcome(undisturbed)


class FailingServer(http.server.BaseHTTPRequestHandler):
    """Answers every request with status 500."""

    def parse_request(self) -> bool:
        super().parse_request()
        self.send_error(500)
        return False

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_a_run_outlives_the_real_wandb_whose_server_fails(
    tiny: Path, undisturbed: Path, tmp_path: Path
):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FailingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path)}
        arguments = [tiny, f"--out_dir={tmp_path / 'run'}", "--wandb=online"]
        process = start("train", *arguments, output=tmp_path / "log", **environment)
        code = finish(process)
        server.shutdown()
    assert code == 0
    assert "wandb: it did not start (" in (tmp_path / "log").read_text()
    assert outcome(tmp_path / "run") == outcome(undisturbed)


# --- Where a script prints ------------------------------------------------------------------------


def half_read(n_lines: int) -> io.TextIOWrapper:
    """Return a pipe whose reader goes away after so many lines."""

    def read() -> None:
        with open(reader, "rb") as lines:
            for _ in range(n_lines):
                lines.readline()

    reader, writer = os.pipe()
    threading.Thread(target=read, daemon=True).start()
    return open(writer, "w")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def printed_to(stream: Any, script: str, *flags: object) -> int:
    """Run a script with another stdout; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        code, error = ran(script, *flags)
        assert error.count("error: ") == (code == 2)
        with contextlib.suppress(OSError):
            sys.stdout.close()
    return code


@pytest.mark.promise(controls=[broken("no_stdout_at_all", os, "fdopen", lambda *_: None)])
def test_a_script_without_a_reader_ends_quietly_and_what_it_wrote_is_right(
    cases: Cases, tiny: Path, undisturbed: Path, tmp_path: Path
):
    flags = ["--prompt=no", f"--out_dir={undisturbed}", "--precision=float32"]
    text = [tiny.parent / "words.txt", "--tokenizer=char"]
    for number in cases(3, 40):
        folder = tmp_path / str(number)
        stream = (lambda: None, partial(half_read, number % 5), full)[number % 3]()
        code = printed_to(stream, "train", tiny, f"--out_dir={folder / 'run'}")
        assert code == (2 if number % 3 == 2 else 0)
        is_begun = (folder / "run/config.toml").exists()
        resume = ["--resume"] if is_begun else []
        assert ran("train", tiny, f"--out_dir={folder / 'run'}", *resume) == (0, "")
        assert outcome(folder / "run") == outcome(undisturbed)
        if number >= 3:
            printed_to(half_read(number % 2), "sample", *flags)
            printed_to(half_read(number % 2), "data.prepare", *text, f"--out={folder / 'char'}")
            assert contents(folder / "char") == contents(tiny.parent / "char")


SHELL = {  # what becomes of the output, and the exit codes that this may have
    "{command} >&-": {0},
    "{command} 2>&-": {0},
    "{command} <&- >&- 2>&-": {0},
    "{command} > /dev/full": {2},
    "{command} 2> /dev/full": {2, 120},  # Python's own for what it could not write at the end
    "{command} > /dev/full 2>&1": {2, 120},
    "{command} | head -1 > /dev/null": {0},
    "{command} 2>&1 | head -c 200 > /dev/null": {0},
}


@pytest.mark.slow
@pytest.mark.parametrize("line", SHELL)
def test_a_script_in_a_shell_without_output_ends_without_a_traceback(
    line: str, tiny: Path, undisturbed: Path, tmp_path: Path
):
    command = f"{sys.executable} train.py {tiny} --out_dir={tmp_path / 'run'}"
    code = f"set -o pipefail; {line.format(command=command)}"
    said = subprocess.run(["bash", "-c", code], capture_output=True, cwd=REPOSITORY, text=True)
    assert said.returncode in SHELL[line], said
    assert "Traceback" not in said.stderr
    resume = ["--resume"] if (tmp_path / "run/config.toml").exists() else []
    assert ran("train", tiny, f"--out_dir={tmp_path / 'run'}", *resume) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


# --- SIGTERM --------------------------------------------------------------------------------------


def terminated(
    seconds: float | None, config: Path, out_dir: Path, n_signals: int, rng: random.Random
) -> int | None:
    """Train in a process, end it by one SIGTERM or two, and return its exit code."""
    resume = ["--resume"] if (out_dir / "config.toml").exists() else []
    output = out_dir.with_suffix(".log")
    process = start("train", config, f"--out_dir={out_dir}", *resume, output=output)
    if seconds is None:
        wait_for_lines(out_dir / "metrics.jsonl", 5)  # it has a checkpoint
    else:
        time.sleep(seconds)
    for _ in range(n_signals):
        process.terminate()
        time.sleep(rng.uniform(0, 0.05))
    code = finish(process, 10)
    assert "Traceback" not in output.read_text() if output.exists() else True
    return code


@pytest.mark.promise(controls=[broken("optimizers_forgotten", resume, "unpack", weights_alone)])
def test_a_run_ended_by_sigterms_at_random_moments_goes_on_to_the_undisturbed_end(
    cases: Cases, tiny: Path, undisturbed: Path, tmp_path: Path
):
    for number in cases(3, 40):
        out_dir, rng = tmp_path / f"run{number}", random.Random(number)
        for n in range(1 + number % 2):  # every other one is ended while it resumes, too
            seconds = None if number + n == 0 else rng.uniform(0, 1.2)
            code = terminated(seconds, tiny, out_dir, 1 + number // 2 % 2, rng)
            assert code in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
        resume = ["--resume"] if (out_dir / "config.toml").exists() else []
        assert ran("train", tiny, f"--out_dir={out_dir}", *resume) == (0, "")
        assert outcome(out_dir) == outcome(undisturbed)


# --- Who reads the page ---------------------------------------------------------------------------

HOSTILE = [
    *("</script>", "<script>", "<!--", "-->", "<!--<script>", "]]>", "<![CDATA[", "&lt;", "&#x3c;"),
    *("'", '"', "\\", "\\u003c", "{{data}}", "{{script}}", "\\1", "\0", "\n", "\r", "\x1b[2J"),
    *("\u2028", "\u2029", "\u202e", "\u2066", "\u2069", "\u200b", "\ufeff", "\ufffe", "\ud800"),
    *(
        "\udfff",
        "é",
        "日本",
        "\U0001f600",
        "</SCRIPT ",
        "<svg onload=a>",
        "</style>",
        "javascript:",
    ),
]


class Structure(html.parser.HTMLParser):
    """What a page is made of, but for the text in its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.parts: list[object] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.parts.append(tag)

    def handle_comment(self, data: str) -> None:
        self.parts.append(data)

    def handle_decl(self, decl: str) -> None:
        self.parts.append(decl)

    def handle_data(self, data: str) -> None:
        is_data = self.parts[-1:] == [("script", [("type", "application/json"), ("id", "data")])]
        if is_data:
            self.data += data
        else:
            self.parts.append(data)


def shown_as_it_is(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def structure(*scenes: dict[str, Any]) -> Structure:
    return Structure(page.build(list(scenes)))


def living(names: list[str], run: str, text: str) -> dict[str, Any]:
    """Return what a page is told of a model that it runs, without the weights' data."""
    scene: Any = {"run": run, "text": text, "ids": [0, 1], "notices": [text], "evaluations": []}
    tokenizer = {"kind": "char", "characters": text, "end": None}
    return scene | {"model": {"names": names, "tokenizer": tokenizer, "capacity": 4}}


@pytest.mark.promise(
    controls=[
        broken("not_escaped", page, "as_json", json.dumps),
        broken("shown_as_it_is", data.shown, "shown", shown_as_it_is),
    ]
)
def test_no_text_of_a_token_or_a_run_changes_the_page_or_what_it_shows(cases: Cases):
    harmless = structure({"tokens": ["a"], "run": "a"})
    for number in cases(40, 2000):
        rng = random.Random(number)
        text = "".join(rng.choices(HOSTILE, k=rng.randint(1, 12)))
        raw = text.encode(errors="surrogatepass") + rng.randbytes(rng.randint(0, 4))
        names = [data.shown.shown(raw), data.shown.shown(raw[::-1])]
        scene = {"tokens": names, "run": text}
        found = structure(scene, living(names, text, text))
        assert found.parts == harmless.parts
        expected = json.loads(json.dumps([scene, living(names, text, text)]))  # joins surrogates
        assert json.loads(found.data) == expected
        assert found.data.isascii()
        assert all(not data.shown.NO_SHAPE & set(map(unicodedata.category, n[0])) for n in names)
