"""llama.cpp beside us: the wheel xllamacpp runs a GGUF file of our weights."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import CharTokenizer
from exchange.gguf_file import GGUFType, export
from model import GPT

# In a process of its own, which ends although the server's thread may not
SERVER = """
import json, os, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = int(sys.argv[2])
params.n_parallel = 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
for line in sys.stdin:
    address = server.listening_address + "/completion"
    request = urllib.request.Request(address, line.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        print("answer", json.dumps(json.load(answer)), flush=True)
os._exit(0)
"""
FIRST_LETTER = 0x10000  # of as many characters as there are tokens: only their number matters


class Server:
    """llama.cpp, which continues tokens greedily."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def generate(self, prompt_1T: Tensor, n: int) -> tuple[Tensor, float]:
        """Return the tokens (1, n), and the seconds of each but the first, by its own clock."""
        body: dict[str, Any] = {"prompt": prompt_1T[0].tolist(), "n_predict": n, "top_k": 1}
        body |= {"ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            word, _, answer = line.partition(" ")
            if word == "answer":
                found = json.loads(answer)
                seconds = found["timings"]["predicted_ms"] / 1000
                return torch.tensor([found["tokens"]]), seconds / max(1, n - 1)
        raise ValueError("llama.cpp ended: is the package xllamacpp here?")


@contextmanager
def serve(model: GPT, kind: GGUFType) -> Iterator[Server]:
    """Run llama.cpp with the weights of a model, and as many threads as torch has here."""
    config = model.config
    letters = "".join(map(chr, range(FIRST_LETTER, FIRST_LETTER + config.vocab_size)))
    tokenizer = CharTokenizer(letters, with_end_of_text=False)
    state = {
        "model_config": vars(config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.state(),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        with redirect_stdout(None):  # advice for those who would read the text
            export(state, path, kind)
        command = [sys.executable, "-c", SERVER, str(path), str(config.context_length)]
        command.append(str(torch.get_num_threads()))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, **pipes) as process:
            try:
                yield Server(process)
            finally:
                process.kill()
