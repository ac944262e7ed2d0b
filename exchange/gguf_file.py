"""A model as one GGUF file, for llama.cpp and what is built on it, such as Ollama."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

import files
from data.hub_tokenizer import LETTERS, HubTokenizer
from data.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer
from exchange import hub_folder, names
from exchange.vocabulary import merges_of, spelled
from model import ModelConfig, require

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
LAYERS = {  # of a block; Qwen3's queries, keys and values are apart
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_gate": "ffn_gate",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
Q8_BLOCK = 32  # numbers that share a scale
NORMAL = 1  # llama.cpp's types of tokens
CONTROL = 3
LLAMA_CPP_END = 11  # the token at which it ends a text if the vocabulary names no other
IDLE_MERGE = "Ā Ā"  # of two zero bytes, which no vocabulary here has: the list must not be empty
MODELFILE = 'FROM ./{name}\nTEMPLATE "{{{{ .Prompt }}}}"\n'  # Ollama's; a base model has no chat


def gguf_weights(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under llama.cpp's names; a tied head is left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer == "lm_head" and config.tie_embeddings:
            continue
        if layer in OUTSIDE:
            found[f"{OUTSIDE[layer]}.{kind}"] = tensor
            continue
        _, number, part = layer.split(".", maxsplit=2)
        if part == "attn.c_attn" and config.is_modern:
            rows = names.queries_keys_values(tensor, config)
            found |= {f"blk.{number}.attn_{c}.{kind}": t for c, t in zip("qkv", rows, strict=True)}
        else:
            found[f"blk.{number}.{LAYERS[part]}.{kind}"] = tensor
    return found


def token_texts(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the text of each token but end-of-text, and the merges that lead to them.

    llama.cpp knows byte pairs only. Characters become such: the bytes of each are merged one after
    another, and no merge crosses a character, since none begins with the middle of another.
    """
    if isinstance(tokenizer, BPETokenizer):
        merges = [f"{spelled(a)} {spelled(b)}" for a, b in merges_of(tokenizer.ranks)]
        return [spelled(token) for token in tokenizer.ranks], merges
    if not isinstance(tokenizer, CharTokenizer):
        return list(LETTERS), [IDLE_MERGE]
    letters = [spelled(character.encode()) for character in tokenizer.characters]
    pairs = {(text[:n], text[n]): n for text in letters for n in range(1, len(text))}
    merges = [f"{a} {b}" for a, b in sorted(pairs, key=lambda pair: len(pair[0]))]
    return letters, merges or [IDLE_MERGE]


def export(state: dict[str, Any], path: Path, kind: GGUFType) -> None:
    """Write a checkpoint as a GGUF file, and a Modelfile for Ollama beside it."""
    import gguf  # wanted for this only

    config, weights, tokenizer = hub_folder.unpadded(state)
    require(
        not isinstance(tokenizer, HubTokenizer),
        "a .gguf file takes our own kinds of tokenizers: export a folder instead, and convert it "
        "by llama.cpp's convert_hf_to_gguf.py",
    )
    widths = (config.n_embd, config.n_head * config.head_dim, config.n_inner)
    fits = kind != "q8_0" or all(width % Q8_BLOCK == 0 for width in widths)
    require(fits, f"q8_0 needs widths that are multiples of {Q8_BLOCK}: got {widths}; take f16")
    files.check_writable(path)
    with files.whole(path, "wb") as file:
        writer = gguf.GGUFWriter(file.name, "qwen3" if config.is_modern else "gpt2")
        add_sizes(writer, config, path.stem)
        add_vocabulary(writer, tokenizer)
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in gguf_weights(config, weights).items():
            array = tensor.float().numpy()
            is_matrix = array.ndim == 2 and not name.startswith("position_embd")
            if is_matrix and kind != "f32":
                stored = gguf.quants.quantize(array, quantization)
                writer.add_tensor(name, stored, raw_dtype=quantization)
            else:
                writer.add_tensor(name, array)
        writer.write_header_to_file()  # it opens the file by its name, beside ours
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    files.write_text(path.with_name("Modelfile"), MODELFILE.format(name=path.name))
    if tokenizer.end_of_text is None:
        print(f"The vocabulary has no end of text, so llama.cpp ends one at token {LLAMA_CPP_END}.")
    if isinstance(tokenizer, CharTokenizer):
        print("llama.cpp leaves out characters that are not in the vocabulary.")


FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def add_sizes(writer: Any, config: ModelConfig, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    if config.is_modern:
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_head_count_kv(config.n_kv_head)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    else:
        writer.add_layer_norm_eps(1e-5)


def add_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    texts, merges = token_texts(tokenizer)
    types = [NORMAL] * len(texts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    end = tokenizer.end_of_text
    if end is not None:
        texts.append(END_OF_TEXT)
        types.append(CONTROL)
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
