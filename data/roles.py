"""Which words belong together in the stories of data/stories.py, by the forms of its sentences.

Attention is causal, so the later word asks: a verb looks at its subject, an object at its verb, a
noun at its adjectives. Of several tokens the last one, which has seen the whole word, is the query;
each token of the earlier word, or of both its words, is a key.
"""

import re

import torch
from torch import Tensor

from data.stories import ROLES, generate
from data.tokenizer import Tokenizer

N_STORIES = 80  # of which about ten have adjectives, and are taken
LENGTH = 128  # tokens of the texts that they are cut into


def find_roles(tokens: list[bytes]) -> dict[str, Tensor]:
    """Return for each role which keys each query (T, T) should see, in a text cut into tokens."""
    text = b"".join(tokens).decode("latin-1")  # a character for each byte
    token_of = [n for n, token in enumerate(tokens) for _ in token]  # that each of them is in
    masks = {role: torch.zeros(len(tokens), len(tokens), dtype=torch.bool) for role in ROLES}
    for role, form in ROLES.items():
        for match in re.finditer(form, text):
            masks[role][token_of[match.end(2) - 1], token_of[slice(*match.span(1))]] = True
    return masks


def tell(tokenizer: Tokenizer, start: int, most: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return texts (B, T) of stories that each begin with `start`, T <= most, and their roles."""
    stories = [story.text for story in generate(N_STORIES, seed=0)]  # none of the dataset's
    taken = [text for text in stories if re.search(ROLES["adjective"], text)]
    tokens = [token for text in taken for token in (start, *tokenizer.encode(text))]
    length = min(LENGTH, most)
    texts_BT = torch.tensor(tokens).unfold(0, length, length)
    found = [find_roles([*map(tokenizer.token_bytes, text)]) for text in texts_BT.tolist()]
    return texts_BT, {role: torch.stack([masks[role] for masks in found]) for role in ROLES}
