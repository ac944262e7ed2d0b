"""What a run goes on from: its weights, what its optimizers know, and all else as it was."""

from typing import Any

from torch import nn

from engine.optim import Optimizer


def pack(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """The part of a checkpoint that is weights and what the optimizers know of them."""
    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state for optimizer in optimizers],
    }


def unpack(state: dict[str, Any], model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Put the weights and the optimizers' state back, but not their settings.

    So a lower learning rate takes effect. Raises ValueError if another optimizer was saved.
    """
    if [optimizer.state.keys() for optimizer in optimizers] != [
        saved.keys() for saved in state["optimizers"]
    ]:
        raise ValueError("a run goes on with its own optimizer: optim.name has changed")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        for name, tensors in optimizer.state.items():
            for tensor, saved_tensor in zip(tensors, saved[name], strict=True):
                tensor.copy_(saved_tensor)


def check_same(what: str, asked: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError that names what differs between this run and the checkpoint."""
    for key in sorted(asked.keys() | saved.keys()):
        if key not in asked or key not in saved or asked[key] != saved[key]:
            raise ValueError(
                f"the checkpoint has another {what}: its {key} differs from this run's; resume "
                "with the run's own config.toml and dataset, or start anew in another out_dir"
            )


def check_steps(done: int, max_steps: int) -> None:
    """Raise ValueError if a run is to end before the step that it has reached."""
    if done > max_steps:
        raise ValueError(f"max_steps must be at least the {done} steps done: got {max_steps}")
