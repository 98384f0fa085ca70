"""The run folder: the names of its files, and how it is created."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from ..config import ExperimentConfig
from ..errors import UserError
from ..io.files import remove_partial_files, write_text
from ..labels.word_vectors import LEARNED

DATA_FILE = "data.json"
CONFIG_FILE = "config.yaml"
FAILURE_FILE = "failure.txt"  # the error that stopped the run, if the user can fix it


def absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with absolute local paths.

    Workers may have another working directory, and a saved config must work from any directory.

    Raises:
        UserError: if `train.storage` is a URI.
    """
    if "://" in config.train.storage:
        raise UserError(
            f"train.storage {config.train.storage}: give a folder; on a cluster one that every node has mounted"
        )
    changes: dict[str, str] = {"train.storage": _absolute(config.train.storage)}
    for name in ("root", "labels", "merge_labels", "word_vectors", "label_counts"):
        value = getattr(config.data, name)
        if value is not None and "://" not in value and (name, value) != ("word_vectors", LEARNED):
            changes[f"data.{name}"] = _absolute(value)
    weights = config.model.pretrained
    if weights is not None and Path(weights).expanduser().exists():
        changes["model.pretrained"] = _absolute(weights)
    return config.with_overrides(changes)


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # links stay: a manifest's images are relative to its link


def open_folder(folder: Path, config: ExperimentConfig, data: dict[str, str], *, fresh: bool) -> None:
    """Prepare a run's folder: write its config and its data's description, remove what a failed or killed attempt left.

    Args:
        folder: the run folder.
        config: the experiment.
        data: what `describe_data` returned.
        fresh: the folder must not exist yet.

    Raises:
        UserError: if it cannot be written, or exists although it must not.
    """
    try:
        if fresh:
            make_folder(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        config.save(folder / CONFIG_FILE)
        write_text(folder / DATA_FILE, json.dumps(data, indent=2) + "\n")
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def make_folder(folder: Path, config: ExperimentConfig) -> None:
    """Create a run folder with its config, or nothing: without a config it could neither be resumed nor started over.

    Raises:
        OSError: if it exists already, or cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}_{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        config.save(unfinished / CONFIG_FILE)
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def cannot_be_written(folder: Path, error: OSError) -> UserError:
    """Return the error for a run folder that cannot be written."""
    return UserError(f"train.storage {folder}: cannot be written ({error.strerror}); check its disk and permissions")
