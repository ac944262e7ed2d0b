"""The logits of several texts at once: prefill the prompts, then decode one token at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.capture import Captured
from engine.parallel import mix_seed
from model import GPT
from sampling.cache import KVCache

NUMBERS_AT_ONCE = 256  # random numbers per text that are drawn, and sent to the device, together


class Decoder:
    """Texts of different lengths that grow together, each as it would grow alone.

    With rotary positions the cache slides: in each layer a token sees the latest context_length
    positions. Learned positions end with the context: a text that has filled it goes on from its
    latest half, which is read again, so that a token sees between half and all of the context.
    """

    def __init__(self, model: GPT, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.model, self.device = model, model.wte.weight.device
        self.limit = model.config.context_length
        self.keeps_fed = not model.config.is_modern  # learned positions: they are read again
        self.texts = [prompt[-self.limit :] for prompt in prompts]  # what was read last
        self.fed: list[Tensor] = []  # tokens_B that came after
        size = min(self.limit, max(map(len, self.texts)) + max_new_tokens)
        self.cache = KVCache(
            model.config, len(prompts), model.wte.weight, size=size, static=self.is_static
        )
        self.step = Captured(logits_after, self.is_static)

    @property
    def is_static(self) -> bool:
        """Whether each step is the same work on the same memory, which a graph can capture."""
        return self.device.type == "cuda"

    @property
    def room(self) -> int:
        """How many more tokens fit before the context is full."""
        return self.cache.size - self.cache.length

    @torch.inference_mode()
    def read(self) -> Tensor:
        """Prefill: return the logits (B, V) of the token after each text.

        Texts that are equal so far, such as samples of one prompt, are read once. Raises ValueError
        if the logits are not finite.
        """
        length = max(map(len, self.texts))
        distinct = list(dict.fromkeys(map(tuple, self.texts)))
        padded = [[0] * (length - len(text)) + list(text) for text in distinct]
        starts_U = torch.tensor([length - len(text) for text in distinct], device=self.device)
        cache = KVCache(
            self.model.config,
            len(distinct),
            self.model.wte.weight,
            starts_B=starts_U if starts_U.any() else None,
            size=length,
        )
        logits_UV = self.last_logits(torch.tensor(padded, device=self.device), cache)
        check_finite(logits_UV)
        row_of = {text: row for row, text in enumerate(distinct)}
        rows_B = torch.tensor([row_of[tuple(text)] for text in self.texts], device=self.device)
        self.cache.copy_from(cache, rows_B)
        return logits_UV[rows_B]

    @torch.inference_mode()
    def feed(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each text; return the logits (B, V) of the token after it."""
        if not self.model.config.is_modern and self.cache.length == self.limit:
            return self.read_again(tokens_B)
        length = self.cache.length
        logits_BV = self.step(self, tokens_B)
        self.cache.length = length + 1  # which a graph does not count
        if self.keeps_fed:
            self.fed.append(tokens_B)
        return logits_BV

    @torch.inference_mode()
    def feed_several(self, tokens_BT: Tensor) -> Tensor:
        """Append T tokens, at most `room`, to each text; return the logits (B, T, V) after each."""
        logits_BTV = self.model(tokens_BT, self.cache)
        if self.keeps_fed:
            self.fed += tokens_BT.unbind(1)
        return logits_BTV

    def take_back(self, n: int) -> None:
        """Forget the last n tokens that were fed."""
        self.cache.go_back_to(self.cache.length - n)
        del self.fed[len(self.fed) - n :]

    def read_again(self, tokens_B: Tensor) -> Tensor:
        """Append a token to texts that have filled the context; go on from their latest half."""
        fed_BT = torch.stack([*self.fed, tokens_B], dim=1).tolist()
        grown = [[*text, *fed] for text, fed in zip(self.texts, fed_BT, strict=True)]
        half = max(1, self.limit // 2)
        self.texts = [text if len(text) <= self.limit else text[-half:] for text in grown]
        self.fed = []
        self.cache.go_back_to(0)
        return self.read()

    def last_logits(self, tokens_BT: Tensor, cache: KVCache) -> Tensor:
        return self.model.lm_head(self.model.features(tokens_BT, cache)[:, -1])


def logits_after(decoder: Decoder, tokens_B: Tensor) -> Tensor:
    return decoder.last_logits(tokens_B[:, None], decoder.cache)


def equal_start(a: list[int], b: list[int]) -> int:
    """([1, 2, 3], [1, 2, 4, 5]) -> 2: how many first tokens are the same."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def check_finite(logits_BV: Tensor) -> None:
    if not logits_BV.isfinite().all():
        raise ValueError("the model's logits must be finite: its checkpoint is of a failed run")


def tokens_seen(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Return (B, V): True for the tokens of each prompt."""
    seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, torch.tensor(prompt)] = True
    return seen_BV.to(device)


def random_numbers(seeds: list[tuple[int, ...]], device: torch.device) -> Iterator[Tensor]:
    """Yield a number from [0, 1) for each text (B,), step after step; seeds[i] are those of text i.

    The text thus depends on its own seed alone, whoever else is in the batch.
    """
    generators = [torch.Generator().manual_seed(mix_seed(*seed)) for seed in seeds]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple has no float64
    while True:
        numbers = [torch.rand(NUMBERS_AT_ONCE, dtype=dtype, generator=g) for g in generators]
        yield from torch.stack(numbers, dim=1).to(device)
