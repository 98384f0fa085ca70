"""Sample table -> Ray Data -> Batch: the only door through which images come in.

Each rank streams its own plan (`sampling`): one Ray Data task reads, decodes and augments one block of rows and ships it as one uint8
array. Training is ONE execution over all epochs, so that the next epoch is decoded while this one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch

from . import distributed
from .config import DataSettings
from .errors import UserError
from .sampling import EvalPlan, TrainPlan
from .storage import read_bytes
from .transforms import decode, multi_scale_crop, resize
from .types import Batch

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read or decoded."""

    row: int
    uri: str
    reason: str


@dataclass
class BadImages:
    """The bad images that a reader met, each row once."""

    seen: dict[int, BadImage] = field(default_factory=dict)

    def add(self, image: BadImage) -> None:
        """Keeps the first report of a row; the same file is met again in each epoch."""
        self.seen.setdefault(image.row, image)

    def gather(self) -> dict[int, BadImage]:
        """Those of all ranks by row, on every rank."""
        return {image.row: image for part in distributed.all_gather(self.seen) for image in part.values()}


def limit_ray_data(num_cpus: float) -> None:
    """Sets this process's Ray Data: row order kept, no progress bars, at most `num_cpus` decode tasks of one CPU at a time."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the plan's order is the contract with the engine
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=num_cpus)


def train_epochs(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan, settings: DataSettings, bad: BadImages
) -> Iterator[Iterator[Batch]]:
    """One iterator of step batches for each epoch of the plan; they must be used up in turn.

    Args:
        table: sample table in the object store.
        plan: this rank's rows.
        settings: image size, augmentation, pixel limit.
        bad: collects images that could not be decoded; they are taken out of their batch.

    Yields:
        Iterators of `plan.num_steps` batches; a batch that lost all its images keeps one filler.
    """
    if plan.num_blocks == 0:
        return
    rows = _decoded_rows(table, plan, settings)
    for epoch in range(plan.first_epoch, plan.epochs):
        planned, valid, sizes = plan.epoch(epoch)
        yield _cut(rows, planned, valid, sizes, bad)


def eval_batches(
    table: ray.ObjectRef[pa.Table], plan: EvalPlan, settings: DataSettings, bad: BadImages
) -> Iterator[Batch]:
    """This rank's share of a split in plan order, `plan.block_size` images a batch, fewer where images were bad."""
    if plan.num_blocks == 0:
        return
    rows = _decoded_rows(table, plan, settings)
    planned = plan.rows
    sizes = np.full(plan.num_blocks, plan.block_size)
    sizes[-1] = len(planned) - plan.block_size * (plan.num_blocks - 1)
    yield from _cut(rows, planned, np.ones(len(planned), bool), sizes, bad)


def _decoded_rows(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings
) -> Iterator[Columns]:
    """Decoded blocks in plan order."""
    blocks = ray.data.range(plan.num_blocks, override_num_blocks=plan.num_blocks)
    decoded = blocks.map_batches(
        _block_decoder(table, plan, settings), batch_size=None, batch_format="numpy", num_cpus=1
    )
    return cast(
        Iterator[Columns], iter(decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    )


def _block_decoder(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings
) -> Callable[[Columns], Columns]:
    def decode_block(block: Columns) -> Columns:
        torch.set_num_threads(1)  # tasks are the parallelism; more threads in each only fight for the cores
        samples = ray.get(table)
        parts = [plan.block(int(index)) for index in block["id"]]
        rows = np.concatenate([rows for rows, _ in parts])
        epochs = [epoch for rows, epoch in parts for _ in rows]
        return decode_rows(samples, rows, epochs, settings, seed=getattr(plan, "seed", 0))

    return decode_block


def decode_rows(
    samples: pa.Table, rows: npt.NDArray[np.int64], epochs: list[int | None], settings: DataSettings, seed: int
) -> Columns:
    """Reads, decodes and augments some rows of a sample table.

    Args:
        samples: a `SampleTable.table`.
        rows: [n] row numbers.
        epochs: [n], the epoch that seeds a row's augmentation, or None for the evaluation view.
        settings: image size, augmentation, pixel limit.
        seed: with epoch and row, decides the augmentation.

    Returns:
        `image` [n, 3, S, S] uint8 (zeros where bad), `target` [n, C] int8, `row` [n] int64, `uri` and `error` [n] str ("" = sound).
    """
    chosen = samples.take(pa.array(rows))
    uris = chosen["uri"].to_pylist()
    size = settings.image_size
    images = np.zeros((len(rows), 3, size, size), np.uint8)
    errors = []
    for index, (row, uri, epoch) in enumerate(zip(rows, uris, epochs, strict=True)):
        try:
            image = decode(read_bytes(uri), max_pixels=settings.max_pixels)
            if epoch is None:
                view = resize(image, size)
            else:
                rng = np.random.default_rng([seed, epoch, int(row)])
                view = multi_scale_crop(image, size, settings.crop_scales, rng, flip=settings.flip)
            images[index] = view.numpy()
            errors.append("")
        except (UserError, OSError) as error:
            errors.append(str(error) or type(error).__name__)
    target = np.asarray(chosen["target"].combine_chunks().flatten()).reshape(len(rows), -1)
    return {
        "image": images,
        "target": target.astype(np.int8),
        "row": rows,
        "uri": np.array(uris, dtype=object),
        "error": np.array(errors, dtype=object),
    }


def _cut(
    blocks: Iterator[Columns],
    planned: npt.NDArray[np.int64],
    valid: npt.NDArray[np.bool_],
    sizes: npt.NDArray[np.int64],
    bad: BadImages,
) -> Iterator[Batch]:
    """Cuts decoded blocks into batches of the planned sizes; takes no block more than they need."""
    held: list[Columns] = []
    start = 0
    for size in sizes:
        while sum(len(block["row"]) for block in held) < size:
            held.append(next(blocks))
        first, *others = held
        merged = {name: np.concatenate([block[name] for block in held]) for name in first} if others else first
        now = {name: column[:size] for name, column in merged.items()}
        held = [{name: column[size:] for name, column in merged.items()}] if len(merged["row"]) > size else []
        assert np.array_equal(now["row"], planned[start : start + size]), "Ray Data delivered rows out of plan order"
        yield _to_batch(now, valid[start : start + size], bad)
        start += int(size)
    assert not held, "a block crossed the end of an epoch"


def _to_batch(columns: Columns, valid: npt.NDArray[np.bool_], bad: BadImages) -> Batch:
    sound = columns["error"] == ""
    for index in np.flatnonzero(~sound):
        bad.add(BadImage(int(columns["row"][index]), str(columns["uri"][index]), str(columns["error"][index])))
    keep = np.flatnonzero(sound)
    if not len(keep):
        keep, valid = np.array([0]), np.zeros_like(valid)
    return Batch(
        torch.from_numpy(columns["image"][keep]),
        torch.from_numpy(columns["target"][keep]),
        torch.from_numpy(columns["row"][keep]),
        torch.from_numpy(valid[keep]),
    )
