"""A sound data set in COCO's layout, and its diagnosis without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.doctor.diagnosis import Diagnosis, all_samples, diagnose
from msrn_ray.doctor.finding import Finding, LabelFacts
from msrn_ray.ray_data.inspect_images import inspect_rows
from msrn_ray.training.inputs import label_counts

TRAIN = [[0, 1]] * 6 + [[0]] * 4 + [[1]] * 3 + [[2]] * 8 + [[1, 2]] * 2
HELD_OUT = [[0], [1], [2], [0, 1]]


def config(root: Path, **overrides: object) -> ExperimentConfig:
    settings = {"data.dataset": "coco", "data.root": str(root), "data.image_size": 64}
    return ExperimentConfig().with_overrides(
        settings | {name.replace("__", "."): value for name, value in overrides.items()}
    )


def inspect_in_tens(samples: pa.Table, max_pixels: int) -> Iterator[pa.Table]:
    """Do as `inspect_images` does, without Ray, in blocks of ten, the last block first."""
    for start in reversed(range(0, len(samples), 10)):
        yield inspect_rows(samples, start, 10, max_pixels)


def diagnosis_of(root: Path, **overrides: object) -> Diagnosis:
    """Do as `diagnose_data` does, without Ray."""
    settings = config(root, **overrides)
    splits = load_splits(settings)
    facts = pa.concat_tables(inspect_in_tens(all_samples(splits), settings.data.max_pixels))
    counts = label_counts(splits.train, None)
    return diagnose(splits, facts, settings, LabelFacts(counts, counts))


def above_info(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "info"]


def only(findings: Sequence[Finding]) -> Finding:
    """Return the only finding above info."""
    (finding,) = above_info(findings)
    return finding


def photo(root: Path, split: str, row: int) -> Path:
    return root / f"{split}2014" / f"{split}_{row:03}.jpg"
