"""Downloads from a server on this machine that behaves as badly as servers do."""

import contextlib
import hashlib
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import data.download
import files
from data.download import fetch, seconds_to_wait
from data.hub import HubFile, Repository

DATA = bytes(range(256)) * 2000  # several blocks
SHA256 = hashlib.sha256(DATA).hexdigest()
FORK = multiprocessing.get_context("fork")
COMMIT = "0123456789" * 4


@dataclass
class Server:
    """What it has, how it answers in turn, and which ranges it was asked for."""

    address: str
    content: dict[str, bytes] = field(default_factory=dict)
    answers: list[Callable[["Handler", bytes], None]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.address}/file"


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's list says, then as it should."""

    protocol_version = "HTTP/1.1"
    site: Server  # its class has it

    def do_GET(self) -> None:
        self.close_connection = True
        self.site.asked.append(self.headers["Range"] or "all")
        content = self.site.content[self.path]
        answer = self.site.answers.pop(0) if self.site.answers else whole
        with contextlib.suppress(ConnectionError):
            answer(self, content)

    def reply(self, status: int, body: bytes, n_bytes: int | None = None, **headers: str) -> None:
        """Send a body after the length that it should have."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if n_bytes is None else n_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


def first_of(handler: Handler) -> int:
    """The byte that is asked for first."""
    return int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def whole(handler: Handler, content: bytes) -> None:
    """Send what was asked for, as the hub does."""
    first = first_of(handler)
    if first >= len(content) > 0:
        handler.reply(416, b"")
    else:
        handler.reply(206 if first else 200, content[first:])


def cut(n: int) -> Callable[[Handler, bytes], None]:
    """Break the connection after n bytes."""

    def answer(handler: Handler, content: bytes) -> None:
        rest = content[first_of(handler) :]
        handler.reply(206 if first_of(handler) else 200, rest[:n], len(rest))

    return answer


def stall(n: int) -> Callable[[Handler, bytes], None]:
    """Send n bytes, and then nothing for longer than anyone waits."""

    def answer(handler: Handler, content: bytes) -> None:
        cut(n)(handler, content)
        time.sleep(1)

    return answer


def everything(handler: Handler, content: bytes) -> None:
    """Send all, whatever was asked for."""
    handler.reply(200, content)


def status(code: int, **headers: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, content: handler.reply(code, b"", None, **headers)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    handler = type("Handler", (Handler,), {})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    httpd.block_on_close = False
    handler.site = Server(f"http://127.0.0.1:{httpd.server_port}", {"/file": DATA})
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(data.download, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(data.download, "PAUSES", (0, 0, 0))
    monkeypatch.setenv("HF_ENDPOINT", handler.site.address)
    yield handler.site
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def starts(server: Server) -> list[int]:
    """The first byte of each request."""
    return [
        0 if a == "all" else int(a.removeprefix("bytes=").removesuffix("-")) for a in server.asked
    ]


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_a_file_is_downloaded_once_and_again_if_it_has_changed(
    server: Server, tmp_path: Path, size: int | None
):
    path = tmp_path / "folder" / "name"
    for _ in range(2):
        fetch(server.url, path, SHA256, size)
        assert path.read_bytes() == DATA
    assert server.asked == ["all"]
    path.write_bytes(b"changed")
    fetch(server.url, path, SHA256, size)
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]


def test_a_download_goes_on_after_every_cut_from_where_it_was(server: Server, tmp_path: Path):
    server.answers = [cut(200_000), cut(0), cut(70_000), cut(0), cut(0)]
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert (tmp_path / "name").read_bytes() == DATA
    first, second = starts(server)[1], starts(server)[3]
    assert starts(server) == [0, first, first, second, second, second]
    assert 0 < first <= 200_000 < second


def test_a_server_that_cuts_without_progress_is_given_up_and_the_next_try_goes_on(
    server: Server, tmp_path: Path
):
    server.answers = [cut(200_000), *[cut(0)] * 3]
    way_out = f"try again, which keeps what has arrived, or .* put it at {tmp_path / 'name'}"
    with pytest.raises(OSError, match=rf"cannot download {server.url} \(\w+\): {way_out}$"):
        fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    kept = files.partial(tmp_path / "name").stat().st_size
    assert list(tmp_path.iterdir()) == [files.partial(tmp_path / "name")]
    server.asked.clear()
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert server.asked == [f"bytes={kept}-"]
    assert (tmp_path / "name").read_bytes() == DATA


def test_a_download_that_was_killed_goes_on_from_what_it_had_written(
    server: Server, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(data.download, "STALL_SECONDS", 10)
    server.answers = [stall(200_000)]
    partial = files.partial(tmp_path / "name")
    child = FORK.Process(target=fetch, args=(server.url, tmp_path / "name", SHA256, len(DATA)))
    child.start()
    while not partial.exists() or partial.stat().st_size == 0:
        assert child.is_alive()
        time.sleep(0.001)
    child.kill()
    child.join()
    written = partial.stat().st_size
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert server.asked == ["all", f"bytes={written}-"]
    assert (tmp_path / "name").read_bytes() == DATA


def test_a_cut_before_the_first_byte_is_an_error_at_once_and_leaves_nothing(
    server: Server, tmp_path: Path
):
    server.answers = [cut(0)]
    with pytest.raises(OSError, match="cannot download"):
        fetch(server.url, tmp_path / "folder" / "name", SHA256)
    assert server.asked == ["all"]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_silent_is_asked_again_if_bytes_had_come(server: Server, tmp_path: Path):
    server.answers = [stall(200_000)]
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert (tmp_path / "name").read_bytes() == DATA
    assert starts(server)[1] > 0
    server.answers = [stall(0)]
    with pytest.raises(OSError, match=r"cannot download .*(Timeout|ConnectionError)"):
        fetch(server.url, tmp_path / "other", SHA256, len(DATA))


def test_a_download_slower_than_the_longest_silence_is_not_given_up(server: Server, tmp_path: Path):
    def slow(handler: Handler, content: bytes) -> None:
        handler.reply(200, b"", len(content))
        for first in range(0, len(content), len(content) // 8):
            handler.wfile.write(content[first : first + len(content) // 8])
            time.sleep(0.05)

    server.answers = [slow]
    fetch(server.url, tmp_path / "name", SHA256)
    assert server.asked == ["all"]


def test_a_server_that_ignores_the_range_sends_the_whole_anew(server: Server, tmp_path: Path):
    files.partial(tmp_path / "name").write_bytes(DATA[:1000])
    server.answers = [everything]
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert server.asked == ["bytes=1000-"]
    assert (tmp_path / "name").read_bytes() == DATA


def test_a_server_that_ignores_the_range_and_cuts_does_not_keep_us_for_ever(
    server: Server, tmp_path: Path
):
    def cut_anew(handler: Handler, content: bytes) -> None:
        handler.reply(200, content[:200_000], len(content))

    server.answers = [cut_anew] * 100
    with pytest.raises(OSError, match="cannot download"):
        fetch(server.url, tmp_path / "name", SHA256)
    assert len(server.asked) < 10


def test_a_part_as_long_as_the_file_is_not_asked_for_and_a_longer_one_is_begun_again(
    server: Server, tmp_path: Path
):
    files.partial(tmp_path / "name").write_bytes(DATA)
    fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert server.asked == []
    files.partial(tmp_path / "other").write_bytes(DATA + b"more")
    fetch(server.url, tmp_path / "other", SHA256, len(DATA))
    assert server.asked == [f"bytes={len(DATA) + 4}-", "all"]
    assert (tmp_path / "other").read_bytes() == DATA


@pytest.mark.parametrize(
    ("sent", "size", "fault"),
    [
        (b"<html>", None, "its hash differs"),
        (DATA[:-1] + b"!", len(DATA), "its hash differs"),
        (DATA[:-1], len(DATA), "it has 511,999 bytes, not 512,000"),
        (DATA + DATA, len(DATA), r"it has 5\d\d,\d{3} bytes, not 512,000"),
        (b"", len(DATA), "it has 0 bytes, not 512,000"),
    ],
)
def test_another_content_is_refused_and_removed(
    server: Server, tmp_path: Path, sent: bytes, size: int | None, fault: str
):
    server.content["/file"] = sent
    with pytest.raises(OSError, match=f"is not the expected file .{fault}.*, so it was removed"):
        fetch(server.url, tmp_path / "name", SHA256, size)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_beginning_is_found_out_and_removed(server: Server, tmp_path: Path):
    files.partial(tmp_path / "name").write_bytes(b"of another file")
    with pytest.raises(OSError, match="its hash differs"):
        fetch(server.url, tmp_path / "name", SHA256, len(DATA))
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_waited_for_as_long_as_it_asks_and_that_is_said(
    server: Server, tmp_path: Path, capsys, monkeypatch
):
    waited: list[float] = []
    monkeypatch.setattr(data.download.time, "sleep", waited.append)
    server.answers = [status(429, Retry_After="7"), status(503)]
    fetch(server.url, tmp_path / "name", SHA256)
    assert waited == [7, 10]
    assert f"{server.url} is busy (429): trying again in 7 s" in capsys.readouterr().out
    server.answers = [status(429)] * 100
    with pytest.raises(OSError, match="HTTPError: 429"):
        fetch(server.url, tmp_path / "other", SHA256)
    assert len(waited) < 10


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10),
        ({"Retry-After": "86400"}, 300),
        ({}, 10),
    ],
)
def test_the_time_to_wait_is_read_from_the_answer_and_bounded(headers: dict, seconds: int):
    assert seconds_to_wait(headers) == seconds


def test_a_file_that_is_not_there_is_an_error_at_once(server: Server, tmp_path: Path):
    server.answers = [status(404)]
    with pytest.raises(OSError, match="HTTPError: 404"):
        fetch(server.url, tmp_path / "name", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_asked_for(
    server: Server, tmp_path: Path
):
    with pytest.raises(OSError, match=r"must have room for 1,000,000,000,000,000,000 bytes more"):
        fetch(server.url, tmp_path / "folder" / "name", SHA256, 10**18)
    assert server.asked == []
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_to_one_part(server: Server, tmp_path: Path):
    with files.reserved(tmp_path), pytest.raises(OSError, match="another process is writing to"):
        fetch(server.url, tmp_path / "name", SHA256)


def test_git_names_a_small_file_by_another_hash(server: Server, tmp_path: Path):
    server.content["/file"] = b"hello\n"
    fetch(server.url, tmp_path / "name", "ce013625030ba8dba906f756967f9e9ca394464a", 6)
    assert (tmp_path / "name").read_bytes() == b"hello\n"
    server.content["/file"] = b""
    fetch(server.url, tmp_path / "empty", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", 0)
    assert (tmp_path / "empty").read_bytes() == b""


def entry(path: str, content: bytes, **lfs: str) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"type": "file", "oid": blob, "size": len(content), "path": path}
    return found | ({"lfs": lfs} if lfs else {})


REPOSITORY = Repository("someone/texts", COMMIT, "datasets")
TREE = f"/api/datasets/someone/texts/tree/{COMMIT}?recursive=true"


@pytest.fixture
def hub(server: Server) -> Server:
    """A hub with two files, listed on two pages."""
    pages = [
        [entry("b/large 1.txt", DATA, oid=SHA256), {"type": "directory", "path": "b"}],
        [entry("a.json", b"{}")],
    ]
    first, second = (json.dumps(page).encode() for page in pages)
    link = f'<{server.address}/page2>; rel="next"'
    server.answers = [lambda handler, content: handler.reply(200, content, Link=link)]
    resolve = f"/datasets/someone/texts/resolve/{COMMIT}"
    server.content |= {TREE: first, "/page2": second, f"{resolve}/a.json": b"{}"}
    server.content |= {f"{resolve}/b/large%201.txt": DATA}
    return server


def test_the_files_of_a_repository_are_listed_page_by_page_and_fetched_under_their_names(
    hub: Server, tmp_path: Path
):
    small, large = REPOSITORY.files(tmp_path)
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert small == HubFile("a.json", 2, blob)
    assert large == HubFile("b/large 1.txt", len(DATA), SHA256)
    paths = REPOSITORY.fetch([large, small], tmp_path)
    assert paths == [tmp_path / "b/large 1.txt", tmp_path / "a.json"]
    assert [path.read_bytes() for path in paths] == [DATA, b"{}"]


def test_a_commit_that_was_fetched_needs_no_network_again(hub: Server, tmp_path: Path):
    chosen = REPOSITORY.files(tmp_path)
    REPOSITORY.fetch(chosen, tmp_path)
    hub.content.clear()
    n_asked = len(hub.asked)
    assert REPOSITORY.fetch(REPOSITORY.files(tmp_path), tmp_path)
    assert len(hub.asked) == n_asked


def test_a_branch_is_listed_anew_each_time(server: Server, tmp_path: Path):
    branch = Repository("someone/model", "main", "models")
    tree = "/api/models/someone/model/tree/main/under?recursive=true"
    for name in ("a", "b"):
        server.content[tree] = json.dumps([entry(f"under/{name}", b"")]).encode()
        assert [file.name for file in branch.files(tmp_path, "under")] == [f"under/{name}"]
    assert branch.url("a b") == f"{server.address}/someone/model/resolve/main/a%20b"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "C:x", "\\x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(server: Server, tmp_path: Path, name: str):
    server.content[TREE] = json.dumps([entry("good", b""), entry(name, b"")]).encode()
    with pytest.raises(OSError, match="would lie outside its folder"):
        REPOSITORY.files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_or_answers_nonsense_is_told_with_a_way_out(
    server: Server, tmp_path: Path
):
    server.content[TREE] = b"<html>"
    for answers in ([], [status(404)], [cut(0)]):
        server.answers = list(answers)
        with pytest.raises(OSError, match=r"cannot download .*put them in a folder and give its"):
            REPOSITORY.files(tmp_path)


@pytest.mark.parametrize(
    "page",
    [
        {"error": "busy"},
        {},
        None,
        ["a"],
        [{"path": "a"}],
        [{"type": "file", "path": "a", "size": 1}],
        [{"type": "file", "path": "a", "size": "1", "oid": SHA256}],
        [{"type": "file", "path": "a", "size": 1, "lfs": {}}],
    ],
)
def test_an_answer_of_another_shape_than_the_hubs_is_told_with_a_way_out(
    server: Server, tmp_path: Path, page: Any
):
    server.content[TREE] = json.dumps(page).encode()
    with pytest.raises(OSError, match=r"cannot download .*put them in a folder and give its"):
        REPOSITORY.files(tmp_path)


@pytest.mark.parametrize("page", [{}, [], {"sha": 1}, {"sha": "main"}])
def test_a_revision_without_a_commit_is_told_with_a_way_out(server: Server, page: Any):
    server.content["/api/models/someone/model/revision/main"] = json.dumps(page).encode()
    with pytest.raises(OSError, match=r"cannot download .*put them in a folder and give its"):
        Repository("someone/model", "main", "models").at_commit()


KEY = json.dumps(f"someone/texts@{COMMIT}/")


@pytest.mark.parametrize("kept", ["{", "[]", "1", f"{{{KEY}: 1}}", f'{{{KEY}: [["a"]]}}', "\udcff"])
def test_a_damaged_list_of_files_is_made_again(hub: Server, tmp_path: Path, kept: str):
    (tmp_path / ".files.json").write_text(kept, "utf-8", "surrogateescape")
    assert len(REPOSITORY.files(tmp_path)) == 2
    hub.content.clear()
    assert len(REPOSITORY.files(tmp_path)) == 2


def test_a_file_that_has_nearly_arrived_needs_room_only_for_its_rest(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = REPOSITORY.files(tmp_path)
    partial = files.partial(tmp_path / "b/large 1.txt")
    partial.parent.mkdir()
    partial.write_bytes(DATA[:-10])
    for free in (11, 12):  # the other file has two bytes
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(data.download.shutil, "disk_usage", lambda _, usage=usage: usage)
        refused = pytest.raises(OSError, match="must have room for 12 bytes more")
        with refused if free < 12 else contextlib.nullcontext():
            REPOSITORY.fetch(chosen, tmp_path)
    assert (tmp_path / "b/large 1.txt").read_bytes() == DATA


def test_what_keeps_a_file_from_being_written_is_what_is_raised(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(data.download, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        fetch(server.url, tmp_path / "name", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_room_for_all_files_is_checked_before_the_first(server: Server, tmp_path: Path):
    chosen = [HubFile("a", 1, SHA256), HubFile("b", 10**18, SHA256)]
    with pytest.raises(OSError, match="must have room for 1,000,000,000,000,000,001 bytes"):
        REPOSITORY.fetch(chosen, tmp_path)
    assert server.asked == []
