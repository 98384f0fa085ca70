"""What the driver gathers before any worker starts: splits, label graph, word vectors; no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ExperimentConfig
from .label_graph import LabelCounts, attend_mask, count_labels
from .model.backbone import build_resnet, read_pretrained
from .splits import Splits, load_splits
from .word_vectors import load_word_vectors


@dataclass(frozen=True)
class Materials:
    """What the driver gathers before any worker starts; all of it plain data that travels to the workers.

    Attributes:
        splits: train, val, test.
        counts: label counts of train.
        word_vectors: [C, V] float32.
        frequency: [C] float32 in (0, 1), how often a label is present among train images where it is known (add-one smoothed).
    """

    splits: Splits
    counts: LabelCounts
    word_vectors: Tensor
    frequency: Tensor

    @property
    def label_names(self) -> tuple[str, ...]:
        """C names in the order of the logits."""
        return self.splits.train.label_names


def gather_materials(config: ExperimentConfig) -> Materials:
    """Reads labels, label graph and word vectors, and checks that the backbone's weights can be had.

    Raises:
        UserError: for anything wrong with them.
    """
    splits = load_splits(config)
    targets = splits.train.targets
    counts = count_labels(targets, splits.train.label_names)
    vectors = load_word_vectors(
        splits.train.label_names,
        config.data.word_vectors,
        missing=config.data.missing_words,
        seed=config.train.seed,
    )
    build_resnet(config.model.backbone)
    if config.model.pretrained is not None:
        read_pretrained(config.model.backbone, config.model.pretrained)
    frequency = ((targets == 1).sum(0) + 1) / ((targets >= 0).sum(0) + 2)
    return Materials(splits, counts, vectors, torch.from_numpy(frequency).float())


def describe(materials: Materials, config: ExperimentConfig) -> Iterator[str]:
    """Lines that say what is about to be trained on."""
    splits = materials.splits
    yield from splits.notes
    sizes = [f"train {len(splits.train)}", f"val {len(splits.val)}", f"test {len(splits.test)}" if splits.test else ""]
    yield f"{config.data.dataset}: {len(materials.label_names)} labels, images: {', '.join(filter(None, sizes))}"
    edges = int(attend_mask(materials.counts, config.model.tau).sum()) - len(materials.label_names)
    alone = "" if edges else " (labels only see themselves; a lower model.tau adds edges)"
    yield f"label graph at tau {config.model.tau}: {edges} edges{alone}"
    for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if table is not None:
            empty = [
                label
                for label, present in zip(table.label_names, (table.targets == 1).any(0), strict=True)
                if not present
            ]
            if empty:
                more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
                what = "cannot be learnt" if name == "train" else "AP is nan and left out of mAP"
                yield f"{name}: no image with {', '.join(empty[:8])}{more}; {what}"
