"""Times and memory of alternatives, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

Phases = tuple[float, ...]


def alternate(forms: Mapping[str, Callable[[], Phases]], rounds: int) -> dict[str, Phases]:
    """Medians of the seconds that each form returns, its phases; the forms take turns, so that all see the same machine."""
    for run in forms.values():
        run()
    seen: dict[str, list[Phases]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            seen[name].append(run())
    return {name: tuple(map(statistics.median, zip(*phases, strict=True))) for name, phases in seen.items()}


def stopwatch(*phases: Callable[[], object]) -> Phases:
    """Seconds of each phase."""
    times = []
    for phase in phases:
        start = time.perf_counter()
        phase()
        times.append(time.perf_counter() - start)
    return tuple(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors on the CPU hold at one time while `run` runs, over what they hold at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
