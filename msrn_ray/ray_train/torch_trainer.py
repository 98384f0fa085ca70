"""Builds the TorchTrainer that training and search share, and the data its workers get."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train.torch
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from torch import Tensor

from ..config import ExperimentConfig
from ..labels.graph import LabelCounts
from ..ray_cluster.allocation import Allocation
from ..ray_cluster.connection import is_own_cluster
from ..training.inputs import TrainingInputs
from .checkpoints import SCORE
from .elastic_fit import ROOM_SECONDS
from .failures import Failures
from .worker import train_loop_per_worker


@dataclass(frozen=True)
class StoredInputs:
    """TrainingInputs where workers find them: the sample tables are in the object store, so that runs side by side share them.

    Attributes:
        tables: those of train, val and, where there is one, test.
        sizes: images of train, val and test.
        counts, word_vectors, frequency: see `TrainingInputs`.
        data: what `describe_data` says of them.
    """

    tables: dict[str, ray.ObjectRef[pa.Table]]
    sizes: dict[str, int]
    counts: LabelCounts
    word_vectors: Tensor
    frequency: Tensor
    data: dict[str, str]


def store_inputs(inputs: TrainingInputs, data: dict[str, str]) -> StoredInputs:
    """Puts the sample tables into the object store; Ray must be up."""
    splits = {"train": inputs.splits.train, "val": inputs.splits.val, "test": inputs.splits.test}
    tables = {name: ray.put(split.table) for name, split in splits.items() if split is not None}
    sizes = {name: len(split) if split is not None else 0 for name, split in splits.items()}
    return StoredInputs(tables, sizes, inputs.counts, inputs.word_vectors, inputs.frequency, data)


def build_trainer(
    config: ExperimentConfig,
    stored: StoredInputs,
    allocation: Allocation,
    *,
    run_name: str,
    events: Queue,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> TorchTrainer:
    """The TorchTrainer of a training run; Ray must be up.

    Args:
        config: the experiment; `train.storage` holds the run folder.
        stored: what `store_inputs` returned.
        allocation: workers.
        run_name: name of the run folder; the same name again goes on from its last checkpoint.
        events: gets rank 0's progress events and the signs of life of all ranks.
        callbacks: passed to Ray Train (Tune's reporting, for one).
    """
    # how long until a checkpoint is listed, a lost worker or the end is seen; Ray Train's own is 2 s
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # after the loss of a node Ray Train asks for as many workers as before once more, for 60 s by default
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{ROOM_SECONDS:g}")
    # the process that listens for a machine's notice of its end; nobody gives one to a cluster that was started for this run
    if is_own_cluster():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    loop_config = {
        "config": config.to_dict(),
        "tables": stored.tables,
        "sizes": stored.sizes,
        "counts": stored.counts,
        "word_vectors": stored.word_vectors,
        "frequency": stored.frequency,
        "fingerprint": stored.data["fingerprint"],
        "folder": str(Path(config.train.storage) / run_name),
        "events": events,
        "run_name": run_name,
        "runs": allocation.runs,
    }
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config=loop_config,
        scaling_config=scaling(allocation),
        run_config=run_config(
            run_name,
            config.train.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                # tries to find room over the whole run; where the watchdog can interrupt Ray Train, it limits each wait instead
                controller_failure_limit=-1  # type: ignore[call-arg]  # typed as V1
                if threading.current_thread() is threading.main_thread()
                else math.ceil(60 * config.resources.wait_minutes / ROOM_SECONDS),
            ),
            callbacks=[Failures(events), *callbacks],
        ),
    )


def run_config(name: str, storage: str, **settings: Any) -> ray.train.RunConfig:
    """Ray Train's run settings, with its own log lines quieted: a user sees the project's.

    Workers take large tensors from the system in pages of 2 MB, which it hands out much faster than 512 small ones. Their threads sleep
    where they wait for each other: to spin takes cores from decoding, and from the thread that is waited for.
    """
    quiet = ray.train.LoggingConfig(log_level="ERROR")
    waiting = os.environ.get("OMP_WAIT_POLICY", "passive")
    environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": waiting}}
    return ray.train.RunConfig(
        name=name, storage_path=storage, logging_config=quiet, worker_runtime_env=environment, **settings
    )  # type: ignore[call-arg]  # typed as Train V1


def scaling(allocation: Allocation) -> ray.train.ScalingConfig:
    """Ray Train's scaling for an allocation."""
    return ray.train.ScalingConfig(
        num_workers=allocation.elastic or allocation.num_workers,  # type: ignore[arg-type]  # typed as Train V1
        elastic_resize_monitor_interval_s=ROOM_SECONDS,  # type: ignore[call-arg]  # alike
        use_gpu=allocation.use_gpu,
        resources_per_worker={"CPU": allocation.cpus_per_worker}
        | ({"GPU": allocation.gpus_per_worker} if allocation.use_gpu else {}),
    )
