"""An epoch in progress: its statistics, when it is checked and saved, and what it calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Progress:
    """Training since the last check, over all ranks.

    Attributes:
        step: finished steps of the epoch.
        loss: classification and group loss, mean over ranks.
        images_per_second: over all ranks.
        data_wait_fraction: part of the time that a rank waited for images, in [0, 1], mean over ranks.
        bad_reports: bad images, summed over the ranks; ranks may have met the same image.
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
