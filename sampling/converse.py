"""A conversation at the terminal: what is typed and what the model answers are one text."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from model import GPT
from sampling.decode import Decoder, check_finite, equal_start
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


class Conversation(Decoder):
    """A text that goes on in turns: each reads only what is new since the one before."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model, [[]], model.config.context_length)
        self.keeps_fed = True
        self.held: list[int] = []  # the tokens before those fed, all of which were read

    def turn(self, prompt: list[int]) -> None:
        """Go on with a prompt: the text so far and what was added, or any other text."""
        held = [*self.held, *map(int, self.fed)] if self.cache.length <= self.limit else []
        self.texts = [prompt[-self.limit :]]
        self.fed = []
        # The last token is read in any case, for the logits after it
        self.held = held[: equal_start(held, self.texts[0][:-1])]
        self.cache.go_back_to(len(self.held))

    @torch.inference_mode()
    def read(self) -> Tensor:
        """Return the logits (1, V) after the prompt, of which the cache holds the beginning."""
        new = self.texts[0][self.cache.length :]
        logits_1V = self.last_logits(torch.tensor([new], device=self.device), self.cache)
        check_finite(logits_1V)
        self.held = self.texts[0]
        return logits_1V
