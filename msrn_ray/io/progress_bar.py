"""Progress of a pass over all images: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0  # between two lines without a terminal


@contextmanager
def count_images(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` images; yield a function that adds finished images."""
    start = last = time.monotonic()
    done = 0

    def rate() -> str:
        return f"{done / max(1e-9, time.monotonic() - start):.0f} img/s"

    if console.is_terminal:
        columns = (
            TextColumn("images"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("images", total=total, rate="")

            def advance_bar(number: int) -> None:
                nonlocal done
                done += number
                bar.update(task, completed=done, rate=rate())

            yield advance_bar
        return

    def advance_lines(number: int) -> None:
        nonlocal done, last
        done += number
        if time.monotonic() - last >= _PLAIN_SECONDS or done == total:
            last = time.monotonic()
            console.print(f"{done}/{total} images  {rate()}", markup=False)

    yield advance_lines
