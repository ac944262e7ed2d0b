"""The sizes of `bench.py gpu`: those that are measured, and tiny ones that try the parts."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Flags for the two sides, which make them the same model on the same batch."""

    tokenizer: str
    steps: int
    """Of a measurement of speed."""
    tokens_per_step: int
    judged_tokens: int
    """Of the validation split, for the model of each side."""
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    stock: tuple[str, ...] = ()
    """More flags for nanoGPT's stock config of tiny Shakespeare."""
    race: tuple[str, ...] = ()
    """More flags for our config of tiny Shakespeare."""


def flags(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FULL = Sizes(  # GPT-2 124M: 4 passes of 12 sequences of 1,024 tokens
    tokenizer="gpt2",
    steps=40,
    tokens_per_step=48 * 1024,
    judged_tokens=1_000_000,
    ours=flags("--batch_size=48 --micro_batch_size=12 --compile=True"),
    theirs=flags("--batch_size=12 --gradient_accumulation_steps=4 --block_size=1024"),
)
TINY = Sizes(
    tokenizer="byte",
    steps=12,
    tokens_per_step=2 * 16,
    judged_tokens=2000,
    ours=flags(
        "--batch_size=2 --micro_batch_size=2 --compile=False --device=cpu --model.n_layer=1 "
        "--model.n_head=2 --model.n_embd=16 --model.context_length=16"
    ),
    theirs=flags(
        "--batch_size=2 --gradient_accumulation_steps=1 --block_size=16 --n_layer=1 --n_head=2 "
        "--n_embd=16 --device=cpu --compile=False"
    ),
    stock=flags(
        "--device=cpu --compile=False --max_iters=4 --eval_interval=2 --eval_iters=1 "
        "--block_size=16 --batch_size=2 --n_layer=1 --n_head=2 --n_embd=16"
    ),
    race=flags("--max_steps=12 --eval_every=12 --device=cpu"),
)
