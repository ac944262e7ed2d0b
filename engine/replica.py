"""Build what this process trains: a model, or its share of one."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from engine import recipe
from engine.device import DTYPES, choose_precision, keep_freed_memory
from engine.kernels import build_model
from engine.loss import LossModel
from engine.parallel import World
from engine.shard import Owners, assign, choose_parallel, device_mesh, shard
from model import GPT


def build_replica(
    asked: Any, vocab_size: int, n_tokens: int, world: World
) -> tuple[Any, LossModel, nn.Module, Owners]:
    """Return the complete config, the model with its loss, what trains it, and who owns what.

    The weights are drawn after the model has been shared out, and depend on the seed alone.
    """
    dtype = DTYPES[choose_precision(asked.precision, world.device)]
    sizes = replace(asked.model, vocab_size=vocab_size)
    kind = choose_parallel(asked.parallel, sizes, world)
    mesh = device_mesh(kind, world)
    is_sharded = mesh is not None and kind != "ddp"
    with torch.device("meta") if is_sharded else nullcontext():  # shapes without numbers
        model = build_model(sizes, world.device, dtype, asked.compile)
    config = recipe.complete(asked, model, n_tokens, world)
    config = config if mesh is None else replace(config, parallel=kind)
    loss_model = LossModel(model, dtype)
    if config.recompute:
        recompute(model)
    if config.compile:
        loss_model.compile_parts(world.device)
    if is_sharded:
        keep_freed_memory(False)
        shard(loss_model, mesh)
        loss_model.to_empty(device=world.device)
        if model.config.tie_embeddings:
            model.lm_head.weight = model.wte.weight  # to_empty has parted them
    loss_model.to(world.device)
    draw_weights(model, config.seed)
    owners = Owners(mesh, kind)
    if mesh is None or is_sharded:
        return config, loss_model, loss_model, owners
    replica = nn.parallel.DistributedDataParallel(loss_model, gradient_as_bucket_view=True)
    return config, loss_model, replica, owners


def recompute(model: GPT) -> None:
    """Keep no activations within blocks, but compute them again (Chen et al., 2016)."""
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def draw_weights(model: GPT, seed: int) -> None:
    """Draw every parameter whole, one after another, and keep this process's rows."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.ones(parameter.shape)  # what scales of norms start from
        model.init_weights([(name, values)])
        assign(parameter, values)


def sync_gradients(replica: Any, enabled: bool) -> None:
    """Set whether the next forward and backward pass averages gradients over the processes.

    Where a model is shared out, every pass does: else each process would hold a whole gradient.
    """
    if isinstance(replica, nn.parallel.DistributedDataParallel):
        replica.require_backward_grad_sync = enabled
