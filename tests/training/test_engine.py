"""The engine in one process: steps, epochs and evaluation give the numbers of a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # the field's name for it
from torch.utils._python_dispatch import TorchDispatchMode

from msrn_ray.errors import NonFiniteLossError
from msrn_ray.training import distributed, epoch
from msrn_ray.training.engine import train_step
from msrn_ray.training.epoch import EpochSchedule, EpochStats, Progress
from msrn_ray.training.evaluate import Scores, evaluate, gather_scores
from msrn_ray.training.learner import build_ema
from msrn_ray.training.losses import classification_loss
from msrn_ray.training.sampling import EvalPlan
from tests.training.engine_parts import (
    CPU,
    LR,
    NUM_LABELS,
    NUM_ROWS,
    Hooks,
    Toy,
    assert_same_tensors,
    build_msrn,
    eval_batches,
    expected_scores,
    images_and_targets,
    make_batch,
    make_learner,
    make_plan,
    plain_loop,
    plain_losses,
    rows_per_step,
    run_epoch,
    step_batches,
    update_norm,
    whiten_image,
)


@pytest.mark.parametrize(("build", "side"), [(Toy, 8), (build_msrn, 64)])
def test_steps_equal_a_plain_loop(build: Callable[[], nn.Module], side: int) -> None:
    model, reference = build(), build()
    learner = make_learner(model)
    expected = plain_loop(reference, rows_per_step(), side)
    losses = [train_step(learner, make_batch(rows, side=side), len(rows)) for rows in rows_per_step()]
    assert all(loss.shape == (2,) and loss.dtype == torch.float32 and not loss.requires_grad for loss in losses)
    torch.testing.assert_close(torch.stack(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert learner.scheduler.last_epoch == len(losses)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_accumulation_equals_the_whole_batch(parts: int) -> None:
    """Micro-batches may differ in size, and a batch may have fewer images than parts."""
    model, reference = build_msrn(), build_msrn()
    learner = make_learner(model, accumulation=parts)
    steps = [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
    expected = plain_loop(reference, steps)
    losses = [train_step(learner, make_batch(rows), len(rows)) for rows in steps]
    torch.testing.assert_close(torch.stack(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert learner.scheduler.last_epoch == len(steps), "the scheduler steps once per optimizer step"


def test_accumulation_runs_the_model_on_parts() -> None:
    sizes = []
    model = Toy()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    train_step(make_learner(model, accumulation=2), make_batch(range(5), side=8), 5)
    assert sizes == [3, 2]


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_clipped_before_the_update(parts: int) -> None:
    model, rows = Toy(), range(4)
    model.head.weight.data *= 100
    old_weights = copy.deepcopy(dict(model.named_parameters()))
    unclipped = copy.deepcopy(model)
    train_step(make_learner(unclipped, lr=0.5, group_weight=1e4, accumulation=parts), make_batch(rows, side=8), 4)
    unclipped_norm = update_norm(old_weights, unclipped)
    assert unclipped_norm > 1e3
    train_step(
        make_learner(model, 0.5, clip_norm=0.1, group_weight=1e4, accumulation=parts), make_batch(rows, side=8), 4
    )
    assert update_norm(old_weights, model).item() == pytest.approx(0.05, rel=1e-4)
    update = [(weight - old_weights[name]).flatten() for name, weight in model.named_parameters()]
    unclipped_update = [(weight - old_weights[name]).flatten() for name, weight in unclipped.named_parameters()]
    assert F.cosine_similarity(torch.cat(update), torch.cat(unclipped_update), 0) > 0.9999, (
        "the norm is over all gradients"
    )


def test_small_gradients_are_not_clipped() -> None:
    clipped, unclipped = Toy(), Toy()
    train_step(make_learner(clipped, clip_norm=1e3), make_batch(range(4), side=8), 4)
    train_step(make_learner(unclipped, clip_norm=None), make_batch(range(4), side=8), 4)
    assert_same_tensors(clipped.state_dict(), unclipped.state_dict(), 0)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_loss_scaling_does_not_change_training(clip_norm: float | None) -> None:
    scaled, plain = Toy(), Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings: dict[str, Any] = {"clip_norm": clip_norm, "group_weight": 1.0, "accumulation": 2}
    for learner in (make_learner(scaled, 0.5, **settings, scaler=scaler), make_learner(plain, 0.5, **settings)):
        assert train_step(learner, make_batch(range(4), side=8), 4).max() < 100
    assert_same_tensors(scaled.state_dict(), plain.state_dict())


def test_overflowing_gradient_skips_update_and_lowers_scale() -> None:
    model = Toy()
    old_weights = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    train_step(make_learner(model, scaler=scaler, clip_norm=0.1, group_weight=1e4), make_batch(range(4), side=8), 4)
    assert_same_tensors(model.state_dict(), old_weights, 0)
    assert scaler.get_scale() == pytest.approx(1.5e38)


class ValueReads(TorchDispatchMode):
    """Counts the tensors whose value Python reads: on a GPU, every read would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_reads_no_tensor_value(accumulation: int) -> None:
    learner = make_learner(build_msrn(), clip_norm=0.1, accumulation=accumulation)
    with ValueReads() as reads:
        loss = train_step(learner, make_batch(range(4)), 4)
    assert reads.count == 0
    with reads:
        loss.sum().item()
    assert reads.count == 1


def test_invalid_images_do_not_change_the_step() -> None:
    model, reference = build_msrn(), build_msrn()
    losses = train_step(make_learner(model), make_batch([0, 7, 1, 8], [True, False, True, False]), 2)
    expected = plain_loop(reference, [[0, 1]])
    torch.testing.assert_close(losses, torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    assert_same_tensors(model.state_dict(), reference.state_dict())
    losses = train_step(make_learner(model), make_batch([3], [False]), 1)
    assert losses[0] == 0
    assert losses[1] > 0


def test_schedule_and_average_advance_every_step() -> None:
    model = Toy()
    learner = make_learner(model, ema=build_ema(model, 0.9))
    learner.scheduler = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 0.5**step)
    weights = []
    for step in range(3):
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.5**step)
        old_weights = copy.deepcopy(dict(model.named_parameters()))
        train_step(learner, make_batch(range(4), side=8), 4)
        weights.append(model.head.weight.detach().clone())
        assert update_norm(old_weights, model) > 0
    average = weights[0]
    for number, weight in enumerate(weights[1:], 1):
        keep = (1 + number) / (10 + number)
        average = keep * average + (1 - keep) * weight
    assert learner.ema is not None
    torch.testing.assert_close(learner.ema.module.head.weight.detach(), average)


def test_epoch_stats_are_exact() -> None:
    model, reference = Toy(), Toy()
    expected = torch.tensor(plain_loop(reference, rows_per_step(), 8), dtype=torch.float64)
    stats, progress = run_epoch(make_learner(model), step_batches(make_plan(), 8), hooks=Hooks(num_bad=2), wait=0.02)
    assert stats["steps"] == 3
    assert stats["images"] == NUM_ROWS
    assert stats["classification_sum"] == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
    assert stats["group_sum"] == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
    assert 0.02 <= stats["first_batch_seconds"] < stats["wait_seconds"] < stats["seconds"]
    assert stats["wait_seconds"] >= 0.06
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert [report["step"] for report in progress] == [2, 3]
    assert [report["bad_reports"] for report in progress] == [2, 2]
    assert progress[0]["loss"] == pytest.approx(expected[:2].sum().item() / 2, rel=1e-5)
    assert progress[1]["loss"] == pytest.approx(expected[2].sum().item(), rel=1e-5), "every window has a new mean"
    windows = [images / report["images_per_second"] for images, report in zip((8, 2), progress, strict=True)]
    assert windows[0] >= 0.04
    assert windows[1] >= 0.02
    assert sum(windows) <= stats["seconds"]
    for report, seconds, waited in zip(progress, windows, (0.04, 0.02), strict=True):
        assert waited / seconds <= report["data_wait_fraction"] * 1.0001 <= 1.0001


def test_resumed_epoch_equals_the_whole_epoch() -> None:
    """After the rest of an epoch, weights, schedule, random numbers and sums equal those of the whole epoch to the last bit."""
    model, reference = Toy(dropout=0.5), Toy(dropout=0.5)
    saved: list[tuple[EpochStats, Any]] = []

    def keep(stats: EpochStats) -> None:
        states = learner.network.state_dict(), learner.optimizer.state_dict(), learner.scheduler.state_dict()
        saved.append((copy.deepcopy(stats), (copy.deepcopy(states), torch.get_rng_state())))

    torch.manual_seed(0)
    learner = make_learner(model)
    whole, progress = run_epoch(
        learner, step_batches(make_plan(), 8), schedule=EpochSchedule(100, save_steps=1), hooks=Hooks(on_save=keep)
    )
    assert [stats.steps for stats, _ in saved] == [1, 2], "no save at the end: the epoch is saved anyway"
    assert [report["step"] for report in progress] == [1, 2, 3], "losses are checked before a save"
    stats, ((weights, optimizer, scheduler), rng) = saved[0]
    hooks = Hooks()
    resumed = make_learner(reference)
    resumed.network.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.scheduler.load_state_dict(scheduler)
    torch.manual_seed(99)
    torch.set_rng_state(rng)
    rest, progress = run_epoch(
        resumed,
        step_batches(make_plan(), 8)[1:],
        replace(stats, seconds=1000.0),
        schedule=EpochSchedule(2, save_steps=1),
        hooks=hooks,
    )
    assert hooks.rows == rows_per_step()[1:]
    assert [report["step"] for report in progress] == [2, 3]
    for name in ("images", "classification_sum", "group_sum", "steps"):
        assert rest[name] == whole[name], name
    assert 1000 < rest["seconds"] < 1100, "seconds add up"
    assert resumed.scheduler.last_epoch == 3
    assert_same_tensors(reference.state_dict(), model.state_dict(), 0)


def test_no_save_after_a_non_finite_loss() -> None:
    saved: list[int] = []
    with pytest.raises(NonFiniteLossError):
        run_epoch(
            make_learner(Toy()),
            whiten_image(step_batches(make_plan(), 8), rows_per_step()[1][0]),
            schedule=EpochSchedule(100, save_steps=1),
            hooks=Hooks(on_save=lambda stats: saved.append(stats.steps)),
        )
    assert saved == [1]


def test_schedule_saves_by_clock_warning_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(epoch.time, "monotonic", lambda: clock[0])
    by_clock = EpochSchedule(2, save_seconds=60, last_save=100.0)
    assert not by_clock.is_save_time()
    clock[0] += 60
    assert by_clock.is_save_time()
    by_clock.restart()
    assert not by_clock.is_save_time()
    assert not by_clock.is_save_step(60)
    warnings = iter([False, True, True, False, True])
    by_warning = EpochSchedule(2, is_preempted=lambda: next(warnings))
    assert [by_warning.is_save_time() for _ in range(5)] == [False, True, False, False, True], "saved once per warning"
    never = EpochSchedule(2)
    clock[0] += 1e9
    assert not never.is_save_time()
    assert not never.is_save_step(1)
    assert [EpochSchedule(2, save_steps=3).is_save_step(steps) for steps in (2, 3, 4, 6)] == [
        False,
        True,
        False,
        True,
    ]


def test_too_few_batches_raise() -> None:
    with pytest.raises(AssertionError, match="an epoch of 3 steps ended after 2"):
        run_epoch(make_learner(Toy()), step_batches(make_plan(), 8)[:2])


@pytest.mark.parametrize(("log_every", "steps"), [(1, [1, 2, 3]), (3, [3]), (100, [3])])
def test_progress_comes_at_log_steps_and_the_end(log_every: int, steps: list[int]) -> None:
    _, progress = run_epoch(make_learner(Toy()), step_batches(make_plan(), 8), schedule=EpochSchedule(log_every))
    assert [report["step"] for report in progress] == steps


def test_error_in_progress_hook_stops_the_epoch() -> None:
    class StoppingHooks(Hooks):
        def progress_made(self, progress: Progress) -> None:
            raise KeyError(progress.step)

    with pytest.raises(KeyError, match="1"):
        run_epoch(make_learner(Toy()), step_batches(make_plan(), 8), schedule=EpochSchedule(1), hooks=StoppingHooks())


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_non_finite_loss_names_step_and_images(log_every: int) -> None:
    """The error names the first such step and its images, though all later steps are nan too."""
    rows = rows_per_step()[1]
    with pytest.raises(NonFiniteLossError) as caught:
        run_epoch(
            make_learner(Toy()), whiten_image(step_batches(make_plan(), 8), rows[2]), schedule=EpochSchedule(log_every)
        )
    message = str(caught.value)
    assert "not finite at step 1 of the epoch" in message
    assert all(f"image-{row}" in message for row in rows)
    assert message.count("image-") == len(rows)
    assert "optim.lr" in message


def test_model_mode_follows_training_and_evaluation() -> None:
    model = Toy(dropout=0.5)
    batches = [make_batch(range(6), side=8)]
    scores = [evaluate(model, batches, device=CPU, num_classes=NUM_LABELS).scores for _ in range(2)]
    assert not model.training
    np.testing.assert_array_equal(*scores)
    modes = []
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    run_epoch(make_learner(model), step_batches(make_plan(), 8))
    assert modes == [True] * 3, "an epoch after an evaluation runs in train mode"


def test_evaluation_scores_every_row() -> None:
    model = build_msrn()
    batches = eval_batches(EvalPlan(NUM_ROWS, 0, 1, 4))
    assert [len(batch.row) for batch in batches] == [4, 4, 2]
    scores = evaluate(model, iter(batches), device=CPU, num_classes=NUM_LABELS)
    probabilities, losses = expected_scores(model, range(NUM_ROWS))
    assert scores.row.tolist() == list(range(NUM_ROWS))
    assert scores.row.dtype == np.int64
    assert scores.scores.dtype == scores.loss.dtype == np.float32
    assert scores.target.dtype == np.int8
    np.testing.assert_allclose(scores.scores, probabilities.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.loss, losses, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scores.target, images_and_targets()[1].numpy())


def test_evaluation_leaves_out_invalid_images() -> None:
    model = Toy()
    batches = [make_batch([4, 2, 7], [True, False, True], 8), make_batch([1], [False], 8), make_batch([0], side=8)]
    scores = evaluate(model, batches, device=CPU, num_classes=NUM_LABELS)
    assert scores.row.tolist() == [4, 7, 0]
    probabilities, losses = expected_scores(model, [4, 7, 0], 8)
    np.testing.assert_allclose(scores.scores, probabilities.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.loss, losses, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scores.target, images_and_targets(8)[1][[4, 7, 0]].numpy())


def test_evaluation_without_batches_gives_empty_scores() -> None:
    scores = evaluate(Toy(), [], device=CPU, num_classes=NUM_LABELS)
    assert scores.row.shape == scores.loss.shape == (0,)
    assert scores.scores.shape == scores.target.shape == (0, NUM_LABELS)
    assert gather_scores(scores).row.shape == (0,)


def test_mixed_precision_returns_float32_losses() -> None:
    losses = train_step(make_learner(build_msrn().train(), amp_dtype=torch.bfloat16), make_batch(range(4)), 4)
    exact = torch.tensor(plain_loop(build_msrn(), [range(4)])[0])
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0)
    assert not torch.allclose(losses, exact, rtol=1e-6, atol=0), "autocast rounds some values"


def test_gathered_scores_are_in_row_order() -> None:
    row = np.array([7, 0, 3])
    unordered = Scores(row, row[:, None].astype(np.float32), row[:, None].astype(np.int8), row.astype(np.float32))
    gathered = gather_scores(unordered)
    for column in (gathered.row, gathered.scores[:, 0], gathered.target[:, 0], gathered.loss):
        assert column.tolist() == [0, 3, 7]
    with pytest.raises(AssertionError, match="twice"):
        gather_scores(Scores(np.array([1, 1]), np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int8), np.zeros(2)))


def test_collectives_without_a_group_change_nothing() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather("one") == ["one"]
    values = torch.tensor([3.0, 4.0])
    assert distributed.all_reduce(values, "sum") is values
    norm = nn.BatchNorm1d(2)
    norm.running_mean.copy_(values)
    distributed.average_buffers(norm)
    assert torch.equal(norm.running_mean, values)
    assert values.tolist() == [3, 4]


def test_step_trains_on_the_learners_loss() -> None:
    expected, _ = plain_losses(build_msrn().train(), range(4), 64)
    doubled = make_learner(build_msrn().train(), loss=lambda logits, target: 2 * classification_loss(logits, target))
    assert train_step(doubled, make_batch(range(4)), 4)[0].item() == pytest.approx(2 * expected.item(), rel=1e-5)
