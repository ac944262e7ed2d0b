"""The next tokens of several texts at once: one pass over the prompts, then one token a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.parallel import mix_seed
from model import GPT, KVCache
from sampling.choose import Choice, Drawn, choose

NUMBERS_AT_ONCE = 256  # random numbers per text that are drawn, and sent to the device, together


class Decoder:
    """Texts of different lengths that grow together, each as it would grow alone.

    With rotary positions the cache slides: each layer of a token sees the context_length latest.
    Learned positions end with the context: a text that has filled it goes on from its latest
    half, read anew, so that a token sees between half and all of the context.
    """

    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        seeds: list[tuple[int, ...]],
        choice: Choice,
        vocab_size: int,
        max_new_tokens: int,
        top: int | None = None,
    ) -> None:
        """Text i continues prompts[i] with the random numbers of seeds[i]; `top` as in choose."""
        self.model, self.choice, self.vocab_size, self.top = model, choice, vocab_size, top
        self.device, self.limit = model.wte.weight.device, model.config.context_length
        self.windows = [prompt[-self.limit :] for prompt in prompts]
        self.size = min(self.limit, max(map(len, self.windows)) + max_new_tokens)
        self.random = [torch.Generator().manual_seed(mix_seed(*seed)) for seed in seeds]
        self.n_drawn = 0
        # Apple's GPUs have no doubles
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.numbers_NB = torch.zeros(NUMBERS_AT_ONCE, len(prompts), dtype=dtype).to(self.device)
        self.turn = torch.zeros(1, dtype=torch.long, device=self.device)  # row of the next numbers
        self.tokens_B1 = torch.zeros(len(prompts), 1, dtype=torch.long, device=self.device)
        self.seen_BV = self.tokens_in(prompts) if choice.repetition_penalty != 1 else None
        self.cache: KVCache | None = None
        self.length = 0  # that the cache holds
        self.new: list[Tensor] = []  # tokens_B that the windows do not have yet
        self.next: Callable[[], Drawn] | None = None

    @property
    def is_static(self) -> bool:
        """Whether each step is the same work on the same memory, for a graph to capture."""
        return self.device.type == "cuda"

    def tokens_in(self, prompts: list[list[int]]) -> Tensor:
        """(B, V), True for the tokens of each prompt."""
        seen_BV = torch.zeros(len(prompts), self.vocab_size, dtype=torch.bool)
        for seen_V, prompt in zip(seen_BV, prompts, strict=True):
            seen_V[torch.tensor(prompt)] = True
        return seen_BV.to(self.device)

    @torch.inference_mode()
    def step(self) -> Drawn:
        """Draw the next token of each text, as tensors that the device may still be computing."""
        if self.n_drawn % NUMBERS_AT_ONCE == 0:
            dtype = self.numbers_NB.dtype
            numbers = [torch.rand(NUMBERS_AT_ONCE, dtype=dtype, generator=g) for g in self.random]
            self.numbers_NB.copy_(torch.stack(numbers, dim=1))
            self.turn.zero_()
        self.n_drawn += 1
        is_full = self.length == self.limit and not self.model.config.is_modern
        if self.cache is None or is_full:
            drawn = self.draw(self.read_windows())
        else:
            self.next = self.next or self.prepare_next(self.cache)
            drawn = self.next()
            self.length += 1
        self.new.append(drawn.tokens_B)
        return drawn

    def read_windows(self) -> Tensor:
        """Fill the cache with the latest tokens of each text; return the logits (B, V) after them.

        Texts that are the same so far, such as samples of one prompt, are read once.
        """
        new_BT = torch.stack(self.new, dim=1).tolist() if self.new else [[]] * len(self.windows)
        texts = [old + new for old, new in zip(self.windows, new_BT, strict=True)]
        half = max(1, self.limit // 2)
        self.windows = [text if len(text) <= self.limit else text[-half:] for text in texts]
        self.new, self.length = [], max(map(len, self.windows))
        unlike = list(dict.fromkeys(map(tuple, self.windows)))
        padded = [[0] * (self.length - len(text)) + list(text) for text in unlike]
        starts_U = torch.tensor([self.length - len(text) for text in unlike], device=self.device)
        is_ragged = len({len(text) for text in unlike}) > 1
        read = self.model.new_cache(
            len(unlike), starts_B=starts_U if is_ragged else None, size=self.length
        )
        logits_U1V = self.model(torch.tensor(padded, device=self.device), cache=read, last=1)
        if not logits_U1V.isfinite().all():
            raise ValueError("the model's logits must be finite: its checkpoint is of a failed run")
        place = {text: row for row, text in enumerate(unlike)}
        rows_B = torch.tensor([place[tuple(text)] for text in self.windows], device=self.device)
        self.copy_cache(read, rows_B)
        return logits_U1V[rows_B, -1]

    def copy_cache(self, read: KVCache, rows_B: Tensor) -> None:
        """Go on from these rows of another cache; a static one stays where it is in memory."""
        if self.cache is None or not self.is_static:
            settings = {"size": self.size, "static": self.is_static}
            self.cache = self.model.new_cache(len(rows_B), **settings)
        self.cache.k_LBKSD[..., : self.length, :] = read.k_LBKSD[:, rows_B]
        self.cache.v_LBKSD[..., : self.length, :] = read.v_LBKSD[:, rows_B]
        self.cache.length = self.length
        self.cache.end.fill_(self.length)
        starts_B = None if read.starts_B is None else read.starts_B[rows_B]
        if self.cache.starts_B is None:
            self.cache.starts_B = starts_B
        else:
            self.cache.starts_B.copy_(torch.zeros_like(rows_B) if starts_B is None else starts_B)

    def draw(self, logits_BV: Tensor) -> Drawn:
        uniform_B = self.numbers_NB.index_select(0, self.turn)[0]
        logits_BV = logits_BV[:, : self.vocab_size]
        drawn = choose(logits_BV, self.seen_BV, uniform_B, self.choice, self.top)
        self.turn += 1
        self.tokens_B1.copy_(drawn.tokens_B[:, None])
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, self.tokens_B1, True)
        return drawn

    def prepare_next(self, cache: KVCache) -> Callable[[], Drawn]:
        """How a token is drawn after the first: on a GPU without Python, kernel after kernel."""
        if self.device.type != "cuda":
            return self.draw_next
        state = [cache.end, self.turn, self.tokens_B1]
        return captured(self.draw_next, state if self.seen_BV is None else [*state, self.seen_BV])

    def draw_next(self) -> Drawn:
        """One token more for each text."""
        assert self.cache is not None
        self.cache.length = self.length  # of which capturing a graph lost count
        return self.draw(self.model(self.tokens_B1, cache=self.cache)[:, -1])


def captured(function: Callable[[], Drawn], state: list[Tensor]) -> Callable[[], Drawn]:
    """Record the GPU kernels that `function` starts, and return what starts them all at once.

    docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. It runs a few times before, as
    libraries set themselves up; `state`, which each run advances, is then put back.
    """
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = function()

    def again() -> Drawn:
        graph.replay()
        copies = [None if tensor is None else tensor.clone() for tensor in drawn[1:]]
        return Drawn(drawn.tokens_B.clone(), *copies)

    return again
