"""A tokenizer.json that is not of our own kinds, such as Qwen3's, run by the `tokenizers` library.

Such a file writes bytes as printable characters, as GPT-2's own files do: " the" is "Ġthe".
"""

from typing import Any

import numpy as np

from data.tokenizer import END_OF_TEXT, Tokenizer, well_formed


def byte_letters() -> str:
    """Return the letter of each byte: itself if it is printable in Latin-1, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= {*range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


LETTERS = byte_letters()
BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}


class HubTokenizer(Tokenizer):
    """Byte pairs with rules of their own: another pattern, Unicode normalisation, added tokens.

    As in the library, added tokens such as "<|im_start|>" are found in a text, too. Raises
    ValueError if the library is absent, or if the file does not spell its tokens in bytes.
    """

    def __init__(self, json: str):
        try:
            from tokenizers import Tokenizer as Library  # wanted for this only
        except ImportError as error:
            raise ValueError("this tokenizer needs a library: pip install tokenizers") from error
        try:
            self._library: Any = Library.from_str(json)
            self._library.no_truncation()
            self._library.no_padding()
            self._added = set(self._library.get_added_tokens_decoder())
            self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
            self._spellings = [self._library.id_to_token(i) for i in range(self.vocab_size)]
            for token in range(self.vocab_size):
                self._bytes(token)
        except Exception as error:  # the library raises no type of its own
            raise ValueError(f"tokenizer.json is no byte-level tokenizer: {error!r}") from error
        self.json = json
        self.end_of_text = self._library.token_to_id(END_OF_TEXT)

    def encode_array(self, text: str) -> np.ndarray:
        found = self._library.encode(well_formed(text), add_special_tokens=False)
        return np.array(found.ids, np.uint32)

    def _bytes(self, token: int) -> bytes:
        spelling = self._spellings[token]
        if token in self._added:
            return spelling.encode()
        return bytes(BYTE_OF[letter] for letter in spelling)

    def state(self) -> dict[str, Any]:
        return {"kind": "hub", "json": self.json}
