"""Which images of an epoch went through an optimizer step: counted as it happens, over all ranks, and compared with the plan.

N rows of the train table; a row is in an epoch once, whatever was interrupted.
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
    """What is behind one epoch, over all ranks.

    Attributes:
        trained: [N] bool, rows whose batch went through an optimizer step.
        unreadable: [N] bool, rows that were due but could not be decoded.
    """

    trained: Mask
    unreadable: Mask

    @classmethod
    def empty(cls, num_rows: int) -> Account:
        """An epoch at its beginning."""
        return cls(np.zeros(num_rows, bool), np.zeros(num_rows, bool))

    def pack(self) -> dict[str, Tensor]:
        """Both as [ceil(N / 8)] uint8 for a checkpoint: 82,081 rows are 10 kB each."""
        return {name: torch.from_numpy(np.packbits(getattr(self, name))) for name in ("trained", "unreadable")}

    @classmethod
    def unpack(cls, bits: Mapping[str, Tensor], num_rows: int) -> Account:
        """The reverse of `pack`; rows that `bits` has no place for are not in it."""
        return cls(*(_unpack(bits[name].numpy(), num_rows) for name in ("trained", "unreadable")))

    def difference(self, plan: TrainPlan, epoch: int, step: int) -> str:
        """How this differs from the plan's rows before `step`, in words with rows; empty where it does not."""
        due = np.zeros(plan.num_rows, bool)
        due[plan.rows_before(epoch, step)] = True
        found = {
            "trained on before their turn": self.trained & ~due,
            "unreadable before their turn": self.unreadable & ~due,
            "passed over": due & ~self.trained & ~self.unreadable,
        }
        return "; ".join(f"{what}: {_name(np.flatnonzero(rows))}" for what, rows in found.items() if rows.any())


class Ledger:
    """Keeps one epoch's account.

    Args:
        plan: this rank's plan.
        epoch: the epoch, 0-based.
        before: what the epoch had behind it when this rank took it up.
    """

    def __init__(self, plan: TrainPlan, epoch: int, before: Account) -> None:
        self._plan, self._epoch, self._before = plan, epoch, before
        self._times = np.zeros(plan.num_rows, np.uint8)  # of this rank

    def add(self, rows: Rows) -> None:
        """Notes rows whose batch this rank has just put through an optimizer step."""
        np.add.at(self._times, rows, 1)

    def balance(self, step: int, bad: Iterable[int]) -> Account:
        """The epoch's account at `step` finished steps, over all ranks; the same on every rank, which must all call it.

        Args:
            step: finished steps of the epoch.
            bad: rows that could not be decoded so far, over all ranks, in this epoch or an earlier one.

        Raises:
            AccountingError: on all ranks alike, where a row was trained on twice, passed over, or not due yet, with the rows.
        """
        trained, twice = self._before.trained.copy(), set()
        for bits, repeated in distributed.all_gather((np.packbits(self._times > 0), np.flatnonzero(self._times > 1))):
            rows = _unpack(bits, self._plan.num_rows)
            twice |= {*repeated.tolist(), *np.flatnonzero(trained & rows).tolist()}
            trained |= rows
        due = np.zeros(self._plan.num_rows, bool)
        due[self._plan.rows_before(self._epoch, step)] = True
        unreadable = np.zeros(self._plan.num_rows, bool)
        unreadable[list(bad)] = True
        account = Account(trained, self._before.unreadable | (unreadable & due & ~trained))
        wrong = [f"trained on twice: {_name(np.array(sorted(twice)))}"] if twice else []
        wrong += filter(None, [account.difference(self._plan, self._epoch, step)])
        if wrong:
            raise AccountingError(
                f"epoch {self._epoch + 1}, step {step}: rows of the train table {'; '.join(wrong)};"
                " this is a fault of the program, please report it"
            )
        return account


def _unpack(bits: npt.NDArray[np.uint8], num_rows: int) -> Mask:
    rows = np.zeros(num_rows, bool)
    found = np.unpackbits(bits)[:num_rows].astype(bool)
    rows[: len(found)] = found
    return rows


def _name(rows: npt.NDArray[np.int64]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(str(row) for row in rows[:_NAMED]) + more
