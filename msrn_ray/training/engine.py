"""The training step and the epoch: explicit arguments in, plain values out; no Ray, no files.

Shapes: B images of a rank's batch, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..datasets.transforms import normalize
from ..errors import NonFiniteLossError
from ..types import Batch, MSRNOutput
from . import distributed
from .learner import Learner
from .losses import group_loss
from .sampling import TrainPlan


@dataclass(frozen=True)
class Progress:
    """Means over all ranks since the last check; `bad_reports` is the sum of the bad images that each rank met.

    Attributes:
        step: finished steps of the epoch.
        loss: classification and group loss.
        images_per_second: over all ranks.
        data_wait_fraction: in [0, 1].
        bad_reports: ranks may have met the same image.
    """

    step: int
    loss: float
    images_per_second: float
    data_wait_fraction: float
    bad_reports: int


@dataclass
class EpochStats:
    """One training epoch so far; the same on all ranks at each check, apart from `seconds` and `first_batch_seconds`.

    Attributes:
        seconds: of this rank, with its checkpoints, without the time between an interruption and the resumption.
        wait_seconds: waiting for batches, mean over ranks.
        first_batch_seconds: of this rank, for the first batch of the epoch or after its last resumption.
        images: trained on, over all ranks.
        classification_sum, group_sum: losses summed over the steps.
        steps: optimizer steps.
    """

    seconds: float = 0.0
    wait_seconds: float = 0.0
    first_batch_seconds: float = 0.0
    images: int = 0
    classification_sum: float = 0.0
    group_sum: float = 0.0
    steps: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the figures of a finished epoch as `train/name`."""
        return {
            "train/loss": (self.classification_sum + self.group_sum) / self.steps,
            "train/classification_loss": self.classification_sum / self.steps,
            "train/group_loss": self.group_sum / self.steps,
            "train/images": self.images,
            "train/images_per_second": self.images / self.seconds,
            "train/data_wait_fraction": self.wait_seconds / self.seconds,
            "train/first_batch_seconds": self.first_batch_seconds,
        }


@dataclass
class EpochSchedule:
    """When the ranks check the loss, and when they save within an epoch.

    Rank 0's clock decides about saves by time. Its decision travels with the sums that each check exchanges anyway, so ranks agree on the
    step without another message.

    Attributes:
        log_every: steps between two checks.
        save_steps: save after each so many steps of an epoch, or None.
        save_seconds: save at the first check so long after the last checkpoint, or None.
        last_save: when that was (`time.monotonic`).
        is_preempted: whether a node is about to be taken away; the same on all ranks. The first check that sees a new preemption saves.
    """

    log_every: int
    save_steps: int | None = None
    save_seconds: float | None = None
    last_save: float = field(default_factory=time.monotonic)
    is_preempted: Callable[[], bool] = lambda: False
    _was_preempted: bool = False

    def is_save_step(self, steps: int) -> bool:
        """Return whether to save after so many steps of the epoch."""
        return self.save_steps is not None and steps % self.save_steps == 0

    def is_save_time(self) -> bool:
        """Return whether this rank's clock asks for a save, or a new preemption does."""
        preempted = self.is_preempted()
        is_new, self._was_preempted = preempted and not self._was_preempted, preempted
        return is_new or (self.save_seconds is not None and time.monotonic() - self.last_save >= self.save_seconds)

    def restart(self) -> None:
        """Restart the clock; every checkpoint calls this."""
        self.last_save = time.monotonic()


class EpochHooks(Protocol):
    """What an epoch calls on every rank."""

    def rows_trained(self, rows: npt.NDArray[np.int64]) -> None:
        """Take the rows of this rank's images after each step."""

    def progress_made(self, progress: Progress) -> None:
        """Take the means over all ranks at each check; may raise, on all ranks at the same check."""

    def save(self, stats: EpochStats) -> None:
        """Save within the epoch, right after a check."""

    def count_bad_images(self) -> int:
        """Return how many images this rank could not decode so far."""

    def image_ids(self, rows: list[int]) -> list[str]:
        """Return the image ids of rows, for an error message."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return mixed precision of `dtype` on `device`, or a context that does nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


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
    micro_batches = _split(batch, learner.accumulation)
    scale = distributed.world_size() / num_rows  # DistributedDataParallel takes the mean over ranks
    total = torch.zeros(2, device=batch.images.device)
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        no_sync: Any = nullcontext() if last else getattr(learner.model, "no_sync", nullcontext)()
        with no_sync:
            with autocast(batch.images.device, learner.amp_dtype):
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
        window.add(stats.steps, loss, batch)
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

    steps: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    wait: float = 0.0
    images: int = 0
    start: float = field(default_factory=time.perf_counter)

    def add(self, step: int, loss: Tensor, batch: Batch) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.rows.append(batch.row[batch.valid])
        self.images += len(self.rows[-1])


def _check(window: _Window, stats: EpochStats, is_save_time: bool, hooks: EpochHooks) -> bool:
    """Check and report the window on all ranks together; only here an epoch waits for the device. Return rank 0's `is_save_time`."""
    losses = torch.stack(window.losses)  # [steps, 2]
    now = time.perf_counter()
    _require_finite(window, losses, hooks)
    classification, groups = (losses.double().sum(0) / distributed.world_size()).tolist()
    flag = float(is_save_time and distributed.rank() == 0)
    num_bad = hooks.count_bad_images()
    sums = torch.tensor(
        [classification, groups, window.images, window.wait, num_bad, flag], dtype=torch.float64, device=losses.device
    )
    classification, groups, images, wait, bad, agreed = distributed.all_reduce(sums, "sum").tolist()
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


def _require_finite(window: _Window, losses: Tensor, hooks: EpochHooks) -> None:
    """Raise NonFiniteLossError on all ranks if a loss of any rank is not finite; losses: [steps, 2]."""
    finite = torch.isfinite(losses).all(1)
    steps = torch.tensor(window.steps, dtype=torch.float64, device=losses.device)
    bad_step = distributed.all_reduce(torch.where(finite, torch.inf, steps).min(), "min").item()
    if bad_step == float("inf"):
        return
    index = window.steps.index(int(bad_step))
    rows = [] if bool(finite[index]) else window.rows[index].tolist()
    all_rows = sorted(row for part in distributed.all_gather(rows) for row in part)
    raise NonFiniteLossError(
        f"the loss is not finite at step {int(bad_step)} of the epoch, images {', '.join(hooks.image_ids(all_rows))};"
        " lower optim.lr, or check those images and labels"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`; a GPU copies it from pinned memory without waiting."""
    if device.type == "cpu":
        return batch
    return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch))


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    chunks = [tensor.tensor_split(min(parts, len(batch.row))) for tensor in batch]
    return [Batch(*micro) for micro in zip(*chunks, strict=True)]
