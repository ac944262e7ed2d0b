"""llama.cpp itself, from the wheel xllamacpp, runs the file and writes our text."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from data.tokenizer import load_tokenizer
from exchange import gguf_file
from helpers import run_here, words
from model import GPT, ModelConfig
from test_exchange import FORMS, random_text, state_of, tokenizers, write_tiny_run

pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
# In a process of its own, which ends although the server's thread may not
SERVER = """
import json, os, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 48
params.n_parallel = 1
params.cpuparams.n_threads = 1
params.warmup = False
params.fit_params = False
params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
for line in sys.stdin:
    path, body = json.loads(line)
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        print("answer", json.dumps(json.load(answer)), flush=True)
os._exit(0)
"""


def ask(path: Path, questions: list[tuple[str, Any]]) -> list[Any]:
    """Return the server's answers to requests."""
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    command = [sys.executable, "-c", SERVER, str(path)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=100)
    found = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert len(found) == len(questions), done.stderr[-2000:]
    return [json.loads(line.removeprefix("answer ")) for line in found]


@torch.no_grad()
def greedy(state: dict[str, Any], tokens: list[int], n: int) -> list[int]:
    model = GPT(ModelConfig(**state["model_config"])).eval()
    model.load_state_dict(state["model"])
    vocab_size = load_tokenizer(state["tokenizer"]).vocab_size
    added: list[int] = []
    for _ in range(n):
        logits_V = model(torch.tensor([tokens + added]))[0, -1, :vocab_size]
        added.append(int(logits_V.argmax()))
    return added


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_writes_our_greedy_text(form: str, name: str, tmp_path: Path):
    tokenizer = tokenizers()[name]
    state = state_of(tokenizer, **FORMS[form])
    gguf_file.export(state, tmp_path / "model.gguf", "f32")
    tokens = tokenizer.encode(words(20, "aeionrstlm"))[:12]
    body = {"prompt": tokens, "n_predict": 20, "temperature": 0, "ignore_eos": True}
    body |= {"return_tokens": True, "cache_prompt": False, "top_k": 1}
    (answer,) = ask(tmp_path / "model.gguf", [("/completion", body)])
    expected = greedy(state, tokens, 20)
    end = gguf_file.LLAMA_CPP_END if tokenizer.end_of_text is None else tokenizer.end_of_text
    if end in expected:  # llama.cpp was told to pass it over
        n = expected.index(end)
        assert answer["tokens"][:n] == expected[:n]
    else:
        assert answer["tokens"] == expected


@pytest.mark.parametrize("name", tokenizers())
def test_llama_cpp_has_our_token_ids(name: str, tmp_path: Path):
    tokenizer = tokenizers()[name]
    gguf_file.export(state_of(tokenizer), tmp_path / "model.gguf", "f32")
    rng = random.Random(0)
    texts = [words(10, "aeionrstlm"), *(random_text(rng).replace("\0", "") for _ in range(100))]
    if name.startswith("char"):
        known = tokenizer.state()["characters"]
        texts = ["".join(rng.choices(known, k=40)) for _ in range(100)]
    questions = [
        ("/tokenize", {"content": text, "add_special": False, "parse_special": False})
        for text in texts
    ]
    answers = ask(tmp_path / "model.gguf", questions)
    assert [answer["tokens"] for answer in answers] == list(map(tokenizer.encode, texts))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_read_and_take_fewer_bytes(kind: Any, tmp_path: Path):
    state = state_of(tokenizers()["byte"])
    gguf_file.export(state, tmp_path / "large.gguf", "f32")
    gguf_file.export(state, tmp_path / "model.gguf", kind)
    sizes = [(tmp_path / name).stat().st_size for name in ("model.gguf", "large.gguf")]
    assert sizes[0] < 0.8 * sizes[1]
    body = {"prompt": [65, 66, 67], "n_predict": 4, "temperature": 0, "return_tokens": True}
    (answer,) = ask(tmp_path / "model.gguf", [("/completion", body)])
    assert answer["tokens"]


def test_convert_writes_the_file_and_a_modelfile_beside_it(tmp_path: Path):
    write_tiny_run(tmp_path)
    flags = (f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'out/model.gguf'}", "--type=f16")
    assert run_here(convert.main, "convert.py", "export", *flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./model.gguf\n")
