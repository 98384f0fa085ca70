"""The few collectives that training needs. Without a process group each collective leaves its argument as it is."""

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
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(values: Tensor, op: str) -> Tensor:
    """Reduce in place over all ranks; op is `sum` or `min`."""
    if dist.is_initialized():
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[op])
    return values


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank; any picklable value."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return cast(list[T], gathered)


def parallel_settings(accumulation: int) -> dict[str, Any]:
    """Return the arguments with which DistributedDataParallel wraps a network whose steps have `accumulation` micro-batches.

    Gradients are views of the buckets that DDP sends, so memory holds them once. Each rank keeps its BatchNorm statistics during an
    epoch; see `average_buffers`. The graph is the same in every step, but DDP may rely on that only if every backward pass sends
    gradients: with micro-batches it does not.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    # torch before 2.13 has only the older name
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {sync_buffers: False, "gradient_as_bucket_view": True, "static_graph": accumulation == 1}


def compress_gradients(model: nn.Module) -> None:
    """Send the gradients of a DistributedDataParallel model as bf16; do nothing for a model that sends no gradients."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, bf16_compress_hook)


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replace float buffers (BatchNorm statistics) by their mean over ranks, so that every rank scores with the same model."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                all_reduce(buffer, "sum").div_(world_size())
