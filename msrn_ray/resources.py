"""The Ray cluster a run gets: connecting, and how many workers it can have."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.autoscaler.sdk
import torch
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .cluster_file import can_grow_to
from .config import ResourceSettings
from .errors import NoDecodeCpuError, UserError

# Between two requests for machines: a cluster has one request at a time, and runs that are going on overwrite it every 20 s
_ASK_SECONDS = 5.0
_OWN_ADDRESS = "127.0.0.1"  # of a cluster that `connect` starts: no other machine can reach it


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
        UserError: if the cluster cannot be joined, or the machine has fewer cores than the workers need.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(**quiet)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise UserError(_why_not_joined(address, error)) from None
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
        _node_ip_address=_OWN_ADDRESS,
        **quiet,
    )


def is_own_cluster() -> bool:
    """Whether `connect` started the cluster on this machine, where no other can join it."""
    return all(node["NodeManagerAddress"] == _OWN_ADDRESS for node in ray.nodes())


def _why_not_joined(address: str, error: Exception) -> str:
    mend = "set RAY_AUTH_MODE=token, with the token that it was started with in ~/.ray/auth_token or RAY_AUTH_TOKEN"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return f"RAY_ADDRESS {address}: there is no token for the cluster on this machine (it would answer 401); {mend}"
    if "InvalidAuthToken" in str(error.__cause__):  # Ray has put it into words
        return f"RAY_ADDRESS {address}: the cluster refuses this machine's token (401); {mend}"
    return f"RAY_ADDRESS {address}: no cluster answers there ({error})"


def usable_cores() -> int:
    """Cores that this process may use; where the system does not say (macOS), the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(num_gpus: int) -> int:
    """Every GPU of the cluster; without one 2 workers on a machine with two cores or more, else 1."""
    return num_gpus or (2 if usable_cores() >= 2 else 1)


def allocate(settings: ResourceSettings) -> Allocation:
    """Fits the settings to the cluster, first waiting for the machines that one that grows will start for them.

    Raises:
        UserError: if they ask for more than there is or can be, with both numbers; Ray itself would wait for ever.
    """
    # None where nothing starts machines; a cluster of this process's own does not grow, whatever the machine's file says of another
    most = ray._private.state.state.get_max_resources_from_cluster_config()
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


def check_shared(storage: Path) -> None:
    """Refuses a folder for runs that some node of the cluster does not see: the driver leaves a file in it, and every node looks for that.

    Raises:
        UserError: with the nodes that do not see it.
        OSError: if the folder cannot be written.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) == 1:
        return
    storage.mkdir(parents=True, exist_ok=True)
    probe = storage / f".probe_{secrets.token_hex(8)}"
    probe.touch()
    try:
        looks = {node: _look(node, str(probe)) for node in nodes}  # all at once
        blind = [address for node, address in nodes.items() if not _is_seen(looks[node])]
    finally:
        probe.unlink()
    if blind:
        raise UserError(
            f"train.storage {storage}: not the same folder on {', '.join(sorted(blind))} as where the run was started; give one that every"
            " node has mounted"
        )


def _look(node: str, path: str) -> ray.ObjectRef[bool]:
    return _exists.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path)


def _is_seen(look: ray.ObjectRef[bool]) -> bool:
    try:
        return bool(ray.get(look, timeout=120))
    except ray.exceptions.RayError:  # the node was lost meanwhile, or it does not answer; no storage will mend that
        return True


@ray.remote(num_cpus=0, max_retries=0)
def _exists(path: str) -> bool:
    return os.path.exists(path)


def set_aside(node: str, why: str, others: Collection[str] = ()) -> bool:
    """Tells Ray to start nothing new on a machine; what runs there stays. That lasts until Ray on it is started again.

    Args:
        node: its id in Ray.
        why: for Ray's own log.
        others: ids of those that were set aside before.

    Returns:
        False where no machine would be left to go on with, and nothing was done.

    Raises:
        UserError: if Ray refuses.
    """
    left = {each["NodeID"] for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")} - {node, *others}
    if not left:
        return False
    # the reason decides what runs do, and they save; 0: no end is set to what runs there
    messages: Any = autoscaler_pb2
    driver: Any = ray._private.worker.global_worker
    accepted, refusal = driver.gcs_client.drain_node(node, messages.DRAIN_NODE_REASON_PREEMPTION, why, 0)
    if not accepted:
        raise UserError(f"{why}, and Ray does not take it out of use ({refusal}); stop Ray there")
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
