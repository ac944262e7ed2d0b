"""What bench.py stories says of a model, against attention and models made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import heads, learned, stories
from benchmarks.stories import StoriesBench
from data.loader import Dataset
from data.prepare import PrepareConfig, prepare
from data.tokenizer import ByteTokenizer, Tokenizer
from helpers import REPOSITORY, TINY, train_here, write_stories
from model import GPT, ModelConfig

PERIOD = 5
T = 2 * PERIOD + 1


def looking(back: int) -> Tensor:
    """Weights of one head that looks so many tokens back, or at the first: (L, B, H, T, S)."""
    weights_TS = torch.zeros(T, T)
    weights_TS[range(T), [max(0, i - back) for i in range(T)]] = 1
    return weights_TS.expand(1, 1, 1, T, T)


def random_model() -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, context_length=64, n_layer=2, n_head=2, n_embd=16)
    return GPT(replace(config, attention="explicit")).eval()


def test_a_head_that_looks_one_back_is_a_previous_token_head_and_no_induction_head():
    assert heads.previous_scores(looking(1)).tolist() == [[1]]
    assert heads.induction_scores(looking(1), PERIOD).tolist() == [[0]]


def test_induction_looks_at_the_token_after_the_same_one_in_every_place_of_the_second_copy():
    assert heads.induction_scores(looking(PERIOD - 1), PERIOD).tolist() == [[1]]
    assert heads.induction_scores(looking(PERIOD), PERIOD).tolist() == [[0]]
    first_copy = looking(PERIOD - 1).clone()
    first_copy[..., PERIOD + 1 :, :] = 0  # rows of the second copy
    assert heads.induction_scores(first_copy, PERIOD).tolist() == [[0]]


def test_the_weights_of_all_heads_are_those_that_attention_used():
    weights_LBHTS = heads.weights_of(random_model(), torch.arange(12).view(2, 6))
    assert weights_LBHTS.shape == (2, 2, 2, 6, 6)
    torch.testing.assert_close(weights_LBHTS.sum(-1), torch.ones(2, 2, 2, 6))
    assert weights_LBHTS.triu(1).count_nonzero() == 0


def test_without_a_head_the_output_is_that_of_a_model_whose_head_writes_nothing():
    tokens_BT, model, muted = torch.arange(12).view(2, 6), random_model(), random_model()
    before = model(tokens_BT)
    with torch.no_grad():
        muted.get_submodule("blocks.1.attn.c_proj").get_parameter("weight")[:, 8:] = 0
    with heads.without(model, [(1, 1)]):
        torch.testing.assert_close(model(tokens_BT), muted(tokens_BT))
    assert torch.equal(model(tokens_BT), before)
    assert not torch.equal(muted(tokens_BT), before)


def test_words_are_repeated_once_and_differ_within_a_copy():
    copies = heads.repeated_words(FirstLetter())
    assert tuple(copies) == heads.PERIODS
    for period, tokens_BT in copies.items():
        assert tokens_BT.shape == (heads.REPEATS, 1 + 2 * period)
        assert torch.equal(tokens_BT[:, 1 : period + 1], tokens_BT[:, period + 1 :])


class FirstLetter(ByteTokenizer):
    """A tokenizer whose tokens start with the letter, not with the space."""

    def encode_array(self, text: str) -> np.ndarray:
        return super().encode_array(text.removeprefix(" "))


def test_a_question_ends_before_the_noun_and_knows_it_and_the_other():
    tokenizer: Tokenizer = FirstLetter()
    text = "The road was not crossed by the pig because it was too lazy. The pig slept until noon."
    story = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    ((prefix, pair),) = learned.questions(story, tokenizer)
    assert tokenizer.decode(prefix[1:]) == text.removesuffix(" pig slept until noon.")
    assert pair == (ord("p"), ord("r"))


def test_a_split_is_cut_before_each_end_of_text():
    tokens_N = np.array([256, 1, 2, 256, 3], np.uint16)
    parts = learned.split_stories(tokens_N, ByteTokenizer())
    assert [part.tolist() for part in parts] == [[256, 1, 2], [256, 3]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few stories in `dataset`, and a model that was hardly trained in `run`."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "tiny.toml").write_text(TINY.format(dataset=write_stories(folder, 800)))
    train_here(folder / "tiny.toml", folder / "run", "--max_steps=1", "--model.context_length=192")
    return folder


def test_a_model_is_judged_by_loss_pronouns_and_heads(run: Path):
    config = StoriesBench(out_dir=run / "run", data=run / "dataset", stories=20)
    loss, pronouns, best, ablations = stories.measure(config).values()
    entropy = Dataset.open(run / "dataset").entropy()
    floor, *others = (float(str(row["nats per token"])) for row in loss)
    assert floor == entropy
    assert min(others) > floor
    assert set(pronouns[0]) == {"model", "bigram model", "pronouns"}
    assert [row["kind"] for row in best] == ["previous token", *["induction"] * 3]
    assert [row["period"] for row in ablations] == list(heads.PERIODS)


@pytest.mark.slow
def test_a_third_of_the_training_teaches_pronouns_and_induction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.stories.N_STORIES", 20_000)
    monkeypatch.setattr("data.stories.PATH", tmp_path / "stories.jsonl")
    prepare(PrepareConfig(sources=("stories",), out=tmp_path / "data"))
    flags = (f"--data.path={tmp_path / 'data'}", "--max_steps=500", "--eval_every=500")
    train_here(REPOSITORY / "config/stories.toml", tmp_path / "run", "--samples=0", *flags)
    config = StoriesBench(out_dir=tmp_path / "run", data=tmp_path / "data")
    loss, pronouns, best, ablations = stories.measure(config).values()
    assert float(str(loss[1]["above entropy, %"])) < 10
    assert float(str(pronouns[0]["model"])) > 95
    assert 40 < float(str(pronouns[0]["bigram model"])) < 60
    induction = {
        row["text"]: float(str(row["score"])) for row in best if row["kind"] == "induction"
    }
    assert min(induction["period 10"], induction["period 40"]) > 0.4
    for row in ablations[:2]:
        assert float(str(row["without induction heads"])) > 3 + float(str(row["nats per token"]))
