"""Put scenes into one HTML file that needs nothing else and lets nothing in."""

import base64
import hashlib
import json
import re
from pathlib import Path

from viewer.payload import Json

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "draw.js", "numbers.js", "panels.js", "main.js")
LIVE = "live.js"


def as_json(data: object) -> str:
    """JSON that can stand inside a script element: no text in it ends one, or starts a comment."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def build(scenes: list[Json], live: bool = False) -> str:
    """The page as text; `live` adds a box whose text goes to where the page came from."""
    scripts = (*SCRIPTS, LIVE) if live else SCRIPTS
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)
    # A browser runs this script and no other, loads nothing, and sends at most to its own origin
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    policy += "; connect-src 'self'" if live else ""
    parts = {"policy": policy, "style": style, "script": script, "data": as_json(scenes)}
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
