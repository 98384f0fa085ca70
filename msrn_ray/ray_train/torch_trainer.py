"""Builds the TorchTrainer that training and search share."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from ..ray_cluster.allocation import Allocation
from ..ray_cluster.connection import is_local_cluster
from .checkpoints import SCORE
from .elastic_fit import ROOM_SECONDS
from .failures import FailureCallback
from .worker_input import WorkerInput


def build_trainer(
    train_worker: Callable[[dict[str, Any]], None],
    worker_input: WorkerInput,
    callbacks: Sequence[ray.train.UserCallback],
    allocation: Allocation,
) -> TorchTrainer:
    """Build the TorchTrainer of a training run; Ray must be up.

    Args:
        train_worker: what each worker runs, with `{"input": worker_input}`.
        worker_input: the run. A run folder that exists resumes from its last checkpoint.
        callbacks: passed to Ray Train (Tune's reporting, for example).
        allocation: workers.
    """
    config = worker_input.config
    # how soon Ray Train lists a checkpoint and notices a lost worker or the end; its default is 2 s
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # after the loss of a node Ray Train requests as many workers as before once more, for 60 s by default
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{ROOM_SECONDS:g}")
    # this process listens for preemption notices; a cluster that was started for this run gets none
    if is_local_cluster():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # The whole run may search for room without limit, because the watchdog limits each wait. Outside the main thread the watchdog cannot
    # interrupt Ray Train, so its own count limits each wait
    is_main = threading.current_thread() is threading.main_thread()
    room_failures = -1 if is_main else math.ceil(60 * config.resources.wait_minutes / ROOM_SECONDS)
    return TorchTrainer(
        train_worker,
        train_loop_config={"input": worker_input},
        scaling_config=scaling_config(allocation),
        run_config=run_config(
            worker_input.folder.name,
            config.train.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                controller_failure_limit=room_failures,  # type: ignore[call-arg]  # typed as Train V1
            ),
            callbacks=[FailureCallback(worker_input.events), *callbacks],
        ),
    )


def run_config(name: str, storage: str, **settings: Any) -> ray.train.RunConfig:
    """Return Ray Train's run settings without its own log lines.

    Workers take large tensors from the system in pages of 2 MB, which it provides much faster than 512 small ones. Their threads sleep
    while they wait for each other: spinning threads would steal CPU time from decoding and from the thread that they wait for.
    """
    quiet = ray.train.LoggingConfig(log_level="ERROR")
    wait_policy = os.environ.get("OMP_WAIT_POLICY", "passive")
    environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": wait_policy}}
    return ray.train.RunConfig(
        name=name, storage_path=storage, logging_config=quiet, worker_runtime_env=environment, **settings
    )  # type: ignore[call-arg]  # typed as Train V1


def scaling_config(allocation: Allocation) -> ray.train.ScalingConfig:
    """Return Ray Train's scaling settings for an allocation."""
    resources = {"CPU": float(allocation.cpus_per_worker)}
    if allocation.use_gpu:
        resources["GPU"] = allocation.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=allocation.elastic or allocation.num_workers,  # type: ignore[arg-type]  # typed as Train V1
        elastic_resize_monitor_interval_s=ROOM_SECONDS,  # type: ignore[call-arg]  # typed as Train V1
        use_gpu=allocation.use_gpu,
        resources_per_worker=resources,
    )
