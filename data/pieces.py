"""Prepare a large corpus in pieces, one for some of its files, on all cores.

    pieces_1f3a9c04/train_00012.bin, val_00012.bin    the tokens of a piece
    pieces_1f3a9c04/00012.json                        their sizes and SHA-256: the piece is whole
    pieces_1f3a9c04/tokenizer.json                    what all pieces are encoded with

A preparation that is interrupted, and started again with the same sources and settings, makes the
pieces that are missing. The name of their folder is a hash of those, so others begin anew.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cli
from data.encode import check_end_of_text, encode_part
from data.format import SPLITS, token_dtype
from data.learn import Learn
from data.progress import progress
from data.sources import Corpus
from data.split import Scan
from data.tokenizer import Tokenizer, load_tokenizer
from data.writer import TokenFile, new_dataset
from files import readable, sha256, sync_folder, whole, write_text

TOKENIZER = "tokenizer.json"
PIECE_BYTES = 2**29  # of text: about a hundred million tokens
VAL_FRACTION = 0.001  # of a large corpus: more would be evaluated for hours
PACKED = {".parquet": 2.5, ".gz": 3.0}  # bytes of text for a byte in such a file, roughly


@dataclass(frozen=True)
class Piece:
    """Some files of a corpus, and where their tokens go."""

    number: int
    corpus: Corpus
    val_fraction: float
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / f"{self.number:05d}.json"

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path, _ in self.corpus.files)

    def file(self, split: str) -> Path:
        return self.folder / f"{split}_{self.number:05d}.bin"

    def is_whole(self) -> bool:
        """Return whether the piece is there as it was written."""
        if not self.record.exists():
            return False
        with suppress(ValueError, LookupError, TypeError, RecursionError):  # it is made again
            record = json.loads(self.record.read_text(encoding="utf-8"))
            return all(
                self.file(split).exists() and sha256(self.file(split)) == record[split]["sha256"]
                for split in SPLITS
            )
        return False


def cut(corpus: Corpus) -> Iterator[Corpus]:
    """Yield the files of a corpus in groups of about PIECE_BYTES of text."""
    group = []
    n_bytes = 0.0
    for path, read in corpus.files:
        group.append((path, read))
        n_bytes += path.stat().st_size * PACKED.get(path.suffix.lower(), 1.0)
        if n_bytes >= PIECE_BYTES:
            yield replace(corpus, files=tuple(group))
            group = []
            n_bytes = 0.0
    if group:
        yield replace(corpus, files=tuple(group))


def write(
    out: Path, corpora: tuple[Corpus, ...], settings: dict[str, Any], learn: Learn
) -> dict[str, Any]:
    """Make a dataset of all pieces; return its meta.json, with the settings in it."""
    paths = [path for corpus in corpora for path, _ in corpus.files]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    known = None
    if learn.known is not None:
        check_end_of_text(learn.known)
        known = learn.known.state()
    about = json.dumps([settings, files, len(corpora), learn.kind, learn.vocab_size, known])
    folder = out / f"pieces_{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.partial"):  # of a process that was killed
        path.unlink()
    tokenizer = known_tokenizer(folder, learn)
    fraction = settings["val_fraction"]
    pieces = [Piece(number, corpus, fraction, folder) for number, corpus in enumerate(corpora)]
    write_missing(pieces)
    records = [json.loads(piece.record.read_text(encoding="utf-8")) for piece in pieces]
    splits = {split: joined([record[split] for record in records]) for split in SPLITS}
    with new_dataset(out, tokenizer, splits=()) as writer:
        meta = writer.commit(shards=folder.name, header=0, **settings, splits=splits)
    for other in set(out.glob("pieces_" + 8 * "[0-9a-f]")) - {folder}:
        if (other / TOKENIZER).exists():
            shutil.rmtree(other)
    return meta


def known_tokenizer(folder: Path, learn: Learn) -> Tokenizer:
    """Return the tokenizer of the pieces that are there, or make one, and keep it."""
    path = folder / TOKENIZER
    if not path.exists():
        write_text(path, json.dumps(learn.tokenizer().state()))
    with readable(path):
        return load_tokenizer(json.loads(path.read_text(encoding="utf-8")))


def write_missing(pieces: list[Piece]) -> None:
    """Write the pieces that are not there, or damaged, in a process for each core."""
    n_there = sum(piece.record.exists() for piece in pieces)
    if n_there:
        print(f"{n_there} of {len(pieces)} pieces are there already: their SHA-256 is compared")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(mp_context=context, initializer=begin_worker)
    with pool, progress("encode", sum(piece.bytes for piece in pieces)) as bar:
        try:
            futures = {pool.submit(write_piece, piece): piece for piece in pieces}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future].bytes)
        except BrokenProcessPool:
            way_out = "run it again, which makes the pieces that are missing"
            raise OSError(f"a process was killed, is there enough memory? {way_out}") from None
        except BaseException:  # Ctrl-C as well: what is half done is lost
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def begin_worker() -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the first, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_first, daemon=True).start()


def end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)


def write_piece(piece: Piece) -> None:
    """Encode the documents of a piece, unless it is there; each goes whole to one split."""
    if piece.is_whole():
        return
    tokenizer = load_tokenizer(json.loads((piece.folder / TOKENIZER).read_bytes()))
    dtype = token_dtype(tokenizer.vocab_size)
    scan = Scan(val_fraction=piece.val_fraction, goes_whole=True)
    try:
        with ExitStack() as stack:
            streams = {s: stack.enter_context(whole(piece.file(s), "wb")) for s in SPLITS}
            files = {split: TokenFile(stream, dtype) for split, stream in streams.items()}
            for part in scan.parts(piece.corpus):
                files[part.split].write(encode_part(part, tokenizer, separate=True))
    except (OSError, ValueError) as error:  # not all of these can be sent to another process
        raise ValueError(cli.sentence(error)) from None
    record = {s: file.describe(s) | {"file": piece.file(s).name} for s, file in files.items()}
    sync_folder(piece.folder)  # a record is of files that outlive a power cut
    write_text(piece.record, json.dumps(record))


def joined(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what meta.json says about a split that lies in these files."""
    counts = {name: sum(s[name] for s in shards) for name in ("tokens", "bytes", "documents")}
    return {"shards": [shard for shard in shards if shard["tokens"]], **counts}
