"""The training step, the epoch and the evaluation: explicit arguments in, plain values out; no Ray, no files.

Shapes: B images of a rank's batch, C labels, n images scored by this rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Progress:
    """What a log interval shows: means over all ranks since the last one; `bad_reports` is the sum of what each rank met."""

    step: int
    loss: float
    images_per_second: float
    data_wait_fraction: float
    bad_reports: int


@dataclass
class EpochStats:
    """One training epoch so far; but for `seconds` and `first_batch_seconds` the same on all ranks at each check.

    Attributes:
        seconds: of this rank, checkpoints included, time between interruption and resumption not.
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


@dataclass
class SavePoints:
    """When an epoch is saved half-way.

    A time is up when rank 0's clock says so: each check sums a few figures over the ranks anyway, and that goes with them, so that ranks
    agree on the step without a message more.

    Attributes:
        save: called on every rank after a check, with the epoch so far.
        steps: save after each so many steps of an epoch, or None.
        seconds: save at the first check so long after the last checkpoint, or None.
        last: when that was (`time.monotonic`).
        is_warned: whether a machine is about to be taken away; asked on every rank at each check, and the same on all. The first check
            that is warned saves.
    """

    save: Callable[[EpochStats], None]
    steps: int | None = None
    seconds: float | None = None
    last: float = field(default_factory=time.monotonic)
    is_warned: Callable[[], bool] = lambda: False
    answered: bool = False

    def is_step(self, steps: int) -> bool:
        """Whether to save after so many steps of the epoch."""
        return self.steps is not None and steps % self.steps == 0

    def is_time(self) -> bool:
        """Whether this rank's time is up, or a machine's."""
        warned = self.is_warned()
        news, self.answered = warned and not self.answered, warned
        return news or (self.seconds is not None and time.monotonic() - self.last >= self.seconds)

    def restart(self) -> None:
        """Starts the clock again; to be called after every checkpoint."""
        self.last = time.monotonic()


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Mixed precision of `dtype` on `device`, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def train_step(learner: Learner, batch: Batch, num_rows: int) -> Tensor:
    """One optimizer step: forward, backward, clip, update, schedule, EMA. Synchronises nothing but the gradients.

    Args:
        learner: what is trained.
        batch: this rank's images of the step, on the model's device.
        num_rows: planned images of the step over all ranks; the loss is the sum over the valid ones divided by this, so a short
            batch weighs what it should (an image that could not be decoded adds nothing, but still counts here).

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
    *,
    num_steps: int,
    step_rows: Callable[[int], int],
    device: torch.device,
    log_every: int,
    save_points: SavePoints,
    on_rows: Callable[[npt.NDArray[np.int64]], None],
    on_progress: Callable[[Progress], None],
    count_bad: Callable[[], int],
    name_rows: Callable[[list[int]], list[str]],
) -> None:
    """Runs an epoch, or what is left of one; every `log_every` steps, at save points and at the end, ranks agree whether the loss is
    finite and report.

    Args:
        learner: what is trained.
        batches: this rank's step batches on the CPU, from step `stats.steps` on.
        stats: the epoch so far; kept up to date.
        num_steps: steps of the whole epoch.
        step_rows: planned images of step s over all ranks.
        device: where the model is.
        log_every: steps between two checks.
        save_points: when to save within the epoch; its end is the caller's.
        on_rows: called after each step with the rows of this rank's images in it, on the CPU.
        on_progress: called on every rank with means over all ranks; may raise, on all ranks alike.
        count_bad: images of this rank that could not be decoded so far.
        name_rows: image ids of row numbers, for the error.

    Raises:
        NonFiniteLossError: on all ranks at the same check, naming the first bad step and the images of it.
    """
    learner.model.train()
    window = _Window()
    first, start, before = stats.steps, time.perf_counter(), stats.seconds
    while True:
        waiting = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - waiting
        if batch is None:
            break
        if stats.steps == first:
            stats.first_batch_seconds = waited
        window.wait += waited
        loss = train_step(learner, to_device(batch, device), step_rows(stats.steps))
        window.add(stats.steps, loss, batch)
        on_rows(window.rows[-1].numpy())
        stats.steps += 1
        inside = stats.steps < num_steps
        save = inside and save_points.is_step(stats.steps)
        if stats.steps % log_every == 0 or save or not inside:
            stats.seconds = before + time.perf_counter() - start
            is_time = _report(window, stats, inside and save_points.is_time(), count_bad(), on_progress, name_rows)
            if inside and (save or is_time):
                save_points.save(stats)
                save_points.restart()
            window = _Window()
    assert stats.steps == num_steps, f"an epoch of {num_steps} steps ended after {stats.steps}"
    stats.seconds = before + time.perf_counter() - start


@dataclass
class _Window:
    """Steps since the last check."""

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


def _report(
    window: _Window,
    stats: EpochStats,
    is_time: bool,
    num_bad: int,
    on_progress: Callable[[Progress], None],
    name_rows: Callable[[list[int]], list[str]],
) -> bool:
    """Checks and reports the window on all ranks together; the one place of an epoch that waits for the device. -> rank 0's `is_time`."""
    losses = torch.stack(window.losses)  # [steps, 2]
    now = time.perf_counter()
    device = losses.device
    finite = torch.isfinite(losses).all(1)
    first_bad = torch.where(finite, torch.inf, torch.tensor(window.steps, dtype=torch.float64, device=device)).min()
    bad_step = distributed.all_reduce(first_bad, "min").item()
    if bad_step != float("inf"):
        index = window.steps.index(int(bad_step))
        own = [] if bool(finite[index]) else window.rows[index].tolist()
        rows = sorted(row for part in distributed.all_gather(own) for row in part)
        raise NonFiniteLossError(
            f"the loss is not finite at step {int(bad_step)} of the epoch, images {', '.join(name_rows(rows))};"
            " lower optim.lr, or look at those images and labels"
        )
    classification, groups = (losses.double().sum(0) / distributed.world_size()).tolist()
    flag = float(is_time and distributed.rank() == 0)
    sums = torch.tensor(
        [classification, groups, window.images, window.wait, num_bad, flag], dtype=torch.float64, device=device
    )
    classification, groups, images, wait, bad, agreed = distributed.all_reduce(sums, "sum").tolist()
    seconds = max(now - window.start, 1e-9)
    stats.classification_sum += classification
    stats.group_sum += groups
    stats.images += int(images)
    stats.wait_seconds += wait / distributed.world_size()
    on_progress(
        Progress(
            stats.steps,
            (classification + groups) / len(window.losses),
            images / seconds,
            wait / distributed.world_size() / seconds,
            int(bad),
        )
    )
    return bool(agreed)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; from pinned memory and without waiting where that is a GPU."""
    if device.type == "cpu":
        return batch
    return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch))


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    chunks = [tensor.tensor_split(min(parts, len(batch.row))) for tensor in batch]
    return [Batch(*micro) for micro in zip(*chunks, strict=True)]
