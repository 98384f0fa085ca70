"""The Ray cluster a run gets: connecting, and how many workers it can have."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray.autoscaler.sdk
import torch

from ..config import ResourceSettings
from ..errors import NoDecodeCpuError, UserError
from .cluster_yaml import can_grow_to
from .connection import default_workers, usable_cores
from .private_api import max_cluster_resources

# Between two requests for machines: a cluster has one request at a time, and runs that are going on overwrite it every 20 s
_ASK_SECONDS = 5.0


@dataclass(frozen=True)
class Allocation:
    """What the run takes.

    Attributes:
        num_workers: data-parallel train workers; of a range as many as there is room for now.
        use_gpu: one GPU a worker.
        cpus_per_worker: logical CPUs a worker reserves.
        elastic: fewest and most workers, where their number may change while the run goes on.
        gpus_per_worker: part of a GPU that a worker reserves where it has one.
        runs: runs like this one that share the cluster.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    elastic: tuple[int, int] | None = None
    gpus_per_worker: float = 1.0
    runs: int = 1


def allocate(settings: ResourceSettings) -> Allocation:
    """Fits the settings to the cluster, first waiting for the machines that one that grows will start for them.

    Raises:
        UserError: if they ask for more than there is or can be, with both numbers; Ray itself would wait for ever.
    """
    # None where nothing starts machines; a cluster of this process's own does not grow, whatever the machine's file says of another
    most = max_cluster_resources()
    if not most and os.environ.get("RAY_ADDRESS"):
        most = can_grow_to()
    if most:
        _wait_for_machines(settings, most)
    return fit(settings, *_there())


def fit(settings: ResourceSettings, cpus: float, gpus: int, owner: str = "the cluster has") -> Allocation:
    """What the settings take of so many CPUs and GPUs.

    Raises:
        UserError: if they ask for more, with both numbers; `owner` is in it.
    """
    use_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    room = int(cpus - 1) // settings.cpus_per_worker  # one CPU decodes
    fewest, most = settings.worker_range or (default_workers(gpus if use_gpu else 0),) * 2
    if settings.num_workers is None and not use_gpu:
        fewest = most = max(1, min(most, room))
    asked = settings.num_workers or fewest
    if use_gpu and fewest > gpus:
        raise UserError(
            f"resources.num_workers={asked} needs as many GPUs, {owner} {gpus}; lower it or set resources.use_gpu False"
        )
    if fewest > room:
        raise UserError(
            f"resources.num_workers={asked} x {settings.cpus_per_worker} CPUs, and one for decoding, are too many, {owner}"
            f" {cpus:g} CPUs; lower resources.num_workers or resources.cpus_per_worker"
        )
    now = min(most, room, gpus) if use_gpu else min(most, room)
    if not use_gpu:
        most = now  # Ray would start workers on every CPU of a cluster that grows, and leave none that decodes
    elastic = (fewest, most) if fewest < most else None
    return Allocation(now, use_gpu, settings.cpus_per_worker, elastic, settings.gpus_per_worker)


def with_fewer(before: Allocation, settings: ResourceSettings) -> Allocation | None:
    """What the cluster has room for now beside a CPU that decodes; None where that is not less than `before`."""
    if before.elastic is None:
        return None
    cpus, gpus = _there()
    after = fit(settings, cpus / before.runs, gpus)
    fewest, most = before.elastic[0], after.num_workers
    if most >= before.elastic[1]:
        return None
    return replace(after, elastic=(fewest, most) if fewest < most else None, runs=before.runs)


def _there() -> tuple[float, int]:
    """CPUs and GPUs of the cluster now."""
    there = ray.cluster_resources()
    return there.get("CPU", 0.0), int(there.get("GPU", 0))


def _wait_for_machines(settings: ResourceSettings, most: Mapping[str, int]) -> None:
    """Asks a cluster that grows for the machines that are missing, and waits for them.

    Raises:
        UserError: if it cannot grow so far, or they do not come in time.
    """
    cpus, gpus = _there()
    largest = max(float(most.get("CPU", 0)), cpus), max(int(most.get("GPU", 0)), gpus)
    if settings.worker_range is None:
        if settings.use_gpu is not False and largest[1] > gpus:
            raise UserError(
                f"the cluster has {gpus} GPUs now and can grow to {largest[1]}; say with resources.num_workers how many the run takes"
            )
        return
    allocation = fit(settings, *largest, owner="the cluster at its largest has")
    fewest = settings.worker_range[0]
    bundle = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if allocation.use_gpu else {})
    firmly = settings.model_copy(update={"use_gpu": allocation.use_gpu})
    end = time.monotonic() + 60 * settings.wait_minutes
    asked: float | None = None
    try:
        while not _is_enough(firmly):
            if asked is None:
                print(
                    f"waiting for machines for {fewest} workers; the cluster has {_there()[0]:g} CPUs and {_there()[1]} GPUs now",
                    flush=True,
                )
            if asked is None or time.monotonic() >= asked + _ASK_SECONDS:
                asked = time.monotonic()
                ray.autoscaler.sdk.request_resources(bundles=[*[bundle] * fewest, {"CPU": 1}])
            if time.monotonic() > end:
                try:
                    fit(
                        firmly,
                        *_there(),
                        owner=f"after resources.wait_minutes={settings.wait_minutes:g} the cluster has",
                    )
                except UserError as error:
                    raise UserError(f"{error}; `ray status` on the head says why none came") from None
            time.sleep(1)
    finally:
        if asked is not None:
            ray.autoscaler.sdk.request_resources(bundles=[])  # else they would stay for ever; now the workers hold them


def _is_enough(settings: ResourceSettings) -> bool:
    try:
        fit(settings, *_there())
    except UserError:
        return False
    return True


def decode_cpus(num_workers: int, cpus_per_worker: int, runs: int = 1) -> float:
    """Logical CPUs of the cluster, as it is now, for the decode tasks of each worker; at least 1.

    Args:
        num_workers: of one run.
        cpus_per_worker: reserved by each worker.
        runs: runs with as many workers that share the cluster.

    Raises:
        NoDecodeCpuError: if the workers leave none.
    """
    cpus, workers = ray.cluster_resources().get("CPU", 0.0), runs * num_workers
    free = cpus - workers * cpus_per_worker
    if free < 1:
        raise NoDecodeCpuError(
            f"{workers} workers x {cpus_per_worker} CPUs leave none of the cluster's {cpus:g} CPUs for decoding; lower"
            " resources.num_workers"
        )
    return float(max(1, free // workers))


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
