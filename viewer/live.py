"""Serve the page to this machine alone, and answer each text that is typed into it."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from viewer.page import as_json
from viewer.payload import Json

LOOPBACK = "127.0.0.1"
MOST_BYTES = 100_000  # of a text
HTTP = 80  # the port that browsers do not name


class LiveServer(ThreadingHTTPServer):
    """`GET /` is the page; `POST /` takes {"text": ...} and answers with a scene or an error.

    Raises ValueError if the port is in use.
    """

    daemon_threads = True

    def __init__(self, page: str, answer: Callable[[str], Json], port: int) -> None:
        self.page, self.answer = page, answer
        self.one_at_a_time = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used ({error.strerror}): pass another, such as "
                f"--port={port % 65535 + 1}, or --port=0 for any that is free"
            ) from error

    @property
    def hosts(self) -> set[str]:
        names = {LOOPBACK, "localhost"}
        with_port = {f"{name}:{self.server_port}" for name in names}
        return with_port | names if self.server_port == HTTP else with_port


class Handler(BaseHTTPRequestHandler):
    @property
    def live(self) -> LiveServer:
        assert isinstance(self.server, LiveServer)
        return self.server

    def do_GET(self) -> None:
        if not self.is_ours():
            self.reply(403, "text/plain", "another host")
        elif self.path == "/":
            self.reply(200, "text/html", self.live.page)
        else:
            self.reply(404, "text/plain", "only / is here")

    def do_POST(self) -> None:
        if not self.is_ours():
            self.reply(403, "text/plain", "another host")
            return
        try:
            text = self.typed()
            with self.live.one_at_a_time:
                scene = self.live.answer(text)
            self.reply(200, "application/json", as_json(scene))
        except ValueError as error:
            self.reply(400, "application/json", as_json({"error": str(error)}))

    def typed(self) -> str:
        size = max(0, int(self.headers["Content-Length"] or 0))
        body = self.rfile.read(size)
        if size > MOST_BYTES:
            raise ValueError(f"the text has {size:,} bytes, and may have {MOST_BYTES:,}")
        asked = json.loads(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("text"), str):
            raise ValueError('{"text": ...} must be asked')
        if not asked["text"]:
            raise ValueError("the text is empty: type one")
        return asked["text"]

    def is_ours(self) -> bool:
        """Refuse pages of other sites, also those whose name was made to point to this machine."""
        origin = self.headers["Origin"]
        ours = {None, *(f"http://{host}" for host in self.live.hosts)}
        return self.headers["Host"] in self.live.hosts and origin in ours

    def reply(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        with suppress(ConnectionError):  # who asked may have gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: a line for each key that is pressed helps nobody."""
