"""A checkpoint that shows every loss of a round trip."""

from __future__ import annotations

import numpy as np
import torch

from msrn_ray.config import ExperimentConfig
from msrn_ray.labels.graph import LabelCounts, Provenance
from msrn_ray.runs.checkpoint import (
    Checkpoint,
)


def example() -> Checkpoint:
    """Return a checkpoint whose entries all differ from their defaults, with tensors of several types."""
    names = ("straße", "a,b", "zebra crossing")
    pairs = np.array([[0, 3, 1], [3, 0, 0], [1, 0, 0]], np.int64)
    weights = {
        "layer.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(3)),
        "layer.half": torch.tensor([1 / 3, 65504.0], dtype=torch.float16),
        "layer.bf16": torch.tensor([1 / 3, 1e38], dtype=torch.bfloat16),
        "bn.num_batches_tracked": torch.tensor(2**40),
        "label_semantics.attend_mask": torch.eye(3, dtype=torch.bool),
    }
    return Checkpoint(
        config=ExperimentConfig().with_overrides(
            {"optim.lr": 0.1 + 0.2, "data.root": "/ä", "model.levels": ["layer4"]}
        ),
        label_names=names,
        counts=LabelCounts(names, pairs, np.array([2**40, 4, 5], np.int64), Provenance("ä.json", 2**41, "f" * 64)),
        weights=weights,
        thresholds=(0.1 + 0.2, 1 / 3, 0.5),
        metrics={"val/mAP": 1 / 3, "val/AP/zebra crossing": float("inf"), "val/images": 7},
        epoch=7,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        versions={"torch": "9.9", "msrn_ray": "0.1"},
    )
