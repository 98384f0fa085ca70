"""Scores images with a model in eval mode and computes the metrics of a split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..datasets.transforms import normalize
from ..types import Batch
from . import distributed
from .engine import to_device
from .losses import classification_loss
from .metrics import MultiLabelMetrics


class Scores(NamedTuple):
    """Probabilities and losses of the images that were scored.

    Attributes:
        row: [n] int64, rows of the sample table.
        scores: [n, C] float32, probabilities.
        target: [n, C] int8 in {1, 0, -1}.
        loss: [n] float32, classification loss of each image.
    """

    row: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    target: npt.NDArray[np.int8]
    loss: npt.NDArray[np.float32]


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, device: torch.device, num_classes: int) -> Scores:
    """Score every valid image of `batches` with the model in eval mode, on this rank alone.

    Scores in full precision, whatever the training used: in bf16 a score depends on which images share its batch.

    Args:
        model: network whose `forward` returns an `MSRNOutput`.
        batches: batches on the CPU.
        device: where the model is.
        num_classes: C, for a rank without images.
    """
    model.eval()
    # no row: a rank without images returns this part
    empty = np.zeros((0, num_classes), np.float32), np.zeros((0, num_classes), np.int8)
    parts = [Scores(np.zeros(0, np.int64), *empty, np.zeros(0, np.float32))]
    for cpu_batch in batches:
        batch = to_device(cpu_batch, device)
        logits = model(normalize(batch.images)).logits
        valid = cpu_batch.valid.numpy()
        loss = classification_loss(logits, batch.target)
        columns = cpu_batch.row, logits.sigmoid().cpu(), cpu_batch.target, loss.cpu()
        parts.append(Scores._make(column.numpy()[valid] for column in columns))
    return _concatenate(parts)


def gather_scores(scores: Scores) -> Scores:
    """Return the scores of all ranks in row order, each row exactly once; the same on every rank, which must all call it."""
    gathered = _concatenate(distributed.all_gather(scores))
    order = np.argsort(gathered.row)
    assert len(np.unique(gathered.row)) == len(order), "a row was scored twice"
    return Scores._make(column[order] for column in gathered)


def _concatenate(parts: Sequence[Scores]) -> Scores:
    return Scores._make(map(np.concatenate, zip(*parts, strict=True)))


def split_metrics(split: str, scores: Scores, label_names: Sequence[str]) -> dict[str, Any]:
    """Return all metrics of a split as `split/name`, and per-class AP as `split/AP/label`."""
    metric = MultiLabelMetrics(len(label_names))
    metric.update(scores.scores, scores.target)
    values: dict[str, Any] = {**metric.compute()}
    per_class = values.pop("AP")
    values |= {f"AP/{label}": value for label, value in zip(label_names, per_class, strict=True)}
    values |= {"loss": float(scores.loss.mean()), "images": len(scores.row)}
    return {f"{split}/{name}": value for name, value in values.items()}
