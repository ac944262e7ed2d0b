"""The script, as a user meets it: pages, pictures, a server, and requests that it refuses."""

import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import visualize
from engine import checkpoint
from helpers import finish, run_here, start, train_here, write_tiny
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
    """Run visualize.py on the trained model; return its exit code, output and error."""

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
    assert "2 of 4 checkpoints are shown." in text
    model = scenes(tmp_path / "page.html")[1]
    assert [frame["step"] for frame in model["frames"]] == [0, 12]
    assert model["notices"] == ["2 of 4 checkpoints are shown."]


@pytest.mark.parametrize(
    ("most", "expected"), [(1, "e"), (2, "ae"), (3, "ace"), (4, "acde"), (5, "abcde"), (9, "abcde")]
)
def test_a_choice_of_checkpoints_is_even_and_keeps_the_newest(most: int, expected: str):
    assert "".join(visualize.evenly(list("abcde"), most)) == expected


def test_a_picture_of_all_heads_is_written(script: Script, tmp_path: Path):
    code, text, error = script(f"--text={TEXT}", f"--png={tmp_path / 'new/heads.png'}")
    assert (code, text, error) == (0, f"written to {tmp_path / 'new/heads.png'}\n", "")
    assert (tmp_path / "new/heads.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_and_a_picture_are_written_together(script: Script, tmp_path: Path):
    code, _, _ = script(f"--text={TEXT}", f"--png={tmp_path / 'a.png'}", f"--html={tmp_path / 'a'}")
    assert (code, sorted(path.name for path in tmp_path.iterdir())) == (0, ["a", "a.png"])


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the text must not be empty: pass --text=... or --text_file=..."),
        (["--text=" + "no" * 9], "the text has 18 tokens, and this model sees at most context_len"),
        (["--text=aXb"], "the character vocabulary lacks 'X', 'b'"),
        (["--text=a", "--text_file=b"], "give text or text_file, not both"),
        (["--text_file=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--live", "--png=a.png"], "give live or files to write, html and png, not both"),
        (["--live", "--html=a.html"], "give live or files to write, html and png, not both"),
        (["--text=a", "--png=a.txt"], "png must be a file that ends in .png: got a.txt"),
        (["--port=65536"], "port must be at most 65535: got 65536"),
        (["--port=-1"], "port must be at least 0: got -1"),
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


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer("<p>the page", answer, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    port: int, data: bytes | None = None, path: str = "/", headers: dict[str, str] | None = None
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of the server's reply."""
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
    typed = json.dumps({"text": "</script><b>é"}).encode()
    status, text, headers = ask(server.server_port, typed)
    assert status == 200
    assert json.loads(text) == {"name": "</script><b>é"}
    assert "<" not in text
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "data", [b'{"text": ""}', b'{"text": 5}', b"{", b"[]", b"{}", b"\xff", b"x" * 100_001]
)
def test_a_bad_text_is_answered_with_a_sentence(server: LiveServer, data: bytes):
    status, text, _ = ask(server.server_port, data)
    assert status == 400
    assert json.loads(text)["error"]


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_pages_of_other_sites_are_refused(server: LiveServer, headers: dict[str, str]):
    for data in (b'{"text": "a"}', None):
        assert ask(server.server_port, data, headers=headers)[0] == 403


def test_there_is_nothing_but_the_page(server: LiveServer):
    assert ask(server.server_port, path="/etc/passwd")[0] == 404


def test_browsers_that_do_not_name_the_usual_port_are_answered(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
):
    assert ask(server.server_port, headers={"Host": "127.0.0.1"})[0] == 403
    monkeypatch.setattr(server, "server_port", 80)
    assert server.hosts == {"127.0.0.1", "localhost", "127.0.0.1:80", "localhost:80"}


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


def test_the_script_serves_a_page_and_answers_what_is_typed(trained: Path, tmp_path: Path):
    output = tmp_path / "log"
    process = start("visualize", f"--out_dir={trained}", "--live", "--port=0", output=output)
    try:
        deadline = time.monotonic() + 100
        while "http://" not in (said := output.read_text() if output.exists() else ""):
            assert process.is_alive(), said
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = int(said.split("127.0.0.1:")[1].split()[0])
        assert 'id="data"' in ask(port)[1]
        status, text, _ = ask(port, json.dumps({"text": TEXT}).encode())
        assert status == 200
        assert json.loads(text)["axes"][0]["queries"] == list(TEXT.replace(" ", "␣"))
        status, text, _ = ask(port, json.dumps({"text": "no" * 9}).encode())
        assert (status, "18 tokens" in text) == (400, True)
    finally:
        process.terminate()
        finish(process)
