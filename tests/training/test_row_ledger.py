"""The account of an epoch balances for any plan, ranks and interruptions, and names every fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, local
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msrn_ray.errors import AccountingError, UserError
from msrn_ray.training import row_ledger
from msrn_ray.training.row_ledger import Account, Ledger
from msrn_ray.training.sampling import TrainPlan


def plan_of(num_rows: int, batch: int, rank: int = 0, world: int = 1, *, first_step: int = 0) -> TrainPlan:
    return TrainPlan(num_rows, batch, rank, world, seed=5, first_epoch=1, epochs=3, block_size=4, first_step=first_step)


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run the functions of all ranks at once, in threads; return what each rank returned or raised."""
    barrier, values, thread = Barrier(len(functions)), [None] * len(functions), local()

    def all_gather(value: Any) -> list[Any]:
        values[thread.rank] = value
        barrier.wait(10)
        gathered = list(values)
        barrier.wait(10)
        return gathered

    def run(rank: int) -> Any:
        thread.rank = rank
        try:
            return functions[rank]()
        except AccountingError as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(functions)) as pool:
        patch.setattr(row_ledger.distributed, "all_gather", all_gather)
        return list(pool.map(run, range(len(functions))))


def valid_rows(plan: TrainPlan, steps: int, bad: frozenset[int] = frozenset()) -> list[np.ndarray]:
    """Return the decodable rows of a rank in each of its next steps."""
    rows, valid, sizes = plan.epoch(1)
    ends = np.cumsum(sizes)[:steps]
    parts = [rows[end - size : end][valid[end - size : end]] for size, end in zip(sizes, ends, strict=False)]
    return [np.array([row for row in part.tolist() if row not in bad], np.int64) for part in parts]


def run_ranks(plan: TrainPlan, before: Account, stop: int, bad: frozenset[int]) -> list[Any]:
    """Train from the plan's first step to step `stop` on all ranks; return their accounts."""

    def rank_of(rank: int) -> Callable[[], Account]:
        def run() -> Account:
            plan_of_rank = replace(plan, rank=rank)
            ledger = Ledger(plan_of_rank, 1, before)
            for rows in valid_rows(plan_of_rank, stop - plan.first_step, bad):
                ledger.add(rows)
            return ledger.balance(stop, bad)

        return run

    return together([rank_of(rank) for rank in range(plan.world_size)])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_any_epoch_balances_in_two_parts(
    data: st.DataObject, num_rows: int, batch: int, world: int, later_world: int
) -> None:
    """Train some steps on `world` ranks, save, load, train the rest on `later_world` ranks; some rows cannot be decoded."""
    num_steps = plan_of(num_rows, batch).num_steps
    stop = data.draw(st.integers(0, num_steps))
    bad = frozenset(data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3)))
    first, *others = run_ranks(plan_of(num_rows, batch, 0, world), Account.empty(num_rows), stop, bad)
    due = set(plan_of(num_rows, batch).rows_before(1, stop).tolist())
    assert set(np.flatnonzero(first.trained)) == due - bad
    assert set(np.flatnonzero(first.unreadable)) == due & bad
    assert all(
        (account.trained == first.trained).all() and (account.unreadable == first.unreadable).all()
        for account in others
    )
    packed = first.pack()
    assert {len(bits) for bits in packed.values()} == {-(-num_rows // 8)}
    saved = Account.unpack(packed, num_rows)
    assert not saved.difference(plan_of(num_rows, batch), 1, stop)
    rest = plan_of(num_rows, batch, 0, later_world, first_step=stop)
    last = run_ranks(rest, saved, num_steps, bad)[0]
    assert (last.trained ^ last.unreadable).all(), "each row is either trained or unreadable"
    assert set(np.flatnonzero(last.unreadable)) == bad


def test_row_trained_on_two_ranks_is_named() -> None:
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
    assert not isinstance(errors[0], UserError), "the user cannot fix it"


@pytest.mark.parametrize("fault", ["twice in a batch", "twice in two steps", "twice after resuming"])
def test_row_trained_twice_on_one_rank_is_named(fault: str) -> None:
    plan = plan_of(8, 4)
    first, second = valid_rows(plan, 2)
    before = Account.empty(8)
    if fault == "twice after resuming":
        before.trained[first] = True
        ledger = Ledger(plan_of(8, 4, first_step=1), 1, before)
        ledger.add(np.append(second, first[0]))
    else:
        ledger = Ledger(plan, 1, before)
        ledger.add(np.append(first, first[0]) if fault == "twice in a batch" else first)
        ledger.add(second if fault == "twice in a batch" else np.append(second, first[0]))
    with pytest.raises(AccountingError, match=rf"trained on twice: {first[0]};"):
        ledger.balance(2, [])


def test_rows_passed_over_or_not_due_are_named() -> None:
    plan = plan_of(8, 4)
    first, second = valid_rows(plan, 2)
    ledger = Ledger(plan, 1, Account.empty(8))
    ledger.add(first[:3])
    ledger.add(second[:1])
    with pytest.raises(AccountingError) as caught:
        ledger.balance(1, [int(second[1])])
    assert f"trained on before their turn: {second[0]}; passed over: {first[3]}" in str(caught.value)
    ledger = Ledger(plan, 1, Account.empty(8))
    ledger.add(first[:3])
    assert np.flatnonzero(ledger.balance(1, [int(first[3]), int(second[1])]).unreadable).tolist() == [first[3]]


def test_error_cuts_a_long_list_of_rows() -> None:
    with pytest.raises(AccountingError, match=r"passed over: (\d+, ){9}\d+ and 30 more;"):
        Ledger(plan_of(40, 40), 1, Account.empty(40)).balance(1, [])


def test_account_differs_from_another_order() -> None:
    plan = plan_of(20, 4)
    account = Account.empty(20)
    account.trained[plan.rows_before(1, 2)] = True
    assert account.difference(plan, 1, 2) == ""
    assert "passed over" in account.difference(plan, 1, 3)
    assert "before their turn" in account.difference(plan, 1, 1)
    assert account.difference(plan, 2, 2), "every epoch has a different order"
    none = Account.unpack({name: bits[:0] for name, bits in account.pack().items()}, 150_000)
    assert not none.trained.any()
    assert not none.unreadable.any()
    shorter = Account.unpack({name: bits[:1] for name, bits in account.pack().items()}, 20)
    assert shorter.difference(plan, 1, 2), "rows beyond the end are not finished"
