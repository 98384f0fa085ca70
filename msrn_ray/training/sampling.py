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
    world-th of them from r on. So what is left of an epoch is the plan from a step on, for another number of ranks too. The last step
    takes what is left over, or is not there (`drop_last`). A rank that would be without a row there gets one filler (valid = False), so
    that all ranks take the same number of steps.

    Attributes:
        num_rows: rows of the sample table.
        batch_size: rows of a step over all ranks.
        rank, world_size: which share this is.
        seed: with the epoch, decides the order.
        first_epoch, epochs: the plan goes from the one (0-based) to before the other.
        block_size: rows of a decode task.
        first_step: steps of `first_epoch` that are done already, fewer than `num_steps`.
        drop_last: leave out the rows of each epoch that fill no whole step.
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
        """Optimizer steps of a whole epoch."""
        return self.num_rows // self.batch_size if self.drop_last else -(-self.num_rows // self.batch_size)

    def step_rows(self, step: int) -> int:
        """Rows of a step over all ranks, fillers not counted."""
        return min(self.batch_size, self.num_rows - step * self.batch_size)

    def rows_before(self, epoch: int, step: int) -> Rows:
        """[m] int64, the rows of all ranks in the steps of an epoch that come before `step`, in training order."""
        return _order(self.num_rows, self.seed, epoch)[: min(step, self.num_steps) * self.batch_size]

    @property
    def num_blocks(self) -> int:
        """Decode tasks of this rank from `first_epoch` and `first_step` to the end."""
        later = self.epochs - self.first_epoch - 1
        return 0 if later < 0 else self._blocks_of(self.first_epoch) + later * self._blocks_of(self.first_epoch + 1)

    def _blocks_of(self, epoch: int) -> int:
        steps = range(self.first_step if epoch == self.first_epoch else 0, self.num_steps)
        if not steps:
            return 0
        whole, last = (self._share(self.step_rows(step)) for step in (0, steps[-1]))
        return -(-(whole * (len(steps) - 1) + last) // self.block_size)

    def _share(self, rows: int) -> int:
        """Rows of a step that are this rank's, a filler for none."""
        return max(1, len(range(self.rank, rows, self.world_size)))

    def epoch(self, epoch: int) -> tuple[Rows, npt.NDArray[np.bool_], Rows]:
        """This rank's share of one epoch; of `first_epoch` what comes from `first_step` on.

        Returns:
            rows [m] int64 in training order, valid [m] bool, sizes [steps] int64 >= 1: how many of the rows each step takes.
        """
        first_step = self.first_step if epoch == self.first_epoch else 0
        return _rank_epoch(self, epoch, first_step)

    def block(self, index: int) -> tuple[Rows, int]:
        """Rows of one decode task and the epoch that seeds their augmentation."""
        first = self._blocks_of(self.first_epoch)
        if index < first:
            epoch, part = self.first_epoch, index
        else:
            later, part = divmod(index - first, self._blocks_of(self.first_epoch + 1))
            epoch = self.first_epoch + 1 + later
        rows, _, _ = self.epoch(epoch)
        return rows[part * self.block_size : (part + 1) * self.block_size], epoch


@lru_cache(maxsize=2)  # this epoch and the next; 80 MB each at 10 M rows
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
    empty = np.flatnonzero(
        sizes == 0
    )  # a short last step, or every step where the batch is smaller than the number of ranks
    rows, valid = np.append(rows, np.repeat(order[-1], len(empty))), np.append(valid, np.zeros(len(empty), bool))
    sizes[empty] = 1
    return rows, valid, sizes
