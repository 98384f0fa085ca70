"""A pretended connection to a cluster. Ray itself never starts."""

from __future__ import annotations

import os

import pytest
import ray

LARGEST = "msrn_ray.ray_cluster.allocation.max_cluster_resources"  # returns None where the cluster does not grow


def cluster(monkeypatch: pytest.MonkeyPatch, *, cpus: float, gpus: float | None = None, cores: int = 16) -> None:
    """Pretend to be connected to a cluster, from a machine with `cores`."""
    resources = {"CPU": cpus} | ({} if gpus is None else {"GPU": gpus})
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(LARGEST, lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
