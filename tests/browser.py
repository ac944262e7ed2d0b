"""A headless Chromium in which tests click, over the DevTools protocol on two pipes.

Pipes need no library, no port and no network: https://chromedevtools.github.io/devtools-protocol
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SCRIPTS = Path(__file__).parents[1] / "viewer/page"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
FLAGS += ("--no-first-run", "--disable-background-networking", "--disable-component-update")
FLAGS += ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)  # no other machine is found
KEYS = {
    "Tab": 9,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Escape": 27,
    "Enter": 13,
}
KEYS |= {key: ord(key.upper()) for key in "nw"}
SECONDS = 60  # the longest wait for an answer, enough on a busy machine too


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab; `messages` keeps all that the browser has reported about it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.messages: list[dict[str, Any]] = []
        self.unread = b""
        self.sent = 0
        self.session: dict[str, str] = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if "id" in answer and answer["id"] == self.sent:
                assert "error" not in answer, answer
                return answer["result"]
            self.messages.append(answer)

    def receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.from_browser], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            self.unread += os.read(self.from_browser, 2**20)
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1366, height: int = 768, theme: str = "light") -> None:
        """Go to `url` and wait until the page has been built."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": theme}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self.wait("document.querySelector('#side > *') !== null")

    def open_scripts(self, folder: Path, *names: str) -> None:
        """Go to a page that has these of the viewer's scripts, and nothing to show."""
        scripts = "\n".join((SCRIPTS / name).read_text(encoding="utf-8") for name in names)
        no_scenes = '<meta charset="utf-8"><script id="data" type="application/json">[]</script>'
        html = f'{no_scenes}<script>{scripts}</script><p id="side"><b></b>'  # `open` waits for it
        (folder / "scripts.html").write_text(html, encoding="utf-8")
        self.open((folder / "scripts.html").as_uri())

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, of a promise when it is kept."""
        how = {"returnByValue": True, "awaitPromise": True}
        found = self.ask("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.02)

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press the mouse on an element, at a fraction of its width and height."""
        box = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str) -> None:
        """Press a key on the element that has the focus."""
        code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": key}
        text = {"Enter": "\r"}.get(key, key)  # other names of keys are no text
        down = {"type": "keyDown", "text": text} if len(text) == 1 else {"type": "rawKeyDown"}
        self.ask("Input.dispatchKeyEvent", **down, **code)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def complaints(self) -> list[dict[str, Any]]:
        """Return exceptions, and all that was written to the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [message for message in self.messages if message["method"] in kinds]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        sent = [m for m in self.messages if m["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]


@contextlib.contextmanager
def chromium(path: str, folder: Path) -> Iterator[Page]:
    """Start a browser whose profile is in `folder`; yield its tab, and end it afterwards."""
    pairs = [os.pipe(), os.pipe()]
    # Chromium reads from 3 and writes to 4, so that ours must lie higher
    (theirs_in, ours_out), (ours_in, theirs_out) = (
        [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pair] for pair in pairs
    )
    for end in (*pairs[0], *pairs[1]):
        os.close(end)
    shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", shell, path, *FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(ours_out)
        os.close(ours_in)
