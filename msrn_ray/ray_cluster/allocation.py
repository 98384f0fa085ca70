"""Decides how many workers a run gets on the Ray cluster, and how many trials run at a time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray.autoscaler.sdk
import torch

from ..errors import NoDecodeCpuError, UserError
from ..settings import ResourceSettings
from .cluster_yaml import can_grow_to
from .connection import default_workers, usable_cores
from .private_api import max_cluster_resources

# A cluster holds one request for nodes at a time, and other runs overwrite it every 20 s: repeat ours more often
_REQUEST_SECONDS = 5.0


@dataclass(frozen=True)
class Allocation:
    """What a run takes of the cluster.

    Attributes:
        num_workers: data-parallel train workers. Of a range, as many as the cluster has room for.
        use_gpu: whether each worker has a GPU.
        cpus_per_worker: logical CPUs that a worker reserves.
        elastic: fewest and most workers, if their number may change during the run.
        gpus_per_worker: fraction of a GPU that a worker reserves if it has one.
        runs: runs like this one that share the cluster.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    elastic: tuple[int, int] | None = None
    gpus_per_worker: float = 1.0
    runs: int = 1


def allocate(settings: ResourceSettings) -> Allocation:
    """Fit the settings to the cluster. First wait for the nodes that an autoscaling cluster starts for them.

    Raises:
        UserError: if the settings need more than the cluster has or can have, with both numbers. Ray itself would wait forever.
    """
    largest = max_cluster_resources()
    # The file on this node describes another cluster if the run has started one of its own; such a cluster does not grow
    if not largest and os.environ.get("RAY_ADDRESS"):
        largest = can_grow_to()
    if largest:
        _wait_for_nodes(settings, largest)
    return fit(settings, *_cluster_size())


def fit(settings: ResourceSettings, cpus: float, gpus: int, cluster: str = "the cluster") -> Allocation:
    """Return what a run with these settings takes of so many CPUs and GPUs.

    Raises:
        UserError: if the settings need more, with both numbers. The message calls what has the CPUs and GPUs `cluster`.
    """
    use_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    cpu_room = _count_workers(settings, cpus - 1)  # one CPU decodes
    fewest, most = settings.worker_range or (default_workers(gpus if use_gpu else 0),) * 2
    if settings.num_workers is None and not use_gpu:
        fewest = most = max(1, min(most, cpu_room))
    requested = settings.num_workers or fewest
    if use_gpu and fewest > gpus:
        raise UserError(
            f"resources.num_workers={requested} needs as many GPUs, {cluster} has {gpus}; lower it or set resources.use_gpu False"
        )
    if fewest > cpu_room:
        raise UserError(
            f"resources.num_workers={requested} x {settings.cpus_per_worker} CPUs, and one for decoding, are too many, {cluster} has"
            f" {cpus:g} CPUs; lower resources.num_workers or resources.cpus_per_worker"
        )
    num_workers = min(most, cpu_room, gpus) if use_gpu else min(most, cpu_room)
    if not use_gpu:
        most = num_workers  # else Ray would start workers on every CPU of a growing cluster, and leave none to decode
    elastic = (fewest, most) if fewest < most else None
    return Allocation(num_workers, use_gpu, settings.cpus_per_worker, elastic, settings.gpus_per_worker)


def with_fewer(before: Allocation, settings: ResourceSettings) -> Allocation | None:
    """Return an allocation for what is left of the cluster, or None if it would not have fewer workers than `before`."""
    if before.elastic is None:
        return None
    cpus, gpus = _cluster_size()
    after = fit(settings, cpus / before.runs, gpus)
    fewest, most = before.elastic[0], after.num_workers
    if most >= before.elastic[1]:
        return None
    return replace(after, elastic=(fewest, most) if fewest < most else None, runs=before.runs)


def decode_cpus(num_workers: int, cpus_per_worker: int, runs: int = 1) -> float:
    """Return the logical CPUs of the present cluster for the decode tasks of each worker, at least 1.

    Args:
        num_workers: workers of one run.
        cpus_per_worker: CPUs that each worker reserves.
        runs: runs with as many workers that share the cluster.

    Raises:
        NoDecodeCpuError: if the workers leave none.
    """
    (cpus, _), workers = _cluster_size(), runs * num_workers
    free = cpus - workers * cpus_per_worker
    if free < 1:
        raise NoDecodeCpuError(
            f"{workers} workers x {cpus_per_worker} CPUs leave none of the cluster's {cpus:g} CPUs for decoding; lower"
            " resources.num_workers"
        )
    return float(max(1, free // workers))


def local_runs(settings: ResourceSettings) -> int:
    """Return how many trials run at a time on a cluster that this machine starts: each worker gets cores, and its part of a GPU."""
    workers, _ = settings.worker_range or (1, 1)
    gpus = 0 if settings.use_gpu is False else torch.cuda.device_count()
    room = _count_workers(settings, usable_cores(), gpus or None)
    return max(1, room // workers)


def share_cluster(allocation: Allocation, requested: int | None, nodes: Sequence[Mapping[str, Any]]) -> Allocation:
    """Return the allocation of a trial, with how many trials run at a time.

    Tune does not count what a trial's workers take. Without this count, trials would wait for each other's workers forever.

    Args:
        allocation: what one trial alone takes.
        requested: trials at a time, or None for as many as fit.
        nodes: the cluster's nodes, as `ray.nodes()` lists them.

    Raises:
        UserError: if the requested trials do not fit, with what the cluster has.
    """
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(size.get(name, 0.0) for size in sizes) for name in ("CPU", "GPU"))
    workers = sum(
        _count_workers(allocation, size.get("CPU", 0), int(size.get("GPU", 0)) if allocation.use_gpu else None)
        for size in sizes
    )
    worker_cpus = allocation.num_workers * allocation.cpus_per_worker
    room = min(workers // allocation.num_workers, int(cpus // (worker_cpus + 1)))
    runs = max(1, requested or room)
    if runs > room:
        needs = f"{worker_cpus} CPUs for workers, 1 for decoding"
        if allocation.use_gpu:
            needs += f", {allocation.num_workers * allocation.gpus_per_worker:g} GPUs"
        raise UserError(
            f"--max-concurrent {runs} has no room: a trial takes {needs}; the cluster has {cpus:g} CPUs and {gpus:g} GPUs on"
            f" {len(sizes)} nodes, enough for {room}"
        )
    return replace(allocation, runs=runs)


def _count_workers(share: ResourceSettings | Allocation, cpus: float, gpus: int | None = None) -> int:
    """Return how many workers fit on so many CPUs and GPUs.

    A worker's part of a GPU lies on one GPU.

    Args:
        share: what each worker reserves.
        cpus: CPUs of the workers.
        gpus: GPUs of the workers, or None for workers without a GPU.
    """
    room = int(cpus // share.cpus_per_worker)
    return room if gpus is None else min(room, gpus * math.floor(1 / share.gpus_per_worker + 1e-9))


def _cluster_size() -> tuple[float, int]:
    """Return the CPUs and GPUs of the present cluster."""
    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), int(resources.get("GPU", 0))


def _wait_for_nodes(settings: ResourceSettings, largest: Mapping[str, int]) -> None:
    """Request the missing nodes of a cluster that grows up to `largest`, and wait for them.

    Raises:
        UserError: if it cannot grow so far, or the nodes do not come in time.
    """
    cpus, gpus = _cluster_size()
    max_cpus, max_gpus = max(float(largest.get("CPU", 0)), cpus), max(int(largest.get("GPU", 0)), gpus)
    worker_range = settings.worker_range
    if worker_range is None:
        if settings.use_gpu is not False and max_gpus > gpus:
            raise UserError(
                f"the cluster has {gpus} GPUs now and can grow to {max_gpus}; say with resources.num_workers how many the run takes"
            )
        return
    use_gpu = fit(settings, max_cpus, max_gpus, "the cluster at its largest").use_gpu
    settings = settings.model_copy(update={"use_gpu": use_gpu})  # a GPU node may still be missing
    if _shortage(settings) is None:
        return
    workers = worker_range[0] * [{"CPU": settings.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})]
    print(
        f"waiting for nodes for {len(workers)} workers; the cluster has {cpus:g} CPUs and {gpus} GPUs now", flush=True
    )
    deadline, next_request = time.monotonic() + 60 * settings.wait_minutes, 0.0
    try:
        while (shortage := _shortage(settings)) is not None:
            if time.monotonic() >= next_request:
                next_request = time.monotonic() + _REQUEST_SECONDS
                ray.autoscaler.sdk.request_resources(bundles=[*workers, {"CPU": 1}])
            if time.monotonic() > deadline:
                raise UserError(f"{shortage}; `ray status` on the head says why none came")
            time.sleep(1)
    finally:
        # else the nodes would stay forever; the workers keep them
        ray.autoscaler.sdk.request_resources(bundles=[])


def _shortage(settings: ResourceSettings) -> UserError | None:
    """Return what the present cluster lacks, or None."""
    try:
        fit(settings, *_cluster_size(), f"after resources.wait_minutes={settings.wait_minutes:g} the cluster")
    except UserError as error:
        return error
    return None
