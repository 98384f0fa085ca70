"""The form that decoding, preparing and inspecting images share: one Ray Data task per block of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch

Columns = dict[str, npt.NDArray[Any]]


def map_blocks(num_blocks: int, task: Callable[[list[int]], Columns | pa.Table]) -> ray.data.Dataset:
    """Return a data set of `num_blocks` blocks that `task` computes, in order, from their numbers.

    Args:
        num_blocks: blocks, each computed by one Ray task with one CPU.
        task: gets the numbers of its blocks, counted from 0; Ray Data may merge blocks.
    """

    def run_block(block: Columns) -> Columns | pa.Table:
        torch.set_num_threads(1)  # tasks are the parallelism; more threads in a task only compete for the cores
        return task([int(number) for number in block["id"]])

    numbers = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    return numbers.map_batches(run_block, batch_size=None, batch_format="numpy", num_cpus=1)
