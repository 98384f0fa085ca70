"""Detects hung workers from missing heartbeats and ends their process; gives up a run that gets no workers."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import ray

from ..errors import UserError
from ..ray_cluster.connection import drain_node, on_node
from ..runs.events import Heartbeat
from .heartbeat import DONE, WAITING, heartbeat_seconds

# Seconds without any worker until a line reports it. Starting workers takes up to half of it
_NO_WORKER_SECONDS = 60.0
_WARN_FRACTION = 0.2  # of `train.hang_minutes`, after which a line warns


@dataclass(frozen=True)
class _Received:
    """The last heartbeat of a rank, and when it arrived (monotonic seconds)."""

    heartbeat: Heartbeat
    at: float

    def idle(self, now: float) -> float:
        """Seconds since the rank took or finished something."""
        return self.heartbeat.idle_seconds + now - self.at


@dataclass(frozen=True)
class WatchdogActions:
    """What the watchdog does to a run.

    Attributes:
        log: prints a line for the user.
        end_process: ends the worker process of a heartbeat; False if it was gone already.
        give_up: ends the run.
        drain_node: stops Ray from starting anything on a node; takes its id, the reason and the nodes drained before. False if no node
            would be left.
    """

    log: Callable[[str], None]
    end_process: Callable[[Heartbeat], bool]
    give_up: Callable[[], None] = lambda: None
    drain_node: Callable[[str, str, Collection[str]], bool] = drain_node


class Watchdog:
    """Receives the heartbeats of all ranks and ends the process of one that hangs. Ray Train then sees a lost worker.

    When one rank hangs, the others soon wait for it in their step. So the watchdog blames a rank that sends nothing; else one that waits
    for data; else the one that is furthest behind.

    Args:
        hang_minutes: a rank that takes longer over one batch hangs.
        actions: what the watchdog does.
        wait_minutes: how long a run may be without any worker. If too few nodes are left, Ray Train itself waits forever.

    Attributes:
        hang: which rank hung, until new workers have started.
        give_up_reason: why the run was given up.
    """

    def __init__(self, hang_minutes: float, actions: WatchdogActions, *, wait_minutes: float = math.inf) -> None:
        self.hang: str | None = None
        self.give_up_reason: str | None = None
        self._actions = actions
        self._hang_minutes, self._hang_seconds, self._wait_minutes = hang_minutes, hang_minutes * 60, wait_minutes
        self._full_nodes: set[str] = set()
        self._last_heartbeat = time.monotonic()
        self._reported_no_worker = False
        self._received: dict[int, _Received] = {}
        self._ended: set[tuple[str, int]] = set()  # processes that end together with a worker that was ended
        self._warned = False

    def reset(self) -> None:
        """Forget hang, warning and ranks: new workers have started, perhaps fewer."""
        self.hang, self._warned = None, False
        self._received.clear()

    def forget_workers(self) -> None:
        """Forget the ranks of workers that Ray Train ends because one of them failed; ignore what they still send."""
        self._ended |= {received.heartbeat.process for received in self._received.values()}
        self._received.clear()

    def receive(self, heartbeat: Heartbeat) -> None:
        """Take in one heartbeat."""
        self._last_heartbeat, self._reported_no_worker = time.monotonic(), False
        if heartbeat.full_folder and heartbeat.node_id not in self._full_nodes:
            self._drain(heartbeat)
        if heartbeat.process in self._ended:
            return
        if heartbeat.activity == DONE:
            self._received.pop(heartbeat.rank, None)
        else:
            self._received[heartbeat.rank] = _Received(heartbeat, time.monotonic())

    def check(self) -> None:
        """Warn of a slow rank, once until all move again; end the process of one that hangs, or a run without workers."""
        now = time.monotonic()
        self._check_for_workers(now)
        warn_seconds = _WARN_FRACTION * self._hang_seconds
        late = {rank for rank, received in self._received.items() if received.idle(now) > warn_seconds}
        if not late:
            self._warned = False
            return
        rank = min(late, key=lambda rank: self._blame_order(rank, now))
        description = self._describe(rank, now)
        if not self._warned:
            self._actions.log(f"{description}; its process is ended if that lasts {self._hang_minutes:g} minutes")
            self._warned = True
        if self._received[rank].idle(now) <= self._hang_seconds:
            return
        processes = {received.heartbeat.process for received in self._received.values()}
        if self._actions.end_process(self._received[rank].heartbeat):
            self._ended |= processes
            self.hang = (
                f"{description}: longer than train.hang_minutes={self._hang_minutes:g}; check that process's node and log, then resume with"
                " --resume"
            )
            self._actions.log(f"{description}: its process was ended")
        self._received.clear()  # the others only waited for it

    def _drain(self, heartbeat: Heartbeat) -> None:
        """Take a node with a full disk out of use: no process can start there."""
        drained_before = frozenset(self._full_nodes)
        self._full_nodes.add(heartbeat.node_id)
        reason = f"node {heartbeat.node}: the disk of {heartbeat.full_folder} is full"
        try:
            has_other_nodes = self._actions.drain_node(heartbeat.node_id, reason, drained_before)
        except (UserError, ray.exceptions.RayError) as error:  # the run continues as it is
            self._actions.log(str(error))
            return
        if has_other_nodes:
            self._actions.log(f"{reason}; Ray starts nothing there until it is restarted on that node")
        else:
            self.give_up_reason = f"{reason}, and there is no other node; free some space, and resume with --resume"
            self._actions.log(self.give_up_reason)  # a trial of a search cannot be given up from here
            self._actions.give_up()

    def _check_for_workers(self, now: float) -> None:
        if self._wait_minutes == math.inf:
            return
        silence = now - self._last_heartbeat
        if silence > _NO_WORKER_SECONDS and not self._reported_no_worker:
            self._actions.log(
                f"no heartbeat of any worker for {_NO_WORKER_SECONDS:g} s; waiting at most resources.wait_minutes={self._wait_minutes:g}"
                " for room"
            )
            self._reported_no_worker = True
        if silence > _NO_WORKER_SECONDS + 60 * self._wait_minutes and self.give_up_reason is None:
            self.give_up_reason = (
                f"no room for the workers for longer than resources.wait_minutes={self._wait_minutes:g}; bring the cluster's nodes back,"
                " or lower resources.num_workers, and resume with --resume"
            )
            self._actions.give_up()

    def _blame_order(self, rank: int, now: float) -> tuple[bool, bool, int, int, float]:
        """Sort key: the rank to blame comes first."""
        received = self._received[rank]
        heartbeat = received.heartbeat
        waits_for_data = heartbeat.activity == WAITING
        return (
            not self._is_silent(rank, now),
            not waits_for_data,
            heartbeat.epoch,
            heartbeat.step,
            -received.idle(now),
        )

    def _is_silent(self, rank: int, now: float) -> bool:
        return now - self._received[rank].at > 2.5 * heartbeat_seconds(self._hang_minutes)

    def _describe(self, rank: int, now: float) -> str:
        received = self._received[rank]
        heartbeat = received.heartbeat
        sends = "sends no heartbeat" if self._is_silent(rank, now) else "sends heartbeats"
        return (
            f"rank {rank} (node {heartbeat.node}, process {heartbeat.pid}) has done nothing for {received.idle(now):.0f} s,"
            f" {sends}, last seen in epoch {heartbeat.epoch}, step {heartbeat.step}, {heartbeat.activity}"
        )


def end_process(heartbeat: Heartbeat) -> bool:
    """End the process of a heartbeat on its node, even a stopped one; return False if the process or the node is gone."""
    kill = _kill.options(scheduling_strategy=on_node(heartbeat.node_id))
    try:
        return bool(ray.get(kill.remote(heartbeat.pid), timeout=60))
    except ray.exceptions.RayError:  # the node is lost, or does not answer in time
        return False  # Ray Train notices that by itself


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
