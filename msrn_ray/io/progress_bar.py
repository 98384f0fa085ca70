"""Progress of a pass over all images: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0  # between two lines without a terminal


@contextmanager
def count_images(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` images; yield a function that adds finished images."""
    start = last = time.monotonic()
    done = 0
    columns = (
        TextColumn("images"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext()
    with progress as bar:
        if bar is not None:
            bar.add_task("images", total=total, rate="")

        def advance(number: int) -> None:
            nonlocal done, last
            now = time.monotonic()
            done += number
            rate = f"{done / max(1e-9, now - start):.0f} img/s"
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, rate=rate)
            elif now - last >= _PLAIN_SECONDS or done == total:
                last = now
                console.print(f"{done}/{total} images  {rate}", markup=False)

        yield advance
