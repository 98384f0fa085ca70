"""What a person sees of a run: progress on the terminal, and the files of the run folder.

Workers send plain events; this runs in the driver, the one writer of the run folder:
`metrics.jsonl`, `tensorboard/`, `curves.png`, `bad_images.csv`, `best.txt`.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..training.bad_images import RECALLED
from .checkpoint import BEST_FILE
from .curves import draw_curves
from .history import METRICS_FILE, read_history, to_json, write_history

CURVES_FILE, BAD_FILE = "curves.png", "bad_images.csv"
_PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal
_CURVES_SECONDS = 30.0  # between two drawings of the curves
Event = Mapping[str, Any]


class RunLog:
    """Handles the events of one run.

    Args:
        folder: the run folder; must exist.
        console: where lines go; standard output by default.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 2 s of import that nothing else needs

        self.folder = folder
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.history = read_history(folder / METRICS_FILE)
        self.best: tuple[float, str] | None = None
        self.test: dict[str, float] = {}
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self._bar: Progress | None = None
        self._start = self._last_line = self._last_curves = time.monotonic()
        self._total = self._first = self._per_epoch = 0
        self._epochs = 0

    def handle(self, event: Event) -> None:
        """Shows and writes one event; `kind` is start, progress, epoch, bad, failure or test."""
        getattr(self, f"_on_{event['kind']}")(event)

    def say(self, line: str) -> None:
        """One line for the user, above the progress bar."""
        (self._bar.console if self._bar else self.console).print(line, markup=False)

    def close(self) -> None:
        """Ends the progress line, draws the curves a last time."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._tensorboard.close()
        if self.history:
            draw_curves(self.history, self.folder / CURVES_FILE)

    def _on_start(self, event: Event) -> None:
        """Also after a resume: epochs after the checkpoint that the run goes on from are forgotten, and epochs that Ray Train has a
        checkpoint of but whose line a kill cut off are taken up."""
        first = event["first_epoch"]
        self._per_epoch, self._epochs = event["steps_per_epoch"], event["epochs"]
        self._first, self._total = first * self._per_epoch + event["first_step"], self._epochs * self._per_epoch
        self._start = time.monotonic()
        self.history = [line for line in self.history if line["epoch"] <= first]
        known = {line["epoch"] for line in self.history}
        self.history += [line for line in event["reported"] if line["epoch"] not in known]
        self.history.sort(key=lambda line: line["epoch"])
        write_history(self.folder / METRICS_FILE, self.history)
        self.best = None
        (self.folder / BEST_FILE).unlink(missing_ok=True)
        for line in self.history:
            self._note_best(line, line["checkpoint"])
        self.say(event["text"])
        if self.console.is_terminal and not self._bar:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(
                "starting", total=self._total, completed=self._first, text="waiting for the first images"
            )
            self._bar.start()

    def _on_progress(self, event: Event) -> None:
        done = (event["epoch"] - 1) * self._per_epoch + event["step"]
        elapsed = time.monotonic() - self._start
        eta = elapsed / max(1, done - self._first) * (self._total - done)
        bad = f"  {event['bad_reports']} bad" if event["bad_reports"] else ""
        text = (
            f"step {event['step']}/{self._per_epoch}  loss {event['loss']:.4f}  {event['images_per_second']:.1f} img/s"
            f"  data wait {event['data_wait_fraction']:.0%}{bad}  ETA {_clock(eta)}"
        )
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], description=f"epoch {event['epoch']}/{self._epochs}", completed=done, text=text
            )
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"epoch {event['epoch']}/{self._epochs}  {text}")

    def _on_epoch(self, event: Event) -> None:
        metrics: dict[str, Any] = {**event["metrics"], "checkpoint": event["checkpoint"]}
        self.history.append(metrics)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, metrics["epoch"])
        self._tensorboard.flush()
        improved = self._note_best(metrics, event["checkpoint"])
        paper = metrics["protocol"] == "paper"
        self._last_line = time.monotonic()
        self.say(
            f"epoch {metrics['epoch']}/{self._epochs}  train/loss {metrics['train/loss']:.4f}  val/loss {metrics['val/loss']:.4f}"
            f"  val/mAP {metrics['val/mAP']:.4f}{' *' if improved else ''}{' (val is the test split)' if paper else ''}"
            f"  {metrics['train/images_per_second']:.1f} img/s  data wait {metrics['train/data_wait_fraction']:.0%}"
        )
        if time.monotonic() - self._last_curves > _CURVES_SECONDS:
            draw_curves(self.history, self.folder / CURVES_FILE)
            self._last_curves = time.monotonic()

    def _note_best(self, metrics: Mapping[str, Any], checkpoint: str) -> bool:
        if math.isnan(metrics["val/mAP"]) or (self.best is not None and metrics["val/mAP"] < self.best[0]):
            return False  # the later of equals is kept: Ray Train deletes the earlier one's checkpoint
        self.best = (metrics["val/mAP"], checkpoint)
        partial = self.folder / f".{BEST_FILE}"
        partial.write_text(checkpoint + "\n", encoding="utf-8")
        os.replace(partial, self.folder / BEST_FILE)
        return True

    def _on_bad(self, event: Event) -> None:
        path = self.folder / BAD_FILE
        rows = [["split", "uri", "reason"]]
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
        known = {(row[0], row[1]): row for row in rows}  # a resumed run meets the same files again
        fresh = []
        for uri, reason in event["images"]:
            row = known.get((event["split"], uri))
            if row is None:
                fresh.append([event["split"], uri, reason])
            elif row[2] == RECALLED:
                row[2] = reason
        partial = path.with_name(f".{path.name}")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*rows, *fresh])
        os.replace(partial, path)
        if fresh:
            self.say(f"{event['split']}: {len(fresh)} images could not be decoded and are left out, see {path}")

    def _on_failure(self, event: Event) -> None:
        self.say(event["text"])

    def _on_test(self, event: Event) -> None:
        self.test = dict(event["metrics"])
        (self.folder / "test.json").write_text(to_json(self.test, indent=2) + "\n", encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
