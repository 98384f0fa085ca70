"""How a run joins a cluster or starts one on this machine. Ray itself never starts."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
import torch

from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import allocate
from msrn_ray.ray_cluster.connection import connect, default_workers
from msrn_ray.settings import ResourceSettings

from .fake_cluster import cluster


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gpus, expected in ((1, 0, 1), (2, 0, 2), (16, 0, 2), (16, 1, 1), (1, 8, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        assert default_workers(gpus) == expected


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record how Ray would start, on a machine with 4 cores, no GPU and no cluster to join."""
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
def test_more_workers_than_cores_are_refused(
    started: list[dict[str, Any]], settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="RAY_ADDRESS") as caught:
        connect(ResourceSettings(**settings))
    assert [word for word in words if word not in str(caught.value)] == []
    assert started == []


def test_local_cluster_for_several_runs(started: list[dict[str, Any]]) -> None:
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
def test_local_cluster(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, Any], num_cpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    connect(ResourceSettings(**settings))
    (call,) = started
    assert (call["address"], call["num_cpus"], call["include_dashboard"]) == ("local", num_cpus, False)
    cluster(monkeypatch, cpus=num_cpus, gpus=gpus)
    allocate(ResourceSettings(**settings))  # the cluster is large enough


def test_connect_joins_a_cluster_unchanged(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_failed_connection_names_the_cause(monkeypatch: pytest.MonkeyPatch, cause: Exception, words: str) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect") from cause

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=words):
        connect(ResourceSettings())


def test_missing_token_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("Token authentication is enabled but no token was found")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        UserError, match=r"10\.0\.0\.1:6379: there is no token .* \(it would answer 401\); set RAY_AUTH_MODE=token"
    ):
        connect(ResourceSettings())


def test_connect_leaves_a_running_ray_alone(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    connect(ResourceSettings(num_workers=100))
    assert started == []


def test_usage_statistics_are_off_by_default(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    connect(ResourceSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    connect(ResourceSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
