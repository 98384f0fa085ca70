"""Which rank trains on or scores which row, when; pure arithmetic, the same on every rank.

A plan cuts a rank's rows into blocks: one block is one decode task. Blocks never cross an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EvalPlan:
    """Every row once over all ranks, in table order: rank r scores rows r, r + world, r + 2 world, ..."""

    num_rows: int
    rank: int
    world_size: int
    block_size: int

    @property
    def rows(self) -> Rows:
        """[m] int64, this rank's rows."""
        return np.arange(self.rank, self.num_rows, self.world_size)

    @property
    def num_blocks(self) -> int:
        """Decode tasks of this rank."""
        return -(-len(self.rows) // self.block_size)

    def block(self, index: int) -> tuple[Rows, None]:
        """Rows of one decode task; no epoch, so no augmentation."""
        return self.rows[index * self.block_size : (index + 1) * self.block_size], None


@dataclass(frozen=True)
class TrainPlan:
    """Epochs of optimizer steps over a seeded global order.

    Step s of an epoch takes the same `batch_size` rows of the epoch's permutation whatever the number of ranks; rank r takes each
    world-th of them from r on. The last step takes what is left. A rank that would be without a row there gets one filler
    (valid = False), so that all ranks take the same number of steps.
    """

    num_rows: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    first_epoch: int
    epochs: int
    block_size: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.num_rows // self.batch_size)

    def step_rows(self, step: int) -> int:
        """Rows of a step over all ranks, fillers not counted."""
        return min(self.batch_size, self.num_rows - step * self.batch_size)

    @property
    def blocks_per_epoch(self) -> int:
        """Decode tasks of this rank in an epoch."""
        return -(-len(self.epoch(self.first_epoch)[0]) // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Decode tasks of this rank from `first_epoch` to the end."""
        return (self.epochs - self.first_epoch) * self.blocks_per_epoch

    def epoch(self, epoch: int) -> tuple[Rows, npt.NDArray[np.bool_], Rows]:
        """This rank's share of one epoch.

        Returns:
            rows [m] int64 in training order, valid [m] bool, sizes [num_steps] int64 >= 1: how many of the rows each step takes.
        """
        return _rank_epoch(self.num_rows, self.batch_size, self.rank, self.world_size, self.seed, epoch)

    def block(self, index: int) -> tuple[Rows, int]:
        """Rows of one decode task and the epoch that seeds their augmentation."""
        epoch, part = divmod(index, self.blocks_per_epoch)
        rows, _, _ = self.epoch(self.first_epoch + epoch)
        return rows[part * self.block_size : (part + 1) * self.block_size], self.first_epoch + epoch


@lru_cache(maxsize=4)
def _rank_epoch(
    num_rows: int, batch_size: int, rank: int, world_size: int, seed: int, epoch: int
) -> tuple[Rows, npt.NDArray[np.bool_], Rows]:
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    place = np.arange(num_rows)
    mine = place % batch_size % world_size == rank
    rows, step = order[mine], place[mine] // batch_size
    sizes = np.bincount(step, minlength=-(-num_rows // batch_size))
    valid = np.ones(len(rows), bool)
    empty = np.flatnonzero(
        sizes == 0
    )  # a short last step, or every step where the batch is smaller than the number of ranks
    rows, valid = np.append(rows, np.repeat(order[-1], len(empty))), np.append(valid, np.zeros(len(empty), bool))
    sizes[empty] = 1
    return rows, valid, sizes
