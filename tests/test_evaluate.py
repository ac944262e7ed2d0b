"""The validation loss against a mean over targets that is computed here."""

import signal
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.evaluate import evaluate
from engine.parallel import StopRequest, World
from helpers import signal_handlers_kept

WORLD = World(torch.device("cpu"))
V = 7


class Table(nn.Module):
    """Logits of the next token from a table, and a memory of the mode in which it was asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, V)
        self.modes: list[bool] = []

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self.modes.append(self.training)
        return F.cross_entropy(self.table(tokens_BT).flatten(0, 1), targets_BT.flatten())


def batches(*ignored: int) -> list[tuple[Tensor, Tensor]]:
    """One batch of 12 tokens for each number, of which so many are not to be predicted."""
    torch.manual_seed(1)
    pairs = []
    for number in ignored:
        tokens_BT, targets_BT = torch.randint(V, (3, 4)), torch.randint(V, (3, 4))
        targets_BT.view(-1)[12 - number :] = -100
        pairs.append((tokens_BT, targets_BT))
    return pairs


def measured(model: nn.Module, pairs: list[Any], **settings: Any) -> float:
    loss = evaluate(model, pairs, WORLD, **settings)
    assert loss is not None
    return loss


def test_the_loss_is_the_mean_over_targets_not_over_batches():
    model, pairs = Table(), batches(0, 11, 3)
    total, count = 0.0, 0
    for tokens_BT, targets_BT in pairs:
        log_probabilities_BTV = model.table(tokens_BT).log_softmax(-1)
        for row, column in (targets_BT != -100).nonzero().tolist():
            total -= log_probabilities_BTV[row, column, targets_BT[row, column]].item()
            count += 1
    assert count == 12 + 1 + 9
    assert abs(measured(model, pairs) - total / count) < 1e-6


def test_ignored_targets_do_not_count():
    model, pairs = Table(), batches(0, 8)
    tokens_BT, targets_BT = pairs[1]
    shorter = [pairs[0], (tokens_BT[:1], targets_BT[:1])]
    assert abs(measured(model, pairs) - measured(model, shorter)) < 1e-7


def test_a_large_split_loses_no_precision():
    model, pairs = Table(), batches(0) * 3000
    assert abs(measured(model, pairs) - measured(model, pairs[:1])) < 1e-9


def test_the_model_is_asked_in_evaluation_mode_and_left_as_it_was():
    for training in (True, False):
        model = Table().train(training)
        measured(model, batches(0))
        assert model.modes == [False]
        assert model.training == training


def test_no_gradients_are_kept():
    model = Table()
    measured(model, batches(0))
    assert model.table.weight.grad is None


def test_a_stop_request_ends_the_evaluation_without_a_loss():
    with signal_handlers_kept():
        model, stop = Table(), StopRequest()
        assert evaluate(model, batches(0, 0), WORLD, stop=stop) is not None
        signal.raise_signal(signal.SIGTERM)
        assert evaluate(model, batches(0, 0), WORLD, stop=stop) is None
    assert len(model.modes) == 2
    assert model.training


def test_bfloat16_gives_nearly_the_same_loss():
    model = Table()
    difference = measured(model, batches(0), precision="bfloat16") - measured(model, batches(0))
    assert abs(difference) < 0.02
