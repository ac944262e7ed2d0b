"""Generate text from a trained checkpoint, token by token.

    python sample.py --out_dir=out/quickstart --prompt="ROMEO:" --num_samples=3
    echo "def main(" | python sample.py --prompt_file=-
    python sample.py --interactive
    python sample.py --prompts=questions.txt --output=answers.jsonl
    python sample.py --score=book.txt

`generate` is the loop: read the prompts, choose a token, yield it, feed it. What becomes of the
tokens follows below, and in sampling/.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from cli import at_least, parse_config, run
from engine.device import DeviceName
from model import GPT, require
from sampling.choose import Choice, Drawn, choose
from sampling.converse import Conversation, converse
from sampling.decode import Decoder, random_numbers, tokens_seen
from sampling.fastest import fastest
from sampling.load import Trained, load_model
from sampling.lookup import generate_by_lookup
from sampling.output import Sample, grow, read_steps, records, show
from sampling.precision import SamplePrecision, convert
from sampling.prompts import encode_prompt, line_joint, read_prompts, read_text
from sampling.score import score_text


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    seeds: list[tuple[int, ...]],
    max_new_tokens: int,
    vocab_size: int,
    choice: Choice,
    top: int | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Drawn]:
    """Yield the next token of each text; text i continues prompts[i] with the numbers of seeds[i].

    A model's vocabulary may be padded: ids from vocab_size on are never chosen. `top` asks for
    log-probabilities, as `choose` explains. A `decoder` may have read a part of these texts.
    """
    decoder = decoder or Decoder(model, prompts, max_new_tokens)
    numbers = random_numbers(seeds, decoder.device)
    seen_BV = tokens_seen(prompts, vocab_size, decoder.device)
    logits_BV = decoder.read()
    for _ in range(max_new_tokens):
        drawn = choose(logits_BV[:, :vocab_size], seen_BV, next(numbers), choice, top)
        yield drawn
        seen_BV.scatter_(1, drawn.tokens_B[:, None], True)
        logits_BV = decoder.feed(drawn.tokens_B)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Choice):
    """What to generate, and how to choose each token."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """Take the checkpoint with the lowest validation loss, or the newest."""
    prompt: str = ""
    """Text to continue; an empty one starts a new text."""
    prompt_file: Path | None = None
    """File whose text to continue, instead of prompt; - is standard input."""
    prompts: Path | None = None
    """File of prompts to continue, one per line; in .jsonl their field is "prompt" or "text"."""
    max_new_tokens: int = 200
    """Stop after this many tokens, if the text has not ended before."""
    stop: tuple[str, ...] = ()
    """Strings before which to stop: --stop "Q:" "END"."""
    num_samples: int = 1
    """Samples of each prompt."""
    batch_size: int = 16
    """Texts that grow at once; affects memory and speed, not results."""
    lookup: bool = False
    """Guess tokens that followed earlier in the text: faster where it repeats itself, same text."""
    interactive: bool = False
    """Type, and the model goes on; Ctrl-C ends an answer, Ctrl-D the session."""
    output: Path | None = None
    """File (.jsonl) for texts, tokens and log-probabilities, instead of the terminal."""
    show_top: int = 0
    """Show each token's probability beside those of the k likeliest; 0 shows none."""
    score: Path | None = None
    """File to score instead: loss, perplexity, bits per byte; - is standard input."""
    score_stride: int = 1
    """Stride of the scoring window; 1 gives every token full context, larger is faster."""
    seed: int = 1337
    """Random seed; sample i of a prompt is a function of seed and i."""
    precision: SamplePrecision = "auto"
    """Weights: auto takes the fastest that keeps the loss; float16 and int8 are for a CPU."""
    device: DeviceName = "auto"
    """Device to run on; auto takes the best that is here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "max_new_tokens", "num_samples", "show_top", "seed")
        at_least(1, self, "batch_size", "score_stride")
        require("" not in self.stop, "a stop string must not be empty: it would stop at once")
        sources = ("prompt", "prompt_file", "prompts", "interactive", "score")
        given = [name for name in sources if getattr(self, name)]
        require(len(given) < 2, f"give one of {', '.join(sources)}: got {' and '.join(given)}")
        for name in ("interactive", "score", "show_top"):
            is_both = self.output and getattr(self, name)
            require(not is_both, f"output keeps the texts of prompts: give it without {name}")


def grow_samples(
    model: GPT, samples: list[Sample], config: SampleConfig, decoder: Decoder | None = None
) -> Iterator[tuple[int, str]]:
    """Write until every sample has ended; yield (row, text) of what can be shown.

    A sample ends at end-of-text, a stop string or its last token; what would follow is dropped.
    """
    prompts = [sample.prompt_tokens for sample in samples]
    seeds = [(config.seed, sample.index) for sample in samples]
    n = config.max_new_tokens
    top = config.show_top if config.show_top or config.output else None
    write = generate_by_lookup if config.lookup else generate
    draws = write(model, prompts, seeds, n, samples[0].tokenizer.vocab_size, config, top, decoder)
    ahead = 1 if model.wte.weight.is_cuda else 0  # a GPU computes a step while one is read
    # islice stops at the last token, which the loop of `generate` would still feed
    return grow(read_steps(islice(draws, n), ahead), samples, as_table=config.show_top > 0)


def write_samples(trained: Trained, prompts: list[str], config: SampleConfig) -> None:
    """Print the samples of each prompt as their tokens come, or put them into a file."""
    tokens = [encode_prompt(prompt, trained) for prompt in prompts]
    samples = [
        Sample(prompt, prompt_tokens, i, trained.tokenizer, config.stop)
        for prompt, prompt_tokens in zip(prompts, tokens, strict=True)
        for i in range(config.num_samples)
    ]
    batch_size = 1 if config.lookup else config.batch_size
    starts = range(0, len(samples), batch_size)
    batches = [samples[start : start + batch_size] for start in starts]
    if config.output is None:
        for start, batch in zip(starts, batches, strict=True):
            titles = [title(start + i, len(prompts), config) for i in range(len(batch))]
            show(grow_samples(trained.model, batch, config), batch, titles)
        return
    with records(config.output) as keep:
        for batch in batches:
            try:
                deque(grow_samples(trained.model, batch, config), maxlen=0)  # run to the end
            finally:  # after Ctrl-C, too, keep what is finished
                keep(sample.record() for sample in batch if sample.finish_reason is not None)
    print(f"written to {config.output}: {len(samples)} texts")


def title(n: int, n_prompts: int, config: SampleConfig) -> str:
    prompt, index = divmod(n, config.num_samples)
    of_prompt = f"prompt {prompt + 1} of {n_prompts}, " if n_prompts > 1 else ""
    return f"--- {of_prompt}sample {index + 1} of {config.num_samples} (seed {config.seed})\n"


def talk(trained: Trained, config: SampleConfig) -> None:
    """Let the model answer what is typed."""

    def begin(text: str, turn: int) -> Sample:
        return Sample(text, encode_prompt(text, trained), turn, trained.tokenizer, config.stop)

    def answer(sample: Sample) -> Iterator[str]:
        conversation.turn(sample.prompt_tokens)
        return (piece for _, piece in grow_samples(trained.model, [sample], config, conversation))

    conversation = Conversation(trained.model)

    converse(begin, answer, line_joint(trained.tokenizer))


def main() -> None:
    config = parse_config(SampleConfig)
    path = config.prompt_file or config.score
    text = read_text(path) if path else config.prompt
    prompts = read_prompts(config.prompts) if config.prompts else [text]
    trained = load_model(config.out_dir, config.checkpoint, config.device)
    is_chosen = config.precision == "auto" and not config.score  # scores are exact
    precision = fastest(trained, config.out_dir) if is_chosen else config.precision
    convert(trained.model, precision, min(config.batch_size, config.num_samples * len(prompts)))
    if config.score:
        print(f"{config.score}: {score_text(trained, text, config.score_stride)}")
    elif config.interactive:
        talk(trained, config)
    else:
        write_samples(trained, prompts, config)


if __name__ == "__main__":
    run(main)
