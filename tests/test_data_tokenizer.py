"""Tokenizers against tiktoken, nanoGPT's published counts and Python's own UTF-8 codec."""

import contextlib
import hashlib
import json
import random
import socket
import threading
import time
from pathlib import Path

import pytest
import requests
import tiktoken

import data.download
from data.bpe import train_bpe
from data.download import download
from data.gpt2 import gpt2_ranks
from data.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    TextStream,
    Tokenizer,
    cut,
    load_tokenizer,
)

TEXTS = ["", "Hello, world", "naïve 🙂 日本 ☃", "a\r\nb\tc\0", "<|endoftext|>", "  \n\n x ' 's"]


def bpe() -> BPETokenizer:
    return BPETokenizer(train_bpe(["hello world, hello words " * 9], 300, GPT2_PATTERN), kind="bpe")


@pytest.fixture(params=["char", "char with end-of-text", "byte", "bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "gpt2":
            request.getfixturevalue("gpt2_cache")
            return BPETokenizer(gpt2_ranks(), kind="gpt2")
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return bpe()
        case kind:
            return CharTokenizer("".join(TEXTS), with_end_of_text="with" in kind)


def test_decode_undoes_encode(tokenizer: Tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_lie_in_the_vocabulary_and_none_is_end_of_text(tokenizer: Tokenizer):
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.end_of_text not in tokens


def test_a_tokenizer_comes_back_from_its_state_through_json(tokenizer: Tokenizer):
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end_of_text == tokenizer.end_of_text
    assert again.state() == tokenizer.state()
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_stream_shows_only_whole_characters_and_all_of_them(tokenizer: Tokenizer):
    for text in TEXTS:
        stream = TextStream(tokenizer)
        shown = [stream.feed(token) for token in tokenizer.encode(text)]
        assert "".join(shown) == text
        assert stream.flush() == ""


def test_a_stream_that_ends_inside_a_character_ends_with_a_replacement():
    stream = TextStream(ByteTokenizer())
    assert [stream.feed(byte) for byte in "é☃".encode()[:-1]] == ["", "é", "", ""]
    assert stream.flush() == "\ufffd"


def test_tokens_that_are_no_utf8_decode_as_python_replaces_them():
    rng = random.Random(0)
    for _ in range(200):
        data = rng.randbytes(12)
        assert ByteTokenizer().decode(data) == data.decode("utf-8", "replace")
        stream = TextStream(ByteTokenizer())
        shown = "".join(map(stream.feed, data)) + stream.flush()
        assert shown == data.decode("utf-8", "replace")


def test_a_token_outside_the_vocabulary_is_refused_with_its_bounds(tokenizer: Tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"0 to {tokenizer.vocab_size - 1}: got {token}"):
            tokenizer.decode([token])


def test_end_of_text_decodes_to_its_name(tokenizer: Tokenizer):
    if tokenizer.end_of_text is not None:
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_a_lone_surrogate_becomes_a_replacement_character():
    for tokenizer in (ByteTokenizer(), bpe()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_characters_outside_a_character_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"the character vocabulary lacks 'é', '☃': .*bpe"):
        CharTokenizer("abc", with_end_of_text=False).encode("abé☃c☃")
    with pytest.raises(ValueError, match="ud800"):
        CharTokenizer("abc", with_end_of_text=False).encode("\ud800")


def test_characters_are_numbered_in_sorted_order():
    tokenizer = CharTokenizer("hello", with_end_of_text=True)
    assert tokenizer.encode("ehlo") == [0, 1, 2, 3]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (4, 5)


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2s_ranks_and_ids_are_tiktokens_own():
    oracle = tiktoken.get_encoding("gpt2")
    tokenizer = BPETokenizer(gpt2_ranks(), kind="gpt2")
    assert tokenizer.ranks == oracle._mergeable_ranks
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (oracle.eot_token, oracle.n_vocab)
    for text in [*TEXTS, Path(__file__).read_text("utf-8")]:
        assert tokenizer.encode(text) == oracle.encode_ordinary(text)


@pytest.mark.usefixtures("gpt2_cache")
def test_the_fast_pattern_gives_tiktokens_own_ids_of_any_characters():
    oracle = tiktoken.get_encoding("gpt2")
    tokenizer = BPETokenizer(gpt2_ranks(), kind="gpt2")
    rng = random.Random(0)
    separators = " \t\n\r\x0b\x1c\x85\u00a0\u1680\u2009\u2028\u200b\u3000\ufeff"
    alphabets = [
        "'strevmld SDx \n",
        "aé日ⅷ9²٣._-'" + separators,
        separators,
        "".join(chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000),
    ]
    for _ in range(20_000):
        text = "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 40)))
        assert tokenizer.encode(text) == oracle.encode_ordinary(text)


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_gives_nanogpts_published_counts_of_shakespeare(shakespeare: Path):
    tokenizer = BPETokenizer(gpt2_ranks(), kind="gpt2")
    text = shakespeare.read_text("utf-8")
    n = int(len(text) * 0.9)
    assert len(tokenizer.encode(text[:n])) == 301_966
    assert len(tokenizer.encode(text[n:])) == 36_059


def test_cutting_a_text_keeps_its_tokens():
    oracle = bpe()._encoding
    rng = random.Random(1)
    for _ in range(1000):
        text = "".join(rng.choices("hello wo'rds  \n\t\u00a0é1.", k=200)) + " y" * 10
        pieces = cut(text, longest=40)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 40
        if all(piece[0] == " " and piece[1].strip() for piece in pieces[1:]):
            tokens = [token for piece in pieces for token in oracle.encode_ordinary(piece)]
            assert tokens == oracle.encode_ordinary(text)


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6 + "x", "\n" * 10**6 + "x", "\u3000" * 10**6 + "x"]
)
def test_a_million_letters_or_spaces_in_a_row_are_encoded(text: str):
    tokenizer = bpe()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "not the state of a tokenizer"),
        ({"kind": "words"}, "got 'words'"),
        ({"kind": "char"}, "not the state of a tokenizer"),
        ({"kind": "bpe", "pattern": "a", "ranks": "YQ== 0\n"}, "all 256 bytes"),
        ({"kind": "bpe", "pattern": "a", "ranks": "YQ==\n"}, "not enough values"),
        ({"kind": "bpe", "pattern": "a", "ranks": None}, "not the state of a tokenizer"),
    ],
)
def test_a_broken_state_is_refused_with_a_sentence(state: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(state)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(monkeypatch: pytest.MonkeyPatch, data: bytes, status: int = 200) -> None:
    response = requests.Response()
    response.status_code, response._content = status, data
    monkeypatch.setattr(requests, "get", lambda url, timeout: response)


@pytest.mark.usefixtures("empty_cache")
def test_without_network_or_cache_gpt2_names_the_ways_out(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(OSError, match=r"TIKTOKEN_CACHE_DIR.*bpe, byte or char"):
        gpt2_ranks()


def test_gpt2s_vocabulary_is_downloaded_once_and_then_read_from_the_cache(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    name = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    vocabulary = (shakespeare.parent / "tiktoken_cache" / name).read_bytes()
    answer(monkeypatch, vocabulary)
    ranks = gpt2_ranks()
    assert [path.name for path in empty_cache.iterdir()] == [name]
    answer(monkeypatch, b"", status=500)
    assert gpt2_ranks() == ranks
    (empty_cache / name).write_bytes(vocabulary[:-1])
    with pytest.raises(OSError, match="500"):
        gpt2_ranks()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    answer(monkeypatch, b"data")
    sha256 = hashlib.sha256(b"data").hexdigest()
    assert data.download.fetch("http://x", sha256, tmp_path / "file" / "name") == b"data"


def test_a_download_with_another_content_is_refused(monkeypatch: pytest.MonkeyPatch):
    answer(monkeypatch, b"<html>")
    with pytest.raises(OSError, match="not the expected file"):
        download("http://x", "0" * 64)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"])
def test_a_server_that_is_silent_or_sends_a_trickle_is_given_up(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data.download, "DOWNLOAD_SECONDS", 0.5)

    def serve() -> None:
        with server.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(sent)
            for _ in range(40):
                time.sleep(0.1)
                connection.sendall(b"x" if sent else b"")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        started_at = time.perf_counter()
        with pytest.raises(OSError, match=r"cannot download .*Timeout"):
            download(f"http://127.0.0.1:{server.getsockname()[1]}/", "0" * 64)
        assert time.perf_counter() - started_at < 3
