"""Decides whether a run can be resumed with the current settings, data and files; plain files, no Ray."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ExperimentConfig, load_config
from ..datasets.protocol import Splits, fingerprint
from ..errors import UserError
from ..io.files import write_text
from ..labels.word_vectors import LEARNED
from ..settings import MAY_DIFFER, Settings
from .folder import CONFIG_FILE, DATA_FILE

# Ray Train's list of the run's checkpoints; Ray Train writes it in place
LIST_FILE = "checkpoint_manager_snapshot.json"
LIST_COPY = f".{LIST_FILE}"  # the list before the last checkpoint; `NO_LIST` until it holds a checkpoint
NO_LIST = "{}"
CHECKPOINT_NAME = re.compile(r"\.?epoch_\d{4,}(_step_\d{6,})?_[0-9a-f]+")  # with a dot until it is complete
SEARCH_FILES = (".driver", "study.db")  # only search folders hold them
# Prefixes of the paths of settings that may differ when a run is resumed
MAY_CHANGE = (
    "resources.",
    *(
        f"{group}.{name}"
        for group, settings in ExperimentConfig()
        if isinstance(settings, Settings)
        for name, field in type(settings).model_fields.items()
        if MAY_DIFFER in field.metadata
    ),
)


def check_resumable(folder: Path, config: ExperimentConfig) -> None:
    """Refuse to resume a run with settings that change what is trained.

    Raises:
        UserError: if the folder is not a run, or a setting differs that must not differ, with its name and both values.
    """
    if any((folder / name).exists() for name in SEARCH_FILES):
        raise UserError(f"{folder}: the folder of a search, not of a run; resume it with msrn search --resume {folder}")
    saved = _saved_config(folder)
    if config.train.epochs < saved.train.epochs:
        raise UserError(
            f"{folder}: train.epochs={config.train.epochs} is less than the run's {saved.train.epochs}; it can be raised when"
            " a run is resumed, not lowered"
        )
    changed = changed_settings(saved, config)
    if changed:
        raise UserError(
            f"{folder}: a run must be resumed with its settings ({', '.join(changed)}); to change them, start a new run with --config"
        )


def changed_settings(
    saved: ExperimentConfig, current: ExperimentConfig, may_change: tuple[str, ...] = MAY_CHANGE
) -> list[str]:
    """Return the settings that differ although they must not, each with both values.

    Args:
        saved, current: the configs.
        may_change: prefixes of the paths that may differ.
    """
    old, new = _flatten(saved.to_dict()), _flatten(current.to_dict())
    vectors = "data.word_vectors"
    fixed = {vectors} if LEARNED in (old[vectors], new[vectors]) else set()  # LEARNED is no file that could have moved
    return [
        f"{name} was {old[name]!r}, now {value!r}"
        for name, value in new.items()
        if value != old[name] and (name in fixed or not name.startswith(may_change))
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def describe_data(splits: Splits, config: ExperimentConfig) -> dict[str, str]:
    """Return what a run is trained on, for its folder: `data` in words, and the `fingerprint` of train and val."""
    train, val = splits.train, splits.val
    words = f"{config.data.dataset} in {config.data.root or 'the cache'} ({train.source}: {len(train)} train, {len(val)} val images)"
    return {"data": words, "fingerprint": fingerprint(train, val)}


def check_data(folder: Path, data: Mapping[str, str]) -> None:
    """Refuse to resume a run on other images or labels; `data` describes the current data, see `describe_data`.

    Raises:
        UserError: if the fingerprints differ, with a description of both data sets.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        return  # the run stopped before it wrote the file; each checkpoint holds the fingerprint too
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        words, known = saved["data"], saved["fingerprint"]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: damaged; delete it, then the fingerprint in the checkpoint is compared with the data"
        ) from None
    if known != data["fingerprint"]:
        raise UserError(
            f"{folder} was trained on other images or labels: {words}, fingerprint {known[:12]}; now {data['data']}, fingerprint"
            f" {data['fingerprint'][:12]}; give the run's data with --data.root, or start a new run"
        )


def check_list(folder: Path) -> bool:
    """Repair Ray Train's list of checkpoints if an interruption cut it off: without the list a run would start over.

    A run that was interrupted before its first checkpoint was in that list starts over, and that checkpoint is deleted.

    Returns:
        Whether the run starts over.

    Raises:
        UserError: if there are checkpoints, but neither the list nor its copy can be read.
    """
    saved, copy = folder / LIST_FILE, folder / LIST_COPY
    checkpoints = [path for path in folder.glob("epoch_*") if CHECKPOINT_NAME.fullmatch(path.name)]
    if not checkpoints or _read_list(saved) is not None:
        return False
    known = _read_list(copy)
    if known is None or (len(checkpoints) > 1 and not known):
        raise UserError(
            f"{saved}: Ray Train's list of the checkpoints is missing or cut off; put it back from a copy, or delete the"
            f" folders epoch_* beside it to train from the beginning"
        )
    if known:
        shutil.copyfile(copy, saved)
        return False
    shutil.rmtree(checkpoints[0])
    saved.unlink(missing_ok=True)
    return True


def listed_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of the finished epochs whose checkpoints a run folder keeps, by epoch; [] if there is no list yet."""
    content = _read_list(folder / LIST_FILE) or {}
    listed = [entry["metrics"] for entry in content.get("checkpoint_results", [])]
    finished = [metrics for metrics in listed if "val/mAP" in metrics]  # a checkpoint within an epoch has no score
    return sorted(finished, key=lambda metrics: int(metrics["epoch"]))


def keep_list(folder: Path, text: str) -> None:
    """Write the copy of Ray Train's list, whole or not at all."""
    write_text(folder / LIST_COPY, text)


def _read_list(path: Path) -> dict[str, Any] | None:
    """Return the content of Ray Train's list or of its copy; None if it is missing or cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def resume_config(run: Path) -> ExperimentConfig:
    """Return the config of a run folder, set to write into that folder again.

    Raises:
        UserError: if the folder is not a run.
    """
    folder = run.expanduser().resolve()
    return _saved_config(run).with_overrides({"train.storage": str(folder.parent), "train.run_name": folder.name})


def _saved_config(run: Path) -> ExperimentConfig:
    path = run.expanduser().resolve() / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run folder, it holds no {CONFIG_FILE}; give the folder of a run")
    return load_config(path)
