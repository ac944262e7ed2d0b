"""GPT-2's vocabulary: 256 bytes and 50,000 merges, published by OpenAI in 2019."""

import hashlib
import os
import tempfile
from pathlib import Path

from data.download import fetch

# The address, and therefore the name in the cache, that tiktoken.get_encoding("gpt2") uses: they
# share what either has downloaded. (That function waits for ever for a server that is silent.)
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def gpt2_ranks() -> dict[bytes, int]:
    """Return GPT-2's tokens and their ranks. Raises OSError with neither cache nor network."""
    path = cache_folder() / hashlib.sha1(URL.encode()).hexdigest()
    try:
        merges = fetch(URL, SHA256, path).decode()
    except OSError as error:
        raise OSError(
            f"GPT-2's vocabulary is not in {path.parent}, and {error}: point TIKTOKEN_CACHE_DIR "
            "at a folder that has it, or take --tokenizer=bpe, byte or char, which need no download"
        ) from error
    byte_of = byte_alphabet()
    tokens = [bytes([byte]) for byte in byte_of.values()]
    for line in merges.splitlines()[1:]:  # the first says the version
        tokens.append(bytes(byte_of[character] for character in line.replace(" ", "")))
    return {token: rank for rank, token in enumerate(tokens)}


def cache_folder() -> Path:
    """Return the folder where tiktoken, too, keeps what it has downloaded."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir(), "data-gym-cache")


def byte_alphabet() -> dict[str, int]:
    """Return the visible character by which vocab.bpe writes each byte, in the order of ranks.

    A byte that is a visible Latin-1 character stands for itself; the others, in order, are
    written as the characters from 256 on: a space, the 33rd of them, is "\\u0120" (Ġ).
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}
