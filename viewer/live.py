"""Serve the page to this machine alone, and answer each text that is typed into it."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from viewer.page import as_json
from viewer.payload import Json

LOOPBACK = "127.0.0.1"
MOST_BYTES = 100_000  # of a text


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
        return {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}


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
        size = int(self.headers["Content-Length"] or 0)
        if not self.is_ours() or not 0 < size <= MOST_BYTES:
            self.reply(403, "text/plain", "another host, or too long a text")
            return
        try:
            text = json.loads(self.rfile.read(size))["text"]
            with self.live.one_at_a_time:
                scene = self.live.answer(text)
            self.reply(200, "application/json", as_json(scene))
        except (ValueError, KeyError, TypeError) as error:
            self.reply(400, "application/json", as_json({"error": str(error)}))

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
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: a line for each key that is pressed helps nobody."""
