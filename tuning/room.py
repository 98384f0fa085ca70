"""How many trials there is room for at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from msrn_ray.config import ResourceSettings
from msrn_ray.errors import UserError
from msrn_ray.resources import Allocation, usable_cores


def own_machine_runs(settings: ResourceSettings) -> int:
    """Trials at a time on a cluster that is started on this machine: a core, and its part of a GPU, for each worker."""
    workers, _ = settings.worker_range or (1, 1)
    room = usable_cores() // (workers * settings.cpus_per_worker)
    gpus = 0 if settings.use_gpu is False else torch.cuda.device_count()
    if gpus:
        room = min(room, gpus * _shares(settings.gpus_per_worker) // workers)
    return max(1, room)


def share(allocation: Allocation, asked: int | None, nodes: Sequence[Mapping[str, Any]]) -> Allocation:
    """The allocation of a trial, with how many of them run at a time.

    Tune does not count what a trial's workers take, so this does: trials that wait for each other's workers would wait for ever.

    Args:
        allocation: of one trial alone.
        asked: trials at a time, or None for as many as there is room for.
        nodes: of the cluster, as `ray.nodes()` gives them.

    Raises:
        UserError: if there is not room for as many as are asked for, with what there is.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(resources.get(name, 0.0) for resources in there) for name in ("CPU", "GPU"))
    takes = allocation.num_workers * allocation.cpus_per_worker
    room = min(sum(_workers(allocation, node) for node in there) // allocation.num_workers, int(cpus // (takes + 1)))
    each = f"{takes} CPUs for workers, 1 for decoding"
    if allocation.use_gpu:
        each += f", {allocation.num_workers * allocation.gpus_per_worker:g} GPUs"
    if (asked or 1) > room:
        raise UserError(
            f"--max-concurrent {asked or 1} has no room: a trial takes {each}; the cluster has {cpus:g} CPUs and {gpus:g} GPUs on"
            f" {len(there)} machines, enough for {room}"
        )
    return replace(allocation, runs=asked or room)


def _workers(allocation: Allocation, node: Mapping[str, float]) -> int:
    """Workers that fit on a node."""
    room = int(node.get("CPU", 0) // allocation.cpus_per_worker)
    if allocation.use_gpu:
        room = min(room, int(node.get("GPU", 0)) * _shares(allocation.gpus_per_worker))
    return room


def _shares(part: float) -> int:
    """How many parts of that size a GPU has; none goes over two GPUs."""
    return math.floor(1 / part + 1e-9)
