"""The training step and the epoch: explicit arguments in, plain values out; no Ray, no files.

Shapes: B images of a rank's batch, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..datasets.transforms import normalize
from ..errors import NonFiniteLossError
from ..types import Batch, MSRNOutput
from . import distributed
from .epoch import EpochHooks, EpochSchedule, EpochStats, Progress
from .learner import Learner
from .losses import group_loss
from .sampling import TrainPlan


def train_step(learner: Learner, batch: Batch, num_rows: int) -> Tensor:
    """Run one optimizer step: forward, backward, clip, update, schedule, EMA. Ranks exchange nothing but gradients.

    Args:
        learner: what is trained.
        batch: this rank's images of the step, on the model's device.
        num_rows: planned images of the step over all ranks. The loss is the sum over the valid images divided by this, so a short batch
            weighs what it should. An image that could not be decoded adds nothing, but still counts here.

    Returns:
        [2] float32, detached: this rank's classification loss and weighted group loss; their means over ranks are the step's.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    chunks = [tensor.tensor_split(min(learner.accumulation, len(batch.row))) for tensor in batch]
    micro_batches = [Batch(*micro) for micro in zip(*chunks, strict=True)]
    scale = distributed.world_size() / num_rows  # DistributedDataParallel takes the mean over ranks
    device = batch.images.device
    total = torch.zeros(2, device=device)
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        no_sync: Any = nullcontext() if last else getattr(learner.model, "no_sync", nullcontext)()
        with no_sync:
            with torch.autocast(device.type, learner.amp_dtype, enabled=learner.amp_dtype is not None):
                output: MSRNOutput = learner.model(normalize(micro.images))
            classification = (learner.loss(output.logits, micro.target) * micro.valid).sum() * scale
            groups = learner.group_weight / len(micro_batches) * group_loss(output)
            learner.scaler.scale(classification + groups).backward()
        total += torch.stack([classification, groups]).detach()
    if learner.clip_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        torch.nn.utils.clip_grad_norm_(learner.network.parameters(), learner.clip_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.scheduler.step()
    if learner.ema is not None:
        learner.ema.update_parameters(learner.network)
    return total


def train_one_epoch(
    learner: Learner,
    batches: Iterator[Batch],
    stats: EpochStats,
    plan: TrainPlan,
    schedule: EpochSchedule,
    hooks: EpochHooks,
) -> None:
    """Train an epoch, or the rest of one.

    At each check the ranks agree whether the loss is finite, and report. Checks come every `schedule.log_every` steps, before each save
    and at the end.

    Args:
        learner: what is trained.
        batches: this rank's step batches on the CPU, from step `stats.steps` on.
        stats: the epoch so far; kept up to date.
        plan: how many steps an epoch has, and how many images each step.
        schedule: when to check and when to save within the epoch; the caller saves at its end.
        hooks: what to call, on every rank.

    Raises:
        NonFiniteLossError: on all ranks at the same check, with the first bad step and its images.
    """
    learner.model.train()
    device = learner.device
    window = _Window()
    first_step, start, seconds_before = stats.steps, time.perf_counter(), stats.seconds
    while True:
        wait_start = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - wait_start
        if batch is None:
            break
        if stats.steps == first_step:
            stats.first_batch_seconds = waited
        window.wait += waited
        loss = train_step(learner, to_device(batch, device), plan.step_rows(stats.steps))
        window.losses.append(loss)
        window.rows.append(batch.row[batch.valid])
        hooks.rows_trained(window.rows[-1].numpy())
        stats.steps += 1
        inside = stats.steps < plan.num_steps
        is_save_step = inside and schedule.is_save_step(stats.steps)
        if stats.steps % schedule.log_every == 0 or is_save_step or not inside:
            stats.seconds = seconds_before + time.perf_counter() - start
            is_save_time = _check(window, stats, inside and schedule.is_save_time(), hooks)
            if inside and (is_save_step or is_save_time):
                hooks.save(stats)
                schedule.restart()
            window = _Window()
    assert stats.steps == plan.num_steps, f"an epoch of {plan.num_steps} steps ended after {stats.steps}"
    stats.seconds = seconds_before + time.perf_counter() - start


@dataclass
class _Window:
    """The steps since the last check."""

    losses: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    wait: float = 0.0
    start: float = field(default_factory=time.perf_counter)


def _check(window: _Window, stats: EpochStats, is_save_time: bool, hooks: EpochHooks) -> bool:
    """Check and report the window on all ranks together; only here an epoch waits for the device. Return rank 0's `is_save_time`."""
    losses = torch.stack(window.losses)  # [steps, 2]
    now = time.perf_counter()
    _require_finite(losses, window.rows, stats.steps - len(losses), hooks)
    classification, groups = (losses.double().sum(0) / distributed.world_size()).tolist()
    flag = float(is_save_time and distributed.rank() == 0)
    images, bad = sum(map(len, window.rows)), hooks.count_bad_images()
    local = [classification, groups, images, window.wait, bad, flag]
    sums = distributed.all_reduce(torch.tensor(local, dtype=torch.float64, device=losses.device), "sum")
    classification, groups, images, wait, bad, agreed = sums.tolist()
    seconds = max(now - window.start, 1e-9)
    stats.classification_sum += classification
    stats.group_sum += groups
    stats.images += int(images)
    stats.wait_seconds += wait / distributed.world_size()
    hooks.progress_made(
        Progress(
            step=stats.steps,
            loss=(classification + groups) / len(window.losses),
            images_per_second=images / seconds,
            data_wait_fraction=wait / distributed.world_size() / seconds,
            bad_reports=int(bad),
        )
    )
    return bool(agreed)


def _require_finite(losses: Tensor, rows: list[Tensor], first_step: int, hooks: EpochHooks) -> None:
    """Raise NonFiniteLossError on all ranks if a loss of any rank is not finite; losses: [steps, 2], from `first_step` on."""
    finite = torch.isfinite(losses).all(1)
    steps = torch.arange(len(losses), device=losses.device)
    index = int(distributed.all_reduce(torch.where(finite, len(losses), steps).min(), "min"))
    if index == len(losses):
        return
    bad_rows = [] if bool(finite[index]) else rows[index].tolist()
    all_rows = sorted(row for part in distributed.all_gather(bad_rows) for row in part)
    raise NonFiniteLossError(
        f"the loss is not finite at step {first_step + index} of the epoch, images {', '.join(hooks.image_ids(all_rows))};"
        " lower optim.lr, or check those images and labels"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`; a GPU copies it from pinned memory without waiting."""
    if device.type == "cpu":
        return batch
    return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch))
