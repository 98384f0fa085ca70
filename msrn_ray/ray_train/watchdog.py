"""Names the rank that hangs: the driver's ear for the ranks' signs of life (`telemetry.Pulse`), and its hand that ends a hung process, or a
run that has no room for its workers."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import UserError
from ..ray_cluster.connection import set_aside
from .heartbeat import DONE, WAITING, beat_seconds

_ALONE_SECONDS = 60.0  # without any worker, after which a line says so; starting them takes up to half of it
_WARN_PART = 0.2  # of `train.hang_minutes`, after which a line warns


@dataclass(frozen=True)
class _Heard:
    """The last beat of a rank, and when it came (monotonic seconds)."""

    beat: Mapping[str, Any]
    at: float

    def idle(self, now: float) -> float:
        """Seconds since the rank took or finished something."""
        return float(self.beat["idle"]) + now - self.at


class Watchdog:
    """Listens to the beats of all ranks and ends the process of one that does nothing any more: a lost worker, as Ray Train sees it.

    When one rank hangs, the others soon wait for it in their step. So the rank that is named is one that is silent; else one that waits
    for data; else the one that is furthest behind.

    Args:
        hang_minutes: a rank that takes longer over one batch is hung.
        say: prints a line for the user.
        end: ends the process of a beat; False if it was not there any more.
        wait_minutes: a run without any worker for so long is given up: where too few machines are left, Ray Train waits for ever.
        give_up: ends the run.
        set_aside: takes a node whose disk is full out of use, since nothing can start there; gets its id, why, and the nodes that were
            taken out before; False if none would be left.

    Attributes:
        verdict: which rank hung, until new workers have started.
        abandoned: why the run was given up.
    """

    def __init__(
        self,
        hang_minutes: float,
        say: Callable[[str], None],
        end: Callable[[Mapping[str, Any]], bool] | None = None,
        *,
        wait_minutes: float = math.inf,
        give_up: Callable[[], None] = lambda: None,
        set_aside: Callable[[str, str, Collection[str]], bool] = set_aside,
    ) -> None:
        self.verdict: str | None = None
        self.abandoned: str | None = None
        self._wait_minutes, self._give_up, self._set_aside = wait_minutes, give_up, set_aside
        self._full: set[str] = set()  # nodes
        self._last = time.monotonic()  # when any rank was heard
        self._waiting = False  # that this was said
        self._limit = hang_minutes * 60
        self._hang_minutes, self._say, self._end = hang_minutes, say, end or end_process
        self._heard: dict[int, _Heard] = {}
        self._ended: set[tuple[str, int]] = set()  # node and process of ranks that go down with one that was ended
        self._warned = False

    def restart(self) -> None:
        """Forgets verdict, warning and ranks: new workers have started, perhaps fewer."""
        self.verdict, self._warned = None, False
        self._heard.clear()

    def forget(self) -> None:
        """Forgets the ranks of workers that Ray Train ends because one of them failed, and what they may still say."""
        self._ended |= {_process(heard.beat) for heard in self._heard.values()}
        self._heard.clear()

    def hear(self, beat: Mapping[str, Any]) -> None:
        """Takes in one beat."""
        self._last, self._waiting = time.monotonic(), False
        if beat["full"] and beat["node_id"] not in self._full:
            self._leave(beat)
        rank = int(beat["rank"])
        if _process(beat) in self._ended:
            return
        if beat["doing"] == DONE:
            self._heard.pop(rank, None)
        else:
            self._heard[rank] = _Heard(beat, time.monotonic())

    def look(self) -> None:
        """Warns of the rank that takes long, once until all go on; ends the process of one that is hung, or a run without workers."""
        now = time.monotonic()
        self._look_for_any(now)
        late = {rank for rank, heard in self._heard.items() if heard.idle(now) > _WARN_PART * self._limit}
        if not late:
            self._warned = False
            return
        rank = min(late, key=lambda rank: self._guilt(rank, now))
        if not self._warned:
            self._say(f"{self._describe(rank, now)}; its process is ended if that lasts {self._hang_minutes:g} minutes")
            self._warned = True
        if self._heard[rank].idle(now) <= self._limit:
            return
        described = self._describe(rank, now)
        processes = {_process(heard.beat) for heard in self._heard.values()}
        if self._end(self._heard[rank].beat):
            self._ended |= processes
            self.verdict = (
                f"{described}: longer than train.hang_minutes={self._hang_minutes:g}; look at that process's node and log, then go on"
                " with --resume"
            )
            self._say(f"{described}: its process was ended")
        self._heard.clear()  # the others only waited for it

    def _leave(self, beat: Mapping[str, Any]) -> None:
        before = frozenset(self._full)
        self._full.add(str(beat["node_id"]))
        place = f"node {beat['node']}: the disk of {beat['full']} is full"
        try:
            others = self._set_aside(beat["node_id"], place, before)
        except (UserError, ray.exceptions.RayError) as error:  # the run is tried as it is
            self._say(str(error))
            return
        if others:
            self._say(f"{place}; nothing more is started there until Ray on it is started again")
        else:
            self.abandoned = f"{place}, and there is no other node; make room, and go on with --resume"
            self._say(self.abandoned)  # a trial of a search cannot be given up from here
            self._give_up()

    def _look_for_any(self, now: float) -> None:
        if self._wait_minutes == math.inf:
            return
        if now - self._last > _ALONE_SECONDS and not self._waiting:
            self._say(
                f"no sign of life of any worker for {_ALONE_SECONDS:g} s; waiting for room, resources.wait_minutes={self._wait_minutes:g}"
                " at most"
            )
            self._waiting = True
        if now - self._last > _ALONE_SECONDS + 60 * self._wait_minutes and self.abandoned is None:
            self.abandoned = (
                f"no room for the workers for longer than resources.wait_minutes={self._wait_minutes:g}; bring the cluster's machines"
                " back, or lower resources.num_workers, and go on with --resume"
            )
            self._give_up()

    def _guilt(self, rank: int, now: float) -> tuple[bool, bool, int, int, float]:
        heard = self._heard[rank]
        beat = heard.beat
        return (not self._silent(rank, now), beat["doing"] != WAITING, beat["epoch"], beat["step"], -heard.idle(now))

    def _silent(self, rank: int, now: float) -> bool:
        return now - self._heard[rank].at > 2.5 * beat_seconds(self._hang_minutes)

    def _describe(self, rank: int, now: float) -> str:
        heard = self._heard[rank]
        beat = heard.beat
        sign = "no sign of life" if self._silent(rank, now) else "alive"
        return (
            f"rank {rank} (node {beat['node']}, process {beat['pid']}) has done nothing for {heard.idle(now):.0f} s,"
            f" {sign}, last seen in epoch {beat['epoch']}, step {beat['step']}, {beat['doing']}"
        )


def _process(beat: Mapping[str, Any]) -> tuple[str, int]:
    return str(beat["node_id"]), int(beat["pid"])


def end_process(beat: Mapping[str, Any]) -> bool:
    """Ends the process of a beat on its node, even one that is stopped; False if it, or the node, is not there any more."""
    here = NodeAffinitySchedulingStrategy(beat["node_id"], soft=False)
    try:
        return bool(ray.get(_kill.options(scheduling_strategy=here).remote(beat["pid"]), timeout=60))
    except ray.exceptions.RayError:  # the node is lost, or does not answer in time
        return False  # Ray Train learns of that by itself


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
