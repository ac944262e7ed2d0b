"""The script, as a user meets it: pages, pictures, a server, and requests that it refuses."""

import json
import queue
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import visualize
from engine import checkpoint
from helpers import run_here, train_here, without_box, write_tiny
from viewer.live import LiveServer

TEXT = "no sé… toma"
Script = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that kept checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(write_tiny(folder), folder / "run", "--keep_every=5")
    return folder / "run"


@pytest.fixture
def script(trained: Path, capsys: pytest.CaptureFixture[str]) -> Script:
    """Return a function that runs visualize.py and returns its exit code, output and error."""

    def run(*flags: object) -> tuple[int, str, str]:
        code = run_here(visualize.main, "visualize.py", f"--out_dir={trained}", *flags)
        said = capsys.readouterr()
        return code, said.out, said.err

    capsys.readouterr()  # what training printed
    return run


def scenes(path: Path) -> list[dict[str, Any]]:
    data = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return json.loads(data)


# --- Pages and pictures ---------------------------------------------------------------------------


def test_one_command_writes_one_page_into_the_folder_of_the_run(script: Script, trained: Path):
    code, text, error = script(f"--text={TEXT}")
    assert (code, error) == (0, "")
    assert text.startswith(f"written to {trained / 'attention.html'}: ")
    assert text.count("\n") == 1
    examples, model, toy = scenes(trained / "attention.html")
    assert [scene["name"] for scene in (examples, model, toy)] == [
        "Worked examples",
        "Your model",
        "Cross-attention",
    ]
    assert model["axes"][0]["queries"] == list(TEXT.replace(" ", "␣"))
    assert [frame["step"] for frame in model["frames"]] == [0, 5, 10, 12]
    assert all(len(frame["panels"]) == 4 for frame in model["frames"])
    assert len(model["evaluations"]) == 3


def test_the_text_can_come_from_a_file_and_the_page_go_anywhere(script: Script, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = (f"--text_file={tmp_path / 'text.txt'}", f"--html={tmp_path / 'page.html'}")
    assert script(*flags)[0] == 0
    assert scenes(tmp_path / "page.html")[1]["axes"][0]["keys"] == list(TEXT.replace(" ", "␣"))


def test_a_single_token_is_enough(script: Script, tmp_path: Path):
    assert script("--text=n", f"--html={tmp_path / 'page.html'}")[0] == 0
    frame = scenes(tmp_path / "page.html")[1]["frames"][0]
    assert frame["loss"] is None
    assert frame["truth"] == [None]


def test_checkpoints_that_do_not_fit_are_left_out_evenly_and_said(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(visualize, "most_checkpoints", lambda *_: 2)
    code, text, _ = script(f"--text={TEXT}", f"--html={tmp_path / 'page.html'}")
    assert code == 0
    assert "2 of 4 checkpoints are shown.\n" in text
    model = scenes(tmp_path / "page.html")[1]
    assert [frame["step"] for frame in model["frames"]] == [0, 12]
    assert model["notices"] == ["2 of 4 checkpoints are shown."]


def file_of(run: Path, name: str) -> Path:
    return run / json.loads((run / checkpoint.RECORD).read_text())[name]["file"]


def rename(run: Path, old: str, new: str, **changes: str) -> None:
    """Give a checkpoint another name, too, in the record of a run."""
    record = json.loads((run / checkpoint.RECORD).read_text())
    record[new] = {**record[old], **changes}
    (run / checkpoint.RECORD).write_text(json.dumps(record))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_kept_checkpoints_that_are_missing_or_damaged_are_left_out_and_named(
    script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    missing = file_of(run, "step_0")
    missing.unlink()
    damaged = file_of(run, "step_10")
    damage(damaged)
    code, text, error = script(f"--out_dir={run}", f"--text={TEXT}")
    assert (code, error) == (0, "")
    model = scenes(run / "attention.html")[1]
    assert [frame["step"] for frame in model["frames"]] == [5, 12]
    count, first, second = model["notices"]
    assert count == "2 of 4 checkpoints are shown."
    assert first.startswith(f"The step_0 checkpoint is left out: {missing}, ")
    assert "is missing" in first
    assert second.startswith(f"The step_10 checkpoint is left out: {damaged} is damaged: ")
    assert text.splitlines()[1:] == model["notices"]


def test_a_run_whose_newest_step_was_kept_as_well_needs_only_one_of_the_two(
    script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    rename(run, "last", "step_12", file="step_00000012_nowhere.pt")
    assert script(f"--out_dir={run}", f"--text={TEXT}")[0] == 0
    model = scenes(run / "attention.html")[1]
    assert [frame["step"] for frame in model["frames"]] == [0, 5, 10, 12]
    assert model["notices"] == []


@pytest.mark.parametrize("harm", [Path.unlink, damage])
def test_a_newest_checkpoint_that_is_missing_or_damaged_is_refused(
    harm: Callable[[Path], None], script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    rename(run, "step_5", "best")  # which shall not stand in for it
    newest = file_of(run, "last")
    harm(newest)
    code, text, error = script(f"--out_dir={run}", f"--text={TEXT}")
    assert (code, text) == (2, "")
    assert error.startswith(f"error: {newest}")
    assert error.count("\n") == 1


def test_a_token_beyond_the_vocabulary_cannot_be_taken_for_a_byte(trained: Path):
    assert visualize.Run.open(trained, "cpu").name(80) == "⟨token 80⟩"


@pytest.mark.parametrize(
    ("most", "expected"), [(1, "e"), (2, "ae"), (3, "ace"), (4, "acde"), (5, "abcde"), (9, "abcde")]
)
def test_a_choice_of_checkpoints_is_even_and_keeps_the_newest(most: int, expected: str):
    assert "".join(visualize.evenly(list("abcde"), most)) == expected


def test_a_picture_of_all_heads_is_written(script: Script, tmp_path: Path):
    code, text, error = script(f"--text={TEXT}", f"--png={tmp_path / 'new/heads.png'}")
    assert (code, text, error) == (0, f"written to {tmp_path / 'new/heads.png'}\n", "")
    assert (tmp_path / "new/heads.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_and_a_picture_are_written_together(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(visualize.picture, "draw", lambda path, *_: path.touch())
    code, _, _ = script(f"--text={TEXT}", f"--png={tmp_path / 'a.png'}", f"--html={tmp_path / 'a'}")
    assert (code, sorted(path.name for path in tmp_path.iterdir())) == (0, ["a", "a.png"])


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the text must not be empty: pass --text=... or --text_file=..."),
        (["--text=" + "no" * 9], "the text has 18 tokens, and this model sees at most context_len"),
        (["--text=aXb"], "the character vocabulary lacks 'X', 'b'"),
        (["--text_file=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text=a", "--html=/dev/null/a.html"], "/dev/null/a.html cannot be written"),
        (["--text=a", "--png=/dev/null/a.png"], "/dev/null/a.png cannot be written"),
        (["--out_dir=nowhere", "--text=a"], "nowhere holds no checkpoint: train one with `python"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(script: Script, flags: list[str], message: str):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=a", "--text_file=b"], "give text or text_file, not both"),
        (["--live", "--png=a.png"], "give live or files to write (html, png), not both"),
        (["--live", "--html=a.html"], "give live or files to write (html, png), not both"),
        (["--text=a", "--png=a.txt"], "png must be a file that ends in .png: got a.txt"),
        (["--port=65536"], "port must be at most 65535: got 65536"),
        (["--port=-1"], "port must be at least 0: got -1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(script: Script, flags: list[str], message: str):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert message in without_box(error)


def test_a_port_in_use_is_refused_with_the_way_out(script: Script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text, error = script("--live", f"--port={port}")
    assert (code, text) == (2, "")
    assert error.startswith(f"error: port {port} cannot be used (Address already in use): pass ")
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(script: Script, trained: Path, tmp_path: Path):
    (tmp_path / checkpoint.RECORD).write_text("{}")
    code, _, error = script(f"--out_dir={tmp_path}", "--text=a")
    assert (code, error.count("\n")) == (2, 1)


# --- Live -----------------------------------------------------------------------------------------


def answer(text: str) -> dict[str, Any]:
    if not text:
        raise ValueError("the text must not be empty")
    return {"name": text}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer("<p>the page", answer, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    port: int, data: bytes | None = None, path: str = "/", headers: dict[str, str] | None = None
) -> tuple[int, str, dict[str, str]]:
    """Return status, text and headers of the server's reply."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=100) as reply:
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as reply:
        return reply.code, reply.read().decode(), dict(reply.headers)


def test_only_this_machine_is_served(server: LiveServer):
    assert server.server_address[0] == "127.0.0.1"
    status, text, headers = ask(server.server_port)
    assert (status, text) == (200, "<p>the page")
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_a_text_is_answered_with_json_in_which_no_tag_can_begin(server: LiveServer):
    typed = "</script><b>é".encode()
    status, text, headers = ask(server.server_port, typed)
    assert status == 200
    assert json.loads(text) == {"name": "</script><b>é"}
    assert "<" not in text
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("data", [b"", b"\xff", b"x" * 100_001])
def test_a_bad_text_is_answered_with_a_sentence(server: LiveServer, data: bytes):
    status, text, _ = ask(server.server_port, data)
    assert status == 400
    assert json.loads(text)["error"]


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_pages_of_other_sites_are_refused(server: LiveServer, headers: dict[str, str]):
    for data in (b"a", None):
        assert ask(server.server_port, data, headers=headers)[0] == 403


def test_there_is_nothing_but_the_page(server: LiveServer):
    assert ask(server.server_port, path="/etc/passwd")[:2] == (200, "<p>the page")


def test_browsers_that_do_not_name_the_usual_port_are_answered(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
):
    assert ask(server.server_port, headers={"Host": "127.0.0.1"})[0] == 403
    monkeypatch.setattr(server, "server_port", 80)
    assert server.hosts == {"127.0.0.1", "localhost"}


def test_a_request_that_is_none_and_a_reader_that_has_gone_are_borne(
    server: LiveServer, capfd: pytest.CaptureFixture[str]
):
    status, text, _ = ask(server.server_port, b"a", headers={"Content-Length": "abc"})
    assert (status, list(json.loads(text))) == (400, ["error"])
    with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.sendall(f"GET / HTTP/1.0\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
    assert ask(server.server_port)[0] == 200
    assert capfd.readouterr().err == ""


def test_the_script_serves_a_page_and_answers_what_is_typed(
    script: Script, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: queue.SimpleQueue[LiveServer] = queue.SimpleQueue()

    class Watched(LiveServer):
        def service_actions(self) -> None:  # called while it serves
            if started.empty():
                started.put(self)

    monkeypatch.setattr(visualize, "LiveServer", Watched)
    run = shutil.copytree(trained, tmp_path / "run")
    file_of(run, "step_5").unlink()
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(script, f"--out_dir={run}", "--live", "--port=0")
        live = started.get(timeout=100)
        page = ask(live.server_port)
        known = ask(live.server_port, TEXT.encode())
        long = ask(live.server_port, ("no" * 9).encode())
        live.shutdown()
    code, text, _ = outcome.result()
    assert code == 0
    notice, address = text.splitlines()[-2:]
    assert notice.startswith("The step_5 checkpoint is left out: ")
    assert address == f"open http://127.0.0.1:{live.server_port} (Ctrl-C ends it)"
    assert 'id="data"' in page[1]
    assert known[0] == 200
    scene = json.loads(known[1])
    assert scene["axes"][0]["queries"] == list(TEXT.replace(" ", "␣"))
    assert scene["notices"][1] == notice
    assert (long[0], "18 tokens" in long[1]) == (400, True)
