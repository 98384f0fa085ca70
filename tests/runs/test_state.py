"""The state of a run in its folder, during the run and after it, however it ended. No Ray."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.runs import state as run_state
from msrn_ray.runs.folder import CONFIG_FILE, FAILURE_FILE
from msrn_ray.runs.history import METRICS_FILE
from msrn_ray.runs.state import (
    STATE_FILE,
    RunSummary,
    check_stopped,
    describe_runs,
    is_complete,
    kept_state,
    list_runs,
    summarize,
)

ROOT = Path(__file__).resolve().parents[2]


def make_run(folder: Path, scores: tuple[float | None, ...] = (), epochs: int = 3) -> Path:
    folder.mkdir(parents=True)
    ExperimentConfig().with_overrides({"train.epochs": epochs}).save(folder / CONFIG_FILE)
    lines = [json.dumps({"epoch": epoch, "val/mAP": score}) + "\n" for epoch, score in enumerate(scores, 1)]
    (folder / METRICS_FILE).write_text("".join(lines))
    return folder


def set_last_heartbeat(folder: Path, seconds: float) -> None:
    last_heartbeat = time.time() - seconds
    os.utime(folder / STATE_FILE, (last_heartbeat, last_heartbeat))


def read_state(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / STATE_FILE).read_text())
    return content


def test_run_is_running_while_its_driver_sends_heartbeats(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (0.25, 0.5, None), epochs=4)
    with kept_state(run, heartbeat_seconds=0.02):
        set_last_heartbeat(run, 1000)  # the next heartbeat renews it
        deadline = time.monotonic() + 30
        while summarize(run).state != "running":
            assert time.monotonic() < deadline, "no heartbeat arrived"
            time.sleep(0.01)
        running = summarize(run)
    finished = summarize(run)
    assert (running.epoch, running.epochs, running.best, running.reason) == (3, 4, 0.5, "")
    assert (finished.state, finished.best, finished.started) == ("finished", 0.5, running.started)
    time.sleep(0.1)
    assert summarize(run).seen == finished.seen, "heartbeats stop with the run"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "stopped"),
        (SystemExit(15), "interrupted", "stopped"),
        (RuntimeError("a rank was lost\nand more"), "failed", "a rank was lost"),
        (MemoryError(), "failed", "MemoryError"),
    ],
)
def test_error_gives_final_state_and_reason(tmp_path: Path, error: BaseException, state: str, reason: str) -> None:
    run = make_run(tmp_path / "run", (0.5,))
    with pytest.raises(type(error)), kept_state(run):
        raise error
    assert (summarize(run).state, summarize(run).reason) == (state, reason)


def test_error_without_text_is_a_failure(tmp_path: Path) -> None:
    """The reason cannot be written, but the run must not count as finished."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise OSError("no text")

    run = make_run(tmp_path / "run", (0.5,))
    with pytest.raises(OSError, match="no text"), kept_state(run):
        raise UnprintableError
    assert summarize(run).state == "failed"


def test_user_error_is_the_whole_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError), kept_state(run):
        raise UserError("short")
    (run / FAILURE_FILE).write_text("rank 1 has done nothing for 600 s;\nlook at its node\n")
    assert summarize(run).reason == "rank 1 has done nothing for 600 s; look at its node"
    with kept_state(run):  # a resumed run; the trainer deletes the error then
        assert summarize(run).reason == ""


def test_resumed_run_keeps_its_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), kept_state(run):
        raise KeyboardInterrupt
    started = read_state(run)["started"]
    with kept_state(run):
        pass
    assert read_state(run)["started"] == started
    assert read_state(run)["state"] == "finished"
    assert "reason" not in read_state(run)


DRIVER = """
import sys, time
from pathlib import Path
from msrn_ray.runs.state import kept_state
with kept_state(Path(sys.argv[1]), heartbeat_seconds=0.05):
    print("up", flush=True)
    time.sleep(60)
"""


def test_killed_driver_leaves_a_resumable_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    with pytest.raises(UserError) as caught:
        check_stopped(run, heartbeat_seconds=1)
    host = socket.gethostname()
    assert f"process {process.pid} on {host} still trains this run; stop it first" in str(caught.value)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start = time.monotonic()
    check_stopped(run, heartbeat_seconds=60)
    assert time.monotonic() - start < 30, "a dead process on this node needs no wait for a heartbeat"
    assert summarize(run).state == "running", "its heartbeat has not timed out yet"
    set_last_heartbeat(run, 100)
    assert (summarize(run).state, summarize(run).reason) == (
        "interrupted",
        "killed, or its machine is lost: no heartbeat",
    )


def test_only_new_heartbeats_prove_remote_drivers_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other node's clock may be wrong, so the time of the last heartbeat proves nothing. Only a new heartbeat does."""
    run = make_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), kept_state(run):
        raise KeyboardInterrupt
    check_stopped(run, heartbeat_seconds=60)  # the run wrote its final state
    (run / STATE_FILE).write_text(json.dumps(read_state(run) | {"state": "running", "host": "elsewhere", "pid": 7}))
    for seconds in (0, -3600, 3600):
        set_last_heartbeat(run, seconds)
        check_stopped(run, heartbeat_seconds=0.05)
        output = capsys.readouterr().out
        assert output == f"{run}: a driver on elsewhere is training this run; waiting 0.15 s for its heartbeat\n"
    with kept_state(make_run(tmp_path / "other"), heartbeat_seconds=0.05):
        other_run = tmp_path / "other"
        with pytest.raises(UserError, match=r"other: process \d+ on .* still trains this run"):
            check_stopped(other_run, heartbeat_seconds=0.1)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "7", '{"state": "running"}'])
def test_damaged_state_files_are_listed_as_unknown(tmp_path: Path, content: str | None) -> None:
    run = make_run(tmp_path / "run", (0.5,))
    if content is not None:
        (run / STATE_FILE).write_text(content)
    summary = summarize(run)
    assert (summary.state, summary.epoch, summary.best) == ("unknown", 1, 0.5)
    assert math.isnan(summary.seen)
    assert math.isnan(summary.started)
    check_stopped(run, heartbeat_seconds=60)


def test_list_starts_with_the_most_recent_run(tmp_path: Path) -> None:
    """The run with the latest heartbeat comes first. Other folders and damaged configs do no harm."""
    for name, seconds in (("old", 5000), ("new", 10)):
        with kept_state(make_run(tmp_path / name, (0.5, 0.25))):
            pass
        set_last_heartbeat(tmp_path / name, seconds)
    make_run(tmp_path / "silent")
    (make_run(tmp_path / "damaged") / CONFIG_FILE).write_text("train: {epochs: none}")
    make_run(tmp_path / ".new_5f")  # the run was killed while it made its folder
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    with (tmp_path / "new" / METRICS_FILE).open("a") as file:
        file.write('{"epoch": 3, "val/mA')  # cut off by a kill
    runs = list_runs(tmp_path)
    assert [(run.name, run.state, run.epoch, run.epochs) for run in runs] == [
        ("new", "finished", 2, 3),
        ("old", "finished", 2, 3),
        ("damaged", "unknown", 0, 0),
        ("silent", "unknown", 0, 3),
    ]
    assert "train.epochs" in runs[2].reason
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the train\.storage"):
        list_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line", [b'{"epoch": 1}', b'{"epoch": 1, "val/mAP": "high"}', b"{torn}", b"[1, {}]}", b"\xff\xfe}", b"[{}"]
)
def test_damaged_metrics_hide_no_other_run(tmp_path: Path, line: bytes) -> None:
    make_run(tmp_path / "whole", (0.5,))
    (make_run(tmp_path / "damaged", (0.5,)) / METRICS_FILE).write_bytes(line + b"\n")
    listed = {run.name: (run.epoch, run.reason) for run in list_runs(tmp_path)}
    assert listed == {"whole": (1, ""), "damaged": (0, "metrics.jsonl is damaged")}


def test_table_of_runs() -> None:
    nan = math.nan
    runs = [
        RunSummary("coco", "running", 2, 40, 0.71239, 1e6 - 7300, 1e6 - 4, ""),
        RunSummary("a longer name", "failed", 0, 6, nan, 1e6 - 300_000, 1e6 - 200, "the disk is full"),
        RunSummary("x", "unknown", 0, 0, nan, nan, nan, ""),
    ]
    assert describe_runs(runs, now=1e6) == [
        "run            state    epoch  best val mAP  started  last seen",
        "coco           running  2/40   0.7124        2 h ago  4 s ago",
        "a longer name  failed   0/6    -             3 d ago  3 min ago  the disk is full",
        "x              unknown  0/?    -             -        -",
    ]


def test_driver_on_another_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id means nothing here, so only its heartbeat counts."""
    monkeypatch.setattr(run_state, "_is_alive", lambda pid: False)
    with kept_state(tmp_path, heartbeat_seconds=0.05):
        monkeypatch.setattr(run_state, "socket", SimpleNamespace(gethostname=lambda: "another machine"))
        with pytest.raises(UserError, match="still trains this run"):
            check_stopped(tmp_path, heartbeat_seconds=0.3)


@pytest.mark.parametrize(
    ("state", "epochs", "complete"), [("finished", 2, True), ("finished", 3, False), ("interrupted", 2, False)]
)
def test_only_a_finished_run_is_complete(tmp_path: Path, state: str, epochs: int, complete: bool) -> None:
    """A run with more epochs to train is not; nor a run that stopped before it scored its test split."""
    folder = make_run(tmp_path / "run", (0.1, 0.2), epochs=2)
    content = {"state": state, "pid": 1, "host": "elsewhere", "started": 1.0}
    (folder / STATE_FILE).write_text(json.dumps(content))
    assert is_complete(folder, epochs) is complete
