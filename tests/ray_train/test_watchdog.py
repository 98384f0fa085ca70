"""The watchdog names and ends the rank that hangs, but not the ranks that only wait for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.ray_train import driver, watchdog
from msrn_ray.ray_train.driver import train
from msrn_ray.ray_train.heartbeat import DONE, WAITING, heartbeat_seconds
from msrn_ray.ray_train.watchdog import Watchdog, WatchdogActions
from msrn_ray.runs.events import Heartbeat
from msrn_ray.runs.state import list_runs
from tests.tiny import make_coco


class WatchdogScene:
    """A watchdog with a clock that the test moves, and records of what it logs and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alive: bool = True) -> None:
        self.seconds = 100.0
        self.logged: list[str] = []
        self.ended: list[int] = []
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.seconds))

        def end_process(heartbeat: Heartbeat) -> bool:
            self.ended.append(heartbeat.pid)
            return alive

        self.actions = WatchdogActions(self.logged.append, end_process)
        self.watchdog = Watchdog(1.0, self.actions)

    def send_heartbeat(self, rank: int, activity: str, idle: float, step: int = 7, full: str | None = None) -> None:
        self.watchdog.receive(make_heartbeat(rank, activity, idle, step, full))


def make_heartbeat(rank: int, activity: str, idle: float, step: int = 7, full: str | None = None) -> Heartbeat:
    return Heartbeat(rank, "10.0.0.1", "n", 1000 + rank, 2, step, activity, idle, full)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> WatchdogScene:
    return WatchdogScene(monkeypatch)


def test_moving_ranks_stay_alive(scene: WatchdogScene) -> None:
    for _ in range(30):
        scene.seconds += 5
        for rank in range(2):
            scene.send_heartbeat(rank, "in a step", idle=11.0)
        scene.watchdog.check()
    assert (scene.logged, scene.ended, scene.watchdog.hang) == ([], [], None)


def test_silent_rank_is_named_warned_once_and_ended(scene: WatchdogScene) -> None:
    scene.send_heartbeat(1, "in a step", idle=0.0)
    for _ in range(13):
        scene.send_heartbeat(0, "in a step", idle=scene.seconds - 100)
        scene.watchdog.check()
        scene.seconds += 5
    assert scene.logged[0] == (
        "rank 1 (node 10.0.0.1, process 1001) has done nothing for 15 s, sends no heartbeat, last seen in epoch 2, step 7, in a step;"
        " its process is ended if that lasts 1 minutes"
    )
    assert len(scene.logged) == 1
    scene.watchdog.check()
    assert scene.ended == [1001]
    assert scene.watchdog.hang is not None
    assert scene.watchdog.hang.startswith(
        "rank 1 (node 10.0.0.1, process 1001) has done nothing for 65 s, sends no heartbeat, last seen in epoch 2, step 7, in a step"
    )
    assert "train.hang_minutes=1" in scene.watchdog.hang
    scene.seconds += 100
    scene.watchdog.check()
    assert scene.ended == [1001], "the other rank only waited for rank 1"


@pytest.mark.parametrize("has_other_nodes", [True, False])
def test_node_with_full_disk_is_drained_once(scene: WatchdogScene, has_other_nodes: bool) -> None:
    drained: list[tuple[str, str, Collection[str]]] = []
    given_up: list[float] = []

    def drain_node(node: str, reason: str, drained_before: Collection[str]) -> bool:
        drained.append((node, reason, drained_before))
        return has_other_nodes

    actions = replace(scene.actions, give_up=lambda: given_up.append(scene.seconds), drain_node=drain_node)
    scene.watchdog = Watchdog(60.0, actions)
    scene.send_heartbeat(0, "in a step", idle=0.0)
    assert drained == []
    for _ in range(3):
        scene.send_heartbeat(0, "in a step", idle=0.0, full="/tmp/ray/session")
    reason = "node 10.0.0.1: the disk of /tmp/ray/session is full"
    assert drained == [("n", reason, frozenset())]
    if has_other_nodes:
        assert (scene.logged, given_up, scene.watchdog.give_up_reason) == (
            [f"{reason}; Ray starts nothing there until it is restarted on that node"],
            [],
            None,
        )
    else:
        assert (
            scene.watchdog.give_up_reason
            == f"{reason}, and there is no other node; free some space, and resume with --resume"
        )
        assert (scene.logged, given_up) == ([scene.watchdog.give_up_reason], [scene.seconds])


def test_run_without_workers_ends_after_the_wait(scene: WatchdogScene) -> None:
    """At its start or after a fault. The heartbeat of any worker counts, even of a rank that has ended."""
    given_up: list[float] = []
    actions = replace(scene.actions, give_up=lambda: given_up.append(scene.seconds))
    watchdog_with_limit = Watchdog(60.0, actions, wait_minutes=2.0)
    for _ in range(5):
        scene.seconds += 100
        watchdog_with_limit.receive(make_heartbeat(0, DONE, 0.0))
        watchdog_with_limit.check()
    last_heartbeat = scene.seconds
    assert (scene.logged, given_up, watchdog_with_limit.give_up_reason) == ([], [], None)
    for _ in range(50):
        scene.seconds += 5
        watchdog_with_limit.check()
    assert scene.logged == ["no heartbeat of any worker for 60 s; waiting at most resources.wait_minutes=2 for room"]
    assert given_up == [last_heartbeat + 185]
    assert watchdog_with_limit.give_up_reason is not None
    assert "no room for the workers for longer than resources.wait_minutes=2;" in watchdog_with_limit.give_up_reason


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ("in a step", 70.0, 7),
            (WAITING, 61.0, 8),
        ),  # rank 1 waits for images, and rank 0 for rank 1's gradients
        (("in a step", 70.0, 7), ("in a step", 61.0, 6)),  # rank 1 is a step behind
        (("in a step", 61.0, 7), ("in a step", 62.0, 7)),  # only the idle time differs: rank 1 hangs longer
    ],
)
def test_among_live_ranks_the_blocking_rank_is_ended(
    scene: WatchdogScene, first: tuple[str, float, int], second: tuple[str, float, int]
) -> None:
    scene.send_heartbeat(0, *first)
    scene.send_heartbeat(1, *second)
    scene.watchdog.check()
    assert scene.ended == [1001]
    assert scene.watchdog.hang is not None
    assert "sends heartbeats" in scene.watchdog.hang


def test_rank_that_moved_again_is_warned_again(scene: WatchdogScene) -> None:
    for idle in (13.0, 1.0, 14.0, 15.0):
        scene.send_heartbeat(0, "in a step", idle)
        scene.watchdog.check()
    assert len(scene.logged) == 2
    assert "done nothing for 13 s" in scene.logged[0]
    assert "done nothing for 14 s" in scene.logged[1]


def test_ended_rank_or_lost_process_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = WatchdogScene(monkeypatch, alive=False)
    scene.send_heartbeat(0, "in a step", idle=0.0)
    scene.send_heartbeat(0, DONE, idle=0.0)
    scene.seconds += 1000
    scene.watchdog.check()
    assert scene.ended == []
    scene.send_heartbeat(1, "in a step", idle=0.0)
    scene.seconds += 1000
    scene.watchdog.check()
    scene.watchdog.check()
    assert (scene.ended, scene.watchdog.hang) == ([1001], None), "Ray Train handles lost processes"


def test_new_workers_start_without_old_heartbeats(scene: WatchdogScene) -> None:
    scene.send_heartbeat(0, "in a step", idle=0.0)
    scene.send_heartbeat(1, "in a step", idle=0.0)
    scene.seconds += 1000
    scene.watchdog.check()
    assert scene.watchdog.hang is not None
    scene.watchdog.reset()
    scene.send_heartbeat(0, "in a step", idle=2000.0)  # the rank sent it while it ended
    scene.watchdog.check()
    assert (len(scene.ended), scene.watchdog.hang) == (1, None)


def test_workers_that_ray_train_ends_are_forgotten(scene: WatchdogScene) -> None:
    """After a failure, Ray Train ends the other workers silently. Their earlier heartbeats may still arrive."""
    for rank in range(2):
        scene.send_heartbeat(rank, "in a step", idle=0.0)
    scene.watchdog.forget_workers()
    scene.send_heartbeat(1, "in a step", idle=1.0)
    scene.seconds += 5000
    scene.watchdog.check()
    assert (scene.logged, scene.ended, scene.watchdog.hang) == ([], [], None)


def test_rank_missing_in_new_workers_is_forgotten(scene: WatchdogScene) -> None:
    for rank in range(3):
        scene.send_heartbeat(rank, "in a step", idle=0.0)
    scene.watchdog.reset()
    for _ in range(200):
        scene.seconds += 5
        for rank in range(2):
            scene.send_heartbeat(rank, "in a step", idle=1.0)
        scene.watchdog.check()
    assert (scene.logged, scene.ended) == ([], [])
    for _ in range(13):
        scene.seconds += 5
        scene.send_heartbeat(0, "in a step", idle=1.0)
        scene.watchdog.check()
    assert scene.ended == [1001]


def test_heartbeats_are_frequent_enough() -> None:
    assert [heartbeat_seconds(minutes) for minutes in (0.1, 0.5, 10, 600)] == [pytest.approx(1.0), 5.0, 5.0, 5.0]


def endless_config(folder: Path, name: str) -> ExperimentConfig:
    """Return the config of a run of two workers that lasts far longer than the test."""
    root = make_coco(folder / "data", {"train": [[0], [1], [2], [0, 1]] * 4, "val": [[0], [1, 2]]})
    return PRESETS["scenes"].config.with_overrides(
        {
            "data.dataset": "coco",
            "data.root": str(root),
            "data.image_size": 64,
            "model.embed_dim": 16,
            "model.compile": "off",
            "train.epochs": 200,
            "train.max_failures": 0,
            "train.batch_size": 4,
            "train.storage": str(folder / "runs"),
            "train.run_name": name,
            "resources.num_workers": 2,
        }
    )


class StopsRankOne(Watchdog):
    """Stops the process of rank 1 once both ranks make steps, then shortens the hang limit."""

    stopped: int | None = None

    def receive(self, heartbeat: Heartbeat) -> None:
        super().receive(heartbeat)
        # the last heartbeat of a rank may be 5 s old
        fresh = [received for received in self._received.values() if received.idle(time.monotonic()) < 8]
        if self.stopped is None and len(fresh) == 2 and heartbeat.rank == 1 and heartbeat.step > 1:
            StopsRankOne.stopped = heartbeat.pid
            os.kill(heartbeat.pid, signal.SIGSTOP)
            # The last heartbeat may have arrived after 8 s without a step, and a heartbeat times out after 12.5 s.
            # With this limit the heartbeat times out before the hang limit.
            self._hang_seconds = 21.0


@pytest.mark.ray
@pytest.mark.faults
def test_stopped_process_is_named_and_ends_the_run(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "Watchdog", StopsRankOne)
    config = endless_config(tmp_path, "hung")
    try:
        with pytest.raises(UserError, match=r"rank 1 .*sends no heartbeat.*train\.hang_minutes=10") as caught:
            train(config)
    finally:
        pid = StopsRankOne.stopped
        assert pid is not None
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pid = None
    assert pid is None, "the watchdog ended the stopped process"
    assert f"process {StopsRankOne.stopped})" in str(caught.value)
    assert (tmp_path / "runs/hung/failure.txt").read_text().strip() == str(caught.value)
    assert "its process was ended" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_run_without_resources_ends_with_an_error(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker starts within the two seconds of resources.wait_minutes."""
    monkeypatch.setattr(watchdog, "_NO_WORKER_SECONDS", 0.2)
    config = endless_config(tmp_path, "waits").with_overrides({"resources.wait_minutes": 0.03})
    with pytest.raises(UserError, match=r"no room for the workers for longer than resources\.wait_minutes=0\.03;"):
        train(config)
    (run,) = list_runs(tmp_path / "runs")
    assert (run.state, run.epoch) == ("failed", 0)
    assert "wait_minutes" in run.reason
