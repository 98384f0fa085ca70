"""The run folder: the names of its files, and how it is created."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from ..config import ExperimentConfig
from ..errors import UserError
from ..labels.word_vectors import LEARNED

DATA_FILE = "data.json"
CONFIG_FILE = "config.yaml"
FAILURE_FILE = "failure.txt"  # the error that stopped the run, where the user can mend it


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


def open_folder(folder: Path, config: ExperimentConfig, data: dict[str, str], *, fresh: bool) -> None:
    """Makes a run's folder ready: with its config and what its data are, and without the failure of an earlier try.

    Raises:
        UserError: if it cannot be written, if it is another folder on another machine, or if it is there although it must not be.
    """
    try:
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
