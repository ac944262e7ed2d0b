"""What convert.py writes is opened by the libraries that it is for, and comes back the same."""

import functools
import hashlib
import json
import random
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors

import convert
import files
from data.bpe import train_bpe
from data.hub_tokenizer import HubTokenizer
from data.loader import Dataset
from data.prepare import PrepareConfig, main, prepare
from data.tokenizer import GPT2_PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from exchange import architecture, gguf_file, hub_folder, hub_models, vocabulary
from helpers import TINY, contents, run_here, train_here, words, write_dataset
from model import GPT, ModelConfig
from sampling.load import load_model

transformers = pytest.importorskip("transformers")
FORMS = {
    "gpt2": {"architecture": "gpt2"},
    "gpt2, padded": {"architecture": "gpt2", "padding": 7},
    "modern, untied": {"architecture": "modern", "tie_embeddings": False},
    "modern, tied": {"architecture": "modern"},
    "modern, wide heads": {"architecture": "modern", "head_dim": 16, "n_inner": 96},
    "modern, grouped": {"architecture": "modern", "n_kv_head": 2, "rope_theta": 123.0},
}


def tokenizers() -> dict[str, Tokenizer]:
    text = words(160, "aeionrstlmé…")
    return {
        "bpe": learned(text),
        "byte": ByteTokenizer(),
        "char": CharTokenizer(text + "é日😀\n", with_end_of_text=True),
        "char, no end": CharTokenizer(text, with_end_of_text=False),
    }


def learned(text: str) -> BPETokenizer:
    return BPETokenizer(train_bpe([text], 400, GPT2_PATTERN), kind="bpe")


def state_of(tokenizer: Tokenizer, padding: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a checkpoint of a random model."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 48, **changes}
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size + padding, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    split = {"documents": 3, "tokens": 900, "bytes": 2000}
    return {
        "step": 7,
        "best_val_loss": 1.5,
        "data": {"train": split, "val": split},
        "model_config": vars(model.config),
        "tokenizer": tokenizer.state(),
        "model": model.state_dict(),
    }


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_transformers_opens_the_folder_and_computes_our_logits(
    form: str, name: str, tmp_path: Path
):
    tokenizer = tokenizers()[name]
    state = state_of(tokenizer, **FORMS[form])
    hub_folder.export(state, tmp_path / "model", license="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = GPT(ModelConfig(**state["model_config"])).eval()
    ours.load_state_dict(state["model"])
    tokens = tokenizer.encode(words(20, "aeionrstlm"))[:20]
    inputs = their_tokenizer(tokenizer.decode(tokens), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tokens]
    prompt_1T = torch.tensor([tokens])
    logits_1TV = ours(prompt_1T)[..., : tokenizer.vocab_size]
    torch.testing.assert_close(theirs(**inputs).logits, logits_1TV, atol=1e-4, rtol=0)
    greedy: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found = theirs.generate(**inputs, **greedy, eos_token_id=None)[0].tolist()
    for _ in range(20):
        logits_V = ours(torch.tensor([tokens]))[0, -1, : tokenizer.vocab_size]
        tokens = [*tokens, int(logits_V.argmax())]
    assert found == tokens


def random_text(rng: random.Random) -> str:
    kinds = ("abc de\n\t  '", "éß日本語😀\u0301", "0123 .,;!?'s'll", "\u00a0\u2003\r\n\0\x7f\ufeff")
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 60)))


@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_their_tokenizer_has_our_ids_for_random_strings_and_back(name: str):
    tokenizer = tokenizers()[name]
    theirs = library(tokenizer)
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        tokens = tokenizer.encode(text)
        assert theirs.encode(text).ids == tokens
        assert theirs.decode(tokens) == text


def library(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of the `tokenizers` library."""
    from tokenizers import Tokenizer as Theirs

    return Theirs.from_str(json.dumps(vocabulary.to_json(tokenizer)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_their_tokenizer_has_our_ids_for_every_code_point(name: str):
    tokenizer = tokenizers()[name]
    theirs = library(tokenizer)
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for first in range(0, len(points), 4000):
        text = " a".join(map(chr, points[first : first + 4000]))
        assert theirs.encode(text).ids == tokenizer.encode(text), hex(points[first])


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("form", FORMS)
def test_what_was_exported_and_imported_is_exported_to_the_same_bytes(
    form: str, name: str, tmp_path: Path
):
    state = state_of(tokenizers()[name], **FORMS[form])
    hub_folder.export(state, tmp_path / "first", license="mit")
    hub_folder.export(hub_folder.read(tmp_path / "first"), tmp_path / "second", license="mit")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_who_can_read_one_file_of_a_folder_can_read_all(tmp_path: Path):
    hub_folder.export(state_of(tokenizers()["byte"]), tmp_path / "model", license="")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


# --- What others wrote ----------------------------------------------------------------------------


def gpt2_of_transformers(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50257}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)).eval()


def save_gpt2(model: Any, folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    """Save a model as transformers does, with a tokenizer.json of the same vocabulary."""
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary.to_json(tokenizer)))
    return folder


def imported(source: Path, out_dir: Path, *flags: object) -> Any:
    assert (
        run_here(convert.main, "convert.py", "import", source, f"--out_dir={out_dir}", *flags) == 0
    )
    return load_model(out_dir, "best", "cpu")


PROMPT_1T = torch.arange(10, 30)[None]


@pytest.mark.parametrize("shards", [False, True])
@torch.no_grad()
def test_a_folder_that_transformers_saved_computes_its_logits_here(shards: bool, tmp_path: Path):
    tokenizer = tokenizers()["bpe"]
    theirs = gpt2_of_transformers(vocab_size=tokenizer.vocab_size)
    options = {"max_shard_size": "20KB"} if shards else {}
    folder = save_gpt2(theirs, tmp_path / "theirs", tokenizer, **options)
    assert (folder / hub_folder.INDEX).exists() is shards
    model, ours, *_ = imported(folder, tmp_path / "run")
    assert ours.state()["ranks"] == tokenizer.state()["ranks"]
    torch.testing.assert_close(model(PROMPT_1T), theirs(PROMPT_1T).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("head_dim", "n_inner"), [(8, 96), (16, 80)])
@torch.no_grad()
def test_a_qwen3_of_any_proportions_computes_its_logits_here(
    head_dim: int, n_inner: int, tied: bool, tmp_path: Path
):
    tokenizer = tokenizers()["byte"]
    theirs = qwen3_of_transformers(
        head_dim=head_dim, intermediate_size=n_inner, tie_word_embeddings=tied
    )
    folder = save_gpt2(theirs, tmp_path / "theirs", tokenizer)
    model, *_ = imported(folder, tmp_path / "run")
    assert model.config.rope_theta == 500.0
    expected = theirs(PROMPT_1T).logits[..., : tokenizer.vocab_size]
    torch.testing.assert_close(model(PROMPT_1T), expected, atol=1e-4, rtol=0)


def qwen3_of_transformers(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 48, "vocab_size": 800}  # padded
    rope: dict[str, Any] = {"rope_theta": 500.0}  # as transformers 4 wants it
    rope |= {"rope_parameters": {"rope_type": "default", **rope}}
    config = transformers.Qwen3Config(**sizes | rope | changes)
    return transformers.Qwen3ForCausalLM(config).eval()


QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen3_tokenizer() -> Any:
    """Learn a tokenizer of the form of Qwen3's: NFC, another pattern, many added tokens."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers.trainers import BpeTrainer

    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    library.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    library.train_from_iterator([words(400, "aeionrstlmé…")], trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    library.add_tokens([AddedToken("<think>", normalized=False)])
    return library


@torch.no_grad()
def test_a_qwen3_with_its_own_tokenizer_comes_in_and_goes_out_with_its_ids(tmp_path: Path):
    library = qwen3_tokenizer()
    theirs = qwen3_of_transformers()
    theirs.save_pretrained(tmp_path / "theirs")
    library.save(str(tmp_path / "theirs/tokenizer.json"))
    model, ours, *_ = imported(tmp_path / "theirs", tmp_path / "run")
    assert model.config.vocab_size == ours.vocab_size == library.get_vocab_size()
    assert ours.end_of_text == library.token_to_id("<|endoftext|>")
    rng = random.Random(0)
    texts = ["<|im_start|>é e\u0301<think>\n\nIt's 1234<|im_end|>"]
    texts += [random_text(rng) for _ in range(500)]
    for text in texts:
        tokens = library.encode(text).ids
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == library.decode(tokens, skip_special_tokens=False)
    flags = (f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
    assert run_here(convert.main, "convert.py", "export", *flags) == 0
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [auto(text)["input_ids"] for text in texts] == list(map(ours.encode, texts))
    prompt_1T = PROMPT_1T
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(opened(prompt_1T).logits, model(prompt_1T), atol=1e-4, rtol=0)
    prepared = ("--tokenizer", tmp_path / "run", "--out", tmp_path / "prepared")
    (tmp_path / "words.txt").write_text(words(300, "aeionrstlmé…"), encoding="utf-8")
    assert run_here(main, "prepare.py", tmp_path / "words.txt", *prepared) == 0
    assert Dataset.open(tmp_path / "prepared").tokenizer.state() == ours.state()


def test_a_width_that_q8_0_cannot_store_is_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(ValueError, match=r"multiples of 32: got \(48, 48, 192\); take f16"):
        gguf_file.export(state_of(ByteTokenizer(), n_embd=48), tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_hubs_tokenizer_cuts_pads_and_adds_nothing():
    from tokenizers.processors import TemplateProcessing

    library = qwen3_tokenizer()
    plain = HubTokenizer(library.to_str())
    library.enable_truncation(5)
    library.enable_padding(length=50)
    end = library.token_to_id("<|im_end|>")
    library.post_processor = TemplateProcessing("$A <|im_end|>", None, [("<|im_end|>", end)])
    ours = HubTokenizer(library.to_str())
    text = words(30, "aeionrstlm")
    assert ours.encode(text) == plain.encode(text)
    assert len(ours.encode(text)) > 50
    assert ours.encode("a") == plain.encode("a") == [library.token_to_id("a")]
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")


def test_a_gguf_file_of_a_hub_tokenizer_is_refused_with_the_way_out(tmp_path: Path):
    state = state_of(HubTokenizer(qwen3_tokenizer().to_str()))
    with pytest.raises(ValueError, match="export a folder instead"):
        gguf_file.export(state, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def nanogpt_checkpoint(model: Any, path: Path, bias: bool, prefix: str) -> Path:
    """Save a model of transformers as nanoGPT's train.py does: (out, in), with all its names."""
    state = {}
    for name, weight in model.state_dict().items():
        is_matrix = weight.ndim == 2 and ".h." in name
        if bias or not name.endswith(".bias"):
            state[prefix + name] = weight.T.contiguous() if is_matrix else weight
    sizes = model.config
    arguments = {"n_layer": sizes.n_layer, "n_head": sizes.n_head, "n_embd": sizes.n_embd}
    arguments |= {"block_size": sizes.n_positions, "vocab_size": sizes.vocab_size}
    arguments |= {"bias": bias, "dropout": 0.0}
    saved = {"model": state, "model_args": arguments, "iter_num": 9, "optimizer": {}, "config": {}}
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_nanogpts_checkpoint_computes_its_logits_here(bias: bool, prefix: str, tmp_path: Path):
    dataset = write_dataset(tmp_path)
    tokenizer = hub_folder.load_tokenizer(load_state(dataset))
    theirs = gpt2_of_transformers(vocab_size=tokenizer.vocab_size + 3)
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1 if bias else 0.0)
    path = nanogpt_checkpoint(theirs, tmp_path / "ckpt.pt", bias, prefix)
    model, ours, *_ = imported(path, tmp_path / "run", f"--data={dataset}")
    assert ours.state() == tokenizer.state()
    prompt_1T = PROMPT_1T % tokenizer.vocab_size
    expected = theirs(prompt_1T).logits[..., : tokenizer.vocab_size]
    torch.testing.assert_close(model(prompt_1T), expected, atol=1e-4, rtol=0)


def load_state(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / "meta.json").read_text())["tokenizer"]


def llmc_file(model: Any, path: Path, version: int) -> Path:
    """Write a model of transformers as llm.c's train_gpt2.py does, with a padded vocabulary."""
    sizes = model.config
    padded = sizes.vocab_size + 5
    header = np.zeros(256, np.int32)
    shape = (sizes.n_positions, sizes.vocab_size, sizes.n_layer, sizes.n_head, sizes.n_embd)
    header[:8] = [20240326, version, *shape, padded]
    state = {name.removeprefix("transformer."): w for name, w in model.state_dict().items()}
    wte = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, 5))
    tensors = [wte, state["wpe.weight"]]
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            for i in range(sizes.n_layer):
                weight = state[f"h.{i}.{layer}.{kind}"]
                tensors.append(weight.T if weight.ndim == 2 else weight)
    tensors += [state["ln_f.weight"], state["ln_f.bias"]]
    dtype = torch.float32 if version == 3 else torch.bfloat16
    with path.open("wb") as file:
        file.write(header.tobytes())
        for tensor in tensors:
            file.write(tensor.contiguous().to(dtype).view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize(("version", "tolerance"), [(3, 1e-4), (5, 0.1)])
@torch.no_grad()
def test_llmcs_file_computes_its_logits_here(
    version: int, tolerance: float, tmp_path: Path, gpt2_cache: Path
):
    theirs = gpt2_of_transformers()
    path = llmc_file(theirs, tmp_path / "model.bin", version)
    model, tokenizer, *_ = imported(path, tmp_path / "run")
    assert tokenizer.encode("hello world") == [31373, 995]
    torch.testing.assert_close(model(PROMPT_1T), theirs(PROMPT_1T).logits, atol=tolerance, rtol=0)


# --- What is refused ------------------------------------------------------------------------------


def damaged(folder: Path, change: str) -> Path:
    """Damage a folder in one way."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    match change:
        case "another architecture":
            config["model_type"] = "llama"
        case "another activation":
            config["activation_function"] = "gelu"
        case "a field of another type":
            config["n_layer"] = "two"
        case "more layers than anyone has":
            config["n_layer"] = 2**40
        case "a vocabulary beyond all memory":
            config["vocab_size"] = 2**62
        case "a field that is no number":
            config["n_inner"] = True
        case "a damaged note of ours":
            config[hub_folder.OURS] = 3
        case "an index of nothing":
            (folder / hub_folder.INDEX).write_text('{"weight_map": 3}')
        case "no JSON":
            (folder / "tokenizer.json").write_text("{")
            return folder
        case "too short":
            weights.write_bytes(data[:-40])
        case "a header larger than the file":
            weights.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
        case "no magic":
            weights.write_bytes(b"not a safetensors file, but longer than eight bytes")
        case "no weights":
            weights.unlink()
        case "a name that climbs out":
            (folder / hub_folder.INDEX).write_text('{"weight_map": {"wte.weight": "../other"}}')
        case "a missing shard":
            (folder / hub_folder.INDEX).write_text(
                '{"weight_map": {"wte.weight": "b.safetensors"}}'
            )
        case "a second head":
            tensors = safetensors.load_file(weights)
            tensors["lm_head.weight"] = tensors["wte.weight"] + 1
            safetensors.save_file(tensors, weights)
        case "another shape":
            config["n_embd"] = 64
        case "a larger vocabulary":
            config["vocab_size"] = 100
        case "a tokenizer that is not of bytes":
            tokenizer["pre_tokenizer"] = {"type": "Metaspace"}
            tokenizer["model"]["vocab"]["▁the"] = 400
        case "merges of unknown tokens":
            tokenizer["model"]["merges"][0] = "no such"
        case "a tokenizer of more tokens":
            added = [{**tokenizer["added_tokens"][0], "id": 400, "content": "<|pad|>"}]
            tokenizer["added_tokens"] += added
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("another architecture", "model_type must be gpt2 or qwen3: got llama"),
        ("another activation", "activation_function must be gelu_new: got gelu"),
        ("a field of another type", "config.json is damaged"),
        ("more layers than anyone has", "n_layer must be at most 1,000"),
        ("a vocabulary beyond all memory", "no model has the sizes of"),
        ("a field that is no number", "no model has the sizes of"),
        ("a damaged note of ours", "config.json is damaged"),
        ("an index of nothing", "model.safetensors.index.json is damaged"),
        ("no JSON", "tokenizer.json is damaged"),
        ("too short", "model.safetensors is damaged"),
        ("a header larger than the file", "model.safetensors is damaged"),
        ("no magic", "model.safetensors is damaged"),
        ("no weights", "model.safetensors"),
        ("a name that climbs out", "'../other' must be a plain file name"),
        ("a missing shard", "b.safetensors"),
        ("a second head", "the config ties the head to the embedding, but the two differ"),
        ("another shape", "must have the shape"),
        ("a larger vocabulary", "wte.weight must have the shape (100, 32)"),
        ("a tokenizer that is not of bytes", "tokenizer.json is no byte-level tokenizer"),
        ("merges of unknown tokens", "tokenizer.json is no byte-level tokenizer"),
        ("a tokenizer of more tokens", "the tokenizer has 317 tokens, the model 316"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_kind_is_refused_and_nothing_is_written(
    change: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    hub_folder.export(state_of(tokenizers()["bpe"]), folder, license="")
    flags = (damaged(folder, change), f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_tie_that_is_neither_true_nor_false_is_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings must be true or false: got"):
        architecture.from_json({"model_type": "qwen3", "tie_word_embeddings": ["true"]})


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code was run",))


@pytest.mark.parametrize("content", [Evil(), {"model": {}}, {"model_args": 3, "model": {}}, [1]])
def test_a_file_that_is_no_checkpoint_or_holds_code_is_refused(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.save(content, tmp_path / "ckpt.pt")
    flags = (tmp_path / "ckpt.pt", f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    said = capsys.readouterr()
    assert "ckpt.pt is refused: it must be nanoGPT's ckpt.pt" in said.err
    assert "code was run" not in said.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"ab", b"abc"])
def test_a_file_of_a_few_bytes_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "model.bin").write_bytes(content)
    flags = (tmp_path / "model.bin", f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    assert "it must be nanoGPT's ckpt.pt, with tensors and plain values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=models/folder", "--type=q8_0"), "only a .gguf file has a type"),
        (("--to=models/m.GGUF", "--license=mit"), "a .gguf file has no model card"),
    ],
)
def test_a_flag_that_the_form_has_no_place_for_is_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run_here(convert.main, "convert.py", "export", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_llmc_that_was_cut_off_is_refused_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = llmc_file(gpt2_of_transformers(vocab_size=300), tmp_path / "model.bin", 3)
    path.write_bytes(path.read_bytes()[:-4])
    flags = (path, f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    assert "numbers: got" in capsys.readouterr().err


def test_an_export_does_not_touch_a_folder_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tiny_run(tmp_path)
    (tmp_path / "model").mkdir()
    flags = (f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'model'}")
    assert run_here(convert.main, "convert.py", "export", *flags) == 2
    assert "is there already: remove it, or pass another" in capsys.readouterr().err
    assert list((tmp_path / "model").iterdir()) == []


def write_tiny_run(folder: Path) -> None:
    """Train a tiny model on 160 words."""
    (folder / "tiny.toml").write_text(TINY.format(dataset=write_dataset(folder)))
    train_here(folder / "tiny.toml", folder / "run")


# --- Fine-tuning ----------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_and_tokenizer_of_another(tmp_path: Path):
    write_tiny_run(tmp_path)
    (tmp_path / "other.txt").write_text(words(60, "aeionrstlmé…"), encoding="utf-8")
    tokenizer, out = str(tmp_path / "run"), tmp_path / "other"
    prepare(PrepareConfig(sources=(str(tmp_path / "other.txt"),), tokenizer=tokenizer, out=out))
    (tmp_path / "tuned.toml").write_text(TUNED.format(dataset=out))
    init_from = f"--init_from={tmp_path / 'run'}"
    train_here(tmp_path / "tuned.toml", tmp_path / "tuned", init_from, "--model.n_embd=16")
    step_0 = load_model(tmp_path / "tuned", "step_0", "cpu").model
    before = load_model(tmp_path / "run", "best", "cpu").model
    for ours, theirs in zip(step_0.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    config = (tmp_path / "tuned/config.toml").read_text()
    assert "model.n_embd = 16" in config


TUNED = """
max_steps = 2
batch_size = 2
keep_every = 2
samples = 0
device = "cpu"
precision = "float32"
[data]
path = "{dataset}"
[model]
dropout = 0.2
[optim]
learning_rate = 1e-3
"""


def test_a_dataset_of_another_tokenizer_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tiny_run(tmp_path)
    (tmp_path / "tuned.toml").write_text(TUNED.format(dataset=write_dataset(tmp_path, "byte")))
    with pytest.raises(ValueError, match=r"vocab_size|prepare the data with --tokenizer="):
        train_here(tmp_path / "tuned.toml", tmp_path / "tuned", f"--init_from={tmp_path / 'run'}")


def test_a_run_from_another_refuses_sizes_that_this_one_does_not_have(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    (tmp_path / "tuned.toml").write_text(TUNED.format(dataset=tmp_path / "data"))
    init_from = f"--init_from={tmp_path / 'run'}"
    rule = r"run, whose n_embd is 16: leave model.n_embd out, or give the same: got 32"
    with pytest.raises(ValueError, match=rule):
        train_here(tmp_path / "tuned.toml", tmp_path / "tuned", init_from, "--model.n_embd=32")
    assert not (tmp_path / "tuned").exists()


# --- The hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are served as the hub serves its own, at the address of the hub."""
    (tmp_path / "hub").mkdir()
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(hub_models, "DOWNLOADS", tmp_path / "downloads")
        yield tmp_path / "hub"
        server.shutdown()


COMMIT = "0123456789" * 4


def publish(folder: Path, hub: Path, name: str) -> None:
    """Put a folder on the hub, with a list of its files as the hub makes it."""
    listed = []
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"not wanted")
    for path in filter(Path.is_file, sorted(folder.rglob("*"))):
        data, place = path.read_bytes(), path.relative_to(folder).as_posix()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": place, "size": len(data), "oid": blob}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        listed.append(entry)
    shutil.copytree(folder, hub / name / "resolve" / COMMIT)
    files.write_text(hub / f"api/models/{name}/tree/{COMMIT}", json.dumps(listed))
    files.write_text(hub / f"api/models/{name}/revision/main", json.dumps({"sha": COMMIT}))


@pytest.mark.parametrize("shards", [False, True])
@torch.no_grad()
def test_a_model_comes_from_the_hub_by_its_name_and_then_without_the_hub(
    shards: bool, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = gpt2_of_transformers(vocab_size=tokenizers()["bpe"].vocab_size)
    options = {"max_shard_size": "20KB"} if shards else {}
    publish(save_gpt2(theirs, tmp_path / "theirs", tokenizers()["bpe"], **options), hub, "me/small")
    model, *_ = imported(Path("me/small@main"), tmp_path / "run")
    torch.testing.assert_close(model(PROMPT_1T), theirs(PROMPT_1T).logits, atol=1e-4, rtol=0)
    assert not list((tmp_path / "downloads").rglob("*.onnx"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    imported(Path(f"me/small@{COMMIT}"), tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("another architecture", "model_type must be gpt2 or qwen3: got llama"),
        ("no weights", "me/small has no weights in model.safetensors"),
        ("a tokenizer by --data", "me/small@main has its own tokenizer: leave out --data"),
    ],
)
def test_a_model_of_the_hub_that_cannot_be_used_is_refused_before_its_weights_are_downloaded(
    change: str, sentence: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hub_folder.export(state_of(tokenizers()["bpe"]), tmp_path / "theirs", license="")
    flags = []
    if change.startswith("a tokenizer"):
        flags = [f"--data={tmp_path}"]
    else:
        damaged(tmp_path / "theirs", change)
    publish(tmp_path / "theirs", hub, "me/small")
    flags += ["me/small@main", f"--out_dir={tmp_path / 'run'}"]
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "downloads").rglob("*.safetensors"))


def test_a_model_that_changed_on_its_way_is_refused(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    theirs = gpt2_of_transformers(vocab_size=tokenizers()["bpe"].vocab_size)
    publish(save_gpt2(theirs, tmp_path / "theirs", tokenizers()["bpe"]), hub, "me/small")
    weights = hub / "me/small/resolve" / COMMIT / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    flags = ("me/small@main", f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    assert "is not the expected file (its hash differs)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["gpt2", "me/small@main", f"me/small@{COMMIT}"])
def test_without_a_network_a_name_of_the_hub_ends_in_one_sentence(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_models, "DOWNLOADS", tmp_path / "downloads")
    flags = (source, f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot download http://127.0.0.1:9/api/models/")
    assert error.count("\n") == 1
    assert "put them in a folder and give its path instead" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["gtp2", "me/small", "../up@main", "/etc/passwd@main"])
def test_what_is_neither_here_nor_a_name_of_the_hub_is_refused(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = (source, f"--out_dir={tmp_path / 'run'}")
    assert run_here(convert.main, "convert.py", "import", *flags) == 2
    assert "OWNER/NAME@REVISION or one of gpt2" in capsys.readouterr().err


@pytest.mark.parametrize("name", hub_models.PINNED)
def test_a_short_name_stands_for_a_commit(name: str):
    _, revision = hub_models.PINNED[name]
    assert re.fullmatch("[0-9a-f]{40}", revision)
