"""What a run logs: terminal lines and the files of the run folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from msrn_ray.runs import log as run_log
from msrn_ray.runs.events import BadImagesFound, EpochFinished, StepsTrained, TestScored, WorkerFailed, WorkersStarted
from msrn_ray.runs.history import draw_curves
from msrn_ray.runs.log import RunLog
from msrn_ray.training.bad_images import RECALLED
from msrn_ray.training.epoch import Progress


class Clock:
    """Time that moves only when a test sets it."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(tmp_path: Path, screen: io.StringIO, clock: Clock) -> Iterator[RunLog]:
    log = open_log(tmp_path, screen)
    yield log
    log.close()


def open_log(folder: Path, screen: io.StringIO) -> RunLog:
    return RunLog(folder, Console(file=screen, width=200, highlight=False, soft_wrap=True))


def workers_started(first_epoch: int = 0, epochs: int = 5) -> WorkersStarted:
    description = f"training from epoch {first_epoch} [not a markup]"
    return WorkersStarted(first_epoch, 0, epochs, 10, (), description)


def epoch_finished(number: int, mean: float, loss: float = 0.5) -> EpochFinished:
    metrics = {
        "epoch": number,
        "protocol": "honest",
        "train/loss": loss,
        "train/classification_loss": loss,
        "train/images_per_second": 12.34,
        "train/data_wait_fraction": 0.25,
        "val/loss": loss + 0.1,
        "val/mAP": mean,
        "val/CF1": 0.3,
        "val/OF1": 0.4,
    }
    return EpochFinished(metrics, f"checkpoint_{number}")


def steps_trained(number: int, step: int, bad_reports: int = 0) -> StepsTrained:
    return StepsTrained(number, Progress(step, 0.75, 12.34, 0.25, bad_reports))


def read_history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def best_checkpoint(folder: Path) -> str:
    return (folder / "best.txt").read_text()


def test_run_logs_every_epoch_and_the_test(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(workers_started())
    for number, mean in enumerate((0.2, 0.6, 0.4, 0.6, 0.7), 1):
        event = epoch_finished(number, mean)
        log.handle(event)
        assert read_history(tmp_path)[-1] == event.metrics | {"checkpoint": f"checkpoint_{number}"}
        assert len(read_history(tmp_path)) == number
        assert best_checkpoint(tmp_path) == f"checkpoint_{(1, 2, 2, 4, 5)[number - 1]}\n", (
            "of equal epochs the last, which Ray Train keeps"
        )
    log.handle(TestScored({"test/mAP": 0.65}))
    assert log.test == json.loads((tmp_path / "test.json").read_text()) == {"test/mAP": 0.65}
    log.close()
    lines = screen.getvalue().splitlines()
    assert lines[0] == "training from epoch 0 [not a markup]"
    assert lines[2] == ("epoch 2/5  train/loss 0.5000  val/loss 0.6000  val/mAP 0.6000 *  12.3 img/s  data wait 25%")
    assert [line.count(" *") for line in lines[1:]] == [1, 1, 0, 1, 1]
    assert len(lines) == 6
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    expected_files = {"metrics.jsonl", "best.txt", "test.json", "curves.png", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == expected_files, "no partial file remains"


def test_tensorboard_holds_the_metrics(tmp_path: Path, log: RunLog) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log.handle(workers_started())
    log.handle(epoch_finished(1, 0.2))
    log.handle(epoch_finished(2, 0.6))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"val/mAP", "train/loss", "train/images_per_second"} <= set(events.Tags()["scalars"])
    assert [(point.step, round(point.value, 4)) for point in events.Scalars("val/mAP")] == [(1, 0.2), (2, 0.6)]


def test_curves_are_drawn_at_intervals_and_at_close(tmp_path: Path, log: RunLog, clock: Clock) -> None:
    log.handle(workers_started())
    log.handle(epoch_finished(1, 0.2))
    assert not (tmp_path / "curves.png").exists(), "not at every epoch: drawing takes time"
    clock.seconds += 31
    log.handle(epoch_finished(2, 0.3))
    assert (tmp_path / "curves.png").exists()
    (tmp_path / "curves.png").unlink()
    clock.seconds += 5
    log.handle(epoch_finished(3, 0.3))
    assert not (tmp_path / "curves.png").exists()
    log.close()
    assert (tmp_path / "curves.png").exists()


def test_worker_failure_is_printed(log: RunLog, screen: io.StringIO) -> None:
    log.handle(WorkerFailed("worker 1 failed: [killed]"))
    assert screen.getvalue().splitlines() == ["worker 1 failed: [killed]"]


def test_bar_resumes_within_an_epoch(tmp_path: Path, log: RunLog, screen: io.StringIO, clock: Clock) -> None:
    """The run resumes after 2 epochs of 10 steps and 5 steps. A step takes 20 s, so the remaining 24 need 8 minutes."""
    log.handle(replace(workers_started(2), first_step=5))
    clock.seconds += 20
    log.handle(steps_trained(3, 6))
    assert "epoch 3/5  step 6/10" in screen.getvalue()
    assert "ETA 8:00" in screen.getvalue()


def test_resume_drops_epochs_after_the_checkpoint(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(workers_started())
    for number, mean in enumerate((0.3, 0.2, 0.9), 1):
        log.handle(epoch_finished(number, mean))
    log.close()
    assert best_checkpoint(tmp_path) == "checkpoint_3\n"

    resumed = open_log(tmp_path, screen)
    resumed.handle(workers_started(first_epoch=2))
    assert [line["epoch"] for line in read_history(tmp_path)] == [1, 2]
    assert best_checkpoint(tmp_path) == "checkpoint_1\n"
    resumed.handle(epoch_finished(3, 0.25))
    assert [line["epoch"] for line in read_history(tmp_path)] == [1, 2, 3]
    assert best_checkpoint(tmp_path) == "checkpoint_1\n"
    resumed.handle(epoch_finished(4, 0.31))
    assert best_checkpoint(tmp_path) == "checkpoint_4\n"
    resumed.handle(workers_started(first_epoch=1))  # Ray Train restarts the workers after it lost a worker
    assert [line["epoch"] for line in read_history(tmp_path)] == [1]
    assert best_checkpoint(tmp_path) == "checkpoint_1\n"
    resumed.close()


def test_restart_from_scratch_removes_the_old_best(tmp_path: Path, log: RunLog) -> None:
    log.handle(workers_started())
    log.handle(epoch_finished(1, 0.9))
    log.handle(workers_started(first_epoch=0))
    assert read_history(tmp_path) == []
    assert not (tmp_path / "best.txt").exists(), "it would name a checkpoint of the old run"
    log.handle(epoch_finished(1, 0.1))
    assert best_checkpoint(tmp_path) == "checkpoint_1\n"


def test_line_cut_by_a_kill_is_dropped(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(workers_started())
    log.handle(epoch_finished(1, 0.3))
    log.handle(epoch_finished(2, 0.5))
    text = (tmp_path / "metrics.jsonl").read_text()
    for cut in (text[:-10], text[: len(text) * 3 // 5]):
        (tmp_path / "metrics.jsonl").write_text(cut)
        resumed = open_log(tmp_path, screen)
        assert [line["epoch"] for line in resumed.history] == [1]
        resumed.handle(workers_started(first_epoch=1))
        resumed.handle(epoch_finished(2, 0.4))
        assert [line["epoch"] for line in read_history(tmp_path)] == [1, 2], (
            "the next line does not continue the cut line"
        )
        resumed.close()


def test_progress_lines_are_rare_epochs_always_shown(log: RunLog, screen: io.StringIO, clock: Clock) -> None:
    log.handle(workers_started())
    shown: list[str] = []

    def new_lines() -> list[str]:
        lines = screen.getvalue().splitlines()
        fresh = lines[len(shown) :]
        shown.extend(fresh)
        return fresh

    new_lines()
    for step in (1, 2):
        clock.seconds += 4
        log.handle(steps_trained(1, step))
    assert new_lines() == []
    clock.seconds += 12
    log.handle(steps_trained(1, 5))
    assert new_lines() == ["epoch 1/5  step 5/10  loss 0.7500  12.3 img/s  data wait 25%  ETA 3:00"]
    clock.seconds += 5
    log.handle(steps_trained(1, 6))
    assert new_lines() == []
    clock.seconds += 7
    log.handle(steps_trained(1, 7, bad_reports=3))
    assert "data wait 25%  3 bad  ETA" in new_lines()[0]
    log.handle(epoch_finished(1, 0.5))
    log.handle(epoch_finished(2, 0.5))
    assert len(new_lines()) == 2
    clock.seconds += 9
    log.handle(steps_trained(3, 1))
    assert new_lines() == [], "the line of an epoch counts as a progress line"


def test_eta_counts_only_steps_since_the_resume(log: RunLog, screen: io.StringIO, clock: Clock) -> None:
    log.handle(workers_started(first_epoch=4))
    clock.seconds += 3600
    log.handle(steps_trained(5, 5))
    assert screen.getvalue().rstrip().endswith("ETA 1:00:00")


def test_bad_images_are_listed(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(BadImagesFound("train", (("/a, b.jpg", 'cut "off"'), ("/c\nd.jpg", "empty"))))
    log.handle(BadImagesFound("val", (("/ü.jpg", "too large"),)))
    with (tmp_path / "bad_images.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["split", "uri", "reason"],
            ["train", "/a, b.jpg", 'cut "off"'],
            ["train", "/c\nd.jpg", "empty"],
            ["val", "/ü.jpg", "too large"],
        ]
    assert "train: 2 images could not be decoded and are left out" in screen.getvalue()
    assert str(tmp_path / "bad_images.csv") in screen.getvalue()


def test_nan_is_logged_and_never_best(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(workers_started())
    log.handle(epoch_finished(1, math.nan, loss=math.nan))
    log.handle(epoch_finished(2, 0.3))
    assert best_checkpoint(tmp_path) == "checkpoint_2\n"
    log.handle(epoch_finished(3, math.nan))
    assert best_checkpoint(tmp_path) == "checkpoint_2\n"
    log.handle(epoch_finished(4, 0.2))
    assert best_checkpoint(tmp_path) == "checkpoint_2\n"
    assert [line["val/mAP"] is None for line in read_history(tmp_path)] == [True, False, True, False]
    log.close()
    resumed = open_log(tmp_path, screen)
    resumed.handle(workers_started(first_epoch=4))
    assert [line["epoch"] for line in resumed.history] == [1, 2, 3, 4]
    assert best_checkpoint(tmp_path) == "checkpoint_2\n"
    resumed.close()


def test_last_epoch_is_best_without_any_score(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    log.handle(workers_started())
    for number in (1, 2):
        log.handle(epoch_finished(number, math.nan))
        assert best_checkpoint(tmp_path) == f"checkpoint_{number}\n"
    assert "nan *" not in screen.getvalue()


def test_curves_title_names_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, label, **_: titles.append(label))
    lines = [dict(epoch_finished(number, mean).metrics) for number, mean in enumerate((math.nan, 0.3, 0.2), 1)]
    draw_curves(lines, tmp_path / "curves.png")
    assert "best val/mAP 0.3000 at epoch 2" in titles


def test_close_works_twice_and_without_an_epoch(tmp_path: Path, log: RunLog) -> None:
    log.close()
    log.close()
    assert not (tmp_path / "curves.png").exists()


def test_bar_leaves_terminal_lines_whole(tmp_path: Path, clock: Clock) -> None:
    screen = io.StringIO()
    log = RunLog(tmp_path, Console(file=screen, force_terminal=True, width=200, highlight=False, soft_wrap=True))
    log.handle(workers_started())
    log.handle(steps_trained(1, 5))
    log.handle(epoch_finished(1, 0.5))
    log.close()
    text = screen.getvalue()
    assert "training from epoch 0 [not a markup]" in text
    assert "val/mAP 0.5000 *" in text


def test_epoch_only_ray_train_knows_is_logged(tmp_path: Path, log: RunLog) -> None:
    """A kill between the checkpoint and its line in metrics.jsonl loses no metric and leaves best.txt valid."""
    log.handle(workers_started())
    log.handle(epoch_finished(1, 0.4))
    unwritten = dict(epoch_finished(2, 0.6).metrics) | {"checkpoint": "checkpoint_2"}
    resumed = RunLog(tmp_path, Console(file=io.StringIO()))
    resumed.handle(replace(workers_started(2), reported=(unwritten,)))
    assert [line["epoch"] for line in read_history(tmp_path)] == [1, 2]
    assert best_checkpoint(tmp_path) == "checkpoint_2\n"
    resumed.close()


def test_bad_image_gets_its_reason_once_known(tmp_path: Path, log: RunLog, screen: io.StringIO) -> None:
    for reason in (RECALLED, "empty", "cut"):
        log.handle(BadImagesFound("train", (("a.jpg", reason),)))
    assert (tmp_path / "bad_images.csv").read_text().splitlines() == ["split,uri,reason", "train,a.jpg,empty"]
    assert screen.getvalue().count("could not be decoded and are left out") == 1


def test_bad_image_is_listed_once(tmp_path: Path, log: RunLog) -> None:
    for images in ((("a.jpg", "empty"),), (("a.jpg", "empty"), ("b.jpg", "cut"))):
        log.handle(BadImagesFound("train", images))
    log.handle(BadImagesFound("val", (("a.jpg", "empty"),)))
    rows = (tmp_path / "bad_images.csv").read_text().splitlines()
    assert rows == ["split,uri,reason", "train,a.jpg,empty", "train,b.jpg,cut", "val,a.jpg,empty"]


def test_paper_protocol_is_named_in_log_and_curves(
    tmp_path: Path, log: RunLog, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, label, **_: titles.append(label))
    log.handle(workers_started())
    log.handle(replace(epoch_finished(1, 0.4), metrics={**epoch_finished(1, 0.4).metrics, "protocol": "paper"}))
    log.close()
    assert "val is the test split" in screen.getvalue()
    assert any("on the test split (protocol paper)" in title for title in titles)
