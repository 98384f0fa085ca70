"""Streams images from a sample table through Ray Data into batches. Training and evaluation get images only from here.

Each rank streams its plan (`training.sampling`). One Ray Data task reads, decodes and augments one block of rows, and returns one uint8
array. An execution of Ray Data continues over the ends of epochs, and the next execution starts before it ends, so no step waits for
either.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch

from ..data_settings import DataSettings
from ..datasets.transforms import decode, multi_scale_crop, resize, smallest_side
from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..ray_cluster.private_api import ExecutionCallback
from ..training.bad_images import BadImage, BadImages
from ..training.sampling import EvalPlan, TrainPlan
from ..types import Batch

Columns = dict[str, npt.NDArray[Any]]

_TENSORS = ("image", "target", "row")
_EXECUTION_BLOCKS = 512  # Ray Data plans all blocks of an execution before the first one starts, about 1 ms each
_LEAD_BLOCKS = 16  # left of an execution when the next one starts
_SCHEDULE_SECONDS = 0.05  # a block of 64 images takes longer to decode
_BLOCKS_PER_TASK = 3  # in the object store: the one that the task writes, a finished one, and one being consumed


class Paced(ExecutionCallback):
    """Makes each step of Ray Data's scheduling loop take `_SCHEDULE_SECONDS` at least.

    A step waits for running tasks. It does not wait if all tasks have ended and the object store has no room for more decoded images. So
    while training is the slower side, the loop would spin. It would take a core and the interpreter's lock from the training.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for what is left of the step's time."""
        time.sleep(max(0.0, self._last + _SCHEDULE_SECONDS - time.monotonic()))
        self._last = time.monotonic()


def limit_ray_data(num_cpus: float) -> None:
    """Configure Ray Data in this process: it keeps the row order, shows no progress bars, is `Paced`, and runs few tasks at a time.

    It may submit twice `num_cpus` tasks of one CPU. Ray Data looks for finished tasks ten times per second, so each core needs a next task
    that already waits.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the plan's order is the contract with the engine
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=2 * num_cpus)
    context.custom_execution_callback_classes = [Paced]


def map_blocks(num_blocks: int, task: Callable[[list[int]], Columns | pa.Table]) -> ray.data.Dataset:
    """Return a data set of `num_blocks` blocks that `task` computes, in order, from their numbers.

    Decoding, preparing and inspecting images share this form: one Ray Data task per block of work.

    Args:
        num_blocks: blocks, each computed by one Ray task with one CPU.
        task: gets the numbers of its blocks, counted from 0; Ray Data may merge blocks.
    """

    def run_block(block: Columns) -> Columns | pa.Table:
        torch.set_num_threads(1)  # tasks are the parallelism; more threads in a task only compete for the cores
        return task([int(number) for number in block["id"]])

    numbers = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    return numbers.map_batches(run_block, batch_size=None, batch_format="numpy", num_cpus=1)


def train_epochs(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan, settings: DataSettings, bad: BadImages
) -> Iterator[Iterator[Batch]]:
    """Return one iterator of step batches per epoch of the plan. Use them up in order. Decoding starts with the call.

    Args:
        table: sample table in the object store.
        plan: this rank's rows.
        settings: image size, augmentation, pixel limit.
        bad: collects the images that cannot be decoded; their batch leaves them out.

    Returns:
        Iterators of `plan.num_steps` batches. A batch that lost all its images keeps one filler.
    """
    if plan.num_blocks == 0:
        return iter(())
    rows = _decoded_rows(table, plan, settings)
    return (_cut(rows, *plan.epoch(epoch), bad) for epoch in range(plan.first_epoch, plan.epochs))


def eval_batches(
    table: ray.ObjectRef[pa.Table], plan: EvalPlan, settings: DataSettings, bad: BadImages
) -> Iterator[Batch]:
    """Yield this rank's share of a split in plan order. A batch has `plan.block_size` images, or fewer if some are bad."""
    if plan.num_blocks == 0:
        return
    num_rows = len(plan.rows)
    sizes = np.full(plan.num_blocks, plan.block_size)
    sizes[-1] = num_rows - plan.block_size * (plan.num_blocks - 1)
    yield from _cut(_decoded_rows(table, plan, settings), plan.rows, np.ones(num_rows, bool), sizes, bad)


def _decoded_rows(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings
) -> Iterator[Columns]:
    """Return an iterator over the decoded blocks in plan order.

    The call itself starts the first execution of Ray Data. Each further one starts when the one before has `_LEAD_BLOCKS` left.
    """
    starter = ThreadPoolExecutor(1, "decode-start")
    start = partial(_start_execution, table, plan, settings)
    blocks = range(plan.num_blocks)
    executions = [blocks[first : first + _EXECUTION_BLOCKS] for first in blocks[::_EXECUTION_BLOCKS]]
    return _join_executions(starter, start, executions, starter.submit(start, executions[0]))


def _join_executions(
    starter: ThreadPoolExecutor,
    start: Callable[[range], Iterator[Columns]],
    executions: list[range],
    upcoming: Future[Iterator[Columns]],
) -> Iterator[Columns]:
    with starter:
        for index, blocks in enumerate(executions, 1):
            for left, block in zip(reversed(range(len(blocks))), upcoming.result(), strict=True):
                if left == min(_LEAD_BLOCKS, len(blocks) - 1) and index < len(executions):
                    upcoming = starter.submit(start, executions[index])
                yield block


def _start_execution(
    table: ray.ObjectRef[pa.Table], plan: TrainPlan | EvalPlan, settings: DataSettings, blocks: range
) -> Iterator[Columns]:
    """Start one execution of Ray Data over some blocks of the plan. Return its iterator once the first block is decoded.

    The number of tasks alone determines how many decoded images wait in the object store.
    """

    def decode_blocks(numbers: list[int]) -> Columns:
        parts = [plan.block(blocks[number]) for number in numbers]
        rows = np.concatenate([rows for rows, _ in parts])
        epochs = [epoch for rows, epoch in parts for _ in rows]
        return decode_rows(ray.get(table), rows, epochs, settings, seed=getattr(plan, "seed", 0))

    decoded = map_blocks(len(blocks), decode_blocks)
    decoded.context.target_max_block_size = None  # a task's output stays one block, however large the images are
    options = decoded.context.execution_options
    block_bytes = plan.block_size * 3 * settings.image_size**2
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=_BLOCKS_PER_TASK * options.resource_limits.cpu * block_bytes
    )
    batches = cast(
        Iterator[Columns], iter(decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    )
    return chain([next(batches)], batches)


def decode_rows(
    samples: pa.Table, rows: npt.NDArray[np.int64], epochs: list[int | None], settings: DataSettings, seed: int
) -> Columns:
    """Read, decode and augment some rows of a sample table.

    Args:
        samples: a `SampleTable.table`.
        rows: [n] row numbers.
        epochs: [n] epoch that seeds a row's augmentation, or None for the evaluation view.
        settings: image size, augmentation, pixel limit.
        seed: determines the augmentation together with epoch and row.

    Returns:
        `image` [n, 3, S, S] uint8 (zeros if bad), `target` [n, C] int8, `row` [n] int64, `uri` and `error` [n] str ("" if sound).
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
    """Cut decoded blocks into batches of the planned sizes. Take no more blocks than the batches need."""
    held: list[Columns] = []
    start = 0
    for size in sizes:
        while sum(len(block["row"]) for block in held) < size:
            held.append(next(blocks))
        first, *others = held
        merged = {name: np.concatenate([block[name] for block in held]) for name in first} if others else first
        batch = {name: column[:size] for name, column in merged.items()}
        held = [{name: column[size:] for name, column in merged.items()}] if len(merged["row"]) > size else []
        assert np.array_equal(batch["row"], planned[start : start + size]), "Ray Data delivered rows out of plan order"
        yield _to_batch(batch, valid[start : start + size], bad)
        start += int(size)
    assert not held, "a block crossed the end of an epoch"


def _to_batch(columns: Columns, valid: npt.NDArray[np.bool_], bad: BadImages) -> Batch:
    sound = columns["error"] == ""
    for index in np.flatnonzero(~sound):
        bad.add(BadImage(int(columns["row"][index]), str(columns["uri"][index]), str(columns["error"][index])))
    keep: npt.NDArray[np.intp] | slice = slice(None) if sound.all() else np.flatnonzero(sound)
    if not sound.any():
        keep, valid = slice(1), np.zeros_like(valid)
    with warnings.catch_warnings():
        # The tensors share the object store's memory, which is read-only; nothing writes to a batch
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return Batch(*(torch.from_numpy(column[keep]) for column in (*(columns[name] for name in _TENSORS), valid)))
