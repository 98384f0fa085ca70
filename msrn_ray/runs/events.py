"""The events of a run that workers and Ray Train's controller send to the driver; plain data that imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..training.epoch import Progress


@dataclass(frozen=True)
class WorkersStarted:
    """New workers are about to train, at the start of a run or after a restart.

    Attributes:
        first_epoch: finished epochs.
        first_step: finished steps of the epoch after those.
        epochs: epochs of the whole run.
        steps_per_epoch: optimizer steps of a whole epoch.
        reported: metrics of the epochs whose checkpoints Ray Train holds, as lines of metrics.jsonl.
        description: what is about to be trained, for the user.
    """

    first_epoch: int
    first_step: int
    epochs: int
    steps_per_epoch: int
    reported: tuple[Mapping[str, Any], ...]
    description: str


@dataclass(frozen=True)
class StepsTrained:
    """Progress within an epoch (1-based), since the last such event."""

    epoch: int
    progress: Progress


@dataclass(frozen=True)
class EpochFinished:
    """An epoch is trained, scored and saved.

    Attributes:
        metrics: its numbers and texts by name, with `epoch` (1-based) and `protocol`.
        checkpoint: name of its checkpoint folder.
    """

    metrics: Mapping[str, Any]
    checkpoint: str


@dataclass(frozen=True)
class BadImagesFound:
    """Images of a split that could not be decoded: (uri, reason) of each."""

    split: str
    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class WorkerFailed:
    """A worker failed and Ray Train restarts the workers; `description` is one line for the user."""

    description: str


@dataclass(frozen=True)
class TestScored:
    """The metrics of the test split, `test/name`."""

    __test__ = False  # pytest collects classes of this name otherwise

    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Heartbeat:
    """What one rank is doing.

    Attributes:
        rank: of the worker.
        node, node_id: address and Ray's id of its node.
        pid: its process.
        epoch: 1-based; 0 before the first.
        step: batches taken of the epoch.
        activity: what it is doing.
        idle_seconds: time since it last took or finished something.
        full_folder: Ray's folder on the node if its disk is full, else None.
    """

    rank: int
    node: str
    node_id: str
    pid: int
    epoch: int
    step: int
    activity: str
    idle_seconds: float
    full_folder: str | None

    @property
    def process(self) -> tuple[str, int]:
        """Node and process, which name one worker over all nodes."""
        return self.node_id, self.pid


LoggedEvent = WorkersStarted | StepsTrained | EpochFinished | BadImagesFound | WorkerFailed | TestScored
Event = LoggedEvent | Heartbeat  # heartbeats are the watchdog's
