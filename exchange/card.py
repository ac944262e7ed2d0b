"""The model card: what a model is, what it was trained on, and how to use it."""

import math
from typing import Any

from torch import Tensor

from model import ModelConfig


def card(
    config: ModelConfig, weights: dict[str, Tensor], about: dict[str, Any], license: str
) -> str:
    """Return the model card, whose first lines are read by the hub and by llama.cpp."""
    counted = [
        w for name, w in weights.items() if name != "lm_head.weight" or not config.tie_embeddings
    ]
    kind = "Qwen3" if config.is_modern else "GPT-2"
    return CARD.format(
        license=f"license: {license}\n" if license else "",
        origin=origin(about),
        kind=kind,
        n_parameters=sum(weight.numel() for weight in counted),
        config=config,
    )


def origin(about: dict[str, Any]) -> str:
    """Return what is known of the training."""
    if not about["data"] or about["best_val_loss"] is None:
        return "Its training text and its loss are not known."
    train, val, loss = about["data"]["train"], about["data"]["val"], about["best_val_loss"]
    bits = loss / math.log(2) * val["tokens"] / val["bytes"]
    return ORIGIN.format(train=train, val=val, step=about["step"], loss=loss, bits=bits)


ORIGIN = """It was trained on {train[documents]:,} documents,
{train[bytes]:,} bytes, {train[tokens]:,} tokens.
After {step:,} updates its loss on {val[tokens]:,} other tokens of the same source was
{loss:.4f} nats per token, {bits:.4f} bits per byte."""
CARD = """---
{license}library_name: transformers
pipeline_tag: text-generation
tags:
- glassgpt
---
# A GPT from GlassGPT

{n_parameters:,} parameters in the form of {kind}: {config.n_layer} layers, {config.n_head} heads,
width {config.n_embd}, a context of {config.context_length:,} and a vocabulary of
{config.vocab_size:,} tokens.

{origin}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

It continues text, and knows no instructions. If its tokenizer has an end-of-text token, texts may
begin with it: `tokenizer.bos_token + "Once"`.
"""
