"""Serve the page to this machine alone, and answer each text that is typed into it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from viewer.page import Json, as_json

LOOPBACK = "127.0.0.1"
MOST_BYTES = 100_000  # in one request


class LiveServer(ThreadingHTTPServer):
    """GET returns the page; POST takes a text and returns its scene, or an error."""

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
        port = "" if self.server_port == 80 else f":{self.server_port}"  # browsers leave 80 out
        return {f"{name}{port}" for name in (LOOPBACK, "localhost")}


class Handler(BaseHTTPRequestHandler):
    @property
    def live(self) -> LiveServer:
        assert isinstance(self.server, LiveServer)
        return self.server

    def parse_request(self) -> bool:
        """Refuse other sites, even one whose name was made to point to this machine."""
        if not super().parse_request():
            return False
        origins = {None, *(f"http://{host}" for host in self.live.hosts)}
        is_ours = self.headers["Host"] in self.live.hosts and self.headers["Origin"] in origins
        if not is_ours:
            self.reply(403, "text/plain", "only the page itself may ask")
        return is_ours

    def do_GET(self) -> None:
        self.reply(200, "text/html", self.live.page)

    def do_POST(self) -> None:
        try:
            text = self.typed()
            with self.live.one_at_a_time:
                scene = self.live.answer(text)
            self.reply(200, "application/json", as_json(scene))
        except ValueError as error:
            self.reply(400, "application/json", as_json({"error": str(error)}))

    def typed(self) -> str:
        """Return the text of a request. Raises ValueError if there is none."""
        size = max(0, int(self.headers["Content-Length"] or 0))
        body = self.rfile.read(size)
        if size > MOST_BYTES:
            raise ValueError(f"the text has {size:,} bytes: type at most {MOST_BYTES:,}")
        if not body:
            raise ValueError("the text is empty: type one")
        return body.decode()

    def reply(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        with suppress(ConnectionError):  # the reader may have gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: a line for each key that is pressed helps nobody."""
