"""From the tokens that a model draws to samples that grow: what is shown, and what is kept."""

import codecs
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import files
from data.tokenizer import Tokenizer
from engine.device import HostCopy
from sampling.choose import Drawn

FinishReason = Literal["length", "stop", "end_of_text", "interrupted"]


class Step(NamedTuple):
    """What one step adds to one text; log-probabilities are there if they were asked for."""

    row: int
    token: int
    log_p: float | None = None
    likely: Sequence[tuple[int, float]] = ()  # tokens and their log-probabilities, best first


@dataclass
class Sample:
    """One text as it grows: what of it can be shown, and whether it has ended."""

    prompt: str
    prompt_tokens: list[int]
    index: int
    tokenizer: Tokenizer
    stops: tuple[str, ...] = ()
    text: str = ""  # what can be shown
    held: str = ""  # what may yet become a stop string
    tokens: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int, log_p: float | None = None) -> str:
        """Take the next token; return the new text that can be shown, perhaps none."""
        if token == self.tokenizer.end_of_text:
            return self.finish("end_of_text")
        self.tokens.append(token)
        self.log_p += [] if log_p is None else [log_p]
        return self._take(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def finish(self, reason: FinishReason) -> str:
        """End the text, unless it has ended already; return the rest of it."""
        if self.finish_reason is not None:
            return ""
        shown = self._take(self.decoder.decode(b"", final=True))
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
        shown = self.held[:n]
        self.held = self.held[n:]
        self.text += shown
        return shown

    def record(self) -> dict[str, Any]:
        """Return what --output keeps; log-probabilities are the model's own, in nats."""
        return {
            "prompt": self.prompt,
            "sample": self.index,
            "text": self.text,
            "token_ids": self.tokens,
            "log_probabilities": self.log_p,
            "finish_reason": self.finish_reason,
        }


def longest_start(text: str, stops: tuple[str, ...]) -> int:
    """("a EN", ("END",)) -> 2: how many last characters may begin a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def read_steps(draws: Iterable[Drawn], ahead: int) -> Iterator[list[Step]]:
    """Yield the next token of each text, on the host.

    With `ahead` = 1 a step is read when the next one is under way already, so that a GPU computes
    while text is shown.
    """
    waiting: deque[list[HostCopy]] = deque()
    for drawn in draws:
        waiting.append([HostCopy(tensor) for tensor in drawn if tensor is not None])
        if len(waiting) > ahead:
            yield rows_of(waiting.popleft())
    while waiting:
        yield rows_of(waiting.popleft())


def rows_of(copies: list[HostCopy]) -> list[Step]:
    """Wait for a step, and split it into its rows."""
    tokens, *log_p = (copy.read().tolist() for copy in copies)
    if not log_p:
        return [Step(row, token) for row, token in enumerate(tokens)]
    drawn, top, top_tokens = log_p
    likely = [list(zip(*pair, strict=True)) for pair in zip(top_tokens, top, strict=True)]
    return [Step(row, *found) for row, found in enumerate(zip(tokens, drawn, likely, strict=True))]


def grow(
    steps: Iterable[list[Step]], samples: list[Sample], as_table: bool
) -> Iterator[tuple[int, str]]:
    """Let samples grow until each has ended; yield (row, text), or a line for each token."""
    for rows in steps:
        for step in rows:
            sample = samples[step.row]
            if sample.finish_reason is None:
                text = sample.feed(step.token, step.log_p)
                yield step.row, table_line(sample.tokenizer, step) if as_table else text
        if all(sample.finish_reason for sample in samples):
            return
    for row, sample in enumerate(samples):
        if sample.finish_reason is None:
            rest = sample.finish("length")
            yield row, "" if as_table else rest


def show(pieces: Iterator[tuple[int, str]], samples: list[Sample], titles: list[str]) -> None:
    """Print samples one after another while all of them grow; `pieces` are (row, text).

    A sample is printed as it grows if those before it have ended; else its pieces wait.
    """
    waiting = [title + sample.prompt for title, sample in zip(titles, samples, strict=True)]
    current = 0
    for row, piece in itertools.chain([(0, "")], pieces):
        waiting[row] += piece
        while current < len(samples):
            print(waiting[current], end="", flush=True)
            waiting[current] = ""
            if samples[current].finish_reason is None:
                break
            print(flush=True)
            current += 1


def table_line(tokenizer: Tokenizer, step: Step) -> str:
    """Return a token's probability and, after a bar, the tokens that the model found likely."""
    assert step.log_p is not None
    others = (f"{name(tokenizer, other)} {math.exp(p):.1%}" for other, p in step.likely)
    return f"{math.exp(step.log_p):6.1%} {name(tokenizer, step.token)} | {'  '.join(others)}\n"


def name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as a string, or as bytes where it is no text: " the", b"\\xf0\\x9f"."""
    data = tokenizer.token_bytes(token)
    try:
        return json.dumps(data.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(data)


@contextmanager
def records(path: Path) -> Iterator[Callable[[Iterable[dict[str, Any]]], None]]:
    """Give a function that adds records, one a line, to a file that appears when the block ends.

    After Ctrl-C the file holds the lines so far, if there are any. Raises OSError at once if it
    cannot be written.
    """
    files.check_writable(path)
    interrupted: KeyboardInterrupt | None = None
    with files.whole(path) as file:
        try:
            yield lambda added: file.writelines(
                json.dumps(record, ensure_ascii=False) + "\n" for record in added
            )
        except KeyboardInterrupt as interrupt:
            if file.tell() == 0:
                raise
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
