"""bench.py sample: the limit of generation, its peers, and a tiny model that is measured."""

import os
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import decoding, generation, limits, others, peers, startup
from benchmarks.generation import SampleBench
from benchmarks.peers import PeersConfig, Side
from benchmarks.shapes import random_model, random_prompts, shape
from benchmarks.table import Row
from engine import cli
from model import GPT, ModelConfig

CPU = torch.device("cpu")
ONE_LAYER = ModelConfig(n_layer=1, n_head=2, n_embd=4, vocab_size=10, context_length=8)


def measured(**changed: str | float) -> Row:
    row: Row = {"model": "tiny", "precision": "float32", "prompt": 16, "batch": 1}
    row |= {"decode tokens/s": 50.0, "step ms": 20.0, "MB a step": 400.0, "memory GB/s": 20.0}
    return row | changed


# The limit


@pytest.mark.parametrize(("precision", "expected"), [("float32", 1024), ("bfloat16", 512)])
def test_a_token_reads_every_weight_but_the_embeddings_and_the_head_once(
    precision: str, expected: int
) -> None:
    # matrices: 4 x 12 + 4 x 4 + 4 x 16 + 16 x 4 = 192, head 10 x 4 = 40; biases 12 + 4 + 16 + 4
    # = 36; norms, with biases, 3 x 8 = 24: less wte and wpe, and all of it 292 numbers
    assert limits.weight_bytes(ONE_LAYER, precision) == 292 * expected // 256


def test_int8_weights_are_a_byte_each_with_a_scale_for_each_row() -> None:
    rows = 12 + 4 + 16 + 4 + 10
    assert limits.weight_bytes(ONE_LAYER, "int8") == 232 + 2 * (36 + 24 + rows)


def test_a_head_of_its_own_is_read_and_its_embedding_is_not() -> None:
    sizes = {"architecture": "modern", "n_layer": 1, "n_embd": 4, "n_head": 2}
    tied, own = (
        ModelConfig(**sizes, vocab_size=10, tie_embeddings=tie)  # type: ignore[arg-type]
        for tie in (True, False)
    )
    assert limits.weight_bytes(tied, "float32") == limits.weight_bytes(own, "float32")


def test_each_text_reads_its_own_cache_and_shared_heads_once() -> None:
    few = ModelConfig(
        architecture="modern", n_layer=3, n_embd=32, n_head=4, n_kv_head=2, vocab_size=10
    )
    cache = GPT(few).bfloat16().new_cache(5, size=128)
    size = cache.k_LBKSD.element_size()
    assert limits.cache_bytes(cache, 100) == 5 * 2 * 3 * 2 * 8 * 100 * size


def test_bandwidth_is_the_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 4000)
    taken = iter([9.0, 2.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(limits, "seconds", lambda function, device: next(taken))
    assert limits.Memory(CPU).bandwidth() == 2000


def test_prompts_are_cut_to_what_leaves_room_for_the_steps() -> None:
    assert decoding.fitting((4, 512, 600), shape("tiny"), 20) == [4, 64 - 1 - 3 - 20]
    with pytest.raises(ValueError, match="64 new tokens leave no prompt in a context of 64"):
        decoding.fitting((4,), shape("tiny"), 60)


def test_the_quickstart_that_is_measured_is_its_config() -> None:
    quickstart = shape("quickstart").sized()
    assert (quickstart.n_layer, quickstart.n_embd, quickstart.context_length) == (4, 256, 256)
    assert quickstart.is_modern
    assert not quickstart.tie_embeddings


# What is made of the measurements


def test_a_batch_is_compared_with_one_text_of_the_same_kind() -> None:
    rows = [measured(), measured(batch=8, **{"decode tokens/s": 300.0})]
    rows += [measured(batch=64, **{"decode tokens/s": 1000.0})]
    rows += [measured(prompt=512, **{"decode tokens/s": 10.0})]
    expected: Row = {"model": "tiny", "precision": "float32", "prompt": 16}
    assert generation.batches(rows) == [expected | {"batch 8 / 1": 6.0, "batch 64 / 1": 20.0}]


def test_growth_is_held_against_the_bytes_of_the_longer_cache() -> None:
    longer = measured(prompt=512, **{"step ms": 23.0, "MB a step": 440.0})
    (row,) = generation.growth([measured(), longer])
    assert (row["prompts"], row["growth ms"]) == ("16 to 512", 3.0)
    assert row["explained ms"] == pytest.approx(2.0)  # 40 MB at 20 GB/s


def test_a_peer_is_compared_with_float32_and_with_the_best() -> None:
    kinds = (("nanoGPT", "float32", 2.0), ("ours", "float32", 10.0), ("ours", "int8", 30.0))
    rows: list[Row] = [
        {"side": side, "precision": precision, "prompt": 16, "tokens/s": speed}
        for side, precision, speed in kinds
    ]
    (row,) = generation.races(rows)
    assert (row["ratio"], row["ratio, best"], row["best"]) == ("5.00 ×", "15.00 ×", "int8")


def test_the_first_token_is_timed_in_turn_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []

    def seconds_to_token(command: list[str]) -> float:
        taken.append(command)
        return {2: 2.0, 4: 9.0}.get(len(taken), 3.0 - len(taken) % 2)

    monkeypatch.setattr(startup, "seconds_to_token", seconds_to_token)
    alone, first = startup.start_rows(Path("a"), "cpu")
    assert [command[1] for command in taken] == ["-c", "sample.py"] * 5
    assert (alone["seconds"], first["seconds"]) == (2.0, 3.0)
    assert first["over the import"] == "1.50 ×"


# The peers


def ours(name: str, model: GPT) -> Side:
    return Side(name, "float32", peers.our_generate(model))


def test_a_peer_with_other_weights_is_refused() -> None:
    model, other = random_model("tiny", CPU), random_model("tiny", CPU)
    prompt_1T = torch.tensor(random_prompts(model.config, 1, 8))
    peers.agree([ours("ours", model), ours("twin", other)], prompt_1T)
    torch.nn.init.normal_(other.get_parameter("blocks.0.attn.c_proj.weight"))
    with pytest.raises(ValueError, match="stranger must choose the same tokens as ours") as error:
        peers.agree([ours("ours", model), ours("stranger", other)], prompt_1T)
    assert "after 8: got [" in str(error.value)


def test_transformers_agrees_on_the_same_weights_and_takes_turns() -> None:
    pytest.importorskip("transformers")
    config = PeersConfig(
        model="tiny", transformers=True, prompts=(4,), precisions=("float32",), device="cpu"
    )
    rows = list(peers.measure(config))
    assert [row["side"] for row in rows] == ["transformers", "ours"]
    assert all(generation.number(row, "tokens/s") > 0 for row in rows)


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_nanogpt_agrees_on_the_same_weights() -> None:
    model = random_model("tiny", CPU)
    theirs = others.nanogpt_generate(Path(os.environ["NANOGPT"]), model)
    prompt_1T = torch.tensor(random_prompts(model.config, 1, 8))
    peers.agree([ours("ours", model), Side("nanoGPT", "float32", theirs)], prompt_1T)


def test_a_model_that_is_not_gpt2s_has_no_peers() -> None:
    with pytest.raises(ValueError, match="need GPT-2's architecture, which quickstart has not"):
        list(peers.measure(PeersConfig(model="quickstart", transformers=True, device="cpu")))


# The command


def test_a_tiny_model_is_measured_in_every_precision_prompt_and_batch() -> None:
    kinds = decoding.available(CPU)
    config = SampleBench(models=("tiny",), prompts=(4, 512), batch_sizes=(1, 2), steps=2)
    tables = generation.measure(config)
    found = [(row["precision"], row["prompt"], row["batch"]) for row in tables["speed"]]
    assert found == [(k, prompt, batch) for k in kinds for prompt in (4, 58) for batch in (1, 2)]
    for row in tables["speed"]:
        speed, limit = row["decode tokens/s"], row["limit tokens/s"]
        assert row["of limit"] == pytest.approx(speed / limit)  # type: ignore[operator]
        bandwidth, n_bytes = (generation.number(row, c) for c in ("memory GB/s", "MB a step"))
        assert limit == pytest.approx(1e3 * bandwidth * row["batch"] / n_bytes)  # type: ignore[operator]
    assert len(tables["batches"]) == 2 * len(kinds)
    assert len(tables["longer prompts"]) == 2 * len(kinds)


def test_peers_are_given_together_or_one_by_one() -> None:
    given = ["--peer", "nanogpt=a", "--steps=3", "--peer=transformers", "--models", "124M"]
    parsed = cli.parse_config(bench.Sample, given)
    assert (parsed.peer, parsed.steps) == (("nanogpt=a", "transformers"), 3)
    assert parsed == cli.parse_config(
        bench.Sample, ["--steps=3", "--peer", "nanogpt=a", "transformers", "--models=124M"]
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--peer=nanochat"], "peer must be nanogpt=CHECKOUT or transformers: got nanochat"),
        (["--steps=0"], "steps must be at least 1: got 0"),
        (["--batch_sizes", "1", "0"], "batch_sizes must be at least 1 each: got 1 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cli.parse_config(bench.Sample, flags)


@pytest.mark.parametrize("flag", ["run", "quality"])
def test_a_folder_that_is_no_run_is_refused_before_anything_is_measured(
    flag: str, tmp_path: Path
) -> None:
    config = cli.parse_config(bench.Sample, [f"--{flag}={tmp_path}"])
    with pytest.raises(FileNotFoundError, match="is not the folder of a run, it has no config"):
        generation.measure(config)
