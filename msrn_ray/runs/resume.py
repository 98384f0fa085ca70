"""What a run folder says of its run, and whether a run may go on with what there is now; plain files, no Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ExperimentConfig, load_config
from ..datasets.protocol import Splits, fingerprint
from ..errors import UserError
from ..labels.word_vectors import LEARNED
from .folder import CONFIG_FILE, DATA_FILE

LIST_FILE = "checkpoint_manager_snapshot.json"  # Ray Train's list of the run's checkpoints, which it writes in place
LIST_COPY = f".{LIST_FILE}"  # as it was before the last checkpoint; `NO_LIST` until the first is in it
NO_LIST = "{}"
CHECKPOINT_NAME = re.compile(r"\.?epoch_\d{4,}(_step_\d{6,})?_[0-9a-f]+")  # with a dot while it is written
MAY_CHANGE = (
    "resources.",
    "model.compile",
    "train.epochs",
    "train.log_every",
    "train.hang_minutes",
    "train.checkpoint_every",
    "train.max_failures",
    "train.storage",
    "train.run_name",
    "train.eval_batch_size",
)
MAY_MOVE = (
    "data.root",
    "data.labels",
    "data.max_bad_fraction",
    "data.max_pixels",
    "data.word_vectors",
    "data.label_counts",
    "model.pretrained",
)


def check_resumable(folder: Path, config: ExperimentConfig) -> None:
    """Refuses to go on with a run under settings that change what is trained.

    Raises:
        UserError: if the folder is not a run, or a setting differs that must not, with its name and both values.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no run to resume, it holds no {CONFIG_FILE}")
    saved, now = (flatten(one.to_dict()) for one in (load_config(folder / CONFIG_FILE), config))
    if config.train.epochs < load_config(folder / CONFIG_FILE).train.epochs:
        raise UserError(f"{folder}: train.epochs can be raised when a run goes on, not lowered")
    changed = changed_settings(saved, now, MAY_CHANGE + MAY_MOVE)
    if changed:
        raise UserError(
            f"{folder}: a run goes on with its own settings ({', '.join(changed)}); start a new run with --config for others"
        )


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any], may_change: tuple[str, ...]) -> list[str]:
    """The flat settings that differ though they may not, each with both values.

    Args:
        saved, now: as `flatten` gives them.
        may_change: beginnings of the paths that may.
    """
    changed = [name for name in now if saved[name] != now[name] and not name.startswith(may_change)]
    vectors = "data.word_vectors"
    if LEARNED in (saved[vectors], now[vectors]) and saved[vectors] != now[vectors] and vectors not in changed:
        changed.append(vectors)  # not a file that was moved
    return [f"{name} was {saved[name]!r}, now {now[name]!r}" for name in changed]


def describe_data(splits: Splits, config: ExperimentConfig) -> dict[str, str]:
    """What a run is trained on, for its folder: `data` in words, and the `fingerprint` of train and val."""
    train, val = splits.train, splits.val
    words = f"{config.data.dataset} in {config.data.root or 'the cache'} ({train.source}: {len(train)} train, {len(val)} val images)"
    return {"data": words, "fingerprint": fingerprint(train, val)}


def check_data(folder: Path, data: Mapping[str, str]) -> None:
    """Refuses to go on with a run on other images or labels; `data` is what `describe_data` says of those that are there now.

    Raises:
        UserError: if it is not the run's, with both.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        return  # stopped before it was written; each checkpoint holds the fingerprint too
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        said, known = saved["data"], saved["fingerprint"]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: damaged; delete it, then each checkpoint's own fingerprint of the data is compared"
        ) from None
    if known != data["fingerprint"]:
        raise UserError(
            f"{folder} was trained on other images or labels: {said}, fingerprint {known[:12]}; now {data['data']}, fingerprint"
            f" {data['fingerprint'][:12]}; name its data with --data.root, or start a new run"
        )


def check_list(folder: Path) -> bool:
    """Mends Ray Train's list of checkpoints where an interruption cut it off; without it a run would begin anew.

    A run that was interrupted before its first checkpoint was in that list does begin anew, and that checkpoint is deleted.

    Returns:
        Whether that is so.

    Raises:
        UserError: if there are checkpoints, but neither the list nor its copy can be read.
    """
    saved, copy = folder / LIST_FILE, folder / LIST_COPY
    checkpoints = [path for path in folder.glob("epoch_*") if CHECKPOINT_NAME.fullmatch(path.name)]
    if not checkpoints or _is_whole(saved):
        return False
    if not _is_whole(copy) or (len(checkpoints) > 1 and copy.read_text(encoding="utf-8") == NO_LIST):
        raise UserError(
            f"{saved}: Ray Train's list of the checkpoints is missing or cut off; put it back from a copy, or delete the"
            f" folders epoch_* beside it to train from the beginning"
        )
    if copy.read_text(encoding="utf-8") != NO_LIST:
        shutil.copyfile(copy, saved)
        return False
    shutil.rmtree(checkpoints[0])
    saved.unlink(missing_ok=True)
    return True


def listed_metrics(folder: Path) -> list[dict[str, Any]]:
    """What was reported with the checkpoints of whole epochs that a run folder keeps, by epoch; nothing where there is no list yet."""
    if not _is_whole(folder / LIST_FILE):
        return []
    content = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
    listed = [entry["metrics"] for entry in content.get("checkpoint_results", [])]
    whole = [metrics for metrics in listed if "val/mAP" in metrics]  # one within an epoch has no score
    return sorted(whole, key=lambda metrics: int(metrics["epoch"]))


def keep_list(folder: Path, text: str) -> None:
    """Writes the copy of Ray Train's list, whole or not at all."""
    with (folder / f".{LIST_COPY}").open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / f".{LIST_COPY}", folder / LIST_COPY)


def _is_whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def resume_config(run: Path) -> ExperimentConfig:
    """The config of a run folder, set to write into that folder again.

    Raises:
        UserError: if the folder is not a run.
    """
    folder = run.expanduser().resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{run}: not a run folder, it holds no {CONFIG_FILE}")
    return load_config(folder / CONFIG_FILE).with_overrides(
        {"train.storage": str(folder.parent), "train.run_name": folder.name}
    )
