"""The validation loss against a mean over targets that is computed here."""

import math
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.loss import evaluate
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


def measured(model: nn.Module, pairs: list[Any]) -> float:
    loss = evaluate(model, pairs, WORLD)
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


def test_batches_are_added_up_as_float64_numbers():
    model, pairs = Table(), batches(*(i % 12 for i in range(1000)))
    with torch.no_grad():
        means_N = np.array([model(*pair).item() for pair in pairs], dtype=np.float64)
    counts_N = np.array([12 - i % 12 for i in range(1000)])
    exact = math.fsum(means_N * counts_N) / counts_N.sum()
    assert measured(model, pairs) == pytest.approx(exact, rel=1e-14)
    rounded = np.cumsum((means_N * counts_N).astype(np.float32))[-1] / counts_N.sum()
    assert rounded != pytest.approx(exact, rel=1e-9)


def test_numbers_are_copied_to_the_host_once_at_the_end(monkeypatch: pytest.MonkeyPatch):
    model, pairs = Table(), batches(0, 3, 5)
    asked: list[int] = []
    tolist = Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        asked.append(len(model.modes))
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", noted)
    monkeypatch.setattr(Tensor, "item", lambda tensor: pytest.fail("it waits for the device"))
    measured(model, pairs)
    assert set(asked) == {3}  # when all batches had been given to the device


def test_each_process_adds_its_batches_to_those_of_the_others():
    pairs = batches(0, 11, 3, 5)
    alone = measured(Table(), pairs)

    class Second(World):
        """The second of two processes: the first has had the other batches."""

        def sum(self, values: Tensor) -> Tensor:
            losses = [Table()(*pair).item() * int((pair[1] >= 0).sum()) for pair in pairs[::2]]
            counts = [int((pair[1] >= 0).sum()) for pair in pairs[::2]]
            return values + torch.tensor((sum(losses), sum(counts)), dtype=torch.float64)

    found = evaluate(Table(), pairs[1::2], Second(torch.device("cpu"), rank=1, size=2))
    assert found == pytest.approx(alone, rel=1e-12)


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
        assert evaluate(model, batches(0, 0), WORLD, stop) is not None
        assert not stop.is_agreed
        signal.raise_signal(signal.SIGTERM)
        assert evaluate(model, batches(0, 0), WORLD, stop) is None
        assert stop.is_agreed
    assert len(model.modes) == 2
    assert model.training


def test_a_signal_to_another_process_leaves_no_loss_here_either():
    class Second(World):
        """The second of two processes, the first of which was asked to stop."""

        def sum(self, values: Tensor) -> Tensor:
            return values + 1

    with signal_handlers_kept():
        stop = StopRequest()
        world = Second(torch.device("cpu"), rank=1, size=2)
        assert evaluate(Table(), batches(0, 0), world, stop) is None
        assert stop.signal is None
        assert stop.is_agreed
