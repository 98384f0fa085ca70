"""The checkpoint: `model.pt` holds everything that scoring an image needs, `train_state.pt` everything that a resume needs.

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
from ..training import distributed
from ..training.learner import Learner

MODEL_FILE, TRAIN_STATE_FILE, BEST_FILE = "model.pt", "train_state.pt", "best.txt"
FORMAT = 1
_TUPLES = ("label_names", "thresholds", "mean", "std")  # lists in the file
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


def capture(learner: Learner, *, epoch: int, data: str, **within: Any) -> TrainState:
    """Return everything that a resume needs; all ranks must call this.

    Args:
        learner: network, optimizer and the rest of what a step changes.
        epoch: finished epochs.
        data: fingerprint of train and val.
        within: `step`, `account` and `stats` of the `TrainState`, if the epoch is not finished.
    """
    return TrainState(
        learner.network.state_dict(),
        learner.optimizer.state_dict(),
        learner.scheduler.state_dict(),
        learner.scaler.state_dict(),
        learner.ema.state_dict() if learner.ema is not None else None,
        epoch,
        data,
        world_size=distributed.world_size(),
        rng=distributed.all_gather(get_rng(learner.device)),
        **within,
    )


def get_rng(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators, the only ones that training draws from: epoch and row seed the augmentation."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(learner: Learner, state: TrainState, rank: int) -> None:
    """Reverse `capture` on each rank; additional ranks share the random states of the saved ranks.

    Raises:
        UserError: if the run was trained with another label graph.
    """
    mask = "label_semantics.attend_mask"
    if mask in state.model and not torch.equal(state.model[mask].cpu(), learner.network.state_dict()[mask].cpu()):
        raise UserError(
            "data.label_counts: gives another label graph than the run was trained with; give the file that the run started with"
        )
    learner.network.load_state_dict(state.model)
    learner.optimizer.load_state_dict(dict(state.optimizer))
    learner.scheduler.load_state_dict(dict(state.scheduler))
    learner.scaler.load_state_dict(dict(state.scaler))
    if learner.ema is not None and state.ema is not None:
        learner.ema.load_state_dict(dict(state.ema))
    if state.rng:
        rng = state.rng[rank % len(state.rng)]
        torch.set_rng_state(rng["cpu"])
        if learner.device.type == "cuda" and "device" in rng:
            torch.cuda.set_rng_state(rng["device"], learner.device)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `model.pt` of a checkpoint folder, whole or not at all.

    Raises:
        OSError: if the disk is full or writing is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "config": checkpoint.config.to_dict(),
        "cooccurrence": torch.from_numpy(checkpoint.counts.cooccurrence),
        "counts": torch.from_numpy(checkpoint.counts.count),
        "counts_provenance": asdict(checkpoint.counts.provenance) if checkpoint.counts.provenance else None,
        "weights": dict(checkpoint.weights),
        "metrics": dict(checkpoint.metrics),
        "epoch": checkpoint.epoch,
        "versions": dict(checkpoint.versions),
        **{name: list(getattr(checkpoint, name)) for name in _TUPLES},
    }
    _save(folder / MODEL_FILE, content)


def save_train_state(folder: Path, state: TrainState) -> None:
    """Write `train_state.pt`, whole or not at all. A checkpoint within an epoch holds nothing else, since it has no scores."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / TRAIN_STATE_FILE, vars(state))


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
        tuples = {name: tuple(content[name]) for name in _TUPLES}
        pairs, counts = content["cooccurrence"].numpy(), content["counts"].numpy()
        origin = content.get("counts_provenance")  # missing in older checkpoints
        provenance = Provenance(origin["source"], origin["num_images"], origin["fingerprint"]) if origin else None
        return Checkpoint(
            config=config_from_dict(content["config"], source=f"{file}: config"),
            counts=LabelCounts(tuples["label_names"], pairs, counts, provenance),
            weights=content["weights"],
            metrics=content["metrics"],
            epoch=content["epoch"],
            versions=content["versions"],
            **tuples,
        )
    except KeyError as error:
        raise UserError(f"{file}: the entry {error} is missing; the file is damaged") from None


def load_train_state(folder: Path) -> TrainState:
    """Read `train_state.pt` of a checkpoint folder.

    Raises:
        UserError: if it is missing, would run code, or lacks an entry.
    """
    file = folder / TRAIN_STATE_FILE
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
        reason = "no such file or folder"
    elif (path / "config.yaml").is_file():
        reason = f"no epoch of this run is finished; resume it with msrn train --resume {path}"
    elif (path / TRAIN_STATE_FILE).is_file():
        resume = f"resume the run with msrn train --resume {path.parent}"
        reason = f"saved within an epoch, without scores; give the run folder, or {resume}"
    else:
        reason = f"holds neither {MODEL_FILE} nor {BEST_FILE}; give a checkpoint or a run folder"
    raise UserError(f"checkpoint {path}: {reason}")


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
