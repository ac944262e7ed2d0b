"""A conversation at the terminal: what is typed and what the model answers are one text."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress

from sampling.output import Sample

Begin = Callable[[str, int], Sample]  # the text so far, and which answer it is
Grow = Callable[[Sample], Iterator[str]]  # yields what there is to show


def converse(begin: Begin, grow: Grow, joint: str) -> None:
    """Go on with what is typed, line after line, until Ctrl-D; Ctrl-C ends an answer.

    `joint` stands between an answer and the next line.
    """
    text = ""
    for turn in itertools.count():
        try:
            line = input("> ")
            sample = begin(text + joint + line if text else line, turn)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        except ValueError as error:
            print(f"error: {error}")
            continue
        with suppress(KeyboardInterrupt):
            for piece in grow(sample):
                print(piece, end="", flush=True)
        print(sample.finish("interrupted"))
        text = sample.prompt + sample.text
