"""Roles are found where a reader finds them, and a head has their score for nothing else."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from data.roles import find_roles, tell
from data.stories import ROLES, generate
from data.tokenizer import ByteTokenizer
from model import GPT, ModelConfig
from viewer import probe
from viewer.probe import make_probes, measure
from viewer.record import record
from viewer.scores import SCORES, beyond_distance, uniform

BYTES = ByteTokenizer()
START = BYTES.vocab_size - 1
STORY = "Once Emma and Ben met. Ben gave Emma a cup. The end."


def words(text: str) -> list[bytes]:
    """Cut as bpe does, if it knows all words: "the dog." -> "the", " dog", "." """
    return [word.encode() for word in re.findall(r" ?\w+|\W", text)]


def pairs(tokens: list[bytes], role: str) -> list[tuple[str, str]]:
    """Return each query with its keys, as text."""
    names = [token.decode().strip() for token in tokens]
    mask_TT = find_roles(tokens)[role]
    rows = [(names[i], mask_TT[i].nonzero()[:, 0].tolist()) for i in range(len(names))]
    return [(query, " ".join(names[j] for j in keys)) for query, keys in rows if keys]


@pytest.mark.parametrize(
    ("text", "subjects", "objects", "adjectives"),
    [
        (
            "Once Emma and Ben met. The camel did not cross the swamp because it was too shy.",
            [("met", "Emma and Ben"), ("cross", "camel")],
            [("swamp", "cross")],
            [],
        ),
        (
            "The swamp was not crossed by the camel because it was too wide. The swamp lay empty.",
            [("crossed", "swamp"), ("lay", "swamp")],
            [],
            [],
        ),
        (
            "By the river Ida found a mole that dug a hole. The lamp did not fit into the cup.",
            [("found", "Ida"), ("dug", "mole"), ("fit", "lamp")],
            [("mole", "found"), ("hole", "dug")],
            [],
        ),
        (
            "A proud red fox met a calm black hen. The fox was proud and red.",
            [("met", "fox"), ("was", "fox")],
            [("hen", "met")],
            [("fox", "proud red"), ("hen", "calm black")],
        ),
        (
            'Ben gave Ida a cup. Ida thanked Ben for the cup. Ben sang: "La cup key cup key."',
            [("gave", "Ben"), ("thanked", "Ida"), ("sang", "Ben")],
            [("cup", "gave")],
            [],
        ),
        (
            'Ida taught Ben a spell: "Hear key bow." Ben remembered: "Hear bow."',
            [("taught", "Ida"), ("remembered", "Ben")],
            [("spell", "taught")],
            [],
        ),
        ("for word in words: print(word)  # the words of a story", [], [], []),
    ],
)
def test_roles_are_found_where_a_reader_finds_them(
    text: str,
    subjects: list[tuple[str, str]],
    objects: list[tuple[str, str]],
    adjectives: list[tuple[str, str]],
) -> None:
    tokens = words(text)
    assert pairs(tokens, "subject") == subjects
    assert pairs(tokens, "object") == objects
    assert pairs(tokens, "adjective") == adjectives


def test_every_sentence_of_a_story_has_a_subject_and_songs_have_none() -> None:
    for story in generate(300, seed=2):
        narrated = re.sub(r': "[^"]*"', ".", story.text).replace(". The end", "")
        n_sentences = narrated.count(". ") + 1
        found = re.findall(ROLES["subject"], story.text)
        n_clauses = narrated.count(" that ")
        assert len(found) == n_sentences + n_clauses, story.text


def test_the_last_token_of_a_word_looks_at_every_token_of_the_other() -> None:
    tokens = ["é".encode(), b"\xff\xf0 A pr", b"ou", b"d r", b"ed f", b"o", b"x r", b"an"]
    assert find_roles(tokens)["adjective"].nonzero().tolist() == [[6, 1], [6, 2], [6, 3], [6, 4]]


def planted(mask_TT: Tensor) -> Tensor:
    """Return weights that lie on the mask alone, and at token 0 where a row has nothing in it."""
    weights_TT = mask_TT.float()
    weights_TT[..., 0] += (~mask_TT.any(-1)).float()
    return weights_TT / weights_TT.sum(-1, keepdim=True)


@pytest.mark.parametrize("role", ROLES)
def test_a_score_is_near_1_for_its_role_alone_and_near_0_for_distance(role: str) -> None:
    texts_BT, masks = tell(BYTES, START, 512)
    assert len(texts_BT) > 3
    mask_TT = masks[role]
    assert float(beyond_distance(planted(mask_TT), mask_TT)) > 0.85
    T = texts_BT.shape[1]
    assert abs(float(beyond_distance(uniform(T), mask_TT))) < 0.1
    for back in (1, 2, 4):  # a head that looks a fixed distance back
        fixed_TT = torch.eye(T).roll(-back, dims=1).tril()
        assert float(beyond_distance(fixed_TT, mask_TT)) < 0.05
    others = [other for other in ROLES if other != role]
    assert all(float(beyond_distance(planted(masks[o]), mask_TT)) < 0.1 for o in others)


def test_stories_begin_with_the_token_that_the_model_began_with() -> None:
    texts_BT, masks = tell(BYTES, START, 32)
    assert texts_BT.shape[1] == 32
    assert texts_BT[0, 0] == START
    assert BYTES.decode(texts_BT[0, 1:].tolist()).startswith("Once ")
    assert all(mask_BTT.shape == (*texts_BT.shape, 32) for mask_BTT in masks.values())
    assert not any(mask_BTT.triu().any() for mask_BTT in masks.values())


def built() -> GPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 64}
    return GPT(ModelConfig(vocab_size=BYTES.vocab_size, **sizes)).eval()


def writes(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Let every model write these texts."""
    tokens_BT = torch.tensor([[START, *BYTES.encode(text)] for text in texts])
    monkeypatch.setattr(probe, "write", lambda *_: tokens_BT)


def test_a_model_that_writes_stories_is_scored_on_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    writes(monkeypatch, STORY, STORY)
    model = built()
    probes = make_probes(model, START, BYTES.vocab_size, BYTES)
    assert "adjective" in probes.roles
    found = measure(model, probes)
    weights_LBHTT = record(model, probes.written_BT).weights_LBHTS
    for role, mask_BTT in probes.roles.items():
        head_BTT = weights_LBHTT[0, :, 1]
        expected = float(beyond_distance(head_BTT, mask_BTT))
        assert float(found.score(role)[0, 1]) == pytest.approx(expected, abs=1e-6)
        assert abs(found.uniform[role]) < 0.05


def test_a_model_that_writes_anything_else_has_no_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    other = "The dog met a fox. Once Ben and Ida slept. The cat sighed."
    for texts in ([STORY, other[: len(STORY)]], [other]):
        writes(monkeypatch, *texts)
        probes = make_probes(model, START, BYTES.vocab_size, BYTES)
        assert probes.roles == {}
        found = measure(model, probes)
        assert all(found.score(role).isnan().all() for role in ROLES)
    writes(monkeypatch, STORY)
    assert make_probes(model, START, BYTES.vocab_size).roles == {}  # it does not know the text


@pytest.mark.parametrize("role", ROLES)
def test_without_the_text_a_role_has_no_score(role: str) -> None:
    weights_LHTT = uniform(8).expand(2, 3, 8, 8)
    found_LH = SCORES[role](weights_LHTT, torch.arange(8))
    assert found_LH.shape == (2, 3)
    assert found_LH.isnan().all()
