"""Connects to a Ray cluster, or starts one on this machine. Checks its shared folder, and drains its nodes."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import UserError
from ..settings import ResourceSettings
from .private_api import request_drain

LOCAL_ADDRESS = "127.0.0.1"  # of a cluster that `connect` starts: no other machine can reach it


def connect(settings: ResourceSettings, *, runs: int = 1) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine. Do nothing if Ray is up already.

    A cluster on this machine has more logical CPUs than cores, because train workers reserve CPUs that decode tasks need too. Each core
    counts once for decode tasks if workers train on the CPU. It counts twice if GPUs train, because decode tasks wait for files half of
    the time.

    Args:
        settings: what one training run takes.
        runs: training runs at the same time.

    Raises:
        UserError: if Ray cannot join the cluster, or the machine has fewer cores than the workers need.
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
            raise UserError(_describe_refusal(address, error)) from None
        return
    cores = usable_cores()
    gpus = 0 if settings.use_gpu is False else torch.cuda.device_count()
    fewest, most = settings.worker_range or (default_workers(gpus),) * 2
    if runs * fewest * settings.cpus_per_worker > cores:
        at_a_time = f" in {runs} trials at a time" if runs > 1 else ""
        raise UserError(
            f"resources.num_workers={settings.num_workers or fewest} x {settings.cpus_per_worker} CPUs{at_a_time} are more than this"
            f" machine's {cores} cores; lower them, or join a cluster (RAY_ADDRESS)"
        )
    workers = min(most, cores // (runs * settings.cpus_per_worker))
    # Ray warns of more than four times as many processes. A run has about ten, and most of them wait
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(cores, 8 * runs)))
    ray.init(
        address="local",
        num_cpus=(2 if gpus else 1) * cores + runs * workers * settings.cpus_per_worker,
        include_dashboard=settings.dashboard,
        _node_ip_address=LOCAL_ADDRESS,
        **quiet,
    )


def is_local_cluster() -> bool:
    """Return whether `connect` started the cluster on this machine, where no other machine can join it."""
    return all(node["NodeManagerAddress"] == LOCAL_ADDRESS for node in ray.nodes())


def _describe_refusal(address: str, error: Exception) -> str:
    fix = "set RAY_AUTH_MODE=token, with the token that it was started with in ~/.ray/auth_token or RAY_AUTH_TOKEN"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return f"RAY_ADDRESS {address}: there is no token for the cluster on this machine (it would answer 401); {fix}"
    if "InvalidAuthToken" in str(error.__cause__):  # Ray gives the cluster's answer as text only
        return f"RAY_ADDRESS {address}: the cluster refuses this machine's token (401); {fix}"
    return f"RAY_ADDRESS {address}: no cluster answers there ({error})"


def usable_cores() -> int:
    """Return the cores that this process may use. macOS does not say, so there it is all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(num_gpus: int) -> int:
    """Return one worker per GPU of the cluster. Without a GPU, return 2 on a machine with two cores or more, else 1."""
    return num_gpus or (2 if usable_cores() >= 2 else 1)


def on_node(node: str | None = None) -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that places a task or actor on the node with this id, by default on this node."""
    return NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)


def this_node() -> dict[str, Any]:
    """Return Ray's description of the node that this process runs on."""
    node_id = ray.get_runtime_context().get_node_id()
    return next(node for node in ray.nodes() if node["NodeID"] == node_id)


def check_shared(storage: Path) -> None:
    """Refuse a folder for runs that some node does not see. The driver writes a file into it, and every node looks for that file.

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
        # all nodes at once
        answers = {node: _exists.options(scheduling_strategy=on_node(node)).remote(str(probe)) for node in nodes}
        blind = [address for node, address in nodes.items() if not _is_seen(answers[node])]
    finally:
        probe.unlink()
    if blind:
        raise UserError(
            f"train.storage {storage}: not the same folder on {', '.join(sorted(blind))} as where the run was started; give one that every"
            " node has mounted"
        )


def _is_seen(answer: ray.ObjectRef[bool]) -> bool:
    try:
        return bool(ray.get(answer, timeout=120))
    except ray.exceptions.RayError:  # Ray has lost the node, or the node does not answer: another folder would not help
        return True


@ray.remote(num_cpus=0, max_retries=0)
def _exists(path: str) -> bool:
    return os.path.exists(path)


def drain_node(node: str, reason: str, drained_before: Collection[str] = ()) -> bool:
    """Tell Ray to start nothing new on a node, until Ray on that node starts again. What runs there continues.

    Args:
        node: its id in Ray.
        reason: for Ray's log.
        drained_before: ids of the nodes that were drained before.

    Returns:
        False if no other node would be left to continue on. Then nothing is done.

    Raises:
        UserError: if Ray refuses.
    """
    usable = {other["NodeID"] for other in ray.nodes() if other["Alive"] and other["Resources"].get("CPU")}
    if not usable - {node, *drained_before}:
        return False
    accepted, refusal = request_drain(node, reason)
    if not accepted:
        raise UserError(f"{reason}, and Ray does not take it out of use ({refusal}); stop Ray there")
    return True
