"""Generate text from a trained checkpoint, token by token.

    python sample.py --out_dir=out/quickstart --prompt="def main(" --num_samples=3
    echo "def main(" | python sample.py --prompt_file=-
    python sample.py --interactive
    python sample.py --prompts=questions.txt --output=answers.jsonl
    python sample.py --score=book.txt

It reads a prompt once, then one token a step, for many texts at once.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.tokenizer import Tokenizer, load_tokenizer
from engine import checkpoint
from engine.cli import at_least, parse_config, run
from engine.parallel import DeviceName, find_device
from model import GPT, ModelConfig
from sampling.choose import Choice, Drawn
from sampling.decode import Decoder
from sampling.output import Likely, Printer, Sample, records, table_line
from sampling.precision import SamplePrecision, convert
from sampling.prompts import encode_prompt, read_prompts, read_text
from sampling.score import score


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Choice):
    """What to generate, and how to choose each token."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint with the lowest validation loss, or the newest."""
    prompt: str = ""
    """Text to continue; empty starts a new text."""
    prompt_file: Path | None = None
    """File whose text to continue, instead of prompt; - for standard input."""
    prompts: Path | None = None
    """File of prompts to continue: .jsonl with "prompt" or "text", or one a line, as from -."""
    max_new_tokens: int = 200
    """Stop after so many tokens, if the text has not ended before."""
    stop: tuple[str, ...] = ()
    """Texts before which to stop, one or several: --stop "Q:" "END"."""
    num_samples: int = 1
    """Texts for each prompt; each has its own random numbers, whatever their number."""
    batch_size: int = 16
    """Texts that grow at once: memory and speed, not the result."""
    interactive: bool = False
    """Type, and the model goes on; Ctrl-C ends an answer, Ctrl-D the session."""
    output: Path | None = None
    """File for the texts with tokens and log-probabilities, .jsonl, instead of the terminal."""
    show_top: int = 0
    """Show each token's probability, and those of the k likeliest, instead of plain text."""
    score: Path | None = None
    """File to score instead: loss, perplexity, bits per byte; - for standard input."""
    score_stride: int = 1
    """Tokens by which a window of score moves; 1 gives each token all that fits, more is faster."""
    seed: int = 1337
    """Sample i of a prompt is a function of (seed, i)."""
    precision: SamplePrecision = "auto"
    """Of the weights: auto (bfloat16 on a GPU, else float32), float32, bfloat16, int8 (CPU)."""
    device: DeviceName = "auto"
    """Where to run; auto takes the best that is here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "max_new_tokens", "num_samples", "show_top", "seed")
        at_least(1, self, "batch_size", "score_stride")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty: it would stop at once")
        sources = ("prompt", "prompt_file", "prompts", "interactive", "score")
        given = [name for name in sources if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(sources)}: got {' and '.join(given)}")
        for name in ("interactive", "score", "show_top"):
            if self.output and getattr(self, name):
                raise ValueError(f"output keeps the texts of prompts: give it without {name}")


@dataclass(frozen=True)
class Step:
    """What one step adds to one text."""

    row: int
    token: int
    log_p: float | None
    likely: Likely


def generate(
    model: GPT,
    prompts: list[list[int]],
    indices: list[int],
    tokenizer: Tokenizer,
    config: SampleConfig,
) -> Iterator[list[Step]]:
    """Yield the next token of each text; text i is sample indices[i] of prompts[i].

    A GPU is a step ahead: it draws the next tokens while the last ones are read.
    """
    top = max(config.show_top, 0) if config.show_top or config.output else None
    seeds = [(config.seed, index) for index in indices]
    settings = (config, tokenizer.vocab_size, config.max_new_tokens, top)
    decoder = Decoder(model, prompts, seeds, *settings)
    ahead = int(decoder.is_static)
    drawn: deque[Drawn] = deque()
    for _ in range(config.max_new_tokens):
        drawn.append(decoder.step())
        if len(drawn) > ahead:
            yield read(drawn.popleft())
    while drawn:
        yield read(drawn.popleft())


def read(drawn: Drawn) -> list[Step]:
    """Wait for a step, and split it into rows."""
    tokens = drawn.tokens_B.tolist()
    if drawn.log_p_B is None or drawn.top_BK is None or drawn.top_log_p_BK is None:
        return [Step(row, token, None, []) for row, token in enumerate(tokens)]
    pairs = zip(drawn.top_BK.tolist(), drawn.top_log_p_BK.tolist(), strict=True)
    likely = [list(zip(*pair, strict=True)) for pair in pairs]
    rows = enumerate(zip(tokens, drawn.log_p_B.tolist(), likely, strict=True))
    return [Step(row, *values) for row, values in rows]


def grow(
    model: GPT, samples: list[Sample], prompts: list[list[int]], config: SampleConfig
) -> Iterator[tuple[int, str]]:
    """Let samples grow until each has ended; yield (row, what there is to show of it)."""
    indices = [sample.index for sample in samples]
    for steps in generate(model, prompts, indices, samples[0].tokenizer, config):
        for step in steps:
            if samples[step.row].finish_reason is None:
                yield step.row, take(samples[step.row], step, config.show_top > 0)
        if all(sample.finish_reason for sample in samples):
            return
    for row, sample in enumerate(samples):
        if sample.finish_reason is None:
            rest = sample.finish("length")
            yield row, "" if config.show_top else rest


def take(sample: Sample, step: Step, as_table: bool) -> str:
    text = sample.feed(step.token, step.log_p)
    if not as_table or step.log_p is None:
        return text
    return table_line(sample.tokenizer, step.token, step.log_p, step.likely)


def write_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    starts_documents: bool,
    config: SampleConfig,
) -> None:
    """Print the samples of each prompt as their tokens come, or put them into a file."""
    tokens = {text: encode_prompt(text, tokenizer, starts_documents) for text in prompts}
    jobs = [(n, text, i) for n, text in enumerate(prompts, 1) for i in range(config.num_samples)]
    with ExitStack() as stack:
        keep = stack.enter_context(records(config.output)) if config.output else None
        for first in range(0, len(jobs), config.batch_size):
            batch = jobs[first : first + config.batch_size]
            samples = [Sample(text, i, tokenizer, config.stop) for _, text, i in batch]
            pieces = grow(model, samples, [tokens[text] for _, text, _ in batch], config)
            if keep is None:
                show(pieces, samples, [title(n, len(prompts), i, config) for n, _, i in batch])
                continue
            try:
                deque(pieces, maxlen=0)
            finally:
                deque(keep(sample.record()) for sample in samples if sample.finish_reason)
    if config.output:
        print(f"written to {config.output}: {len(jobs)} texts")


def show(pieces: Iterator[tuple[int, str]], samples: list[Sample], titles: list[str]) -> None:
    starts = [title + sample.prompt for title, sample in zip(titles, samples, strict=True)]
    printer = Printer(starts)
    for row, piece in pieces:
        printer.write(row, piece)
        if samples[row].finish_reason:
            printer.end(row)


def title(n: int, n_prompts: int, index: int, config: SampleConfig) -> str:
    of_prompt = f"prompt {n} of {n_prompts}, " if n_prompts > 1 else ""
    return f"--- {of_prompt}sample {index + 1} of {config.num_samples} (seed {config.seed})\n"


def converse(
    model: GPT, tokenizer: Tokenizer, starts_documents: bool, config: SampleConfig
) -> None:
    """Go on with what is typed, line after line, all of it one text."""
    text = ""
    for turn in itertools.count():
        try:
            line = input("> ")
            asked = f"{text}\n{line}" if text else line
            prompt = encode_prompt(asked, tokenizer, starts_documents)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        except ValueError as error:
            print(f"error: {error}")
            continue
        sample = Sample(asked, turn, tokenizer, config.stop)
        with suppress(KeyboardInterrupt):
            for _, piece in grow(model, [sample], [prompt], config):
                print(piece, end="", flush=True)
        print(sample.finish("interrupted"))
        text = asked + sample.text


def load_model(state: dict[str, Any], device: str) -> tuple[GPT, Tokenizer]:
    """Rebuild the model, ready to evaluate, and its tokenizer from a checkpoint."""
    model = GPT(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), load_tokenizer(state["tokenizer"])


def read_input(config: SampleConfig) -> list[str]:
    """The texts to continue, or the one to score."""
    if config.prompts:
        return read_prompts(config.prompts)
    path = config.prompt_file or config.score
    return [read_text(path) if path else config.prompt]


def main() -> None:
    config = parse_config(SampleConfig)
    texts = read_input(config)
    state = checkpoint.load(config.out_dir, config.checkpoint)
    model, tokenizer = load_model(state, find_device(config.device))
    model = convert(model, config.precision)
    starts_documents = state["data"]["train"]["documents"] > 1
    if config.score:
        start = [tokenizer.end_of_text] if starts_documents and tokenizer.end_of_text else []
        tokens = start + tokenizer.encode(texts[0])
        print(f"{config.score}: {score(model, tokenizer, tokens, config.score_stride)}")
    elif config.interactive:
        converse(model, tokenizer, starts_documents, config)
    else:
        write_samples(model, tokenizer, texts, starts_documents, config)


if __name__ == "__main__":
    run(main)
