"""What to continue: one text, or one for each line of a file."""

import json
import sys
from pathlib import Path

from data.tokenizer import Tokenizer

STDIN = "-"


def read_text(path: Path) -> str:
    """Read a text, line ends as they are; `-` is standard input. Raises ValueError if none."""
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text:
        source = "standard input" if str(path) == STDIN else path
        raise ValueError(f"{source} is empty, so there is nothing to continue or to score")
    return text


def read_prompts(path: Path) -> list[str]:
    """One prompt for each line that is not empty; of a .jsonl file, its "prompt" or "text"."""
    text = read_text(path).removeprefix("\ufeff")  # with which Windows may start a file
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts: write one on each line")
    if path.suffix != ".jsonl":
        return lines
    return [read_record(line, f"{path}, prompt {n}") for n, line in enumerate(lines, 1)]


def read_record(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    found = record if isinstance(record, dict) else {}
    texts = [found[key] for key in ("prompt", "text") if isinstance(found.get(key), str)]
    if not texts or not texts[0]:
        raise ValueError(f'{where} must be an object with a text as its "prompt" or "text"')
    return texts[0]


def encode_prompt(text: str, tokenizer: Tokenizer, starts_documents: bool) -> list[int]:
    """Token ids of the prompt; of an empty one, whatever starts a text in this dataset."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"a prompt must be Unicode text, without half a character: got {text!r}")
    if text:
        return tokenizer.encode(text)
    if starts_documents and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except ValueError:  # a character vocabulary without line ends
        return [0]
