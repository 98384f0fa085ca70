"""Records which rows of an epoch went through an optimizer step, over all ranks, and compares them with the plan.

N rows of the train table; each row is in an epoch once, even if the epoch was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import AccountingError
from . import distributed
from .sampling import Rows, TrainPlan

Mask = npt.NDArray[np.bool_]
_NAMED = 10  # rows that an error names


@dataclass(frozen=True)
class Account:
    """The finished rows of an epoch, over all ranks.

    Attributes:
        trained: [N] bool, rows whose batch went through an optimizer step.
        unreadable: [N] bool, rows that were due and could not be decoded.
    """

    trained: Mask
    unreadable: Mask

    @classmethod
    def empty(cls, num_rows: int) -> Account:
        """Return the account of an epoch that has not started."""
        return cls(np.zeros(num_rows, bool), np.zeros(num_rows, bool))

    def pack(self) -> dict[str, Tensor]:
        """Return both as [ceil(N / 8)] uint8 for a checkpoint: each takes 10 kB for 82,081 rows."""
        return {name: torch.from_numpy(np.packbits(rows)) for name, rows in vars(self).items()}

    @classmethod
    def unpack(cls, bits: Mapping[str, Tensor], num_rows: int) -> Account:
        """Reverse `pack`; rows beyond the end of `bits` count as not finished."""
        return cls(**{name: _unpack(packed.numpy(), num_rows) for name, packed in bits.items()})

    def difference(self, plan: TrainPlan, epoch: int, step: int) -> str:
        """Return a description, with rows, of how this differs from the plan's rows before `step`; "" if it does not."""
        due = _mask(plan.rows_before(epoch, step), plan)
        wrong = {
            "trained on before their turn": self.trained & ~due,
            "unreadable before their turn": self.unreadable & ~due,
            "passed over": due & ~self.trained & ~self.unreadable,
        }
        return "; ".join(f"{fault}: {_name(np.flatnonzero(rows))}" for fault, rows in wrong.items() if rows.any())


class Ledger:
    """Keeps the account of an epoch.

    Args:
        plan: this rank's plan.
        epoch: the epoch, 0-based.
        before: the epoch's account when this rank started or resumed it.
    """

    def __init__(self, plan: TrainPlan, epoch: int, before: Account) -> None:
        self._plan, self._epoch, self._before = plan, epoch, before
        self._times = np.zeros(plan.num_rows, np.uint8)  # how often this rank trained on each row

    def add(self, rows: Rows) -> None:
        """Record rows whose batch this rank has just put through an optimizer step."""
        np.add.at(self._times, rows, 1)

    def balance(self, step: int, bad: Iterable[int]) -> Account:
        """Return the epoch's account after `step` steps, over all ranks; all ranks must call this, and get the same account.

        Args:
            step: finished steps of the epoch.
            bad: rows that could not be decoded, over all ranks, in this epoch or an earlier one.

        Raises:
            AccountingError: on all ranks, with the rows, if a row was trained on twice, passed over, or was not due yet.
        """
        trained, twice = self._before.trained.copy(), set()
        for bits, repeated in distributed.all_gather((np.packbits(self._times > 0), np.flatnonzero(self._times > 1))):
            rows = _unpack(bits, self._plan.num_rows)
            twice |= {*repeated.tolist(), *np.flatnonzero(trained & rows).tolist()}
            trained |= rows
        due = _mask(self._plan.rows_before(self._epoch, step), self._plan)
        unreadable = _mask(list(bad), self._plan) & due & ~trained
        account = Account(trained, self._before.unreadable | unreadable)
        wrong = [f"trained on twice: {_name(np.array(sorted(twice)))}"] if twice else []
        wrong += filter(None, [account.difference(self._plan, self._epoch, step)])
        if wrong:
            raise AccountingError(
                f"epoch {self._epoch + 1}, step {step}: rows of the train table {'; '.join(wrong)};"
                " this is a bug in msrn_ray, please report it"
            )
        return account


def _mask(rows: Rows | list[int], plan: TrainPlan) -> Mask:
    mask = np.zeros(plan.num_rows, bool)
    mask[rows] = True
    return mask


def _unpack(bits: npt.NDArray[np.uint8], num_rows: int) -> Mask:
    # numpy leaves the result uninitialised if there are no bits at all
    return np.unpackbits(np.append(bits, np.uint8(0)), count=num_rows).astype(bool)


def _name(rows: npt.NDArray[np.int64]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(str(row) for row in rows[:_NAMED]) + more
