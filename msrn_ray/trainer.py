"""Ray Train around the engine: `build_trainer` is the one builder that training and search use.

Data: sample tables go into the object store once; each worker streams its share through `pipeline`; rank 0 sends plain events to the
driver and reports metrics and checkpoints to Ray Train.
"""

from __future__ import annotations

import _thread
import json
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from .checkpoint import find_model_file, load_checkpoint
from .config import ExperimentConfig
from .errors import UserError
from .failures import Failures
from .fitting import ROOM_SECONDS, run_elastic
from .label_graph import LabelCounts
from .listening import listening
from .materials import Materials, describe, gather_materials
from .resources import Allocation, allocate, check_shared, connect, is_own_cluster
from .resuming import DATA_FILE, check_batch, check_data, check_list, check_resumable, describe_data
from .run_log import RunLog
from .run_state import CONFIG_FILE, FAILURE_FILE, check_stopped, kept_state
from .saving import SCORE
from .watchdog import Watchdog
from .word_vectors import LEARNED
from .worker import train_loop_per_worker


@dataclass(frozen=True)
class TrainResult:
    """Where a run lies and how good it is.

    Attributes:
        run_folder: config, metrics, curves, checkpoints.
        best_checkpoint: folder of the best epoch.
        metrics: `val/...` of the best epoch, `test/...` of the same weights where the protocol has a test split.
    """

    run_folder: Path
    best_checkpoint: Path
    metrics: dict[str, float]


@dataclass(frozen=True)
class Placed:
    """Materials where workers find them: the sample tables are in the object store, so that runs side by side share them.

    Attributes:
        tables: those of train, val and, where there is one, test.
        sizes: images of train, val and test.
        counts, word_vectors, frequency: see `Materials`.
        data: what `describe_data` says of them.
    """

    tables: dict[str, ray.ObjectRef[pa.Table]]
    sizes: dict[str, int]
    counts: LabelCounts
    word_vectors: Tensor
    frequency: Tensor
    data: dict[str, str]


def place(materials: Materials, data: dict[str, str]) -> Placed:
    """Puts the sample tables into the object store; Ray must be up."""
    splits = {"train": materials.splits.train, "val": materials.splits.val, "test": materials.splits.test}
    tables = {name: ray.put(split.table) for name, split in splits.items() if split is not None}
    sizes = {name: len(split) if split is not None else 0 for name, split in splits.items()}
    return Placed(tables, sizes, materials.counts, materials.word_vectors, materials.frequency, data)


def build_trainer(
    config: ExperimentConfig,
    placed: Placed,
    allocation: Allocation,
    *,
    run_name: str,
    events: Queue,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> TorchTrainer:
    """The TorchTrainer of a training run; Ray must be up.

    Args:
        config: the experiment; `train.storage` holds the run folder.
        placed: what `place` gave.
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
        "tables": placed.tables,
        "sizes": placed.sizes,
        "counts": placed.counts,
        "word_vectors": placed.word_vectors,
        "frequency": placed.frequency,
        "fingerprint": placed.data["fingerprint"],
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


def absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The config with absolute local paths: workers may have another working directory, and a saved config is run from anywhere."""
    if "://" in config.train.storage:
        raise UserError(
            f"train.storage {config.train.storage}: give a folder; on a cluster one that every node has mounted"
        )
    changes: dict[str, str] = {"train.storage": _absolute(config.train.storage)}
    for name in ("root", "labels", "word_vectors", "label_counts"):
        value = getattr(config.data, name)
        if value is not None and "://" not in value and (name, value) != ("word_vectors", LEARNED):
            changes[f"data.{name}"] = _absolute(value)
    weights = config.model.pretrained
    if weights is not None and Path(weights).expanduser().exists():
        changes["model.pretrained"] = _absolute(weights)
    return config.with_overrides(changes)


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # links stay: a manifest's images lie where its link does


def train(config: ExperimentConfig, *, resume: bool = False) -> TrainResult:
    """Trains from start to end, with progress on the terminal and a run folder as the result.

    Args:
        config: the experiment. The run folder is `train.storage`/`train.run_name`.
        resume: go on from the last checkpoint of that run folder instead of refusing it.

    Raises:
        UserError: for input that the user can mend, before anything is written where that is possible.
    """
    config = absolute_paths(config)
    name = config.train.run_name or f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.with_overrides({"train.run_name": name})
    folder = Path(config.train.storage) / name
    if resume:
        check_resumable(folder, config)
        check_stopped(folder)
    if not resume and folder.exists():
        raise UserError(f"{folder} exists already; give another train.run_name, or --resume {folder}")
    materials = gather_materials(config)
    check_batch(config, len(materials.splits.train))
    data = describe_data(materials.splits, config)
    if resume:
        check_data(folder, data)
        if check_list(folder):
            print("its first checkpoint was cut off before Ray Train knew of it; the run begins anew", flush=True)
    for line in describe(materials, config):
        print(line, flush=True)
    print("starting Ray and the workers (the first run on a machine also compiles kernels)", flush=True)
    # whoever resumes the same run while this one still waits for machines must see that it goes on
    with kept_state(folder) if resume else nullcontext():
        connect(config.resources)
        allocation = allocate(config.resources)
        try:
            log, _ = run_in_folder(config, place(materials, data), allocation, fresh=not resume)
        except KeyboardInterrupt:
            print(f"interrupted; go on with: msrn train --resume {folder}", file=sys.stderr)
            raise
        except ray.train.TrainingFailedError:
            print(
                f"the run stopped; once the cause is mended, go on with: msrn train --resume {folder}", file=sys.stderr
            )
            raise
    best = find_model_file(folder).parent
    metrics = {key: value for key, value in load_checkpoint(best).metrics.items() if key.startswith("val/")} | log.test
    return TrainResult(folder, best, metrics)


def run_in_folder(
    config: ExperimentConfig,
    placed: Placed,
    allocation: Allocation,
    callbacks: Sequence[ray.train.UserCallback] = (),
    *,
    fresh: bool = False,
) -> tuple[RunLog, ray.train.Result]:
    """Trains into the run folder `train.storage`/`train.run_name`: keeps its files and ends workers that hang.

    Args:
        config, placed, allocation, callbacks: see `build_trainer`.
        fresh: the folder must not be there yet.

    Returns:
        The run's log, and what Ray Train says of the run.

    Raises:
        UserError: for what the user can mend; it is in the folder's FAILURE_FILE too.
        ray.train.TrainingFailedError: for anything else.
    """
    assert config.train.run_name is not None
    folder = Path(config.train.storage) / config.train.run_name
    open_folder(folder, config, placed.data, fresh=fresh)
    log = RunLog(folder)
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # else it is lost with another node
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # likewise Ray Data's own, if no job before has one: it lies where it is first used and outlives the run, and a machine with it that is
    # set aside never gets idle and leaves
    get_or_create_stats_actor()
    # elsewhere, as in a search, nothing can interrupt Ray Train
    in_main = threading.current_thread() is threading.main_thread()
    watchdog = Watchdog(
        config.train.hang_minutes,
        log.say,
        wait_minutes=config.resources.wait_minutes if in_main else math.inf,
        give_up=_thread.interrupt_main if in_main else lambda: None,
    )
    try:
        try:
            # of a run that is resumed the state is kept already, see `train`; one that a search starts has only this
            with kept_state(folder), listening(events, log, watchdog):
                build = partial(build_trainer, config, placed, run_name=folder.name, events=events, callbacks=callbacks)
                try:
                    result = run_elastic(build, config.resources, allocation, log.say)
                except KeyboardInterrupt:
                    if watchdog.abandoned is None:
                        raise
                    raise UserError(watchdog.abandoned) from None
        except ray.train.TrainingFailedError:
            if watchdog.verdict is None:
                raise
            raise UserError(watchdog.verdict) from None
    except UserError as error:
        with suppress(OSError):  # a full disk may be what is told of
            (folder / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
        raise
    return log, result


def open_folder(folder: Path, config: ExperimentConfig, data: dict[str, str], *, fresh: bool) -> None:
    """Makes a run's folder ready: with its config and what its data are, and without the failure of an earlier try.

    Raises:
        UserError: if it cannot be written, if it is another folder on another machine, or if it is there although it must not be.
    """
    try:
        check_shared(folder.parent)
        if fresh:
            make_folder(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / f".{CONFIG_FILE}")
        os.replace(folder / f".{CONFIG_FILE}", folder / CONFIG_FILE)
        (folder / f".{DATA_FILE}").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / f".{DATA_FILE}", folder / DATA_FILE)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None


def make_folder(folder: Path, config: ExperimentConfig) -> None:
    """Makes a run folder with its config in it, or none: one without could neither be resumed nor begun anew.

    Raises:
        OSError: if it is there already, or cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}_{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        config.save(unfinished / CONFIG_FILE)
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
