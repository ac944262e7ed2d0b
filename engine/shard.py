"""Share a model's numbers over processes: FSDP2 (Zhao et al., 2023, arXiv 2304.11277).

Each process keeps some rows of every weight, gradient and optimizer state, and gathers a block's
weights only while it computes that block.
"""

import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.count import product_weights
from engine.device import memory_bytes
from engine.parallel import World, is_shared, local
from model import ModelConfig, require

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
STATE_BYTES = 16  # of a parameter, its gradient, and AdamW's two means
STATE_SHARE = 0.5  # of the memory; the rest is for activations


def choose_parallel(asked: Parallel, config: ModelConfig, world: World) -> Parallel:
    """Return how processes share the work; `auto` is ddp while a model fits into one of them."""
    if asked != "auto":
        return asked
    n_parameters = product_weights(config) + config.sized().n_embd * config.vocab_size
    fits = STATE_BYTES * n_parameters <= STATE_SHARE * memory_bytes(world.device)
    return "ddp" if fits or world.size == 1 else "fsdp"


def device_mesh(kind: Parallel, world: World) -> Any:
    """Return the processes as a line, or for hsdp as a row for each machine.

    With hsdp each machine has all numbers, shared among its processes. None if there is only one.
    """
    if not dist.is_initialized() or (kind == "ddp" and world.size == 1):
        return None
    from torch.distributed.device_mesh import init_device_mesh  # slow to import

    if kind != "hsdp":
        return init_device_mesh(world.device.type, (world.size,))
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    require(
        world.size % per_machine == 0,
        f"hsdp needs equally many processes on each machine: got {world.size} in all, and "
        f"{per_machine} on this one; take --parallel=fsdp",
    )
    shape, names = (world.size // per_machine, per_machine), ("copies", "shares")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def shard(loss_model: Any, mesh: Any) -> None:
    """Leave each process its rows of every parameter; a block's are gathered as it is called."""
    from torch.distributed.fsdp import fully_shard

    for block in loss_model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(loss_model, mesh=mesh)


@torch.no_grad()
def assign(tensor: Any, values: Tensor) -> None:
    """Copy this process's rows of `values` into its rows of `tensor`."""
    if is_shared(tensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard():
                chunks = values.chunk(tensor.device_mesh.size(dim))
                rank = tensor.device_mesh.get_local_rank(dim)
                values = chunks[rank] if rank < len(chunks) else values[:0]
    local(tensor).copy_(values)


class Owners:
    """Gives each of many matrices, whose rows lie in several processes, to one of them.

    So each process does its share of the work that needs whole matrices.
    """

    def __init__(self, mesh: Any = None, kind: Parallel = "ddp") -> None:
        self.mesh = mesh
        if mesh is not None:
            from torch.distributed.tensor import Replicate, Shard

            lies = {"ddp": [Replicate()], "fsdp": [Shard(1)], "hsdp": [Replicate(), Shard(1)]}
            self.lies, self.owned = lies[kind], [Shard(0)] * mesh.ndim

    def gather(self, rows_KmN: Tensor, K: int, M: int) -> Tensor:
        """Return the matrices (k, M, N) that this process owns, of K whose rows it has."""
        return self._moved(rows_KmN, (K, M, rows_KmN.shape[-1]), give_back=False)

    def give_back(self, matrices_kMN: Tensor, K: int, M: int) -> Tensor:
        """Return this process's rows (K, m, N) of all K matrices."""
        return self._moved(matrices_kMN, (K, M, matrices_kMN.shape[-1]), give_back=True)

    def _moved(self, mine: Tensor, shape: tuple[int, ...], give_back: bool) -> Tensor:
        if self.mesh is None:
            return mine
        from torch.distributed.tensor import DTensor

        now, then = (self.owned, self.lies) if give_back else (self.lies, self.owned)
        stride = (shape[1] * shape[2], shape[2], 1)
        size = torch.Size(shape)
        every = DTensor.from_local(
            mine.contiguous(), self.mesh, now, run_check=False, shape=size, stride=stride
        )
        return every.redistribute(placements=then).to_local()
