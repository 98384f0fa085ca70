"""What a person sees of a run: progress on the terminal, and the files of the run folder.

Workers send events; the driver, the only writer of the run folder, handles them here:
`metrics.jsonl`, `tensorboard/`, `curves.png`, `bad_images.csv`, `best.txt`, `test.json`.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, assert_never

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from ..io.files import atomic_write, write_text
from ..training.bad_images import RECALLED
from .checkpoint import BEST_FILE
from .events import BadImagesFound, EpochFinished, LoggedEvent, StepsTrained, TestScored, WorkerFailed, WorkersStarted
from .history import METRICS_FILE, best_index, draw_curves, read_history, to_json

CURVES_FILE, BAD_FILE, TEST_FILE = "curves.png", "bad_images.csv", "test.json"
_PLAIN_SECONDS = 10.0  # between two progress lines without a terminal
_CURVES_SECONDS = 30.0  # between two drawings of the curves


class RunLog:
    """Handles the events of one run.

    Args:
        folder: the run folder; must exist.
        console: where lines go; standard output by default.

    Attributes:
        history: metrics of the finished epochs, as lines of metrics.jsonl.
        test: metrics of the test split, once scored.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 2 s to import, and nothing else needs it

        self.folder = folder
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.history = read_history(folder / METRICS_FILE)
        self.test: dict[str, float] = {}
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self._bar: Progress | None = None
        self._start_time = self._last_line = self._last_curves = time.monotonic()
        self._total_steps = self._first_step = self._steps_per_epoch = self._epochs = 0

    def handle(self, event: LoggedEvent) -> None:
        """Show and write one event."""
        match event:
            case WorkersStarted():
                self._start(event)
            case StepsTrained():
                self._show_progress(event)
            case EpochFinished():
                self._add_epoch(event)
            case BadImagesFound():
                self._list_bad_images(event)
            case WorkerFailed():
                self.say(event.description)
            case TestScored():
                self.test = dict(event.metrics)
                write_text(self.folder / TEST_FILE, to_json(self.test, indent=2) + "\n")
            case _:
                assert_never(event)

    def say(self, line: str) -> None:
        """Print one line for the user, above the progress bar."""
        self.console.print(line, markup=False)  # the bar has the same console

    def close(self) -> None:
        """End the progress line and draw the curves a last time."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._tensorboard.close()
        if self.history:
            draw_curves(self.history, self.folder / CURVES_FILE)

    def _start(self, event: WorkersStarted) -> None:
        """Align the history with the checkpoint that the workers start from.

        Drops epochs after that checkpoint. Adds epochs whose checkpoint Ray Train holds, but whose line a kill cut off.
        """
        self._steps_per_epoch, self._epochs = event.steps_per_epoch, event.epochs
        self._first_step = event.first_epoch * self._steps_per_epoch + event.first_step
        self._total_steps = self._epochs * self._steps_per_epoch
        self._start_time = time.monotonic()
        self.history = [line for line in self.history if line["epoch"] <= event.first_epoch]
        known = {line["epoch"] for line in self.history}
        self.history += [dict(line) for line in event.reported if line["epoch"] not in known]
        self.history.sort(key=lambda line: line["epoch"])
        write_text(self.folder / METRICS_FILE, "".join(to_json(line) + "\n" for line in self.history))
        (self.folder / BEST_FILE).unlink(missing_ok=True)
        self._write_best()
        self.say(event.description)
        if self.console.is_terminal and not self._bar:
            columns = "{task.description}", BarColumn(), "{task.fields[text]}", TimeElapsedColumn()
            self._bar = Progress(*columns, console=self.console, transient=True)
            text = "waiting for the first images"
            self._bar.add_task("starting", total=self._total_steps, completed=self._first_step, text=text)
            self._bar.start()

    def _show_progress(self, event: StepsTrained) -> None:
        progress = event.progress
        done = (event.epoch - 1) * self._steps_per_epoch + progress.step
        elapsed = time.monotonic() - self._start_time
        remaining = elapsed / max(1, done - self._first_step) * (self._total_steps - done)
        bad = f"  {progress.bad_reports} bad" if progress.bad_reports else ""
        text = (
            f"step {progress.step}/{self._steps_per_epoch}  loss {progress.loss:.4f}  {progress.images_per_second:.1f} img/s"
            f"  data wait {progress.data_wait_fraction:.0%}{bad}  ETA {_clock(remaining)}"
        )
        title = f"epoch {event.epoch}/{self._epochs}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=title, completed=done, text=text)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{title}  {text}")

    def _add_epoch(self, event: EpochFinished) -> None:
        metrics: dict[str, Any] = {**event.metrics, "checkpoint": event.checkpoint}
        self.history.append(metrics)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, metrics["epoch"])
        self._tensorboard.flush()
        mark = " *" if self._write_best() is metrics else ""
        note = " (val is the test split)" if metrics["protocol"] == "paper" else ""
        self._last_line = time.monotonic()
        self.say(
            f"epoch {metrics['epoch']}/{self._epochs}  train/loss {metrics['train/loss']:.4f}  val/loss {metrics['val/loss']:.4f}"
            f"  val/mAP {metrics['val/mAP']:.4f}{mark}{note}"
            f"  {metrics['train/images_per_second']:.1f} img/s  data wait {metrics['train/data_wait_fraction']:.0%}"
        )
        if time.monotonic() - self._last_curves > _CURVES_SECONDS:
            draw_curves(self.history, self.folder / CURVES_FILE)
            self._last_curves = time.monotonic()

    def _write_best(self) -> dict[str, Any] | None:
        """Write the checkpoint's name of the best epoch so far, and return that epoch; None if no epoch has a score.

        Without a score the last epoch counts as the best, as in Ray Train: a val split may hold no label that mAP can score.
        """
        if not self.history:
            return None
        best = self.history[best_index([line["val/mAP"] for line in self.history])]
        write_text(self.folder / BEST_FILE, best["checkpoint"] + "\n")
        return None if math.isnan(best["val/mAP"]) else best

    def _list_bad_images(self, event: BadImagesFound) -> None:
        path = self.folder / BAD_FILE
        rows = [["split", "uri", "reason"]]
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
        known = {(row[0], row[1]): row for row in rows}  # a resumed run meets the same files again
        new = []
        for uri, reason in event.images:
            row = known.get((event.split, uri))
            if row is None:
                new.append([event.split, uri, reason])
            elif row[2] == RECALLED:
                row[2] = reason
        with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*rows, *new])
        if new:
            self.say(f"{event.split}: {len(new)} images could not be decoded and are left out, see {path}")


def read_test(folder: Path) -> dict[str, float]:
    """Return the metrics of a run's test split, null as nan; {} if it was not scored."""
    path = folder / TEST_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: math.nan if value is None else value for name, value in content.items()}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
