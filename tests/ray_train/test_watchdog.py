"""The rank that hangs is named and ended; those that only wait for it are not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.ray_train import driver as trainer
from msrn_ray.ray_train import watchdog
from msrn_ray.ray_train.driver import train
from msrn_ray.ray_train.heartbeat import DONE, WAITING, beat_seconds
from msrn_ray.ray_train.watchdog import Watchdog
from msrn_ray.runs.listing import list_runs
from tests.tiny import make_coco


class Scene:
    """A watchdog with a clock that moves only when told, and notes of what it says and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, there: bool = True) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self.ended: list[int] = []
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))

        def end(beat: Mapping[str, Any]) -> bool:
            self.ended.append(beat["pid"])
            return there

        self.watchdog = Watchdog(1.0, self.said.append, end)

    def beat(self, rank: int, doing: str, idle: float, step: int = 7, full: str | None = None) -> None:
        place = {"node": "10.0.0.1", "node_id": "n", "pid": 1000 + rank, "full": full}
        self.watchdog.hear({"rank": rank, "epoch": 2, "step": step, "doing": doing, "idle": idle, **place})


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_ranks_that_move_are_left_alone(scene: Scene) -> None:
    for _ in range(30):
        scene.now += 5
        for rank in range(2):
            scene.beat(rank, "in a step", idle=11.0)
        scene.watchdog.look()
    assert (scene.said, scene.ended, scene.watchdog.verdict) == ([], [], None)


def test_a_silent_rank_is_named_warned_of_once_and_ended(scene: Scene) -> None:
    scene.beat(1, "in a step", idle=0.0)
    for _ in range(13):
        scene.beat(0, "in a step", idle=scene.now - 100)
        scene.watchdog.look()
        scene.now += 5
    assert scene.said[0] == (
        "rank 1 (node 10.0.0.1, process 1001) has done nothing for 15 s, no sign of life, last seen in epoch 2, step 7, in a step;"
        " its process is ended if that lasts 1 minutes"
    )
    assert len(scene.said) == 1
    scene.watchdog.look()
    assert scene.ended == [1001]
    assert scene.watchdog.verdict is not None
    assert scene.watchdog.verdict.startswith(
        "rank 1 (node 10.0.0.1, process 1001) has done nothing for 65 s, no sign of life, last seen in epoch 2, step 7, in a step"
    )
    assert "train.hang_minutes=1" in scene.watchdog.verdict
    scene.now += 100
    scene.watchdog.look()
    assert scene.ended == [1001], "the other rank only waited for it"


@pytest.mark.parametrize("others", [True, False])
def test_a_node_with_a_full_disk_is_set_aside_once_and_where_there_is_no_other_the_run_ends(
    scene: Scene, others: bool
) -> None:
    aside: list[tuple[str, str, Collection[str]]] = []
    given_up: list[float] = []

    def set_aside(node: str, why: str, before: Collection[str]) -> bool:
        aside.append((node, why, before))
        return others

    scene.watchdog = Watchdog(60.0, scene.said.append, give_up=lambda: given_up.append(scene.now), set_aside=set_aside)
    scene.beat(0, "in a step", idle=0.0)
    assert aside == []
    for _ in range(3):
        scene.beat(0, "in a step", idle=0.0, full="/tmp/ray/session")
    place = "node 10.0.0.1: the disk of /tmp/ray/session is full"
    assert aside == [("n", place, frozenset())]
    if others:
        assert (scene.said, given_up, scene.watchdog.abandoned) == (
            [f"{place}; nothing more is started there until Ray on it is started again"],
            [],
            None,
        )
    else:
        assert scene.watchdog.abandoned == f"{place}, and there is no other node; make room, and go on with --resume"
        assert (scene.said, given_up) == ([scene.watchdog.abandoned], [scene.now])


def test_a_run_without_workers_is_given_up_when_the_wait_is_over(scene: Scene) -> None:
    """At its start, or after a fault; any worker's sign of life counts, of a rank that is ended too."""
    given_up: list[float] = []
    waits = Watchdog(60.0, scene.said.append, wait_minutes=2.0, give_up=lambda: given_up.append(scene.now))
    for _ in range(5):
        scene.now += 100
        waits.hear({"rank": 0, "doing": DONE, "node_id": "n", "pid": 1000, "full": None})
        waits.look()
    heard = scene.now
    assert (scene.said, given_up, waits.abandoned) == ([], [], None)
    for _ in range(50):
        scene.now += 5
        waits.look()
    assert scene.said == ["no sign of life of any worker for 60 s; waiting for room, resources.wait_minutes=2 at most"]
    assert given_up == [heard + 185]
    assert waits.abandoned is not None
    assert "no room for the workers for longer than resources.wait_minutes=2;" in waits.abandoned


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ("in a step", 70.0, 7),
            (WAITING, 61.0, 8),
        ),  # for images that do not come, while the other waits for its gradients
        (("in a step", 70.0, 7), ("in a step", 61.0, 6)),  # a step behind
        (("in a step", 61.0, 7), ("in a step", 62.0, 7)),  # nothing else tells them apart: for longer
    ],
)
def test_among_ranks_that_are_alive_the_one_that_holds_up_is_ended(
    scene: Scene, first: tuple[str, float, int], second: tuple[str, float, int]
) -> None:
    scene.beat(0, *first)
    scene.beat(1, *second)
    scene.watchdog.look()
    assert scene.ended == [1001]
    assert scene.watchdog.verdict is not None
    assert "alive" in scene.watchdog.verdict


def test_a_rank_that_goes_on_after_a_warning_may_be_warned_of_again(scene: Scene) -> None:
    for idle in (13.0, 1.0, 14.0, 15.0):
        scene.beat(0, "in a step", idle)
        scene.watchdog.look()
    assert len(scene.said) == 2
    assert "done nothing for 13 s" in scene.said[0]
    assert "done nothing for 14 s" in scene.said[1]


def test_a_rank_that_said_goodbye_or_whose_process_is_gone_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, there=False)
    scene.beat(0, "in a step", idle=0.0)
    scene.beat(0, DONE, idle=0.0)
    scene.now += 1000
    scene.watchdog.look()
    assert scene.ended == []
    scene.beat(1, "in a step", idle=0.0)
    scene.now += 1000
    scene.watchdog.look()
    scene.watchdog.look()
    assert (scene.ended, scene.watchdog.verdict) == ([1001], None), "Ray Train sees to lost processes"


def test_new_workers_start_without_the_old_ones_beats_and_verdict(scene: Scene) -> None:
    scene.beat(0, "in a step", idle=0.0)
    scene.beat(1, "in a step", idle=0.0)
    scene.now += 1000
    scene.watchdog.look()
    assert scene.watchdog.verdict is not None
    scene.watchdog.restart()
    scene.beat(0, "in a step", idle=2000.0)  # sent while it was going down
    scene.watchdog.look()
    assert (len(scene.ended), scene.watchdog.verdict) == (1, None)


def test_workers_that_ray_train_ends_are_forgotten_while_new_ones_are_awaited(scene: Scene) -> None:
    """One failed; the others are ended without a word, and what they sent before may still come."""
    for rank in range(2):
        scene.beat(rank, "in a step", idle=0.0)
    scene.watchdog.forget()
    scene.beat(1, "in a step", idle=1.0)
    scene.now += 5000
    scene.watchdog.look()
    assert (scene.said, scene.ended, scene.watchdog.verdict) == ([], [], None)


def test_a_rank_that_new_workers_do_not_have_is_forgotten(scene: Scene) -> None:
    for rank in range(3):
        scene.beat(rank, "in a step", idle=0.0)
    scene.watchdog.restart()
    for _ in range(200):
        scene.now += 5
        for rank in range(2):
            scene.beat(rank, "in a step", idle=1.0)
        scene.watchdog.look()
    assert (scene.said, scene.ended) == ([], [])
    for _ in range(13):
        scene.now += 5
        scene.beat(0, "in a step", idle=1.0)
        scene.watchdog.look()
    assert scene.ended == [1001]


def test_signs_of_life_come_often_enough() -> None:
    assert [beat_seconds(minutes) for minutes in (0.1, 0.5, 10, 600)] == [pytest.approx(1.0), 5.0, 5.0, 5.0]


def endless(folder: Path, name: str) -> ExperimentConfig:
    """Two workers on a few images, for far longer than the test."""
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
    """Stops the process of rank 1 when both ranks make steps, and is less patient from then on."""

    stopped: int | None = None

    def hear(self, beat: Mapping[str, Any]) -> None:
        super().hear(beat)
        # the last beat of a rank may be 5 s old
        fresh = [heard for heard in self._heard.values() if heard.idle(time.monotonic()) < 8]
        if self.stopped is None and len(fresh) == 2 and beat["rank"] == 1 and beat["step"] > 1:
            StopsRankOne.stopped = beat["pid"]
            os.kill(beat["pid"], signal.SIGSTOP)
            # a rank is silent 12.5 s after its last beat, which may have come after 8 s without a step: it is silent before it is late
            self._limit = 21.0


@pytest.mark.ray
@pytest.mark.faults
def test_a_stopped_process_ends_the_run_with_its_name(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "Watchdog", StopsRankOne)
    config = endless(tmp_path, "hung")
    try:
        with pytest.raises(UserError, match=r"rank 1 .*no sign of life.*train\.hang_minutes=10") as caught:
            train(config)
    finally:
        pid = StopsRankOne.stopped
        assert pid is not None
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pid = None
    assert pid is None, "the stopped process was ended"
    assert f"process {StopsRankOne.stopped})" in str(caught.value)
    assert (tmp_path / "runs/hung/failure.txt").read_text().strip() == str(caught.value)
    assert "its process was ended" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_finds_no_room_in_time_ends_with_that_error(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not, since no worker starts within two seconds."""
    monkeypatch.setattr(watchdog, "_ALONE_SECONDS", 0.2)
    config = endless(tmp_path, "waits").with_overrides({"resources.wait_minutes": 0.03})
    with pytest.raises(UserError, match=r"no room for the workers for longer than resources\.wait_minutes=0\.03;"):
        train(config)
    (run,) = list_runs(tmp_path / "runs")
    assert (run.state, run.epoch) == ("failed", 0)
    assert "wait_minutes" in run.reason
