"""What becomes of the tokens of a sample: text that can be shown, an end, a record of it all."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from data.tokenizer import TextStream, Tokenizer
from engine.files import check_writable, partial

FinishReason = Literal["length", "stop", "end_of_text", "interrupted"]
Likely = list[tuple[int, float]]  # tokens with their log-probabilities, the likeliest first
COLORS = (196, 208, 220, 154, 46)  # of a terminal's 256, from improbable red to certain green


class Sample:
    """One text as it grows: what of it may be shown, and whether it has ended."""

    def __init__(self, prompt: str, index: int, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self.prompt, self.index, self.tokenizer, self.stops = prompt, index, tokenizer, stops
        self.stream = TextStream(tokenizer)
        self.text, self.held = "", ""  # what is final, and what may yet turn out a stop string
        self.tokens: list[int] = []
        self.log_p: list[float] = []
        self.finish_reason: FinishReason | None = None

    def feed(self, token: int, log_p: float | None = None) -> str:
        """Take the next token; return the text that became final by it, which may be none."""
        if token == self.tokenizer.end_of_text:
            return self.finish("end_of_text")
        self.tokens.append(token)
        self.log_p += [] if log_p is None else [log_p]
        return self._take(self.stream.feed(token))

    def finish(self, reason: FinishReason) -> str:
        """End the text, unless it has ended already; return the rest of it."""
        if self.finish_reason is not None:
            return ""
        shown = self._take(self.stream.flush())
        if self.finish_reason is None:
            self.finish_reason = reason
            shown += self._release(len(self.held))
        return shown

    def _take(self, new: str) -> str:
        self.held += new
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return self._release(min(found))
        return self._release(len(self.held) - longest_start(self.held, self.stops))

    def _release(self, n: int) -> str:
        shown, self.held = self.held[:n], self.held[n:]
        self.text += shown
        return shown

    def record(self) -> dict[str, Any]:
        """All that --output keeps; probabilities are the model's own, in nats."""
        return {
            "prompt": self.prompt,
            "sample": self.index,
            "text": self.text,
            "token_ids": self.tokens,
            "log_probabilities": self.log_p,
            "finish_reason": self.finish_reason,
        }


def longest_start(text: str, stops: tuple[str, ...]) -> int:
    """("a EN", ("END",)) -> 2: so many characters at the end may be the start of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


class Printer:
    """Shows samples one after another while all of them grow: the first live, others when due."""

    def __init__(self, titles: list[str]) -> None:
        self.titles, self.current = titles, -1
        self.waiting: list[list[str]] = [[] for _ in titles]
        self.has_ended = [False] * len(titles)
        self._advance()

    def write(self, i: int, piece: str) -> None:
        """Show a piece of sample i, or keep it until its turn."""
        if i == self.current:
            print(piece, end="", flush=bool(piece))
        else:
            self.waiting[i].append(piece)

    def end(self, i: int) -> None:
        self.has_ended[i] = True
        if i == self.current:
            print(flush=True)
            self._advance()

    def _advance(self) -> None:
        while (i := self.current + 1) < len(self.titles):
            self.current = i
            print(self.titles[i], end="")
            print(*self.waiting[i], sep="", end="", flush=True)
            if not self.has_ended[i]:
                return
            print(flush=True)
        self.current = len(self.titles)


def table_line(tokenizer: Tokenizer, token: int, log_p: float, likely: Likely) -> str:
    """A token's probability and, after a bar, what else the model found likely there."""
    first = colored(f"{math.exp(log_p):6.1%} {name(tokenizer, token)}", math.exp(log_p))
    others = (f"{name(tokenizer, other)} {math.exp(p):.1%}" for other, p in likely)
    return f"{first} | {'  '.join(others)}\n"


def name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a Python string, or as bytes where it is no text: " the", b"\\xf0\\x9f"."""
    data = tokenizer.token_bytes(token)
    try:
        return json.dumps(data.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(data)


def colored(text: str, probability: float) -> str:
    if not sys.stdout.isatty():
        return text
    color = COLORS[min(int(probability * len(COLORS)), len(COLORS) - 1)]
    return f"\x1b[38;5;{color}m{text}\x1b[0m"


@contextmanager
def records(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds lines to a file, which is in place, whole, when all is done.

    After Ctrl-C it holds what was finished by then, if anything was. Raises OSError at once if it
    cannot be written.
    """
    check_writable(path)
    try:
        with open(partial(path), "w", encoding="utf-8", newline="\n") as file:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)
    except KeyboardInterrupt:
        if partial(path).stat().st_size:
            partial(path).replace(path)
        raise
    else:
        partial(path).replace(path)
    finally:
        partial(path).unlink(missing_ok=True)
