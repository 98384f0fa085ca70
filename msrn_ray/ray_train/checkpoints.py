"""Checkpoints of a run: written by rank 0 into the run folder, kept and deleted by Ray Train, and what a rank takes up again.

A checkpoint at an epoch's end holds the model with its scores, and the train state; one within an epoch the train state alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train

from ..errors import UserError
from ..runs.checkpoint import Checkpoint, TrainState, save_checkpoint, save_train_state
from ..runs.resume import CHECKPOINT_NAME, LIST_FILE, NO_LIST, keep_list
from ..training import distributed

SCORE = "checkpoint_score"  # Ray Train keeps the checkpoint with the largest, the later of equals, and the latest
NO_SCORE, WITHIN_EPOCH = -1.0, -2.0  # where val/mAP is nan, and where there is none: below any val/mAP
_ROOM = 2**20  # bytes that a checkpoint must leave free: Ray Train's list is written after it, and must not be cut off


def report_checkpoint(run: Path, metrics: Mapping[str, Any], checkpoint: Checkpoint | None, state: TrainState) -> str:
    """Writes a checkpoint into the run folder, whole or not at all, and hands it to Ray Train; ranks must all call it.

    Args:
        run: the run folder.
        metrics: `epoch` (1-based), `SCORE`, and what else is known; the same on every rank.
        checkpoint: the model of a finished epoch, or None within an epoch.
        state: what going on needs.

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
        first = not ray.train.get_all_reported_checkpoints()  # waits until Ray Train has listed the checkpoint before
        if first:
            keep_list(run, NO_LIST)
        elif (run / LIST_FILE).is_file():  # shared storage may show it later
            keep_list(run, (run / LIST_FILE).read_text(encoding="utf-8"))
        if checkpoint is None:
            save_train_state(partial, state)
        else:
            save_checkpoint(partial, checkpoint, state)
        if shutil.disk_usage(run).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(partial, run / name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{run}: the checkpoint of epoch {metrics['epoch']} cannot be written ({error.strerror}); the ones before are whole:"
            f" make room, then msrn train --resume {run}"
        ) from None
    ray.train.report(
        dict(metrics),
        checkpoint=ray.train.Checkpoint.from_directory(run / name),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,  # it lies where it belongs
    )
    if first:
        ray.train.get_all_reported_checkpoints()  # who has seen that there is a checkpoint can go on from it
        if (run / LIST_FILE).is_file():
            keep_list(run, (run / LIST_FILE).read_text(encoding="utf-8"))
    return name


def clear_leftovers(run: Path) -> None:
    """Deletes checkpoints that an interruption cut off, or left behind before Ray Train knew of them.

    Raises:
        UserError: if this node does not see the run folder.
    """
    if not run.is_dir():
        raise UserError(
            f"train.storage: {run} is not there on a worker's node; give a folder that every node has mounted"
        )
    known = {Path(one.checkpoint.path).name for one in ray.train.get_all_reported_checkpoints()}
    for folder in run.iterdir():
        cut_off = folder.name.startswith(".")  # the only ones to go where the list of Ray Train may be lost
        if (
            CHECKPOINT_NAME.fullmatch(folder.name)
            and folder.is_dir()
            and folder.name not in known
            and (known or cut_off)
        ):
            shutil.rmtree(folder)


def scored_checkpoints() -> list[ray.train.ReportedCheckpoint]:
    """Those of finished epochs that Ray Train holds."""
    return [one for one in ray.train.get_all_reported_checkpoints() if "val/mAP" in one.metrics]
