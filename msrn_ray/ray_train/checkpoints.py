"""Checkpoints of a run: rank 0 writes them into the run folder, Ray Train lists and deletes them, every rank resumes from them.

A checkpoint at an epoch's end holds the model with its scores, and the train state. One within an epoch holds the train state alone.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train

from ..errors import UserError
from ..runs.checkpoint import (
    Checkpoint,
    TrainState,
    capture,
    load_train_state,
    restore,
    save_checkpoint,
    save_train_state,
)
from ..runs.history import best_index
from ..runs.resume import CHECKPOINT_NAME, LIST_FILE, NO_LIST, keep_list
from ..training import distributed
from ..training.epoch import EpochStats
from ..training.learner import Learner
from ..training.row_ledger import Account
from ..training.sampling import TrainPlan
from .worker_input import WorkerInput

# Ray Train keeps the checkpoint with the largest score (the later of equals) and the latest one
SCORE = "checkpoint_score"
# Scores below any val/mAP: of an epoch whose val/mAP is nan, and of a checkpoint within an epoch
NO_SCORE, WITHIN_EPOCH = -1.0, -2.0
# Bytes that a checkpoint must leave free: Ray Train writes its list after it, and a full disk would cut the list off
_MIN_FREE_BYTES = 2**20


@dataclass(frozen=True)
class StartPoint:
    """Where a worker starts to train.

    Attributes:
        epoch: finished epochs.
        account: rows of the epoch after those that are done.
        stats: that epoch so far.
    """

    epoch: int
    account: Account
    stats: EpochStats = field(default_factory=EpochStats)


def load_start(learner: Learner, plan: TrainPlan, fingerprint: str) -> StartPoint:
    """Restore the latest checkpoint that Ray Train holds, if there is one, and return where to start.

    Args:
        learner: gets the state.
        plan: this rank's plan.
        fingerprint: of the train and val images and labels.

    Raises:
        UserError: if the checkpoint is of other data or another label graph, or if its rows differ from those that the plan has before its
            step.
    """
    latest = ray.train.get_checkpoint()
    if latest is None:
        return StartPoint(0, Account.empty(plan.num_rows))
    with latest.as_directory() as folder:
        state = load_train_state(Path(folder))
    if state.data != fingerprint:
        raise UserError(
            f"checkpoint {latest.path} belongs to other images or labels than data.root holds; start a new run"
        )
    restore(learner, state, plan.rank)
    if state.step == 0:
        return StartPoint(state.epoch, Account.empty(plan.num_rows))
    account = Account.unpack(state.account, plan.num_rows)
    difference = account.difference(plan, state.epoch, state.step)
    if difference:
        raise UserError(
            f"checkpoint {latest.path}: its images do not fit the order of epoch {state.epoch + 1} ({difference}); another version of"
            " numpy may shuffle differently: resume with the version that trained the run, or start a new run"
        )
    return StartPoint(state.epoch, account, EpochStats(**state.stats))  # type: ignore[arg-type]  # whole numbers stay whole


class CheckpointWriter:
    """Saves the checkpoints of a run; all ranks must call its methods.

    Args:
        worker_input: the run.
        learner: what is saved.
    """

    def __init__(self, worker_input: WorkerInput, learner: Learner) -> None:
        self._input, self._learner = worker_input, learner

    def save_within_epoch(self, epoch: int, stats: EpochStats, account: Account) -> None:
        """Save what resuming needs, after `epoch` finished epochs and the steps of `stats`; account: the rows that are done."""
        within = {"step": stats.steps, "account": account.pack(), "stats": asdict(stats)}
        report_checkpoint(
            self._input.folder, {"epoch": epoch + 1, SCORE: WITHIN_EPOCH}, None, self._capture(epoch, **within)
        )

    def save_epoch(self, metrics: Mapping[str, Any]) -> str:
        """Save the train state and the scored weights at an epoch's end, and return the checkpoint's name.

        Args:
            metrics: of the epoch, with `epoch` (1-based) and `val/mAP`.
        """
        counts = self._input.stored.counts
        checkpoint = Checkpoint(
            config=self._input.config,
            label_names=counts.names,
            counts=counts,
            weights=self._learner.evaluated.state_dict(),
            thresholds=(0.5,) * len(counts.names),
            metrics={name: value for name, value in metrics.items() if isinstance(value, (int, float))},
            epoch=metrics["epoch"],
        )
        mean_average_precision = metrics["val/mAP"]
        score = NO_SCORE if math.isnan(mean_average_precision) else mean_average_precision
        state = self._capture(metrics["epoch"])
        return report_checkpoint(self._input.folder, {**metrics, SCORE: score}, checkpoint, state)

    def _capture(self, epoch: int, **within: Any) -> TrainState:
        fingerprint = self._input.stored.data["fingerprint"]
        return capture(self._learner, epoch=epoch, data=fingerprint, **within)


def report_checkpoint(run: Path, metrics: Mapping[str, Any], checkpoint: Checkpoint | None, state: TrainState) -> str:
    """Write a checkpoint into the run folder, whole or not at all, and report it to Ray Train; all ranks must call it.

    Args:
        run: the run folder.
        metrics: `epoch` (1-based), `SCORE`, and further ones; the same on every rank.
        checkpoint: the model of a finished epoch, or None within an epoch.
        state: what resuming needs.

    Returns:
        The checkpoint's name, unique over restarts.

    Raises:
        UserError: on rank 0, if the folder cannot be written or the disk is full.
    """
    step = f"_step_{state.step:06d}" if checkpoint is None else ""
    name = f"epoch_{metrics['epoch']:04d}{step}_{int(time.time()):x}"
    if distributed.rank() > 0:
        ray.train.report(dict(metrics), checkpoint_dir_name=name)
        return name
    partial = run / f".{name}"
    try:
        first = not ray.train.get_all_reported_checkpoints()  # waits until Ray Train has listed the previous checkpoint
        if first:
            keep_list(run, NO_LIST)
        elif (run / LIST_FILE).is_file():  # shared storage may show the list later
            keep_list(run, (run / LIST_FILE).read_text(encoding="utf-8"))
        save_train_state(partial, state)
        if checkpoint is not None:
            save_checkpoint(partial, checkpoint)
        if shutil.disk_usage(run).free < _MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(partial, run / name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{run}: the checkpoint of epoch {metrics['epoch']} cannot be written ({error.strerror}); earlier checkpoints are whole:"
            f" free some space, then msrn train --resume {run}"
        ) from None
    ray.train.report(
        dict(metrics),
        checkpoint=ray.train.Checkpoint.from_directory(run / name),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,  # it is in its final place
    )
    if first:
        ray.train.get_all_reported_checkpoints()  # waits for the list: without it a resumed run would start over
        if (run / LIST_FILE).is_file():
            keep_list(run, (run / LIST_FILE).read_text(encoding="utf-8"))
    return name


def clear_leftovers(run: Path) -> None:
    """Delete checkpoints that an interruption cut off, or left behind before Ray Train listed them.

    Raises:
        UserError: if this node does not see the run folder.
    """
    if not run.is_dir():
        raise UserError(
            f"train.storage: {run} does not exist on a worker's node; give a folder that every node has mounted"
        )
    known = {Path(reported.checkpoint.path).name for reported in ray.train.get_all_reported_checkpoints()}
    for folder in run.iterdir():
        is_cut_off = folder.name.startswith(".")  # if Ray Train's list may be lost, only these are deleted
        if (
            CHECKPOINT_NAME.fullmatch(folder.name)
            and folder.is_dir()
            and folder.name not in known
            and (known or is_cut_off)
        ):
            shutil.rmtree(folder)


def scored_checkpoints() -> list[ray.train.ReportedCheckpoint]:
    """Return the checkpoints of finished epochs that Ray Train holds."""
    return [reported for reported in ray.train.get_all_reported_checkpoints() if "val/mAP" in reported.metrics]


def best_checkpoint() -> ray.train.ReportedCheckpoint:
    """Return the checkpoint of the best finished epoch that Ray Train holds."""
    scored = scored_checkpoints()
    return scored[best_index([reported.metrics["val/mAP"] for reported in scored])]


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are numbers or text, without the one that only Ray Train needs."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float, str)) and name != SCORE}


def reported_epochs() -> tuple[dict[str, Any], ...]:
    """Return the metrics of the epochs whose checkpoints Ray Train holds, as lines of metrics.jsonl."""
    return tuple(
        {**plain_metrics(reported.metrics), "checkpoint": Path(reported.checkpoint.path).name}
        for reported in scored_checkpoints()
    )
