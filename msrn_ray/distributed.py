"""The few collectives that training needs; each is a no-op in a single process without a process group."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Makes float buffers (BatchNorm statistics) the mean over ranks, so that every rank scores with the same model."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                all_reduce(buffer, "sum").div_(world_size())
