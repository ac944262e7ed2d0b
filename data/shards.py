"""GPT-2's tokens in the files of other projects, made a dataset where they lie.

A shard of llm.c or modded-nanogpt is NAME_train_000001.bin or NAME_val_000000.bin, or has no number
if it is the only one of its split. It has 256 integers of four bytes (a magic number, the version,
the number of tokens, and zeros), then ids of two bytes each. Documents begin with end-of-text, and
one may go on in the next shard.

nanoGPT has train.bin and val.bin, of ids alone. There documents end with end-of-text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import files
from data.format import FEWEST_TOKENS, META, SHARD_HEADER, SPLITS, token_file
from data.progress import print_left_out
from data.sources import walk
from data.tokenizer import BPETokenizer, Tokenizer, gpt2_ranks
from data.writer import new_dataset

NAME = re.compile(r"(?P<corpus>.+)_(?P<split>train|val)(?:_(?P<number>\d+))?\.bin")
MAGIC = 20240520
LLAMA_MAGIC = 20240801  # of shards with Llama 3's tokens, of four bytes each
VERSION = 1
BLOCK = 2**20  # tokens that are counted at a time


def find_shards(sources: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each split, in order, if the only source is a folder of them.

    Raises ValueError if some are missing, or have other tokens.
    """
    folder = Path(sources[0])
    if len(sources) > 1 or (folder / META).exists():
        return {}
    pair = {split: [folder / token_file(split)] for split in SPLITS}
    if all(path.is_file() for [path] in pair.values()):
        if (folder / "meta.pkl").exists():
            raise ValueError(
                f"{folder} has a vocabulary of its own in meta.pkl, which is not read, as a pickle "
                "can run code: prepare its text again"
            )
        return pair
    named = {path: NAME.fullmatch(path.name) for path in sorted(folder.glob("*.bin"))}
    names = {path: name.groupdict() for path, name in named.items() if name}
    corpora = sorted({name["corpus"] for name in names.values()})
    if len(corpora) > 1:
        raise ValueError(
            f"{folder} must have the shards of one corpus: got those of {', '.join(corpora)}; put "
            "each into a folder of its own"
        )
    found: dict[str, list[Path]] = {}
    for split in SPLITS if names else ():
        found[split] = [path for path, name in names.items() if name["split"] == split]
        check_numbers(folder, split, [names[path]["number"] for path in found[split]])
    return found


def check_numbers(folder: Path, split: str, numbers: Sequence[str | None]) -> None:
    """Raise ValueError if the shards of a split are not one without a number, or have a gap."""
    if list(numbers) == [None]:
        return
    whole = [int(number) for number in numbers if number is not None]
    if not whole or len(whole) < len(numbers) or whole != list(range(whole[0], whole[-1] + 1)):
        raise ValueError(
            f"{folder} must have shards NAME_{split}_NUMBER.bin without a gap, or only "
            f"NAME_{split}.bin: got {len(numbers)}, with the numbers {whole[:10]}; get those that "
            "are missing, or move the others away"
        )


def adopt(shards: dict[str, list[Path]], out: Path, kind: str) -> dict[str, Any]:
    """Make a dataset of files, which stay where they are; return its meta.json."""
    folder = shards["val"][0].parent.resolve()
    header = SHARD_HEADER if NAME.fullmatch(shards["val"][0].name) else 0
    if kind != "gpt2":
        raise ValueError(f"{folder} has tokens of GPT-2: pass --tokenizer=gpt2, not {kind}")
    taken = {path.name for paths in shards.values() for path in paths}
    others = [path for path in walk(folder) if path.parent != folder or path.name not in taken]
    print_left_out("not token files", others)
    tokenizer = BPETokenizer(gpt2_ranks(), kind=kind)
    splits = {split: describe(shards[split], tokenizer) for split in SPLITS}
    with new_dataset(out, tokenizer, splits=()) as writer:
        return writer.commit(shards=str(folder), header=header, splits=splits)


def describe(paths: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what meta.json says about the shards of a split. Raises ValueError if one is wrong."""
    counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    shards: list[dict[str, Any]] = []
    for path in paths:
        tokens_N = open_shard(path)
        for block_n in np.split(tokens_N, range(BLOCK, len(tokens_N), BLOCK)):
            if block_n.max() >= len(counts_V):
                raise ValueError(f"{path} has token {block_n.max()}, which GPT-2 has not")
            counts_V += np.bincount(block_n, minlength=len(counts_V))
        sha256 = files.sha256(path)
        shards.append({"file": path.name, "tokens": len(tokens_N), "sha256": sha256})
    end = tokenizer.end_of_text
    sizes_V = [len(tokenizer.token_bytes(i)) if i != end else 0 for i in range(len(counts_V))]
    return {
        "shards": shards,
        "tokens": int(counts_V.sum()),
        "bytes": int((counts_V * sizes_V).sum()),
        "documents": int(counts_V[end]),
    }


def open_shard(path: Path) -> np.ndarray:
    """Map the ids of a file, (N,), into memory. Raises ValueError if it has none, or a part."""
    size = path.stat().st_size
    if not NAME.fullmatch(path.name):
        if size % 2 or size < 2 * FEWEST_TOKENS:
            raise ValueError(f"{path} must have ids of two bytes each: got {size:,} bytes")
        return np.memmap(path, "<u2", mode="r")
    header = np.fromfile(path, "<i4", SHARD_HEADER // 4)
    magic, version, n = header[:3].tolist() if len(header) == SHARD_HEADER // 4 else (0, 0, 0)
    if magic == LLAMA_MAGIC:
        raise ValueError(f"{path} has tokens of Llama 3, not GPT-2: no tokenizer here reads them")
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(
            f"{path} is no shard: it should begin with {MAGIC}, {VERSION}, not {magic}, {version}"
        )
    expected = SHARD_HEADER + 2 * n
    if n < FEWEST_TOKENS:
        raise ValueError(f"{path} must have {FEWEST_TOKENS} tokens or more: got {n}")
    if size != expected:
        raise ValueError(f"{path} should have {expected:,} bytes, not {size:,}: get it again")
    return np.memmap(path, "<u2", mode="r", offset=SHARD_HEADER)
