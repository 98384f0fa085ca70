"""The engine alone and over 2 and 3 processes: whatever the number of ranks, the numbers are those of a plain loop."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F  # the field's name for it
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from msrn_ray.config import ModelSettings
from msrn_ray.errors import NonFiniteLossError
from msrn_ray.model import build_model
from msrn_ray.training import distributed, engine
from msrn_ray.training.ema import build_ema
from msrn_ray.training.engine import EpochSchedule, EpochStats, Progress, train_one_epoch, train_step
from msrn_ray.training.evaluate import Scores, evaluate, gather_scores
from msrn_ray.training.learner import Learner
from msrn_ray.training.losses import classification_loss
from msrn_ray.training.sampling import EvalPlan, TrainPlan
from msrn_ray.types import Batch, MSRNOutput

NUM_ROWS, NUM_LABELS, BATCH, SEED, LR, GROUP_WEIGHT = 10, 4, 4, 3, 0.02, 0.02
CPU = torch.device("cpu")


class Toy(nn.Module):
    """A linear layer on 2x2 pooled pixels, semantics of its own, dropout; an all-white image gives nan."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(12, NUM_LABELS)
        self.head.weight.data = torch.randn(NUM_LABELS, 12, generator=generator)
        self.head.bias.data.zero_()
        self.labels = nn.Parameter(torch.randn(NUM_LABELS, 5, generator=generator))
        self.groups = nn.Parameter(torch.randn(2, 5, generator=generator))
        self.register_buffer("assignment", torch.randn(NUM_LABELS, 2, generator=generator).softmax(1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> MSRNOutput:
        features = self.dropout(F.adaptive_avg_pool2d(images, 2).flatten(1))
        white = (images > 2.2).flatten(1).all(1, keepdim=True)
        logits = self.head(features).masked_fill(white, float("nan"))
        return MSRNOutput(logits, self.labels, self.groups, self.assignment)


def msrn() -> nn.Module:
    """The whole network, with its BatchNorm frozen: its images then do not depend on each other."""
    torch.manual_seed(0)
    mask = torch.eye(NUM_LABELS, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    settings = ModelSettings(
        backbone="resnet10",
        pretrained=None,
        head="elementwise",
        levels=("layer2", "layer3"),
        embed_dim=8,
        label_hidden_dim=8,
        graph_hidden_dim=8,
        group_ratio=0.5,
        frozen_batchnorm=True,
    )
    return build_model(settings, torch.randn(NUM_LABELS, 6), mask)


def data(side: int = 64) -> tuple[Tensor, Tensor]:
    """[n, 3, S, S] uint8 and [n, C] int8 in {1, 0, -1}."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_ROWS, 3, side, side), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(-1, 2, (NUM_ROWS, NUM_LABELS), np.int8))


def batch_of(rows: Sequence[int], valid: Sequence[bool] | None = None, side: int = 64) -> Batch:
    images, target = data(side)
    index = torch.tensor(rows, dtype=torch.int64)
    return Batch(images[index], target[index], index, torch.tensor([True] * len(rows) if valid is None else valid))


def plan_of(rank: int = 0, world: int = 1) -> TrainPlan:
    return TrainPlan(NUM_ROWS, BATCH, rank, world, SEED, 0, 1, 5)


def step_batches(plan: TrainPlan, side: int = 64) -> list[Batch]:
    rows, valid, sizes = plan.epoch(0)
    ends = np.cumsum(sizes)
    return [
        batch_of(rows[end - size : end].tolist(), valid[end - size : end].tolist(), side)
        for size, end in zip(sizes, ends, strict=True)
    ]


def learner_of(model: nn.Module, lr: float = LR, **change: Any) -> Learner:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=lr)
    fields: dict[str, Any] = {
        "ema": None,
        "amp_dtype": None,
        "clip_norm": None,
        "accumulation": 1,
        "group_weight": GROUP_WEIGHT,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
    }
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Learner(model, optimizer, scheduler, **(fields | change))


def losses_of(model: nn.Module, rows: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """Classification loss (mean over the rows) and weighted group loss, written out."""
    images, target = data(side)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    output = model((images[list(rows)].float() / 255 - mean) / std)
    each = []
    for logits, labels in zip(output.logits, target[list(rows)], strict=True):
        known = [
            F.softplus(-one if label == 1 else one) for one, label in zip(logits, labels, strict=True) if label >= 0
        ]
        each.append(torch.stack(known).mean() if known else logits.sum() * 0)
    nearest = output.assignment.argmax(1)
    distance = [(output.label_embedding[i] - output.group_embedding[g]).norm() for i, g in enumerate(nearest)]
    return torch.stack(each).mean(), GROUP_WEIGHT * torch.stack(distance).sum()


def plain_loop(model: nn.Module, steps: Sequence[Sequence[int]], side: int = 64, lr: float = LR) -> list[list[float]]:
    """Gradient descent on whole batches without any of the engine; -> both losses of each step."""
    told = []
    weights = [one for one in model.parameters() if one.requires_grad]
    for rows in steps:
        losses = losses_of(model, rows, side)
        told.append([float(one.detach()) for one in losses])
        gradients = torch.autograd.grad(sum(losses), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= lr * gradient
    return told


def whole_steps() -> list[list[int]]:
    """Rows of each step of the epoch over all ranks."""
    return [batch.row.tolist() for batch in step_batches(plan_of())]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@dataclass
class Hooks:
    """Record what an epoch calls.

    Attributes:
        num_bad: bad images of this rank.
        on_save: called with the epoch so far.
        rows, progress: what came.
    """

    num_bad: int = 0
    on_save: Callable[[EpochStats], None] = lambda stats: None
    rows: list[list[int]] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)

    def rows_trained(self, rows: Any) -> None:
        self.rows.append(rows.tolist())

    def progress_made(self, progress: Progress) -> None:
        self.progress.append(dict(vars(progress)))

    def save(self, stats: EpochStats) -> None:
        self.on_save(stats)

    def count_bad_images(self) -> int:
        return self.num_bad

    def image_ids(self, rows: list[int]) -> list[str]:
        return [f"image-{row}" for row in rows]


def run_epoch(
    learner: Learner,
    batches: Sequence[Batch],
    stats: EpochStats | None = None,
    *,
    schedule: EpochSchedule | None = None,
    hooks: Hooks | None = None,
    wait: float = 0.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Call `train_one_epoch` and return its stats and its progress as plain data."""
    stats, hooks = stats or EpochStats(), hooks or Hooks()

    def deliver() -> Iterator[Batch]:
        for batch in batches:
            time.sleep(wait)
            yield batch

    train_one_epoch(learner, deliver(), stats, plan_of(), schedule or EpochSchedule(2), hooks)
    return dict(vars(stats)), hooks.progress


# one process ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "side"), [(Toy, 8), (msrn, 64)])
def test_steps_equal_a_plain_loop(build: Callable[[], nn.Module], side: int) -> None:
    model, other = build(), build()
    learner = learner_of(model)
    expected = plain_loop(other, whole_steps(), side)
    told = [train_step(learner, batch_of(rows, side=side), len(rows)) for rows in whole_steps()]
    assert all(one.shape == (2,) and one.dtype == torch.float32 and not one.requires_grad for one in told)
    torch.testing.assert_close(torch.stack(told), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_same(model.state_dict(), other.state_dict())
    assert learner.scheduler.last_epoch == len(told)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_accumulation_equals_the_whole_batch(parts: int) -> None:
    """Also where the micro-batches are of different sizes, and where there are fewer images than parts."""
    model, other = msrn(), msrn()
    learner = learner_of(model, accumulation=parts)
    steps = [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
    expected = plain_loop(other, steps)
    told = [train_step(learner, batch_of(rows), len(rows)) for rows in steps]
    torch.testing.assert_close(torch.stack(told), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_same(model.state_dict(), other.state_dict())
    assert learner.scheduler.last_epoch == len(steps), "one schedule step for each optimizer step"


def test_accumulation_runs_the_model_on_parts() -> None:
    sizes = []
    model = Toy()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    train_step(learner_of(model, accumulation=2), batch_of(range(5), side=8), 5)
    assert sizes == [3, 2]


def moved(before: dict[str, Tensor], model: nn.Module) -> Tensor:
    return torch.cat([(value - before[name]).flatten() for name, value in model.named_parameters()]).norm()


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_clipped_before_the_update(parts: int) -> None:
    model, rows = Toy(), range(4)
    model.head.weight.data *= 100
    before = copy.deepcopy(dict(model.named_parameters()))
    free = copy.deepcopy(model)
    train_step(learner_of(free, lr=0.5, group_weight=1e4, accumulation=parts), batch_of(rows, side=8), 4)
    large = moved(before, free)
    assert large > 1e3
    train_step(learner_of(model, 0.5, clip_norm=0.1, group_weight=1e4, accumulation=parts), batch_of(rows, side=8), 4)
    assert moved(before, model).item() == pytest.approx(0.05, rel=1e-4)
    direction = [(now - before[name]).flatten() for name, now in model.named_parameters()]
    freely = [(now - before[name]).flatten() for name, now in free.named_parameters()]
    assert F.cosine_similarity(torch.cat(direction), torch.cat(freely), 0) > 0.9999, "the norm is that of all gradients"


def test_small_gradients_are_left_alone() -> None:
    clipped, free = Toy(), Toy()
    train_step(learner_of(clipped, clip_norm=1e3), batch_of(range(4), side=8), 4)
    train_step(learner_of(free, clip_norm=None), batch_of(range(4), side=8), 4)
    assert_same(clipped.state_dict(), free.state_dict(), 0)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_scaled_loss_trains_the_same(clip_norm: float | None) -> None:
    scaled, plain = Toy(), Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings: dict[str, Any] = {"clip_norm": clip_norm, "group_weight": 1.0, "accumulation": 2}
    for learner in (learner_of(scaled, 0.5, **settings, scaler=scaler), learner_of(plain, 0.5, **settings)):
        assert train_step(learner, batch_of(range(4), side=8), 4).max() < 100
    assert_same(scaled.state_dict(), plain.state_dict())


def test_a_gradient_that_overflows_skips_the_update_and_lowers_the_scale() -> None:
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    train_step(learner_of(model, scaler=scaler, clip_norm=0.1, group_weight=1e4), batch_of(range(4), side=8), 4)
    assert_same(model.state_dict(), before, 0)
    assert scaler.get_scale() == pytest.approx(1.5e38)


class Reads(TorchDispatchMode):
    """Counts the tensors whose value Python asks for: on a GPU each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reads_no_value(accumulation: int) -> None:
    learner = learner_of(msrn(), clip_norm=0.1, accumulation=accumulation)
    with Reads() as reads:
        loss = train_step(learner, batch_of(range(4)), 4)
    assert reads.count == 0
    with reads:
        loss.sum().item()
    assert reads.count == 1


def test_images_that_are_not_valid_count_nothing() -> None:
    model, other = msrn(), msrn()
    told = train_step(learner_of(model), batch_of([0, 7, 1, 8], [True, False, True, False]), 2)
    expected = plain_loop(other, [[0, 1]])
    torch.testing.assert_close(told, torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
    assert_same(model.state_dict(), other.state_dict())
    told = train_step(learner_of(model), batch_of([3], [False]), 1)
    assert told[0] == 0
    assert told[1] > 0


def test_schedule_and_average_follow_each_step() -> None:
    model = Toy()
    learner = learner_of(model, ema=build_ema(model, 0.9))
    learner.scheduler = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 0.5**step)
    weights = []
    for step in range(3):
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.5**step)
        before = copy.deepcopy(dict(model.named_parameters()))
        train_step(learner, batch_of(range(4), side=8), 4)
        weights.append(model.head.weight.detach().clone())
        assert moved(before, model) > 0
    average = weights[0]
    for number, weight in enumerate(weights[1:], 1):
        keep = (1 + number) / (10 + number)
        average = keep * average + (1 - keep) * weight
    assert learner.ema is not None
    torch.testing.assert_close(learner.ema.module.head.weight.detach(), average)


def test_epoch_stats_are_exact() -> None:
    model, other = Toy(), Toy()
    expected = torch.tensor(plain_loop(other, whole_steps(), 8), dtype=torch.float64)
    stats, told = run_epoch(learner_of(model), step_batches(plan_of(), 8), hooks=Hooks(num_bad=2), wait=0.02)
    assert stats["steps"] == 3
    assert stats["images"] == NUM_ROWS
    assert stats["classification_sum"] == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
    assert stats["group_sum"] == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
    assert 0.02 <= stats["first_batch_seconds"] < stats["wait_seconds"] < stats["seconds"]
    assert stats["wait_seconds"] >= 0.06
    assert_same(model.state_dict(), other.state_dict())
    assert [one["step"] for one in told] == [2, 3]
    assert [one["bad_reports"] for one in told] == [2, 2]
    assert told[0]["loss"] == pytest.approx(expected[:2].sum().item() / 2, rel=1e-5)
    assert told[1]["loss"] == pytest.approx(expected[2].sum().item(), rel=1e-5), "means start anew in each window"
    windows = [images / one["images_per_second"] for images, one in zip((8, 2), told, strict=True)]
    assert windows[0] >= 0.04
    assert windows[1] >= 0.02
    assert sum(windows) <= stats["seconds"]
    for one, seconds, waited in zip(told, windows, (0.04, 0.02), strict=True):
        assert waited / seconds <= one["data_wait_fraction"] * 1.0001 <= 1.0001


def test_an_epoch_in_two_parts_is_the_epoch() -> None:
    """Weights, schedule, random numbers and sums after the rest of an epoch are those of the whole one, to the last bit."""
    model, other = Toy(dropout=0.5), Toy(dropout=0.5)
    saved: list[tuple[EpochStats, Any]] = []

    def keep(stats: EpochStats) -> None:
        states = learner.network.state_dict(), learner.optimizer.state_dict(), learner.scheduler.state_dict()
        saved.append((copy.deepcopy(stats), (copy.deepcopy(states), torch.get_rng_state())))

    torch.manual_seed(0)
    learner = learner_of(model)
    whole, told = run_epoch(
        learner, step_batches(plan_of(), 8), schedule=EpochSchedule(100, save_steps=1), hooks=Hooks(on_save=keep)
    )
    assert [stats.steps for stats, _ in saved] == [1, 2], "not at the end, where the epoch is saved anyway"
    assert [one["step"] for one in told] == [1, 2, 3], "what is saved was checked first"
    stats, ((weights, optimizer, scheduler), rng) = saved[0]
    hooks = Hooks()
    again = learner_of(other)
    again.network.load_state_dict(weights)
    again.optimizer.load_state_dict(optimizer)
    again.scheduler.load_state_dict(scheduler)
    torch.manual_seed(99)
    torch.set_rng_state(rng)
    rest, told = run_epoch(
        again,
        step_batches(plan_of(), 8)[1:],
        copy.deepcopy(stats),
        schedule=EpochSchedule(2, save_steps=1),
        hooks=hooks,
    )
    assert hooks.rows == whole_steps()[1:]
    assert [one["step"] for one in told] == [2, 3]
    for name in ("images", "classification_sum", "group_sum", "steps"):
        assert rest[name] == whole[name], name
    assert rest["seconds"] > stats.seconds, "time is added up"
    assert again.scheduler.last_epoch == 3
    assert_same(other.state_dict(), model.state_dict(), 0)


def test_a_loss_that_is_not_finite_is_not_saved() -> None:
    saved: list[int] = []
    with pytest.raises(NonFiniteLossError):
        run_epoch(
            learner_of(Toy()),
            poisoned(step_batches(plan_of(), 8), whole_steps()[1][0]),
            schedule=EpochSchedule(100, save_steps=1),
            hooks=Hooks(on_save=lambda stats: saved.append(stats.steps)),
        )
    assert saved == [1]


def test_save_points_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    points = EpochSchedule(2, save_seconds=60, last_save=100.0)
    assert not points.is_save_time()
    now[0] += 60
    assert points.is_save_time()
    points.restart()
    assert not points.is_save_time()
    assert not points.is_save_step(60)
    warnings = iter([False, True, True, False, True])
    warned = EpochSchedule(2, is_preempted=lambda: next(warnings))
    assert [warned.is_save_time() for _ in range(5)] == [False, True, False, False, True], "once for each warning"
    never = EpochSchedule(2)
    now[0] += 1e9
    assert not never.is_save_time()
    assert not never.is_save_step(1)
    assert [EpochSchedule(2, save_steps=3).is_save_step(steps) for steps in (2, 3, 4, 6)] == [
        False,
        True,
        False,
        True,
    ]


def test_batches_that_end_early_are_noticed() -> None:
    with pytest.raises(AssertionError, match="an epoch of 3 steps ended after 2"):
        run_epoch(learner_of(Toy()), step_batches(plan_of(), 8)[:2])


@pytest.mark.parametrize(("log_every", "steps"), [(1, [1, 2, 3]), (3, [3]), (100, [3])])
def test_progress_comes_every_few_steps_and_at_the_end(log_every: int, steps: list[int]) -> None:
    _, told = run_epoch(learner_of(Toy()), step_batches(plan_of(), 8), schedule=EpochSchedule(log_every))
    assert [one["step"] for one in told] == steps


def test_progress_may_stop_the_epoch() -> None:
    class StoppingHooks(Hooks):
        def progress_made(self, progress: Progress) -> None:
            raise KeyError(progress.step)

    with pytest.raises(KeyError, match="1"):
        run_epoch(learner_of(Toy()), step_batches(plan_of(), 8), schedule=EpochSchedule(1), hooks=StoppingHooks())


def poisoned(batches: list[Batch], row: int) -> list[Batch]:
    """The same with the image of `row` all white."""
    for batch in batches:
        batch.images[batch.row == row] = 255
    return batches


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_loss_that_is_not_finite(log_every: int) -> None:
    """The first such step is named with the images of it, though all later steps are nan too."""
    rows = whole_steps()[1]
    told = []
    with pytest.raises(NonFiniteLossError) as error:
        run_epoch(learner_of(Toy()), poisoned(step_batches(plan_of(), 8), rows[2]), schedule=EpochSchedule(log_every))
    told = str(error.value)
    assert "not finite at step 1 of the epoch" in told
    assert all(f"image-{row}" in told for row in rows)
    assert told.count("image-") == len(rows)
    assert "optim.lr" in told


def test_train_and_evaluation_mode() -> None:
    model = Toy(dropout=0.5)
    batches = [batch_of(range(6), side=8)]
    scores = [evaluate(model, batches, device=CPU, num_classes=NUM_LABELS).scores for _ in range(2)]
    assert not model.training
    np.testing.assert_array_equal(*scores)
    modes = []
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    run_epoch(learner_of(model), step_batches(plan_of(), 8))
    assert modes == [True] * 3, "training after an evaluation runs in train mode"


@torch.no_grad()
def expected_scores(model: nn.Module, rows: Sequence[int], side: int = 64) -> tuple[Tensor, list[float]]:
    model.eval()
    images, _ = data(side)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = model((images[list(rows)].float() / 255 - mean) / std).logits
    return 1 / (1 + (-logits).exp()), [float(losses_of(model, [row], side)[0]) for row in rows]


def eval_batches(plan: EvalPlan, side: int = 64) -> list[Batch]:
    return [batch_of(plan.block(index)[0].tolist(), side=side) for index in range(plan.num_blocks)]


def test_evaluation_scores_every_row() -> None:
    model = msrn()
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
    np.testing.assert_array_equal(scores.target, data()[1].numpy())


def test_evaluation_leaves_out_what_is_not_valid() -> None:
    model = Toy()
    batches = [batch_of([4, 2, 7], [True, False, True], 8), batch_of([1], [False], 8), batch_of([0], side=8)]
    scores = evaluate(model, batches, device=CPU, num_classes=NUM_LABELS)
    assert scores.row.tolist() == [4, 7, 0]
    probabilities, losses = expected_scores(model, [4, 7, 0], 8)
    np.testing.assert_allclose(scores.scores, probabilities.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.loss, losses, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scores.target, data(8)[1][[4, 7, 0]].numpy())


def test_evaluation_of_nothing() -> None:
    scores = evaluate(Toy(), [], device=CPU, num_classes=NUM_LABELS)
    assert scores.row.shape == scores.loss.shape == (0,)
    assert scores.scores.shape == scores.target.shape == (0, NUM_LABELS)
    assert gather_scores(scores).row.shape == (0,)


def test_mixed_precision_keeps_the_loss_in_full() -> None:
    told = train_step(learner_of(msrn().train(), amp_dtype=torch.bfloat16), batch_of(range(4)), 4)
    exact = torch.tensor(plain_loop(msrn(), [range(4)])[0])
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, exact, rtol=0.03, atol=0)
    assert not torch.allclose(told, exact, rtol=1e-6, atol=0), "autocast was off"


def test_gathered_scores_are_in_row_order() -> None:
    row = np.array([7, 0, 3])
    own = Scores(row, row[:, None].astype(np.float32), row[:, None].astype(np.int8), row.astype(np.float32))
    gathered = gather_scores(own)
    for column in (gathered.row, gathered.scores[:, 0], gathered.target[:, 0], gathered.loss):
        assert column.tolist() == [0, 3, 7]
    with pytest.raises(AssertionError, match="twice"):
        gather_scores(Scores(np.array([1, 1]), np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int8), np.zeros(2)))


def test_alone_the_collectives_do_nothing() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather("one") == ["one"]
    values = torch.tensor([3.0, 4.0])
    assert distributed.all_reduce(values, "sum") is values
    norm = nn.BatchNorm1d(2)
    norm.running_mean.copy_(values)
    distributed.average_buffers(norm)
    assert torch.equal(norm.running_mean, values)
    assert values.tolist() == [3, 4]


# several processes ----------------------------------------------------------------------------------------------------


def parallel(model: nn.Module, accumulation: int = 1) -> nn.Module:
    return DistributedDataParallel(model, **distributed.parallel_settings(accumulation))


def on_each_rank(rank: int, world: int) -> dict[str, Any]:
    """Everything that the tests below look at, done by one rank."""
    found: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size()}
    plan = plan_of(rank, world)
    found["valid"] = [batch.valid.tolist() for batch in step_batches(plan)]

    model = msrn()
    hooks = Hooks(num_bad=rank + 1)
    found["stats"], found["progress"] = run_epoch(learner_of(parallel(model)), step_batches(plan), hooks=hooks)
    found["rows"] = [row for rows in hooks.rows for row in rows]
    found["weights"] = model.state_dict()

    found["saved"] = []
    seconds = 0.0 if rank == 0 else 1e9  # only the first rank's clock counts
    schedule = EpochSchedule(2, save_seconds=seconds)
    hooks = Hooks(on_save=lambda stats: found["saved"].append(stats.steps))
    run_epoch(learner_of(parallel(Toy())), step_batches(plan, 8), schedule=schedule, hooks=hooks)

    model = msrn()
    learner = learner_of(parallel(model, 2), accumulation=2)
    for step, batch in enumerate(step_batches(plan)):
        train_step(learner, batch, plan.step_rows(step))
    found["accumulated"] = model.state_dict()

    for compress in (False, True):
        model = Toy()
        wrapped = parallel(model)
        if compress:
            distributed.compress_gradients(wrapped)
        train_step(learner_of(wrapped), step_batches(plan, 8)[0], plan.step_rows(0))
        found["compressed" if compress else "sent whole"] = {
            name: parameter.grad for name, parameter in model.named_parameters()
        }

    model = Toy()
    model.head.weight.data *= 100
    before = copy.deepcopy(dict(model.named_parameters()))
    learner = learner_of(parallel(model), 0.5, clip_norm=0.1, group_weight=1e4)
    train_step(learner, step_batches(plan, 8)[0], plan.step_rows(0))
    found["clipped"] = moved(before, model).item()

    row = plan_of(1, world).epoch(0)[0][plan_of(1, world).epoch(0)[2][0]]  # the first row of rank 1 in step 1
    found["poisoned"] = int(row)
    for log_every in (1, 2, 100):
        try:
            batches = poisoned(step_batches(plan, 8), int(row))
            run_epoch(learner_of(parallel(Toy())), batches, schedule=EpochSchedule(log_every))
        except NonFiniteLossError as error:
            found[f"error {log_every}"] = str(error)

    model = msrn()
    for name, num_rows in (("scores", NUM_ROWS), ("few", 2)):
        own = evaluate(
            model,
            eval_batches(EvalPlan(num_rows, rank, world, 2)),
            device=CPU,
            num_classes=NUM_LABELS,
        )
        found[f"own {name}"] = own.row.tolist()
        found[name] = gather_scores(own)

    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    norm.running_var.copy_(torch.tensor([1.0, 10.0 * rank]))
    norm.num_batches_tracked.fill_(rank)
    norm.weight.data.fill_(rank)
    distributed.average_buffers(norm)
    found["buffers"] = norm.state_dict()
    found["gathered"] = distributed.all_gather({"rank": rank})
    found["sum"] = distributed.all_reduce(torch.tensor([rank, 1.0]), "sum").tolist()
    found["min"] = distributed.all_reduce(torch.tensor([rank, 5.0 - rank]), "min").tolist()
    return found


def process(rank: int, folder: str) -> None:
    """One of three processes: all three form a group, then the first two of them."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/group{world}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),  # ranks that fall out of step fail soon
            )
            torch.save(on_each_rank(rank, world), f"{folder}/{world}_{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of 2 and of 3 found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once, not by each process
    multiprocessing.start_processes(process, (str(folder),), nprocs=3, start_method="forkserver")
    return {
        world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=False) for rank in range(world)]
        for world in (2, 3)
    }


WORLDS = pytest.mark.parametrize("world", [2, 3])


@WORLDS
def test_ranks_know_each_other(groups: Any, world: int) -> None:
    assert [(one["rank"], one["world"]) for one in groups[world]] == [(rank, world) for rank in range(world)]
    for found in groups[world]:
        assert found["gathered"] == [{"rank": rank} for rank in range(world)]
        assert found["sum"] == [sum(range(world)), world]
        assert found["min"] == [0, 5 - (world - 1)]


@WORLDS
@pytest.mark.parametrize("name", ["weights", "accumulated"])
def test_ranks_train_as_one_process(groups: Any, world: int, name: str) -> None:
    """Steps of 4, 4 and 2 rows; of three ranks the last then has only a filler."""
    if world == 3:
        assert groups[3][2]["valid"] == [[True], [True], [False]]
    model = msrn()
    start = copy.deepcopy(model.state_dict())
    plain_loop(model, whole_steps())
    expected = model.state_dict()
    assert max((expected[key] - start[key]).abs().max() for key in expected if "weight" in key) > 1e-3
    for found in groups[world]:
        assert_same(found[name], expected)


@WORLDS
def test_ranks_report_the_whole_batch(groups: Any, world: int) -> None:
    expected = torch.tensor(plain_loop(msrn(), whole_steps()), dtype=torch.float64)
    ranks = groups[world]
    assert [len(found["rows"]) for found in ranks] == {2: [5, 5], 3: [5, 3, 2]}[world]
    assert sorted(row for found in ranks for row in found["rows"]) == list(range(NUM_ROWS))
    for found in ranks:
        stats, told = found["stats"], found["progress"]
        assert stats["steps"] == 3
        assert stats["images"] == NUM_ROWS
        assert stats["classification_sum"] == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
        assert stats["group_sum"] == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
        assert [one["step"] for one in told] == [2, 3]
        assert [one["bad_reports"] for one in told] == [world * (world + 1) // 2] * 2
        assert told[0]["loss"] == pytest.approx(expected[:2].sum().item() / 2, rel=1e-5)
        assert told[1]["loss"] == pytest.approx(expected[2].sum().item(), rel=1e-5)
        windows = [images / one["images_per_second"] for images, one in zip((8, 2), told, strict=True)]
        assert 0.5 * stats["seconds"] < sum(windows) <= 1.01 * stats["seconds"], "images of all ranks are counted"
        assert all(0 <= one["data_wait_fraction"] < 1 for one in told)


@WORLDS
def test_ranks_agree_when_a_time_is_up(groups: Any, world: int) -> None:
    """At a check, by the first rank's clock; the end of the epoch is its own checkpoint."""
    assert [found["saved"] for found in groups[world]] == [[2]] * world


def test_gradients_exist_once_and_statistics_stay_each_rank_s_own() -> None:
    one, several = distributed.parallel_settings(1), distributed.parallel_settings(3)
    assert one["gradient_as_bucket_view"]
    assert [value for name, value in one.items() if "buffers" in name] == [False], "whatever this torch calls it"
    assert (one["static_graph"], several["static_graph"]) == (True, False)


@WORLDS
def test_compressed_gradients_differ_by_the_rounding_of_bf16(groups: Any, world: int) -> None:
    for found in groups[world]:
        largest = 0.0
        for name, whole in found["sent whole"].items():
            compressed = found["compressed"][name]
            assert torch.equal(compressed, groups[world][0]["compressed"][name]), "ranks must not part"
            assert torch.equal(compressed, compressed.bfloat16().float())
            torch.testing.assert_close(compressed, whole, rtol=0, atol=world * 2**-8 * float(whole.abs().max()))
            largest = max(largest, float((compressed - whole).abs().max() / whole.abs().max()))
        assert largest > 1e-5, "something was rounded"


@WORLDS
def test_ranks_clip_the_averaged_gradient(groups: Any, world: int) -> None:
    for found in groups[world]:
        assert found["clipped"] == pytest.approx(0.05, rel=1e-4)


@WORLDS
@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_ranks_stop_together(groups: Any, world: int, log_every: int) -> None:
    """One rank's images are at fault; every rank names its step and its images, and no others."""
    plan = plan_of(1, world)
    rows, _, sizes = plan.epoch(0)
    at_fault = rows[sizes[0] : sizes[0] + sizes[1]].tolist()
    for found in groups[world]:
        assert found["poisoned"] == at_fault[0]
        message = found[f"error {log_every}"]
        assert "not finite at step 1 of the epoch" in message
        named = [int(part.split("-")[1].rstrip(",;")) for part in message.split() if part.startswith("image-")]
        assert named == sorted(at_fault)


@WORLDS
def test_ranks_score_every_row_once(groups: Any, world: int) -> None:
    model = msrn()
    probabilities, losses = expected_scores(model, range(NUM_ROWS))
    assert sorted(row for found in groups[world] for row in found["own scores"]) == list(range(NUM_ROWS))
    assert groups[3][2]["own few"] == [], "a rank without a row is part of the test"
    for found in groups[world]:
        for name, num_rows in (("scores", NUM_ROWS), ("few", 2)):
            scores = found[name]
            assert scores.row.tolist() == list(range(num_rows))
            np.testing.assert_allclose(scores.scores, probabilities[:num_rows].numpy(), rtol=0, atol=1e-6)
            np.testing.assert_allclose(scores.loss, losses[:num_rows], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(scores.target, data()[1][:num_rows].numpy())


@WORLDS
def test_ranks_average_float_buffers(groups: Any, world: int) -> None:
    mean = sum(range(world)) / world
    for rank, found in enumerate(groups[world]):
        buffers = found["buffers"]
        assert buffers["running_mean"].tolist() == [mean, mean]
        assert buffers["running_var"].tolist() == pytest.approx([1, 10 * mean])
        assert buffers["num_batches_tracked"] == rank, "counts are not averaged"
        assert buffers["weight"].tolist() == [rank, rank], "weights are not buffers"


def test_the_step_trains_on_the_learners_loss() -> None:
    expected, _ = losses_of(msrn().train(), range(4), 64)
    doubled = learner_of(msrn().train(), loss=lambda logits, target: 2 * classification_loss(logits, target))
    assert train_step(doubled, batch_of(range(4)), 4)[0].item() == pytest.approx(2 * expected.item(), rel=1e-5)
