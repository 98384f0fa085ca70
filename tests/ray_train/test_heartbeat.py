"""What a rank reports: heartbeats, gauges, use of the object store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import ray
from ray.util.queue import Queue

from msrn_ray.ray_train import gauges as gauges_module
from msrn_ray.ray_train.gauges import EPOCH_GAUGES, GAUGES, Gauges
from msrn_ray.ray_train.heartbeat import DONE, WAITING, HeartbeatSender
from msrn_ray.ray_train.object_store import StoreMeter
from msrn_ray.runs.events import Heartbeat


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread or process makes true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


@pytest.mark.ray
def test_heartbeats_report_what_the_rank_does(local_ray: None) -> None:
    events = Queue(actor_options={"num_cpus": 0})
    received: list[Heartbeat] = []

    def arrives(activity: str, step: int) -> bool:
        received.extend(events.get_nowait_batch(events.qsize()))
        return any((heartbeat.activity, heartbeat.step) == (activity, step) for heartbeat in received)

    def batches() -> Iterator[str]:
        for step, batch in enumerate("ab", 1):
            wait_until(lambda step=step: arrives(WAITING, step))  # heartbeats arrive while the rank waits
            yield batch

    with HeartbeatSender(events, rank=3, seconds=0.02) as sender:
        wait_until(lambda: arrives("starting", 0))
        watched = []
        for step, batch in enumerate(sender.watch(batches(), epoch=5, activity="in a step"), 1):
            watched.append(batch)
            wait_until(lambda step=step: arrives("in a step", step))
    wait_until(lambda: arrives(DONE, 3))
    assert watched == ["a", "b"]
    assert received[-1].activity == DONE, "the sender stops after the last heartbeat"
    expected_sender = (3, ray.nodes()[0]["NodeManagerAddress"], os.getpid())
    assert all((heartbeat.rank, heartbeat.node, heartbeat.pid) == expected_sender for heartbeat in received)
    assert {heartbeat.epoch for heartbeat in received} == {0, 5}
    assert all(0 <= heartbeat.idle_seconds < 120 for heartbeat in received)


@pytest.mark.ray
def test_object_store_peak_outlives_its_objects(local_ray: None) -> None:
    with StoreMeter(seconds=0.02) as meter:
        initial_peak = meter.peak_bytes
        reference = ray.put(np.zeros(200_000_000, np.uint8))
        wait_until(lambda: meter.peak_bytes >= initial_peak + 100_000_000)
        del reference
        time.sleep(0.2)
        assert meter.peak_bytes >= 200_000_000
        assert meter.spilled_bytes == 0


def test_gauges_carry_run_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[tuple[float, dict[str, str]]]] = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert tag_keys == ("run", "rank")
            assert description
            assert name not in made, "Gauges makes every gauge once"
            self.values = made.setdefault(name, [])

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values.append((value, dict(tags)))

    monkeypatch.setattr(gauges_module, "Gauge", Recorder)
    gauges = Gauges("my-run", 1)
    gauges.set({"loss": 0.5, "epoch": 2})
    gauges.set({"loss": 0.25})
    tags = {"run": "my-run", "rank": "1"}
    assert made == {"msrn_train_loss": [(0.5, tags), (0.25, tags)], "msrn_epoch": [(2, tags)]}
    all_gauges = GAUGES | EPOCH_GAUGES
    assert len({name for name, _ in all_gauges.values()}) == len(GAUGES) + len(EPOCH_GAUGES)
