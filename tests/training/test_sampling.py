"""Plans for any number of rows, ranks, batches and blocks: every row exactly once, the same steps on every rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msrn_ray.training.sampling import EvalPlan, TrainPlan

SEEDS = st.integers(0, 2**31)
BLOCKS = st.integers(1, 20)
quick = settings(deadline=None, max_examples=60)


def plans(
    num_rows: int, batch: int, world: int, *, seed: int = 0, first: int = 0, epochs: int = 2, block: int = 3
) -> list[TrainPlan]:
    return [TrainPlan(num_rows, batch, rank, world, seed, first, epochs, block) for rank in range(world)]


def steps(plan: TrainPlan, epoch: int) -> list[list[int]]:
    """Return the valid rows of each step of a rank."""
    rows, valid, sizes = plan.epoch(epoch)
    ends = np.cumsum(sizes)
    return [rows[end - size : end][valid[end - size : end]].tolist() for size, end in zip(sizes, ends, strict=True)]


def check_epoch(ranks: list[TrainPlan], epoch: int) -> None:
    """Check what must hold over all ranks in an epoch."""
    num_rows, batch = ranks[0].num_rows, ranks[0].batch_size
    whole = TrainPlan(num_rows, batch, 0, 1, ranks[0].seed, 0, 1, 1)
    num_steps = -(-num_rows // batch)
    assert whole.num_steps == num_steps
    expected = steps(whole, epoch)
    assert sorted(row for step in expected for row in step) == list(range(num_rows))
    assert [len(step) for step in expected] == [whole.step_rows(step) for step in range(num_steps)]
    assert all(len(step) == batch for step in expected[:-1])
    shares = []
    for plan in ranks:
        rows, valid, sizes = plan.epoch(epoch)
        assert len(rows) == len(valid) == sizes.sum()
        assert len(sizes) == plan.num_steps == num_steps
        assert sizes.min() >= 1
        assert ((rows >= 0) & (rows < num_rows)).all()
        shares.append(steps(plan, epoch))
        for size, share in zip(sizes.tolist(), shares[-1], strict=True):
            assert size == max(1, len(share)), "a filler where there is a row, or more than one filler"
    for step in range(num_steps):
        parts = [share[step] for share in shares]
        assert sorted(row for part in parts for row in part) == sorted(expected[step])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1, "ranks are not evenly loaded"
        assert ranks[0].step_rows(step) == len(expected[step])


def check_blocks(plan: TrainPlan) -> None:
    expected = [(row, epoch) for epoch in range(plan.first_epoch, plan.epochs) for row in plan.epoch(epoch)[0].tolist()]
    delivered = []
    for index in range(plan.num_blocks):
        rows, epoch = plan.block(index)
        assert 1 <= len(rows) <= plan.block_size
        delivered += [(row, epoch) for row in rows.tolist()]
    assert delivered == expected
    needed = [-(-len(plan.epoch(epoch)[0]) // plan.block_size) for epoch in range(plan.first_epoch, plan.epochs)]
    assert plan.num_blocks == sum(needed), "more decode tasks than needed"


@quick
@given(st.data(), st.integers(1, 60), st.integers(1, 24), SEEDS, st.integers(0, 5), BLOCKS)
def test_any_plan_covers_every_row_once(
    data: st.DataObject, num_rows: int, batch: int, seed: int, epoch: int, block: int
) -> None:
    world = data.draw(st.integers(1, min(batch, 6)))
    ranks = plans(num_rows, batch, world, seed=seed, first=epoch, epochs=epoch + 2, block=block)
    check_epoch(ranks, epoch)
    check_epoch(ranks, epoch + 1)
    for plan in ranks:
        check_blocks(plan)


@quick
@given(st.data(), st.integers(1, 30), st.integers(1, 5), SEEDS, BLOCKS)
def test_more_ranks_than_rows_in_a_step(data: st.DataObject, num_rows: int, batch: int, seed: int, block: int) -> None:
    """Some ranks have a filler in every step."""
    ranks = plans(num_rows, batch, data.draw(st.integers(batch + 1, 8)), seed=seed, block=block)
    check_epoch(ranks, 0)
    check_epoch(ranks, 1)
    for plan in ranks:
        check_blocks(plan)


def test_ten_rows_over_three_ranks() -> None:
    """Batch 4: steps of 4, 4 and 2 rows, so the third rank has only a filler in the last."""
    ranks = plans(10, 4, 3)
    assert [plan.epoch(0)[2].tolist() for plan in ranks] == [[2, 2, 1], [1, 1, 1], [1, 1, 1]]
    assert [plan.epoch(0)[1].tolist() for plan in ranks] == [[True] * 5, [True] * 3, [True, True, False]]
    assert [ranks[0].step_rows(step) for step in range(3)] == [4, 4, 2]


def test_each_epoch_shuffles_the_rows_differently() -> None:
    (plan,) = plans(50, 8, 1, seed=3)
    orders = [plan.epoch(epoch)[0].tolist() for epoch in range(4)]
    assert len({tuple(order) for order in [*orders, list(range(50))]}) == 5
    assert orders == [plan.epoch(epoch)[0].tolist() for epoch in range(4)]


@quick
@given(st.integers(20, 60), st.lists(st.integers(0, 2**31), min_size=2, max_size=2, unique=True))
def test_seeds_give_different_orders(num_rows: int, seeds: list[int]) -> None:
    (first,), (second,) = (plans(num_rows, 4, 1, seed=seed) for seed in seeds)
    assert first.epoch(0)[0].tolist() != second.epoch(0)[0].tolist()
    assert first.epoch(1)[0].tolist() != second.epoch(0)[0].tolist(), "epoch and seed have the same effect"


def test_seed_and_epoch_are_not_added() -> None:
    (first,), (second,) = plans(40, 4, 1, seed=0), plans(40, 4, 1, seed=1)
    assert first.epoch(1)[0].tolist() != second.epoch(0)[0].tolist()


@quick
@given(st.integers(1, 40), st.integers(3, 9), st.integers(1, 3), SEEDS, BLOCKS, st.integers(1, 4))
def test_resumed_plan_continues_the_first_plan(
    num_rows: int, batch: int, world: int, seed: int, block: int, first: int
) -> None:
    """The blocks of the resumed run are the last blocks of the uninterrupted one."""
    whole = plans(num_rows, batch, world, seed=seed, first=0, epochs=4, block=block)
    resumed = plans(num_rows, batch, world, seed=seed, first=first, epochs=4, block=block)
    for pair in zip(whole, resumed, strict=True):
        blocks = [[plan.block(index) for index in range(plan.num_blocks)] for plan in pair]
        skipped = len(blocks[0]) - len(blocks[1])
        assert [(rows.tolist(), epoch) for rows, epoch in blocks[0][skipped:]] == [
            (rows.tolist(), epoch) for rows, epoch in blocks[1]
        ]
    assert all(plan.num_blocks == 0 for plan in resumed) == (first == 4)


@quick
@given(st.data(), st.integers(1, 60), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), BLOCKS, st.booleans())
def test_epoch_continues_on_another_number_of_ranks(
    data: st.DataObject, num_rows: int, batch: int, world: int, later_world: int, block: int, drop: bool
) -> None:
    """`world` ranks before an interruption and `later_world` ranks after it take the epoch's steps. Later epochs are whole."""
    batch = min(batch, num_rows)
    whole = TrainPlan(num_rows, batch, 0, 1, 7, 1, 3, 1, drop_last=drop)
    first = data.draw(st.integers(0, whole.num_steps - 1))
    expected = steps(whole, 1)
    before = [
        steps(TrainPlan(num_rows, batch, rank, world, 7, 1, 3, block, 0, drop), 1)[:first] for rank in range(world)
    ]
    ranks = [TrainPlan(num_rows, batch, rank, later_world, 7, 1, 3, block, first, drop) for rank in range(later_world)]
    after = [steps(plan, 1) for plan in ranks]
    assert {len(share) for share in after} == {whole.num_steps - first}, "ranks have different numbers of steps"
    joined = [
        sorted(row for rank in part for row in rank) for shares in (before, after) for part in zip(*shares, strict=True)
    ]
    assert joined == [sorted(step) for step in expected]
    assert whole.rows_before(1, first).tolist() == [row for step in expected[:first] for row in step]
    later = [
        sorted(row for rank in part for row in rank) for part in zip(*(steps(plan, 2) for plan in ranks), strict=True)
    ]
    assert later == [sorted(step) for step in steps(whole, 2)], "the next epoch is whole"
    for plan in ranks:
        check_blocks(plan)


def test_rest_of_an_epoch_on_two_ranks() -> None:
    """10 rows in batches of 4: after 2 of 3 steps two rows are left, one for each rank."""
    (whole,) = plans(10, 4, 1)
    left = [TrainPlan(10, 4, rank, 2, 0, 0, 2, 3, first_step=2) for rank in range(2)]
    assert [plan.epoch(0)[0].tolist() for plan in left] == [[row] for row in whole.epoch(0)[0].tolist()[8:]]
    assert [plan.num_blocks for plan in left] == [1 + 2, 1 + 2]
    assert sorted(whole.rows_before(0, 2).tolist() + [plan.epoch(0)[0][0] for plan in left]) == list(range(10))
    assert whole.rows_before(0, 0).tolist() == []


def test_drop_last_leaves_out_the_last_rows() -> None:
    plan = TrainPlan(10, 4, 0, 1, 0, 0, 9, 3, drop_last=True)
    assert (plan.num_steps, plan.epoch(0)[2].tolist()) == (2, [4, 4])
    assert len(plan.rows_before(0, 5)) == 8
    left_out = {epoch: set(range(10)) - set(plan.epoch(epoch)[0].tolist()) for epoch in range(9)}
    assert {len(rows) for rows in left_out.values()} == {2}
    assert len(set().union(*left_out.values())) > 5, "epochs leave out the same rows"


# EvalPlan -------------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 80), st.integers(1, 9), BLOCKS)
def test_evaluation_takes_every_row_once(num_rows: int, world: int, block: int) -> None:
    seen = []
    for rank in range(world):
        plan = EvalPlan(num_rows, rank, world, block)
        parts = [plan.block(index) for index in range(plan.num_blocks)]
        assert all(epoch is None for _, epoch in parts), "an epoch would augment the images"
        assert all(1 <= len(rows) <= block for rows, _ in parts)
        assert all(len(rows) == block for rows, _ in parts[:-1])
        delivered = [row for rows, _ in parts for row in rows.tolist()]
        assert delivered == plan.rows.tolist() == sorted(delivered)
        seen += delivered
    assert sorted(seen) == list(range(num_rows))


def test_evaluation_of_ten_rows_over_three_ranks() -> None:
    ranks = [EvalPlan(10, rank, 3, 2) for rank in range(3)]
    assert [plan.rows.tolist() for plan in ranks] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert [plan.num_blocks for plan in ranks] == [2, 2, 2]
    assert [ranks[1].block(index)[0].tolist() for index in range(2)] == [[1, 4], [7]]
    assert EvalPlan(2, 2, 3, 2).num_blocks == 0
