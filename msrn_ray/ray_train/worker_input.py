"""What each worker of a run gets: the experiment, and its data in Ray's object store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from ray.util.queue import Queue
from torch import Tensor

from ..config import ExperimentConfig
from ..labels.graph import LabelCounts
from ..training.inputs import TrainingInputs


@dataclass(frozen=True)
class StoredSplit:
    """One split in the object store: its sample table and the number of its images."""

    table: ray.ObjectRef[pa.Table]
    size: int


@dataclass(frozen=True)
class StoredInputs:
    """Training inputs with the sample tables in the object store, so that runs side by side share them.

    Attributes:
        splits: train, val and, if there is one, test.
        counts, word_vectors, frequency: see `TrainingInputs`.
        data: what `describe_data` returned for them.
    """

    splits: Mapping[str, StoredSplit]
    counts: LabelCounts
    word_vectors: Tensor
    frequency: Tensor
    data: dict[str, str]


@dataclass(frozen=True)
class WorkerInput:
    """What each worker of a run gets.

    Attributes:
        config: the experiment; `train.storage` holds the run folder, `train.run_name` names it.
        stored: the data.
        events: the driver's queue: events of rank 0 and heartbeats of all ranks.
        runs: runs with as many workers that share the cluster.
    """

    config: ExperimentConfig
    stored: StoredInputs
    events: Queue
    runs: int = 1

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.config.train.run_name is not None
        return Path(self.config.train.storage) / self.config.train.run_name


def store_inputs(inputs: TrainingInputs, data: dict[str, str]) -> StoredInputs:
    """Put the sample tables into the object store; Ray must be up."""
    stored = {name: StoredSplit(ray.put(split.table), len(split)) for name, split in inputs.splits.tables.items()}
    return StoredInputs(stored, inputs.counts, inputs.word_vectors, inputs.frequency, data)
