"""How many trials run side by side on a cluster, and on this machine."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import Allocation, local_runs, share_cluster
from msrn_ray.settings import ResourceSettings


def nodes(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """Return what `ray.nodes()` returns for nodes of so many CPUs and GPUs."""
    return [
        {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}
        for cpus, gpus in sizes
    ]


@pytest.mark.parametrize(
    ("cpus", "gpus", "allocation", "requested", "expected"),
    [
        (4, 0, Allocation(1, False, 1), None, 2),
        (4, 0, Allocation(1, False, 1), 1, 1),
        (16, 0, Allocation(2, False, 1), None, 5),
        (16, 0, Allocation(2, False, 3), 2, 2),
        (36, 4, Allocation(1, True, 1), None, 4),
        (36, 4, Allocation(2, True, 1), None, 2),
        (36, 2, Allocation(1, True, 1, gpus_per_worker=0.3), None, 6),
        (9, 8, Allocation(1, True, 1), None, 4),
        (4, 2, Allocation(1, True, 1, gpus_per_worker=0.5), 2, 2),
    ],
)
def test_trials_at_a_time(cpus: int, gpus: int, allocation: Allocation, requested: int | None, expected: int) -> None:
    shared = share_cluster(allocation, requested, nodes((cpus, gpus)))
    assert shared == replace(allocation, runs=expected)
    assert expected * (allocation.num_workers * allocation.cpus_per_worker + 1) <= cpus, "each can decode"
    assert not allocation.use_gpu or expected * allocation.num_workers * allocation.gpus_per_worker <= gpus


@pytest.mark.parametrize(
    ("cores", "gpus", "settings", "expected"),
    [
        (2, 0, {"num_workers": 1}, 2),
        (2, 0, {"num_workers": 2}, 1),
        (1, 0, {"num_workers": 2}, 1),
        (16, 0, {"num_workers": 2, "cpus_per_worker": 3}, 2),
        (16, 2, {"num_workers": 1}, 2),
        (16, 2, {"num_workers": 1, "gpus_per_worker": 0.1}, 16),
        (16, 2, {"num_workers": 1, "use_gpu": False}, 16),
    ],
)
def test_trials_at_a_time_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, settings: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert local_runs(ResourceSettings(**settings)) == expected


def test_too_many_trials_error_names_both_sides() -> None:
    with pytest.raises(UserError, match=r"--max-concurrent 3 .*2 CPUs for workers, 1 for decoding.* 8 CPUs.*for 2"):
        share_cluster(Allocation(2, False, 1), 3, nodes((8, 0)))
    with pytest.raises(UserError, match=r"--max-concurrent 3 .*1 GPUs; the cluster has 64 CPUs and 2 GPUs"):
        share_cluster(Allocation(1, True, 1), 3, nodes((64, 2)))


@pytest.mark.parametrize(
    ("sizes", "allocation", "expected"),
    [
        ([(8, 0)] * 4, Allocation(1, False, 5), 4),  # three CPUs of each node are left over
        ([(8, 0)] * 4, Allocation(2, False, 4), 3),
        ([(2, 0), (8, 2)], Allocation(1, True, 1, gpus_per_worker=0.4), 4),  # two shares per GPU
        ([(8, 2)], Allocation(1, True, 1, gpus_per_worker=0.6), 2),
        ([(64, 0), (4, 1), (4, 1)], Allocation(2, True, 2), 1),
    ],
)
def test_no_worker_spans_two_nodes_or_gpus(sizes: list[tuple[int, int]], allocation: Allocation, expected: int) -> None:
    assert share_cluster(allocation, None, nodes(*sizes)).runs == expected
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    assert share_cluster(allocation, None, [*nodes(*sizes), dead]).runs == expected
    wide = replace(allocation, cpus_per_worker=65)
    with pytest.raises(UserError, match="enough for 0"):
        share_cluster(wide, None, nodes(*sizes))
