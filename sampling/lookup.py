"""Guess the next tokens from what followed earlier in the text, and check them in one pass.

Saxena, 2023 (github.com/apoorvumang/prompt-lookup-decoding). A pass over a few tokens takes little
longer than over one, as reading the weights is what takes the time. The text stays what it would be
without: each position has its own random number, and a guess is kept only if that number draws it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT
from sampling.choose import Choice, Drawn, choose
from sampling.decode import Decoder, equal_start, random_numbers, tokens_seen

RUN = 3  # tokens whose last appearance is looked up
MOST_GUESSES = 15  # of a pass
FIRST_REST = 4  # tokens without a guess after one that was wrong; each more doubles it
LONGEST_REST = 64


class Guesser:
    """A text, and what followed each run of its tokens the last time."""

    def __init__(self, text: list[int]) -> None:
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # a run -> the place of what followed it
        self.n_guesses = 1  # at most, in the next pass
        self.next_rest = FIRST_REST
        self.rest = 0  # tokens to go without a guess
        self.add(text)

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            self.after[tuple(self.text[-RUN:])] = len(self.text)
            self.text.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to `most` tokens that may follow; none, the longer the more were wrong."""
        self.rest -= 1
        start = self.after.get(tuple(self.text[-RUN:]))
        if self.rest >= 0 or start is None:
            return []
        # Where they reach the end of the text, it is taken to repeat itself
        period = len(self.text) - start
        n = min(most, self.n_guesses)
        return [self.text[start + i % period] for i in range(n)]

    def learn(self, n_right: int) -> None:
        """Guess more after guesses that were right, or rest after those that were not."""
        self.n_guesses = min(MOST_GUESSES, 2 * n_right + 1)
        if n_right:
            self.next_rest = FIRST_REST
        else:
            self.rest = self.next_rest
            self.next_rest = min(LONGEST_REST, 2 * self.next_rest)


@torch.inference_mode()
def generate_by_lookup(
    model: GPT,
    prompts: list[list[int]],
    seeds: list[tuple[int, ...]],
    max_new_tokens: int,
    vocab_size: int,
    choice: Choice,
    top: int | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Drawn]:
    """Yield the tokens that `sample.generate` would, for a single text."""
    (prompt,) = prompts
    decoder = decoder or Decoder(model, prompts, max_new_tokens)
    numbers = random_numbers(seeds, decoder.device)
    waiting: list[Tensor] = []  # numbers of the positions that come next
    seen_1V = tokens_seen(prompts, vocab_size, decoder.device)
    guesser = Guesser(prompt)
    guesses: list[int] = []
    logits_TV = decoder.read()
    while max_new_tokens > 0:
        while len(waiting) <= len(guesses):
            waiting.append(next(numbers))
        numbers_T = torch.cat(waiting[: len(guesses) + 1])
        # All guesses are tokens of the text, so each position has seen the same ones
        drawn = choose(logits_TV[:, :vocab_size], seen_1V, numbers_T, choice, top)
        tokens = drawn.tokens_B.tolist()
        n_right = equal_start(tokens, guesses)
        n = n_right + 1  # what was drawn after a wrong guess is dropped
        for i in range(n):
            yield one_of(drawn, i) if guesses else drawn
        del waiting[:n]
        seen_1V.scatter_(1, drawn.tokens_B[None, :n], True)
        guesser.add(tokens[:n])
        max_new_tokens -= n
        if guesses:
            guesser.learn(n_right)
            decoder.take_back(len(guesses) - n_right)
        guesses = guesser.guess(min(max_new_tokens, decoder.room) - 1)
        logits_TV = feed(decoder, drawn.tokens_B[n_right:n], guesses)


def feed(decoder: Decoder, last_1: Tensor, guesses: list[int]) -> Tensor:
    """Append a token and what may follow it; return the logits (T, V) after each."""
    if not guesses:
        return decoder.feed(last_1)
    guesses_G = torch.tensor(guesses, device=decoder.device)
    return decoder.feed_several(torch.cat((last_1, guesses_G))[None])[0]


def one_of(drawn: Drawn, row: int) -> Drawn:
    """Keep a single row of what was drawn."""
    tokens_B, *log_p = (None if part is None else part[row : row + 1] for part in drawn)
    assert tokens_B is not None
    return Drawn(tokens_B, *log_p)
