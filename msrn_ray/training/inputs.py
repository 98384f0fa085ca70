"""Gathers what training needs before any worker starts: splits, label graph, word vectors; no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..datasets.protocol import Splits, fingerprint, load_splits
from ..errors import UserError
from ..labels.graph import LabelCounts, Provenance, attend_mask, choose_tau, count_labels, how_to_add_edges, load_counts
from ..labels.word_vectors import LEARNED, load_word_vectors
from ..model.backbone import build_resnet, read_pretrained
from ..types import ABSENT, PRESENT, SampleTable


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that training needs of the data set; plain data that travels to the workers.

    Attributes:
        splits: train, val, test.
        counts: C names in the order of the logits, with the label counts of train, or those of `data.label_counts`.
        word_vectors: [C, V] float32.
        missing_words: labels that are not in the source of the word vectors.
        frequency: [C] float32 in (0, 1), how often a label is present among train images where it is known (add-one smoothed).
    """

    splits: Splits
    counts: LabelCounts
    word_vectors: Tensor
    missing_words: tuple[str, ...]
    frequency: Tensor


def gather_inputs(config: ExperimentConfig) -> TrainingInputs:
    """Read labels, label graph and word vectors, and check that the backbone's weights are available.

    Raises:
        UserError: for anything wrong with them.
    """
    splits, data = load_splits(config), config.data
    targets, names = splits.train.targets, splits.train.label_names
    counts = label_counts(splits.train, data.label_counts)
    vectors, missing = load_word_vectors(names, data.word_vectors, missing=data.missing_words, seed=config.train.seed)
    build_resnet(config.model.backbone)
    if config.model.pretrained is not None:
        read_pretrained(config.model.backbone, config.model.pretrained)
    frequency = ((targets == 1).sum(0) + 1) / ((targets >= 0).sum(0) + 2)
    return TrainingInputs(splits, counts, vectors, missing, torch.from_numpy(frequency).float())


def label_counts(train: SampleTable, file: str | None) -> LabelCounts:
    """Return the counts for the label graph, from a train split or from a file (`data.label_counts`).

    Raises:
        UserError: if the file cannot be read or its labels differ from the split's.
    """
    if file is not None:
        return load_counts(Path(file).expanduser(), train.label_names)
    return count_labels(train.targets, train.label_names, Provenance(train.source, len(train), fingerprint(train)))


def describe_inputs(inputs: TrainingInputs, config: ExperimentConfig) -> Iterator[str]:
    """Yield lines that describe the data, the label graph and the word vectors of a run."""
    splits = inputs.splits
    yield from splits.notes
    sizes = ", ".join(f"{name} {len(table)}" for name, table in splits.tables.items())
    yield f"{config.data.dataset}: {len(inputs.counts.names)} labels, images: {sizes}"
    if (num_images := len(splits.train)) < config.train.batch_size:
        yield (
            f"warning: train.batch_size={config.train.batch_size} is larger than the {num_images} train images, so an epoch has a single"
            f" step; lower --train.batch-size below {num_images}"
        )
    if config.data.label_counts is not None:
        yield f"label graph from {config.data.label_counts}: {inputs.counts.provenance or 'the file names no source'}"
    tau = choose_tau(inputs.counts, config.model.tau, config.model.tau_degree)
    edges = int(attend_mask(inputs.counts, tau).sum()) - len(inputs.counts.names)
    chosen = " (auto)" if config.model.tau == "auto" else ""
    alone = "" if edges else f" (each label attends only to itself; {how_to_add_edges(inputs.counts)})"
    yield f"label graph at tau {tau:.4g}{chosen}: {edges} edges{alone}"
    if config.data.word_vectors == LEARNED:
        yield f"word vectors: {inputs.word_vectors.shape[1]} numbers per label, learned from a random start"
    elif inputs.missing_words:
        names = ", ".join(inputs.missing_words)
        yield f"word vectors: {config.data.missing_words} for {len(inputs.missing_words)} labels not found: {names}"
    for name, table in splits.tables.items():
        yield from _describe_one_sided_labels(name, table)


def _describe_one_sided_labels(split: str, table: SampleTable) -> Iterator[str]:
    """Yield a line on the labels that no image of a split has, and one on those that every image has where known."""
    targets, is_train = table.targets, split == "train"
    empty = ~(targets == PRESENT).any(0)
    always = ~empty & ~(targets == ABSENT).any(0)
    if empty.any():
        what = "training cannot learn them" if is_train else "their AP is nan and does not count in mAP"
        yield f"{split}: no image with {_first_names(table.label_names, empty)}; {what}"
    if always.any():
        what = "training has nothing to compare them with" if is_train else "their AP is nan and does not count in mAP"
        prefix = "warning: " if is_train else ""
        yield f"{prefix}{split}: every image with known {_first_names(table.label_names, always)} has it; {what}"
    num_left_out = int((empty | always).sum())
    if num_left_out and not is_train:
        fallback = (
            "" if num_left_out < len(empty) else ": it is nan" + ", and the last epoch is the best" * (split == "val")
        )
        yield f"{split}: mAP leaves out {num_left_out} of {len(empty)} labels{fallback}"


def _first_names(names: Sequence[str], chosen: npt.NDArray[np.bool_]) -> str:
    """Return the chosen names, at most eight, and how many more there are."""
    listed = list(compress(names, chosen))
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def check_batch(config: ExperimentConfig, num_images: int) -> None:
    """Refuse settings that leave nothing to train on.

    Raises:
        UserError: if `data.drop_last` drops every image.
    """
    if config.data.drop_last and num_images < config.train.batch_size:
        raise UserError(
            f"data.drop_last drops all {num_images} train images, since train.batch_size={config.train.batch_size} is larger;"
            " lower train.batch_size, or set data.drop_last false"
        )
