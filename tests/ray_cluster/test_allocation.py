"""How many workers a run gets, and what it may not ask for; Ray itself is never started."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
import torch

from msrn_ray.config import ResourceSettings
from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import Allocation, allocate, decode_cpus
from msrn_ray.ray_cluster.connection import connect, default_workers
from msrn_ray.ray_train.torch_trainer import scaling_config

LARGEST = "msrn_ray.ray_cluster.allocation.max_cluster_resources"  # returns None where the cluster does not grow


def cluster(monkeypatch: pytest.MonkeyPatch, *, cpus: float, gpus: float | None = None, cores: int = 16) -> None:
    """Pretends to be connected to a cluster, from a machine with `cores`."""
    there = {"CPU": cpus} | ({} if gpus is None else {"GPU": gpus})
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(LARGEST, lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))


@pytest.mark.parametrize(
    ("cores", "cpus", "gpus", "settings", "expected"),
    [
        (1, 2, None, {}, Allocation(1, False, 1)),
        (2, 4, None, {}, Allocation(2, False, 1)),
        (16, 18, None, {}, Allocation(2, False, 1)),
        (16, 2, None, {}, Allocation(1, False, 1)),
        (16, 17, 0, {"cpus_per_worker": 8}, Allocation(2, False, 8)),
        (16, 36, 4, {}, Allocation(4, True, 1)),
        (1, 9, 1, {}, Allocation(1, True, 1)),
        (16, 36, 4, {"num_workers": 2}, Allocation(2, True, 1)),
        (16, 36, 4, {"use_gpu": False}, Allocation(2, False, 1)),
        (16, 36, 4, {"use_gpu": False, "num_workers": 5}, Allocation(5, False, 1)),
        (2, 40, None, {"num_workers": 8, "cpus_per_worker": 2}, Allocation(8, False, 2)),
        (2, 5, None, {"num_workers": 4}, Allocation(4, False, 1)),
        (2, 40, None, {"num_workers": "2..8"}, Allocation(8, False, 1, (2, 8))),
        (2, 6, None, {"num_workers": "2..8"}, Allocation(5, False, 1, (2, 5))),
        (2, 9, None, {"num_workers": "2..8", "cpus_per_worker": 4}, Allocation(2, False, 4, None)),
        (16, 36, 4, {"num_workers": "2..8"}, Allocation(4, True, 1, (2, 8))),
    ],
)
def test_what_a_run_takes(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    cpus: float,
    gpus: float | None,
    settings: dict[str, Any],
    expected: Allocation,
) -> None:
    cluster(monkeypatch, cpus=cpus, gpus=gpus, cores=cores)
    assert allocate(ResourceSettings(**settings)) == expected
    assert expected.num_workers * expected.cpus_per_worker < cpus, "something is left to decode images"


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "words"),
    [
        (4, None, {"num_workers": 5}, ("resources.num_workers=5", "4 CPUs")),
        (4, None, {"num_workers": 4}, ("resources.num_workers=4", "one for decoding", "4 CPUs")),
        (4, None, {"num_workers": 2, "cpus_per_worker": 2}, ("resources.num_workers=2 x 2 CPUs", "4 CPUs")),
        (4.5, None, {"num_workers": 4}, ("resources.num_workers=4", "4.5 CPUs")),
        (64, 4, {"num_workers": 5}, ("resources.num_workers=5", "has 4", "resources.use_gpu")),
        (64, None, {"use_gpu": True, "num_workers": 1}, ("resources.num_workers=1", "has 0")),
        (64, None, {"use_gpu": True}, ("GPUs", "has 0")),
        (64, 4, {"num_workers": "5..8"}, ("resources.num_workers=5..8", "has 4", "resources.use_gpu")),
        (4, None, {"num_workers": "4..8"}, ("resources.num_workers=4..8", "one for decoding", "4 CPUs")),
        (8, 8, {}, ("resources.num_workers=8", "8 CPUs")),
        (1, None, {}, ("one for decoding", "1 CPUs")),
        (0, None, {}, ("0 CPUs",)),
    ],
)
def test_more_than_there_is_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float | None, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    cluster(monkeypatch, cpus=cpus, gpus=gpus)
    with pytest.raises(UserError) as caught:
        allocate(ResourceSettings(**settings))
    assert [word for word in words if word not in str(caught.value)] == []


class Growing:
    """A cluster that starts the machines that are asked for one by one, each time that somebody looks, up to `most`.

    Attributes:
        asked: what was asked for, in turn; the last one counts.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, now: dict[str, float], most: dict[str, int], works: bool = True
    ):
        self.now, self.most, self.works = dict(now), most, works
        self.asked: list[list[dict[str, int]]] = []
        self.clock = 0.0
        monkeypatch.setattr(LARGEST, lambda: most)
        monkeypatch.setattr(ray, "cluster_resources", lambda: dict(self.now))
        monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr("msrn_ray.ray_cluster.allocation.time.sleep", self.sleep)
        monkeypatch.setattr("msrn_ray.ray_cluster.allocation.time.monotonic", lambda: self.clock)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.asked and self.asked[-1] and self.works:
            self.now["GPU"] = min(self.now.get("GPU", 0) + 1, sum(one.get("GPU", 0) for one in self.asked[-1]))
            self.now["CPU"] = 16 * self.now["GPU"]


def test_a_cluster_that_grows_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From no machine but the head to three with a GPU each; the request is withdrawn then, or they would stay for ever."""
    growing = Growing(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    assert allocate(ResourceSettings(num_workers=3)) == Allocation(3, True, 1)
    assert growing.asked == [[{"CPU": 1, "GPU": 1}] * 3 + [{"CPU": 1}], []]
    assert growing.clock == 3
    assert capsys.readouterr().out == "waiting for nodes for 3 workers; the cluster has 0 CPUs and 0 GPUs now\n"
    assert allocate(ResourceSettings(num_workers="2..4")) == Allocation(3, True, 1, (2, 4))
    assert len(growing.asked) == 2, "there are enough already"


def test_a_request_that_another_run_overwrites_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train and Ray Data ask for what their own runs need, and the last request counts."""

    class Overwritten(Growing):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            self.asked.append([])

    growing = Overwritten(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    assert allocate(ResourceSettings(num_workers=3)) == Allocation(3, True, 1)
    assert growing.clock < 20, "three machines, each of them asked for within a few seconds"


def test_what_never_comes_is_an_error_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = Growing(monkeypatch, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 64, "GPU": 4}, works=False)
    with pytest.raises(
        UserError, match=r"num_workers=2 needs as many GPUs, after resources\.wait_minutes=3 the cluster has 1;"
    ):
        allocate(ResourceSettings(num_workers=2, wait_minutes=3))
    assert 180 <= growing.clock < 190
    assert growing.asked[-1] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_workers": 5}, r"num_workers=5 needs as many GPUs, the cluster at its largest has 4"),
        ({"num_workers": "5..8"}, r"num_workers=5\.\.8 needs as many GPUs, the cluster at its largest has 4"),
        (
            {"num_workers": 4, "cpus_per_worker": 16},
            r"num_workers=4 x 16 CPUs, .* the cluster at its largest has 64 CPUs",
        ),
        ({}, r"has 0 GPUs now and can grow to 4; say with resources\.num_workers"),
    ],
)
def test_more_than_a_cluster_can_grow_to_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    growing = Growing(monkeypatch, {"CPU": 0.0}, {"CPU": 64, "GPU": 4})
    with pytest.raises(UserError, match=words):
        allocate(ResourceSettings(**settings))
    assert (growing.clock, growing.asked) == (0, [])


def test_a_range_is_left_to_ray_train_and_a_number_is_not() -> None:
    assert scaling_config(Allocation(4, True, 1, (2, 8))).num_workers == (2, 8)
    assert scaling_config(Allocation(4, False, 3)).num_workers == 4
    assert scaling_config(Allocation(4, False, 3)).resources_per_worker == {"CPU": 3}


@pytest.mark.parametrize(
    ("cpus", "workers", "each", "runs", "expected"),
    [
        (4, 2, 1, 1, 1),
        (9, 2, 1, 1, 3),
        (9, 4, 1, 1, 1),
        (18, 2, 1, 1, 8),
        (40, 8, 2, 1, 3),
        (5, 4, 1, 1, 1),
        (4, 1, 1, 2, 1),
        (16, 2, 1, 3, 1),
        (36, 1, 1, 4, 8),
    ],
)
def test_what_is_left_to_decode_images(
    monkeypatch: pytest.MonkeyPatch, cpus: float, workers: int, each: int, runs: int, expected: float
) -> None:
    """Shared by the workers that there are, which may be other than at the start, and by the runs beside this one."""
    cluster(monkeypatch, cpus=cpus)
    assert decode_cpus(workers, each, runs) == expected


def test_workers_that_leave_nothing_to_decode_are_an_error_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, cpus=4)
    with pytest.raises(
        UserError, match=r"4 workers x 1 CPUs leave none of the cluster's 4 CPUs.*resources\.num_workers"
    ):
        decode_cpus(4, 1)


def test_a_worker_may_take_a_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, cpus=36, gpus=4)
    allocation = allocate(ResourceSettings(num_workers=1, gpus_per_worker=0.25))
    assert scaling_config(allocation).resources_per_worker == {"CPU": 1, "GPU": 0.25}
    whole = allocate(ResourceSettings(num_workers=1))
    assert scaling_config(whole).resources_per_worker == {"CPU": 1, "GPU": 1}


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gpus, expected in ((1, 0, 1), (2, 0, 2), (16, 0, 2), (16, 1, 1), (1, 8, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        assert default_workers(gpus) == expected


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes how Ray would be started, on a machine with 4 cores, no GPU and no cluster to join."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return calls


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_workers": 5}, ("resources.num_workers=5", "4 cores")),
        ({"num_workers": 2, "cpus_per_worker": 3}, ("resources.num_workers=2 x 3 CPUs", "4 cores")),
        ({"cpus_per_worker": 3}, ("resources.num_workers=2 x 3 CPUs", "4 cores")),
        ({"num_workers": "5..6"}, ("resources.num_workers=5..6", "4 cores")),
    ],
)
def test_more_workers_than_cores_are_refused_before_ray_starts(
    started: list[dict[str, Any]], settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="RAY_ADDRESS") as caught:
        connect(ResourceSettings(**settings))
    assert [word for word in words if word not in str(caught.value)] == []
    assert started == []


def test_a_cluster_for_several_runs_at_a_time(started: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"num_workers=2 x 1 CPUs in 3 trials at a time .* 4 cores"):
        connect(ResourceSettings(num_workers=2), runs=3)
    connect(ResourceSettings(num_workers=2), runs=2)
    assert [call["num_cpus"] for call in started] == [4 + 4]


@pytest.mark.parametrize(
    ("gpus", "settings", "num_cpus"),
    [
        (0, {}, 4 + 2),
        (0, {"num_workers": 4}, 4 + 4),
        (0, {"num_workers": "1..3"}, 4 + 3),
        (0, {"num_workers": "1..30"}, 4 + 4),
        (2, {}, 8 + 2),
        (1, {"num_workers": 1, "cpus_per_worker": 4}, 8 + 4),
    ],
)
def test_the_machines_own_cluster(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, Any], num_cpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    connect(ResourceSettings(**settings))
    (call,) = started
    assert (call["address"], call["num_cpus"], call["include_dashboard"]) == ("local", num_cpus, False)
    cluster(monkeypatch, cpus=num_cpus, gpus=gpus)
    allocate(ResourceSettings(**settings))  # what was started is enough


def test_a_cluster_is_joined_as_it_is(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connect(ResourceSettings(num_workers=100))
    (call,) = started
    assert not {"address", "num_cpus", "include_dashboard"} & set(call), "a joined cluster takes no such settings"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (
            RuntimeError("Last connection error: AuthenticationError: RPC error: InvalidAuthToken: ..."),
            r"10\.0\.0\.1:6379: the cluster refuses this machine's token \(401\)",
        ),
        (TimeoutError("timed out"), r"10\.0\.0\.1:6379: no cluster answers there \(Failed to connect\)"),
    ],
)
def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, cause: Exception, words: str) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect") from cause

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=words):
        connect(ResourceSettings())


def test_a_missing_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("Token authentication is enabled but no token was found")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        UserError, match=r"10\.0\.0\.1:6379: there is no token .* \(it would answer 401\); set RAY_AUTH_MODE=token"
    ):
        connect(ResourceSettings())


def test_ray_that_is_up_is_left_alone(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    connect(ResourceSettings(num_workers=100))
    assert started == []


def test_usage_statistics_are_off_unless_asked_for(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    connect(ResourceSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    connect(ResourceSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
