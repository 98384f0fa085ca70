"""The checkpoint on disk: `model.pt` holds everything that scoring an image needs, `train_state.pt` everything that a resume needs.

Both hold plain tensors, numbers and text, and are read with `weights_only=True`: a stranger's checkpoint cannot run code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ExperimentConfig, config_from_dict
from ..datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..errors import UserError
from ..io.files import atomic_write
from ..labels.graph import LabelCounts, Provenance

MODEL_FILE, STATE_FILE, BEST_FILE = "model.pt", "train_state.pt", "best.txt"
FORMAT = 1
_VERSIONED = ("msrn-ray", "torch", "torchvision", "numpy")


@dataclass(frozen=True)
class Checkpoint:
    """The content of `model.pt`; C labels.

    Attributes:
        config: the experiment.
        label_names: C names in the order of the logits.
        counts: label counts that the graph was made from.
        weights: state dict of the network that is evaluated: the moving average if training keeps one.
        thresholds: C probabilities; from these on a label counts as present.
        metrics: metrics on val at this epoch, `val/mAP` and others.
        epoch: finished training epochs.
        mean, std: ImageNet constants of the input, in RGB order, for pixels in [0, 1].
        versions: of the packages that wrote the file.
    """

    config: ExperimentConfig
    label_names: tuple[str, ...]
    counts: LabelCounts
    weights: Mapping[str, Tensor]
    thresholds: tuple[float, ...]
    metrics: Mapping[str, float]
    epoch: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in _VERSIONED})


@dataclass(frozen=True)
class TrainState:
    """The content of `train_state.pt`: an interrupted run resumes from it as if it had not been interrupted.

    Attributes:
        model: state dict of the trained network (not the average).
        optimizer, scheduler, scaler: their state dicts.
        ema: state dict of the moving average, or None.
        epoch: finished epochs.
        data: fingerprint of train and val.
        step: finished steps of the unfinished epoch; 0 between two epochs.
        account: finished rows of the unfinished epoch, packed (`row_ledger.Account.pack`); empty between two epochs.
        stats: sums of the unfinished epoch (`training.epoch.EpochStats`); empty between two epochs.
        world_size: number of ranks.
        rng: for each rank the states of torch's generators: `cpu`, and `device` if that is a GPU.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    scaler: Mapping[str, Any]
    ema: Mapping[str, Any] | None
    epoch: int
    data: str
    step: int = 0
    account: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    world_size: int = 1
    rng: Sequence[Mapping[str, Tensor]] = ()


def save_checkpoint(folder: Path, checkpoint: Checkpoint, state: TrainState | None = None) -> None:
    """Write both files; each appears whole or not at all.

    Raises:
        OSError: if the disk is full or writing is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "config": checkpoint.config.to_dict(),
        "label_names": list(checkpoint.label_names),
        "cooccurrence": torch.from_numpy(checkpoint.counts.cooccurrence),
        "counts": torch.from_numpy(checkpoint.counts.count),
        "counts_provenance": asdict(checkpoint.counts.provenance) if checkpoint.counts.provenance else None,
        "weights": dict(checkpoint.weights),
        "thresholds": list(checkpoint.thresholds),
        "metrics": dict(checkpoint.metrics),
        "epoch": checkpoint.epoch,
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
        "versions": dict(checkpoint.versions),
    }
    _save(folder / MODEL_FILE, content)
    if state is not None:
        save_train_state(folder, state)


def save_train_state(folder: Path, state: TrainState) -> None:
    """Write only `train_state.pt`: a checkpoint within an epoch has no scores, so it has no `model.pt`."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / STATE_FILE, {name: getattr(state, name) for name in TrainState.__dataclass_fields__})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, its `model.pt`, or the best checkpoint of a run folder.

    Raises:
        UserError: if there is no checkpoint, if it would run code, or if another program wrote it.
    """
    file = find_model_file(path)
    content = _load(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{file}: not a checkpoint of msrn_ray (format {FORMAT}); `msrn import-official` reads the authors' files"
        )
    try:
        names = tuple(content["label_names"])
        origin = content.get("counts_provenance")  # missing in older checkpoints
        provenance = Provenance(origin["source"], origin["num_images"], origin["fingerprint"]) if origin else None
        return Checkpoint(
            config=config_from_dict(content["config"], source=f"{file}: config"),
            label_names=names,
            counts=LabelCounts(names, content["cooccurrence"].numpy(), content["counts"].numpy(), provenance),
            weights=content["weights"],
            thresholds=tuple(content["thresholds"]),
            metrics=content["metrics"],
            epoch=content["epoch"],
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            versions=content["versions"],
        )
    except KeyError as error:
        raise UserError(f"{file}: the entry {error} is missing; the file is damaged") from None


def load_train_state(folder: Path) -> TrainState:
    """Read `train_state.pt` of a checkpoint folder.

    Raises:
        UserError: if it is missing, would run code, or lacks an entry.
    """
    file = folder / STATE_FILE
    try:
        return TrainState(**_load(file))
    except TypeError as error:
        raise UserError(f"{file}: not a train state of msrn_ray ({error}); the file is damaged") from None


def find_model_file(path: Path) -> Path:
    """Return the `model.pt` of a checkpoint folder or a run folder; a file stands for itself.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    if (path / BEST_FILE).is_file():
        best = path / (path / BEST_FILE).read_text(encoding="utf-8").strip() / MODEL_FILE
        if best.is_file():
            return best
        raise UserError(f"{path}: its best checkpoint {best.parent.name} is missing; give another checkpoint folder")
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file or folder")
    if (path / "config.yaml").is_file():
        raise UserError(
            f"checkpoint {path}: no epoch of this run is finished; resume it with msrn train --resume {path}"
        )
    if (path / STATE_FILE).is_file():
        raise UserError(
            f"checkpoint {path}: saved within an epoch, without scores; give the run folder, or resume the run with"
            f" msrn train --resume {path.parent}"
        )
    raise UserError(f"checkpoint {path}: holds neither {MODEL_FILE} nor {BEST_FILE}; give a checkpoint or a run folder")


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's RuntimeError does not mention a full disk
                raise error.__context__ from None
            raise


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises many types here; each means that the file cannot be read safely
        raise UserError(
            f"checkpoint {path}: damaged, not a checkpoint, or would run code; refused. Give a run or checkpoint folder"
        ) from None
