"""What a rank tells: signs of life, gauges, object store figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.queue import Queue

from msrn_ray.ray_train import heartbeat as telemetry
from msrn_ray.ray_train.gauges import EPOCH_GAUGES, GAUGES, Gauges
from msrn_ray.ray_train.heartbeat import DONE, WAITING, Pulse
from msrn_ray.ray_train.object_store import StoreMeter


def wait_until(true: Callable[[], bool]) -> None:
    """Until something is so that another thread or process brings about."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.ray
def test_a_pulse_tells_what_the_rank_is_doing(local_ray: None) -> None:
    events = Queue(actor_options={"num_cpus": 0})
    heard: list[dict[str, Any]] = []

    def hears(doing: str, step: int) -> bool:
        heard.extend(events.get_nowait_batch(events.qsize()))
        return any((beat["doing"], beat["step"]) == (doing, step) for beat in heard)

    def batches() -> Iterator[str]:
        for step, batch in enumerate("ab", 1):
            wait_until(lambda step=step: hears(WAITING, step))  # beats come while the rank waits
            yield batch

    with Pulse(events, rank=3, seconds=0.02) as pulse:
        wait_until(lambda: hears("starting", 0))
        got = []
        for step, batch in enumerate(pulse.watch(batches(), epoch=5, doing="in a step"), 1):
            got.append(batch)
            wait_until(lambda step=step: hears("in a step", step))
    wait_until(lambda: hears(DONE, 3))
    assert got == ["a", "b"]
    assert heard[-1]["doing"] == DONE, "nothing comes after the goodbye"
    here = {"kind": "beat", "rank": 3, "node": ray.nodes()[0]["NodeManagerAddress"], "pid": os.getpid()}
    assert all(beat.items() >= here.items() for beat in heard)
    assert {beat["epoch"] for beat in heard} == {0, 5}
    assert all(0 <= beat["idle"] < 120 for beat in heard)


@pytest.mark.ray
def test_the_peak_of_the_object_store_stays_when_the_objects_are_gone(local_ray: None) -> None:
    with StoreMeter(seconds=0.02) as meter:
        before = meter.peak_bytes
        reference = ray.put(np.zeros(200_000_000, np.uint8))
        wait_until(lambda: meter.peak_bytes >= before + 100_000_000)
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
            assert name not in made, "a gauge is made once"
            self.values = made.setdefault(name, [])

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values.append((value, dict(tags)))

    monkeypatch.setattr(telemetry, "Gauge", Recorder)
    gauges = Gauges("my-run", 1)
    gauges.set({"loss": 0.5, "epoch": 2})
    gauges.set({"loss": 0.25})
    tags = {"run": "my-run", "rank": "1"}
    assert made == {"msrn_train_loss": [(0.5, tags), (0.25, tags)], "msrn_epoch": [(2, tags)]}
    every = GAUGES | EPOCH_GAUGES
    assert len({name for name, _ in every.values()}) == len(GAUGES) + len(EPOCH_GAUGES)
