"""The account of an epoch: any plan balances, whatever the ranks and the interruptions, and any fault is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msrn_ray.errors import AccountingError, UserError
from msrn_ray.training import row_ledger as accounting
from msrn_ray.training.row_ledger import Account, Ledger
from msrn_ray.training.sampling import TrainPlan


def plan_of(num_rows: int, batch: int, rank: int = 0, world: int = 1, *, first_step: int = 0) -> TrainPlan:
    return TrainPlan(num_rows, batch, rank, world, seed=5, first_epoch=1, epochs=3, block_size=4, first_step=first_step)


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs one function for each rank at once, each in a thread; -> what each gave or raised."""
    barrier, values, here = Barrier(len(functions)), [None] * len(functions), local()

    def all_gather(value: Any) -> list[Any]:
        values[here.rank] = value
        barrier.wait(10)
        gathered = list(values)
        barrier.wait(10)
        return gathered

    def run(rank: int) -> Any:
        here.rank = rank
        try:
            return functions[rank]()
        except AccountingError as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(functions)) as pool:
        patch.setattr(accounting.distributed, "all_gather", all_gather)
        return list(pool.map(run, range(len(functions))))


def valid_rows(plan: TrainPlan, steps: int, bad: frozenset[int] = frozenset()) -> list[np.ndarray]:
    """Sound rows of a rank in each of its next steps."""
    rows, valid, sizes = plan.epoch(1)
    ends = np.cumsum(sizes)[:steps]
    parts = [rows[end - size : end][valid[end - size : end]] for size, end in zip(sizes, ends, strict=False)]
    return [np.array([row for row in part.tolist() if row not in bad], np.int64) for part in parts]


def run_ranks(
    num_rows: int, batch: int, world: int, before: Account, start: int, stop: int, bad: frozenset[int]
) -> Any:
    def rank_of(rank: int) -> Callable[[], Account]:
        def run() -> Account:
            plan = plan_of(num_rows, batch, rank, world, first_step=start)
            ledger = Ledger(plan, 1, before)
            for rows in valid_rows(plan, stop - start, bad):
                ledger.add(rows)
            return ledger.balance(stop, bad)

        return run

    return together([rank_of(rank) for rank in range(world)])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_any_epoch_balances_in_two_parts(
    data: st.DataObject, num_rows: int, batch: int, world: int, other: int
) -> None:
    """Some steps on one number of ranks, saved and read, the rest on another; some rows cannot be decoded."""
    num_steps = plan_of(num_rows, batch).num_steps
    stop = data.draw(st.integers(0, num_steps))
    bad = frozenset(data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3)))
    first, *others = run_ranks(num_rows, batch, world, Account.empty(num_rows), 0, stop, bad)
    due = set(plan_of(num_rows, batch).rows_before(1, stop).tolist())
    assert set(np.flatnonzero(first.trained)) == due - bad
    assert set(np.flatnonzero(first.unreadable)) == due & bad
    assert all((one.trained == first.trained).all() and (one.unreadable == first.unreadable).all() for one in others)
    packed = first.pack()
    assert {len(bits) for bits in packed.values()} == {-(-num_rows // 8)}
    saved = Account.unpack(packed, num_rows)
    assert not saved.difference(plan_of(num_rows, batch), 1, stop)
    last = run_ranks(num_rows, batch, other, saved, stop, num_steps, bad)[0]
    assert (last.trained ^ last.unreadable).all(), "each row is one or the other"
    assert set(np.flatnonzero(last.unreadable)) == bad


def test_a_row_that_two_ranks_train_on_is_named_on_both() -> None:
    def rank_of(rank: int) -> Callable[[], Account]:
        plan = plan_of(8, 4, rank, 2)
        ledger = Ledger(plan, 1, Account.empty(8))
        ledger.add(valid_rows(plan, 1)[0])
        if rank == 1:
            ledger.add(valid_rows(plan_of(8, 4, 0, 2), 1)[0][:1])
        return lambda: ledger.balance(1, [])

    errors = together([rank_of(0), rank_of(1)])
    row = int(valid_rows(plan_of(8, 4, 0, 2), 1)[0][0])
    assert len({str(error) for error in errors}) == 1
    assert f"epoch 2, step 1: rows of the train table trained on twice: {row};" in str(errors[0])
    assert not isinstance(errors[0], UserError), "nobody but us can mend it"


@pytest.mark.parametrize("fault", ["twice in a batch", "twice in two steps", "twice after resuming"])
def test_a_row_twice_on_one_rank(fault: str) -> None:
    plan = plan_of(8, 4)
    one, two = valid_rows(plan, 2)
    before = Account.empty(8)
    if fault == "twice after resuming":
        before.trained[one] = True
        ledger = Ledger(plan_of(8, 4, first_step=1), 1, before)
        ledger.add(np.append(two, one[0]))
    else:
        ledger = Ledger(plan, 1, before)
        ledger.add(np.append(one, one[0]) if fault == "twice in a batch" else one)
        ledger.add(two if fault == "twice in a batch" else np.append(two, one[0]))
    with pytest.raises(AccountingError, match=rf"trained on twice: {one[0]};"):
        ledger.balance(2, [])


def test_rows_that_were_passed_over_or_not_due() -> None:
    plan = plan_of(8, 4)
    one, two = valid_rows(plan, 2)
    ledger = Ledger(plan, 1, Account.empty(8))
    ledger.add(one[:3])
    ledger.add(two[:1])
    with pytest.raises(AccountingError) as caught:
        ledger.balance(1, [int(two[1])])
    assert f"trained on before their turn: {two[0]}; passed over: {one[3]}" in str(caught.value)
    ledger = Ledger(plan, 1, Account.empty(8))
    ledger.add(one[:3])
    assert np.flatnonzero(ledger.balance(1, [int(one[3]), int(two[1])]).unreadable).tolist() == [one[3]]


def test_many_wrong_rows_are_cut_with_their_number() -> None:
    with pytest.raises(AccountingError, match=r"passed over: (\d+, ){9}\d+ and 30 more;"):
        Ledger(plan_of(40, 40), 1, Account.empty(40)).balance(1, [])


def test_an_account_of_another_order_differs() -> None:
    plan = plan_of(20, 4)
    account = Account.empty(20)
    account.trained[plan.rows_before(1, 2)] = True
    assert account.difference(plan, 1, 2) == ""
    assert "passed over" in account.difference(plan, 1, 3)
    assert "before their turn" in account.difference(plan, 1, 1)
    assert account.difference(plan, 2, 2), "every epoch has an order of its own"
    shorter = Account.unpack({name: bits[:1] for name, bits in account.pack().items()}, 20)
    assert shorter.difference(plan, 1, 2), "rows without a place are not done"
