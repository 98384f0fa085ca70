"""A training run that records which rows each rank trained on, step by step, and can kill one of its ranks.

`python -m tests.recorded_run CONFIG FOLDER` trains with a saved config, as `msrn train --config` does.
It writes its record into the folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Place = tuple[int, int]  # epoch and step, 0-based


class Kill(NamedTuple):
    """The rank that kills itself once, and the step after which it does."""

    rank: int
    place: Place


def recording(folder: Path, kill: Kill | None = None) -> Callable[[dict[str, Any]], None]:
    """Return a train loop that appends a line to a file of its process, per step that changes the weights and per loss."""

    def loop(loop_config: dict[str, Any]) -> None:
        from msrn_ray.ray_train import worker
        from msrn_ray.training import distributed
        from msrn_ray.training.epoch import Progress
        from msrn_ray.training.row_ledger import Account, Ledger
        from msrn_ray.training.sampling import Rows, TrainPlan

        attempt = distributed.all_gather(time.time_ns())[0]
        file = (folder / f"{attempt}_{distributed.rank()}.jsonl").open("a", buffering=1)

        def write(**line: Any) -> None:
            file.write(json.dumps({"attempt": attempt, **line}) + "\n")

        class RecordingLedger(Ledger):
            def __init__(self, plan: TrainPlan, epoch: int, done_before: Account) -> None:
                super().__init__(plan, epoch, done_before)
                self.place = (epoch, plan.first_step if epoch == plan.first_epoch else 0)
                write(start=self.place, world=plan.world_size)

            def add(self, rows: Rows) -> None:
                super().add(rows)
                write(place=self.place, rows=rows.tolist())
                kill_marker = folder / "killed"
                if kill == (distributed.rank(), self.place) and not kill_marker.exists():
                    kill_marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                self.place = (self.place[0], self.place[1] + 1)

        class RecordingWorker(worker.Worker):
            def progress_made(self, progress: Progress) -> None:
                super().progress_made(progress)
                if self.plan.rank == 0:
                    write(loss=progress.loss, step=[self.epoch, progress.step - 1])

        worker.Ledger = RecordingLedger  # type: ignore[misc]  # only in this process
        worker.train_worker(loop_config, RecordingWorker)

    return loop


class Record(NamedTuple):
    """The record of a run.

    Attributes:
        rows: the rows per epoch, over all ranks, without steps that were rolled back.
        repeated: the places of the steps that were rolled back.
        losses: the loss over all ranks per place, if `train.log_every` is 1.
        starts: the place at which every start of the workers resumed the run, and the number of workers.
    """

    rows: dict[int, list[int]]
    repeated: set[Place]
    losses: dict[Place, float]
    starts: list[tuple[Place, int]]


def read_record(folder: Path) -> Record:
    """Read the record of a run. A step is rolled back if a later start of the workers resumes the run before it."""
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    starts: dict[int, tuple[Place, int]] = {}
    for line in lines:
        if "start" in line:
            starts.setdefault(line["attempt"], (tuple(line["start"]), line["world"]))
    rows: dict[int, list[int]] = {}
    repeated, losses = set(), {}
    for line in lines:
        place = tuple(line.get("place") or line.get("step") or ())
        if not place:
            continue
        if any(attempt > line["attempt"] and start <= place for attempt, (start, _) in starts.items()):
            repeated.add(place)
        elif "rows" in line:
            rows.setdefault(place[0], []).extend(line["rows"])
        else:
            losses[place] = line["loss"]
    return Record(rows, repeated, losses, [starts[attempt] for attempt in sorted(starts)])


def main() -> None:
    """Train and record, see above."""
    from msrn_ray.config import load_config
    from msrn_ray.ray_train import driver

    driver.train_worker = recording(Path(sys.argv[2]))  # type: ignore[assignment]  # only in this process
    driver.train(load_config(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
