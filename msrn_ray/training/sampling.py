"""Plans which rank trains on or scores which row, and when; pure arithmetic, the same on every rank.

A plan cuts a rank's rows into blocks. Each block is a decode task. No block crosses the end of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EvalPlan:
    """Scores every row once over all ranks, in table order: rank r scores rows r, r + world, r + 2 world, ..."""

    num_rows: int
    rank: int
    world_size: int
    block_size: int

    @property
    def rows(self) -> Rows:
        """Return this rank's rows, [m] int64."""
        return np.arange(self.rank, self.num_rows, self.world_size)

    @property
    def num_blocks(self) -> int:
        """Return the number of this rank's decode tasks."""
        return -(-len(self.rows) // self.block_size)

    def block(self, index: int) -> tuple[Rows, None]:
        """Return the rows of a decode task and no epoch: nothing is augmented."""
        return self.rows[index * self.block_size : (index + 1) * self.block_size], None


@dataclass(frozen=True)
class TrainPlan:
    """Epochs of optimizer steps over a seeded global order.

    Step s of an epoch takes the same `batch_size` rows of the epoch's permutation for any number of ranks. Rank r takes every
    world-th of these rows, starting with the r-th. So an interrupted epoch can continue from any step with another number of ranks.
    The last step takes the remaining rows, or is left out (`drop_last`). A rank without a row in a step gets one filler
    (valid = False), so that all ranks take the same number of steps.

    Attributes:
        num_rows: rows of the sample table.
        batch_size: rows of a step over all ranks.
        rank, world_size: this rank, and the number of ranks.
        seed: decides the order, together with the epoch.
        first_epoch, epochs: the plan starts with `first_epoch` (0-based) and ends before epoch `epochs`.
        block_size: rows of a decode task.
        first_step: finished steps of `first_epoch`, fewer than `num_steps`.
        drop_last: leave out the rows of each epoch that do not fill a step.
    """

    num_rows: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    first_epoch: int
    epochs: int
    block_size: int
    first_step: int = 0
    drop_last: bool = False

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps of a whole epoch."""
        return self.num_rows // self.batch_size if self.drop_last else -(-self.num_rows // self.batch_size)

    def step_rows(self, step: int) -> int:
        """Return the number of rows of a step over all ranks, without fillers."""
        return min(self.batch_size, self.num_rows - step * self.batch_size)

    def rows_before(self, epoch: int, step: int) -> Rows:
        """Return the rows of all ranks in the steps of an epoch before `step`, [m] int64 in training order."""
        return _order(self.num_rows, self.seed, epoch)[: min(step, self.num_steps) * self.batch_size]

    @property
    def num_blocks(self) -> int:
        """Return the number of this rank's decode tasks from `first_epoch` and `first_step` to the end."""
        num_later = self.epochs - self.first_epoch - 1
        if num_later < 0:
            return 0
        return self._blocks_of(self.first_epoch) + num_later * self._blocks_of(self.first_epoch + 1)

    def _blocks_of(self, epoch: int) -> int:
        steps = range(self.first_step if epoch == self.first_epoch else 0, self.num_steps)
        if not steps:
            return 0
        full, last = (self._share(self.step_rows(step)) for step in (0, steps[-1]))
        return -(-(full * (len(steps) - 1) + last) // self.block_size)

    def _share(self, rows: int) -> int:
        """Return how many of a step's rows are this rank's; 1 (a filler) where none is."""
        return max(1, len(range(self.rank, rows, self.world_size)))

    def epoch(self, epoch: int) -> tuple[Rows, npt.NDArray[np.bool_], Rows]:
        """Return this rank's share of an epoch; of `first_epoch` the share from `first_step` on.

        Returns:
            rows [m] int64 in training order, valid [m] bool, sizes [steps] int64 >= 1: number of rows in each step.
        """
        first_step = self.first_step if epoch == self.first_epoch else 0
        return _rank_epoch(self, epoch, first_step)

    def block(self, index: int) -> tuple[Rows, int]:
        """Return the rows of a decode task and the epoch that seeds their augmentation."""
        num_first = self._blocks_of(self.first_epoch)
        if index < num_first:
            epoch, part = self.first_epoch, index
        else:
            num_later, part = divmod(index - num_first, self._blocks_of(self.first_epoch + 1))
            epoch = self.first_epoch + 1 + num_later
        rows, _, _ = self.epoch(epoch)
        return rows[part * self.block_size : (part + 1) * self.block_size], epoch


@lru_cache(maxsize=2)  # the current epoch and the next one; 80 MB each at 10 M rows
def _order(num_rows: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@lru_cache(maxsize=4)
def _rank_epoch(plan: TrainPlan, epoch: int, first_step: int) -> tuple[Rows, npt.NDArray[np.bool_], Rows]:
    order = plan.rows_before(epoch, plan.num_steps)
    place = np.arange(first_step * plan.batch_size, len(order))
    place = place[place % plan.batch_size % plan.world_size == plan.rank]
    rows, step = order[place], place // plan.batch_size - first_step
    sizes = np.bincount(step, minlength=plan.num_steps - first_step)
    valid = np.ones(len(rows), bool)
    # fillers go into a short last step, or into every step if the batch is smaller than the number of ranks
    empty = np.flatnonzero(sizes == 0)
    rows, valid = np.append(rows, np.repeat(order[-1], len(empty))), np.append(valid, np.zeros(len(empty), bool))
    sizes[empty] = 1
    return rows, valid, sizes
