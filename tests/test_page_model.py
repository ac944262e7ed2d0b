"""The model in the page, in headless Chromium: it computes what PyTorch computes, and only that."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from browser import Page, find_chromium
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from model import GPT
from pages import (
    BYTES,
    as_number,
    built,
    check_numbers,
    click_cell,
    judged,
    namer,
    number,
    running_scene,
    table,
    text_of,
    unmeasured,
)
from sampling.choose import Choice, distribution
from sampling.decode import Decoder
from viewer import page
from viewer.page import Json
from viewer.record import costs, losses, record, switch_off
from viewer.scene import Checkpoint
from viewer.scores import SCORES, uniform
from viewer.weights import Form, rounded

if find_chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

TEXT = "to be or not to be: a rose is a rose"
OTHER = "to be or not to do: a rose was one rose"
CHARACTERS = CharTokenizer(TEXT + OTHER, with_end_of_text=True)
MERGES = (b"to", b" b", b" be", b"os", b" ros")
RANKS = {bytes([byte]): byte for byte in range(256)} | {m: 256 + n for n, m in enumerate(MERGES)}
BPE = BPETokenizer(RANKS | {b" rose": 261, b" r": 262}, kind="bpe")
N_PADDING = 9  # ids of a model beyond its tokenizer's


@dataclass(frozen=True)
class Shown:
    """A model that is in the page, with a tokenizer and a text."""

    original: GPT
    tokenizer: Tokenizer = BYTES
    form: Form = "f32"
    text: str = TEXT

    @cached_property
    def model(self) -> GPT:
        """The model with the weights that the page has."""
        return rounded(self.original, self.form)

    @property
    def tokens_1T(self) -> Tensor:
        return self.tokens(self.text)

    def tokens(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text)])


def zoo() -> dict[str, Shown]:
    """Return models of every kind that a page runs."""
    gpt2 = built(0, architecture="gpt2", context_length=49)
    wide = built(3, head_dim=16, tie_embeddings=False)
    grouped = {"n_head": 4, "n_kv_head": 2, "n_embd": 32}
    padded = CHARACTERS.vocab_size + N_PADDING
    return {
        "gpt2": Shown(gpt2),
        "gpt2 as f16": Shown(gpt2, form="f16"),
        "gpt2 as int8": Shown(gpt2, form="int8"),
        "modern": Shown(built(1, tie_embeddings=False, vocab_size=BPE.vocab_size), BPE),
        "grouped": Shown(built(2, **grouped, vocab_size=padded, context_length=41), CHARACTERS),
        "wide": Shown(wide),
        "wide as f16": Shown(wide, form="f16"),
        "wide as int8": Shown(wide, form="int8"),
        "one layer": Shown(built(4, n_layer=1)),
        "long gpt2": Shown(built(5, architecture="gpt2", context_length=256)),
        "long modern": Shown(built(6, context_length=256)),
    }


ZOO = zoo()
OF_EACH_KIND = ("gpt2", "modern", "grouped", "wide")
of_each_kind = pytest.mark.parametrize("name", OF_EACH_KIND)

HELPERS = Path(__file__).with_name("page_helpers.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def zoo_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    scenes = [
        running_scene(unmeasured(shown.original), shown.text, shown.tokenizer, shown.form)
        for shown in ZOO.values()
    ]
    path = tmp_path_factory.mktemp("zoo") / "page.html"
    path.write_text(page.build(scenes), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(browser: Page, zoo_page: str) -> Page:
    """A page with all models of the zoo, which is opened once."""
    if browser.run("location.href") != zoo_page:
        browser.open(zoo_page)
        browser.run(HELPERS)
    return browser


def see(tab: Page, name: str, text: str = "") -> Shown:
    """Turn to a model of the zoo, with nothing switched off, and let it read a text."""
    shown = ZOO[name]
    tab.run(f"see({1 + list(ZOO).index(name)}, {json.dumps(text or shown.text)})")
    return shown


def read(tab: Page, text: str) -> None:
    tab.run(f"read({json.dumps(text)})")


def logits(tab: Page) -> Tensor:
    """Return the page's logits (T, V) of its text."""
    return torch.tensor(tab.run("allLogits()"))


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


# --- The forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ZOO))
def test_logits_are_those_of_pytorch_at_every_position(tab: Page, name: str):
    shown = see(tab, name)
    assert tab.run("state.scene.ids") == shown.tokens_1T[0].tolist()
    expected_TV = record(shown.model, shown.tokens_1T).logits_BTV[0]
    assert largest(logits(tab) - expected_TV) < 1e-4
    assert largest(expected_TV) > 1  # a model of zeros would agree, too
    if shown.form != "f32":
        exact_TV = record(shown.original, shown.tokens_1T).logits_BTV[0]
        assert largest(logits(tab) - exact_TV) > 1e-4


@of_each_kind
def test_all_that_a_head_computes_is_what_pytorch_computes(tab: Page, name: str):
    shown = see(tab, name)
    kept = record(shown.model, shown.tokens_1T)
    found = tab.run("heads()")
    assert len(found) == shown.model.config.n_layer * shown.model.config.n_head
    expected = (kept.q_LBHTD, kept.k_LBHSD, kept.v_LBHSD, kept.y_LBHTD, kept.weights_LBHTS)
    for n, tensors in enumerate(found):
        layer, head = divmod(n, shown.model.config.n_head)
        for ours, theirs in zip(tensors, expected, strict=True):
            assert torch.allclose(torch.tensor(ours), theirs[layer, 0, head], atol=2e-5), n


@of_each_kind
@pytest.mark.parametrize("step", [1, 2, 5])
def test_reading_token_by_token_computes_the_same_as_reading_at_once(
    tab: Page, name: str, step: int
):
    see(tab, name)
    assert tab.run(f"apartFromNew({step})") < 1e-6


@of_each_kind
def test_what_is_kept_of_an_earlier_text_changes_nothing(tab: Page, name: str):
    see(tab, name)
    edited, short = TEXT.replace("not", "too"), TEXT[:9]
    for text, off in [
        *((TEXT, []), (edited, []), (short, []), (OTHER, []), (TEXT, ["0.1"])),
        *((edited, ["0.1"]), (edited, ["0.1", "1.0"]), (edited, []), (TEXT, [])),
    ]:
        tab.run(f"state.scene.off = new Set({json.dumps(off)})")
        read(tab, text)
        assert tab.run("apartFromNew(99)") < 1e-6, (text, off)


def test_of_a_text_only_what_is_new_is_read(tab: Page):
    see(tab, "wide")
    texts = [TEXT + "!", TEXT + "!?", TEXT[:-2] + "ts", TEXT[:5]]
    assert tab.run(f"counted({json.dumps(texts)})") == [1, 1, 2]


# --- Writing --------------------------------------------------------------------------------------


def greedy(model: GPT, tokens: list[int], n: int) -> list[int]:
    """Return the tokens, and n more, each the likeliest."""
    decoder = Decoder(model, [tokens], max_new_tokens=n)
    logits_BV = decoder.read()
    text = list(tokens)
    for _ in range(n):
        text.append(int(logits_BV[0].argmax()))
        logits_BV = decoder.feed(torch.tensor(text[-1:]))
    return text


@pytest.mark.parametrize("name", ["long gpt2", "long modern"])
def test_at_temperature_0_the_page_writes_the_200_tokens_that_the_decoder_writes(
    tab: Page, name: str
):
    shown = see(tab, name)
    tab.run("state.temperature = 0")
    expected = greedy(shown.model, shown.tokens_1T[0].tolist(), 200)
    assert tab.run("written(200)") == expected
    assert tab.run("typed.value") == shown.tokenizer.decode(expected)
    assert len(set(expected)) > 5


def test_a_text_that_fills_the_context_goes_on_from_its_latest_half_as_the_decoder_does(tab: Page):
    shown = see(tab, "gpt2")  # 49 positions, an odd number
    tab.run("state.temperature = 0")
    expected = greedy(shown.model, shown.tokens_1T[0].tolist(), 50)
    lengths: list[int] = []
    for n in range(len(TEXT) + 1, len(TEXT) + 51):
        assert tab.run("written(1)") == expected[:n]
        ids = tab.run("state.scene.ids")
        assert ids == expected[n - len(ids) : n]
        lengths.append(len(ids))
    assert (min(lengths), max(lengths)) == (24, 49)


CHOICES = [
    *(Choice(temperature=t) for t in (0, 0.1, 0.5, 1, 2)),
    *(Choice(temperature=t, top_k=k) for t, k in ((0, 3), (1, 1), (1, 5), (0.7, 20), (1.5, 23))),
    *(Choice(temperature=t, top_p=p) for t, p in ((0.1, 0.9), (1, 0.9), (1, 0.05), (2, 0.95))),
    *(Choice(temperature=t, min_p=p) for t, p in ((1, 0.1), (2, 0.5), (1.5, 0.01))),
    Choice(temperature=0, top_k=3, top_p=0.5, min_p=0.1),
    Choice(temperature=1.3, top_k=7, top_p=0.8),
    Choice(temperature=1.9, top_k=15, top_p=0.6, min_p=0.02),
    Choice(temperature=0.6, top_p=0.7, min_p=0.3),
    Choice(temperature=1.1, top_k=18, min_p=0.05),
]


def settings(choice: Choice) -> str:
    """Return a choice as the page's sliders would have it."""
    named = {"topK": choice.top_k, "topP": choice.top_p, "minP": choice.min_p}
    return json.dumps({"temperature": choice.temperature, **named})


@pytest.mark.parametrize("name", ["grouped", "modern"])  # the first has a padded vocabulary
def test_the_page_cuts_distributions_as_sampling_does(tab: Page, name: str):
    shown = see(tab, name)
    usable_TV = logits(tab)[:, : shown.tokenizer.vocab_size]
    for choice in CHOICES:
        p_TV = distribution(usable_TV, choice)
        for at, (ids, chances) in enumerate(tab.run(f"cut({settings(choice)}, 12)")):
            assert sorted(ids) == list(range(p_TV.shape[1]))
            assert largest(torch.tensor(chances) - p_TV[at, ids]) < 1e-6, (choice, at)


def chi_square(counts_V: Tensor, expected_V: Tensor) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; rare outcomes are taken together."""
    common = expected_V >= 5
    rest = (counts_V[~common].sum()[None], expected_V[~common].sum()[None])
    counts, expected = (
        torch.cat((all_V[common], others)) if rest[1] >= 1 else all_V[common]
        for all_V, others in zip((counts_V, expected_V), rest, strict=True)
    )
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def test_a_position_says_how_likely_its_own_token_was(tab: Page):
    shown = see(tab, "modern")
    tab.run("update({ side: 'next', row: 3 })")
    p_V = record(shown.model, shown.tokens_1T).logits_BTV[0, 2].softmax(-1)
    expected = float(p_V[shown.tokens_1T[0, 3]])
    found = re.search(r"of probability (\S+), the model", text_of(tab, "#side"))
    assert found
    assert as_number(found[1]) == pytest.approx(expected, rel=0.01, abs=6e-5)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(temperature=1.8, top_k=12, top_p=0.8, min_p=0.02),
        *(
            pytest.param(choice, marks=pytest.mark.slow)
            for choice in (
                Choice(temperature=1),
                Choice(temperature=2),
                Choice(temperature=1.5, top_k=8),
                Choice(temperature=1.8, top_p=0.8),
                Choice(temperature=1.6, min_p=0.1),
            )
        ),
    ],
)
def test_what_is_drawn_with_seeds_has_the_distribution_of_sampling(tab: Page, choice: Choice):
    shown = see(tab, "grouped", "to be or not")
    usable_1V = logits(tab)[-1:, : shown.tokenizer.vocab_size]
    p_V = distribution(usable_1V, choice)[0].double()
    tokens_N = torch.tensor(tab.run(f"drawn({settings(choice)})"))
    counts_V = tokens_N.bincount(minlength=len(p_V)).double()
    assert len(counts_V) == len(p_V)
    assert counts_V[p_V == 0].sum() == 0
    statistic, freedom = chi_square(counts_V, p_V * len(tokens_N))
    assert freedom >= 3
    assert statistic < freedom + 3 * math.sqrt(2 * freedom)


@pytest.mark.slow
def test_no_id_beyond_the_vocabulary_is_drawn_or_offered(tab: Page):
    shown = see(tab, "grouped", "to be or not")
    size = shown.tokenizer.vocab_size
    tab.run(f"favourPadding({size})")
    choices = [{"temperature": t, "top_k": k} for t in (0, 1) for k in (0, 1)]
    for choice in (*(Choice(**c) for c in choices), Choice(top_p=0.5), Choice(min_p=0.5)):
        assert max(tab.run(f"drawn({settings(choice)})")) < size
    tab.run(f"favourPadding({size})")
    tab.run("update({ side: 'next' })")
    assert len(table(tab, 0)) == 10
    assert not any("⟨token" in row[0] for row in table(tab, 0))
    tab.run("state.frame.record = null")


# --- What the views say ---------------------------------------------------------------------------


@of_each_kind
def test_a_click_on_a_cell_shows_every_number_behind_it(tab: Page, name: str):
    shown = see(tab, name)
    tab.click("#grid .heads:nth-of-type(2) button:nth-child(2)")  # layer 1, head 1
    click_cell(tab, 9, 4)
    assert tab.run("[state.panel.name, state.row, state.column]") == ["layer 1, head 1", 9, 4]
    check_numbers(tab, record(shown.model, shown.tokens_1T), (1, 1), (9, 4))


@of_each_kind
def test_scores_on_the_text_are_those_of_the_viewer(tab: Page, name: str):
    shown = see(tab, name)
    tokens_T = shown.tokens_1T[0]
    weights_LHTT = record(shown.model, shown.tokens_1T).weights_LBHTS[:, 0]
    alike_TT = uniform(len(tokens_T))
    for found, weights_TT in zip(tab.run("allScores()"), weights_LHTT.flatten(0, 1), strict=True):
        for key, score in SCORES.items():
            expected = [float(score(of, tokens_T)) for of in (weights_TT, alike_TT)]
            numbers = [math.nan if number is None else number for number in found[key][:2]]
            assert numbers == pytest.approx(expected, abs=1e-5, nan_ok=True), key


def test_scores_that_no_text_can_tell_are_none(tab: Page):
    see(tab, "wide", "abc")
    assert tab.run("scores(state.panel).induction[0]") is None
    see(tab, "wide", "a")
    assert set(tab.run("Object.values(scores(state.panel)).map(([x]) => x)")) == {None, 0}


@of_each_kind
def test_losses_ranks_and_predictions_are_those_of_torch(tab: Page, name: str):
    shown = see(tab, name)
    tokens_T = shown.tokens_1T[0]
    logits_TV = record(shown.model, shown.tokens_1T).logits_BTV[0, :-1]
    losses_T = F.cross_entropy(logits_TV, tokens_T[1:], reduction="none")
    assert tab.run("[...losses(state.frame)]") == pytest.approx(losses_T.tolist(), abs=1e-4)
    named = namer(shown.tokenizer)
    usable_TV = logits_TV[:, : shown.tokenizer.vocab_size]
    for at, (rank, loss, names, truth) in enumerate(tab.run("predicted()")):
        true = tokens_T[at + 1]
        assert rank == int((usable_TV[at] > usable_TV[at, true]).sum())
        assert loss == pytest.approx(float(losses_T[at]), abs=1e-4)
        assert names == [named(int(token)) for token in usable_TV[at].topk(10).indices]
        assert truth == named(int(true))


@of_each_kind
def test_costs_of_switching_heads_off_are_those_of_the_viewer(tab: Page, name: str):
    shown = see(tab, name)
    costs_LHN = costs(shown.model, shown.tokens_1T)[:, :, 0]
    found = torch.tensor(tab.run("state.frame.panels.map((panel) => costs(panel))"))
    assert largest(found - costs_LHN.flatten(0, 1)) < 2e-4
    assert largest(costs_LHN) > 0.1


def test_the_switch_off_tab_says_what_a_head_is_worth(tab: Page):
    shown = see(tab, "wide")
    tab.click("#grid .heads:nth-of-type(1) button:nth-child(3)")
    tab.run("update({ side: 'off' })")
    means_LH = costs(shown.model, shown.tokens_1T).mean((2, 3))
    before = float(losses(shown.model, shown.tokens_1T).mean())
    assert number(tab, "off") == pytest.approx(before + float(means_LH[0, 2]), abs=1e-3)
    tab.wait("!document.querySelector('.dense').textContent.includes('–')")
    for layer, row in enumerate(table(tab, 0)):
        shown_means = [as_number(cell) for cell in row[1:]]
        assert shown_means == pytest.approx(means_LH[layer].tolist(), abs=0.006)


@of_each_kind
def test_a_head_that_is_switched_off_leaves_the_logits_that_it_leaves_in_pytorch(
    tab: Page, name: str
):
    shown = see(tab, name)
    all_on_TV = logits(tab)
    tab.click("#grid .heads:nth-of-type(1) button:nth-child(2)")
    tab.click("[data-key=off]")
    with switch_off(shown.model, 0, 1):
        expected_TV = record(shown.model, shown.tokens_1T).logits_BTV[0]
        costs_LHBN = costs(shown.model, shown.tokens_1T)
    assert largest(logits(tab) - expected_TV) < 1e-4
    assert largest(expected_TV - all_on_TV) > 0.1
    found = torch.tensor(tab.run("costs(state.frame.panels.at(-1))"))  # of another, without this
    assert largest(found - costs_LHBN[-1, -1, 0]) < 2e-4
    tab.click("[data-key=off]")
    assert torch.equal(logits(tab), all_on_TV)


# --- Follow ---------------------------------------------------------------------------------------


def streams(model: GPT, tokens_1T: Tensor) -> Tensor:
    """Return the stream after the embedding and after each layer (L + 1, T, C)."""
    found: list[Tensor] = []
    first = model.get_submodule("blocks.0")
    hooks = [first.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))]
    for layer in range(model.config.n_layer):
        block = model.get_submodule(f"blocks.{layer}")
        hooks.append(block.register_forward_hook(lambda _, __, x: found.append(x[0])))
    with torch.inference_mode():
        model(tokens_1T)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@of_each_kind
def test_what_all_parts_add_is_the_stream(tab: Page, name: str):
    shown = see(tab, name)
    streams_LTC = streams(shown.model, shown.tokens_1T)
    y_LHTD = record(shown.model, shown.tokens_1T).y_LBHTD[:, 0]
    H, D = shown.model.config.n_head, shown.model.config.head_dim
    for at in (0, 7, 20):
        adds = {part: torch.tensor(x) for part, x in tab.run(f"partsAt({at})")}
        assert torch.allclose(torch.stack([*adds.values()]).sum(0), streams_LTC[-1, at], atol=1e-4)
        assert torch.allclose(adds["embedding"], streams_LTC[0, at], atol=1e-6)
        for layer in range(shown.model.config.n_layer):
            W = shown.model.get_parameter(f"blocks.{layer}.attn.c_proj.weight").unflatten(1, (H, D))
            for head in range(H):
                expected_C = W[:, head] @ y_LHTD[layer, head, at]
                found_C = adds[f"layer {layer}, head {head}"]
                assert torch.allclose(found_C, expected_C, atol=1e-4)


@of_each_kind
def test_what_pushes_a_token_adds_up_to_its_logit(tab: Page, name: str):
    shown = see(tab, name)
    logits_TV = record(shown.model, shown.tokens_1T).logits_BTV[0]
    for at in (0, 7, 20):
        for id in (0, 3, int(logits_TV[at].argmax()), shown.tokenizer.vocab_size - 1):
            found = tab.run(f"pushesAt({at}, {id})")
            total = sum(push for _, push in found)
            assert total == pytest.approx(float(logits_TV[at, id]), abs=1e-3)
            assert max(abs(push) for _, push in found) > 0.05


def test_a_push_is_the_change_of_the_logit_with_the_divisor_held_fixed(tab: Page):
    for name in ("gpt2", "modern"):
        shown = see(tab, name)
        top_C = streams(shown.model, shown.tokens_1T)[-1, 7]
        is_gpt2 = name == "gpt2"
        size = top_C.std(correction=0) if is_gpt2 else top_C.square().mean().sqrt()
        direction_C = shown.model.get_parameter("ln_f.weight") / size
        direction_C = direction_C * shown.model.get_parameter("lm_head.weight")[3]
        adds = {part: torch.tensor(x) for part, x in tab.run("partsAt(7)")}
        pushes = dict(tab.run("pushesAt(7, 3)"))
        for part, adds_C in adds.items():
            centred_C = adds_C - adds_C.mean() if is_gpt2 else adds_C
            assert pushes[part] == pytest.approx(float(centred_C @ direction_C), abs=1e-3), part


@of_each_kind
def test_the_guess_after_a_layer_is_what_the_last_norm_and_the_head_make_of_its_stream(
    tab: Page, name: str
):
    shown = see(tab, name)
    model = shown.model
    for at in (0, 20):
        found = tab.run(f"guesses({at})")
        for (best, chances), stream_TC in zip(found, streams(model, shown.tokens_1T), strict=True):
            with torch.inference_mode():
                expected_V = model.lm_head(model.ln_f(stream_TC[at])).softmax(-1)
            assert best == int(expected_V.argmax())
            assert largest(torch.tensor(chances) - expected_V) < 1e-5


def test_the_follow_tab_shows_the_sum_and_the_logit_that_it_is(tab: Page):
    shown = see(tab, "gpt2")
    tab.run("update({ side: 'follow', row: 7 })")
    logits_V = record(shown.model, shown.tokens_1T).logits_BTV[0, 7]
    token = shown.tokens_1T[0, 8]
    assert number(tab, "logit") == pytest.approx(float(logits_V[token]), abs=0.006)
    *_, total = table(tab, 1)
    assert total[0] == "all together"
    assert as_number(total[2]) == number(tab, "logit")
    assert [row[0] for row in table(tab, 0)] == ["layer 1", "layer 0", "embedding"]
    chances = [as_number(row[3]) for row in table(tab, 0)]
    assert chances[0] == pytest.approx(float(logits_V.softmax(-1)[token]), abs=6e-4)


# --- Compare --------------------------------------------------------------------------------------


def compare(tab: Page, other: str) -> None:
    """Type another text into the box of the Compare tab."""
    tab.run("update({ side: 'compare' })")
    tab.run("document.querySelector('[data-key=other]').focus()")
    tab.type(other)


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        ("abcd", "abcd", [0, 1, 2, 3]),
        ("abXcd", "abYcd", [0, 1, 2, 3, 4]),  # one word replaced
        ("abcd", "abXcd", [0, 1, 3, 4]),  # one put in
        ("abXcd", "abcd", [0, 1, None, 2, 3]),  # one left out
        ("abXXcd", "abYcd", [0, 1, None, None, 3, 4]),  # two for one: no telling which
        ("Xab", "Yab", [0, 1, 2]),
        ("abX", "abY", [0, 1, 2]),
        ("abX", "ab", [0, 1, None]),
        ("abc", "xyz", [0, 1, 2]),  # nothing in common, but as long
        ("abc", "wxyz", [None, None, None]),
        ("a", "a", [0]),
    ],
)
def test_positions_are_paired_with_those_of_the_other_text(
    tab: Page, ours: str, others: str, expected: list[int | None]
):
    ids, other = (json.dumps(list(map(ord, text))) for text in (ours, others))
    assert tab.run(f"partners({{ ids: {ids}, other: {other} }})") == expected


def common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = lengths[:]
        for n, y in enumerate(b):
            lengths[n + 1] = before[n] + 1 if x == y else max(before[n + 1], lengths[n])
    return lengths[-1]


def test_as_many_equal_tokens_are_paired_as_the_texts_have_in_common(tab: Page):
    chance = random.Random(0)
    for _ in range(60):
        ids, other = ([chance.randrange(5) for _ in range(chance.randint(1, 20))] for _ in "ab")
        found = tab.run(f"partners({{ ids: {ids}, other: {other} }})")
        pairs = [(i, j) for i, j in enumerate(found) if j is not None]
        assert sum(ids[i] == other[j] for i, j in pairs) == common(ids, other)
        assert all(j < later for (_, j), (_, later) in itertools.pairwise(pairs))


def test_the_difference_map_is_that_of_two_records(tab: Page):
    shown = see(tab, "wide", "to be or not to be")
    compare(tab, "to be one not to be")
    pairs = tab.run("partners(state.scene)")
    here, there = (
        record(shown.model, shown.tokens(text)).weights_LBHTS[:, 0].flatten(0, 1)
        for text in ("to be or not to be", "to be one not to be")
    )
    n_pairs = 0
    for n, found in enumerate(tab.run("state.frame.panels.map(differences)")):
        for i, row in enumerate(found):
            for j, change in enumerate(row[: i + 1]):
                y, x = pairs[i], pairs[j]
                if y is None or x is None:
                    assert change is None
                    continue
                n_pairs += 1
                expected = float(there[n][y, x] - here[n][i, j])
                assert change == pytest.approx(expected, abs=1e-5), (n, i, j)
    assert n_pairs > 500
    moved = tab.run("state.frame.panels.map(moved)")
    assert [row[0] for row in table(tab, 0)] == [
        f"layer {n // 3}, head {n % 3}" for n in sorted(range(6), key=lambda n: -moved[n])
    ]


def test_a_text_compared_with_itself_differs_nowhere(tab: Page):
    see(tab, "wide")
    compare(tab, TEXT)
    assert {as_number(row[2]) for row in table(tab, 0)} == {0}
    assert {as_number(row[2]) for row in table(tab, 1)} == {0}
    assert {as_number(row[3]) for row in table(tab, 1)} == {1}


def test_one_word_in_two_texts_begins_as_one_vector_and_shares_add_up(tab: Page):
    shown = see(tab, "one layer")
    compare(tab, "xx " + TEXT.replace("rose", "nose"))
    last = len(TEXT) - 1
    tab.run(f"update({{ row: {last} }})")
    after, before = table(tab, 1)
    assert (before[0], as_number(before[2]), as_number(before[3])) == ("embedding", 0, 1)
    there = shown.tokens("xx " + TEXT.replace("rose", "nose"))
    a_C, b_C = (streams(shown.model, t)[-1, -1] for t in (shown.tokens_1T, there))
    apart = (a_C - b_C).norm() / ((a_C.norm() + b_C.norm()) / 2)
    assert as_number(after[2]) == pytest.approx(float(apart), abs=6e-4)
    cosine = F.cosine_similarity(a_C, b_C, dim=0)
    assert as_number(after[3]) == pytest.approx(float(cosine), abs=6e-4)
    shares = [as_number(row[2].removesuffix(" %")) for row in table(tab, 2)]
    assert len(shares) == 5  # the embedding, three heads and the MLP
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert max(shares) > 10


def test_one_can_type_in_the_middle_of_the_other_text(tab: Page):
    see(tab, "modern")
    compare(tab, "to be or to be")
    tab.run("state.scene.box.setSelectionRange(9, 9)")
    for letters in ("no", "t "):
        tab.type(letters)
    assert tab.run("state.scene.box.value") == "to be or not to be"
    assert tab.run("state.scene.other") == BPE.encode("to be or not to be")


@of_each_kind
def test_a_head_is_worth_the_same_whether_it_is_on_or_off(tab: Page, name: str):
    see(tab, name)
    tab.run("update({ side: 'off' })")
    before, shown = tab.run("costs(state.panel)"), number(tab, "off")
    tab.run("switchOff(state.panel)")
    assert tab.run("costs(state.panel)") == pytest.approx(before, abs=1e-5)
    assert number(tab, "off") == shown
    tab.run("update({ side: 'numbers' })")
    assert "this head is switched off" in text_of(tab, "#side")


def test_an_end_of_text_that_was_written_stays_one_token_when_the_text_is_edited(tab: Page):
    see(tab, "grouped")
    tab.run(f"take(state.scene, [...state.scene.all, {CHARACTERS.end_of_text}]); showWritten()")
    tab.run("$('typed').value += 'to'; $('typed').oninput()")
    expected = [*CHARACTERS.encode(TEXT), CHARACTERS.end_of_text, *CHARACTERS.encode("to")]
    assert tab.run("state.scene.all") == expected


def test_the_minifier_is_given_no_template_within_a_template():
    """It would take the inner one for the end of the outer one, and drop spaces."""
    for path in page.FOLDER.glob("*.js"):
        for line in path.read_text(encoding="utf-8").splitlines():
            depth = 0
            for mark in re.findall(r"`|\$\{|\}", line):
                assert not (mark == "`" and depth), f"{path.name}: {line}"
                depth = max(0, depth + {"${": 1, "}": -1, "`": 0}[mark])


# --- A reader's page ------------------------------------------------------------------------------

RHYME = "the cat and the hat, the cat and the bat"
LETTERS = CharTokenizer(RHYME + "\n!", with_end_of_text=False)
LABELLED = 4  # layer 1, head 1
CONTEXT = 64


@pytest.fixture(scope="module")
def reader() -> list[Checkpoint]:
    sizes: Any = {"vocab_size": LETTERS.vocab_size, "context_length": CONTEXT}
    return judged([built(7, **sizes), built(8, **sizes)], LETTERS)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, reader: list[Checkpoint]) -> str:
    scene = running_scene(reader, RHYME, LETTERS, "f16")
    for panel in scene["frames"][-1]["panels"]:
        panel["label"] = ""
    scene["frames"][-1]["panels"][LABELLED]["label"] = "previous"
    path = tmp_path_factory.mktemp("reader") / "page.html"
    path.write_text(page.build([scene]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Page, address: str) -> Page:
    """A page as a reader opens it, with one head that is labelled."""
    browser.messages.clear()
    browser.open(address)
    return browser


def typed(tab: Page) -> str:
    return tab.run("typed.value")


def test_the_page_opens_from_a_file_asks_nobody_and_complains_of_nothing(opened: Page):
    n_sides = opened.run("document.querySelectorAll('#sides [role=tab]').length")
    assert n_sides == 7
    for side in range(n_sides):
        opened.click(f"#sides :nth-child({side + 1})")
        assert opened.run("document.querySelector('#side').textContent.length") > 20
        opened.press("n")
    compare(opened, "the bat")
    opened.click("[data-key=lines]")
    opened.click("[data-key=off]")
    opened.click("#start")
    assert opened.complaints() == [], json.dumps(opened.complaints())[:900]
    assert [url[:7] for url in opened.requests()] == ["file://"]
    assert opened.run("performance.getEntriesByType('resource').length") == 0


def test_everything_of_a_page_with_a_model_fits_a_laptop_screen(opened: Page):
    assert opened.run("document.documentElement.scrollHeight <= innerHeight")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    for part in ("#typed", "#maps canvas", "#grid", "#legend", "#sides"):
        assert opened.run(f"document.querySelector('{part}').getBoundingClientRect().bottom <= 768")


def test_it_opens_on_a_labelled_head_where_it_does_what_its_label_says(
    opened: Page, reader: list[Checkpoint]
):
    tokens_1T = torch.tensor([LETTERS.encode(RHYME)])
    weights_TT = record(rounded(reader[1].model, "f16"), tokens_1T).weights_LBHTS[1, 0, 1]
    before_T = weights_TT.diagonal(-1)
    assert before_T.max() > 0.3
    best = int(before_T.argmax())
    found = opened.run("[state.panel.name, state.row, state.column]")
    assert found == ["layer 1, head 1", best + 1, best]
    assert number(opened, "model") == pytest.approx(float(before_T.max()), abs=1e-4)


def test_a_walk_has_five_stops_and_the_arrow_keys_go_through_them(opened: Page):
    opened.click("#start")
    sides = ["Numbers", "Numbers", "Next token", "Follow", "Switch off"]

    def stop() -> tuple[str, str]:
        return (text_of(opened, "#walk small"), text_of(opened, "#sides [aria-selected=true]"))

    for n, side in enumerate(sides):
        assert stop() == (f"{n + 1} of 5", side)
        assert len(text_of(opened, "#walk p")) > 40
        opened.press("ArrowRight")
    assert opened.run("document.querySelector('#walk').hidden")
    assert opened.run("document.activeElement.id") == "start"
    opened.click("#start")
    for key, n in (("ArrowLeft", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2)):
        opened.press(key)
        assert stop() == (f"{n} of 5", sides[n - 1])
    opened.press("Escape")
    assert opened.run("document.querySelector('#walk').hidden")
    assert opened.complaints() == [], json.dumps(opened.complaints())[:900]


def test_w_writes_until_it_is_pressed_again_and_n_writes_one_token(opened: Page):
    opened.press("n")
    assert opened.run("state.scene.all.length") == len(RHYME) + 1
    assert typed(opened) == LETTERS.decode(opened.run("state.scene.all"))
    assert typed(opened).startswith(RHYME)
    opened.press("w")
    opened.wait(f"state.scene.all.length > {len(RHYME) + 5}")
    assert opened.run("state.writing !== null")
    assert text_of(opened, "[data-key=write]") == "■ Stop"
    opened.press("w")
    assert opened.run("state.writing") is None
    opened.run("new Promise(requestAnimationFrame)")
    n = opened.run("state.scene.all.length")
    assert text_of(opened, "[data-key=write]") == "▶ Write"
    opened.run("new Promise((done) => setTimeout(done, 100))")
    assert opened.run("state.scene.all.length") == n
    assert opened.complaints() == [], json.dumps(opened.complaints())[:900]


def test_no_key_writes_while_one_types(opened: Page):
    opened.run("typed.select()")
    opened.press("n")
    assert (typed(opened), opened.run("state.scene.all.length")) == ("n", 1)
    compare(opened, "the ")
    opened.press("n")
    opened.run("document.querySelector('[data-key=other]').focus()")
    assert (typed(opened), opened.run("state.scene.box.value")) == ("n", "the n")
    assert opened.run("state.writing") is None


def test_a_text_that_the_vocabulary_lacks_is_refused_in_a_sentence(opened: Page):
    opened.run("typed.select()")
    opened.type("the Xat")
    said = text_of(opened, "#notices")
    assert said == 'the character vocabulary lacks "X": use the characters of the training text'
    assert opened.run("state.scene.ids") == LETTERS.encode(RHYME)
    assert typed(opened) == "the Xat"
    opened.run("typed.select()")
    opened.type("the hat")
    assert text_of(opened, "#notices") == ""
    assert opened.run("state.scene.ids") == LETTERS.encode("the hat")
    strip = "[...document.querySelectorAll('#text .token')].map((token) => token.textContent)"
    assert opened.run(strip) == list("the␣hat")
    assert opened.complaints() == [], json.dumps(opened.complaints())[:900]


def test_no_text_at_all_keeps_the_last_one(opened: Page):
    opened.run("typed.value = ''; typed.dispatchEvent(new Event('input'))")
    assert opened.run("state.scene.ids") == LETTERS.encode(RHYME)
    assert opened.complaints() == [], json.dumps(opened.complaints())[:900]


def test_a_click_on_an_alternative_goes_on_with_it(opened: Page, reader: list[Checkpoint]):
    opened.run("update({ side: 'next', row: 6 })")
    logits_V = record(reader[1].model, torch.tensor([LETTERS.encode(RHYME[:7])])).logits_BTV[0, -1]
    third = int(logits_V.topk(3).indices[2])
    opened.click("#side tr:nth-child(3) button")
    expected = RHYME[:7] + LETTERS.decode([third])
    assert typed(opened) == expected
    assert opened.run("state.scene.ids") == LETTERS.encode(expected)
    assert opened.run("state.row") == 7
    assert text_of(opened, "[data-n='7']") == expected[-1].replace(" ", "␣").replace("\n", "↵")


def test_another_checkpoint_is_another_model(opened: Page, reader: list[Checkpoint]):
    tokens_1T = torch.tensor([LETTERS.encode(RHYME)])
    for key, n in (("ArrowLeft", 0), ("ArrowRight", 1)):
        opened.run("document.querySelector('#film input').focus()")
        opened.press(key)
        assert text_of(opened, "#film") == f"step {100 * n}"
        found = torch.tensor(opened.run("[...losses(state.frame)]"))
        expected_N = losses(rounded(reader[n].model, "f16"), tokens_1T)[0]
        assert largest(found - expected_N) < 1e-4


def test_a_text_longer_than_the_context_is_seen_from_its_latest_part(opened: Page):
    opened.run("typed.select()")
    opened.type(RHYME * 2)
    assert opened.run("state.scene.ids") == LETTERS.encode((RHYME * 2)[-CONTEXT:])
    assert typed(opened) == RHYME * 2


@pytest.mark.slow
def test_the_memory_of_a_page_stays_flat_over_a_thousand_tokens(opened: Page):
    def used() -> float:
        opened.ask("HeapProfiler.collectGarbage")
        return opened.ask("Runtime.getHeapUsage")["usedSize"]

    def write(n: int) -> None:
        for _ in range(n // 50):
            opened.run("for (const _ of range(50)) writeToken(); showWritten()")

    opened.run("update({ side: 'next' })")
    write(300)
    before = used()
    write(1000)
    assert opened.run("state.scene.all.length") == len(RHYME) + 1300
    assert used() < 1.1 * before
    assert opened.run("Object.keys(state.frame.memo).length") < 5  # nothing of earlier texts


def test_the_walk_ends_when_another_scene_is_opened(opened: Page):
    opened.click("#start")
    assert opened.run("$('walk').hidden") is False
    opened.click("#tabs :first-child")
    assert opened.run("$('walk').hidden") is True
    assert opened.complaints() == []


# --- Everybody can use it -------------------------------------------------------------------------

CONTROLS = {"button", "slider", "textbox", "tab", "combobox", "menuitem", "link", "image"}


def each_side(tab: Page) -> Iterator[str]:
    for side in range(7):
        tab.click(f"#sides :nth-child({side + 1})")
        if side == 4:
            compare(tab, "the bat")
        yield text_of(tab, "#sides [aria-selected=true]")


def test_every_button_slider_and_box_has_a_name_for_those_who_cannot_see_it(opened: Page):
    opened.click("#start")
    found: set[str] = set()
    for side in each_side(opened):
        for node in opened.ask("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in CONTROLS and not node["ignored"]:
                found.add(role)
                assert node["name"]["value"].strip(), (side, node)
    assert found >= {"button", "slider", "textbox", "tab", "combobox", "image"}


def test_everything_can_be_reached_with_the_keyboard(opened: Page):
    opened.run(HELPERS)
    for side in each_side(opened):
        assert opened.run("unreachable()") == [], side
    reached: set[str] = set()
    opened.run("document.activeElement.blur()")
    for _ in range(60):
        opened.press("Tab")
        reached.add(opened.run("document.activeElement.closest('[id]')?.id"))
    parts = {"tabs", "start", "typed", "text", "grid", "film", "bar", "maps", "sides", "side"}
    assert parts <= reached


def test_the_keyboard_alone_opens_a_head_switches_it_off_and_writes(opened: Page):
    opened.run("document.querySelector('[data-key=off]').focus()")
    opened.press("Enter")
    assert opened.run("[...state.scene.off]") == ["1.1"]
    assert opened.run("document.activeElement.matches('[data-key=off]')")
    assert text_of(opened, "[data-key=off]") == "off"
    opened.run("update({ side: 'next' })")
    opened.run("document.querySelector('[data-key=one]').focus()")
    opened.press("Enter")
    assert opened.run("state.scene.all.length") == len(RHYME) + 1
    assert opened.run("document.activeElement.matches('[data-key=one]')")


# --- Hostile texts --------------------------------------------------------------------------------

NASTY = "</script><script>bad = 1</script><img src=x onerror='bad = 1'> & 🙂\n\t\"'\\ \u2028"


def test_no_text_can_become_part_of_a_page_with_a_model(browser: Page, tmp_path: Path):
    nasty = CharTokenizer(NASTY + "{}$`", with_end_of_text=True)
    model = built(9, vocab_size=nasty.vocab_size + 2)
    scene: Json = running_scene(unmeasured(model), NASTY, nasty)
    scene["run"] = NASTY
    scene["model"]["names"][0] = NASTY
    (tmp_path / "page.html").write_text(page.build([scene]), encoding="utf-8")
    browser.messages.clear()
    browser.open((tmp_path / "page.html").as_uri())
    browser.run("update({ side: 'next' })")
    for _ in range(5):
        browser.press("n")
    compare(browser, NASTY[::-1])
    browser.run("update({ side: 'follow' })")
    assert browser.run("typeof bad") == "undefined"
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert typed(browser).startswith(NASTY)
    assert browser.run("state.scene.box.value") == NASTY[::-1]
    assert text_of(browser, "#run") == NASTY
    assert browser.complaints() == []
