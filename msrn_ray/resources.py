"""The Ray cluster a run gets: connecting, and how many workers it can have."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
import torch

from .config import ResourceSettings
from .errors import UserError


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


def connect(settings: ResourceSettings, *, runs: int = 1) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts one on this machine; does nothing where Ray is already up.

    A machine's own cluster has more logical CPUs than cores, since workers reserve some that decode tasks must not lack: a core for each
    decode task where workers train on the CPU too, two where GPUs train and decode tasks wait for files half of the time.

    Args:
        settings: what one training run takes.
        runs: training runs at the same time.

    Raises:
        UserError: if the machine has fewer cores than the workers need.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    cores = usable_cores()
    gpus = 0 if settings.use_gpu is False else torch.cuda.device_count()
    fewest, most = settings.worker_range or (default_workers(gpus),) * 2
    if runs * fewest * settings.cpus_per_worker > cores:
        at_once = f" in {runs} trials at a time" if runs > 1 else ""
        raise UserError(
            f"resources.num_workers={settings.num_workers or fewest} x {settings.cpus_per_worker} CPUs{at_once} are more than this"
            f" machine's {cores} cores; lower them, or join a cluster (RAY_ADDRESS)"
        )
    workers = min(most, cores // (runs * settings.cpus_per_worker))
    # Ray warns of more than four times as many processes; a run has about ten, most of which wait
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(cores, 8 * runs)))
    ray.init(
        address="local",
        num_cpus=(2 if gpus else 1) * cores + runs * workers * settings.cpus_per_worker,
        include_dashboard=settings.dashboard,
        _node_ip_address="127.0.0.1",
        **quiet,
    )


def usable_cores() -> int:
    """Cores that this process may use; where the system does not say (macOS), the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(num_gpus: int) -> int:
    """Every GPU of the cluster; without one 2 workers on a machine with two cores or more, else 1."""
    return num_gpus or (2 if usable_cores() >= 2 else 1)


def allocate(settings: ResourceSettings) -> Allocation:
    """Fits the settings to the cluster that is there.

    Raises:
        UserError: if they ask for more than there is, with both numbers; Ray itself would wait for ever.
    """
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), int(there.get("GPU", 0))
    use_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    room = int(cpus - 1) // settings.cpus_per_worker  # one CPU decodes
    fewest, most = settings.worker_range or (default_workers(gpus if use_gpu else 0),) * 2
    if settings.num_workers is None and not use_gpu:
        fewest = most = max(1, min(most, room))
    asked = settings.num_workers or fewest
    if use_gpu and fewest > gpus:
        raise UserError(
            f"resources.num_workers={asked} needs as many GPUs, the cluster has {gpus}; lower it or set resources.use_gpu false"
        )
    if fewest > room:
        raise UserError(
            f"resources.num_workers={asked} x {settings.cpus_per_worker} CPUs, and one for decoding, are more than the cluster's"
            f" {cpus:g} CPUs; lower resources.num_workers or resources.cpus_per_worker"
        )
    now = min(most, room, gpus) if use_gpu else min(most, room)
    if not use_gpu:
        most = now  # Ray would start workers on every CPU of a cluster that grows, and leave none that decodes
    elastic = (fewest, most) if fewest < most else None
    return Allocation(now, use_gpu, settings.cpus_per_worker, elastic, settings.gpus_per_worker)


def decode_cpus(num_workers: int, cpus_per_worker: int, runs: int = 1) -> float:
    """Logical CPUs of the cluster, as it is now, for the decode tasks of each worker; at least 1.

    Args:
        num_workers: of one run.
        cpus_per_worker: reserved by each worker.
        runs: runs with as many workers that share the cluster.

    Raises:
        UserError: if the workers leave none; they would wait for images for ever.
    """
    cpus, workers = ray.cluster_resources().get("CPU", 0.0), runs * num_workers
    free = cpus - workers * cpus_per_worker
    if free < 1:
        raise UserError(
            f"{workers} workers x {cpus_per_worker} CPUs leave none of the cluster's {cpus:g} CPUs for decoding; lower"
            " resources.num_workers"
        )
    return float(max(1, free // workers))
