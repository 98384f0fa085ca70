"""The few collectives that training needs; each is a no-op in a single process without a process group."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(values: Tensor, op: str) -> Tensor:
    """Reduces in place over all ranks; op is `sum` or `min`."""
    if dist.is_initialized():
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[op])
    return values


def all_gather(value: T) -> list[T]:
    """Any picklable value of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return cast(list[T], gathered)


def parallel_settings(accumulation: int) -> dict[str, Any]:
    """How DistributedDataParallel wraps a network whose steps have `accumulation` micro-batches.

    Gradients are views of the buckets that are sent, so they exist once. BatchNorm statistics stay each rank's own; see `average_buffers`.
    The graph is the same in every step, which DDP may know only where every backward is sent: not with micro-batches.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its name before torch 2.13
    return {buffers: False, "gradient_as_bucket_view": True, "static_graph": accumulation == 1}


def compress_gradients(model: nn.Module) -> None:
    """Sends the gradients of a DistributedDataParallel model as bf16; leaves any other model alone, which sends none."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, bf16_compress_hook)


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Makes float buffers (BatchNorm statistics) the mean over ranks, so that every rank scores with the same model."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                all_reduce(buffer, "sum").div_(world_size())
