"""How many trials there is room for at a time."""

from __future__ import annotations

import math
from dataclasses import replace

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
        room = min(room, math.floor(gpus / (workers * settings.gpus_per_worker) + 1e-9))
    return max(1, room)


def share(allocation: Allocation, asked: int | None, there: dict[str, float]) -> Allocation:
    """The allocation of a trial, with how many of them run at a time.

    Tune does not count what a trial's workers take, so this does: trials that wait for each other's workers would wait for ever.

    Args:
        allocation: of one trial alone.
        asked: trials at a time, or None for as many as there is room for.
        there: the cluster's resources.

    Raises:
        UserError: if there is not room for as many as are asked for, with what there is.
    """
    cpus = allocation.num_workers * allocation.cpus_per_worker
    room = math.floor(there["CPU"] / (cpus + 1))
    each = f"{cpus} CPUs for workers, 1 for decoding"
    if allocation.use_gpu:
        gpus = allocation.num_workers * allocation.gpus_per_worker
        room = min(room, math.floor(there["GPU"] / gpus + 1e-9))
        each += f", {gpus:g} GPUs"
    if (asked or 1) > room:
        have = f"{there['CPU']:g} CPUs and {there.get('GPU', 0):g} GPUs"
        raise UserError(
            f"--max-concurrent {asked or 1} has no room: a trial takes {each}; the cluster has {have}, enough for {room}"
        )
    return replace(allocation, runs=asked or room)
