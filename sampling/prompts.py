"""What to continue: one text, or one for each line of a file."""

import sys
from pathlib import Path

from data.documents import MARK, text_field
from data.tokenizer import Tokenizer
from sampling.load import Trained

STDIN = "-"


def read_text(path: Path) -> str:
    """Read a text, line ends as they are; `-` is standard input. Raises ValueError if none."""
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
        text = data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text:
        source = "standard input" if str(path) == STDIN else path
        raise ValueError(f"{source} is empty, so there is nothing to continue or to score")
    return text


def read_prompts(path: Path) -> list[str]:
    """Return a prompt for each line that is not empty; in .jsonl, its "prompt" or "text"."""
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n") if line.strip()]
    if path.suffix.lower() == ".jsonl":
        lines = [
            text_field(line.encode(), f"{path}, prompt {n}", "prompt", "text")
            for n, line in enumerate(lines, 1)
        ]
    if not lines or "" in lines:
        raise ValueError(f"{path} holds no prompts, or an empty one: write one on each line")
    return lines


def encode_prompt(text: str, trained: Trained) -> list[int]:
    """Return the token ids of a prompt; of an empty one, what starts a text in the dataset."""
    tokenizer = trained.tokenizer
    if any("\ud800" <= character <= "\udfff" for character in text):
        end = text[-40:]
        raise ValueError(f"a prompt must be Unicode text, without half a character: got {end!r}")
    if text:
        return tokenizer.encode(text)
    if trained.starts_documents and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except ValueError:  # a character vocabulary without line ends
        return [0]


def line_joint(tokenizer: Tokenizer) -> str:
    """Return what can stand between two lines: a line end, if the vocabulary has one."""
    for joint in ("\n", " "):
        try:
            tokenizer.encode(joint)
            return joint
        except ValueError:  # a character vocabulary without it
            continue
    return ""
