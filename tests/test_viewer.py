"""What the viewer shows is what the model computed, and what it says of a head has been checked."""

import base64
import copy
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.shown import shown
from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from engine.attend import fused_attention
from model import GPT, Attend, ModelConfig, attention
from viewer import page, reverser
from viewer.labels import label
from viewer.page import predictions
from viewer.probe import Measured, make_probes, mean_scores, measure
from viewer.record import costs, losses, record, switch_off
from viewer.scene import Checkpoint, cuts, model_scene
from viewer.scores import SCORES, duplicate, induction, uniform

T, V = 11, 13
TOKENS_1T = torch.tensor([[5, 1, 7, 3, 5, 1, 7, 3, 2, 0, 12]])
SIZES = {"context_length": 16, "n_layer": 2, "n_head": 3, "n_embd": 24, "vocab_size": V}
kinds = pytest.mark.parametrize(
    ("architecture", "attend"),
    [("gpt2", fused_attention), ("modern", fused_attention), ("modern", attention)],
)


def built(architecture: Any = "modern", attend: Attend = attention, **sizes: Any) -> GPT:
    """Build a model with wild weights, so that no two heads are alike."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(architecture=architecture, **{**SIZES, **sizes}), attend)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


# --- The record -----------------------------------------------------------------------------------


@kinds
def test_a_record_holds_the_models_own_tensors_and_changes_nothing(
    architecture: Any, attend: Attend
):
    model = built(architecture, attend)
    seen: list[Tensor] = []
    with torch.inference_mode():
        logits_BTV = model(TOKENS_1T)
        model.get_submodule("blocks.1.attn.c_proj").register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        kept = record(model, TOKENS_1T)
    assert torch.equal(kept.logits_BTV, logits_BTV)
    assert torch.equal(kept.y_LBHTD[1].transpose(1, 2).flatten(2), seen[0])
    rows_LBHT = kept.weights_LBHTS.sum(-1)
    assert torch.allclose(rows_LBHT, torch.ones_like(rows_LBHT), atol=1e-6)
    assert kept.weights_LBHTS.triu(1).abs().max() == 0
    assert torch.allclose(kept.weights_LBHTS @ kept.v_LBHSD, kept.y_LBHTD, atol=1e-5)
    scores_LBHTS = kept.q_LBHTD @ kept.k_LBHSD.mT / math.sqrt(8)
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights_LBHTS = scores_LBHTS.masked_fill(future_TT, -torch.inf).softmax(-1)
    assert torch.allclose(weights_LBHTS, kept.weights_LBHTS, atol=1e-6)


def test_a_record_leaves_no_hook_behind():
    model = built()
    record(model, TOKENS_1T)
    costs(model, TOKENS_1T)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_that_share_keys_and_values_are_shown_with_them():
    model = built(n_head=4, n_kv_head=2, n_embd=32)
    kept = record(model, TOKENS_1T)
    for shared_LBHSD in (kept.k_LBHSD, kept.v_LBHSD):
        assert torch.equal(shared_LBHSD[:, :, 0], shared_LBHSD[:, :, 1])
        assert not torch.equal(shared_LBHSD[:, :, 1], shared_LBHSD[:, :, 2])
    assert torch.equal(kept.logits_BTV, model(TOKENS_1T))
    assert torch.allclose(kept.weights_LBHTS @ kept.v_LBHSD, kept.y_LBHTD, atol=1e-5)


def test_a_head_that_is_off_passes_on_nothing_and_the_others_what_they_did():
    model = built()
    with torch.inference_mode(), switch_off(model, 0, 1):
        without_BTV = model(TOKENS_1T)
    weight_CC = model.get_parameter("blocks.0.attn.c_proj.weight")
    with torch.inference_mode():  # the same by zeroing what c_proj would make of that head
        weight_CC.unflatten(1, (3, 8))[:, 1] = 0
        expected_BTV = model(TOKENS_1T)
    assert torch.allclose(without_BTV, expected_BTV, atol=1e-5)
    assert not torch.allclose(without_BTV, record(built(), TOKENS_1T).logits_BTV)


def test_costs_are_the_losses_without_each_head_less_those_with_all():
    model = built()
    costs_LHBN = costs(model, TOKENS_1T)
    assert costs_LHBN.shape == (2, 3, 1, T - 1)
    with switch_off(model, 1, 2):
        without_BN = losses(model, TOKENS_1T)
    assert torch.equal(costs_LHBN[1, 2], without_BN - losses(model, TOKENS_1T))
    expected = F.cross_entropy(model(TOKENS_1T[:, :-1])[0], TOKENS_1T[0, 1:])
    assert losses(model, TOKENS_1T).mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_heads_that_a_page_shows_are_switched_off():
    model = built(n_layer=2, n_head=13, n_embd=26)
    costs_LHBN = costs(model, TOKENS_1T)
    assert costs_LHBN[:, :12].isfinite().all()
    assert costs_LHBN[:, 12].isnan().all()


# --- Scores ---------------------------------------------------------------------------------------

EIGHT_T = torch.tensor([5, 1, 7, 3] * 2)
PREVIOUS_TT = torch.eye(8).roll(-1, dims=1)  # and row 0, which has nothing before it, at itself
PREVIOUS_TT[0] = torch.eye(8)[0]
FIRST_TT = torch.zeros(8, 8).index_fill(1, torch.tensor([0]), 1.0)
COPIES_TT = torch.eye(8)
COPIES_TT[4:] = torch.eye(8)[1:5]  # position i looks at i - 3, which followed its copy at i - 4
HALVES_TT = (PREVIOUS_TT + torch.eye(8)) / 2
COLUMN_TT = torch.zeros(8, 8).index_fill(1, torch.tensor([2]), 1.0).tril()
COLUMN_TT[:2, 0] = 1  # which cannot see token 2
LATE_TT = torch.eye(8)
LATE_TT[5:] = torch.eye(8)[4]  # few queries look at token 4, though all that can


@pytest.mark.parametrize(
    ("weights_TT", "expected"),
    [
        (torch.eye(8), {"previous": 0, "current": 1, "entropy": 0, "distance": 0}),
        (PREVIOUS_TT, {"previous": 1, "current": 0, "first": 1 / 7, "distance": 0.875}),
        (FIRST_TT, {"first": 1, "previous": 1 / 7, "distance": 3.5}),
        (uniform(8), {"previous": 0.245408, "current": 0.245408, "first": 0.245408}),
        (uniform(8), {"entropy": 1, "distance": 1.75, "induction": 0.158631}),
        (uniform(8), {"duplicate": 0.158631}),
        (COPIES_TT, {"induction": 1, "duplicate": 0}),
        (HALVES_TT, {"previous": 0.5, "current": 0.5}),
        (COLUMN_TT, {"column": 1, "first": 1 / 7}),
        (LATE_TT, {"column": 0}),
        (FIRST_TT, {"column": 0}),
        (torch.eye(8), {"column": 0}),
        (uniform(8), {"column": sum(1 / n for n in range(3, 9)) / 6}),
    ],
)
def test_scores_of_matrices_with_known_values(weights_TT: Tensor, expected: dict[str, float]):
    found = {name: float(SCORES[name](weights_TT, EIGHT_T)) for name in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_induction_score_is_the_mean_of_the_stripe_on_a_text_said_twice():
    weights_TT = torch.rand(8, 8).tril().softmax(-1)
    stripe = [weights_TT[i, i - 3] for i in range(4, 8)]
    assert induction(weights_TT, EIGHT_T) == pytest.approx(float(sum(stripe)) / 4)
    copies = [weights_TT[i, i - 4] for i in range(4, 8)]
    assert duplicate(weights_TT, EIGHT_T) == pytest.approx(float(sum(copies)) / 4)


# --- Labels ---------------------------------------------------------------------------------------


def measured(
    name: str,
    score: float,
    uniform: float = 0.05,
    n_periods: int = 4,
    costs: tuple[float, float] = (0.5, 0.5),
    on_random: float | None = None,
) -> Measured:
    """Return two layers of one head that scores so in `name`, and 0 in everything else."""
    scores = {key: torch.full((2, 1), score if key == name else 0.0) for key in SCORES}
    first_LH = torch.full((2, 1), score if on_random is None else on_random)
    return Measured(
        written=scores,
        copied=scores | {"first": first_LH},
        uniform=dict.fromkeys(SCORES, uniform),
        cost_written_LH=torch.full((2, 1), costs[0]),
        cost_copied_LH=torch.full((2, 1), costs[1]),
        copy_loss=1.0,
        n_periods=n_periods,
    )


@pytest.mark.parametrize(
    ("layer", "found", "expected", "reason"),
    [
        (1, measured("induction", 0.7), "induction", "+0.50 on a copy"),
        (0, measured("induction", 0.95), "", "takes two layers, so this head looks a fixed"),
        (1, measured("induction", 0.7, n_periods=1), "", "too short to try several periods"),
        (1, measured("induction", 0.7, costs=(9, 0.05)), "", "costs 0.05 nats on a copy"),
        (1, measured("induction", 0.7, uniform=0.2), "", "less than 5 times uniform"),
        (0, measured("duplicate", 0.5), "duplicate", "duplicate token 0.50"),
        (0, measured("previous", 0.29), "", "no score of 0.3 or more"),
        (0, measured("previous", 0.31), "previous", "previous token 0.31 (uniform 0.05)"),
        (0, measured("previous", 0.9, costs=(0.0, 0.0)), "", "costs next to nothing"),
        (0, measured("current", 0.9, costs=(0.0, 0.2)), "current", "+0.20 on a copy"),
        (
            0,
            measured("first", 0.9, costs=(0.0, 0.0)),
            "first",
            "+0.00 on a copy",
        ),
        (0, measured("column", 0.4), "column", "one token 0.40 (uniform 0.05)"),
        (0, measured("column", 0.4, uniform=0.1), "", "less than 5 times uniform"),
        (0, measured("column", 0.4, costs=(0.0, 0.0)), "", "costs next to nothing"),
        (0, measured("subject", 0.4), "subject", "subject 0.40 (uniform 0.05)"),
        (0, measured("object", 0.29), "", "no score of 0.3 or more"),
        (0, measured("adjective", 0.4, uniform=0.1), "", "less than 5 times uniform"),
        (0, measured("adjective", 0.4, costs=(0.0, 0.0)), "", "costs next to nothing"),
        (0, measured("subject", math.nan), "", "no score of 0.3 or more"),
        (0, measured("first", 0.9, on_random=0.1), "", "below 0.3 on random tokens"),
        (0, measured("first", 0.9, on_random=math.nan), "", "below 0.3 on random tokens"),
        (1, measured("induction", math.nan), "", "no score of 0.3 or more"),
    ],
)
def test_a_label_needs_score_baseline_and_behaviour(
    layer: int, found: Measured, expected: str, reason: str
):
    key, why = label(layer, 0, found)
    assert key == expected
    assert reason in why


def test_probes_repeat_different_tokens_at_several_periods():
    model = built(context_length=48, vocab_size=70)
    probes = make_probes(model, 3, 69)
    assert probes.written_BT.shape == (4, 48)
    assert probes.written_BT.max() < 69
    assert (probes.written_BT[:, 0] == 3).all()
    assert [tokens_BT.shape[1] // 2 for tokens_BT in probes.copies] == [10, 16]  # 25 do not fit
    for tokens_BT in probes.copies:
        once_BP, twice_BP = tokens_BT.chunk(2, dim=1)
        assert torch.equal(once_BP, twice_BP)
        assert all(len(row_P.unique()) == len(row_P) for row_P in once_BP)
    assert torch.equal(make_probes(model, 3, 69).written_BT, probes.written_BT)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_writes_the_probes_as_it_would_without_a_cache(architecture: Any):
    model = built(architecture)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.full((4, 1), 3)
    with torch.inference_mode():
        for _ in range(15):
            p_BV = model(tokens_BT)[:, -1, : V - 1].softmax(-1)
            tokens_BT = torch.cat((tokens_BT, p_BV.multinomial(1, generator=generator)), dim=1)
    assert torch.equal(make_probes(model, 3, V - 1).written_BT, tokens_BT)


def test_a_model_with_a_tiny_context_is_measured_as_far_as_it_goes():
    model = built(context_length=4)
    probes = make_probes(model, 0, V)
    assert probes.copies == []
    found = measure(model, probes)
    assert found.score("induction").isnan().all()
    assert label(1, 0, found)[0] in ("", "previous", "current", "first")


# --- Heads of one kind ----------------------------------------------------------------------------

P = 20
SIX_HEADS: dict[str, Any] = {"context_length": 48, "vocab_size": 70}  # of two layers


def said_twice(n_texts: int) -> Tensor:
    """Return texts (B, 1 + 2P): a first token, P different ones, and these again."""
    generator = torch.Generator().manual_seed(0)
    once_BP = torch.stack([torch.randperm(69, generator=generator)[:P] for _ in range(n_texts)])
    return torch.cat((torch.full((n_texts, 1), 69), once_BP, once_BP), dim=1)


def loss_on_the_second_copy(model: GPT, tokens_BT: Tensor) -> float:
    logits_BTV = model(tokens_BT)[:, P + 1 : -1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, P + 2 :].flatten()).item()


def mute(model: GPT, muted: list[tuple[int, int]]) -> GPT:
    """Return a copy of `model`, some of whose heads write nothing into the residual stream."""
    model = copy.deepcopy(model)
    for layer, head in muted:
        weight_CC = model.get_parameter(f"blocks.{layer}.attn.c_proj.weight")
        with torch.no_grad():
            weight_CC[:, 8 * head : 8 * head + 8] = 0
    return model


def test_on_texts_said_twice_scores_are_the_means_of_stripes():
    model = built(**SIX_HEADS)
    tokens_BT = said_twice(3)
    weights_LBHTS = record(model, tokens_BT).weights_LBHTS
    stripe_LBHP = weights_LBHTS.diagonal(1 - P, -2, -1)[..., 2:]  # 2 queries are in the first copy
    assert stripe_LBHP.shape == (2, 3, 3, P)
    found = mean_scores(model, tokens_BT)
    assert torch.allclose(found["induction"], stripe_LBHP.mean((1, -1)))
    below_LBHT = weights_LBHTS.diagonal(-1, -2, -1)
    assert torch.allclose(found["previous"], below_LBHT.mean((1, -1)))


# --- What the page is given -----------------------------------------------------------------------


@kinds
def test_the_page_is_given_the_models_tensors_to_float32(architecture: Any, attend: Attend):
    model = built(architecture, attend)
    probes = make_probes(model, 0, V)
    scene = model_scene([Checkpoint(7, model, measure(model, probes))], TOKENS_1T, str, [])
    kept = record(model, TOKENS_1T)
    costs_LHBN = costs(model, TOKENS_1T)
    frame = scene["frames"][0]
    assert frame["step"] == 7
    named = {"q": kept.q_LBHTD, "k": kept.k_LBHSD, "v": kept.v_LBHSD, "o": kept.y_LBHTD}
    for n, panel in enumerate(frame["panels"]):
        layer, head = divmod(n, 3)
        for name, tensor in named.items():
            found_TD = unpacked(panel[name]).reshape(T, 8)
            assert (found_TD == tensor[layer, 0, head].numpy()).all()
        weights_TT = unpacked(panel["w"]).reshape(T, T)
        assert (weights_TT == kept.weights_LBHTS[layer, 0, head].numpy()).all()
        assert unpacked(panel["costs"]) == pytest.approx(costs_LHBN[layer, head, 0])
    assert unpacked(frame["losses"])[:-1] == pytest.approx(losses(model, TOKENS_1T)[0], abs=1e-5)
    assert np.isnan(unpacked(frame["losses"])[-1])
    json.dumps(scene, allow_nan=False)


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_predictions_are_the_likeliest_tokens_and_how_likely_the_right_one_is(vocab_size: int):
    logits_TV = torch.randn(3, vocab_size) * 5
    truth_T = torch.tensor([4, 0, -1])
    found = predictions(logits_TV, truth_T, lambda token: f"<{token}>")
    top = logits_TV.softmax(-1).topk(min(10, vocab_size))
    assert unpacked(found["chances"]).reshape(3, -1) == pytest.approx(top.values.numpy(), abs=1e-6)
    assert found["top"][0] == [f"<{token}>" for token in top.indices[0].tolist()]
    losses_T = F.cross_entropy(logits_TV[:2], truth_T[:2], reduction="none")
    assert unpacked(found["losses"])[:2] == pytest.approx(losses_T, abs=1e-5)
    assert found["truth"] == ["<4>", "<0>", None]
    ranks = [int((logits_TV[i] > logits_TV[i, truth_T[i]]).sum()) for i in (0, 1)]
    assert found["ranks"] == [*ranks, -1]


def test_what_is_cut_is_said():
    small = ModelConfig(vocab_size=V, n_layer=12, n_head=12, n_embd=768).sized()
    large = ModelConfig(vocab_size=V, n_layer=13, n_head=16, n_embd=1024)
    assert cuts(small, 256) == []
    assert cuts(large, 300) == [
        "The first 256 of 300 tokens are shown.",
        "The first 12 of 13 layers are shown.",
        "The first 12 of 16 heads of each layer are shown.",
    ]


# --- The toy --------------------------------------------------------------------------------------


def test_the_toy_learns_to_look_backwards():
    frames = reverser.reverser_scene()["frames"]
    S = len(reverser.WORD)
    first_TS, last_TS = (
        unpacked(frame["panels"][0]["w"]).reshape(S, S) for frame in (frames[0], frames[-1])
    )
    assert np.fliplr(last_TS).diagonal().min() > 0.95
    assert np.fliplr(first_TS).diagonal().max() < 0.9
    assert frames[-1]["truth"] == list(reverser.WORD[::-1])
    assert [row[0] for row in frames[-1]["top"]] == list(reverser.WORD[::-1])
    assert unpacked(frames[-1]["losses"]).mean() < 0.1 < unpacked(frames[0]["losses"]).mean()


def test_training_the_toy_leaves_the_random_numbers_of_the_caller_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(reverser, "STEPS", (0, 1))
    torch.manual_seed(0)
    reverser.reverser_scene.__wrapped__()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b" cat", "␣cat"),
        (b"\n", "↵"),
        (b"\r\n\t", "␍↵⇥"),
        ("é日".encode(), "é日"),
        ("🙂".encode(), "🙂"),
        ("🙂".encode()[:2], "⟨F0⟩⟨9F⟩"),
        (b"a\xff", "a⟨FF⟩"),
        (b"\x00\x1b", "⟨U+0000⟩⟨U+001B⟩"),
        ("\u200b\u2028\u202e".encode(), "⟨U+200B⟩⟨U+2028⟩⟨U+202E⟩"),
        ("\u0301".encode(), "◌\u0301"),
        (b"</script>", "</script>"),
        (b"", "∅"),
        ("␣↵⇥␍".encode(), "⟨U+2423⟩⟨U+21B5⟩⟨U+21E5⟩⟨U+240D⟩"),
        ("⟨F0⟩".encode(), "⟨U+27E8⟩F0⟨U+27E9⟩"),
        ("∅".encode(), "⟨U+2205⟩"),
        ("◌\u0301".encode(), "⟨U+25CC⟩\u0301"),
    ],
)
def test_a_token_is_shown_as_what_it_is(raw: bytes, expected: str):
    assert shown(raw) == expected


def test_no_two_characters_or_bytes_look_alike():
    characters = [chr(n).encode() for n in range(0x10000) if not 0xD800 <= n <= 0xDFFF]
    raw = [b"", *characters, *(bytes([byte]) for byte in range(0x80, 0x100))]
    assert len(set(map(shown, raw))) == len(raw)


TEXT = "A 🙂 </script><!-- \"'&\\ \t\r\n é日\u2028 ␣"
RANKS = {bytes([byte]): byte for byte in range(256)} | {b"</": 256, b" \xf0\x9f": 257}


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), CharTokenizer(TEXT, with_end_of_text=True), BPETokenizer(RANKS, kind="bpe")],
)
def test_every_token_reaches_the_page_as_it_is_shown(tokenizer: Any):
    tokens = tokenizer.encode(TEXT)
    names = [shown(tokenizer.token_bytes(token)) for token in tokens]
    scene = {"axes": [{"queries": names}], "frames": []}
    html = page.build([scene])
    inside = html.split('id="data">')[1]
    data, rest = inside.split("</script>", 1)
    assert json.loads(data) == [scene]
    assert rest.startswith("\n<script>")
    assert "<" not in data


def test_the_page_names_no_other_host_and_has_no_way_to_ask_one():
    html = page.build([])
    assert "http:" not in html
    assert "https:" not in html
    without_hashes = re.sub("'sha256-[^']+'", "", html)
    assert "//" not in without_hashes.replace("// ", "").replace("\n//", "")
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import(", "innerHTML"):
        assert word not in html, word
    assert "default-src 'none'" in html


def test_the_page_fits_its_budget_and_so_does_the_gpt_in_it():
    html = page.build([])
    assert len(html.encode()) <= 60_300  # 60 kB of ours, and the policy with its hashes
    assert len((page.FOLDER / "gpt.js").read_text(encoding="utf-8").splitlines()) <= 300
