"""Connects to a Ray cluster, or starts one on this machine, and checks that its nodes share a folder."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray.autoscaler.sdk
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..config import ResourceSettings
from ..errors import UserError
from .private_api import request_drain

OWN_ADDRESS = "127.0.0.1"  # of a cluster that `connect` starts: no other machine can reach it


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
        _node_ip_address=OWN_ADDRESS,
        **quiet,
    )


def is_own_cluster() -> bool:
    """Whether `connect` started the cluster on this machine, where no other can join it."""
    return all(node["NodeManagerAddress"] == OWN_ADDRESS for node in ray.nodes())


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


def drain_node(node: str, why: str, others: Collection[str] = ()) -> bool:
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
    accepted, refusal = request_drain(node, why)
    if not accepted:
        raise UserError(f"{why}, and Ray does not take it out of use ({refusal}); stop Ray there")
    return True
