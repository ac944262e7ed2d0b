"""Generate text from a trained checkpoint, token by token.

python sample.py --out_dir=out/quickstart --prompt="def main(" --num_samples=3
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data.tokenizer import TextStream, Tokenizer, load_tokenizer
from engine import checkpoint
from engine.cli import at_least, parse_config, run
from engine.parallel import DeviceName, find_device, mix_seed
from model import GPT, ModelConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to generate, and how to choose each token."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint with the lowest validation loss, or the newest."""
    prompt: str = ""
    """Text to continue; empty starts a new text."""
    prompt_file: Path | None = None
    """File whose text to continue, instead of prompt."""
    max_new_tokens: int = 200
    """Stop after so many tokens, if the text has not ended before."""
    num_samples: int = 1
    """Number of texts; each has its own random numbers, whatever their number."""
    temperature: float = 0.8
    """Divides the logits: below 1 likelier tokens, 0 always the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Choose among the fewest tokens that together have this probability; 1 for all."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the likeliest; 0 for all."""
    seed: int = 1337
    """Sample i is a function of (seed, i)."""
    device: DeviceName = "auto"
    """Where to run; auto takes the best that is here."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompt_file is not None:
            raise ValueError("give prompt or prompt_file, not both")
        at_least(0, self, "max_new_tokens", "num_samples", "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]: got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1]: got {self.min_p}")


def distribution(logits_V: Tensor, config: SampleConfig) -> Tensor:
    """Probabilities (V,) of the next token: temperature, then top-k, top-p and min-p in turn.

    Each step cuts what the one before left: top-p (Holtzman et al., 2019, arXiv 1904.09751)
    counts the probability within the k likeliest. Equal logits at the edge of k all stay.
    """
    # below the largest and in double, so that no temperature above 0 overflows
    logits_V = (logits_V - logits_V.max()).double() / config.temperature
    if 0 < config.top_k < len(logits_V):
        least = logits_V.topk(config.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if config.top_p < 1:
        sorted_V, order_V = F.softmax(logits_V, dim=-1).sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V  # what the likelier tokens have already
        logits_V = logits_V.index_fill(0, order_V[before_V >= config.top_p], -torch.inf)
    probabilities_V = F.softmax(logits_V, dim=-1)
    if config.min_p > 0:  # Nguyen et al., 2024 (arXiv 2407.01082)
        least = config.min_p * probabilities_V.max()
        probabilities_V = probabilities_V.masked_fill(probabilities_V < least, 0)
    return probabilities_V / probabilities_V.sum()


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], tokenizer: Tokenizer, config: SampleConfig, index: int
) -> Iterator[int]:
    """Yield the tokens of sample `index` until the text ends or max_new_tokens are there.

    A full cache is emptied and filled again from the latest half of the context, so that
    text goes on past context_length and a token sees between half and all of it.
    """
    limit = model.config.context_length
    random = torch.Generator().manual_seed(mix_seed(config.seed, index))
    text, unseen, cache = list(prompt), prompt[-limit:], model.new_cache(1)
    for _ in range(config.max_new_tokens):
        if cache[0].length + len(unseen) > limit:
            unseen, cache = text[-max(1, limit // 2) :], model.new_cache(1)
        tokens_BT = torch.tensor([unseen], device=model.wte.weight.device)
        logits_V = model(tokens_BT, cache=cache)[0, -1, : tokenizer.vocab_size].float().cpu()
        if config.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial(distribution(logits_V, config), 1, generator=random))
        if token == tokenizer.end_of_text:
            return
        yield token
        text.append(token)
        unseen = [token]


def write_samples(
    model: GPT, tokenizer: Tokenizer, prompt: list[int], config: SampleConfig
) -> None:
    """Print the samples as their tokens come, each after a line that numbers it."""
    for index in range(config.num_samples):
        stream = TextStream(tokenizer)
        print(f"--- sample {index + 1} of {config.num_samples} (seed {config.seed})")
        print(config.prompt, end="")
        for token in generate(model, prompt, tokenizer, config, index):
            print(stream.feed(token), end="", flush=True)
        print(stream.flush())


def encode_prompt(text: str, tokenizer: Tokenizer, starts_documents: bool) -> list[int]:
    """Token ids of the prompt; of an empty one, whatever starts a text in this dataset."""
    if text:
        return tokenizer.encode(text)
    if starts_documents and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except ValueError:  # a character vocabulary without line ends
        return [0]


def read_text(path: Path) -> str:
    """Read a prompt. Raises ValueError that names the file if it is not UTF-8."""
    try:
        return path.read_bytes().decode()  # line ends as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def load_model(state: dict[str, Any], device: str) -> tuple[GPT, Tokenizer]:
    """Rebuild the model, ready to evaluate, and its tokenizer from a checkpoint."""
    model = GPT(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), load_tokenizer(state["tokenizer"])


def main() -> None:
    config = parse_config(SampleConfig)
    state = checkpoint.load(config.out_dir, config.checkpoint)
    model, tokenizer = load_model(state, find_device(config.device))
    if config.prompt_file is not None:
        config = replace(config, prompt=read_text(config.prompt_file), prompt_file=None)
    prompt = encode_prompt(config.prompt, tokenizer, state["data"]["train"]["documents"] > 1)
    write_samples(model, tokenizer, prompt, config)


if __name__ == "__main__":
    run(main)
