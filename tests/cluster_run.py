"""A training run on the made cluster: what its log, its checkpoints and its metrics say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from msrn_ray.runs.checkpoint import MODEL_FILE, load_checkpoint, load_train_state
from msrn_ray.runs.state import RunSummary, summarize

from .made_cluster import NUM_IMAGES, RUNS, TRAIN, WORKERS_START, Cluster, wait

EPOCHS = 6  # of a short run
Report = Callable[[str, float], None]  # prints an event and its seconds


class Epoch(NamedTuple):
    """A line of a run's metrics.jsonl."""

    number: int
    images: int
    bad_images: int
    images_per_second: float
    train_loss: float
    val_loss: float
    val_map: float


@dataclass
class Run:
    """A run, and the job that trains it at present."""

    cluster: Cluster
    name: str
    options: str
    job: str

    @property
    def folder(self) -> Path:
        """The run folder, as this machine sees it."""
        return self.cluster.hosts.shared / "runs" / self.name

    def resume(self) -> None:
        """Submit the same command again."""
        self.job = _submit(self.cluster, self.name, self.options)

    def stop(self) -> None:
        """Stop its job, if it has not ended."""
        if any(job.id == self.job and job.is_active for job in self.cluster.jobs()):
            self.cluster.stop(self.job)

    def log(self) -> str:
        """Return what the job has printed so far."""
        return self.cluster.job_log(self.job)

    def wait_for(self, pattern: str) -> str:
        """Return the job's log as soon as it matches the pattern."""

        def look() -> str | None:
            log = self.log()
            assert "Traceback" not in log, log
            return log if re.search(pattern, log) else None

        return wait(look, lambda: f"{pattern} never came:\n{self.log()}", every=0.2)

    def worker_starts(self) -> list[int]:
        """Return the number of workers at each start of the workers, as the job's log reports them."""
        return [int(workers) for workers in re.findall(WORKERS_START.format(workers=r"(\d)"), self.log())]

    def wait_for_start(self, starts: int, workers: int | None = None) -> None:
        """Wait until workers have started again.

        Args:
            starts: how often workers had started before; these starts do not count.
            workers: their number; None for any.
        """

        def look() -> bool:
            assert "Traceback" not in self.log(), self.log()
            return any(workers in (None, start) for start in self.worker_starts()[starts:])

        wait(look, lambda: f"{workers} workers never started:\n{self.log()}", every=0.2)

    def recovered(self, starts: int, workers: int | None = None) -> float:
        """Return when workers that started again have saved a checkpoint (seconds since 1970); for the arguments see `wait_for_start`."""
        self.wait_for_start(starts, workers)
        return self.wait_for_checkpoint(1, after=time.time())

    def checkpoints(self) -> list[Path]:
        """Return the folders of its checkpoints."""
        return list(self.folder.glob("epoch_*"))

    def checkpoints_within_epochs(self) -> list[Path]:
        """Return those of its checkpoints that are not of an epoch's end."""
        return [folder for folder in self.checkpoints() if "_step_" in folder.name]

    def wait_for_checkpoint(self, epoch: int, after: float = 0.0, within_epoch: bool = False) -> float:
        """Return when the run wrote a checkpoint of the epoch, counted from 1, or of a later one (seconds since 1970).

        Args:
            epoch: the least epoch.
            after: the checkpoint must be newer than this time.
            within_epoch: it must not be of an epoch's end.
        """

        def look() -> float | None:
            for folder in self.checkpoints_within_epochs() if within_epoch else self.checkpoints():
                try:
                    written = folder.stat().st_mtime
                except FileNotFoundError:  # a later checkpoint took its place
                    continue
                if int(folder.name.split("_")[1]) >= epoch and written > after:
                    return written
            return None

        return wait(look, lambda: f"run {self.name} did not get to epoch {epoch}:\n{self.log()}", every=0.05)

    def epochs(self) -> list[Epoch]:
        """Return its epochs so far."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            Epoch(
                line["epoch"],
                line["train/images"],
                line["train/bad_images"],
                line["train/images_per_second"],
                line["train/loss"],
                line["val/loss"],
                line["val/mAP"],
            )
            for line in map(json.loads, lines)
        ]

    def summary(self) -> RunSummary:
        """Return what `msrn runs` lists of it."""
        return summarize(self.folder)

    def assert_finished(self, epochs: int) -> None:
        """Assert that the run ended by itself, and see `assert_whole`."""
        summary = self.summary()
        assert (summary.state, summary.epoch, summary.epochs) == ("finished", epochs, epochs)
        self.assert_whole()

    def assert_whole(self) -> None:
        """Assert that each epoch so far trained on every image once, and that the checkpoints can be read.

        The run itself compares the rows that it trained on with the order of the epoch, and ends where they differ, see `row_ledger`.
        """
        epochs = self.epochs()
        assert [(epoch.number, epoch.images, epoch.bad_images) for epoch in epochs] == [
            (number, NUM_IMAGES, 0) for number in range(1, len(epochs) + 1)
        ]
        kept = self.checkpoints()
        assert kept
        for folder in kept:
            load_train_state(folder)
            if (folder / MODEL_FILE).exists():
                load_checkpoint(folder)

    def assert_same_scores(self, undisturbed: list[Epoch]) -> None:
        """Assert that losses and scores of each epoch are those of an undisturbed run, with any number of workers."""
        for epoch, expected in zip(self.epochs(), undisturbed, strict=False):  # this run may be longer
            assert epoch.train_loss == pytest.approx(expected.train_loss, rel=1e-3), epoch.number
            assert epoch.val_loss == pytest.approx(expected.val_loss, rel=1e-3), epoch.number
            assert epoch.val_map == pytest.approx(expected.val_map, abs=0.02), epoch.number


def submit(cluster: Cluster, name: str, options: str) -> Run:
    """Submit a run as soon as both nodes are up."""
    return Run(cluster, name, options, _submit(cluster, name, options))


def _submit(cluster: Cluster, name: str, options: str) -> str:
    return cluster.submit(name, f"{TRAIN} --train.storage {RUNS} --train.run-name {name} --or-resume {options}")


def short_run(epochs: int = EPOCHS) -> str:
    """Return the options of a run that saves often."""
    return f"--train.epochs {epochs} --train.checkpoint-every '2 steps'"
