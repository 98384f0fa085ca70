"""Inspects every image of a data set once, in a stream: content hash, size in pixels and bytes, and whether it can be decoded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from rich.console import Console

from ..config import ExperimentConfig
from ..datasets.protocol import Splits, load_splits
from ..datasets.transforms import decode
from ..doctor.diagnosis import FACTS, Diagnosis, all_samples, diagnose
from ..doctor.finding import LabelFacts
from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..io.progress_bar import count_images
from ..labels.word_vectors import load_word_vectors
from ..ray_cluster.connection import connect
from ..training.inputs import label_counts
from .pipeline import limit_ray_data, map_blocks

# Rows per task: a large data set gets about as many tasks as this, and a small one has tasks for all cores
_MIN_ROWS, _MAX_ROWS, _TASKS = 32, 1024, 2048


def diagnose_data(config: ExperimentConfig) -> Diagnosis:
    """Read the data set as training does, each image once, and return what is wrong with it.

    Raises:
        UserError: if the labels cannot be read at all.
    """
    splits = load_splits(config)
    left_out = images_left_out(config, splits)
    counts = label_counts(splits.train, None)
    graph = counts if config.data.label_counts is None else label_counts(splits.train, config.data.label_counts)
    missing = load_word_vectors(splits.train.label_names, config.data.word_vectors, missing="zero").missing
    samples = all_samples(splits)
    print(f"reading {len(samples):,} images; starting Ray", flush=True)
    connect(config.resources)
    # its plans and warnings mean nothing to the reader of a report
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    facts = []
    with count_images(Console(stderr=True, highlight=False), len(samples)) as advance:
        for block in inspect_images(samples, config.data.max_pixels):
            facts.append(block)
            advance(len(block))
    return diagnose(splits, pa.concat_tables(facts), config, LabelFacts(counts, graph, missing), left_out)


def images_left_out(config: ExperimentConfig, splits: Splits) -> pa.Table:
    """Return the rows of the unlabelled images that the settings keep out of the splits."""
    used = all_samples(splits)
    if config.data.keep_unlabelled_train and config.data.keep_unlabelled_eval:
        return used.slice(0, 0)
    everything = {"data.keep_unlabelled_train": True, "data.keep_unlabelled_eval": True}
    whole = all_samples(load_splits(config.with_overrides(everything)))
    return whole.filter(pc.invert(pc.is_in(whole["uri"], used["uri"])))


def inspect_images(samples: pa.Table, max_pixels: int) -> Iterator[pa.Table]:
    """Yield the facts of all images, block by block in the order of `samples`. Ray must be up.

    Args:
        samples: table with a column `uri`.
        max_pixels: larger images count as unreadable, as in training.

    Yields:
        Tables of schema `doctor.diagnosis.FACTS`; their column `row` counts from the first row of `samples`.
    """
    limit_ray_data(ray.cluster_resources()["CPU"])
    rows = int(np.clip(-(-len(samples) // _TASKS), _MIN_ROWS, _MAX_ROWS))
    table = ray.put(samples.select(["uri"]))

    def inspect(numbers: list[int]) -> pa.Table:
        return pa.concat_tables([inspect_rows(ray.get(table), number * rows, rows, max_pixels) for number in numbers])

    facts = map_blocks(-(-len(samples) // rows), inspect)
    yield from cast(Iterator[pa.Table], iter(facts.iter_batches(batch_size=None, batch_format="pyarrow")))


def inspect_rows(samples: pa.Table, start: int, number: int, max_pixels: int) -> pa.Table:
    """Return the facts of up to `number` images from row `start`; see `inspect_images`."""
    uris = samples["uri"].slice(start, number).to_pylist()
    facts: list[dict[str, Any]] = []
    for row, uri in enumerate(uris, start):
        digest, num_bytes, height, width, error = None, 0, 0, 0, ""
        try:
            data = read_bytes(uri)
            digest, num_bytes = hashlib.blake2b(data, digest_size=16).digest(), len(data)
            height, width = decode(data, max_pixels=max_pixels).shape[-2:]
        except (UserError, OSError) as failure:
            error = str(failure) or type(failure).__name__
        facts.append(dict(zip(FACTS.names, (row, digest, width, height, num_bytes, error), strict=True)))
    return pa.Table.from_pylist(facts, schema=FACTS)
