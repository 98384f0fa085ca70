"""Sample table -> Ray Data -> Batch: the only door through which images come in.

Each rank streams its own plan (`sampling`): one Ray Data task reads, decodes and augments one block of rows and ships it as one uint8
array. An execution of Ray Data goes on over the ends of epochs, and the next one starts before it ends, so that no step waits for either.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch

from ..config import DataSettings
from ..datasets.transforms import decode, multi_scale_crop, resize, smallest_side
from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..ray_cluster.private_api import ExecutionCallback
from ..training.bad_images import BadImage, BadImages
from ..training.sampling import EvalPlan, TrainPlan
from ..types import Batch

Columns = dict[str, npt.NDArray[Any]]
_TENSORS = ("image", "target", "row")
_EXECUTION_BLOCKS = 512  # Ray Data looks at all blocks of an execution before the first one starts, about 1 ms each
_LEAD_BLOCKS = 16  # left of an execution when the next one is started
_SCHEDULE_SECONDS = 0.05  # a block of 64 images takes longer to decode
_BLOCKS_A_TASK = (
    3  # room in the object store for each: the block it writes, one that is finished, one that is being consumed
)


class Paced(ExecutionCallback):
    """Lets a step of Ray Data's scheduling loop take `_SCHEDULE_SECONDS` at least.

    A step waits for tasks that run, but not where all of them have ended and there is no room yet for what they decoded. So it is while
    training is the slower side: the loop would turn without a pause, on a core and with the interpreter's lock that the training needs.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """A step has ended."""
        time.sleep(max(0.0, self._last + _SCHEDULE_SECONDS - time.monotonic()))
        self._last = time.monotonic()


def limit_ray_data(num_cpus: float) -> None:
    """Sets this process's Ray Data: row order kept, no progress bars, how many decode tasks of one CPU it hands out at a time, `Paced`.

    These are twice `num_cpus`: Ray Data looks for finished tasks ten times a second, so each core needs a next task that already waits.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the plan's order is the contract with the engine
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=2 * num_cpus)
    context.custom_execution_callback_classes = [Paced]


def train_epochs(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan, settings: DataSettings, bad: BadImages
) -> Iterator[Iterator[Batch]]:
    """One iterator of step batches for each epoch of the plan; they must be used up in turn. Decoding starts with the call.

    Args:
        table: sample table in the object store.
        plan: this rank's rows.
        settings: image size, augmentation, pixel limit.
        bad: collects images that could not be decoded; they are taken out of their batch.

    Returns:
        Iterators of `plan.num_steps` batches; a batch that lost all its images keeps one filler.
    """
    if plan.num_blocks == 0:
        return iter(())
    return _epochs(_decoded_rows(table, plan, settings), plan, bad)


def _epochs(rows: Iterator[Columns], plan: TrainPlan, bad: BadImages) -> Iterator[Iterator[Batch]]:
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
    """Decoded blocks in plan order.

    The first execution of Ray Data is started by the call itself, and each further one while the one before has `_LEAD_BLOCKS` left.
    """
    starter = ThreadPoolExecutor(1, "decode-start")
    starts = range(0, plan.num_blocks, _EXECUTION_BLOCKS)
    sizes = [min(_EXECUTION_BLOCKS, plan.num_blocks - start) for start in starts]
    executions = [
        partial(_started, table, plan, settings, start, size) for start, size in zip(starts, sizes, strict=True)
    ]
    return _joined(starter, executions, sizes, starter.submit(executions[0]))


def _joined(
    starter: ThreadPoolExecutor,
    executions: Sequence[Callable[[], Iterator[Columns]]],
    sizes: list[int],
    upcoming: Future[Iterator[Columns]],
) -> Iterator[Columns]:
    with starter:
        for index, size in enumerate(sizes):
            blocks = upcoming.result()
            for left, block in zip(reversed(range(size)), blocks, strict=True):
                if left == min(_LEAD_BLOCKS, size - 1) and index + 1 < len(executions):
                    upcoming = starter.submit(executions[index + 1])
                yield block


def _started(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings, start: int, size: int
) -> Iterator[Columns]:
    """One execution of Ray Data over `size` blocks of the plan from `start` on, after its first block is there.

    How much waits in the object store depends on the number of tasks alone.
    """
    blocks = ray.data.range(size, override_num_blocks=size)
    decoded = blocks.map_batches(
        _block_decoder(table, plan, settings, start), batch_size=None, batch_format="numpy", num_cpus=1
    )
    decoded.context.target_max_block_size = None  # a task's output stays one block, however large the images are
    options = decoded.context.execution_options
    block_bytes = plan.block_size * 3 * settings.image_size**2
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=_BLOCKS_A_TASK * options.resource_limits.cpu * block_bytes
    )
    batches = cast(
        Iterator[Columns], iter(decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    )
    return chain([next(batches)], batches)


def _block_decoder(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings, start: int
) -> Callable[[Columns], Columns]:
    def decode_block(block: Columns) -> Columns:
        torch.set_num_threads(1)  # tasks are the parallelism; more threads in each only fight for the cores
        samples = ray.get(table)
        parts = [plan.block(start + int(index)) for index in block["id"]]
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
    sides = (size, smallest_side(size, settings.crop_scales))
    images = np.zeros((len(rows), 3, size, size), np.uint8)
    errors = []
    for index, (row, uri, epoch) in enumerate(zip(rows, uris, epochs, strict=True)):
        try:
            image = decode(read_bytes(uri), max_pixels=settings.max_pixels, short_side=sides[epoch is not None])
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
    keep: npt.NDArray[np.intp] | slice = slice(None) if sound.all() else np.flatnonzero(sound)
    if not sound.any():
        keep, valid = slice(1), np.zeros_like(valid)
    with (
        warnings.catch_warnings()
    ):  # images stay where the object store has them, which may not be written to, and is not
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return Batch(*(torch.from_numpy(column[keep]) for column in (*(columns[name] for name in _TENSORS), valid)))
